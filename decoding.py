"""Decision rules on class probabilities: fitting them, scoring them, and telling what the score is worth.

numpy only. Labels are indices 0..c-1, `groups` are dialogue ids (any hashable values, one a row). A rule is fitted on
out-of-fold probabilities; what it scores on the rows that it was fitted on is optimistic, so every figure that is
meant to be believed comes from `cross_fit`, which fits and scores on different dialogues.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from command_line import InputError

METRIC_NAMES = (
    "accuracy",
    "macro_f1_positive",
    "macro_precision_positive",
    "macro_recall_positive",
    "macro_f1",
    "weighted_f1",
)
BLENDS = ("arithmetic", "geometric")

# Probabilities below this are raised to it before a logarithm is taken: softmax of float32 logits underflows to 0, and a
# label outside a specialist's scope has probability 0.
SMALLEST_PROBABILITY = 1e-30
# Two scores closer than this are equal: it is far above the rounding of a mean of ratios, far below one row's worth.
SCORE_TOLERANCE = 1e-11


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Natural log of `softmax`, float64, same shape; exact where the probability itself would underflow."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return scaled


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [..., c] (float64, rows sum to 1) of logits [..., c] divided by `temperature`."""
    return np.exp(log_softmax(logits, temperature))


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Natural log [n, c] of probabilities [n, c], with those below `SMALLEST_PROBABILITY` raised to it."""
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), SMALLEST_PROBABILITY))


def check_logits(logits: np.ndarray, source: str) -> None:
    """Refuse logits [n, c] from which no decision can be made.

    Raises:
        InputError: no rows, a NaN or an infinite value (with the first row's position), or the same value everywhere
            within every row, `source` being named in each.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[0] == 0 or logits.shape[1] < 2:
        raise InputError(f"{source}: logits have shape {list(logits.shape)}, expected [rows, labels >= 2]")
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise InputError(
            f"{source}: logits: {bad.sum()} row(s) with NaN or infinity, first at row {int(bad.argmax())}"
        )
    if (logits == logits[:, :1]).all():
        raise InputError(f"{source}: logits: constant, every label has the same logit in every row")
    if (logits == logits[:1]).all() and len(logits) > 1:
        raise InputError(f"{source}: logits: constant, every row has the same logits")


def check_weights(weights: Sequence[float], count: int) -> np.ndarray:
    """Blend weights scaled to sum 1, float64 [count].

    Raises:
        InputError: another count, a negative or non-finite weight, or a sum of zero.
    """
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (count,):
        raise InputError(f"weights: {array.size} given for {count} run(s)")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(
            f"weights: {[float(weight) for weight in array]}: every weight must be finite and not negative"
        )
    if array.sum() <= 0:
        raise InputError(f"weights: {[float(weight) for weight in array]}: they sum to zero")
    return array / array.sum()


def blend(
    probabilities: Sequence[np.ndarray], weights: Sequence[float] | None = None, kind: str = "arithmetic"
) -> np.ndarray:
    """Weighted mean of runs' probabilities.

    Args:
        probabilities: one array [n, c] a run.
        weights: one a run, scaled to sum 1; equal by default.
        kind: "arithmetic" (sum of w_r p_r) or "geometric" (exp of the sum of w_r log p_r, scaled to sum 1 a row).

    Returns:
        float64 [n, c].

    Raises:
        InputError: weights that `check_weights` refuses.
        ValueError: an unknown kind.
    """
    weights = check_weights([1.0] * len(probabilities) if weights is None else weights, len(probabilities))
    used = [(weight, array) for weight, array in zip(weights, probabilities, strict=True) if weight > 0]
    if kind == "arithmetic":
        return sum(weight * np.asarray(array, dtype=np.float64) for weight, array in used)
    if kind == "geometric":
        return softmax(sum(weight * log_probabilities(array) for weight, array in used))
    raise ValueError(f"blend: {kind!r} is not one of {', '.join(BLENDS)}")


# ---------------------------------------------------------------------------------------------------------------------
# The rule


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
    return problems + _run_problems(content.get("runs"))


def _run_problems(runs: Any) -> list[str]:
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


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
#
# Every metric of DESIGN 9 is a sum over labels of weight_c * term(hits_c, support_c, predicted_c), which is what lets
# a sweep update one term a step and a bootstrap work on per-dialogue counts.


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def _term(metric: str, hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    if metric == "macro_precision_positive":
        return _ratio(hits, predicted)
    if metric == "macro_recall_positive":
        return _ratio(hits, support)
    if metric == "accuracy":
        return np.asarray(hits, dtype=np.float64)
    return _ratio(2.0 * hits, support + predicted)


def _term_weights(metric: str, support: np.ndarray, positive_labels: Sequence[int]) -> np.ndarray:
    """Weight of each label's term, [..., c] like `support`."""
    if metric not in METRIC_NAMES:
        raise ValueError(f"metric: {metric!r} is not one of {', '.join(METRIC_NAMES)}")
    total = support.sum(axis=-1, keepdims=True)
    if metric == "accuracy":
        return np.broadcast_to(_ratio(np.ones(total.shape), total), support.shape)
    if metric == "weighted_f1":
        return _ratio(support.astype(np.float64), np.broadcast_to(total, support.shape))
    weights = np.zeros(support.shape[-1])
    if metric == "macro_f1":
        weights[:] = 1.0 / support.shape[-1]
    else:
        weights[list(positive_labels)] = 1.0 / len(positive_labels)
    return np.broadcast_to(weights, support.shape)


def _score_counts(
    metric: str, hits: np.ndarray, support: np.ndarray, predicted: np.ndarray, positive_labels: Sequence[int]
) -> np.ndarray:
    """The metric of counts [..., c]; leading axes are kept."""
    return (_term_weights(metric, support, positive_labels) * _term(metric, hits, support, predicted)).sum(
        axis=-1
    )


def _counts(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hits, support, predicted), float64 [num_labels] each, rows counting `weights` (1 by default)."""
    right = labels == predictions
    return (
        np.bincount(labels[right], None if weights is None else weights[right], num_labels).astype(
            np.float64
        ),
        np.bincount(labels, weights, num_labels).astype(np.float64),
        np.bincount(predictions, weights, num_labels).astype(np.float64),
    )


def score(
    labels: np.ndarray,
    predictions: np.ndarray,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
) -> float:
    """One metric of DESIGN 9.

    Args:
        labels, predictions: int [n] label indices.
        num_labels: c.
        positive_labels: what the `_positive` metrics average over; a label with no row and no prediction counts 0.
        metric: one of `METRIC_NAMES`.
    """
    return float(
        _score_counts(
            metric, *_counts(np.asarray(labels), np.asarray(predictions), num_labels), positive_labels
        )
    )


def scores(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int, positive_labels: Sequence[int]
) -> dict[str, Any]:
    """Every metric of DESIGN 9 by name, and `f1_per_class` (a list, one number a label)."""
    counts = _counts(np.asarray(labels), np.asarray(predictions), num_labels)
    result: dict[str, Any] = {
        name: float(_score_counts(name, *counts, positive_labels)) for name in METRIC_NAMES
    }
    result["f1_per_class"] = [float(value) for value in _term("macro_f1", *counts)]
    return result


def _group_indices(groups: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Each row's group as 0..g-1 in order of first appearance, and g."""
    numbers: dict[Hashable, int] = {}
    indices = np.fromiter(
        (numbers.setdefault(group, len(numbers)) for group in groups), np.int64, len(groups)
    )
    return indices, len(numbers)


def _group_counts(
    labels: np.ndarray, predictions: np.ndarray, group_indices: np.ndarray, num_groups: int, num_labels: int
) -> np.ndarray:
    """Hits, support and predicted counts of each dialogue, float64 [num_groups, 3 * num_labels]."""
    right = labels == predictions
    size = num_groups * num_labels
    cells = (
        np.bincount(group_indices[right] * num_labels + labels[right], minlength=size),
        np.bincount(group_indices * num_labels + labels, minlength=size),
        np.bincount(group_indices * num_labels + predictions, minlength=size),
    )
    return np.concatenate([cell.reshape(num_groups, num_labels) for cell in cells], axis=1).astype(np.float64)


def _resampled_counts(group_counts: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Summed counts of `num_samples` bootstrap samples of the groups, [num_samples, columns]."""
    num_groups = len(group_counts)
    generator = np.random.default_rng(seed)
    sums = np.empty((num_samples, group_counts.shape[1]))
    step = max(1, 4_000_000 // num_groups)
    for start in range(0, num_samples, step):
        size = min(step, num_samples - start)
        draws = (
            generator.integers(num_groups, size=(size, num_groups)) + np.arange(size)[:, None] * num_groups
        )
        times = np.bincount(draws.ravel(), minlength=size * num_groups).reshape(size, num_groups)
        sums[start : start + size] = times @ group_counts
    return sums


def bootstrap_scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    num_samples: int = 2000,
    seed: int = 42,
) -> np.ndarray:
    """The metric on bootstrap samples of whole dialogues, float64 [num_samples].

    The samples depend on the seed and the number of dialogues alone, so two calls on the same rows are paired and their
    difference is the bootstrap of the paired difference.

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: then each sample's value is the mean over the repeats.
        groups: dialogue ids [n].
        num_samples: bootstrap samples.
    """
    counts, score_of = _dialogue_counts(labels, predictions, groups, num_labels, positive_labels, metric)
    return score_of(_resampled_counts(counts, num_samples, seed))


def _dialogue_counts(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str,
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Each dialogue's counts [num_groups, k], and the metric of sums of such counts [samples, k] -> [samples]."""
    labels, predictions = np.asarray(labels), np.atleast_2d(np.asarray(predictions))
    group_indices, num_groups = _group_indices(groups)
    counts = np.concatenate(
        [_group_counts(labels, row, group_indices, num_groups, num_labels) for row in predictions], axis=1
    )

    def score_of(sums: np.ndarray) -> np.ndarray:
        hits, support, predicted = np.moveaxis(sums.reshape(len(sums), -1, 3, num_labels), 2, 0)
        return _score_counts(metric, hits, support, predicted, positive_labels).mean(axis=1)

    return counts, score_of


def bootstrap_interval(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    num_samples: int = 2000,
    seed: int = 42,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of a metric, by bootstrap over dialogues; arguments as `bootstrap_scores`.

    Bias-corrected and accelerated (Efron, 1987): macro F1 of few rows is a biased and skewed statistic, and plain
    percentiles miss a truth above them five times as often as one below them (docs/LOG.md).
    """
    counts, score_of = _dialogue_counts(labels, predictions, groups, num_labels, positive_labels, metric)
    return _accelerated_interval(counts, score_of, num_samples, seed, level)


def difference_interval(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    num_samples: int = 2000,
    seed: int = 42,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the second predictions' score less the first's, both on the same bootstrap samples of dialogues.

    Arguments as `bootstrap_scores`; `first` and `second` may have different numbers of repeats.
    """
    rest = (groups, num_labels, positive_labels, metric)
    first_counts, first_score = _dialogue_counts(labels, first, *rest)
    second_counts, second_score = _dialogue_counts(labels, second, *rest)
    border = first_counts.shape[1]
    return _accelerated_interval(
        np.concatenate([first_counts, second_counts], axis=1),
        lambda sums: second_score(sums[:, border:]) - first_score(sums[:, :border]),
        num_samples,
        seed,
        level,
    )


def _accelerated_interval(
    counts: np.ndarray,
    score_of: Callable[[np.ndarray], np.ndarray],
    num_samples: int,
    seed: int,
    level: float,
) -> tuple[float, float]:
    """BCa interval of a score of summed counts, the dialogues' being `counts` [g, k]."""
    total = counts.sum(axis=0)
    samples = score_of(_resampled_counts(counts, num_samples, seed))
    estimate, left_out = float(score_of(total[None])[0]), score_of(total - counts)
    normal = NormalDist()
    below = (samples < estimate - SCORE_TOLERANCE).mean() + (samples <= estimate + SCORE_TOLERANCE).mean()
    edge = 0.5 / len(samples)
    bias = normal.inv_cdf(float(np.clip(below / 2, edge, 1 - edge)))
    spread = left_out.mean() - left_out
    squares = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * squares**1.5) if squares > SCORE_TOLERANCE**2 else 0.0
    quantiles = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(tail)
        # The denominator reaches 0 for a handful of dialogues only, where no interval is worth much.
        quantiles.append(normal.cdf(bias + shifted / max(1 - acceleration * shifted, 0.05)))
    low, high = np.quantile(samples, quantiles)
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


def _minimise(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, max_steps: int = 200
) -> np.ndarray:
    """L-BFGS (memory 8) with a backtracking line search (Nocedal and Wright, algorithms 7.4 and 3.1).

    `objective` returns value and gradient [k]; `start` is [k], and so is the result.
    """
    point = np.array(start, dtype=np.float64)
    value, gradient = objective(point)
    memory: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(max_steps):
        direction = _two_loop(gradient, memory)
        slope = float(gradient @ direction)
        if slope >= 0:
            memory, direction = [], -gradient
            slope = float(gradient @ direction)
        # The first step has no curvature to go by, so it is kept to length 1.
        step = 1.0 if memory else 1.0 / max(1.0, float(np.linalg.norm(gradient)))
        while True:
            candidate = point + step * direction
            new_value, new_gradient = objective(candidate)
            if new_value <= value + 1e-4 * step * slope or step < 1e-8:
                break
            step /= 2
        if not new_value < value - 1e-9 * max(1.0, abs(value)):
            break
        move, change = candidate - point, new_gradient - gradient
        if move @ change > 1e-12:
            memory = [*memory[-7:], (move, change)]
        point, value, gradient = candidate, new_value, new_gradient
    return point


def _two_loop(gradient: np.ndarray, memory: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    direction, coefficients = -gradient, []
    for move, change in reversed(memory):
        coefficients.append((move @ direction) / (move @ change))
        direction = direction - coefficients[-1] * change
    if memory:
        move, change = memory[-1]
        direction = direction * (move @ change) / (change @ change)
    for (move, change), coefficient in zip(memory, reversed(coefficients), strict=True):
        direction = direction + move * (coefficient - (change @ direction) / (move @ change))
    return direction


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log probability of the label, in nats."""
    return float(-log_probabilities(probabilities[np.arange(len(labels)), labels]).mean())


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of the squared distance of the probabilities to the one-hot label, 0 to 2 (Brier, 1950)."""
    own = probabilities[np.arange(len(labels)), labels]
    return float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error of the most likely label, in bins of equal width (Guo et al., 2017)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, right, num_bins) - np.bincount(bins, confidence, num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def probability_quality(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`log_loss`, `brier` and `ece` of probabilities [n, c]."""
    return {
        "log_loss": log_loss(probabilities, labels),
        "brier": brier_score(probabilities, labels),
        "ece": calibration_error(probabilities, labels),
    }


def fit_temperature(
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    weights: Sequence[float] | None = None,
    kind: str = "arithmetic",
) -> float:
    """The one temperature for every run's logits that makes their blend's log loss least (Guo et al., 2017).

    Golden-section search over its logarithm, between 1/20 and 20.

    Args:
        logits: one array [n, c] a run.
        labels: int [n].
        weights, kind: as in `blend`.
    """

    def loss(log_temperature: float) -> float:
        return log_loss(
            blend([softmax(run, math.exp(log_temperature)) for run in logits], weights, kind), labels
        )

    ratio = (math.sqrt(5) - 1) / 2
    low, high = -math.log(20), math.log(20)
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    losses = [loss(inner[0]), loss(inner[1])]
    while high - low > 1e-4:
        if losses[0] <= losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - ratio * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + ratio * (high - low)
            losses[1] = loss(inner[1])
    return math.exp((low + high) / 2)


def _fit_vector(log_p: np.ndarray, labels: np.ndarray, penalty: float = 0.1) -> tuple[float, np.ndarray]:
    """Vector scaling with one slope (Guo et al., 2017): (a, b [c]) of softmax(a log p + b), least log loss.

    The penalty on b (squared, summed; against a log loss summed over rows) matters for labels without rows only.
    """
    rows = np.arange(len(labels))
    seen = np.bincount(labels, minlength=log_p.shape[1])

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, offset = parameters[0], parameters[1:]
        log_q = log_softmax(slope * log_p + offset)
        value = -log_q[rows, labels].sum() + penalty * (offset @ offset)
        q = np.exp(log_q)
        slope_gradient = float((q * log_p).sum() - log_p[rows, labels].sum())
        gradient = np.concatenate([[slope_gradient], q.sum(axis=0) - seen + 2 * penalty * offset])
        return value / len(labels), gradient / len(labels)

    parameters = _minimise(objective, np.concatenate([[1.0], np.zeros(log_p.shape[1])]))
    # A slope of zero or below says that the probabilities tell nothing; the bias would be without bound.
    return max(float(parameters[0]), 0.05), parameters[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Exact search


class _Problem:
    """Rows on which a rule is searched: log probabilities, labels, row weights, the metric and the class of the gate."""

    def __init__(
        self,
        probabilities: np.ndarray,
        labels: np.ndarray,
        positive_labels: Sequence[int],
        metric: str,
        protected_class: int | None = None,
        weights: np.ndarray | None = None,
    ):
        self.probabilities = np.asarray(probabilities, dtype=np.float64)
        self.log_p = log_probabilities(self.probabilities)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.positive_labels, self.metric, self.protected_class = positive_labels, metric, protected_class
        self.num_labels = self.log_p.shape[1]
        self.weights = np.ones(len(self.labels)) if weights is None else np.asarray(weights, dtype=np.float64)
        self.support = np.bincount(self.labels, self.weights, self.num_labels)
        self.term_weights = np.array(_term_weights(metric, self.support, positive_labels))
        shares = self.support + 0.5
        self.log_prior = np.log(shares / shares.sum())

    def subset(self, rows: np.ndarray, weights: np.ndarray | None = None) -> _Problem:
        """The problem on some rows, with other weights if given."""
        return _Problem(
            self.probabilities[rows],
            self.labels[rows],
            self.positive_labels,
            self.metric,
            self.protected_class,
            self.weights[rows] if weights is None else weights,
        )

    def score(self, bias: np.ndarray, threshold: float | None = None) -> float:
        """The metric of a rule on these rows."""
        predictions = (self.log_p + bias).argmax(axis=1)
        if threshold is not None:
            predictions[self.probabilities[:, self.protected_class] >= threshold] = self.protected_class
        counts = _counts(self.labels, predictions, self.num_labels, self.weights)
        return float((self.term_weights * _term(self.metric, *counts)).sum())


def _sweep_scores(
    problem: _Problem,
    labels: np.ndarray,
    weights: np.ndarray,
    origin: np.ndarray,
    target: int,
    counts: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Scores after moving 0, 1, … m rows, in the order given, from the label `origin` that predicts them to `target`.

    Only two labels' terms change a step, and a label loses its rows in a known order: cumulative sums give every score
    at once.

    Args:
        labels, weights, origin: of the rows that move, in order, [m]; no origin is `target`.
        counts: hits, support and predicted before the first move, [c] each.

    Returns:
        float64 [m + 1].
    """
    hits, support, predicted = counts
    metric, term_weights = problem.metric, problem.term_weights
    moved = np.concatenate([[0.0], np.cumsum(weights)])
    moved_hits = np.concatenate([[0.0], np.cumsum(weights * (labels == target))])
    gained = _term(metric, hits[target] + moved_hits, support[target], predicted[target] + moved)
    # Grouped by origin, each group in order: what a label has lost is a cumulative sum less its value at the group's
    # start.
    grouped = np.argsort(origin.astype(np.int16), kind="stable")
    own, lost_rows = origin[grouped], weights[grouped]
    lost_hits = lost_rows * (labels[grouped] == own)
    starts = np.searchsorted(own, np.arange(problem.num_labels))
    all_rows, all_hits = np.cumsum(lost_rows), np.cumsum(lost_hits)
    left_rows = (predicted + np.append(0.0, all_rows)[starts])[own] - all_rows
    left_hits = (hits + np.append(0.0, all_hits)[starts])[own] - all_hits
    own_support = support[own]
    changes = np.empty(len(labels))
    changes[grouped] = term_weights[own] * (
        _term(metric, left_hits, own_support, left_rows)
        - _term(metric, left_hits + lost_hits, own_support, left_rows + lost_rows)
    )
    rest = (
        float((term_weights * _term(metric, hits, support, predicted)).sum())
        - term_weights[target] * gained[0]
    )
    swept = term_weights[target] * gained
    swept += rest
    swept[1:] += np.cumsum(changes)
    return swept


def _best_interval(edges: np.ndarray, interval_scores: np.ndarray) -> tuple[float, float] | None:
    """Middle of the widest of the best-scoring intervals between ascending edges [m + 1], and its score (of [m]).

    Intervals narrower than 1e-9 are not offered, since no value in one survives rounding; None if that leaves none.
    """
    widths = np.diff(edges)
    offered = np.flatnonzero(widths > 1e-9)
    if not len(offered):
        return None
    best = interval_scores[offered].max()
    tied = offered[interval_scores[offered] >= best - SCORE_TOLERANCE]
    widest = tied[widths[tied].argmax()]
    return float((edges[widest] + edges[widest + 1]) / 2), float(interval_scores[widest])


def _sweep_bias(
    problem: _Problem, bias: np.ndarray, threshold: float | None, label: int
) -> tuple[float, float]:
    """Best value of one label's bias, everything else fixed, and its score.

    A row that the gate leaves free goes to `label` once its bias passes the row's breakpoint: the best other label's
    log p + bias, less the row's own log p. Below the first and above the last breakpoint, 1 nat of distance is kept.
    """
    log_p, labels, weights = problem.log_p, problem.labels, problem.weights
    gated_hits = gated_rows = 0.0
    if threshold is not None:
        gated = problem.probabilities[:, problem.protected_class] >= threshold
        gated_hits = weights[gated & (labels == problem.protected_class)].sum()
        gated_rows = weights[gated].sum()
        log_p, labels, weights = log_p[~gated], labels[~gated], weights[~gated]
    if not len(labels):
        return float(bias[label]), problem.score(bias, threshold)
    others = log_p + bias
    others[:, label] = -np.inf
    origin = others.argmax(axis=1)
    breakpoints = others[np.arange(len(origin)), origin] - log_p[:, label]
    del others
    hits, _, predicted = _counts(labels, origin, problem.num_labels, weights)
    if threshold is not None:
        hits[problem.protected_class] += gated_hits
        predicted[problem.protected_class] += gated_rows
    order = np.argsort(breakpoints)
    swept = _sweep_scores(
        problem, labels[order], weights[order], origin[order], label, (hits, problem.support, predicted)
    )
    breakpoints = breakpoints[order]
    edges = np.concatenate([[breakpoints[0] - 2.0], breakpoints, [breakpoints[-1] + 2.0]])
    best = _best_interval(edges, swept)
    assert best is not None  # the two outer intervals are 2 wide
    return best


def _sweep_threshold(problem: _Problem, bias: np.ndarray) -> tuple[float | None, float]:
    """Best threshold of the gate at this bias, and its score; None where having no gate is as good."""
    protected = problem.protected_class
    predictions = (problem.log_p + bias).argmax(axis=1)
    counts = _counts(problem.labels, predictions, problem.num_labels, problem.weights)
    moving = np.flatnonzero(predictions != protected)
    probability = problem.probabilities[moving, protected]
    order = np.argsort(probability)[::-1]
    moving, probability = moving[order], probability[order]
    swept = _sweep_scores(
        problem, problem.labels[moving], problem.weights[moving], predictions[moving], protected, counts
    )
    # Thresholds in ascending order: the k-th interval lets all rows but the k least likely ones through the gate.
    best = _best_interval(np.concatenate([[0.0], probability[::-1]]), swept[:0:-1]) if len(moving) else None
    if best is None or best[1] <= swept[0] + SCORE_TOLERANCE:
        return None, float(swept[0])
    return best


def _ascend(
    problem: _Problem, bias: np.ndarray, threshold: float | None = None, max_rounds: int = 20
) -> tuple[float, np.ndarray, float | None]:
    """Coordinate ascent over the biases and the gate until a whole round improves nothing.

    Returns:
        score, bias [c], threshold; the score is never below that of the start.
    """
    bias, current = np.array(bias, dtype=np.float64), problem.score(bias, threshold)
    num_coordinates = problem.num_labels + (problem.protected_class is not None)
    idle = 0
    for step in range(max_rounds * num_coordinates):
        coordinate = step % num_coordinates
        idle += 1
        if coordinate < problem.num_labels:
            value, value_score = _sweep_bias(problem, bias, threshold, coordinate)
            if value_score > current + SCORE_TOLERANCE:
                bias[coordinate], current, idle = value, value_score, 0
        else:
            value, value_score = _sweep_threshold(problem, bias)
            if value_score > current + SCORE_TOLERANCE:
                threshold, current, idle = value, value_score, 0
        if idle == num_coordinates:
            break
    return current, bias, threshold


# ---------------------------------------------------------------------------------------------------------------------
# Methods

# Rows beyond which a search looks for its start on a sample of the rows and only refines the best on all of them.
SAMPLE_ROWS = 20_000


def _random_biases(num_vectors: int, num_labels: int, seed: int) -> np.ndarray:
    """Bias vectors [v, c] of the paper's search; the first is zero.

    The paper gives their number only. Half a nat of standard deviation is what scored best in-sample among 1/4, 1/2, 1
    and 2 on twelve real tables.
    """
    biases = 0.5 * np.random.default_rng(seed).standard_normal((num_vectors, num_labels))
    biases[0] = 0.0
    return biases


def _fit_argmax(problem: _Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    return np.zeros(problem.num_labels), None


def _fit_random(
    problem: _Problem, *, num_vectors: int, seed: int, **_: Any
) -> tuple[np.ndarray, float | None]:
    biases = _random_biases(num_vectors, problem.num_labels, seed)
    bias = biases[int(np.argmax([problem.score(bias) for bias in biases]))]
    return bias, None if problem.protected_class is None else _sweep_threshold(problem, bias)[0]


def _sample(problem: _Problem, seed: int) -> _Problem:
    if len(problem.labels) <= SAMPLE_ROWS:
        return problem
    chosen = np.random.default_rng(seed).choice(len(problem.labels), SAMPLE_ROWS, replace=False)
    return problem.subset(np.sort(chosen))


def _fit_exact(problem: _Problem, *, seed: int, **_: Any) -> tuple[np.ndarray, float | None]:
    """Coordinate ascent from zero, from two prior-adjusted starts and from the best of 100 random vectors."""
    sample = _sample(problem, seed)
    vectors = _random_biases(100, problem.num_labels, seed)
    # Small tables have flat scores, on which an ascent stops early, and many starts cost little there.
    num_random = max(2, min(30, 4000 // len(sample.labels)))
    ranking = np.argsort([-sample.score(vector) for vector in vectors], kind="stable")
    starts = [-strength * problem.log_prior for strength in (0.0, 0.5, 1.0)] + list(
        vectors[ranking[:num_random]]
    )
    found = [_ascend(sample, start) for start in starts]
    _, bias, threshold = found[max(range(len(found)), key=lambda number: found[number][0])]
    if sample is not problem:
        _, bias, threshold = _ascend(problem, bias, threshold, max_rounds=3)
    return bias, threshold


def _fit_bagged(
    problem: _Problem, *, group_indices: np.ndarray, num_bags: int, seed: int, **_: Any
) -> tuple[np.ndarray, float | None]:
    """Mean of the rules that ascents reach on bootstrap samples of the dialogues; no gate counts as threshold 1."""
    generator = np.random.default_rng(seed)
    num_groups = int(group_indices.max()) + 1
    biases, thresholds = [], []
    for _bag in range(num_bags):
        times = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)[
            group_indices
        ]
        drawn = np.flatnonzero(times)
        if len(drawn) > SAMPLE_ROWS:
            drawn = np.sort(generator.choice(drawn, SAMPLE_ROWS, replace=False))
        sample = problem.subset(drawn, times[drawn].astype(np.float64))
        _, bias, threshold = _ascend(sample, -0.5 * problem.log_prior)
        biases.append(bias - bias.mean())
        thresholds.append(1.0 if threshold is None else threshold)
    threshold = float(np.mean(thresholds))
    return np.mean(
        biases, axis=0
    ), threshold if problem.protected_class is not None and threshold < 1 else None


def _fit_prior(problem: _Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """Logit adjustment (Menon et al., 2021), -strength * log prior, by one strength; the gate searched at each.

    The score as a function of the strength is averaged over neighbours (±0.1) before its maximum is taken.
    """
    strengths = np.linspace(-0.5, 2.0, 126)
    rules = []
    for strength in strengths:
        bias = -strength * problem.log_prior
        gated = problem.protected_class is not None
        rules.append(_sweep_threshold(problem, bias) if gated else (None, problem.score(bias)))
    smooth = np.convolve(np.pad([rule[1] for rule in rules], 5, "edge"), np.full(11, 1 / 11), "valid")
    best = int(smooth.argmax())
    return -strengths[best] * problem.log_prior, rules[best][0]


def _fit_vector_scaling(problem: _Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    slope, offset = _fit_vector(problem.log_p, problem.labels)
    return offset / slope, None


def _soft_score(
    log_p: np.ndarray, targets: np.ndarray, bias: np.ndarray, sharpness: float, problem: _Problem
) -> tuple[float, np.ndarray]:
    """The metric with every count replaced by its expectation, and its gradient in the bias [c].

    A row goes to label c with probability softmax(sharpness * (log p + bias))_c and has label c with probability
    `targets[:, c]`.
    """
    q = softmax(sharpness * (log_p + bias))
    hits, support, predicted = (q * targets).sum(axis=0), targets.sum(axis=0), q.sum(axis=0)
    value = float((problem.term_weights * _term(problem.metric, hits, support, predicted)).sum())
    if problem.metric == "accuracy":
        by_hit, by_prediction = np.ones(len(hits)), np.zeros(len(hits))
    elif problem.metric == "macro_recall_positive":
        by_hit, by_prediction = _ratio(np.ones(len(hits)), support), np.zeros(len(hits))
    else:
        factor, size = (
            (1.0, predicted) if problem.metric == "macro_precision_positive" else (2.0, support + predicted)
        )
        by_hit, by_prediction = _ratio(np.full(len(hits), factor), size), -_ratio(factor * hits, size**2)
    by_q = problem.term_weights * (targets * by_hit + by_prediction)
    centred = by_q - (q * by_q).sum(axis=1, keepdims=True)
    return value, sharpness * (q * centred).sum(axis=0)


def _fit_expected(problem: _Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """Maximise the metric that vector-scaled probabilities expect of themselves: labels enter by likelihood alone."""
    return _fit_soft(problem, label_share=0.0, sharpness=5.0)


def _fit_smooth(problem: _Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """As `expected`, each row's label counting for one half beside its probabilities, and borders twice as sharp."""
    return _fit_soft(problem, label_share=0.5, sharpness=10.0)


def _fit_soft(problem: _Problem, label_share: float, sharpness: float) -> tuple[np.ndarray, float | None]:
    """Maximise `_soft_score` on vector-scaled probabilities from two prior-adjusted starts, then search the gate."""
    slope, offset = _fit_vector(problem.log_p, problem.labels)
    log_q = log_softmax(slope * problem.log_p + offset)
    targets = (1 - label_share) * np.exp(log_q)
    targets[np.arange(len(targets)), problem.labels] += label_share

    def objective(bias: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _soft_score(log_q, targets, bias, sharpness, problem)
        return -value, -gradient

    found = [_minimise(objective, -strength * problem.log_prior) for strength in (0.5, 1.0)]
    bias = (offset + min(found, key=lambda point: objective(point)[0])) / slope
    return bias, None if problem.protected_class is None else _sweep_threshold(problem, bias)[0]


_FITS: dict[str, Callable[..., tuple[np.ndarray, float | None]]] = {
    "argmax": _fit_argmax,
    "vector": _fit_vector_scaling,
    "expected": _fit_expected,
    "prior": _fit_prior,
    "smooth": _fit_smooth,
    "bagged": _fit_bagged,
    "exact": _fit_exact,
    "random": _fit_random,
}
METHODS = tuple(_FITS)
# From the simplest to the freest, by how much is tuned on the metric itself: nothing (`vector` and `expected` see the
# labels through the likelihood alone), one number, all numbers with something that holds them back, all numbers.
TIERS = (("argmax", "vector", "expected"), ("prior",), ("smooth", "bagged"), ("exact", "random"))
# Methods that have no gate to search.
UNGATED_METHODS = ("argmax", "vector")


def fit(
    method: str,
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    protected_class: int | None = None,
    num_vectors: int = 22_000,
    num_bags: int = 10,
    seed: int = 42,
) -> Decision:
    """Fit one method's rule to out-of-fold probabilities.

    Args:
        method: one of `METHODS`.
        probabilities: [n, c]; the rule's temperature is 1 with regard to them.
        labels: int [n].
        groups: dialogue ids [n].
        positive_labels, metric: as in `score`.
        protected_class: label of a gate that is searched with the bias; None for no gate. A gate that does not raise
            the score of these rows is left out.
        num_vectors: vectors of `random`.
        num_bags: bootstrap samples of `bagged`.

    Raises:
        ValueError: an unknown method or metric.
    """
    if method not in _FITS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    protected = None if method in UNGATED_METHODS else protected_class
    problem = _Problem(probabilities, labels, positive_labels, metric, protected)
    bias, threshold = _FITS[method](
        problem,
        group_indices=_group_indices(groups)[0],
        num_vectors=num_vectors,
        num_bags=num_bags,
        seed=seed,
    )
    # Only differences matter: centred, so that rules can be compared and averaged.
    return Decision(bias - bias.mean(), None if threshold is None else protected, threshold)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-fitting


def check_labels(
    labels: np.ndarray,
    groups: Sequence[Hashable],
    label_names: Sequence[str],
    positive_labels: Sequence[int],
    source: str,
) -> None:
    """Refuse labels on which no rule can be fitted and scored.

    Raises:
        InputError: a row without a label, a positive label without rows, or fewer than two dialogues.
    """
    labels = np.asarray(labels)
    if (labels < 0).any() or (labels >= len(label_names)).any():
        raise InputError(
            f"{source}: label: row {int(((labels < 0) | (labels >= len(label_names))).argmax())} has none"
        )
    empty = [label for label in positive_labels if not (labels == label).any()]
    if empty:
        raise InputError(
            *(
                f"{source}: label {label} ({label_names[label]}) has no row: its F1 is not defined"
                for label in empty
            )
        )
    if len(set(groups)) < 2:
        raise InputError(f"{source}: dialogue_id: one dialogue only, cross-fitting needs two or more")


def grouped_folds(
    labels: np.ndarray, groups: Sequence[Hashable], num_labels: int, num_splits: int, seed: int
) -> np.ndarray:
    """A fold for every row, int64 [n], dialogues kept whole and labels spread evenly.

    Dialogues in an order of descending spread of their label counts, ties shuffled by the seed, each go to the fold
    that leaves the label counts most even over the folds (the greedy rule of scikit-learn's StratifiedGroupKFold).

    Raises:
        InputError: fewer dialogues than two.
    """
    labels = np.asarray(labels)
    group_indices, num_groups = _group_indices(groups)
    if num_groups < 2:
        raise InputError("dialogue_id: one dialogue only, cross-fitting needs two or more")
    num_splits = min(num_splits, num_groups)
    counts = np.bincount(group_indices * num_labels + labels, minlength=num_groups * num_labels)
    counts = counts.reshape(num_groups, num_labels).astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(num_groups)
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    filled = np.zeros((num_splits, num_labels))
    sizes = np.zeros(num_splits)
    squares = np.zeros(num_splits)
    fold_of_group = np.empty(num_groups, dtype=np.int64)
    for group in order:
        # Adding the dialogue to fold f changes that fold's sum of squared shares alone; the sums being fixed, less
        # squares means more even.
        growth = ((filled + shares[group]) ** 2).sum(axis=1) - squares
        fold = int(np.lexsort((sizes, np.round(growth, 12)))[0])
        filled[fold] += shares[group]
        squares[fold] = (filled[fold] ** 2).sum()
        sizes[fold] += counts[group].sum()
        fold_of_group[group] = fold
    return fold_of_group[group_indices]


@dataclasses.dataclass(frozen=True, eq=False)
class CrossFit:
    """What a way of fitting scores on dialogues that it was not fitted on.

    Attributes:
        predictions: int64 [repeats, n], each row's prediction by a rule that its dialogue had no part in.
        metrics: every metric of DESIGN 9, each over all rows, the mean over the repeats.
        interval: 95 % interval of the metric asked for, by bootstrap over dialogues.
    """

    predictions: np.ndarray
    metrics: dict[str, Any]
    interval: tuple[float, float]


def mean_scores(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int, positive_labels: Sequence[int]
) -> dict[str, Any]:
    """`scores`, the mean over repeats, of predictions [repeats, n]."""
    each = [scores(labels, row, num_labels, positive_labels) for row in predictions]
    return {
        name: np.mean([result[name] for result in each], axis=0).tolist()
        if name == "f1_per_class"
        else float(np.mean([result[name] for result in each]))
        for name in each[0]
    }


def cross_fitted_predictions(
    fit_predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    groups: Sequence[Hashable],
    num_labels: int,
    num_splits: int,
    repeats: int,
    seed: int,
    progress: Callable[[], Any] | None = None,
) -> np.ndarray:
    """The predictions of `cross_fit`, int64 [repeats, n]."""
    predictions = np.empty((repeats, len(labels)), dtype=np.int64)
    for repeat in range(repeats):
        folds = grouped_folds(labels, groups, num_labels, num_splits, seed + repeat)
        for fold in range(int(folds.max()) + 1):
            held_out = np.flatnonzero(folds == fold)
            predictions[repeat, held_out] = fit_predict(np.flatnonzero(folds != fold), held_out)
            if progress is not None:
                progress()
    return predictions


def cross_fit(
    fit_predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    num_splits: int = 5,
    repeats: int = 5,
    seed: int = 42,
    num_samples: int = 2000,
    progress: Callable[[], Any] | None = None,
) -> CrossFit:
    """Repeated dialogue-grouped cross-fitting of anything that is fitted to rows and predicts others.

    Args:
        fit_predict: takes the positions of the rows to fit on and of the rows to predict, and returns the predictions
            of the latter; `rule_fitter` makes one.
        labels: int [n].
        groups: dialogue ids [n].
        num_splits: folds a repeat; no more than there are dialogues.
        repeats: partitions into folds, of seeds seed, seed + 1, …
        num_samples: bootstrap samples of the interval.
        progress: called once a fit.

    Raises:
        InputError: fewer than two dialogues.
    """
    labels = np.asarray(labels, dtype=np.int64)
    predictions = cross_fitted_predictions(
        fit_predict, labels, groups, num_labels, num_splits, repeats, seed, progress
    )
    return CrossFit(
        predictions,
        mean_scores(labels, predictions, num_labels, positive_labels),
        bootstrap_interval(
            labels,
            predictions,
            groups,
            num_labels=num_labels,
            positive_labels=positive_labels,
            metric=metric,
            num_samples=num_samples,
            seed=seed,
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a method, weights and a rule together


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a rule comes about from runs' logits: what `fit_rule` does, and `cross_fit` repeats on other rows.

    Args:
        positive_labels, metric: what is maximised, as in `score`.
        method: one of `METHODS`, or "auto": chosen by `select` among `candidates`.
        weights: blend weights, one a run; None for equal ones; "search" for `search_weights`.
        blend: "arithmetic" or "geometric".
        protected_class: label of the gate; None for no gate. With it a rule keeps its gate only if that scores better
            when cross-fitted; only `random`, which is the paper's, searches its gate without asking.
        candidates: what "auto" chooses among. `random` is left out because `exact` searches for the same thing, and
            finds it; `bagged` because `smooth` restrains the search in the same way, in half the time.
        num_vectors, num_bags: as in `fit`.
        num_splits: folds of the inner cross-fitting by which "auto" and the gate are decided.
        inner_repeats: repeats of it.
        seed: of everything random.
    """

    positive_labels: tuple[int, ...]
    metric: str = "macro_f1_positive"
    method: str = "auto"
    weights: tuple[float, ...] | str | None = None
    blend: str = "arithmetic"
    protected_class: int | None = None
    candidates: tuple[str, ...] = ("argmax", "vector", "expected", "prior", "smooth", "exact")
    num_vectors: int = 22_000
    num_bags: int = 10
    num_splits: int = 5
    inner_repeats: int = 1
    seed: int = 42


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A fitted rule: `decision` on the blend of the runs by `weights` [runs], and the method that it came from."""

    decision: Decision
    weights: np.ndarray
    method: str


def predict(logits: Sequence[np.ndarray], rule: Rule, kind: str = "arithmetic") -> np.ndarray:
    """Labels int64 [n] that a rule gives runs' logits, one array [n, c] a run."""
    probabilities = [softmax(run, rule.decision.temperature) for run in logits]
    return decide(blend(probabilities, rule.weights, kind), rule.decision)


def fit_rule(
    recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[Hashable]
) -> Rule:
    """Fit weights, temperature, method, bias and gate to runs' out-of-fold logits, in this order.

    Args:
        recipe: how.
        logits: one array [n, c] a run, the same rows in the same order.
        labels: int [n].
        groups: dialogue ids [n].

    Raises:
        InputError: unusable weights; one dialogue only, where something is decided by cross-fitting.
    """
    labels = np.asarray(labels, dtype=np.int64)
    weights = _resolve_weights(recipe, logits, labels)
    temperature = fit_temperature(logits, labels, weights, recipe.blend)
    probabilities = blend([softmax(run, temperature) for run in logits], weights, recipe.blend)
    method, gated = recipe.method, recipe.protected_class is not None and recipe.method not in UNGATED_METHODS
    if method == "auto" or (gated and method != "random"):
        found = select(recipe, probabilities, labels, groups)
        method, gated = found.method, found.gated
    decision = _fit_candidate(recipe, (method, gated), probabilities, labels, groups)
    return Rule(dataclasses.replace(decision, temperature=temperature), weights, method)


def _resolve_weights(recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    if recipe.weights == "search":
        probabilities = [softmax(run) for run in logits]
        return search_weights(probabilities, labels, kind=recipe.blend, seed=recipe.seed).weights
    given = [1.0] * len(logits) if recipe.weights is None else recipe.weights
    return check_weights(given, len(logits))


def _fit_candidate(
    recipe: Recipe,
    candidate: tuple[str, bool],
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
) -> Decision:
    method, gated = candidate
    return fit(
        method,
        probabilities,
        labels,
        groups,
        positive_labels=recipe.positive_labels,
        metric=recipe.metric,
        protected_class=recipe.protected_class if gated else None,
        num_vectors=recipe.num_vectors,
        num_bags=recipe.num_bags,
        seed=recipe.seed,
    )


def rule_fitter(
    recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[Hashable]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`fit_rule` and `predict` in the form that `cross_fit` takes: everything fitted is fitted inside the folds."""
    labels, group_indices = np.asarray(labels), _group_indices(groups)[0]

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        rule = fit_rule(recipe, [run[train] for run in logits], labels[train], group_indices[train].tolist())
        return predict([run[held_out] for run in logits], rule, recipe.blend)

    return fit_predict


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """What `select` chose, and the cross-fitted score of every candidate that it looked at, by (method, gated)."""

    method: str
    gated: bool
    cross_fitted: dict[tuple[str, bool], float]


def select(
    recipe: Recipe, probabilities: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> Selection:
    """Choose a method by repeated cross-fitting, then whether it has a gate.

    One-standard-error rule (Breiman et al., 1984): the simplest tier of `TIERS` with a candidate whose cross-fitted
    score is within one standard error of the best one's, and the best candidate of that tier. The standard error is
    that of the paired difference between the two, by bootstrap over dialogues. A gate is less simple than none, so it
    is kept where it gains more than one standard error. With `recipe.method` other than "auto" only the gate is
    decided on.

    Args:
        recipe: the candidates, the metric, the folds.
        probabilities: [n, c].
        labels: int [n].
        groups: dialogue ids [n].

    Raises:
        InputError: fewer than two dialogues.
    """
    methods = recipe.candidates if recipe.method == "auto" else (recipe.method,)
    found = {
        (method, False): _cross_fit_candidate(recipe, (method, False), probabilities, labels, groups)
        for method in sorted(methods, key=METHODS.index)
    }
    tiers = [[(method, False) for method in tier if method in methods] for tier in TIERS]
    method = _simplest_within_one_error(found, tiers)[0]
    gated = False
    if recipe.protected_class is not None and method not in UNGATED_METHODS:
        pair = [(method, False), (method, True)]
        found[pair[1]] = _cross_fit_candidate(recipe, pair[1], probabilities, labels, groups)
        gated = _simplest_within_one_error(found, [[candidate] for candidate in pair])[1]
    return Selection(method, gated, {candidate: mean for candidate, (mean, _) in found.items()})


def _cross_fit_candidate(
    recipe: Recipe,
    candidate: tuple[str, bool],
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
) -> tuple[float, np.ndarray]:
    """The candidate's cross-fitted score and 300 bootstrap samples of it, paired with those of other candidates."""
    group_indices, labels = _group_indices(groups)[0], np.asarray(labels, dtype=np.int64)

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        decision = _fit_candidate(
            recipe, candidate, probabilities[train], labels[train], group_indices[train].tolist()
        )
        return decide(probabilities[held_out], decision)

    counting = {
        "num_labels": probabilities.shape[1],
        "positive_labels": recipe.positive_labels,
        "metric": recipe.metric,
    }
    # Other folds than those of the outer cross-fitting, which begin at the seed itself.
    predictions = cross_fitted_predictions(
        fit_predict,
        labels,
        groups,
        probabilities.shape[1],
        recipe.num_splits,
        recipe.inner_repeats,
        recipe.seed + 1000,
    )
    mean = np.mean([score(labels, row, **counting) for row in predictions])
    return float(mean), bootstrap_scores(
        labels, predictions, groups, **counting, num_samples=300, seed=recipe.seed
    )


def _simplest_within_one_error(
    found: Mapping[tuple[str, bool], tuple[float, np.ndarray]], tiers: Sequence[Sequence[tuple[str, bool]]]
) -> tuple[str, bool]:
    """The best candidate of the first tier that has one within one standard error of the difference to the best of all.

    Args:
        found: mean and bootstrap samples of each candidate's score.
        tiers: candidates, from the simplest tier on; of those that score alike, the first of a tier wins.
    """
    best_mean, best_samples = max(
        (found[name] for tier in tiers for name in tier), key=lambda value: value[0]
    )

    def is_close(candidate: tuple[str, bool]) -> bool:
        mean, samples = found[candidate]
        return best_mean - mean <= (best_samples - samples).std() + SCORE_TOLERANCE

    close = next(filter(None, ([name for name in tier if is_close(name)] for tier in tiers)))
    return max(close, key=lambda candidate: found[candidate][0])


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSearch:
    """Weights [runs] that sum to 1, and what was tried: one dict a step with `weights`, `log_loss`, `kept`."""

    weights: np.ndarray
    trajectory: list[dict[str, Any]]


def search_weights(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    kind: str = "arithmetic",
    max_steps: int = 50,
    seed: int = 42,
) -> WeightSearch:
    """Blend weights of least log loss: a grid over the simplex for two or three runs, greedy selection beyond.

    Log loss and not the metric: it uses every row's probabilities, so that its optimum moves little with the rows, and
    it knows nothing of the decision rule, which is fitted afterwards. The grid's step is 0.05. Greedy selection with
    replacement (Caruana et al., 2004) adds the run that helps most, one at a time, and keeps the best prefix; among
    runs that help equally the seed decides.

    Args:
        probabilities: one array [n, c] a run.
        labels: int [n].
        kind: as in `blend`.
        max_steps: greedy steps.
        seed: of the order in which runs are tried.
    """
    count, labels = len(probabilities), np.asarray(labels)
    trajectory: list[dict[str, Any]] = []

    def attempt(weights: np.ndarray) -> float:
        loss = log_loss(blend(probabilities, weights, kind), labels)
        trajectory.append({"weights": [float(weight) for weight in weights], "log_loss": loss, "kept": False})
        return loss

    if count <= 3:
        for first in range(21):
            for second in range(21 - first):
                weights = np.array([first, second, 20 - first - second])[:count] / 20.0
                if abs(weights.sum() - 1) < 1e-9:
                    attempt(weights)
        best = min(trajectory, key=lambda step: step["log_loss"])
        best["kept"] = True
        return WeightSearch(np.array(best["weights"]), trajectory)

    order = np.random.default_rng(seed).permutation(count)
    chosen = np.zeros(count)
    for step in range(1, max_steps + 1):
        losses = {run: attempt((chosen + np.eye(count)[run]) / step) for run in order}
        added = min(losses, key=losses.__getitem__)
        del trajectory[-count:]
        chosen[added] += 1
        trajectory.append(
            {
                "weights": (chosen / step).tolist(),
                "log_loss": losses[added],
                "added": int(added),
                "kept": False,
            }
        )
    best = min(trajectory, key=lambda step: step["log_loss"])
    best["kept"] = True
    return WeightSearch(np.array(best["weights"]), trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# Voting


def scoped(probabilities: np.ndarray, scope: Sequence[int] | None) -> np.ndarray:
    """Probabilities [n, c] with labels outside `scope` at 0, scaled to sum 1 a row; unchanged where scope is None."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if scope is None:
        return probabilities
    inside = np.zeros(probabilities.shape[1])
    inside[list(scope)] = 1.0
    kept = np.maximum(probabilities, SMALLEST_PROBABILITY) * inside
    return kept / kept.sum(axis=1, keepdims=True)


def vote(
    gatekeepers: Sequence[np.ndarray],
    specialists: Sequence[np.ndarray],
    *,
    gate_label: int,
    protected_class: int | None,
    specialist_scopes: Sequence[Sequence[int] | None] | None = None,
) -> np.ndarray:
    """Vote as the shared task's winner did (DESIGN 10): gatekeepers decide one label, all voters the others.

    Every voter votes for its most likely label. A row gets `gate_label` if more than half of the gatekeepers vote for
    it. Otherwise it gets the label with most votes among the others, specialists' and gatekeepers' counted alike; where
    two or more labels have most votes, or there is no vote, it gets the protected class (without one: the lowest such
    label).

    Args:
        gatekeepers: one array [n, c] a run, trained on all labels.
        specialists: one array [n, c] a run, trained on some of the labels.
        gate_label: the label that the gatekeepers decide.
        protected_class: where ties go.
        specialist_scopes: labels each specialist was trained on; None for all but `gate_label`.

    Returns:
        int64 [n].

    Raises:
        InputError: no gatekeeper.
    """
    if not gatekeepers:
        raise InputError("vote: no gatekeeper among the runs")
    gate_votes = np.stack([np.asarray(run).argmax(axis=1) for run in gatekeepers])
    num_labels = np.shape(gatekeepers[0])[1]
    scopes = _scopes(specialists, specialist_scopes, gate_label, num_labels)
    own = [scoped(run, scope).argmax(axis=1) for run, scope in zip(specialists, scopes, strict=True)]
    votes = np.concatenate([gate_votes, np.stack(own)]) if own else gate_votes
    tally = (votes[:, :, None] == np.arange(num_labels)).sum(axis=0)
    tally[:, gate_label] = -1
    predictions = tally.argmax(axis=1)
    if protected_class is not None:
        most = tally.max(axis=1, keepdims=True)
        predictions[((tally == most).sum(axis=1) > 1) | (most[:, 0] == 0)] = protected_class
    predictions[(gate_votes == gate_label).sum(axis=0) * 2 > len(gate_votes)] = gate_label
    return predictions


def vote_probabilities(
    gatekeepers: Sequence[np.ndarray],
    specialists: Sequence[np.ndarray],
    *,
    gate_label: int,
    specialist_scopes: Sequence[Sequence[int] | None] | None = None,
) -> np.ndarray:
    """The vote in probabilities: the gatekeepers' mean for `gate_label`, the specialists' for how the rest is shared.

    A label's share is the mean over the specialists whose scope has it, the shares being scaled to sum 1.

    Args:
        gatekeepers, specialists, gate_label, specialist_scopes: as in `vote`.

    Returns:
        float64 [n, c].

    Raises:
        InputError: no gatekeeper, no specialist, or a label in no specialist's scope.
    """
    if not gatekeepers or not specialists:
        raise InputError("vote: needs one or more gatekeepers and one or more specialists")
    num_labels = np.shape(gatekeepers[0])[1]
    scopes = _scopes(specialists, specialist_scopes, gate_label, num_labels)
    covered = np.zeros(num_labels)
    total = np.zeros(np.shape(gatekeepers[0]))
    for run, scope in zip(specialists, scopes, strict=True):
        covered[list(scope)] += 1
        total += scoped(run, scope)
    missing = [label for label in range(num_labels) if label != gate_label and not covered[label]]
    if missing:
        raise InputError(f"vote: label(s) {', '.join(map(str, missing))} are in no specialist's scope")
    shares = _ratio(total, np.broadcast_to(covered, total.shape))
    shares /= shares.sum(axis=1, keepdims=True)
    gate = np.mean([np.asarray(run, dtype=np.float64)[:, gate_label] for run in gatekeepers], axis=0)
    result = (1 - gate)[:, None] * shares
    result[:, gate_label] = gate
    return result


def _scopes(
    specialists: Sequence[np.ndarray],
    scopes: Sequence[Sequence[int] | None] | None,
    gate_label: int,
    num_labels: int,
) -> list[list[int]]:
    given = [None] * len(specialists) if scopes is None else scopes
    return [
        [label for label in (range(num_labels) if scope is None else scope) if label != gate_label]
        for scope in given
    ]
