"""`decision.json`: a rule, and the runs, weights and blend that it belongs to (DESIGN 8)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rareturn.decisions.probabilities import BLENDS, check_weights
from rareturn.decisions.rules import Decision, Rule
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError
from rareturn.files import check_content, read_json
from rareturn.runs.reading import Run
from rareturn.runs.tables import LogitTable

OVERRIDE = "--decision_from_other_runs applies it all the same"

Label = Annotated[int, Field(ge=0)]


class Checked(BaseModel):
    """A part of a JSON file: types as they stand there, no NaN, further keys left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class WeightedRun(Checked):
    """A run and its weight; `oof_sha256` (see `table_digest`) tells its logits from all others."""

    name: str
    reference: str
    revision: str | None
    weight: float = Field(ge=0)
    oof_sha256: str


class SavedRule(Checked):
    """The rule's part of `decision.json` and of `ensemble.json`."""

    label_names: list[str] = Field(min_length=2)
    positive_labels: list[Label] = Field(min_length=1)
    bias: list[float]
    protected_class: Label | None
    threshold: float | None = Field(gt=0, le=1)
    temperature: float = Field(gt=0)
    blend: Literal[*BLENDS]
    method: str
    runs: list[WeightedRun] = Field(min_length=1)
    vote: Voting | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count, vote, problems = len(self.label_names), self.vote, []
        labels = {"positive_labels": self.positive_labels, "protected_class": [self.protected_class]}
        if len(self.bias) != count:
            problems.append(f"bias: {count} numbers expected, one a label, not {len(self.bias)}")
        if self.threshold is not None and self.protected_class is None:
            problems.append("threshold: given without a protected_class")
        if not any(run.weight for run in self.runs):
            problems.append("runs: the weights sum to zero")
        if vote:
            if len(vote.label_scopes) != len(self.runs) or () in vote.label_scopes:
                problems.append("vote: label_scopes: one a run expected, none of them empty")
            scopes = [label for scope in vote.label_scopes for label in scope or ()]
            labels["vote"] = [vote.gate_label, vote.protected_class, *scopes]
        for key, numbers in labels.items():
            wrong = [label for label in numbers if label is not None and not 0 <= label < count]
            if wrong:
                problems.append(f"{key}: {wrong[0]} is not one of the labels 0 to {count - 1}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def rule(self) -> Rule:
        """The rule; its weights and the scopes of its vote are in the order of `runs`."""
        decision = Decision(np.array(self.bias), self.protected_class, self.threshold, self.temperature)
        weights = check_weights([run.weight for run in self.runs], len(self.runs))
        return Rule(decision, weights, self.method, self.blend, self.vote)

    def rule_for(self, runs: Sequence[Run], where: str) -> Rule:
        """The rule for the runs that it belongs to, in their order; an InputError if these are other runs."""
        rule, fitted = self.rule(), {(run.name, run.oof_sha256): place for place, run in enumerate(self.runs)}
        given = [(run.name, table_digest(run.oof)) for run in runs]
        if sorted(given) != sorted(fitted):
            names, of_given = sorted(name for name, _ in fitted), sorted(name for name, _ in given)
            problem = f"belongs to {', '.join(names)}, not to {', '.join(of_given)}"
            if names == of_given:
                name = next(name for name, digest in given if (name, digest) not in fitted)
                problem = f"was fitted on other out-of-fold logits of {name}"
            raise InputError(f"{where}: the decision {problem}; {OVERRIDE}")
        order = [fitted[key] for key in given]
        voting = self.vote
        if voting:
            voting = replace(voting, label_scopes=tuple(voting.label_scopes[place] for place in order))
        return replace(rule, weights=rule.weights[order], voting=voting)


def table_digest(table: LogitTable) -> str:
    """SHA-256 of a table's ids, labels and logits, whatever the order of its rows."""
    table = table.take(np.argsort(np.array(table.id)))
    digest = hashlib.sha256(json.dumps([table.id, table.label.tolist()]).encode())
    digest.update(np.ascontiguousarray(table.logits, dtype="<f4").tobytes())
    return digest.hexdigest()


def rule_content(rule: Rule, runs: Sequence[Run]) -> dict[str, Any]:
    """What `SavedRule` reads back."""
    content = {
        "label_names": runs[0].label_names,
        "positive_labels": runs[0].positive_labels,
        **asdict(rule.decision),
        "bias": rule.decision.bias.tolist(),
        "blend": rule.blend,
        "method": rule.method,
        "runs": [
            {key: getattr(run, key) for key in ("name", "reference", "revision")}
            | {"weight": float(weight), "oof_sha256": table_digest(run.oof)}
            for run, weight in zip(runs, rule.weights, strict=True)
        ],
    }
    return content | ({"vote": asdict(rule.voting)} if rule.voting else {})


def saved_decision(
    rule: Rule, runs: Sequence[Run], metrics: Mapping[str, Any], *, metric: str, seed: int
) -> dict[str, Any]:
    """The content of a `decision.json`; `metrics` has the scores of its three stages, among others."""
    return {
        **rule_content(rule, runs),
        "metric": metric,
        "fold_groups": runs[0].info["fold_groups"],
        "seed": seed,
        "metrics": {stage: metrics[stage] for stage in ("argmax", "in_sample", "cross_fitted")},
    }


def read_decision(path: str) -> SavedRule:
    """The rule in a `decision.json`; an InputError has one line for each field that is missing or wrong."""
    return check_content(SavedRule, read_json(path), path)
