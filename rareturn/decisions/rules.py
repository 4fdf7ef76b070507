"""Decision rules: from class probabilities, and from runs' logits, to labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rareturn.decisions.probabilities import BLENDS, blend, log_probabilities, softmax
from rareturn.decisions.voting import Voting


@dataclass(frozen=True, eq=False)
class Decision:
    """A decision rule: `protected_class` where its probability reaches `threshold`, else argmax of log p + bias.

    Args:
        bias: float64 [c], in nats, one a label; only differences matter.
        protected_class: label index of the gate; None for no gate.
        threshold: probability from which the gate decides; None for no gate.
        temperature: what every run's logits are divided by before the softmax.
    """

    bias: np.ndarray
    protected_class: int | None = None
    threshold: float | None = None
    temperature: float = 1.0

    def gated(self, probabilities: np.ndarray) -> np.ndarray:
        """For which rows of probabilities [n, c] the gate decides: bool [n]."""
        if self.threshold is None:
            return np.zeros(len(probabilities), dtype=bool)
        return probabilities[:, self.protected_class] >= self.threshold


def decide(probabilities: np.ndarray, decision: Decision) -> np.ndarray:
    """Apply a rule (DESIGN 8; the gate is the paper's).

    Args:
        probabilities: [n, c], of logits that `decision.temperature` has already divided.
        decision: the rule.

    Returns:
        int64 [n] label indices; a tie goes to the lower label, a probability equal to the threshold to the gate.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    predictions = (log_probabilities(probabilities) + decision.bias).argmax(axis=1)
    gated = decision.gated(probabilities)
    if gated.any():
        predictions[gated] = decision.protected_class
    return predictions


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a rule says of n rows.

    Attributes:
        labels: int64 [n].
        probabilities: float64 [n, c], blended, after temperature, before bias and gate.
        decided_by: for each row `gate` (the protected label was sure enough), `bias` (another label than the likeliest
            won), `argmax` (the likeliest won), or `vote`.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    decided_by: list[str]


@dataclass(frozen=True, eq=False)
class Rule:
    """The one way from runs' logits to labels, and all that it takes to repeat it.

    Attributes:
        decision: bias, gate and temperature; unused where there is a vote.
        weights: of the runs in the blend, float64 [runs].
        method: how the rule was found.
        blend: see `probabilities.blend`.
        voting: decides in place of `decision` where there is one.
    """

    decision: Decision
    weights: np.ndarray
    method: str
    blend: str = BLENDS[0]
    voting: Voting | None = None

    def run_probabilities(self, logits: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Each run's probabilities [n, c]: the mean over its folds' models (DESIGN 8).

        Args:
            logits: of each run, one array [n, c] for each fold whose model predicts these rows; one a run for
                out-of-fold rows.
        """
        temperature = 1.0 if self.voting else self.decision.temperature
        return [np.mean([softmax(fold, temperature) for fold in folds], axis=0) for folds in logits]

    def predict(self, logits: Sequence[Sequence[np.ndarray]]) -> Prediction:
        """Labels of rows; `logits` as `run_probabilities` takes them."""
        runs = self.run_probabilities(logits)
        probabilities = blend(runs, self.weights, self.blend)
        if self.voting is not None:
            return Prediction(self.voting.predict(runs), probabilities, ["vote"] * len(probabilities))
        labels = decide(probabilities, self.decision)
        likeliest = np.where(labels == probabilities.argmax(axis=1), "argmax", "bias")
        decided_by = np.where(self.decision.gated(probabilities), "gate", likeliest)
        return Prediction(labels, probabilities, decided_by.tolist())


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a rule makes of the out-of-fold rows that it was fitted on, and what it is compared with.

    Attributes:
        rule: the one to use.
        untuned: argmax of the same runs, at weights that nothing was fitted for.
        argmax, in_sample: labels [n] by `untuned` and by `rule`.
        cross_fitted: labels [repeats, n] by rules that were fitted on other dialogues.
        before, after: blended probabilities [n, c] by `untuned` and by `rule`.
        scaled: the same at a temperature that was fitted on other dialogues.
        notes: sentences for the report.
    """

    rule: Rule
    untuned: Rule
    argmax: np.ndarray
    in_sample: np.ndarray
    cross_fitted: np.ndarray
    before: np.ndarray
    after: np.ndarray
    scaled: np.ndarray
    notes: list[str]

    @property
    def voting(self) -> Voting | None:
        """The vote, where one decides."""
        return self.rule.voting
