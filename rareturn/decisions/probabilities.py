"""Logits, probabilities, blends of runs, and how good a probability is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from rareturn.errors import InputError

# The logit of a label that a run was not trained on: finite, so that tables and averages stay finite.
OUT_OF_SCOPE_LOGIT = -1e4


BLENDS = ("arithmetic", "geometric")


# Probabilities below this are raised to it before a logarithm is taken: softmax of float32 logits underflows to 0, and a
# label outside a specialist's scope has probability 0.
SMALLEST_PROBABILITY = 1e-30


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


def test_probabilities(folds: Sequence[np.ndarray], temperature: float) -> np.ndarray:
    """One run's probabilities [n, c] of test rows: the mean over its folds' models (DESIGN 8)."""
    return np.mean([softmax(logits, temperature) for logits in folds], axis=0)


def minimise(
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


def fit_vector(log_p: np.ndarray, labels: np.ndarray, penalty: float = 0.1) -> tuple[float, np.ndarray]:
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

    parameters = minimise(objective, np.concatenate([[1.0], np.zeros(log_p.shape[1])]))
    # A slope of zero or below says that the probabilities tell nothing; the bias would be without bound.
    return max(float(parameters[0]), 0.05), parameters[1:]
