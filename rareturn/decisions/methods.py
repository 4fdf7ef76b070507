"""Methods that fit a decision rule to out-of-fold probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rareturn.decisions.metrics import ratio, term
from rareturn.decisions.probabilities import fit_vector, log_softmax, softmax
from rareturn.decisions.rules import Decision
from rareturn.decisions.search import Problem, ascend, sweep_threshold

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


def _fit_argmax(problem: Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    return np.zeros(problem.num_labels), None


def _fit_random(
    problem: Problem, *, num_vectors: int, seed: int, **_: Any
) -> tuple[np.ndarray, float | None]:
    biases = _random_biases(num_vectors, problem.num_labels, seed)
    bias = biases[int(problem.scores(biases).argmax())]
    return bias, None if problem.protected_class is None else sweep_threshold(problem, bias)[0]


def _sample(problem: Problem, seed: int) -> Problem:
    if len(problem.labels) <= SAMPLE_ROWS:
        return problem
    chosen = np.random.default_rng(seed).choice(len(problem.labels), SAMPLE_ROWS, replace=False)
    return problem.subset(np.sort(chosen))


def _fit_exact(problem: Problem, *, seed: int, **_: Any) -> tuple[np.ndarray, float | None]:
    """Coordinate ascent from zero, from two prior-adjusted starts and from the best of 100 random vectors."""
    sample = _sample(problem, seed)
    vectors = _random_biases(100, problem.num_labels, seed)
    # Small tables have flat scores, on which an ascent stops early, and many starts cost little there.
    num_random = max(2, min(30, 4000 // len(sample.labels)))
    ranking = np.argsort(-sample.scores(vectors), kind="stable")
    starts = [-strength * problem.log_prior for strength in (0.0, 0.5, 1.0)] + list(
        vectors[ranking[:num_random]]
    )
    found = [ascend(sample, start) for start in starts]
    _, bias, threshold = found[max(range(len(found)), key=lambda number: found[number][0])]
    if sample is not problem:
        _, bias, threshold = ascend(problem, bias, threshold, max_rounds=3)
    return bias, threshold


def _fit_prior(problem: Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """Logit adjustment (Menon et al., 2021), -strength * log prior, by one strength; the gate searched at each.

    The score as a function of the strength is averaged over neighbours (±0.1) before its maximum is taken.
    """
    strengths = np.linspace(-0.5, 2.0, 126)
    rules = []
    for strength in strengths:
        bias = -strength * problem.log_prior
        gated = problem.protected_class is not None
        rules.append(sweep_threshold(problem, bias) if gated else (None, problem.score(bias)))
    smooth = np.convolve(np.pad([rule[1] for rule in rules], 5, "edge"), np.full(11, 1 / 11), "valid")
    best = int(smooth.argmax())
    return -strengths[best] * problem.log_prior, rules[best][0]


def _fit_vector_scaling(problem: Problem, **_: Any) -> tuple[np.ndarray, float | None]:
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
    value = float((problem.term_weights * term(problem.metric, hits, support, predicted)).sum())
    if problem.metric == "accuracy":
        by_hit, by_prediction = np.ones(len(hits)), np.zeros(len(hits))
    elif problem.metric == "macro_recall_positive":
        by_hit, by_prediction = ratio(np.ones(len(hits)), support), np.zeros(len(hits))
    else:
        factor, size = (
            (1.0, predicted) if problem.metric == "macro_precision_positive" else (2.0, support + predicted)
        )
        by_hit, by_prediction = ratio(np.full(len(hits), factor), size), -ratio(factor * hits, size**2)
    by_q = problem.term_weights * (targets * by_hit + by_prediction)
    centred = by_q - (q * by_q).sum(axis=1, keepdims=True)
    return value, sharpness * (q * centred).sum(axis=0)


def _fit_expected(problem: Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """Maximise the metric that vector-scaled probabilities expect of themselves: labels enter by likelihood alone."""
    return _fit_soft(problem, label_share=0.0, sharpness=5.0)


def _fit_smooth(problem: Problem, **_: Any) -> tuple[np.ndarray, float | None]:
    """As `expected`, each row's label counting for one half beside its probabilities, and borders twice as sharp."""
    return _fit_soft(problem, label_share=0.5, sharpness=10.0)


def _fit_soft(problem: Problem, label_share: float, sharpness: float) -> tuple[np.ndarray, float | None]:
    """Maximise `_soft_score` on vector-scaled probabilities from two prior-adjusted starts, then search the gate."""
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
    return bias, None if problem.protected_class is None else sweep_threshold(problem, bias)[0]


_FITS: dict[str, Callable[..., tuple[np.ndarray, float | None]]] = {
    "argmax": _fit_argmax,
    "vector": _fit_vector_scaling,
    "expected": _fit_expected,
    "prior": _fit_prior,
    "smooth": _fit_smooth,
    "exact": _fit_exact,
    "random": _fit_random,
}

METHODS = tuple(_FITS)

# From the simplest to the freest, by how much is tuned on the metric itself: nothing (`vector` and `expected` see the
# labels through the likelihood alone), one number, all numbers with something that holds them back, all numbers.
TIERS = (("argmax", "vector", "expected"), ("prior",), ("smooth",), ("exact", "random"))

# Methods that have no gate to search.
UNGATED_METHODS = ("argmax", "vector")


def fit(
    method: str,
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    protected_class: int | None = None,
    num_vectors: int = 22_000,
    seed: int = 42,
) -> Decision:
    """Fit one method's rule to out-of-fold probabilities.

    Args:
        method: one of `METHODS`.
        probabilities: [n, c]; the rule's temperature is 1 with regard to them.
        labels: int [n].
        positive_labels, metric: as in `score`.
        protected_class: label of a gate that is searched with the bias; None for no gate. A gate that does not raise
            the score of these rows is left out.
        num_vectors: vectors of `random`.

    Raises:
        ValueError: an unknown method or metric.
    """
    if method not in _FITS:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    protected = None if method in UNGATED_METHODS else protected_class
    problem = Problem(probabilities, labels, positive_labels, metric, protected)
    bias, threshold = _FITS[method](problem, num_vectors=num_vectors, seed=seed)
    # Only differences matter: centred, so that rules can be compared and averaged.
    return Decision(bias - bias.mean(), None if threshold is None else protected, threshold)
