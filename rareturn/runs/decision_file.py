"""`decision.json`: a rule, and the runs, weights and blend that it belongs to (DESIGN 8)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rareturn.decisions.probabilities import BLENDS, check_weights
from rareturn.decisions.rules import Decision, Rule
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError
from rareturn.files import check_content, read_json
from rareturn.runs.reading import Run
from rareturn.runs.tables import LogitTable

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

    @field_validator("bias")
    @classmethod
    def _one_a_label(cls, bias: list[float], info: ValidationInfo) -> list[float]:
        names = info.data.get("label_names")
        if names and len(bias) != len(names):
            raise ValueError(f"{len(names)} numbers expected, one a label, not {len(bias)}")
        return bias

    @field_validator("positive_labels", "protected_class", "vote")
    @classmethod
    def _known_labels(cls, value: Any, info: ValidationInfo) -> Any:
        labels = value if isinstance(value, list) else [value]
        if isinstance(value, Voting):
            labels = [value.gate_label, value.protected_class]
            labels += [label for scope in value.label_scopes for label in scope or ()]
            if "runs" in info.data and len(value.label_scopes) != len(info.data["runs"]):
                raise ValueError("label_scopes: one a run expected")
            if () in value.label_scopes:
                raise ValueError("label_scopes: a scope without labels")
        count = len(info.data.get("label_names", ()))
        wrong = [label for label in labels if count and label is not None and not 0 <= label < count]
        if wrong:
            raise ValueError(f"{wrong[0]} is not one of the labels 0 to {count - 1}")
        return value

    @field_validator("threshold")
    @classmethod
    def _has_a_class(cls, threshold: float | None, info: ValidationInfo) -> float | None:
        if threshold is not None and info.data.get("protected_class", 0) is None:
            raise ValueError("given without a protected_class")
        return threshold

    @field_validator("runs")
    @classmethod
    def _some_weight(cls, runs: list[WeightedRun]) -> list[WeightedRun]:
        if not sum(run.weight for run in runs):
            raise ValueError("the weights sum to zero")
        return runs

    def rule(self) -> Rule:
        """The rule; its weights and the scopes of its vote are in the order of `runs`."""
        decision = Decision(np.array(self.bias), self.protected_class, self.threshold, self.temperature)
        weights = check_weights([run.weight for run in self.runs], len(self.runs))
        return Rule(decision, weights, self.method, self.blend, self.vote)

    def rule_for(self, runs: Sequence[Run], where: str) -> Rule:
        """The rule for the runs that it belongs to, in their order.

        Raises:
            InputError: one line with the difference, if these are other runs.
        """
        rule, fitted = self.rule(), {(run.name, run.oof_sha256): place for place, run in enumerate(self.runs)}
        given = [(run.name, table_digest(run.oof)) for run in runs]
        if sorted(given) != sorted(fitted):
            names, of_given = sorted(name for name, _ in fitted), sorted(name for name, _ in given)
            problem = f"belongs to {', '.join(names)}, not to {', '.join(of_given)}"
            if names == of_given:
                name = next(name for name, digest in given if (name, digest) not in fitted)
                problem = f"was fitted on other out-of-fold logits of {name}"
            raise InputError(
                f"{where}: the decision {problem}; --decision_from_other_runs applies it all the same"
            )
        order = [fitted[key] for key in given]
        voting = self.vote and Voting(
            self.vote.gate_label,
            self.vote.protected_class,
            tuple(self.vote.label_scopes[place] for place in order),
            self.vote.soft,
        )
        return Rule(rule.decision, rule.weights[order], rule.method, rule.blend, voting)


def table_digest(table: LogitTable) -> str:
    """SHA-256 of a table's ids, labels and logits, whatever the order of its rows."""
    table = table.take(np.argsort(np.array(table.id)))
    digest = hashlib.sha256(json.dumps([table.id, table.label.tolist()]).encode())
    digest.update(np.ascontiguousarray(table.logits, dtype="<f4").tobytes())
    return digest.hexdigest()


def rule_content(rule: Rule, runs: Sequence[Run]) -> dict[str, Any]:
    """What `SavedRule` reads back."""
    weighted = [
        WeightedRun(
            name=run.name,
            reference=run.reference,
            revision=run.revision,
            weight=float(weight),
            oof_sha256=table_digest(run.oof),
        )
        for run, weight in zip(runs, rule.weights, strict=True)
    ]
    decision = rule.decision.to_dict()
    saved = SavedRule(
        label_names=runs[0].label_names,
        positive_labels=runs[0].positive_labels,
        **decision,
        blend=rule.blend,
        method=rule.method,
        runs=weighted,
        vote=rule.voting,
    )
    return saved.model_dump(exclude=None if rule.voting else {"vote"}, mode="json")


def saved_decision(
    rule: Rule, runs: Sequence[Run], metrics: Mapping[str, Any], *, metric: str, seed: int
) -> dict[str, Any]:
    """The content of a `decision.json`.

    Args:
        metrics: has the scores of the stages `argmax`, `in_sample` and `cross_fitted`.
        metric, seed: those that the rule was fitted for and with.
    """
    return {
        **rule_content(rule, runs),
        "metric": metric,
        "fold_groups": runs[0].info["fold_groups"],
        "seed": seed,
        "metrics": {stage: metrics[stage] for stage in ("argmax", "in_sample", "cross_fitted")},
    }


def read_decision(path: str) -> SavedRule:
    """The rule in a `decision.json`.

    Raises:
        InputError: an unreadable file, or one line for each field that is missing or wrong.
    """
    return check_content(SavedRule, read_json(path), path)
