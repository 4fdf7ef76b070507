"""Decision rules against brute force, scikit-learn and arrays worked by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    precision_recall_fscore_support,
)
from sklearn.metrics import log_loss as sklearn_log_loss

from rareturn.data.label_guide import find_metric
from rareturn.decisions import cross_fitting
from rareturn.decisions.cross_fitting import (
    MIN_GAIN,
    Recipe,
    _simplest_within_one_error,
    choose,
    cross_fit,
    fit_rule,
    grouped_folds,
    repeated_folds,
    search_weights,
)
from rareturn.decisions.methods import METHODS, _random_biases, _soft_score, fit
from rareturn.decisions.metrics import (
    METRIC_NAMES,
    Truth,
    bootstrap_interval,
    bootstrap_scores,
    check_labels,
    difference_interval,
    scores,
)
from rareturn.decisions.probabilities import (
    blend,
    brier_score,
    calibration_error,
    check_logits,
    fit_temperature,
    fit_vector,
    log_softmax,
    probability_quality,
    softmax,
)
from rareturn.decisions.rules import Decision, Prediction, decide
from rareturn.decisions.search import Problem
from rareturn.decisions.voting import Voting, scoped
from rareturn.errors import InputError

METRICS = (*METRIC_NAMES, "f1:2")


def score(labels, predictions, num_labels, positive, metric="macro_f1_positive"):
    """One of `scores`."""
    return scores(labels, predictions, num_labels, positive, metric)[metric]


def draw(seed, rows=120, num_labels=4, num_groups=20, ties=False):
    """Probabilities that know a little about skewed labels; with `ties`, on a coarse grid so that equal values abound."""
    generator = np.random.default_rng(seed)
    shares = np.arange(1, num_labels + 1) ** 2.0
    labels = generator.choice(num_labels, rows, p=shares / shares.sum())
    logits = generator.standard_normal((rows, num_labels)) + np.log(shares)
    logits[np.arange(rows), labels] += 1.0
    if ties:
        logits = np.round(logits)
    groups = [f"d{group}" for group in generator.integers(num_groups, size=rows)]
    return softmax(logits), labels, groups


def alone(labels, num_labels, positive, metric="macro_f1_positive"):
    """The truth of rows that are a dialogue each: a search asks for no dialogues."""
    return Truth(labels, range(len(labels)), num_labels, positive, metric)


def brute_decide(probabilities, bias, protected=None, threshold=None):
    predictions = []
    for row in probabilities:
        if threshold is not None and row[protected] >= threshold:
            predictions.append(protected)
            continue
        values = [np.log(p) + b for p, b in zip(row, bias, strict=True)]
        predictions.append(values.index(max(values)))
    return np.array(predictions)


# ------------------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    labels, predictions = generator.integers(0, 6, 80), generator.integers(0, 5, 80)
    labels[labels == 3] = 2  # a label with predictions and no rows; label 5 has rows and no predictions
    positive = [1, 2, 3, 5]
    found = scores(labels, predictions, 7, positive)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=range(7), zero_division=0
    )
    support = np.bincount(labels, minlength=7)
    assert found["f1_per_class"] == pytest.approx(f1)
    assert found["macro_f1_positive"] == pytest.approx(f1[positive].mean())
    assert found["macro_precision_positive"] == pytest.approx(precision[positive].mean())
    assert found["macro_recall_positive"] == pytest.approx(recall[positive].mean())
    assert found["macro_f1"] == pytest.approx(f1.mean())
    assert found["weighted_f1"] == pytest.approx((f1 * support).sum() / 80)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, predictions))
    assert list(found) == [*METRIC_NAMES, "f1_per_class"]
    for metric in METRIC_NAMES:
        assert score(labels, predictions, 7, positive, metric) == pytest.approx(found[metric])
    for label in range(7):
        assert score(labels, predictions, 7, positive, f"f1:{label}") == pytest.approx(f1[label])


def test_a_label_without_rows_and_predictions_counts_as_zero():
    # Label 1: 1 hit, 1 missed, 1 too many: F1 1/2. Label 2: nothing at all. Mean over the two: 1/4.
    assert score([1, 1, 0], [1, 0, 1], 3, [1, 2]) == pytest.approx(0.25)


def test_kappa_of_one_label_throughout_is_zero():
    assert score([1, 1], [1, 1], 2, [1], "kappa") == 0
    assert score([0, 1, 1], [1, 0, 0], 2, [1], "kappa") == pytest.approx(
        cohen_kappa_score([0, 1, 1], [1, 0, 0])
    )


@pytest.mark.parametrize("metric", ["f1_macro", "f1:2", "f1"])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(ValueError, match=metric):
        Truth([0, 1], ["a", "b"], 2, [1], metric)


def test_a_metric_names_a_label_by_number_or_name():
    names = ["none", "anger", "0"]
    assert [find_metric(f"f1:{label}", names) for label in ("1", "anger", "2", "0")] == [
        "f1:1",
        "f1:1",
        "f1:2",
        "f1:0",  # a number is a number, though label 2 has this name
    ]
    assert find_metric("kappa", names) == "kappa"
    for wrong, problem in (
        ("f1:joy", "no label has this number or name"),
        ("mcc", "is not one of accuracy, "),
    ):
        with pytest.raises(ValueError, match=problem):
            find_metric(wrong, names)


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_is_the_bootstrap_of_rows_put_together_by_hand(metric):
    probabilities, labels, groups = draw(0)
    predictions = probabilities.argmax(1)
    truth = Truth(labels, groups, 4, [0, 1, 2], metric, seed=3)
    found = bootstrap_scores(truth, predictions, 30)
    names = list(dict.fromkeys(groups))
    draws = np.random.default_rng(3).integers(len(names), size=(30, len(names)))
    for value, sample in zip(found, draws, strict=True):
        rows = [row for group in sample for row in range(len(labels)) if groups[row] == names[group]]
        assert value == pytest.approx(score(labels[rows], predictions[rows], 4, [0, 1, 2], metric))
    # Repeats are averaged within a sample.
    twice = bootstrap_scores(truth, np.stack([predictions, labels]), 30)
    perfect = bootstrap_scores(truth, labels, 30)
    assert twice == pytest.approx((found + perfect) / 2)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_interval_is_that_of_scipy(repeats):
    probabilities, labels, groups = draw(3, rows=300, num_groups=40)
    generator = np.random.default_rng(0)
    predictions = np.stack(
        [(np.log(probabilities) + 0.3 * generator.standard_normal(4)).argmax(1) for _ in range(repeats)]
    )
    truth = Truth(labels, groups, 4, [0, 1, 2])
    low, high = bootstrap_interval(truth, predictions, 20_000)
    names = np.array(sorted(set(groups)))
    rows_of = [np.flatnonzero(np.array(groups) == name) for name in names]

    def statistic(sample):
        rows = np.concatenate([rows_of[int(number)] for number in sample])
        return np.mean([score(labels[rows], row[rows], 4, [0, 1, 2]) for row in predictions])

    reference = scipy.stats.bootstrap(
        (np.arange(len(names)),), statistic, n_resamples=4_000, vectorized=False, method="BCa", rng=1
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.003)
    plain = np.quantile(bootstrap_scores(truth, predictions, 20_000), [0.025, 0.975])
    assert abs(plain - [low, high]).max() > 0.005  # another interval, or this test would show nothing


def test_the_interval_of_a_difference_is_paired():
    probabilities, labels, groups = draw(3, rows=300, num_groups=40)
    first, truth = probabilities.argmax(1), Truth(labels, groups, 4, [0, 1, 2])
    assert difference_interval(truth, first, first) == (0, 0)
    # Against predictions that are always wrong, which score 0 on every sample, it is the interval of the score alone.
    wrong = np.where(labels == 3, 2, 3)
    alone = bootstrap_interval(truth, first)
    assert difference_interval(truth, wrong, first) == pytest.approx(alone)
    twice = np.stack([first, first])
    assert difference_interval(truth, wrong, twice) == pytest.approx(alone)
    assert difference_interval(truth, first, wrong)[1] < 0


def test_the_interval_of_what_cannot_vary_is_a_point():
    labels, groups = np.array([0, 1, 1, 0]), ["a", "a", "b", "b"]
    assert bootstrap_interval(Truth(labels, groups, 2, [0, 1]), labels) == (1, 1)


# ----------------------------------------------------------------------------------------------------------- the rule


def test_decide_ties_and_gate_edges():
    probabilities = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    zero = np.zeros(3)
    assert decide(probabilities, Decision(zero)).tolist() == [0, 1, 0, 2]
    # A probability equal to the threshold passes the gate; the gate comes before the bias.
    gated = Decision(np.array([0.0, 9.0, 0.0]), protected_class=0, threshold=0.5)
    assert decide(probabilities, gated).tolist() == [1, 1, 0, 1]
    # The bias that makes labels 0 and 1 equal: the lower label.
    tie = Decision(np.array([0.0, np.log(2.0), 0.0]))
    assert decide(probabilities[2:3], tie).tolist() == [0]
    # A probability of zero is no infinity.
    assert decide(np.array([[0.0, 1.0]]), Decision(np.zeros(2))).tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_decide_is_the_rule_row_by_row(seed):
    probabilities, _, _ = draw(seed)
    bias = np.random.default_rng(seed).standard_normal(4)
    decision = Decision(bias, 3, 0.6)
    assert (decide(probabilities, decision) == brute_decide(probabilities, bias, 3, 0.6)).all()


# ------------------------------------------------------------------------------------------------------- exact search


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_the_sweep_over_a_bias_finds_what_trying_every_interval_finds(metric, ties):
    for seed in range(4):
        probabilities, labels, _ = draw(seed, rows=40, num_labels=5, ties=ties)
        labels[labels == 1] = 2  # a label without rows
        positive = [1, 2, 4]
        problem = Problem(probabilities, alone(labels, 5, positive, metric), 4)
        bias = np.random.default_rng(seed).standard_normal(5)
        for label, threshold in itertools.product(range(5), (None, 0.6)):
            value, claimed = problem.sweep_bias(bias, threshold, label)
            log_p = np.log(probabilities) + bias
            edges = np.delete(log_p, label, 1).max(1) - np.log(probabilities[:, label])
            edges = np.unique(np.round(edges, 9))
            tried = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
            best = max(
                score(
                    labels,
                    brute_decide(probabilities, [*bias[:label], candidate, *bias[label + 1 :]], 4, threshold),
                    5,
                    positive,
                    metric,
                )
                for candidate in tried
            )
            assert claimed == pytest.approx(best, abs=1e-12)
            bias_there = [*bias[:label], value, *bias[label + 1 :]]
            assert problem.score(np.array(bias_there), threshold) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_the_sweep_over_the_gate_finds_what_trying_every_threshold_finds(metric, ties):
    for seed in range(6):
        probabilities, labels, _ = draw(seed, rows=40, ties=ties)
        problem = Problem(probabilities, alone(labels, 4, [0, 1, 2], metric), 3)
        bias = np.random.default_rng(seed).standard_normal(4)
        threshold, claimed = problem.sweep_threshold(bias)
        assert problem.score(bias, threshold) == pytest.approx(claimed, abs=1e-12)
        values = np.unique(probabilities[:, 3])
        tried = [None, values[0] / 2, *((values[1:] + values[:-1]) / 2)]
        best = max(problem.score(bias, candidate) for candidate in tried)
        assert claimed == pytest.approx(best, abs=1e-12)
        if best == problem.score(bias):
            assert threshold is None


def test_a_sweep_takes_the_middle_of_the_widest_best_interval():
    # Label 1 is right for rows 0 and 1 only: every bias between the breakpoints 2 and 5 is best, and 3.5 its middle.
    log_p = np.log(softmax(np.array([[1.0, 0.0], [2.0, 0.0], [5.0, 0.0]])))
    problem = Problem(np.exp(log_p), alone(np.array([1, 1, 0]), 2, [0, 1], "accuracy"))
    value, best = problem.sweep_bias(np.zeros(2), None, 1)
    assert value == pytest.approx(3.5) and best == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_many_biases_at_once_score_as_one_by_one(metric, ties):
    probabilities, labels, _ = draw(5, rows=60, num_labels=5, ties=ties)
    labels[labels == 2] = 3  # a label without rows
    problem = Problem(probabilities, alone(labels, 5, [0, 1], metric))
    biases = np.random.default_rng(0).standard_normal((1500, 5))  # more than one block of them
    biases[:20] = np.round(biases[:20])
    assert problem.scores(biases).tolist() == [problem.score(bias) for bias in biases]


@pytest.mark.parametrize("metric", [*METRIC_NAMES, "f1:1"])
def test_exact_finds_the_optimum_of_two_labels_and_a_gate_free_rule(metric):
    # With two labels one difference of biases decides: every distinct rule can be tried.
    for seed in range(5):
        probabilities, labels, _ = draw(seed, rows=50, num_labels=2)
        decision = fit("exact", probabilities, alone(labels, 2, [0], metric))
        margins = np.log(probabilities[:, 1] / probabilities[:, 0])
        candidates = [-np.inf, *np.sort(margins)]
        best = max(score(labels, (margins > edge).astype(int), 2, [0], metric) for edge in candidates)
        found = score(labels, decide(probabilities, decision), 2, [0], metric)
        assert found == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans(), rows=st.integers(5, 150), gate=st.booleans())
def test_exact_is_never_below_random_on_the_rows_of_both(seed, ties, rows, gate):
    probabilities, labels, _ = draw(seed, rows=rows, num_labels=5, ties=ties)
    found = {}
    for method in ("argmax", "random", "exact"):
        truth = alone(labels, 5, [0, 1, 2, 3])
        decision = fit(method, probabilities, truth, 4 if gate else None, num_vectors=500)
        found[method] = score(labels, decide(probabilities, decision), 5, [0, 1, 2, 3])
    assert found["exact"] >= found["random"] - 1e-12 >= found["argmax"] - 2e-12


def test_random_is_the_best_of_its_vectors():
    probabilities, labels, _ = draw(1)
    decision = fit("random", probabilities, alone(labels, 4, [0, 1, 2]), num_vectors=50)
    vectors = _random_biases(50, 4, 42)
    each = [score(labels, brute_decide(probabilities, vector), 4, [0, 1, 2]) for vector in vectors]
    assert not vectors[0].any()
    best = vectors[int(np.argmax(each))]
    assert decision.bias == pytest.approx(best - best.mean())


# ------------------------------------------------------------------------------------------------------ other methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_method_takes_every_metric_and_empty_labels(method, metric):
    probabilities, labels, _ = draw(2, rows=80)
    labels[labels == 0] = 1
    truth = alone(labels, 4, [0, 1], metric)
    rules = [fit(method, probabilities, truth, 3, num_vectors=20) for _ in range(2)]
    assert rules[0].bias.tolist() == rules[1].bias.tolist() and repr(rules[0]) == repr(rules[1])
    assert np.isfinite(rules[0].bias).all() and rules[0].bias.sum() == pytest.approx(0, abs=1e-9)
    assert (rules[0].threshold is None) == (rules[0].protected_class is None)


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_of_the_soft_score(metric):
    probabilities, labels, _ = draw(3, rows=30)
    problem = Problem(probabilities, alone(labels, 4, [0, 1, 2], metric))
    targets = np.eye(4)[labels]
    bias = np.array([0.3, -0.2, 0.1, 0.0])
    _, gradient = _soft_score(problem.log_p, targets, bias, 3.0, problem)
    for label in range(4):
        step = np.zeros(4)
        step[label] = 1e-5
        high, low = (
            _soft_score(problem.log_p, targets, bias + sign * step, 3.0, problem)[0] for sign in (1, -1)
        )
        assert gradient[label] == pytest.approx((high - low) / 2e-5, abs=1e-7)
    # Sharp enough, the soft score is the score.
    assert _soft_score(problem.log_p, targets, bias, 1e4, problem)[0] == pytest.approx(
        problem.score(bias), abs=1e-3
    )


def test_vector_scaling_is_a_stationary_point_of_the_likelihood():
    probabilities, labels, _ = draw(4, rows=300)
    log_p = np.log(probabilities)
    slope, offset = fit_vector(log_p, labels, penalty=0.0)
    q = softmax(slope * log_p + offset)
    assert q.sum(0) == pytest.approx(np.bincount(labels), abs=0.05)  # gradient in the offsets
    assert (q * log_p).sum() == pytest.approx(log_p[np.arange(300), labels].sum(), abs=0.3)


def test_temperature_undoes_a_scale_and_quality_is_measured():
    generator = np.random.default_rng(0)
    logits = 1.5 * generator.standard_normal((4000, 4))
    probabilities = softmax(logits)
    labels = (generator.random((4000, 1)) > probabilities.cumsum(1)).sum(1)
    temperature = fit_temperature([3 * logits], labels)
    assert temperature == pytest.approx(3, rel=0.1)
    before = probability_quality(softmax(3 * logits), labels)
    after = probability_quality(softmax(3 * logits, temperature), labels)
    assert all(after[name] < before[name] for name in before)
    assert after["ece"] < 0.03
    assert after["log_loss"] == pytest.approx(sklearn_log_loss(labels, softmax(3 * logits, temperature)))
    # By hand: (0.3^2 + 0.3^2 + 0.8^2 + 0.8^2) / 2; confidences 0.7 (right) and 0.8 (wrong) lie in two bins.
    hand = np.array([[0.7, 0.3], [0.2, 0.8]])
    assert brier_score(hand, np.array([0, 0])) == pytest.approx(0.73)
    assert calibration_error(hand, np.array([0, 0])) == pytest.approx((0.3 + 0.8) / 2)


# ------------------------------------------------------------------------------------------------------ cross-fitting


def test_folds_keep_dialogues_whole_and_labels_even():
    _, labels, groups = draw(6, rows=600, num_groups=80)
    truth = Truth(labels, groups, 4, [0, 1, 2])
    folds = grouped_folds(truth, 5, seed=0)
    for group in set(groups):
        assert len({fold for fold, of in zip(folds, groups, strict=True) if of == group}) == 1
    for label in range(4):
        per_fold = np.bincount(folds[labels == label], minlength=5)
        assert per_fold.max() <= 1.5 * per_fold.mean() + 1
    assert (folds != grouped_folds(truth, 5, seed=1)).any()
    assert (folds == grouped_folds(truth, 5, seed=0)).all()

    def small(labels, groups):
        return grouped_folds(Truth(labels, groups, 4, [0, 1, 2]), 5, 0)

    assert small([0, 1, 1], ["a", "b", "b"]).max() == 1
    assert len(set(small([0, 1, 0], ["a", "b", "c"]))) == 2  # no label fills more folds
    with pytest.raises(InputError, match="one row at most"):
        small([0, 1, 2], ["a", "b", "c"])
    with pytest.raises(InputError, match="one dialogue only"):
        small(labels, ["a"] * 600)


def test_cross_fit_never_predicts_a_dialogue_that_it_was_fitted_on(monkeypatch):
    probabilities, labels, groups = draw(7)
    groups, rows = np.array(groups), np.arange(len(labels))
    calls = []

    class KnowsAll:
        """What `fit_rule` returns: asserts that no dialogue is on both sides; the logits' first column is the row."""

        def __init__(self, recipe, logits, truth):
            self.train = logits[0][:, 0].astype(int)
            assert (truth.labels == labels[self.train]).all()

        def predict(self, logits):
            held_out = logits[0][0][:, 0].astype(int)
            assert not set(groups[self.train]) & set(groups[held_out])
            assert sorted([*self.train, *held_out]) == list(rows)
            return Prediction(labels[held_out], np.empty(0), [])

    monkeypatch.setattr(cross_fitting, "fit_rule", KnowsAll)
    truth = Truth(labels, groups.tolist(), 4, [0, 1, 2])
    logits = np.column_stack([rows, np.log(probabilities)])
    found = cross_fit(
        Recipe(), [logits], truth, repeated_folds(truth, 4, 3), progress=lambda: calls.append(1)
    )
    assert len(calls) == 12 and found.predictions.shape == (3, len(labels))
    assert found.metrics["macro_f1_positive"] == 1 and found.interval == (1.0, 1.0)


def losing_table():
    """A seeded table on which `auto` chooses a rule by its inner cross-fitting that loses to argmax in the outer one."""
    return draw(4, rows=200, num_groups=25)


def fitted_auto(method="auto"):
    probabilities, labels, groups = losing_table()
    data = ([np.log(probabilities)], Truth(labels, groups, 4, [0, 1, 2]))
    recipe = Recipe(method)
    fitted = cross_fit(recipe, *data, repeated_folds(data[1], repeats=2))
    return recipe, fit_rule(recipe, *data), fitted, data


def test_argmax_is_kept_where_auto_loses_to_it_cross_fitted():
    recipe, rule, fitted, data = fitted_auto()
    probabilities, labels, _ = losing_table()
    argmax = score(labels, probabilities.argmax(1), 4, [0, 1, 2])
    assert (
        rule.method != "argmax" and fitted.metrics["macro_f1_positive"] < argmax
    )  # applied all the same before
    kept, cross_fitted, reason = choose(recipe, rule, fitted, *data)
    assert kept.method == "argmax" and not kept.decision.bias.any() and kept.decision.threshold is None
    assert (kept.predict([data[0]]).labels == probabilities.argmax(1)).all()
    # The score reported is that of what is applied, and its predictions too.
    assert cross_fitted.metrics["macro_f1_positive"] == pytest.approx(argmax)
    assert (cross_fitted.predictions == probabilities.argmax(1)).all()
    low, high = difference_interval(data[1], probabilities.argmax(1), fitted.predictions)
    assert "Kept argmax" in reason and rule.method in reason and f"{low:+.4f} to {high:+.4f}" in reason


def test_argmax_found_by_auto_is_not_said_to_gain_on_argmax():
    recipe, rule, fitted, data = fitted_auto("argmax")
    kept, _, reason = choose(dataclasses.replace(recipe, method="auto"), rule, fitted, *data)
    assert kept.method == "argmax" and reason.startswith("Kept argmax, which auto chose on all rows: ")


def test_a_method_asked_for_by_name_is_kept_and_a_winner_too():
    recipe, rule, fitted, data = fitted_auto("exact")
    kept, cross_fitted, reason = choose(recipe, rule, fitted, *data)
    assert kept is rule and cross_fitted is fitted and reason.startswith("Used exact, as asked: ")
    tilted = [data[0][0] + np.array([0.0, 0.0, 0.0, 6.0])]  # argmax says the last label throughout
    recipe, data = Recipe(), (tilted, data[1])
    fitted = cross_fit(recipe, *data, repeated_folds(data[1], repeats=1))
    rule = fit_rule(recipe, *data)
    kept, cross_fitted, reason = choose(recipe, rule, fitted, *data)
    assert kept is rule and cross_fitted is fitted and "scores above argmax" in reason


def test_a_gain_that_chance_gives_the_better_of_two_is_none():
    recipe, rule, fitted, data = fitted_auto()
    argmax = score(losing_table()[1], losing_table()[0].argmax(1), 4, [0, 1, 2])
    for gain, kept in ((MIN_GAIN * 0.9, "argmax"), (MIN_GAIN * 1.1, rule.method)):
        close = dataclasses.replace(fitted, metrics=fitted.metrics | {"macro_f1_positive": argmax + gain})
        assert choose(recipe, rule, close, *data)[0].method == kept


def test_the_number_of_processes_changes_nothing():
    probabilities, labels, groups = draw(12, rows=100)
    truth, calls = Truth(labels, groups, 4, [0, 1, 2]), []
    data, folds = ([np.log(probabilities)], truth), repeated_folds(truth, repeats=2)
    recipe, progress = Recipe("smooth"), lambda: calls.append(1)
    alone, together = (cross_fit(recipe, *data, folds, jobs, progress) for jobs in (1, 2))
    assert len(calls) == 20 and alone.metrics == together.metrics and alone.interval == together.interval
    assert (alone.predictions == together.predictions).all()


@pytest.mark.parametrize(
    "prior", [1.0, 0.25]
)  # the second: argmax is hard to beat, and the choice is a close one
def test_the_cross_fitted_score_is_true_and_its_interval_covers(prior):
    """That of a method, and that of the final choice between it and argmax.

    Against the score of the fitted rule on many fresh rows of the same model; `--simulate` of the benchmark at size."""
    shares = np.array([0.4, 0.3, 0.2, 0.1])

    def draw_dialogues(
        generator: np.random.Generator, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dialogue = np.repeat(np.arange(count), generator.integers(1, 12, count))
        labels = generator.choice(4, len(dialogue), p=shares)
        shift = 0.5 * generator.standard_normal((count, 4))
        logits = np.log(shares) + shift[dialogue] + generator.standard_normal((len(dialogue), 4))
        logits[np.arange(len(labels)), labels] += 1.2
        return logits, labels, dialogue

    generator = np.random.default_rng(5)
    fresh_logits, fresh_labels, _ = draw_dialogues(generator, 20_000)
    positive, covered, optimism, kept = (1, 2, 3), np.zeros(2), [], set()
    recipe = Recipe("expected")
    for _ in range(20):
        logits, labels, dialogue = draw_dialogues(generator, 80)
        data = ([logits], truth := Truth(labels, dialogue.tolist(), 4, positive))
        rule = fit_rule(recipe, *data)
        fitted = cross_fit(recipe, *data, repeated_folds(truth, repeats=1))
        final = choose(dataclasses.replace(recipe, method="auto"), rule, fitted, *data)
        kept.add(final[0].method)
        of_both = []
        for number, (applied, found) in enumerate(((rule, fitted), final[:2])):
            fresh = score(fresh_labels, applied.predict([[fresh_logits]]).labels, 4, positive)
            covered[number] += found.interval[0] <= fresh <= found.interval[1]
            of_both.append(found.metrics["macro_f1_positive"] - fresh)
        optimism.append(of_both)
    assert (covered >= 16).all()  # of 20 at 95 %: fewer by chance once in 400
    assert (abs(np.mean(optimism, axis=0)) < 3 * np.std(optimism, axis=0) / np.sqrt(20) + 0.005).all()
    assert kept == {"expected", "argmax"}  # a close choice, where the better of two scores flatters most


def test_a_method_that_learns_nothing_is_not_flattered():
    # Probabilities that know nothing of the labels: in-sample the search gains much, cross-fitted nothing.
    generator = np.random.default_rng(8)
    labels = generator.integers(0, 5, 300)
    probabilities = softmax(generator.standard_normal((300, 5)))
    groups = [f"d{row // 5}" for row in range(300)]
    recipe, logits, truth = Recipe("exact"), np.log(probabilities), Truth(labels, groups, 5, range(5))
    in_sample = fit_rule(recipe, [logits], truth).predict([[logits]]).labels
    fitted = cross_fit(recipe, [logits], truth, repeated_folds(truth, repeats=2))
    assert score(labels, in_sample, 5, range(5)) > fitted.metrics["macro_f1_positive"] + 0.03
    assert fitted.metrics["macro_f1_positive"] < 0.22
    assert fitted.interval[0] < fitted.metrics["macro_f1_positive"] < fitted.interval[1]


def test_auto_keeps_argmax_where_nothing_helps_and_leaves_it_where_much_does(monkeypatch):
    monkeypatch.setattr(cross_fitting, "TIERS", (("argmax",), ("prior",), ("exact",)))
    generator = np.random.default_rng(9)
    labels = np.repeat(np.arange(4), 60)
    groups = [f"d{row % 24}" for row in range(240)]
    sharp = generator.standard_normal((240, 4))
    sharp[np.arange(240), labels] += 3.0
    recipe, truth = Recipe(), Truth(labels, groups, 4, range(4))
    assert fit_rule(recipe, [sharp], truth).method == "argmax"
    tilted = sharp + np.array([0.0, -4.0, 0.0, 4.0])
    rule = fit_rule(recipe, [tilted], truth)
    assert rule.method == "exact"
    assert score(labels, rule.predict([[tilted]]).labels, 4, range(4)) > 0.8


def test_one_standard_error_is_by_tier_and_the_best_of_a_tier_is_taken():
    noise = np.random.default_rng(0).standard_normal(300)

    def choose(means: dict[str, float], tiers: list[list[str]]) -> str:
        # The samples of the last candidate move by 0.01 where those of the others do not move at all.
        found = {(name, False): (mean, np.full(300, mean)) for name, mean in means.items()}
        last = list(found)[-1]
        found[last] = (found[last][0], found[last][0] + 0.01 * noise / noise.std())
        return _simplest_within_one_error(found, [[(name, False) for name in t] for t in tiers])[0]

    tiers = [["argmax", "expected"], ["prior"], ["exact"]]
    means = {"argmax": 0.195, "expected": 0.196, "prior": 0.2, "exact": 0.205}
    assert choose(means, tiers) == "expected"  # .009 below, the standard error is .010
    assert choose(means | {"argmax": 0.196}, tiers) == "argmax"  # as good, and named first
    assert choose(means | {"expected": 0.194, "argmax": 0.1}, tiers) == "prior"
    assert choose(dict.fromkeys(means, 0.194) | {"exact": 0.205}, tiers) == "exact"


# ------------------------------------------------------------------------------------------------- blends and weights


def test_blends_by_hand():
    first, second = np.array([[0.8, 0.2]]), np.array([[0.5, 0.5]])
    assert blend([first, second], [3, 1]) == pytest.approx(np.array([[0.725, 0.275]]))
    geometric = np.array([0.8**0.75 * 0.5**0.25, 0.2**0.75 * 0.5**0.25])
    assert blend([first, second], [0.75, 0.25], "geometric")[0] == pytest.approx(geometric / geometric.sum())
    with pytest.raises(ValueError, match="harmonic"):
        blend([first], kind="harmonic")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0], "sum to zero"),
        ([1, -1], "not negative"),
        ([1], "1 given for 2"),
        ([1, float("nan")], "finite"),
    ],
)
def test_weights_that_make_no_blend(weights, message):
    with pytest.raises(InputError, match=message):
        blend([np.ones((2, 2)), np.ones((2, 2))], weights)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_weight_search_prefers_the_runs_that_know_something(count):
    probabilities, labels, _ = draw(10, rows=400)
    generator = np.random.default_rng(0)
    useless = [softmax(generator.standard_normal((400, 4))) for _ in range(count - 1)]
    weights, trajectory = search_weights([*useless, probabilities], labels, seed=0)
    assert weights.argmax() == count - 1 and weights.sum() == pytest.approx(1)
    assert weights[-1] > 0.6
    losses = [step["log_loss"] for step in trajectory]
    kept = [step for step in trajectory if step["kept"]]
    assert len(kept) == 1 and kept[0]["log_loss"] == min(losses) and kept[0]["weights"] == list(weights)
    assert search_weights([*useless, probabilities], labels, seed=0)[1] == trajectory
    json.dumps(trajectory)


def test_searched_weights_are_cross_fitted_with_the_rule():
    probabilities, labels, groups = draw(11, rows=300)
    noise = np.random.default_rng(1).standard_normal(probabilities.shape)
    runs = [np.log(probabilities), noise]
    recipe, truth = Recipe("prior", weights="search"), Truth(labels, groups, 4, [0, 1, 2])
    rule = fit_rule(recipe, runs, truth)
    assert rule.weights[0] > rule.weights[1] and rule.method == "prior"
    fitted = cross_fit(recipe, runs, truth, repeated_folds(truth, repeats=1))
    assert 0 < fitted.metrics["macro_f1_positive"] < 1


# ------------------------------------------------------------------------------------------------------------- voting


def one_hot(*rows, num_labels=4):
    return np.eye(num_labels)[list(rows)]


def test_votes_by_hand():
    # Columns are rows of data: 0 majority of gatekeepers says 0; 1 half of them do not make a majority; 2 plurality of
    # all voters; 3 a tie goes to the protected class; 4 specialists cannot vote 0.
    gatekeepers = [one_hot(0, 0, 1, 1, 3), one_hot(0, 2, 2, 2, 3)]
    specialists = [
        one_hot(1, 2, 2, 1, 0) * 0.6 + 0.1,
        one_hot(1, 1, 2, 2, 0) * 0.6 + np.array([0, 0, 0.1, 0]),
    ]
    voters, scopes = gatekeepers + specialists, (None, None, (1, 2, 3), (1, 2, 3))
    assert Voting(0, 3, scopes, soft=False).predict(voters).tolist() == [0, 2, 2, 3, 3]
    assert Voting(0, None, scopes, soft=False).predict(voters)[3] == 1


def test_a_scope_silences_the_labels_outside_it():
    specialist = np.array([[0.7, 0.1, 0.05, 0.15]])
    assert scoped(specialist, [1, 2]) == pytest.approx(np.array([[0, 2 / 3, 1 / 3, 0]]))
    voting = Voting(0, 3, (None, (1, 2), (1, 2)), soft=False)
    assert voting.predict([one_hot(3), specialist, specialist]).tolist() == [1]
    with pytest.raises(InputError, match="no gatekeeper"):
        Voting(0, 3, ((1, 2),), soft=False).predict([specialist])


def test_the_probability_form_by_hand():
    gatekeepers = [np.array([[0.5, 0.5, 0.0]]), np.array([[0.3, 0.1, 0.6]])]
    specialists = [np.array([[0.0, 0.75, 0.25]]), np.array([[0.5, 0.25, 0.25]])]
    voters = gatekeepers + specialists
    found = Voting(0, None, (None, None, (1, 2), (1, 2)), soft=True).soft_vote(voters)
    assert found == pytest.approx(np.array([[0.4, 0.6 * 0.625, 0.6 * 0.375]]))
    with pytest.raises(InputError, match="label"):
        Voting(0, None, (None, None, (1,), (1,)), soft=True).predict(voters)


# -------------------------------------------------------------------------------------------------------------- input


def test_unusable_logits_and_labels():
    good = np.array([[0.0, 1.0], [1.0, 0.0]])
    check_logits(good, "x")
    for logits, message in [
        (np.full((3, 2), 0.5), "constant"),
        (np.array([[1.0, 2.0], [1.0, 2.0]]), "constant"),
    ]:
        with pytest.raises(InputError, match=message):
            check_logits(logits, "x")
    check_labels(Truth([0, 1], ["a", "b"], 2, [1]), ["n", "p"], "x")
    # What the metric does not average over may be absent.
    check_labels(Truth([0, 0], ["a", "b"], 2, [1], "weighted_f1"), ["n", "p"], "x")
    check_labels(Truth([0, 0], ["a", "b"], 2, [1], "f1:0"), ["n", "p"], "x")
    for labels, groups, message in [
        ([0, 0], ["a", "b"], r"label 1 \(p\) has no row"),
        ([0, 1], ["a", "a"], "one dialogue only"),
    ]:
        with pytest.raises(InputError, match=message):
            check_labels(Truth(labels, groups, 2, [1]), ["n", "p"], "x")


def test_softmax_of_extreme_logits():
    logits = np.array([[1e4, 0.0], [0.0, -1e4]], dtype=np.float32)
    assert softmax(logits) == pytest.approx(np.array([[1, 0], [1, 0]]))
    assert np.isfinite(log_softmax(logits)).all()
