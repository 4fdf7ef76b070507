"""Scores, and their intervals by bootstrap over dialogues.

Every score is a sum over labels of weight_c * term(hits_c, support_c, predicted_c), which is what lets a sweep update
one term a step and a bootstrap work on per-dialogue counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from rareturn.errors import InputError
from rareturn.files import packaged


@functools.cache
def load_metric() -> Any:
    """The `evaluate` module in `metrics/defense_f1`, from its path: no network.

    The values stay in memory, so that processes that score at the same moment share no file; evaluate copies the module
    into its cache under a lock.
    """
    import evaluate  # seconds of imports, which only a script that scores should pay

    return evaluate.load(str(packaged("metrics") / "defense_f1"), keep_in_memory=True)


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
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def term(metric: str, hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
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
    return (term_weights(metric, support, positive_labels) * term(metric, hits, support, predicted)).sum(
        axis=-1
    )


def count_rows(
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
            metric, *count_rows(np.asarray(labels), np.asarray(predictions), num_labels), positive_labels
        )
    )


def scores(
    labels: np.ndarray, predictions: np.ndarray, num_labels: int, positive_labels: Sequence[int]
) -> dict[str, Any]:
    """Every metric of DESIGN 9 by name, and `f1_per_class` (a list, one number a label)."""
    counts = count_rows(np.asarray(labels), np.asarray(predictions), num_labels)
    result: dict[str, Any] = {
        name: float(_score_counts(name, *counts, positive_labels)) for name in METRIC_NAMES
    }
    result["f1_per_class"] = [float(value) for value in term("macro_f1", *counts)]
    return result


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


def index_groups(groups: Sequence[Hashable]) -> tuple[np.ndarray, int]:
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
    group_indices, num_groups = index_groups(groups)
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

    Rows of one dialogue say nothing of others: then `interval` is empty.

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: repeated cross-fitting; then each score is the mean over the repeats.
        groups: dialogue ids [n].
    """
    repeats = [
        load_metric().compute(
            predictions=row, references=labels, positive_labels=list(positive_labels), num_labels=num_labels
        )
        for row in np.atleast_2d(predictions)
    ]
    scores: dict[str, Any] = {
        name: float(np.mean([repeat[name] for repeat in repeats])) for name in METRIC_NAMES
    }
    scores["f1_per_class"] = np.mean([repeat["f1_per_class"] for repeat in repeats], axis=0).tolist()
    scores["interval"] = {}
    if len(set(groups)) < 2:
        return scores
    options = {"num_labels": num_labels, "positive_labels": positive_labels, "seed": seed}
    scores["interval"] = {
        name: list(bootstrap_interval(labels, predictions, groups, metric=name, **options))
        for name in METRIC_NAMES
    }
    options["metric"] = "macro_f1_positive"  # with one positive label it is that label's F1
    scores["interval"]["f1_per_class"] = [
        list(bootstrap_interval(labels, predictions, groups, **options | {"positive_labels": [label]}))
        for label in range(num_labels)
    ]
    return scores


def cohens_kappa(first: np.ndarray, second: np.ndarray, num_labels: int) -> float:
    """Agreement of two label sequences [n] beyond what their label frequencies give by chance (Cohen, 1960).

    1 where both are the same label throughout, for which the formula has no value.
    """
    observed = float(np.mean(first == second))
    shares = [np.bincount(labels, minlength=num_labels) / len(labels) for labels in (first, second)]
    chance = float(shares[0] @ shares[1])
    return 1.0 if chance == 1.0 else (observed - chance) / (1 - chance)
