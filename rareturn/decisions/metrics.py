"""Scores, and their intervals by bootstrap over dialogues.

Every score is a sum over labels of weight_c * term(hits_c, support_c, predicted_c), which is what lets a sweep update
one term a step and a bootstrap work on per-dialogue counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from rareturn.errors import InputError

METRIC_NAMES = (
    "accuracy",
    "macro_f1_positive",
    "macro_precision_positive",
    "macro_recall_positive",
    "macro_f1",
    "weighted_f1",
)

# Two scores closer than this are equal: it is far above the rounding of a mean of ratios, far below one row's worth.
SCORE_TOLERANCE = 1e-11


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def term(metric: str, hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Each label's term of the metric, of counts [..., c]."""
    if metric == "macro_precision_positive":
        return ratio(hits, predicted)
    if metric == "macro_recall_positive":
        return ratio(hits, support)
    if metric == "accuracy":
        return np.asarray(hits, dtype=np.float64)
    return ratio(2.0 * hits, support + predicted)


def term_weights(metric: str, support: np.ndarray, positive_labels: Sequence[int]) -> np.ndarray:
    """Weight of each label's term, [..., c] like `support`."""
    if metric not in METRIC_NAMES:
        raise ValueError(f"metric: {metric!r} is not one of {', '.join(METRIC_NAMES)}")
    total = support.sum(axis=-1, keepdims=True)
    if metric == "accuracy":
        return np.broadcast_to(ratio(np.ones(total.shape), total), support.shape)
    if metric == "weighted_f1":
        return ratio(support.astype(np.float64), np.broadcast_to(total, support.shape))
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
    weights = term_weights(metric, support, positive_labels)
    return (weights * term(metric, hits, support, predicted)).sum(axis=-1)


def count_rows(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hits, support, predicted), float64 [num_labels] each."""
    rows = (labels[labels == predictions], labels, predictions)
    hits, support, predicted = (np.bincount(of, minlength=num_labels).astype(np.float64) for of in rows)
    return hits, support, predicted


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
    counts = count_rows(np.asarray(labels), np.asarray(predictions), num_labels)
    return float(_score_counts(metric, *counts, positive_labels))


def scores(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int, positive_labels: Sequence[int]
) -> dict[str, Any]:
    """Every metric of DESIGN 9 by name, and `f1_per_class` (a list, one number a label).

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: then every score is the mean over the repeats.
        num_labels, positive_labels: as in `score`.
    """
    labels, repeats = np.asarray(labels), np.atleast_2d(np.asarray(predictions))
    counts = np.stack([count_rows(labels, row, num_labels) for row in repeats], axis=1)
    result: dict[str, Any] = {
        name: float(_score_counts(name, *counts, positive_labels).mean()) for name in METRIC_NAMES
    }
    result["f1_per_class"] = term("macro_f1", *counts).mean(axis=0).tolist()
    return result


def index_groups(groups: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Each row's group as 0..g-1 in order of first appearance, and g."""
    numbers: dict[Hashable, int] = {}
    indices = [numbers.setdefault(group, len(numbers)) for group in groups]
    return np.array(indices, dtype=np.int64), len(numbers)


class _Bootstrap:
    """Counts of whole dialogues on bootstrap samples, drawn once for every score of the predictions.

    The samples depend on the seed and the number of dialogues alone, so two of them on the same rows are paired.

    Attributes:
        samples: hits, support and predicted counts [3, num_samples, repeats, c], float64.
        estimate: those of all dialogues, [3, 1, repeats, c].
        left_out: those of all dialogues but one, [3, dialogues, repeats, c].
    """

    def __init__(
        self,
        labels: np.ndarray,
        predictions: np.ndarray,
        groups: Sequence[Hashable],
        num_labels: int,
        num_samples: int,
        seed: int,
    ):
        labels, predictions = np.asarray(labels), np.atleast_2d(np.asarray(predictions))
        group_indices, num_groups = index_groups(groups)
        cells, size = group_indices * num_labels, num_groups * num_labels
        counted = [
            np.bincount(place, minlength=size).reshape(num_groups, num_labels)
            for row in predictions
            for place in ((cells + labels)[labels == row], cells + labels, cells + row)
        ]
        counts = np.concatenate(counted, axis=1).astype(np.float64)
        generator = np.random.default_rng(seed)
        sums = np.empty((num_samples, counts.shape[1]))
        step = max(1, 4_000_000 // num_groups)
        for start in range(0, num_samples, step):
            block = min(step, num_samples - start)
            draws = generator.integers(num_groups, size=(block, num_groups))
            draws += np.arange(block)[:, None] * num_groups
            times = np.bincount(draws.ravel(), minlength=block * num_groups).reshape(block, num_groups)
            sums[start : start + block] = times @ counts
        total = counts.sum(axis=0)
        self.samples, self.estimate, self.left_out = (
            np.moveaxis(some.reshape(len(some), -1, 3, num_labels), 2, 0)
            for some in (sums, total[None], total - counts)
        )

    def apply(self, score_of: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """The score on the samples, on all dialogues, and with each dialogue left out; the mean over the repeats."""
        return [score_of(counts).mean(axis=1) for counts in (self.samples, self.estimate, self.left_out)]

    def metric(self, metric: str, positive_labels: Sequence[int]) -> list[np.ndarray]:
        """`apply` of a metric by name."""
        return self.apply(lambda counts: _score_counts(metric, *counts, positive_labels))


def _accelerated_interval(
    samples: np.ndarray, estimate: np.ndarray, left_out: np.ndarray
) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % interval (Efron, 1987) of a score.

    Our own rather than scipy's, which draws anew for every score and cannot pair two systems.

    Args:
        samples: the score on bootstrap samples, [s].
        estimate: the score itself, [1].
        left_out: the score with one dialogue left out, [g].
    """
    normal = NormalDist()
    below = (samples < estimate - SCORE_TOLERANCE).mean() + (samples <= estimate + SCORE_TOLERANCE).mean()
    edge = 0.5 / len(samples)
    bias = normal.inv_cdf(float(np.clip(below / 2, edge, 1 - edge)))
    spread = left_out.mean() - left_out
    squares = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * squares**1.5) if squares > SCORE_TOLERANCE**2 else 0.0
    quantiles = []
    for tail in (0.025, 0.975):
        shifted = bias + normal.inv_cdf(tail)
        # The denominator reaches 0 for a handful of dialogues only, where no interval is worth much.
        quantiles.append(normal.cdf(bias + shifted / max(1 - acceleration * shifted, 0.05)))
    low, high = np.quantile(samples, quantiles)
    return float(low), float(high)


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

    Two calls on the same rows are paired: their difference is the bootstrap of the difference.

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: then each sample's value is the mean over the repeats.
        groups: dialogue ids [n].
        num_samples: bootstrap samples.
    """
    drawn = _Bootstrap(labels, predictions, groups, num_labels, num_samples, seed)
    return drawn.metric(metric, positive_labels)[0]


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
) -> tuple[float, float]:
    """95 % interval of a metric, by bootstrap over dialogues; arguments as `bootstrap_scores`.

    Bias-corrected and accelerated: macro F1 of few rows is a biased and skewed statistic, and plain percentiles miss a
    truth above them five times as often as one below them (docs/LOG.md).
    """
    drawn = _Bootstrap(labels, predictions, groups, num_labels, num_samples, seed)
    return _accelerated_interval(*drawn.metric(metric, positive_labels))


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
) -> tuple[float, float]:
    """95 % interval of the second predictions' score less the first's, both on the same bootstrap samples of dialogues.

    Arguments as `bootstrap_scores`; `first` and `second` may have different numbers of repeats.
    """
    of_first, of_second = (
        _Bootstrap(labels, rows, groups, num_labels, num_samples, seed).metric(metric, positive_labels)
        for rows in (first, second)
    )
    differences = (after - before for before, after in zip(of_first, of_second, strict=True))
    return _accelerated_interval(*differences)


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


def score_predictions(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    seed: int = 42,
) -> dict[str, Any]:
    """Every score of DESIGN 9 and, under `interval`, its 95 % interval by bootstrap over dialogues.

    `interval` is empty where all rows are of one dialogue.

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: repeated cross-fitting; then each score is the mean over the repeats.
        groups: dialogue ids [n].
    """
    result = scores(labels, predictions, num_labels, positive_labels)
    result["interval"] = {}
    if len(set(groups)) < 2:
        return result
    drawn = _Bootstrap(labels, predictions, groups, num_labels, 2000, seed)
    result["interval"] = {
        name: list(_accelerated_interval(*drawn.metric(name, positive_labels))) for name in METRIC_NAMES
    }
    per_class = zip(
        *(values.T for values in drawn.apply(lambda counts: term("macro_f1", *counts))), strict=True
    )
    result["interval"]["f1_per_class"] = [list(_accelerated_interval(*values)) for values in per_class]
    return result


def cohens_kappa(first: np.ndarray, second: np.ndarray, num_labels: int) -> float:
    """Agreement of two label sequences [n] beyond what their label frequencies give by chance (Cohen, 1960).

    1 where both are the same label throughout, for which the formula has no value.
    """
    from sklearn.metrics import cohen_kappa_score

    if (first == second).all():
        return 1.0
    return float(cohen_kappa_score(first, second, labels=range(num_labels)))
