"""Exact search for a bias and a gate: sweeps that score every value of one number at once."""

from __future__ import annotations

import numpy as np

from rareturn.decisions.metrics import SCORE_TOLERANCE, Truth, count_rows, term, term_weights
from rareturn.decisions.probabilities import log_probabilities


class Problem:
    """Rows on which a rule is searched: probabilities [n, c], the truth, and the class of the gate, if any."""

    def __init__(self, probabilities: np.ndarray, truth: Truth, protected_class: int | None = None):
        self.probabilities = np.asarray(probabilities, dtype=np.float64)
        self.log_p = log_probabilities(self.probabilities)
        self.truth, self.labels, self.metric = truth, truth.labels, truth.metric
        self.protected_class = protected_class
        self.num_labels = self.log_p.shape[1]
        self.support = np.bincount(self.labels, minlength=self.num_labels).astype(np.float64)
        self.term_weights = np.array(term_weights(truth.metric, self.support, truth.positive_labels))
        shares = self.support + 0.5
        self.log_prior = np.log(shares / shares.sum())

    def subset(self, rows: np.ndarray) -> Problem:
        """The problem on some rows."""
        return Problem(self.probabilities[rows], self.truth.subset(rows), self.protected_class)

    def score(self, bias: np.ndarray, threshold: float | None = None) -> float:
        """The metric of a rule on these rows."""
        predictions = (self.log_p + bias).argmax(axis=1)
        if threshold is not None:
            predictions[self.probabilities[:, self.protected_class] >= threshold] = self.protected_class
        counts = count_rows(self.labels, predictions, self.num_labels)
        return float((self.term_weights * term(self.metric, *counts)).sum())

    def scores(self, biases: np.ndarray) -> np.ndarray:
        """`score` of many biases [v, c] without a gate, float64 [v]: one label at a time, a block of biases at once."""
        order = np.argsort(self.labels, kind="stable")
        ends = np.searchsorted(self.labels[order], np.arange(self.num_labels + 1))
        columns = np.ascontiguousarray(self.log_p[order].T)
        code = np.min_scalar_type(self.num_labels).type
        found = np.empty(len(biases))
        step = max(1, 60_000 // len(order))  # a block of this size stays in the processor's cache
        for start in range(0, len(biases), step):
            block = biases[start : start + step]
            best = columns[0] + block[:, :1]
            values, better = np.empty_like(best), np.empty(best.shape, dtype=bool)
            predictions = np.zeros(best.shape, dtype=code)
            for label in range(1, self.num_labels):
                np.add(columns[label], block[:, label : label + 1], out=values)
                np.greater(values, best, out=better)
                np.maximum(best, values, out=best)
                # Labels ascend: the last one stands.
                np.maximum(predictions, better * code(label), out=predictions)
            hits, predicted = np.empty((2, len(block), self.num_labels))
            for label in range(self.num_labels):
                chosen = predictions == label
                predicted[:, label] = np.count_nonzero(chosen, axis=1)
                hits[:, label] = np.count_nonzero(chosen[:, ends[label] : ends[label + 1]], axis=1)
            terms = term(self.metric, hits, np.broadcast_to(self.support, hits.shape), predicted)
            found[start : start + step] = (self.term_weights * terms).sum(axis=1)
        return found


def _sweep_scores(
    problem: Problem, labels: np.ndarray, origin: np.ndarray, target: int, counts: np.ndarray
) -> np.ndarray:
    """Scores after moving 0, 1, … m rows, in the order given, from the label `origin` that predicts them to `target`.

    Only two labels' terms change a step, and a label loses its rows in a known order: cumulative sums give every score
    at once.

    Args:
        labels, origin: of the rows that move, in order, [m]; no origin is `target`.
        counts: hits, support and predicted before the first move, [3, c].

    Returns:
        float64 [m + 1].
    """
    hits, support, predicted = counts
    metric, weights = problem.metric, problem.term_weights
    moved = np.arange(len(labels) + 1.0)
    moved_hits = np.concatenate([[0.0], np.cumsum(labels == target)])
    gained = term(metric, hits[target] + moved_hits, support[target], predicted[target] + moved)
    # Grouped by origin, each in order: what a label has lost is a cumulative sum less its value at the group's start.
    grouped = np.argsort(origin.astype(np.int16), kind="stable")
    own = origin[grouped]
    lost_hits = (labels[grouped] == own).astype(np.float64)
    starts = np.searchsorted(own, np.arange(problem.num_labels))
    all_hits = np.cumsum(lost_hits)
    left_rows = (predicted + starts)[own] - moved[1:]
    left_hits = (hits + np.append(0.0, all_hits)[starts])[own] - all_hits
    own_support = support[own]
    changes = np.empty(len(labels))
    changes[grouped] = weights[own] * (
        term(metric, left_hits, own_support, left_rows)
        - term(metric, left_hits + lost_hits, own_support, left_rows + 1)
    )
    before = float((weights * term(metric, hits, support, predicted)).sum())
    swept = weights[target] * gained
    swept += before - swept[0]
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
    problem: Problem, bias: np.ndarray, threshold: float | None, label: int
) -> tuple[float, float]:
    """Best value of one label's bias, everything else fixed, and its score.

    A row that the gate leaves free goes to `label` once its bias passes the row's breakpoint: the best other label's
    log p + bias, less the row's own log p. Below the first and above the last breakpoint, 1 nat of distance is kept.
    """
    log_p, labels, protected = problem.log_p, problem.labels, problem.protected_class
    if threshold is not None:
        gated = problem.probabilities[:, protected] >= threshold
        gated_labels, log_p, labels = labels[gated], log_p[~gated], labels[~gated]
    if not len(labels):
        return float(bias[label]), problem.score(bias, threshold)
    others = log_p + bias
    others[:, label] = -np.inf
    origin = others.argmax(axis=1)
    breakpoints = others[np.arange(len(origin)), origin] - log_p[:, label]
    del others
    counts = count_rows(labels, origin, problem.num_labels)
    if threshold is not None:
        counts += count_rows(gated_labels, np.full_like(gated_labels, protected), problem.num_labels)
    order = np.argsort(breakpoints)
    swept = _sweep_scores(problem, labels[order], origin[order], label, counts)
    breakpoints = breakpoints[order]
    edges = np.concatenate([[breakpoints[0] - 2.0], breakpoints, [breakpoints[-1] + 2.0]])
    best = _best_interval(edges, swept)
    assert best is not None  # the two outer intervals are 2 wide
    return best


def sweep_threshold(problem: Problem, bias: np.ndarray) -> tuple[float | None, float]:
    """Best threshold of the gate at this bias, and its score; None where having no gate is as good, or it has no class."""
    protected = problem.protected_class
    if protected is None:
        return None, problem.score(bias)
    predictions = (problem.log_p + bias).argmax(axis=1)
    counts = count_rows(problem.labels, predictions, problem.num_labels)
    moving = np.flatnonzero(predictions != protected)
    probability = problem.probabilities[moving, protected]
    order = np.argsort(probability)[::-1]
    moving, probability = moving[order], probability[order]
    swept = _sweep_scores(problem, problem.labels[moving], predictions[moving], protected, counts)
    # Thresholds in ascending order: the k-th interval lets all rows but the k least likely ones through the gate.
    best = _best_interval(np.concatenate([[0.0], probability[::-1]]), swept[:0:-1]) if len(moving) else None
    if best is None or best[1] <= swept[0] + SCORE_TOLERANCE:
        return None, float(swept[0])
    return best


def ascend(
    problem: Problem, bias: np.ndarray, threshold: float | None = None, max_rounds: int = 20
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
        of_gate = coordinate == problem.num_labels
        value, value_score = (
            sweep_threshold(problem, bias) if of_gate else _sweep_bias(problem, bias, threshold, coordinate)
        )
        idle += 1
        if value_score > current + SCORE_TOLERANCE:
            current, idle = value_score, 0
            if of_gate:
                threshold = value
            else:
                bias[coordinate] = value
        if idle == num_coordinates:
            break
    return current, bias, threshold
