"""Why a rule gives a row its label, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rareturn.decisions.rules import Rule
from rareturn.decisions.voting import Voting


@dataclass(frozen=True, eq=False)
class Explained:
    """What a rule says of a row, and why.

    Attributes:
        probabilities: float64 [c], as in `rules.Prediction`.
        runner_up: the likeliest other label.
        why: a sentence or two.
        alone: the label that each run finds likeliest.
    """

    label: int
    probabilities: np.ndarray
    runner_up: int
    why: str
    alone: list[int]

    @property
    def margin(self) -> float:
        """The label's probability less the runner-up's; below 0 where the rule overruled it."""
        return float(self.probabilities[self.label] - self.probabilities[self.runner_up])


def percent(probability: float) -> str:
    """Such as `38.5 %`."""
    return f"{100 * probability:.1f} %"


def explain(rule: Rule, names: Sequence[str], logits: Sequence[Sequence[np.ndarray]]) -> list[Explained]:
    """What `Rule.predict` says of these logits, row by row, with the reasons."""
    said, runs = rule.predict(logits), rule.run_probabilities(logits)
    labels, quoted = said.labels.tolist(), [f"“{name}”" for name in names]
    if rule.voting:
        reasons = (_soft_votes if rule.voting.soft else _votes)(rule.voting, quoted, runs, labels)
    explained = []
    for row, (label, p) in enumerate(zip(labels, said.probabilities, strict=True)):
        runner_up = next(other for other in np.argsort(-p, kind="stable").tolist() if other != label)
        name, other, how = quoted[label], quoted[runner_up], said.decided_by[row]
        if how == "gate":
            gate = f"{name} has {percent(p[label])}, and from {percent(rule.decision.threshold)} on it wins outright"
            why = f"The gate decided: {gate}."
        elif how == "bias":
            times = np.exp(rule.decision.bias[label] - rule.decision.bias[runner_up])
            likelier = f"{other} is likelier, {percent(p[runner_up])} against {percent(p[label])}"
            why = f"The bias decided: {likelier}, but the rule weighs {name} {times:.2f} times as much."
        else:
            why = reasons[row] if rule.voting else "The likeliest label won."
        alone = [int(run[row].argmax()) for run in runs]
        explained.append(Explained(label, p, runner_up, why, alone))
    return explained


def _soft_votes(voting: Voting, names: Sequence[str], runs: Sequence[np.ndarray], _: list[int]) -> list[str]:
    gate, shares = voting.gate_label, voting.soft_vote(runs)
    best = np.where(np.arange(len(names)) == gate, -1, shares).argmax(axis=1).tolist()
    said = "The gatekeepers give {} {}. The specialists share the rest: {} has the most, {}."
    return [
        said.format(names[gate], percent(row[gate]), names[other], percent(row[other]))
        for row, other in zip(shares, best, strict=True)
    ]


def _votes(voting: Voting, names: Sequence[str], runs: Sequence[np.ndarray], labels: list[int]) -> list[str]:
    reasons, of = [], voting.label_scopes.count(None)
    for label, for_gate, tally in zip(labels, *voting.tally(runs), strict=True):
        why = f"{for_gate} of {of} gatekeepers voted for {names[voting.gate_label]}, "
        if for_gate * 2 > of:
            reasons.append(f"{why}more than half.")
            continue
        ranked = [other for other in np.argsort(-tally, kind="stable") if tally[other] > 0]
        counts = ", ".join(f"{names[other]} {tally[other]}" for other in ranked)
        why += f"not more than half. Votes for other labels: {counts or 'none'}."
        if (tally == tally.max()).sum() > 1:
            why += f" A tie goes to {names[label]}."
        reasons.append(why)
    return reasons
