"""The `evaluate` module against scikit-learn, hand-worked arrays, and the function that it calls: one metric for all."""

import multiprocessing
import os
import sys

import evaluate
import numpy as np
import pytest
from sklearn import metrics

from rareturn.decisions.metrics import METRIC_NAMES, Truth, score_predictions
from rareturn.decisions.metrics import scores as all_scores
from rareturn.files import packaged


def load_metric():
    return evaluate.load(str(packaged("metrics") / "defense_f1"), keep_in_memory=True)


def flat(scores):
    """The list of F1 beside the other numbers, as `pytest.approx` wants it."""
    per_class = {f"f1_{label}": value for label, value in enumerate(scores["f1_per_class"])}
    return {name: value for name, value in scores.items() if name != "f1_per_class"} | per_class


@pytest.fixture(scope="module")
def metric():
    return load_metric()


def test_hand_worked(metric):
    # Label 1: one hit, two rows, two predictions. Label 2: one hit, one row, two predictions. Label 3: nothing at all.
    scores = metric.compute(
        references=[0, 0, 1, 1, 2], predictions=[0, 1, 1, 2, 2], positive_labels=[1, 2, 3], num_labels=4
    )
    assert flat(scores) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "macro_f1_positive": (1 / 2 + 2 / 3 + 0) / 3,
            "macro_precision_positive": (1 / 2 + 1 / 2 + 0) / 3,
            "macro_recall_positive": (1 / 2 + 1 + 0) / 3,
            "macro_f1": (2 / 3 + 1 / 2 + 2 / 3 + 0) / 4,
            "weighted_f1": (2 * 2 / 3 + 2 * 1 / 2 + 1 * 2 / 3) / 5,
            "f1_0": 2 / 3,
            "f1_1": 1 / 2,
            "f1_2": 2 / 3,
            "f1_3": 0,
        }
    )


def test_defaults_are_the_nine_levels(metric):
    scores = metric.compute(references=[0, 1, 8], predictions=[0, 1, 8])
    assert scores["macro_f1_positive"] == 2 / 8
    assert scores["f1_per_class"] == [1, 1, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_scikit_learn_and_with_the_searches(metric, seed):
    generator = np.random.default_rng(seed)
    num_labels = int(generator.integers(2, 10))
    used = generator.integers(1, num_labels + 1)  # the labels above are in no row and no prediction
    references = generator.integers(used, size=50)
    predictions = np.where(generator.random(50) < 0.5, references, generator.integers(used, size=50))
    positive = sorted(
        generator.choice(num_labels, generator.integers(1, num_labels + 1), replace=False).tolist()
    )
    scores = metric.compute(
        references=references, predictions=predictions, positive_labels=positive, num_labels=num_labels
    )

    def macro(function, labels):
        return function(references, predictions, labels=labels, average="macro", zero_division=0)

    everything = list(range(num_labels))
    expected = flat(
        {
            "accuracy": metrics.accuracy_score(references, predictions),
            "macro_f1_positive": macro(metrics.f1_score, positive),
            "macro_precision_positive": macro(metrics.precision_score, positive),
            "macro_recall_positive": macro(metrics.recall_score, positive),
            "macro_f1": macro(metrics.f1_score, everything),
            "weighted_f1": metrics.f1_score(references, predictions, average="weighted", zero_division=0),
            "f1_per_class": metrics.f1_score(
                references, predictions, labels=everything, average=None, zero_division=0
            ).tolist(),
        }
    )
    assert flat(scores) == pytest.approx(expected, abs=1e-12)
    assert scores == all_scores(references, predictions, num_labels, positive)
    for name in METRIC_NAMES:
        truth = Truth(references, range(50), num_labels, positive, name)
        assert truth.score(predictions) == pytest.approx(scores[name])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"references": [-1], "predictions": [1]}, r"references\[0\]: -1 is not a label in 0 \.\. 8"),
        ({"references": [1, 1], "predictions": [1, 9]}, r"predictions\[1\]: 9 is not a label"),
        ({"references": [1], "predictions": [1], "positive_labels": []}, "positive_labels"),
        ({"references": [1], "predictions": [1], "positive_labels": [1, 1]}, "positive_labels"),
        ({"references": [1], "predictions": [1], "positive_labels": [9]}, "positive_labels"),
    ],
)
def test_refuses_what_it_cannot_score(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        load_metric().compute(**arguments)


def test_there_is_one_metric(monkeypatch, metric):
    """The module and `score_predictions` go through the function of the searches, and `evaluate` is not needed."""
    asked = {"references": [0, 1, 1], "predictions": [0, 1, 0], "num_labels": 2}
    monkeypatch.setitem(sys.modules, "evaluate", None)  # importing it fails
    found = score_predictions(Truth([0, 1, 1], ["a", "a", "b"], 2, [1]), np.array([0, 1, 0]))
    interval = found.pop("interval")
    assert found == metric.compute(**asked) and set(interval) == set(found)
    monkeypatch.setattr(sys.modules[type(metric).__module__], "scores", lambda *_: {"called": 1})
    assert metric.compute(**asked) == {"called": 1}


def _load_and_score(cache, barrier, answers):
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]  # loaded by an earlier test, from another cache
    evaluate.config.HF_MODULES_CACHE = cache
    barrier.wait()
    scores = load_metric().compute(references=[0, 1], predictions=[0, 1], num_labels=2)
    answers.put((scores["macro_f1_positive"], os.listdir(cache)))


def test_five_processes_load_it_at_once(tmp_path):
    """As the folds of a run do on a fresh machine: one empty cache, all at the same moment."""
    context = multiprocessing.get_context(
        "fork"
    )  # a spawned process would import evaluate again, for seconds
    barrier, answers = context.Barrier(5), context.Queue()
    cache = str(tmp_path / "modules")
    processes = [context.Process(target=_load_and_score, args=(cache, barrier, answers)) for _ in range(5)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [score for score, _ in got] == [1.0] * 5
    assert "evaluate_modules" in got[0][1]
