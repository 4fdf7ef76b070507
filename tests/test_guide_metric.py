"""The guide's metric: what is optimised, reported and shown first, from the guide to the report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_ensemble as of_ensemble
import yaml
from huggingface_hub import ModelCard
from running import run_script
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score
from test_calibrate import make_run
from tiny_models import make_tiny_encoder

import calibrate
import ensemble
import linear_probe
from rareturn.data.label_guide import parse_label_guide
from rareturn.decisions.metrics import Truth, bootstrap_interval, scores
from rareturn.errors import InputError
from rareturn.files import read_json, write_json
from rareturn.runs.reading import read_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import leaderboard  # noqa: E402

LABELS = [
    {"number": number, "name": name, "definition": "."} for number, name in enumerate(("none", "anger"))
]
GUIDE = {"task": "Say which.", "speakers": ["a"], "labels": LABELS}
QUICK = ["--method", "argmax", "--repeats", "1"]


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("mcc", "'mcc' is not one of accuracy, "),
        ("f1:joy", "'f1:joy': no label has this number or name"),
        ("f1:2", "'f1:2': no label has this number or name"),
        (3, "Input should be a valid string"),
    ],
)
def test_a_metric_or_label_that_there_is_not_is_one_line(metric, problem, tmp_path, capsys):
    with pytest.raises(InputError) as caught:
        parse_label_guide(GUIDE | {"metric": metric}, "guide.yaml")
    (line,) = caught.value.lines()
    assert line.startswith(f"guide.yaml: metric: {problem}")


def test_a_guide_without_a_metric_is_what_it_was():
    """Its digest is part of a run's identity: runs that were made before there was a metric go on."""
    for stated in ({}, {"metric": "macro_f1_positive"}):
        assert "metric" not in parse_label_guide(GUIDE | stated, "x").to_dict()
    guide = parse_label_guide(GUIDE | {"metric": "f1:anger"}, "x")
    assert guide.to_dict()["metric"] == "f1:anger" and parse_label_guide(guide.to_dict(), "x") == guide


def sklearn_score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    if metric == "kappa":
        return cohen_kappa_score(labels, predictions)
    if metric == "balanced_accuracy":
        return balanced_accuracy_score(labels, predictions)
    if metric == "weighted_f1":
        return f1_score(labels, predictions, average="weighted")
    return f1_score(labels, predictions, average=None)[int(metric[3:])]


@pytest.mark.parametrize("metric", ["kappa", "balanced_accuracy", "weighted_f1", "f1:2"])
def test_calibrate_follows_the_run_and_the_flag_wins(metric, tmp_path, capsys, monkeypatch):
    titles = {"kappa": "Cohen's kappa", "f1:2": "F1 of label 2"}
    title = titles.get(metric, metric.replace("_", " ").replace("f1", "F1"))
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", metric=metric, protected_label=3)
    make_run(tmp_path / "plain", protected_label=3)
    flags = {"output": "decision.json", "method": "exact", "repeats": 1, "num_splits": 2}
    assert run_script(calibrate.main, run="run", **flags) == 0
    shown = capsys.readouterr().out
    assert f"{title}: run\n" in shown and f"cross-fitted {metric} 0." in shown
    decision = read_json("decision.json")
    run = read_run("run")
    assert decision["metric"] == metric
    argmax = run.oof.logits.argmax(axis=1)
    assert decision["metrics"]["argmax"][metric] == pytest.approx(
        sklearn_score(metric, run.oof.label, argmax)
    )
    in_sample = decision["metrics"]["in_sample"]
    assert in_sample[metric] > decision["metrics"]["argmax"][metric] and metric in in_sample["interval"]
    # The flag alone decides, too.
    assert run_script(calibrate.main, run="plain", metric=metric.replace("f1:2", "f1:middle"), **flags) == 0
    assert read_json("decision.json")["bias"] == decision["bias"]
    assert run_script(calibrate.main, run="run", metric="accuracy", **flags | {"method": "argmax"}) == 0
    assert read_json("decision.json")["metric"] == "accuracy"


@pytest.mark.parametrize("script", ["calibrate", "ensemble", "leaderboard"])
def test_an_unknown_metric_is_one_line(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    scripts = {
        "calibrate": (calibrate.main, "--run", "run", "--output", "x.json"),
        "ensemble": (ensemble.main, "--runs", "run", "--output_dir", "x"),
        "leaderboard": (leaderboard.main, "run"),
    }
    assert run_script(*scripts[script], "--metric", "f1:joy") == 2
    problem = "--metric: 'f1:joy': no label has this number or name"
    assert capsys.readouterr().err.endswith(f"{script}.py: error: {problem}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_json_with_an_unknown_metric_is_refused(tmp_path):
    make_run(tmp_path / "run", metric="f1:9")
    with pytest.raises(InputError, match=r"run\.json: metric: 'f1:9': no label has this number or name$"):
        read_run(tmp_path / "run")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs a and b, for the F1 of a label and for kappa, with test rows of five dialogues."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, metric) in enumerate({"a": "f1:denial", "b": "kappa"}.items()):
        info, dialogues = (
            of_ensemble.run_info(name) | {"metric": metric},
            [f"t{row // 6}" for row in range(30)],
        )
        test, logits = of_ensemble.TEST[name] * 10, of_ensemble.logits_of(seed)
        of_ensemble.write_run(tmp_path / name, info, logits, test, test_dialogue_id=dialogues)
    return tmp_path


def test_an_ensemble_follows_its_first_run(place: Path, capsys):
    assert run_script(ensemble.main, "--runs", "a", "b", "--output_dir", "out", "--repeats", "1") == 0
    shown = capsys.readouterr().out
    line = (
        "The runs were made for several metrics (a for f1:2, b for kappa); this is for f1:2, the first run's."
    )
    assert line in shown
    rows = [row for row in shown.splitlines() if re.match(r"(F1 of label 2|macro F1, positive labels) ", row)]
    assert rows[0].startswith("F1 of label 2 ")  # first in the table
    metrics = read_json("out/metrics.json")
    assert (
        metrics["metric"] == read_json("out/decision.json")["metric"] == "f1:2" and line in metrics["notes"]
    )
    for stage in ("argmax", "in_sample", "cross_fitted"):
        assert metrics[stage]["f1:2"] == pytest.approx(metrics[stage]["f1_per_class"][2])
    assert "F1 of label 2 on 48 out-of-fold rows of 8 dialogues" in Path("out/report.html").read_text()
    first, *others = ModelCard(Path("out/README.md").read_text()).data.eval_results
    assert first.metric_name.startswith("F1 of label 2 (") and first.metric_type == "f1"
    assert first.metric_value == round(metrics["cross_fitted"]["f1:2"], 4)
    assert [other.metric_type for other in others] == ["f1", "precision", "recall", "accuracy"]
    # One metric for all, or one that is asked for: no line.
    assert (
        run_script(ensemble.main, "--runs", "a", "b", "--metric", "kappa", "--output_dir", "k", *QUICK) == 0
    )
    assert (
        "several metrics" not in capsys.readouterr().out and read_json("k/metrics.json")["metric"] == "kappa"
    )
    first = ModelCard(Path("k/README.md").read_text()).data.eval_results[0]
    assert (first.metric_name.split(" (")[0], first.metric_type) == ("Cohen's kappa", "cohen_kappa")


def test_comparisons_follow_the_first_system(place: Path, capsys):
    assert run_script(ensemble.main, "--runs", "b", "--output_dir", "out", *QUICK) == 0
    capsys.readouterr()
    assert run_script(leaderboard.main, "a", "out", "--output_dir", "x") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("F1 of label 2, 48 rows of 8 dialogues\n")
    assert "Made for several metrics (a for f1:2, out for kappa); this is by f1:2, the first one's." in shown
    assert read_json("x/leaderboard.json")["metric"] == "f1:2"
    assert run_script(leaderboard.main, "out", "b") == 0
    shown = capsys.readouterr().out
    assert "several metrics" not in shown and shown.startswith("Cohen's kappa, ")
    assert run_script(leaderboard.main, "a", "out", "--metric", "weighted_f1") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("weighted F1, ") and "several metrics" not in shown
    write_json("out/oof_predictions.json", read_json("out/oof_predictions.json") | {"metric": "f1:9"})
    assert run_script(leaderboard.main, "a", "out") == 2
    assert "out/oof_predictions.json: 'f1:9': no label has this number or name" in capsys.readouterr().err


def test_check_oof_shows_the_metric_first(python: str, place: Path):
    done = subprocess.run([python, ROOT / "scripts/check_oof.py", "b"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = read_run("b").oof
    score = cohen_kappa_score(table.label, table.logits.argmax(axis=1))
    lines = done.stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("Argmax on the out-of-fold"))
    assert lines[place + 1].split()[:2] == ["kappa", f"{score:.4f}"]


def test_a_probe_and_its_card(tmp_path: Path, capsys):
    guide = yaml.safe_load((ROOT / "data/demo/label_guide.yaml").read_text()) | {"metric": "f1:High-Adaptive"}
    (tmp_path / "guide.yaml").write_text(yaml.safe_dump(guide))
    flags = {"label_guide": tmp_path / "guide.yaml", "train_file": ROOT / "data/demo/train.json", "C": 1}
    flags |= {"model_name_or_path": make_tiny_encoder(tmp_path / "model"), "num_folds": 2}
    assert run_script(linear_probe.main, **flags, output_dir=tmp_path / "run") == 0
    shown = capsys.readouterr().out
    info, fold = read_json(tmp_path / "run/run.json"), read_json(tmp_path / "run/fold-0/metrics.json")
    assert info["metric"] == fold["metric"] == "f1:7" and next(iter(fold)) == "metric"
    assert fold["f1:7"] == fold["f1_per_class"][7]
    assert f"fold 0: f1:7 {fold['f1:7']:.4f}, accuracy {fold['accuracy']:.4f}, C 1" in shown
    assert re.search(r"^ +rows +C +f1:7 +accuracy$", shown, re.MULTILINE)
    from rareturn.reports.cards import run_card, run_results

    card = run_card(info, run_results(tmp_path / "run", info))
    header = "held-out fold | F1 of label 7 | macro F1, positive labels | accuracy | macro F1, all labels"
    assert (
        f"| {header} |" in card and "| score | argmax, nothing tuned |\n|---|---:|\n| F1 of label 7 |" in card
    )


def test_the_launcher_shows_what_the_folds_were_scored_by(tmp_path: Path):
    training = """
import json, os, sys
folder = os.path.join("run", "fold-" + sys.argv[sys.argv.index("--fold") + 1])
os.makedirs(folder)
with open(os.path.join(folder, "metrics.json"), "w") as file:
    json.dump({"metric": "kappa", "macro_f1_positive": 0.1, "kappa": 0.25}, file)
"""
    (tmp_path / "training.py").write_text(training)
    (tmp_path / "recipe.yaml").write_text("num_folds: 2\noutput_dir: run\n")
    env = {**os.environ, "SCRIPT": str(tmp_path / "training.py"), "GPUS": ""}
    command = [ROOT / "scripts/launch_folds.sh", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fold 0 \(cpu\): done after \d+ s, kappa 0\.2500$", done.stdout, re.MULTILINE)
    assert re.search(r"fold  status    seconds     kappa\n +0  done +\d+ +0\.2500\n", done.stdout)


def test_labelled_test_rows_are_scored_in_full_and_choose_nothing(place: Path, capsys):
    words = [
        "--runs",
        "a",
        "b",
        "--method",
        "prior",
        "--repeats",
        "1",
        "--test_file",
        "test.json",
        "--output_dir",
    ]
    rows = of_ensemble.test_rows([2, 1, 0, 1, None] * 6)
    for number, row in enumerate(rows):
        row["dialogue_id"] = f"t{number // 6}"
    write_json("test.json", rows)
    assert run_script(ensemble.main, *words, "out") == 0
    shown = capsys.readouterr().out
    known = [number for number, row in enumerate(rows) if "label" in row]
    labels = np.array([rows[number]["label"] for number in known])
    groups = [rows[number]["dialogue_id"] for number in known]
    predicted = np.array([row["label"] for row in read_json("out/prediction.json")])[known]
    test = read_json("out/metrics.json")["test"]
    assert (test["rows"], test["dialogues"], test["rows_per_class"]) == (24, 5, [6, 12, 6])
    truth = Truth(labels, groups, 3, [1, 2], "f1:2")
    for name, value in scores(labels, predicted, 3, [1, 2], "f1:2").items():
        assert test["decision"][name] == pytest.approx(value), name
    assert test["decision"]["interval"]["f1:2"] == list(bootstrap_interval(truth, predicted))
    assert len(test["decision"]["interval"]["f1_per_class"]) == 3
    page, card = (Path("out", name).read_text() for name in ("report.html", "README.md"))
    for title in ("Scores on", "F1 of each label on"):
        title += " the 24 labelled rows of the test file (5 dialogues)"
        assert title in shown and title in page and title in card
    assert "Rule on the 24 labelled test rows of 5 dialogues, which nothing was tuned on" in page
    assert "nothing was tuned or chosen on these rows" in page
    # Other labels, or none, leave everything else as it is.
    for row in rows:
        row.pop("label", None)
    write_json("test.json", rows)
    assert run_script(ensemble.main, *words, "none") == 0
    assert Path("none/decision.json").read_bytes() == Path("out/decision.json").read_bytes()
    assert Path("none/prediction.zip").read_bytes() == Path("out/prediction.zip").read_bytes()
    kept = read_json("out/metrics.json")
    kept.pop("test")
    assert read_json("none/metrics.json") == kept
    assert "labelled test rows" not in Path("none/report.html").read_text()


def test_a_run_s_labelled_test_rows_are_scored_by_the_mean_of_its_folds(python: str, tmp_path: Path, capsys):
    rows = json.loads((ROOT / "data/demo/train.json").read_text())
    dialogues = list(dict.fromkeys(row["dialogue_id"] for row in rows))
    last = set(dialogues[-8:])
    write_json(tmp_path / "train.json", [row for row in rows if row["dialogue_id"] not in last])
    write_json(tmp_path / "test.json", [row for row in rows if row["dialogue_id"] in last])
    flags = {
        "train_file": tmp_path / "train.json",
        "test_file": tmp_path / "test.json",
        "num_folds": 2,
        "C": 1,
    }
    flags["model_name_or_path"] = make_tiny_encoder(tmp_path / "model")
    assert run_script(linear_probe.main, **flags, output_dir=tmp_path / "run") == 0
    shown = capsys.readouterr().out
    run = read_run(tmp_path / "run", require_test=True)
    logits = np.stack([fold.logits.astype(np.float64) for fold in run.test])
    odds = np.exp(logits - logits.max(axis=2, keepdims=True))
    argmax = (odds / odds.sum(axis=2, keepdims=True)).mean(axis=0).argmax(axis=1)
    test = read_json(tmp_path / "run/metrics.json")["test"]
    expected = f1_score(run.test[0].label, argmax, labels=range(1, 9), average="macro", zero_division=0)
    assert test["argmax"]["macro_f1_positive"] == pytest.approx(expected)
    assert test["dialogues"] == 8 and len(test["argmax"]["interval"]["macro_f1_positive"]) == 2
    assert re.search(rf"^test file +{len(argmax)} +{expected:.4f}", shown, re.MULTILINE)
    done = subprocess.run(
        [python, ROOT / "scripts/check_oof.py", tmp_path / "run"], capture_output=True, text=True
    )
    where = f"Argmax on the {len(argmax)} labelled rows of the test tables"
    assert re.search(rf"{where} .*\n  macro_f1_positive +{expected:.4f}  \[", done.stdout)
