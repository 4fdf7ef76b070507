"""ensemble.py through its command line, on small runs whose numbers can be worked out by hand."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from running import run_script
from sklearn.metrics import cohen_kappa_score

import ensemble
from rareturn.data.folds import write_folds
from rareturn.decisions import metrics as metrics_module
from rareturn.decisions.cross_fitting import Recipe, cross_fit, repeated_folds, search_weights
from rareturn.decisions.metrics import bootstrap_interval, cohens_kappa
from rareturn.decisions.probabilities import softmax
from rareturn.decisions.rules import Decision, decide
from rareturn.errors import InputError
from rareturn.files import write_bytes, write_json
from rareturn.reports.cards import run_card
from rareturn.runs.bundle import model_folders, read_bundle
from rareturn.runs.decision_file import read_decision, table_digest
from rareturn.runs.folder import adapter_dir, metrics_path, table_path, write_run_info
from rareturn.runs.hub import push_files
from rareturn.runs.publish import push_fold, push_run
from rareturn.runs.reading import read_run
from rareturn.runs.tables import LogitTable, write_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import leaderboard  # noqa: E402

NAMES = ["none", "acting out", "denial"]
GUIDE = {
    "task": "Say which.",
    "speakers": ["seeker", "supporter"],
    "target_speaker": "seeker",
    "labels": [{"number": number, "name": name, "definition": "."} for number, name in enumerate(NAMES)],
    "positive": [1, 2],
    "protected": 1,
}
ROWS, FOLDS = 48, 2
# Probabilities of the test rows by each fold's model; the runs' means over the folds stand beside them.
TEST = {
    "a": [
        [[0.6, 0.3, 0.1], [0.4, 0.5, 0.1]],  # .5 .4 .1
        [[0.1, 0.2, 0.7], [0.1, 0.4, 0.5]],  # .1 .3 .6
        [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]],  # .7 .2 .1
    ],
    "b": [
        [[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]],
        [[0.3, 0.6, 0.1], [0.1, 0.8, 0.1]],  # .2 .7 .1
        [[0.7, 0.1, 0.2], [0.7, 0.1, 0.2]],
    ],
}
SECRET = "zebra crossing at midnight"


def run_info(name: str) -> dict:
    return {
        "name": name,
        "label_names": NAMES,
        "positive_labels": [1, 2],
        "protected_label": 1,
        "label_scope": None,
        "label_guide": GUIDE,
        "num_folds": FOLDS,
        "fold_seed": 42,
        "fold_groups": "dialogue",
        "seed": 1,
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_revision": "b" * 40,
        "loader": {"quantization": "none", "dtype": "float32", "tuning": "lora"},
        "window": {"max_turns": 30, "max_seq_length": 64, "window_stride": 10},
        "recipe": {"train_file": "AIMH/PsyDefConv:Splits/train.json"},
        "data_fingerprint": "d",
        "prompt_fingerprint": "p",
        "packages": {"torch": "2.13.0"},
        "command": "run_classification.py",
        "git_commit": None,
    }


def write_run(folder: Path, info: dict, logits: np.ndarray, test: list, **columns) -> None:
    """A run folder of dialogues d0 … d7 with six rows each, four dialogues a fold."""
    number = np.arange(ROWS)
    ids = columns.get("id", [f"r{row}" for row in number])
    dialogues = columns.get("dialogue_id", [f"d{row // 6}" for row in number])
    labels = columns.get("label", number % 3)
    fold_of = number // 6 % FOLDS
    write_run_info(folder, info)
    folds = dict(zip(ids, fold_of.tolist(), strict=True))
    keys = {key: info[key] for key in ("num_folds", "fold_seed", "fold_groups")}
    write_folds(folder, folds, **keys)
    whole = LogitTable(ids, dialogues, fold_of, labels, logits.astype(np.float32))
    test_ids = columns.get("test_id", [f"t{row}" for row in range(len(test))])
    test_dialogues = columns.get("test_dialogue_id", ["d0"] * len(test))
    for fold in range(FOLDS):
        write_table(table_path(folder, "oof", fold), whole.take(np.flatnonzero(fold_of == fold)))
        of_fold = np.log([row[fold] for row in test]).astype(np.float32)
        table = LogitTable(
            test_ids, test_dialogues, np.full(len(test), fold), np.full(len(test), -1), of_fold
        )
        write_table(table_path(folder, "test", fold), table)
        write_bytes(adapter_dir(folder, fold) / "adapter_model.safetensors", b"weights %d" % fold)
        write_json(metrics_path(folder, fold), {"macro_f1_positive": 0.5})


def logits_of(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(ROWS, 3)) + 1.5 * np.eye(3)[np.arange(ROWS) % 3] + [0, 0.8, 0]


def test_rows(labels: list[int | None]) -> list[dict]:
    rows = []
    for number, label in enumerate(labels):
        turns = [
            {"text": "Hello.", "speaker": "supporter"},
            {"text": f"{SECRET} {number} é", "speaker": "seeker"},
        ]
        row = {
            "extra": [1, {"deep": None}],
            "id": f"t{number}",
            "dialogue_id": "d0",
            "dialogue": turns,
            "current_text": f"{SECRET} {number} é",
        }
        rows.append(row if label is None else row | {"label": label})
    return rows


test_rows.__test__ = False

RULE = {"bias": [0.0, 0.0, 1.0], "protected_class": 1, "threshold": 0.5, "temperature": 1.0}
DECISION = {
    "label_names": NAMES,
    "positive_labels": [1, 2],
    **RULE,
    "blend": "arithmetic",
    "method": "argmax",
    "runs": [],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, a test file and a decision, in the working folder."""
    for seed, name in enumerate(TEST):
        write_run(tmp_path / name, run_info(name), logits_of(seed), TEST[name])
    (tmp_path / "test.json").write_text(json.dumps(test_rows([None] * 3)))
    monkeypatch.chdir(tmp_path)
    write_decision({})
    return tmp_path


def write_decision(changes: dict, weights: dict[str, float] | None = None) -> dict:
    """decision.json of runs in the working folder, a and b at .3 and .7 by default; what it holds."""
    runs = [
        {"name": name, "reference": name, "revision": None, "weight": weight}
        | {"oof_sha256": table_digest(read_run(name).oof)}
        for name, weight in (weights or {"a": 0.3, "b": 0.7}).items()
    ]
    content = DECISION | {"runs": runs} | changes
    Path("decision.json").write_text(json.dumps(content))
    return content


def call(*words: object) -> int:
    """The script in this process, as from its command line; its exit status."""
    return run_script(ensemble.main, *words)


def compare(*words: object) -> int:
    """scripts/leaderboard.py with plain argmax, likewise."""
    return run_script(leaderboard.main, "--method", "argmax", *words)


GIVEN = ["--runs", "a", "b", "--weights", "0.3", "0.7", "--decision", "decision.json", "--repeats", "1"]
QUICK = ["--method", "argmax", "--repeats", "1"]


def read(path: Path | str):
    return json.loads(Path(path).read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_submission_and_all_that_stands_beside_it(python: str, place: Path):
    given = write_decision({"method": "prior"})
    words = [*GIVEN, "--repeats", "2", "--test_file", "test.json", "--output_dir", "out"]
    done = subprocess.run([python, ROOT / "ensemble.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = place / "out"

    # t0: .3 * (.5 .4 .1) + .7 * (.2 .5 .3) = (.29 .47 .24): below the gate's .5; with the bias .24 e = .652 wins.
    # t1: (.17 .58 .25): the gate. Without it .25 e = .68 would win.
    # t2: (.7 .13 .17): .17 e = .462 < .7.
    predicted = read(out / "prediction.json")
    assert [row.pop("label") for row in predicted] == [2, 1, 0]
    assert predicted == test_rows([None] * 3)
    assert list(read(out / "prediction.json")[0]) == [*test_rows([None])[0], "label"]
    with zipfile.ZipFile(out / "prediction.zip") as archive:
        assert archive.namelist() == ["prediction.json"]
        assert archive.read("prediction.json") == (out / "prediction.json").read_bytes()

    runs = [read_run(name) for name in "ab"]
    labels, truth = runs[0].oof.label, runs[0].truth()
    blended = 0.3 * softmax(runs[0].oof.logits) + 0.7 * softmax(runs[1].oof.logits)
    rule = Decision(np.array(RULE["bias"]), 1, 0.5)
    metrics, decision, bundle = (read(out / f"{name}.json") for name in ("metrics", "decision", "ensemble"))
    for stage, predictions in (
        ("argmax", blended.argmax(axis=1)),
        ("in_sample", decide(blended, rule)),
    ):
        for name, value in metrics_module.scores(labels, predictions, 3, [1, 2]).items():
            assert metrics[stage][name] == pytest.approx(value), (stage, name)
            assert decision["metrics"][stage][name] == metrics[stage][name]
        assert metrics[stage]["interval"]["macro_f1_positive"] == list(bootstrap_interval(truth, predictions))
    recipe = Recipe("prior", weights=(0.3, 0.7), protected_class=1)
    logits = [run.oof.logits for run in runs]
    again = cross_fit(recipe, logits, truth, repeated_folds(truth, repeats=2))
    assert metrics["cross_fitted"]["macro_f1_positive"] == pytest.approx(again.metrics["macro_f1_positive"])
    assert read(out / "oof_predictions.json")["predictions"] == again.predictions.tolist()
    assert "test" not in metrics

    argmaxes = [run.oof.logits.argmax(axis=1) for run in runs]
    assert metrics["agreement"]["systems"] == ["a", "b", "blend, argmax", "decision, cross-fitted"]
    assert metrics["agreement"]["cohens_kappa"][0][1] == pytest.approx(cohen_kappa_score(*argmaxes))

    assert {key: decision[key] for key in given} == given
    assert read_decision(str(out / "decision.json")).threshold == 0.5
    assert bundle["decision"] == RULE
    assert bundle["runs"][0]["model"]["folder"] == "../a"
    assert [fold["subfolder"] for fold in bundle["runs"][0]["model"]["folds"]] == [
        "fold-0/adapter",
        "fold-1/adapter",
    ]
    read_back, folder = read_bundle("out")
    assert (read_back.guide.to_dict(), read_back.name) == (GUIDE, "out")
    assert model_folders(read_back.runs[1].model, folder)[1].resolve() == place / "b/fold-1/adapter"

    # In-sample never stands without its cross-fitted figure beside it.
    lines = done.stdout.splitlines()
    for above, line in itertools.pairwise(lines):
        assert "in-sample" not in line or "cross-fitted" in line or "cross-fitted" in above
    assert "given and not fitted here" in done.stdout
    data = ModelCard((out / "README.md").read_text()).data
    assert data.eval_results[0].metric_value == round(metrics["cross_fitted"]["macro_f1_positive"], 4)

    files = tree(out)
    assert sorted(name for name in files if name.startswith("figures/")) == [
        f"figures/{name}.png"
        for name in ("agreement", "confusion", "per_class_f1", "reliability", "search_curves")
    ]
    page = files["report.html"].decode()
    assert page.count("data:image/png;base64,") == 5 and not re.search(r"(src|href)=\"(?!data:)", page)
    for name, content in files.items():
        assert SECRET.encode() not in content or name == "prediction.json", name
        assert str(place).encode() not in content, name

    # The same again gives the same bytes, whatever the clock says.
    assert call(*words[:-1], "again") == 0
    assert tree(place / "again").keys() == files.keys()
    for name, content in tree(place / "again").items():
        named = name in ("README.md", "report.html", "ensemble.json")  # these hold the folder's name
        assert content == files[name] or named, name


def test_geometric_mean(place: Path):
    no_rule = {"bias": [0.0, 0.0, 0.0], "threshold": None, "blend": "geometric"}
    write_decision(no_rule, {"a": 1, "b": 1})
    words = [*GIVEN, "--weights", "1", "1", "--blend", "geometric", "--test_file", "test.json"]
    assert call(*words, "--output_dir", "out") == 0
    # t1: sqrt of .1 * .2, .3 * .7, .6 * .1: label 1. t2: .7 * .7, .2 * .1, .1 * .2.
    assert [row["label"] for row in read("out/prediction.json")] == [1, 1, 0]
    assert read("out/decision.json")["blend"] == "geometric"
    assert read("out/metrics.json")["notes"][0] == "The weights were scaled to sum 1."


def test_labels_of_the_test_file_are_scored_and_replaced(place: Path, capsys):
    (place / "test.json").write_text(json.dumps(test_rows([2, 2, None])))
    assert call(*GIVEN, "--test_file", "test.json", "--output_dir", "out") == 0
    assert [row["label"] for row in read("out/prediction.json")] == [2, 1, 0]
    test = read("out/metrics.json")["test"]
    assert test["rows"] == 2
    expected = metrics_module.scores(np.array([2, 2]), np.array([2, 1]), 3, [1, 2])
    for name, value in expected.items():
        assert test["decision"][name] == pytest.approx(value), name
    assert test["decision"]["interval"] == {}  # one dialogue tells nothing of others
    assert "Scores on the 2 labelled rows of the test file" in capsys.readouterr().out


def test_searched_weights(place: Path, capsys):
    words = ["--runs", "a", "b", "--weights", "search", *QUICK, "--output_dir", "out"]
    assert call(*words) == 0
    runs = [read_run(name) for name in "ab"]
    probabilities = [softmax(run.oof.logits) for run in runs]
    weights, trajectory = search_weights(probabilities, runs[0].oof.label)
    metrics = read("out/metrics.json")
    assert [run["weight"] for run in read("out/decision.json")["runs"]] == weights.tolist()
    assert metrics["weight_search"] == trajectory
    # Argmax is the figure that nothing was tuned for: equal weights.
    equal = np.mean(probabilities, axis=0).argmax(axis=1)
    assert metrics["argmax"]["accuracy"] == pytest.approx(np.mean(equal == runs[0].oof.label))
    assert "the searched ones were tuned on these rows" in capsys.readouterr().out
    assert not Path("out/prediction.json").exists()


def test_votes(place: Path, capsys):
    # A specialist for labels 1 and 2 that is sure of 0 votes for the better of its own; two gatekeepers outvote it.
    specialist = run_info("c") | {"label_scope": [1, 2]}
    write_run(
        place / "c",
        specialist,
        logits_of(2),
        [[[0.1, 0.8, 0.1]] * 2, [[0.9, 0.02, 0.08]] * 2, [[0.1, 0.1, 0.8]] * 2],
    )
    words = ["--runs", "a", "b", "c", "--test_file", "test.json", "--output_dir"]
    assert call(*words, "hard", "--method", "vote") == 0
    # t0: 0, 1 | 1 -> one of two gatekeepers is no majority; 1 leads. t1: 2, 1 | 2 -> 2. t2: 0, 0 -> 0.
    assert [row["label"] for row in read("hard/prediction.json")] == [1, 2, 0]
    assert read("hard/decision.json")["vote"] == {
        "gate_label": 0,
        "protected_class": 1,
        "label_scopes": [None, None, [1, 2]],
        "soft": False,
    }
    metrics = read("hard/metrics.json")
    assert metrics["in_sample"] == metrics["cross_fitted"]
    assert "A vote has nothing to fit" in capsys.readouterr().out
    assert not Path("hard/figures/search_curves.png").exists()
    assert call(*words, "soft", "--method", "soft_vote") == 0
    # t0: gate (.5 + .2) / 2 = .35, the rest .65 by .8 : .1. t1: gate .15, rest by .02 : .08. t2: gate .7.
    assert [row["label"] for row in read("soft/prediction.json")] == [1, 2, 0]
    assert read_bundle("soft")[0].rule().voting.soft
    assert call(*words, "x", "--method", "vote", "--weights", "1", "1", "1") == 2
    assert "--method vote counts every run once" in capsys.readouterr().err
    (place / "c/run.json").write_text(json.dumps(specialist | {"label_scope": [7]}))
    assert call(*words, "x", "--method", "vote") == 2
    assert "c: run.json: label_scope: numbers of 0..2 expected, not [7]" in capsys.readouterr().err
    assert not Path("x").exists()


def other_run(place: Path, **changes) -> None:
    """Run c, which differs from the others in one thing."""
    columns = {key: changes.pop(key) for key in ("id", "dialogue_id", "label", "test_id") if key in changes}
    logits = changes.pop("logits", logits_of(5))
    write_run(place / "c", run_info("c") | changes, logits, TEST["a"], **columns)


IDS = [f"r{row}" for row in range(ROWS)]
DISAGREEMENTS = {
    "label names": (
        {"label_names": ["none", "acting out", "splitting"]},
        'c: label_names: label 2: "splitting", but "denial" in a',
    ),
    "positive labels": ({"positive_labels": [2]}, "c: positive_labels: [2], but [1, 2] in a"),
    "row": ({"id": [*IDS[:5], "other", *IDS[6:]]}, "c: row 'r5' of a is missing"),
    "label": ({"label": (np.arange(ROWS) + (np.arange(ROWS) >= 7)) % 3}, "c: row 'r7': label: 2, but 1 in a"),
    "dialogue": (
        {"dialogue_id": [f"e{row // 6}" for row in range(ROWS)]},
        "c: row 'r0': dialogue_id: 'e0', but 'd0' in a",
    ),
    "fold groups": ({"fold_groups": "none"}, 'c: fold_groups: "none", but "dialogue" in a'),
    "test row": ({"test_id": ["t0", "t1", "t9"]}, "c: test table: row 't2' of test.json is missing"),
    "constant": ({"logits": np.zeros((ROWS, 3))}, "c: logits: constant"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_runs_that_disagree_are_refused(place: Path, capsys, case: str):
    changes, message = DISAGREEMENTS[case]
    other_run(place, **copy.deepcopy(changes))
    assert call("--runs", "a", "c", *QUICK, "--test_file", "test.json", "--output_dir", "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "a", "b", "--weights", "0", "0"], "they sum to zero"),
        (["--runs", "a", "b", "--weights", "-1", "2"], "must be finite and not negative"),
        (["--runs", "a", "b", "--weights", "1"], "1 given for 2 run(s)"),
        (["--runs", "a", "b", "--weights", "much", "1"], "numbers, or the one word search"),
        (["--runs", "a", "nowhere"], "nowhere: no such run"),
        (["--runs"], "expected at least one argument"),
        (["--weights", "1"], "--runs: name one or more"),
        (["--runs", "a", "b", "a"], "a: the same run as a; leave one out"),
        (["--runs", "a", "copy"], "copy: the same run as a; leave one out"),
        (["--runs", "a", "--decision", "wrong.json"], "wrong.json: label_names"),
        (["--runs", "a", "--decision", "test.json"], "test.json: Input should be a valid dictionary"),
        (["--runs", "a", "--label_guide", "label_guides/dmrs.yaml"], "label guide: labels"),
        (["--runs", "a", "--push_to_hub"], "--push_to_hub needs --hub_namespace and --hub_name"),
        (["--runs", "a", "--method", "vote", "--decision", "decision.json"], "no --decision"),
        (
            ["--runs", "a", "b", "--decision", "decision.json", "--weights", "search"],
            "belongs to given weights",
        ),
        (["--runs", "a", "--repeats", "0"], "--repeats: one or more"),
        (["--runs", "a", "--decision_from_other_runs"], "needs a --decision"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(place: Path, capsys, words: list[str], message: str):
    shutil.copytree("a", "copy")
    Path("wrong.json").write_text(json.dumps(write_decision({"label_names": ["x", "y", "z"]})))
    assert call(*words, "--test_file", "test.json", "--output_dir", "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("out").exists()


def test_one_dialogue_or_a_label_without_rows(place: Path, capsys):
    for run in "ab":
        shutil.rmtree(run)
    write_run(place / "a", run_info("a"), logits_of(0), TEST["a"], label=np.arange(ROWS) % 2)
    assert call("--runs", "a", *QUICK, "--output_dir", "out") == 2
    assert "a: label 2 (denial) has no row" in capsys.readouterr().err
    shutil.rmtree(place / "a")
    info = run_info("a") | {"fold_groups": "none"}
    write_run(place / "a", info, logits_of(0), TEST["a"], dialogue_id=["d0"] * ROWS)
    assert call("--runs", "a", *QUICK, "--output_dir", "out") == 2
    assert "one dialogue only" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_stale_prediction_is_not_left_beside_another_decision(place: Path, capsys):
    Path("out").mkdir()
    Path("out/prediction.json").write_text("[]")
    assert call("--runs", "a", *QUICK, "--output_dir", "out") == 2
    assert "holds a prediction of another call" in capsys.readouterr().err
    assert list(Path("out").iterdir()) == [Path("out/prediction.json")]


def test_compare_by_hand(place: Path, capsys):
    # Run c predicts as run d, but for rows 1 (1, right -> 2), 2 (2, right -> 0) and 5 (0, wrong -> 2, right).
    labels = np.arange(ROWS) % 3
    of_d, of_c = labels.copy(), labels.copy()
    of_d[5] = 0
    of_c[1], of_c[2] = 2, 0
    for name, predictions in (("d", of_d), ("c", of_c)):
        write_run(place / name, run_info(name), np.eye(3)[predictions], TEST["a"])
    assert compare("c", "d", "--output_dir", "out") == 0
    found = read("out/leaderboard.json")
    assert list(found["systems"]) == ["d", "c"]
    each = [metrics_module.scores(labels, predictions, 3, [1, 2]) for predictions in (of_d, of_c)]
    scores = [of_one["macro_f1_positive"] for of_one in each]
    assert [of_one["cross_fitted"][0] for of_one in found["systems"].values()] == pytest.approx(scores)
    difference, low, high = found["systems"]["c"]["difference"]
    assert difference == pytest.approx(scores[1] - scores[0])
    flips = [
        {"a": 0, "b": 2, "rows": 1, "a_right": 0, "b_right": 1, "ids": ["r5"]},
        {"a": 1, "b": 2, "rows": 1, "a_right": 1, "b_right": 0, "ids": ["r1"]},
        {"a": 2, "b": 0, "rows": 1, "a_right": 1, "b_right": 0, "ids": ["r2"]},
    ]
    assert found["flips"] == flips
    # All three rows are in dialogue d0: a sample without it has no difference, one that draws it has a negative one.
    assert low < difference < 0 and high == 0
    out = capsys.readouterr().out
    assert "Rows that flip: 3\nd → c " in out and "0 none → 2 denial" in out
    shutil.copytree("d", "twin")
    assert compare("d", "twin") == 0
    assert " +0.000 [+0.000, +0.000]\n" in capsys.readouterr().out


def test_compare_with_an_ensemble(place: Path, capsys):
    assert call("--runs", "a", "b", *QUICK, "--output_dir", "out") == 0
    assert compare("a", "out") == 0
    out = capsys.readouterr().out
    assert "\nout " in out and "\na " in out and "Rows that flip" in out
    other_run(place, label_names=["x", "y", "z"])
    assert compare("out", "c") == 2
    assert 'c: label_names: label 0: "x", but "none" in out' in capsys.readouterr().err
    content = read("out/oof_predictions.json")
    for change in (
        {"label": [9] * ROWS},
        {"id": IDS[:-1]},
        {"predictions": [["x"] * ROWS]},
        {"fold_groups": 1},
    ):
        Path("out/oof_predictions.json").write_text(json.dumps(content | change))
        assert compare("a", "out") == 2
        assert "leaderboard.py: error: out/oof_predictions.json: " in capsys.readouterr().err


def test_kappa_against_scikit_learn():
    generator = np.random.default_rng(3)
    for _ in range(20):
        one, other = generator.integers(4, size=(2, 30))
        assert cohens_kappa(one, other, 5) == pytest.approx(cohen_kappa_score(one, other))
    assert cohens_kappa(np.ones(3, int), np.ones(3, int), 2) == 1


def test_hub_runs_and_a_published_bundle(place: Path, hub_here, capsys):
    assert call(*GIVEN, "--test_file", "test.json", "--output_dir", "local") == 0
    push = ["--push_to_hub", "--hub_namespace", "org", "--hub_name", "psy"]
    # Run a is on this disk only: nobody could load an ensemble of it.
    capsys.readouterr()
    assert call(*GIVEN, "--test_file", "test.json", "--output_dir", "early", *push) == 2
    said = capsys.readouterr().err
    assert "a: others cannot load an ensemble of a run that is not on the Hub" in said
    assert said.endswith("; if it was pushed under another name, give ORG/NAME-oof:RUN in --runs\n")
    assert "cross-fitting" not in said  # nothing was fitted before
    assert not Path("early").exists()
    for run in "ab":
        for fold in range(FOLDS):
            push_fold(run, fold, "org", "psy")
        card = run_card(run_info(run), {"folds": {}}, f"org/psy-{run}")
        push_run(run, "org", "psy", model_card=card)
    capsys.readouterr()

    mixed = ["--runs", "a", "org/psy-oof:b", *GIVEN[3:]]
    assert call(*mixed, "--test_file", "test.json", "--output_dir", "mixed", *push) == 0
    for name in ("prediction.json", "prediction.zip", "oof_predictions.json", "metrics.json"):
        assert Path("mixed", name).read_bytes() == Path("local", name).read_bytes()
    bundle = read("mixed/ensemble.json")
    for run, letter in zip(bundle["runs"], "ab", strict=True):
        model = {key: run["model"][key] for key in ("repo_id", "revision")}
        assert model == {
            "repo_id": f"org/psy-{letter}",
            "revision": hub_here.commits(f"org/psy-{letter}")[-1].oid,
        }
        assert run["reference"] == f"org/psy-oof:{letter}"
        assert run["revision"] == hub_here.commits("org/psy-oof", "dataset")[-1].oid
    published = hub_here.files("org/psy")
    figures = {f"figures/{path.name}" for path in Path("mixed/figures").iterdir()}
    files = {"ensemble.json", "decision.json", "metrics.json", "report.html", "README.md"} | figures
    assert published.keys() - {".gitattributes"} == files
    for name in files:
        if name == "ensemble.json":  # no folder of this machine is published
            without = copy.deepcopy(bundle)
            assert [run["model"].pop("folder", None) for run in without["runs"]] == ["../a", None]
            assert json.loads(published[name]) == without
        else:
            assert published[name] == Path("mixed", name).read_bytes()
        assert SECRET.encode() not in published[name] and str(place).encode() not in published[name]
        assert hub_here.writer.encode() not in published[name]
    assert ModelCard(published["README.md"].decode()).data.model_name == "org/psy"
    assert hub_here.repos["model", "org/psy"].private
    folders = model_folders(read_bundle("org/psy")[0].runs[0].model, Path("nowhere"))
    assert [(folder / "adapter_model.safetensors").read_bytes() for folder in folders] == [
        b"weights 0",
        b"weights 1",
    ]

    commits = len(hub_here.commits("org/psy"))
    assert call("--output_dir", "mixed", "--push_only", *push[1:]) == 0
    assert len(hub_here.commits("org/psy")) == commits

    # What was made without a push is pushed as it is, its runs and its card referring to the Hub from now on.
    assert call("--output_dir", "local", "--push_only", *push[1:]) == 0
    pushed = hub_here.files("org/psy")
    later = json.loads(pushed["ensemble.json"])
    assert later["runs"] == [
        run | {"model": later["runs"][place]["model"]} for place, run in enumerate(bundle["runs"])
    ]
    assert [run["reference"] for run in json.loads(pushed["decision.json"])["runs"]] == [
        "org/psy-oof:a",
        "org/psy-oof:b",
    ]
    assert ModelCard(pushed["README.md"].decode()).data.model_name == "org/psy"
    assert b'from_pretrained("org/psy")' in pushed["README.md"]
    # On this machine its models are still taken from their folders, without the Hub.
    commits = len(hub_here.commits("org/psy"))
    del hub_here.repos["model", "org/psy-b"]
    here, folder = read_bundle("local")
    assert model_folders(here.runs[1].model, folder)[0].resolve() == place / "b/fold-0/adapter"
    (place / "b/fold-0/adapter/adapter_model.safetensors").write_bytes(b"trained anew")
    with pytest.raises(
        InputError, match="org/psy-b"
    ):  # other weights than the bundle's: only the Hub has those
        model_folders(here.runs[1].model, folder)
    assert len(hub_here.commits("org/psy")) == commits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"folder": "../a"}},
            "runs.0.model.folder: a bundle from the Hub may not name a folder here",
        ),
        ({"base_model": "/home/me/base"}, "runs.0.base_model: '/home/me/base' is a path on this machine"),
        ({"base_model": "team/base"}, "runs.0.base_model: 'team/base' is a path on this machine"),
    ],
)
def test_a_pulled_bundle_names_no_path_of_this_machine(place: Path, hub_here, change: dict, message: str):
    assert call("--runs", "a", *QUICK, "--output_dir", "out") == 0
    bundle = read("out/ensemble.json")
    hub = {"repo_id": "org/psy-a", "revision": "a" * 40, "folds": [{"subfolder": "fold-0"}]}
    bundle["runs"][0] |= {"model": hub | change.pop("model", {})} | change
    push_files("org/x", {"ensemble.json": json.dumps(bundle).encode()}, message="x", kept_in="out")
    Path("team/base").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        read_bundle("org/x")
    (line,) = error.value.problems
    assert message in line


def test_every_problem_of_a_bundle_is_a_line(place: Path):
    assert call("--runs", "a", *QUICK, "--output_dir", "out") == 0
    bundle = read("out/ensemble.json")
    bundle["runs"][0]["loader"]["quantization"] = "pickle"
    bundle["runs"][0]["window"]["max_turns"] = 0
    bundle["decision"]["temperature"] = -1
    Path("out/ensemble.json").write_text(json.dumps(bundle))
    with pytest.raises(InputError) as error:
        read_bundle("out")
    places = ["temperature", "runs.0.loader.quantization", "runs.0.window.max_turns"]
    assert len(error.value.problems) == 3
    for where, line in zip(places, error.value.problems, strict=True):
        assert line.startswith(f"out: ensemble.json: {where}: ")


def test_a_decision_is_applied_to_what_it_belongs_to(place: Path):
    # The order of the runs and the spelling of their paths are the user's; weights and blend are the file's.
    write_decision({"blend": "geometric"}, {"a": 0.1, "b": 0.9})
    words = [
        "--decision",
        "decision.json",
        "--repeats",
        "1",
        "--test_file",
        "test.json",
        "--output_dir",
        "out",
    ]
    assert call("--runs", place / "b", "./a", *words) == 0
    decision = read("out/decision.json")
    assert {run["name"]: run["weight"] for run in decision["runs"]} == pytest.approx({"a": 0.1, "b": 0.9})
    assert decision["blend"] == "geometric"
    assert call("--runs", "a", "b", "--weights", "1", "9", "--blend", "geometric", *words) == 0


OTHERS = {
    "weights": (
        ["--runs", "a", "b", "--weights", "0.9", "0.1"],
        "belongs to weights 0.3 0.7, --weights says 0.9 0.1",
    ),
    "blend": (
        ["--runs", "a", "b", "--blend", "geometric"],
        "belongs to blend arithmetic, --blend says geometric",
    ),
    "fewer runs": (["--runs", "a"], "belongs to a, b, not to a"),
    "another run": (["--runs", "a", "c"], "belongs to a, b, not to a, c"),
    "the run anew": (["--runs", "a", "again/b"], "was fitted on other out-of-fold logits of b"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_decision_is_not_applied_to_anything_else(place: Path, capsys, case: str):
    words, message = OTHERS[case]
    other_run(place)
    write_run(place / "again/b", run_info("b"), logits_of(7), TEST["b"])
    words = [*words, "--decision", "decision.json", "--repeats", "1", "--output_dir", "out"]
    assert call(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines
    assert not Path("out").exists()
    # Asked for by name, the rule alone is taken over (the paper's system fits its bias on one run of the blend).
    assert call(*words, "--decision_from_other_runs") == 0
    assert read("out/ensemble.json")["decision"] == RULE
    assert "was made for other runs" in Path("out/report.html").read_text()


def test_a_vote_in_a_decision_is_that_vote(place: Path, capsys):
    specialist = run_info("c") | {"label_scope": [1, 2]}
    write_run(place / "c", specialist, logits_of(2), TEST["a"][::-1])
    words = ["--test_file", "test.json", "--output_dir"]
    assert call("--runs", "a", "b", "c", "--method", "vote", *words, "voted") == 0
    given = ["--decision", "voted/decision.json"]
    assert call("--runs", "c", "b", "a", *given, *words, "again") == 0
    for name in ("prediction.json", "oof_predictions.json"):
        assert read(f"again/{name}") == read(f"voted/{name}"), name
    assert read("again/decision.json")["vote"]["label_scopes"] == [[1, 2], None, None]
    assert call("--runs", "a", "b", *given, "--decision_from_other_runs", *words, "x") == 2
    assert "a vote counts the runs that it names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": [0, 0]}, "bias: 3 numbers expected, one a label, not 2"),
        ({"bias": [0, 0, float("nan")]}, "not a JSON file"),
        ({"bias": [0, 0, "1"]}, "bias.2: Input should be a valid number"),
        ({"bias": {"a": 1}}, "bias: Input should be a valid list"),
        ({"protected_class": 3}, "protected_class: 3 is not one of the labels 0 to 2"),
        ({"protected_class": True}, "protected_class: Input should be a valid integer"),
        ({"protected_class": None}, "threshold: given without a protected_class"),
        ({"threshold": 0}, "threshold: Input should be greater than 0"),
        ({"threshold": 1.5}, "threshold: Input should be less than or equal to 1"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"temperature": None}, "temperature: Input should be a valid number"),
        ({"label_names": "abc"}, "label_names: Input should be a valid list"),
        ({"positive_labels": [3]}, "positive_labels: 3 is not one of the labels 0 to 2"),
        ({"positive_labels": []}, "positive_labels: List should have at least 1 item"),
        ({"blend": "harmonic"}, "blend: Input should be 'arithmetic' or 'geometric'"),
        ({"runs": []}, "runs: List should have at least 1 item"),
        ({"runs": [{"weight": -1}]}, "runs.0.weight: Input should be greater than or equal to 0"),
        ({"runs": [{"reference": 3}]}, "runs.0.reference: Input should be a valid string"),
        ({"runs": [{"revision": 3}]}, "runs.0.revision: Input should be a valid string"),
        ({"runs": [{"weight": 0}]}, "runs: the weights sum to zero"),
        (
            {"vote": {"gate_label": 9, "protected_class": 1, "label_scopes": [None], "soft": False}},
            "vote: 9 is not",
        ),
        (
            {"vote": {"gate_label": 0, "protected_class": 1, "label_scopes": [], "soft": False}},
            "vote: label_scopes",
        ),
    ],
)
def test_a_malformed_decision_is_one_line(place: Path, changes: dict, message: str):
    content = write_decision({}, {"a": 1})
    if changes.get("runs"):
        changes = {"runs": [content["runs"][0] | changes["runs"][0]]}
    Path("decision.json").write_text(json.dumps(content | changes))
    with pytest.raises(InputError) as error:
        read_decision("decision.json")
    (line,) = error.value.problems
    assert line.startswith(f"decision.json: {message}")


def test_a_decision_with_fields_missing_names_them(place: Path):
    content = write_decision({})
    del content["bias"], content["temperature"]
    Path("decision.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        read_decision("decision.json")
    assert [line.split(": ")[1] for line in error.value.problems] == ["bias", "temperature"]


def test_all_contradictions_in_a_decision_are_named_at_once(place: Path):
    content = write_decision({}, {"a": 1}) | {"bias": [0.0], "threshold": 0.5, "protected_class": None}
    Path("decision.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        read_decision("decision.json")
    assert [line.split(": ")[1] for line in error.value.problems] == ["bias", "threshold"]


def test_a_run_whose_models_are_not_shared(place: Path, hub_here, caplog):
    for fold in range(FOLDS):
        push_fold("b", fold, "org", "psy")
    card = run_card(run_info("b"), {"folds": {}}, "org/psy-b")
    push_run("b", "org", "psy", model_card=card)
    del hub_here.repos["model", "org/psy-b"]
    assert call("--runs", "org/psy-oof:b", *QUICK, "--output_dir", "out") == 0
    assert read("out/ensemble.json")["runs"][0]["model"] is None
    assert "lists the run without a model" in caplog.text


def test_prediction_archive_is_a_whole_zip():
    files = ensemble.submission([{"id": "x", "label": 3}], ".json")
    with zipfile.ZipFile(io.BytesIO(files["prediction.zip"])) as archive:
        assert archive.testzip() is None
        (member,) = archive.infolist()
        assert (member.date_time, member.create_system) == ((1980, 1, 1, 0, 0, 0), 3)
        assert json.loads(archive.read(member)) == [{"id": "x", "label": 3}]
