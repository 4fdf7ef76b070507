"""Methods that fit a decision rule to out-of-fold probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from rareturn.decisions.metrics import Truth, ratio, score_counts
from rareturn.decisions.probabilities import fit_vector, log_softmax, softmax
from rareturn.decisions.rules import Decision
from rareturn.decisions.search import Problem

# Rows beyond which a search looks for its start on a sample of the rows and only refines the best on all of them.
SAMPLE_ROWS = 20_000

Found = tuple[np.ndarray, float | None]  # a bias [c] and the threshold of the gate, if any


def _random_biases(num_vectors: int, num_labels: int, seed: int) -> np.ndarray:
    """Bias vectors [v, c] of the paper's search; the first is zero.

    The paper gives their number only. Of 1/4, 1/2, 1 and 2 nats of standard deviation, 1/2 scored best on twelve tables.
    """
    biases = 0.5 * np.random.default_rng(seed).standard_normal((num_vectors, num_labels))
    biases[0] = 0.0
    return biases


def _fit_argmax(problem: Problem, num_vectors: int) -> Found:
    return np.zeros(problem.num_labels), None


def _fit_random(problem: Problem, num_vectors: int) -> Found:
    biases = _random_biases(num_vectors, problem.num_labels, problem.truth.seed)
    bias = biases[int(problem.scores(biases).argmax())]
    return bias, problem.sweep_threshold(bias)[0]


def _fit_exact(problem: Problem, num_vectors: int) -> Found:
    """Coordinate ascent from zero, from two prior-adjusted starts and from the best of 100 random vectors."""
    sample, size, seed = problem, len(problem.labels), problem.truth.seed
    if size > SAMPLE_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(size, SAMPLE_ROWS, replace=False))
        sample = Problem(problem.probabilities[rows], problem.truth.subset(rows), problem.protected_class)
    vectors = _random_biases(100, problem.num_labels, seed)
    # Small tables have flat scores, on which an ascent stops early, and many starts cost little there.
    num_random = max(2, min(30, 4000 // len(sample.labels)))
    ranking = np.argsort(-sample.scores(vectors), kind="stable")
    starts = [-strength * problem.log_prior for strength in (0.0, 0.5, 1.0)]
    found = [sample.ascend(start) for start in (*starts, *vectors[ranking[:num_random]])]
    _, bias, threshold = max(found, key=lambda rule: rule[0])
    if sample is not problem:
        _, bias, threshold = problem.ascend(bias, threshold, max_rounds=3)
    return bias, threshold


def _fit_prior(problem: Problem, num_vectors: int) -> Found:
    """Logit adjustment (Menon et al., 2021), -strength * log prior, by one strength; the gate searched at each.

    The score as a function of the strength is averaged over neighbours (±0.1) before its maximum is taken.
    """
    strengths = np.linspace(-0.5, 2.0, 126)
    rules = [problem.sweep_threshold(-strength * problem.log_prior) for strength in strengths]
    smooth = np.convolve(np.pad([rule[1] for rule in rules], 5, "edge"), np.full(11, 1 / 11), "valid")
    best = int(smooth.argmax())
    return -strengths[best] * problem.log_prior, rules[best][0]


def _fit_vector_scaling(problem: Problem, num_vectors: int) -> Found:
    slope, offset = fit_vector(problem.log_p, problem.labels)
    return offset / slope, None


def _soft_score(
    log_p: np.ndarray, targets: np.ndarray, bias: np.ndarray, sharpness: float, problem: Problem
) -> tuple[float, np.ndarray]:
    """The metric with every count replaced by its expectation, and its gradient in the bias [c].

    A row goes to label c with probability softmax(sharpness * (log p + bias))_c and has label c with probability
    `targets[:, c]`.
    """
    q = softmax(sharpness * (log_p + bias))
    hits, support, predicted = (q * targets).sum(axis=0), targets.sum(axis=0), q.sum(axis=0)
    value = float(score_counts(problem.metric, (hits, support, predicted), problem.term_weights))
    one, by_prediction = np.ones(len(hits)), np.zeros(len(hits))
    if problem.metric == "kappa":
        rows, beyond = support.sum(), support.sum() ** 2 - support @ predicted
        by_hit = ratio(rows * one, beyond)
        by_prediction = support * ratio(rows * (hits.sum() - rows), beyond**2)
    elif problem.metric in ("accuracy", "macro_recall_positive", "balanced_accuracy"):
        by_hit = one if problem.metric == "accuracy" else ratio(one, support)
    else:
        precision = problem.metric == "macro_precision_positive"
        factor, size = (1.0, predicted) if precision else (2.0, support + predicted)
        by_hit, by_prediction = ratio(factor * one, size), -ratio(factor * hits, size**2)
    by_q = problem.term_weights * (targets * by_hit + by_prediction)
    centred = by_q - (q * by_q).sum(axis=1, keepdims=True)
    return value, sharpness * (q * centred).sum(axis=0)


def _fit_soft(problem: Problem, num_vectors: int, label_share: float, sharpness: float) -> Found:
    """Maximise `_soft_score` on vector-scaled probabilities from two prior-adjusted starts, then search the gate.

    Each row's label counts for `label_share` beside its probabilities.
    """
    from scipy.optimize import minimize

    slope, offset = fit_vector(problem.log_p, problem.labels)
    log_q = log_softmax(slope * problem.log_p + offset)
    targets = (1 - label_share) * np.exp(log_q)
    targets[np.arange(len(targets)), problem.labels] += label_share

    def objective(bias: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _soft_score(log_q, targets, bias, sharpness, problem)
        return -value, -gradient

    starts = (-strength * problem.log_prior for strength in (0.5, 1.0))
    found = [minimize(objective, start, jac=True, method="L-BFGS-B") for start in starts]
    bias = (offset + min(found, key=lambda result: result.fun).x) / slope
    return bias, problem.sweep_threshold(bias)[0]


_FITS: dict[str, Callable[[Problem, int], Found]] = {
    "argmax": _fit_argmax,
    "vector": _fit_vector_scaling,
    # The metric that the probabilities expect of themselves: labels enter by likelihood alone.
    "expected": partial(_fit_soft, label_share=0.0, sharpness=5.0),
    "prior": _fit_prior,
    "smooth": partial(_fit_soft, label_share=0.5, sharpness=10.0),
    "exact": _fit_exact,
    "random": _fit_random,
}

METHODS = tuple(_FITS)

# From the simplest to the freest, by how much is tuned on the metric itself: nothing (`vector` and `expected` see the
# labels through the likelihood alone), one number, all numbers with something that holds them back, all numbers.
# `random` is left out because `exact` searches for the same thing, and finds it.
TIERS = (("argmax", "vector", "expected"), ("prior",), ("smooth",), ("exact",))

UNGATED_METHODS = ("argmax", "vector")


def fit(
    method: str, probabilities: np.ndarray, truth: Truth, gate: int | None = None, num_vectors: int = 22_000
) -> Decision:
    """Fit one of `METHODS` to out-of-fold probabilities [n, c], with regard to which the rule's temperature is 1.

    A gate for the label `gate` is searched with the bias, and left out where it does not raise the score of these rows.
    `num_vectors` are those of `random`.
    """
    gate = None if method in UNGATED_METHODS else gate
    bias, threshold = _FITS[method](Problem(probabilities, truth, gate), num_vectors)
    # Only differences matter: centred, so that rules can be compared and averaged.
    return Decision(bias - bias.mean(), None if threshold is None else gate, threshold)
