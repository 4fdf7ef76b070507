"""Exact search for a bias and a gate: sweeps that score every value of one number at once."""

from __future__ import annotations

import numpy as np

from rareturn.decisions.metrics import (
    SCORE_TOLERANCE,
    Truth,
    count_rows,
    kappa,
    score_counts,
    term,
    term_weights,
)
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

    def score(self, bias: np.ndarray, threshold: float | None = None) -> float:
        """The metric of a rule on these rows."""
        predictions = (self.log_p + bias).argmax(axis=1)
        if threshold is not None:
            predictions[self.probabilities[:, self.protected_class] >= threshold] = self.protected_class
        counts = count_rows(self.labels, predictions, self.num_labels)
        return float(score_counts(self.metric, counts, self.term_weights))

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
            counts = hits, np.broadcast_to(self.support, hits.shape), predicted
            found[start : start + step] = score_counts(self.metric, counts, self.term_weights)
        return found

    def _sweep(self, labels: np.ndarray, origin: np.ndarray, target: int, counts: np.ndarray) -> np.ndarray:
        """Scores [m + 1] after moving 0, 1, … m rows, in the order given, from the labels `origin` to `target`.

        Only two labels' terms change a step, and a label loses its rows in a known order: cumulative sums give every
        score at once. The rows have the labels `labels` [m]; no `origin` [m] is `target`. `counts` are hits, support
        and predicted before the first move, [3, c].
        """
        hits, support, predicted = counts
        metric, weights = self.metric, self.term_weights
        if metric == "kappa":
            gains = (
                (labels == target).astype(np.float64) - (labels == origin),
                support[target] - support[origin],
            )
            starts = hits.sum(), (support * predicted).sum()
            sums = [np.cumsum([start, *gain]) for start, gain in zip(starts, gains, strict=True)]
            return kappa(*sums, support.sum())
        moved = np.arange(len(labels) + 1.0)
        moved_hits = np.concatenate([[0.0], np.cumsum(labels == target)])
        gained = term(metric, hits[target] + moved_hits, support[target], predicted[target] + moved)
        # Grouped by origin, each in order: what a label has lost is a cumulative sum less its value at the group's start.
        grouped = np.argsort(origin.astype(np.int16), kind="stable")
        own = origin[grouped]
        lost_hits = (labels[grouped] == own).astype(np.float64)
        starts = np.searchsorted(own, np.arange(self.num_labels))
        all_hits = np.cumsum(lost_hits)
        left_rows = (predicted + starts)[own] - moved[1:]
        left_hits = (hits + np.append(0.0, all_hits)[starts])[own] - all_hits
        left = term(metric, left_hits, support[own], left_rows)
        previous = term(metric, left_hits + lost_hits, support[own], left_rows + 1)
        changes = np.empty(len(labels))
        changes[grouped] = weights[own] * (left - previous)
        before = float((weights * term(metric, hits, support, predicted)).sum())
        swept = weights[target] * gained
        swept += before - swept[0]
        swept[1:] += np.cumsum(changes)
        return swept

    def sweep_bias(self, bias: np.ndarray, threshold: float | None, label: int) -> tuple[float, float]:
        """Best value of one label's bias, everything else fixed, and its score.

        A row that the gate leaves free goes to `label` once its bias passes the row's breakpoint: the best other
        label's log p + bias, less the row's own log p. Outside the breakpoints, 1 nat of distance is kept.
        """
        log_p, labels, protected = self.log_p, self.labels, self.protected_class
        if threshold is not None:
            gated = self.probabilities[:, protected] >= threshold
            gated_labels, log_p, labels = labels[gated], log_p[~gated], labels[~gated]
        if not len(labels):
            return float(bias[label]), self.score(bias, threshold)
        others = log_p + bias
        others[:, label] = -np.inf
        origin = others.argmax(axis=1)
        breakpoints = others[np.arange(len(origin)), origin] - log_p[:, label]
        del others
        counts = count_rows(labels, origin, self.num_labels)
        if threshold is not None:
            counts += count_rows(gated_labels, np.full_like(gated_labels, protected), self.num_labels)
        order = np.argsort(breakpoints)
        swept = self._sweep(labels[order], origin[order], label, counts)
        breakpoints = breakpoints[order]
        return _best_interval(
            np.concatenate([breakpoints[:1] - 2.0, breakpoints, breakpoints[-1:] + 2.0]), swept
        )

    def sweep_threshold(self, bias: np.ndarray) -> tuple[float | None, float]:
        """Best threshold of the gate, and its score; None where having no gate is as good, or it has no class."""
        protected = self.protected_class
        if protected is None:
            return None, self.score(bias)
        predictions = (self.log_p + bias).argmax(axis=1)
        counts = count_rows(self.labels, predictions, self.num_labels)
        moving = np.flatnonzero(predictions != protected)
        moving = moving[np.argsort(self.probabilities[moving, protected])[::-1]]
        swept = self._sweep(self.labels[moving], predictions[moving], protected, counts)
        if len(moving):
            # Ascending: the k-th interval lets all rows but the k least likely ones through the gate.
            edges = np.append(0.0, self.probabilities[moving[::-1], protected])
            threshold, score = _best_interval(edges, swept[:0:-1])
            if score > swept[0] + SCORE_TOLERANCE:
                return threshold, score
        return None, float(swept[0])

    def ascend(
        self, bias: np.ndarray, threshold: float | None = None, max_rounds: int = 20
    ) -> tuple[float, np.ndarray, float | None]:
        """Coordinate ascent over the biases and the gate until a whole round improves nothing.

        Score, bias [c] and threshold; the score is never below that of the start.
        """
        bias, best, idle = np.array(bias, dtype=np.float64), self.score(bias, threshold), 0
        coordinates = [*range(self.num_labels), *([] if self.protected_class is None else ["gate"])]
        for coordinate in coordinates * max_rounds:
            if coordinate == "gate":
                value, score = self.sweep_threshold(bias)
            else:
                value, score = self.sweep_bias(bias, threshold, coordinate)
            idle += 1
            if score > best + SCORE_TOLERANCE:
                best, idle = score, 0
                if coordinate == "gate":
                    threshold = value
                else:
                    bias[coordinate] = value
            if idle == len(coordinates):
                break
        return best, bias, threshold


def _best_interval(edges: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Middle of the widest of the best-scoring intervals between ascending edges [m + 1], and its score (of [m]).

    An interval narrower than 1e-9 scores -inf, since no value in it survives rounding.
    """
    widths = np.diff(edges)
    scores = np.where(widths > 1e-9, scores, -np.inf)
    tied = np.flatnonzero(scores >= scores.max() - SCORE_TOLERANCE)
    widest = tied[widths[tied].argmax()]
    return float((edges[widest] + edges[widest + 1]) / 2), float(scores[widest])
