"""Scores, and their intervals by bootstrap over dialogues.

Every score comes from each label's hits, support and predicted rows, which lets a bootstrap work on per-dialogue counts.
All but kappa are a sum over labels of weight_c * term(hits_c, support_c, predicted_c); kappa is a ratio of two such sums.
Either way a moved row changes the counts of two labels alone, and a sweep scores every step in one pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from rareturn.data.label_guide import DEFAULT_METRIC, METRIC_NAMES, find_metric
from rareturn.errors import InputError

# Two scores closer than this are equal: it is far above the rounding of a mean of ratios, far below one row's worth.
SCORE_TOLERANCE = 1e-11


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def term(metric: str, hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Each label's term of a metric other than kappa, of counts [..., c]."""
    if metric == "macro_precision_positive":
        return ratio(hits, predicted)
    if metric in ("macro_recall_positive", "balanced_accuracy"):
        return ratio(hits, support)
    if metric == "accuracy":
        return np.asarray(hits, dtype=np.float64)
    return ratio(2.0 * hits, support + predicted)


def averaged_labels(metric: str, num_labels: int, positive_labels: Sequence[int]) -> Sequence[int]:
    """The labels that a metric averages over even where one has no row; none for the metrics that rows weigh."""
    if metric.startswith("f1:"):
        return [int(metric.removeprefix("f1:"))]
    if metric.endswith("_positive"):
        return positive_labels
    return range(num_labels) if metric == "macro_f1" else []


def term_weights(metric: str, support: np.ndarray, positive_labels: Sequence[int]) -> np.ndarray:
    """Weight of each label's term, [..., c] like `support`; ones for kappa, which has no terms."""
    if metric == "kappa":
        return np.ones(support.shape)
    if metric == "balanced_accuracy":
        return ratio(support > 0, (support > 0).sum(axis=-1, keepdims=True))
    if metric in ("accuracy", "weighted_f1"):
        share = np.ones(support.shape) if metric == "accuracy" else support
        return ratio(share, support.sum(axis=-1, keepdims=True))
    counted = averaged_labels(metric, support.shape[-1], positive_labels)
    weights = np.zeros(support.shape[-1])
    weights[list(counted)] = 1.0 / len(counted)
    return np.broadcast_to(weights, support.shape)


def kappa(hits: np.ndarray, chance: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960) of the right rows, the sum over labels of support * predicted, and all rows.

    0 where every row has, and is given, one and the same label: the formula has no value there.
    """
    return ratio(rows * hits - chance, rows * rows - chance)


def score_counts(metric: str, counts: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The metric of hits, support and predicted counts [..., c], at its `term_weights`; the leading axes are kept."""
    if metric == "kappa":
        hits, support, predicted = counts
        return kappa(hits.sum(axis=-1), (support * predicted).sum(axis=-1), support.sum(axis=-1))
    return (weights * term(metric, *counts)).sum(axis=-1)


def _score_counts(metric: str, counts: np.ndarray, positive_labels: Sequence[int]) -> np.ndarray:
    return score_counts(metric, counts, term_weights(metric, counts[1], positive_labels))


def count_rows(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """Hits, support and predicted, float64 [3, num_labels]."""
    rows = (labels[labels == predictions], labels, predictions)
    return np.stack([np.bincount(of, minlength=num_labels) for of in rows]).astype(np.float64)


def score_names(metric: str) -> tuple[str, ...]:
    """Every score by name, this one among them."""
    return METRIC_NAMES if metric in METRIC_NAMES else (*METRIC_NAMES, metric)


def scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = DEFAULT_METRIC,
) -> dict[str, Any]:
    """The scores of `score_names`, and `f1_per_class` (a list, one number a label).

    A label with no row and no prediction counts 0. Of predictions [repeats, n] every score is the mean of the repeats.
    """
    labels, repeats = np.asarray(labels), np.atleast_2d(np.asarray(predictions))
    counts = np.stack([count_rows(labels, row, num_labels) for row in repeats], axis=1)
    found = {name: float(_score_counts(name, counts, positive_labels).mean()) for name in score_names(metric)}
    return found | {"f1_per_class": term("macro_f1", *counts).mean(axis=0).tolist()}


@dataclass(eq=False)
class Truth:
    """What predictions of n rows are scored against, and how.

    Attributes:
        labels: int64 [n].
        groups: dialogue ids [n]; here 0..g-1 in order of first appearance.
        positive_labels: what the `_positive` metrics average over.
        metric: as `find_metric` gives it.
        seed: of folds, searches and bootstraps.
    """

    labels: np.ndarray
    groups: Sequence[Hashable] | np.ndarray
    num_labels: int
    positive_labels: Sequence[int]
    metric: str = DEFAULT_METRIC
    seed: int = 42

    def __post_init__(self) -> None:
        find_metric(self.metric, [str(label) for label in range(self.num_labels)])
        numbers: dict[Hashable, int] = {}
        self.groups = np.array([numbers.setdefault(group, len(numbers)) for group in self.groups], np.int64)
        self.labels, self.num_groups = np.asarray(self.labels, dtype=np.int64), len(numbers)

    def subset(self, rows: np.ndarray) -> Truth:
        """The truth of some rows."""
        return replace(self, labels=self.labels[rows], groups=self.groups[rows])

    def scores(self, predictions: np.ndarray) -> dict[str, Any]:
        """`scores` of predictions [n] or [repeats, n]."""
        return scores(self.labels, predictions, self.num_labels, self.positive_labels, self.metric)

    def score(self, predictions: np.ndarray) -> float:
        """The truth's metric of predictions [n] or [repeats, n]."""
        return self.scores(predictions)[self.metric]


def _resample(truth: Truth, predictions: np.ndarray, num_samples: int = 2000) -> list[np.ndarray]:
    """Hits, support and predicted counts [3, s, repeats, c]: s bootstrap samples of whole dialogues, all, all but one.

    The samples depend on the seed and the number of dialogues alone, so two calls on the same rows are paired.
    """
    num_groups, num_labels = truth.num_groups, truth.num_labels
    cells, size = truth.groups * num_labels, num_groups * num_labels
    counted = [
        np.bincount(place, minlength=size).reshape(num_groups, num_labels)
        for row in np.atleast_2d(np.asarray(predictions))
        for place in ((cells + truth.labels)[truth.labels == row], cells + truth.labels, cells + row)
    ]
    counts = np.concatenate(counted, axis=1).astype(np.float64)
    generator = np.random.default_rng(truth.seed)
    sums = np.empty((num_samples, counts.shape[1]))
    step = max(1, 4_000_000 // num_groups)
    for start in range(0, num_samples, step):
        block = min(step, num_samples - start)
        draws = generator.integers(num_groups, size=(block, num_groups))
        draws += np.arange(block)[:, None] * num_groups
        times = np.bincount(draws.ravel(), minlength=block * num_groups).reshape(block, num_groups)
        sums[start : start + block] = times @ counts
    total = counts.sum(axis=0)
    drawn = (sums, total[None], total - counts)
    return [np.moveaxis(some.reshape(len(some), -1, 3, num_labels), 2, 0) for some in drawn]


def _metric_of(truth: Truth, drawn: Sequence[np.ndarray], metric: str | None = None) -> list[np.ndarray]:
    """The metric of each of what `_resample` gives, the mean over the repeats: [s] each."""
    name = metric or truth.metric
    return [_score_counts(name, counts, truth.positive_labels).mean(axis=1) for counts in drawn]


def _accelerated_interval(
    samples: np.ndarray, estimate: np.ndarray, left_out: np.ndarray
) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % interval (Efron, 1987) of a score.

    Of its bootstrap samples [s], the score itself [1] and the scores with one dialogue left out [g]. Our own rather
    than scipy's, which draws anew for every score and cannot pair two systems.
    """
    normal = NormalDist()
    below = (samples < estimate - SCORE_TOLERANCE).mean() + (samples <= estimate + SCORE_TOLERANCE).mean()
    edge = 0.5 / len(samples)
    bias = normal.inv_cdf(float(np.clip(below / 2, edge, 1 - edge)))
    spread = left_out.mean() - left_out
    squares = float((spread**2).sum())
    acceleration = float((spread**3).sum()) / (6 * squares**1.5) if squares > SCORE_TOLERANCE**2 else 0.0
    shifted = [bias + normal.inv_cdf(tail) for tail in (0.025, 0.975)]
    # The denominator reaches 0 for a handful of dialogues only, where no interval is worth much.
    quantiles = [normal.cdf(bias + shift / max(1 - acceleration * shift, 0.05)) for shift in shifted]
    low, high = np.quantile(samples, quantiles)
    return float(low), float(high)


def bootstrap_scores(truth: Truth, predictions: np.ndarray, num_samples: int = 2000) -> np.ndarray:
    """The metric of predictions [n] or [repeats, n] on bootstrap samples of whole dialogues, float64 [num_samples].

    Two calls on the same rows are paired: their difference is the bootstrap of the difference.
    """
    return _metric_of(truth, _resample(truth, predictions, num_samples))[0]


def bootstrap_interval(truth: Truth, predictions: np.ndarray, num_samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the metric of predictions [n] or [repeats, n], by bootstrap over dialogues.

    Bias-corrected and accelerated: macro F1 of few rows is a biased and skewed statistic, and plain percentiles miss a
    truth above them five times as often as one below them (docs/LOG.md).
    """
    return _accelerated_interval(*_metric_of(truth, _resample(truth, predictions, num_samples)))


def difference_interval(truth: Truth, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % interval of the second's score less the first's, of predictions [n] or [repeats, n], on the same samples."""
    before, after = (_metric_of(truth, _resample(truth, rows)) for rows in (first, second))
    return _accelerated_interval(*(b - a for a, b in zip(before, after, strict=True)))


def check_labels(truth: Truth, label_names: Sequence[str], source: str) -> None:
    """Refuse a label without rows that the metric counts, or fewer than two dialogues: no rule can be fitted there."""
    counted = averaged_labels(truth.metric, truth.num_labels, truth.positive_labels)
    empty = [label for label in counted if label not in truth.labels]
    if empty:
        problem = "has no row: its F1 is not defined"
        raise InputError(*(f"{source}: label {label} ({label_names[label]}) {problem}" for label in empty))
    if truth.num_groups < 2:
        raise InputError(f"{source}: dialogue_id: one dialogue only, cross-fitting needs two or more")


def score_predictions(truth: Truth, predictions: np.ndarray) -> dict[str, Any]:
    """The `scores` of predictions [n] or [repeats, n] and, under `interval`, its 95 % interval.

    `interval` is empty where all rows are of one dialogue.
    """
    result = truth.scores(predictions) | {"interval": {}}
    if truth.num_groups < 2:
        return result
    drawn = _resample(truth, predictions)
    for name in score_names(truth.metric):
        result["interval"][name] = list(_accelerated_interval(*_metric_of(truth, drawn, name)))
    per_class = zip(*(term("macro_f1", *counts).mean(axis=1).T for counts in drawn), strict=True)
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
