"""A corpus with a split of its own: `--validation_file` in the two training scripts, and what takes such a run later."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running import run_script
from tiny_models import make_tiny_decoder, make_tiny_encoder

import calibrate
import ensemble
import linear_probe
import predict
import run_classification
from rareturn.files import read_json, write_json
from rareturn.runs.reading import read_run

ROOT = Path(__file__).parent.parent
GUIDE = str(ROOT / "data/demo/label_guide.yaml")
QUICK = {"repeats": 1, "method": "prior"}


def parts(restarting: bool) -> dict[str, list[dict]]:
    """The demo corpus in a training, a validation and a test part; ids may start anew in each part."""
    rows = read_json(ROOT / "data/demo/train.json")
    dialogues = list(dict.fromkeys(row["dialogue_id"] for row in rows))
    found = {"train": [], "dev": [], "test": []}
    for number, dialogue_id in enumerate(dialogues):
        part, start = ("train", 0) if number < 24 else ("dev", 24) if number < 33 else ("test", 33)
        for place, row in enumerate(row for row in rows if row["dialogue_id"] == dialogue_id):
            number_there = number - start if restarting else number
            ids = {"id": f"{number_there}/{place}", "dialogue_id": f"{number_there}"}
            found[part].append(row | ids)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, the three files, and two runs of one model each."""
    folder = tmp_path_factory.mktemp("given")
    make_tiny_encoder(folder / "encoder")
    for restarting in (True, False):
        for name, rows in parts(restarting).items():
            write_json(folder / f"{name}{'' if restarting else '-apart'}.json", rows)
    assert probe(folder, folder / "a") == 0 and probe(folder, folder / "b", C=0.1) == 0
    return folder


def probe(place: Path, output_dir: Path, apart: str = "", **flags: object) -> int:
    files = {f"{flag}_file": place / f"{name}{apart}.json" for flag, name in FILES.items()}
    model = {"model_name_or_path": place / "encoder", "label_guide": GUIDE, "C": 1}
    return run_script(linear_probe.main, **{**files, **model, "output_dir": output_dir, **flags})


FILES = {"train": "train", "validation": "dev", "test": "test"}


def test_a_data_set_of_several_splits_gives_each_flag_its_own(place: Path):
    """`ORG/NAME` without a path, or a saved `DatasetDict`: train, validation and test are taken by name."""
    import datasets

    names = {"train": "train", "validation": "dev", "test": "test"}
    files = {split: str(place / f"{name}.json") for split, name in names.items()}
    splits = {split: datasets.Dataset.from_list(read_json(file)) for split, file in files.items()}
    datasets.DatasetDict(splits).save_to_disk(place / "splits")
    flags = {f"{flag}_file": place / "splits" for flag in FILES}
    assert probe(place, place / "of-splits", **flags) == 0
    one, other = (read_run(place / name, require_test=True) for name in ("a", "of-splits"))
    assert one.oof.id == other.oof.id and np.array_equal(one.oof.logits, other.oof.logits)
    assert one.test[0].id == other.test[0].id


def test_one_model_is_trained_on_all_rows_and_judged_on_the_file(place: Path):
    rows = {name: read_json(place / f"{name}.json") for name in FILES.values()}
    folds, info = read_json(place / "a/folds.json"), read_json(place / "a/run.json")
    assert folds["num_folds"] == info["num_folds"] == 1
    assert folds["folds"] == {row["id"]: 0 for row in rows["dev"]}
    shared = {row["id"] for row in rows["dev"]} & {row["id"] for row in rows["train"]}
    assert len(shared) > 20  # other rows of the same names
    assert read_json(place / "a/fold-0/metrics.json")["train_rows"] == len(rows["train"])
    made = read_run(place / "a", require_test=True)
    assert made.oof.id == [row["id"] for row in rows["dev"]]
    assert made.oof.label.tolist() == [row["label"] for row in rows["dev"]]
    assert not (place / "a/fold-1").exists()
    assert probe(place, place / "a") == 0  # complete: nothing to train
    # Other flags, or other rows in either file, are another run.
    write_json(place / "fewer.json", rows["dev"][:-1])
    assert probe(place, place / "a", validation_file=place / "fewer.json") == 2


def test_ids_that_restart_in_each_file_change_no_logit(place: Path, tmp_path: Path):
    assert probe(place, tmp_path / "apart", "-apart") == 0
    here, apart = read_run(place / "a"), read_run(tmp_path / "apart")
    assert not set(here.oof.id) & set(apart.oof.id)
    np.testing.assert_array_equal(here.oof.logits, apart.oof.logits)
    np.testing.assert_array_equal(here.test[0].logits, apart.test[0].logits)


@pytest.mark.parametrize("pack_dialogues", [None, True])
def test_a_fine_tuned_run(place: Path, tmp_path: Path, capsys, pack_dialogues):
    make_model = make_tiny_decoder if pack_dialogues else make_tiny_encoder
    flags = {
        "model_name_or_path": make_model(tmp_path / "base"),
        "label_guide": GUIDE,
        "num_train_epochs": 1,
        "max_train_samples": 40,
        "max_seq_length": 512,
        "max_turns": 6,
        "learning_rate": 3e-3,
        "lora_r": 4,
        "bf16": False,
        "do_predict": True,
        "pack_dialogues": pack_dialogues,
        "num_folds": 5,  # as a recipe has it
    }
    runs = []
    for apart in ("", "-apart"):
        files = {f"{flag}_file": place / f"{name}{apart}.json" for flag, name in FILES.items()}
        words = flags | files | {"output_dir": tmp_path / f"run{apart}"}
        assert run_script(run_classification.main, **words) == 0
        runs.append(read_run(tmp_path / f"run{apart}", require_test=True))
    assert runs[0].oof.id == read_run(place / "a").oof.id
    np.testing.assert_array_equal(runs[0].oof.logits, runs[1].oof.logits)
    np.testing.assert_array_equal(runs[0].test[0].logits, runs[1].test[0].logits)
    capsys.readouterr()
    assert run_script(run_classification.main, **words, fold=1) == 2
    assert "--fold 1 is not one of 0 to 0" in capsys.readouterr().err


def test_every_later_script_takes_such_a_run(python: str, place: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [
            python,
            ROOT / "scripts/check_oof.py",
            place / "a",
            "--label_guide",
            GUIDE,
            "--require_test",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(read_run(place / 'a').oof)}, each once, in one validation file" in done.stdout
    assert run_script(calibrate.main, run=place / "a", output="decision.json", **QUICK) == 0
    assert "the run has one validation file of whole dialogues" in capsys.readouterr().out
    words = {"runs": [place / "a", place / "b"], "test_file": place / "test.json", "output_dir": "system"}
    assert run_script(ensemble.main, **words, **QUICK) == 0
    assert "; one validation file of whole dialogues: the figures estimate" in capsys.readouterr().out
    assert "A blend of 2 runs" in Path("system/README.md").read_text()
    flags = {"ensemble": "system", "input": place / "test.json", "turns": "last", "output": "labels.jsonl"}
    assert run_script(predict.main, **flags) == 0
    predicted = [json.loads(line)["label"] for line in Path("labels.jsonl").read_text().splitlines()]
    assert predicted == [row["label"] for row in read_json("system/prediction.json")]


def test_it_is_pushed_and_read_back(place: Path, hub_here):
    where = {"hub_namespace": "lab", "hub_name": "sys", "push_only": "true"}
    assert probe(place, place / "a", **where) == 0
    pulled, local = read_run("lab/sys-oof:a", require_test=True), read_run(place / "a")
    np.testing.assert_array_equal(pulled.oof.logits, local.oof.logits)
    card = hub_here.files("lab/sys-a")["README.md"].decode()
    assert (
        "A run of rareturn: one model, that assigns" in card and "Folds: one validation file of whole" in card
    )


def with_row(place: Path, tmp_path: Path, name: str, source: str, **changes: object) -> Path:
    """A file with a row of another beside its own, ids and all."""
    row = read_json(place / f"{source}.json")[0] | changes
    rows = [other for other in read_json(place / f"{name}.json") if other["id"] != row["id"]]
    write_json(tmp_path / "with.json", [*rows, row])
    return tmp_path / "with.json"


@pytest.mark.parametrize(
    ("flag", "source", "problem"),
    [
        ("validation", "train", "with.json: row '0/0' is in {place}/train.json too, with the same turns"),
        ("test", "train", "with.json: row '0/0' is in {place}/train.json too, with the same turns"),
        ("test", "dev", "with.json: row '0/0' is in {place}/dev.json too, with the same turns"),
    ],
)
def test_a_row_of_another_file_is_refused(place: Path, tmp_path: Path, capsys, flag, source, problem):
    path = with_row(place, tmp_path, FILES[flag], source)
    assert probe(place, tmp_path / "run", **{f"{flag}_file": path}) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert errors == [f"linear_probe.py: error: {tmp_path}/{problem.format(place=place)}"]
    assert not (tmp_path / "run").exists()


def test_rows_of_a_training_dialogue_are_held_out_only_on_request(place: Path, tmp_path: Path, capsys):
    """A later turn of a training dialogue: not a training row, but of a dialogue that the model has seen."""
    train = read_json(place / "train.json")
    last = [row for row in train if row["dialogue_id"] == "0"][-1]
    write_json(tmp_path / "train.json", [row for row in train if row is not last])
    write_json(
        tmp_path / "dev.json",
        [last, *(row for row in read_json(place / "dev.json") if row["dialogue_id"] != "0")],
    )
    files = {"train_file": tmp_path / "train.json", "validation_file": tmp_path / "dev.json"}
    assert probe(place, tmp_path / "run", **files) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    known = f"dialogue '0' is in {tmp_path}/train.json too, with the same turns"
    assert error.endswith(f"dev.json: {known}; --fold_groups none holds out rows of known dialogues")
    assert not (tmp_path / "run").exists()
    assert probe(place, tmp_path / "run", fold_groups="none", **files) == 0
    assert read_run(tmp_path / "run").oof.id[0] == last["id"]


def test_a_label_without_training_rows_and_folds_of_other_rows(place: Path, tmp_path: Path, capsys):
    rows = [row for row in read_json(place / "train.json") if row["label"] != 7]
    write_json(tmp_path / "train.json", rows)
    assert probe(place, tmp_path / "run", train_file=tmp_path / "train.json") == 2
    message = "dev.json: all rows of label 7 are in the validation file: nothing to train on"
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    folds = read_json(place / "a/folds.json")
    folds["folds"]["zz"] = folds["folds"].pop("0/0")
    write_json(tmp_path / "run/folds.json", folds)
    assert probe(place, tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert "folds.json: row '0/0' of the validation file is in no fold; use another output_dir" in errors
    assert "folds.json: row 'zz' is not in the validation file; use another output_dir" in errors


@pytest.mark.parametrize("where", ["flag", "recipe"])
def test_the_launcher_launches_one_fold(tmp_path: Path, where: str):
    (tmp_path / "training.py").write_text("import sys; print('flags', sys.argv[1:])")
    recipe = "num_folds: 5\noutput_dir: run\n" + ("validation_file: dev.json\n" if where == "recipe" else "")
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = ["--validation_file", "dev.json"] if where == "flag" else []
    env = {**os.environ, "SCRIPT": str(tmp_path / "training.py"), "GPUS": ""}
    command = [ROOT / "scripts/launch_folds.sh", "recipe.yaml", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run/logs").iterdir()] == ["fold-0.log"]
