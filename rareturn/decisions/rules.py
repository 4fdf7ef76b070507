"""Decision rules: from class probabilities, and from runs' logits, to labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rareturn.decisions.probabilities import BLENDS, blend, log_probabilities, softmax
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
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

    def to_dict(self) -> dict[str, Any]:
        """The rule's part of decision.json: plain numbers, lists and None."""
        return {
            "bias": [float(value) for value in self.bias],
            "protected_class": None if self.protected_class is None else int(self.protected_class),
            "threshold": None if self.threshold is None else float(self.threshold),
            "temperature": float(self.temperature),
        }

    @classmethod
    def from_dict(cls, content: Any, source: str = "decision.json") -> Decision:
        """The rule in the content of a decision.json, after every field of DESIGN 8 that is there has been checked.

        Args:
            content: what `json.load` gave.
            source: the file's name, for messages.

        Raises:
            InputError: not an object; a missing field; a field of the wrong type, length or range.
        """
        if not isinstance(content, Mapping):
            raise InputError(f"{source}: not a JSON object")
        missing = [
            key
            for key in ("label_names", *(field.name for field in dataclasses.fields(cls)))
            if key not in content
        ]
        if missing:
            raise InputError(*(f"{source}: {key}: missing" for key in missing))
        problems = _decision_problems(content)
        if problems:
            raise InputError(*(f"{source}: {problem}" for problem in problems))
        threshold = content["threshold"]
        return cls(
            bias=np.array(content["bias"], dtype=np.float64),
            protected_class=content["protected_class"],
            threshold=None if threshold is None else float(threshold),
            temperature=float(content["temperature"]),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _decision_problems(content: Mapping[str, Any]) -> list[str]:
    names, problems = content["label_names"], []
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        return ["label_names: expected a list of two or more names"]

    def is_label(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)

    bias = content["bias"]
    if not isinstance(bias, list) or len(bias) != len(names) or not all(map(_is_number, bias)):
        problems.append(f"bias: expected {len(names)} finite numbers, one a label")
    protected, threshold = content["protected_class"], content["threshold"]
    if protected is not None and not is_label(protected):
        problems.append(f"protected_class: {protected!r} is not a label index 0..{len(names) - 1} or null")
    if threshold is not None and not (_is_number(threshold) and 0 < threshold <= 1):
        problems.append(f"threshold: {threshold!r} is not a probability above 0 or null")
    if threshold is not None and protected is None:
        problems.append("threshold: given without a protected_class")
    if not (_is_number(content["temperature"]) and content["temperature"] > 0):
        problems.append(f"temperature: {content['temperature']!r} is not a positive number")
    positive = content.get("positive_labels", [0])
    if not isinstance(positive, list) or not positive or not all(map(is_label, positive)):
        problems.append("positive_labels: expected a list of one or more label indices")
    if content.get("blend", BLENDS[0]) not in BLENDS:
        problems.append(f"blend: {content['blend']!r} is not one of {', '.join(BLENDS)}")
    return problems + _runs_problems(content.get("runs"))


def _runs_problems(runs: Any) -> list[str]:
    if runs is None:
        return []
    if not isinstance(runs, list) or not runs or not all(isinstance(run, Mapping) for run in runs):
        return ["runs: expected a list of one or more objects"]
    problems = []
    for position, run in enumerate(runs):
        if not isinstance(run.get("reference"), str):
            problems.append(f"runs[{position}]: reference: missing or not a string")
        if not isinstance(run.get("revision"), (str, type(None))):
            problems.append(f"runs[{position}]: revision: not a string or null")
        if not (_is_number(run.get("weight")) and run["weight"] >= 0):
            problems.append(f"runs[{position}]: weight: missing, negative or not a number")
    if not problems and sum(run["weight"] for run in runs) <= 0:
        problems.append("runs: the weights sum to zero")
    return problems


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
    if decision.protected_class is not None and decision.threshold is not None:
        predictions[probabilities[:, decision.protected_class] >= decision.threshold] = (
            decision.protected_class
        )
    return predictions


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a rule says of n rows.

    Attributes:
        labels: int64 [n].
        probabilities: float64 [n, c], blended, after temperature, before bias and gate.
        decided_by: for each row `gate` (the protected label was sure enough), `bias` (another label than the likeliest
            won), `argmax` (the likeliest), or `vote`.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    decided_by: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """The one way from runs' logits to labels, and all that it takes to repeat it.

    Attributes:
        decision: bias, gate and temperature; of a vote, argmax stands here.
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
            logits: of each run, one array [n, c] a fold that predicts these rows; of out-of-fold rows one a run.
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
        gated = np.zeros(len(labels), dtype=bool)
        if self.decision.threshold is not None:
            gated = probabilities[:, self.decision.protected_class] >= self.decision.threshold
        reasons = np.where(gated, "gate", np.where(labels == probabilities.argmax(axis=1), "argmax", "bias"))
        return Prediction(labels, probabilities, reasons.tolist())
