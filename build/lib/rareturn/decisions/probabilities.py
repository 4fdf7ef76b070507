"""Logits, probabilities, blends of runs, and how good a probability is."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """Refuse logits [n, c] that do not vary, from which no decision can be made."""
    if (logits == logits[:, :1]).all():
        raise InputError(f"{source}: logits: constant, every label has the same logit in every row")
    if (logits == logits[:1]).all() and len(logits) > 1:
        raise InputError(f"{source}: logits: constant, every row has the same logits")


def check_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Blend weights, equal ones for None, scaled to sum 1: float64 [count]; an InputError where that is impossible."""
    array = np.asarray([1.0] * count if weights is None else weights, dtype=np.float64)
    if array.shape != (count,):
        raise InputError(f"weights: {array.size} given for {count} run(s)")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"weights: {array.tolist()}: every weight must be finite and not negative")
    if array.sum() <= 0:
        raise InputError(f"weights: {array.tolist()}: they sum to zero")
    return array / array.sum()


def blend(
    probabilities: Sequence[np.ndarray], weights: Sequence[float] | None = None, kind: str = "arithmetic"
) -> np.ndarray:
    """Weighted mean of runs' probabilities [n, c], float64 [n, c]; `weights` as `check_weights` takes them.

    "arithmetic" is the sum of w_r p_r, "geometric" exp of the sum of w_r log p_r, scaled to sum 1 a row.
    """
    weights = check_weights(weights, len(probabilities))
    used = [(weight, array) for weight, array in zip(weights, probabilities, strict=True) if weight > 0]
    if kind == "arithmetic":
        return sum(weight * np.asarray(array, dtype=np.float64) for weight, array in used)
    if kind == "geometric":
        return softmax(sum(weight * log_probabilities(array) for weight, array in used))
    raise ValueError(f"blend: {kind!r} is not one of {', '.join(BLENDS)}")


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
    logits: Sequence[np.ndarray], labels: np.ndarray, weights: np.ndarray | None = None, kind: str = BLENDS[0]
) -> float:
    """The one temperature, between 1/20 and 20, at which the runs' blend has the least log loss (Guo et al., 2017)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return log_loss(blend([softmax(run, temperature) for run in logits], weights, kind), labels)

    bounds = (-math.log(20), math.log(20))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x)


def fit_vector(log_p: np.ndarray, labels: np.ndarray, penalty: float = 0.1) -> tuple[float, np.ndarray]:
    """Vector scaling with one slope (Guo et al., 2017): a and b [c] of least log loss in softmax(a log p + b) of log p [n, c].

    To the log loss, summed over the rows, `penalty` times the sum of b squared is added; it bounds labels without rows.
    """
    from scipy.optimize import minimize

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

    start = np.concatenate([[1.0], np.zeros(log_p.shape[1])])
    parameters = minimize(objective, start, jac=True, method="L-BFGS-B").x
    # A slope of zero or less means that the probabilities carry no information; the bias would be unbounded.
    return max(float(parameters[0]), 0.05), parameters[1:]
