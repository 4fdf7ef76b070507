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

    `bias` is float64 [c], in nats; only differences matter. Without a gate there is no `threshold`. Every run's logits
    are divided by `temperature` before the softmax.
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
    """Labels int64 [n] by a rule (DESIGN 8; the gate is the paper's) of probabilities [n, c] after its temperature.

    A tie goes to the lower label, a probability equal to the threshold to the gate.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    predictions = (log_probabilities(probabilities) + decision.bias).argmax(axis=1)
    if decision.threshold is not None:
        predictions[decision.gated(probabilities)] = decision.protected_class
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

    `weights` are those of the runs in the blend, float64 [runs]; `voting` decides in place of `decision` if there is one.
    """

    decision: Decision
    weights: np.ndarray
    method: str
    blend: str = BLENDS[0]
    voting: Voting | None = None

    def run_probabilities(self, logits: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Each run's probabilities [n, c], the mean over its folds' models (DESIGN 8); `logits` as `predict` takes them."""
        temperature = 1.0 if self.voting else self.decision.temperature
        return [np.mean([softmax(fold, temperature) for fold in folds], axis=0) for folds in logits]

    def predict(self, logits: Sequence[Sequence[np.ndarray]]) -> Prediction:
        """Labels of rows.

        `logits` are, of each run, one array [n, c] for each fold whose model predicts these rows; one a run for
        out-of-fold rows.
        """
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
        untuned: argmax of the same runs, at weights that nothing was fitted for.
        argmax, in_sample: labels [n] by `untuned` and by `rule`, the one to use.
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
