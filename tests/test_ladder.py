"""scripts/ladder.py and scripts/leaderboard.py: their tables against the runs' own files, brute force and scikit-learn."""

from __future__ import annotations

import csv
import glob
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import test_ensemble as of_ensemble
import yaml
from running import run_script
from sklearn.metrics import f1_score
from tiny_models import make_tiny_decoder, make_tiny_encoder

import ensemble
from rareturn.decisions.cross_fitting import Recipe, cross_fit, fit_rule, repeated_folds
from rareturn.decisions.metrics import bootstrap_interval, difference_interval
from rareturn.decisions.probabilities import softmax
from rareturn.runs.reading import read_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import ladder  # noqa: E402
import leaderboard  # noqa: E402
import system  # noqa: E402

LABELS = np.arange(of_ensemble.ROWS) % 3


def official(labels: np.ndarray, predictions: np.ndarray) -> float:
    return f1_score(labels, predictions, labels=[1, 2], average="macro", zero_division=0)


def read_board(folder: str) -> dict:
    return json.loads(Path(folder, "leaderboard.json").read_text())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs a, b and c on the same rows, c's in another order, with test rows of six dialogues; an ensemble of a and b."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(5)
    dialogues = [f"t{row // 5}" for row in range(30)]
    for seed, name in enumerate("abc"):
        test = generator.dirichlet(np.ones(3), (30, of_ensemble.FOLDS)).tolist()
        of_ensemble.write_run(
            tmp_path / name,
            of_ensemble.run_info(name),
            of_ensemble.logits_of(seed),
            test,
            test_dialogue_id=dialogues,
        )
    folds = json.loads(Path("c/folds.json").read_text())
    folds["folds"] = dict(reversed(folds["folds"].items()))
    Path("c/folds.json").write_text(json.dumps(folds))
    gold = of_ensemble.test_rows(generator.integers(3, size=30).tolist())
    for row, dialogue in zip(gold, dialogues, strict=True):
        row["dialogue_id"] = dialogue
    Path("gold.json").write_text(json.dumps(gold))
    Path("test.json").write_text(
        json.dumps([{key: row[key] for key in row if key != "label"} for row in gold])
    )
    words = ("--method", "prior", "--repeats", "1", "--test_file", "test.json", "--output_dir", "out")
    assert run_script(ensemble.main, "--runs", "a", "b", *words) == 0
    return tmp_path


def test_the_leaderboard_ranks_and_pairs(place: Path, capsys):
    assert run_script(leaderboard.main, *"abc", "out", "--output_dir", "x") == 0
    predictions, argmax = {}, {}
    truth = read_run("a").truth()
    for name in "abc":
        run = read_run(name)
        order = [run.oof.id.index(row_id) for row_id in read_run("a").oof.id]
        found = cross_fit(Recipe("expected"), [run.oof.logits], run.truth(), repeated_folds(run.truth()))
        predictions[name] = found.predictions[:, order]
        argmax[name] = official(LABELS, run.oof.logits.argmax(axis=1)[order])
    predictions["out"] = np.array(json.loads(Path("out/oof_predictions.json").read_text())["predictions"])
    argmax["out"] = json.loads(Path("out/metrics.json").read_text())["argmax"]["macro_f1_positive"]
    scores = {name: np.mean([official(LABELS, row) for row in rows]) for name, rows in predictions.items()}
    order = sorted(scores, key=scores.get, reverse=True)
    board = read_board("x")["systems"]
    assert list(board) == order and len(set(scores.values())) == 4
    for name in order:
        found = board[name]
        assert found["rows"] == 48 and found["argmax"][0] == pytest.approx(argmax[name])
        assert found["cross_fitted"][0] == pytest.approx(scores[name])
        if name != "c":  # whose dialogues come in another order, and so other samples
            assert found["cross_fitted"][1:] == pytest.approx(bootstrap_interval(truth, predictions[name]))
        if name != order[0]:
            interval = difference_interval(truth, predictions[order[0]], predictions[name])
            assert found["difference"] == pytest.approx([scores[name] - scores[order[0]], *interval])
    assert "difference" not in board[order[0]]
    with open("x/leaderboard.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["system"] for line in lines] == order
    assert [float(line["cross_fitted"]) for line in lines] == pytest.approx([scores[name] for name in order])
    markdown, page = (Path(f"x/leaderboard.{kind}").read_text() for kind in ("md", "html"))
    best = f"{scores[order[0]]:.3f} ["
    assert f"| {order[0]} | 48 | " in markdown and "![" in markdown and Path("x/leaderboard.png").exists()
    assert all(best in text and "cross-fitted" in text for text in (markdown, page, capsys.readouterr().out))
    assert "data:image/png" in page and "<script" not in page


def test_gold_labels_score_the_test_tables(place: Path):
    assert run_script(leaderboard.main, "a", "c", "out", "--labels", "gold.json", "--output_dir", "x") == 0
    gold = np.array([row["label"] for row in json.loads(Path("gold.json").read_text())])
    board = read_board("x")["systems"]
    for name in ("a", "c"):
        run = read_run(name)
        folds = [table.logits for table in run.test]
        argmax = np.mean([softmax(fold) for fold in folds], axis=0).argmax(axis=1)
        assert board[name]["test_argmax"][0] == pytest.approx(official(gold, argmax))
        rule = fit_rule(Recipe("expected"), [run.oof.logits], run.truth())
        score, low, high = board[name]["test_rule"]
        assert score == pytest.approx(official(gold, rule.predict([folds]).labels)) and low < score < high
    predicted = [row["label"] for row in json.loads(Path("out/prediction.json").read_text())]
    assert board["out"]["test_rule"][0] == pytest.approx(official(gold, predicted))
    assert "test_argmax" not in board["out"]


def test_what_does_not_fit_is_one_line(place: Path, capsys):
    rows = json.loads(Path("gold.json").read_text())
    Path("other.json").write_text(json.dumps([rows[0] | {"id": "u0"}, *rows[1:]]))
    unlabelled = [{key: value for key, value in rows[0].items() if key != "label"}, *rows[1:]]
    Path("unlabelled.json").write_text(json.dumps(unlabelled))
    ids = [f"s{row}" for row in range(of_ensemble.ROWS)]
    of_ensemble.write_run(
        place / "d", of_ensemble.run_info("d"), of_ensemble.logits_of(9), [[[0.2, 0.3, 0.5]] * 2], id=ids
    )
    mixed = of_ensemble.run_info("e") | {"fold_groups": "none"}
    of_ensemble.write_run(place / "e", mixed, of_ensemble.logits_of(9), [[[0.2, 0.3, 0.5]] * 2])
    capsys.readouterr()
    for words, line in (
        (("a", "d"), "d: row 'r0' of a is missing"),
        (("a", "e"), 'e: fold_groups: "none", but "dialogue" in a'),
        (("a", "b", "a"), "a: named twice"),
        (
            ("a", "gone"),
            "gone: no such run; name an existing folder, or ORG/NAME-oof:RUN[@REVISION] on the Hub",
        ),
        (("a", "--labels", "other.json"), "a: test table: row 'u0' of other.json is missing"),
        (("out", "--labels", "other.json"), "out/prediction.json: row 'u0' of other.json is missing"),
        (("a", "--labels", "unlabelled.json"), "unlabelled.json: t0: label: missing"),
    ):
        assert run_script(leaderboard.main, *words, "--output_dir", "x") == 2
        assert capsys.readouterr().err == f"leaderboard.py: error: {line}\n"
    assert not Path("x").exists()


def test_a_run_from_the_hub_is_ranked(place: Path, hub_here):
    from rareturn.runs.publish import push_fold, push_run

    for fold in range(of_ensemble.FOLDS):
        push_fold(place / "b", fold, "team", "shared")
    push_run(place / "b", "team", "shared", model_card="---\n---\n")
    assert run_script(leaderboard.main, "a", "team/shared-oof:b", "b", "--output_dir", "x") == 0
    board = read_board("x")["systems"]
    assert len(board) == 3 and board["team/shared-oof:b"]["cross_fitted"] == board["b"]["cross_fitted"]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A ladder of a recipe for one fold, a probe with an ensemble, and a recipe with a mistake, run once."""
    place = tmp_path_factory.mktemp("ladder")
    make_tiny_encoder(place / "encoder")
    make_tiny_decoder(place / "decoder")
    recipe = {"num_train_epochs": 1, "lora_r": 4, "max_turns": 4, "max_train_samples": 30, "fold": 1}
    recipe |= {"train_file": "nowhere.json", "output_dir": "outputs/one-fold", "do_predict": True}
    recipe |= {"model_name_or_path": str(place / "decoder")}
    probe = {"script": "linear_probe.py", "model_name_or_path": str(place / "encoder"), "C": [1]}
    system = {"output": "outputs/system", "runs": {"probe": probe, "twin": probe | {"layer": 1}}}
    system["ensemble"] = {"method": "argmax", "repeats": 1}
    files = {"one": recipe, "two": system, "three": {"fold": 7}}
    for name, content in files.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(content))
    data = {
        key: ROOT / "data/demo" / file
        for key, file in (("train_file", "train.json"), ("test_file", "test.json"))
    }
    settings = [f"{key}={path}" for key, path in data.items()]
    settings += [f"label_guide={ROOT / 'data/demo/label_guide.yaml'}", "num_folds=2"]
    rungs = [str(place / f"{name}.yaml") for name in files]
    labels = ["--labels", str(data["test_file"])] if "label" in data["test_file"].read_text() else []
    return place, [*rungs, "--output_dir", str(place / "outputs"), *labels, "--set", *settings]


def test_a_ladder_from_recipes_to_its_table(climbed, capfd, monkeypatch, python: str):
    place, words = climbed
    monkeypatch.setenv("PYTHON", python)
    monkeypatch.setenv("SCRIPT", str(ROOT / "run_classification.py"))  # unparsed beforehand: seconds
    assert run_script(ladder.main, *words) == 1
    shown = capfd.readouterr()
    assert "launch_folds.sh: error: fold must be one of 0 to 1, not 7" in shown.err
    assert shown.err.endswith(f"failed, and not in the table: {place.name}/three\n")
    with open(place / "outputs/ladder.csv", newline="") as file:
        one, two = csv.DictReader(file)
    assert [one["system"], two["system"]] == [f"{place.name}/one", f"{place.name}/two"]
    # One fold: its rows and what its metrics say. An ensemble: its own scores, and the costs of its runs.
    metrics = json.loads((place / "outputs/one-fold/fold-1/metrics.json").read_text())
    assert not (place / "outputs/one-fold/fold-0").exists()
    assert int(one["rows"]) == metrics["held_out_rows"] and float(one["argmax"]) == pytest.approx(
        metrics["macro_f1_positive"]
    )
    for key in ("seconds", "trainable_parameters", "peak_memory_bytes"):
        assert float(one[key]) == pytest.approx(metrics[key])
    of_ensemble = json.loads((place / "outputs/system/metrics.json").read_text())
    for stage in ("argmax", "cross_fitted"):
        found = [float(two[f"{stage}{end}"]) for end in ("", "_low", "_high")]
        of_stage = of_ensemble[stage]
        expected = [of_stage["macro_f1_positive"], *of_stage["interval"]["macro_f1_positive"]]
        assert found == pytest.approx(expected)
    runs = [place / f"outputs/system-{name}" for name in ("probe", "twin")]
    costs = [json.loads((run / f"fold-{fold}/metrics.json").read_text()) for run in runs for fold in (0, 1)]
    whole = [json.loads((run / "metrics.json").read_text())["feature_seconds"] for run in runs]
    assert float(two["seconds"]) == pytest.approx(sum(cost["seconds"] for cost in costs) + sum(whole))
    assert float(two["peak_memory_bytes"]) == max(cost["peak_memory_bytes"] for cost in costs)
    markdown = (place / "outputs/ladder.md").read_text()
    assert f"| {place.name}/two | " in markdown and all(
        (place / f"outputs/ladder.{kind}").exists() for kind in ("png", "html")
    )

    # Again: nothing is trained.
    files = {path: path.stat().st_mtime for path in place.glob("outputs/*/fold-*/metrics.json")}
    assert run_script(ladder.main, *words) == 1
    assert "fold 1 (cpu): skipped" in capfd.readouterr().out
    assert files == {path: path.stat().st_mtime for path in files}
    assert markdown == (place / "outputs/ladder.md").read_text()


def test_the_ladder_of_the_paper_prints_its_commands(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rungs = sorted(map(str, Path("recipes/ladder").glob("*.yaml")))
    assert run_script(ladder.main, *rungs, "--dry_run", "--set", "num_train_epochs=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("--num_train_epochs=1" in line for line in lines)
    assert [line.split()[line.startswith("python")] for line in lines] == ["scripts/launch_folds.sh"] * 4 + [
        "scripts/system.py"
    ] * 2
    assert run_script(ladder.main, *rungs, "--set", "num_train_epochs") == 2
    assert "--set num_train_epochs: KEY=VALUE expected" in capsys.readouterr().err


def test_every_command_of_the_page_of_systems_can_be_typed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = Path("docs/SYSTEMS.md").read_text(encoding="utf-8")
    commands = re.findall(r"`((?:python |scripts/)\S[^`]*)`", page)
    assert len(commands) > 20
    for words in map(shlex.split, commands):
        script, *words = words[words[0] == "python" :]
        paths = [path for word in words for path in glob.glob(word) or [word] if word.endswith(".yaml")]
        assert Path(script).is_file() and all(Path(path).is_file() for path in paths), script
        module = {"scripts/ladder.py": ladder, "scripts/system.py": system}.get(script)
        assert module is None or run_script(module.main, *paths, "--dry_run") == 0
    assert "recipes/ladder/r3.yaml" in capsys.readouterr().out
    assert all(Path("tests", name).is_file() for name in set(re.findall(r"tests/(test_\w+\.py)", page)))
