"""calibrate.py as a user runs it: on a run folder, from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import calibrate
from rareturn import command_line
from rareturn.data.folds import write_folds
from rareturn.decisions.methods import METHODS, fit
from rareturn.decisions.metrics import METRIC_NAMES, scores
from rareturn.decisions.probabilities import softmax
from rareturn.decisions.rules import decide
from rareturn.files import write_json
from rareturn.runs.decision_file import read_decision
from rareturn.runs.folder import table_path
from rareturn.runs.reading import read_run
from rareturn.runs.tables import LogitTable, read_table, write_table

ROOT = Path(__file__).parent.parent
NAMES = ["none", "low", "middle", "high"]


def make_run(folder, *, change=None, **info):
    """A run of 240 rows in 40 dialogues whose logits know a little about four skewed labels."""
    generator = np.random.default_rng(0)
    shares = np.array([0.15, 0.1, 0.15, 0.6])
    labels = generator.choice(4, 240, p=shares)
    labels[:4] = range(4)
    logits = np.log(shares) + generator.standard_normal((240, 4))
    logits[np.arange(240), labels] += 1.5
    dialogue = np.arange(240) // 6
    fold = dialogue % 3
    if change is not None:
        logits, labels, dialogue = change(logits, labels, dialogue)
    ids = [f"r{row}" for row in range(240)]
    for number in range(3):
        rows = np.flatnonzero(fold == number)
        table = LogitTable(
            [ids[row] for row in rows],
            [f"d{dialogue[row]}" for row in rows],
            fold[rows],
            labels[rows],
            logits[rows].astype(np.float32),
        )
        write_table(table_path(folder, "oof", number), table)
    write_json(
        folder / "run.json",
        {
            "name": "tiny",
            "label_names": NAMES,
            "positive_labels": [1, 2, 3],
            "num_folds": 3,
            "fold_seed": 42,
            "fold_groups": "none" if change is not None else "dialogue",
            "seed": 0,
            "base_model": "tiny",
            "base_revision": None,
            "recipe": {},
            "data_fingerprint": "0",
            "prompt_fingerprint": None,
            "packages": {},
            "command": "test",
            "git_commit": None,
            **info,
        },
    )
    write_folds(
        folder,
        {ids[row]: int(fold[row]) for row in range(240)},
        num_folds=3,
        fold_seed=42,
        fold_groups="none" if change is not None else "dialogue",
    )
    return folder


def command_of(run, output, *flags):
    return ["calibrate.py", "--run", str(run), "--output", str(output), *flags]


@pytest.fixture
def calibrate_here(monkeypatch, capsys):
    """The script in this process, its imports paid once: returns exit status and what went to stderr."""

    def start(run, output, *flags):
        monkeypatch.setattr(sys, "argv", command_of(run, output, *flags))
        try:
            command_line.run(calibrate.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return start


def test_auto_writes_the_same_decision_twice_and_prints_no_figure_alone(tmp_path, calibrate_here):
    run = make_run(tmp_path / "tiny", protected_label=3)
    flags = ("--repeats", "1", "--num_splits", "2", "--num_vectors", "50", "--jobs")
    first = subprocess.run(
        [sys.executable, *command_of(run, tmp_path / "one" / "decision.json", *flags, "2")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    status, _ = calibrate_here(run, tmp_path / "two.json", *flags, "1")
    written = (tmp_path / "one" / "decision.json").read_bytes()
    assert status == 0 and written == (tmp_path / "two.json").read_bytes()

    content = json.loads(written)
    decision = read_decision(str(tmp_path / "two.json")).rule().decision
    assert content["label_names"] == NAMES and content["positive_labels"] == [1, 2, 3]
    (of_run,) = content["runs"]
    assert {key: of_run[key] for key in ("reference", "revision", "weight")} == {
        "reference": str(run),
        "revision": None,
        "weight": 1.0,
    }
    assert content["reason"] in first.stdout and content["method"] in content["reason"]
    assert content["method"] in METHODS and content["metric"] == "macro_f1_positive"
    assert content["fold_groups"] == "dialogue" and content["blend"] == "arithmetic"
    for stage in ("argmax", "in_sample", "cross_fitted"):
        figures = content["metrics"][stage]
        assert set(METRIC_NAMES) < set(figures) and len(figures["f1_per_class"]) == 4
        low, high = figures["interval"]["macro_f1_positive"]
        assert 0 <= low <= figures["macro_f1_positive"] <= high <= 1

    # The in-sample figure is that of the rule in the file.
    table = read_run(run).oof
    predictions = decide(softmax(table.logits, decision.temperature), decision)
    assert content["metrics"]["in_sample"]["macro_f1_positive"] == pytest.approx(
        scores(table.label, predictions, 4, [1, 2, 3])["macro_f1_positive"]
    )

    for method in (*METHODS, "auto"):
        assert set(content["methods"][method]) == {"in_sample", "cross_fitted", "interval"}
        row = next(line for line in first.stdout.splitlines() if line.startswith(method))
        # in-sample, cross-fitted with its interval, optimism, seconds
        assert re.search(r" 0\.\d{4}  0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]  +[+-]0\.\d{4} +\d+\.\d\d$", row), row
    assert all(word in first.stdout for word in ("log loss", "Brier", "ECE", "cross-fitted", "temperature"))


@pytest.mark.parametrize(
    ("flags", "protected"),
    [(("--protected_label", "2"), 2), ((), 3)],  # neither flag nor run names one: the most frequent label
)
def test_random_is_the_papers_search_with_its_gate(tmp_path, calibrate_here, flags, protected):
    run = make_run(tmp_path / "tiny")
    output = tmp_path / "decision.json"
    status, error = calibrate_here(
        run, output, "--method", "random", "--repeats", "1", "--num_vectors", "300", *flags
    )
    assert status == 0, error
    content = json.loads(output.read_bytes())
    assert content["method"] == "random" and set(content["methods"]) == {"argmax", "random"}
    table = read_run(run).oof
    probabilities = softmax(table.logits, content["temperature"])
    expected = fit("random", probabilities, read_run(run).truth(), protected, num_vectors=300)
    assert content["bias"] == pytest.approx(list(expected.bias))
    assert (
        content["threshold"] == expected.threshold and content["protected_class"] == expected.protected_class
    )


def test_no_gate_and_another_metric(tmp_path, calibrate_here):
    run = make_run(tmp_path / "tiny", protected_label=3)
    output = tmp_path / "decision.json"
    flags = ("--method", "exact", "--metric", "accuracy", "--no_gate", "--repeats", "1")
    status, error = calibrate_here(run, output, *flags)
    assert status == 0, error
    content = json.loads(output.read_bytes())
    assert content["threshold"] is None and content["protected_class"] is None
    metrics = content["metrics"]
    assert metrics["in_sample"]["accuracy"] >= metrics["argmax"]["accuracy"]


def replace_labels(logits, labels, dialogue):
    return logits, np.where(labels == 1, 2, labels), dialogue


def flatten(logits, labels, dialogue):
    return np.full_like(logits, 0.25), labels, dialogue


def one_dialogue(logits, labels, dialogue):
    return logits, labels, np.zeros_like(dialogue)


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (replace_labels, (), "label 1 (low) has no row"),
        (flatten, (), "logits: constant"),
        (one_dialogue, (), "dialogue_id: one dialogue only"),
        (None, ("--protected_label", "4"), "protected_label: 4 is not one of 0..3"),
        (None, ("--protected_label", "3", "--no_gate"), "--no_gate"),
        (None, ("--repeats", "0"), "--repeats: 0 is below 1"),
        (None, ("--jobs", "0"), "--jobs: 0 is below 1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, calibrate_here, change, flags, message):
    run = make_run(tmp_path / "tiny", change=change)
    output = tmp_path / "decision.json"
    status, error = calibrate_here(run, output, *flags)
    assert status == 2 and not output.exists()
    assert message in error and error.count("error:") == 1


def test_logits_that_are_not_finite_and_a_missing_fold(tmp_path, calibrate_here):
    run = make_run(tmp_path / "tiny")
    path = table_path(run, "oof", 1)
    table = read_table(path)
    table.logits[3, 1] = np.nan
    columns = {
        "id": table.id,
        "dialogue_id": table.dialogue_id,
        "fold": table.fold,
        "label": table.label,
        "logits": list(table.logits),
    }
    pq.write_table(pa.table(columns), path)  # write_table itself refuses it
    status, error = calibrate_here(run, tmp_path / "decision.json")
    assert status == 2 and "logits: not finite" in error
    path.unlink()
    status, error = calibrate_here(run, tmp_path / "decision.json")
    assert status == 2 and "oof table of fold 1 is missing" in error
