"""scripts/system.py as a user runs it: a whole system of tiny models, stopped, changed and started again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_models import make_tiny_decoder, make_tiny_encoder

ROOT = Path(__file__).parent.parent


System = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def system_py(python: str) -> System:
    """The script with these words, and environment variables."""

    def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [python, str(ROOT / "scripts/system.py"), *map(str, words)]
        env = os.environ | {"PYTHON": python} | variables
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)

    return run


def states(text: str) -> dict[str, str]:
    """Stage to status, of the table at the end."""
    lines = text[text.rindex("stage ") :].splitlines()[2:]
    return {line.split()[0]: line.split()[1] for line in lines}


@pytest.mark.parametrize(
    "path",
    sorted((*ROOT.glob("systems/*.yaml"), *ROOT.glob("recipes/ladder/r[45].yaml"))),
    ids=lambda path: path.stem,
)
def test_every_system_prints_commands_that_can_be_typed(system_py: System, path: Path):
    done = system_py(path, "--dry_run", DATA="somewhere")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if not line.startswith("# ")]
    assert ("# anchor: 4.2 GPU hours, 12.4 GB" in done.stdout) == (path.stem == "psydefconv-8b")
    for line in commands:
        words = line.split()
        script = words[1] if words[0] == "python" else words[0]
        assert (ROOT / script).is_file()
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file()
    assert str(ROOT) not in done.stdout


def test_a_system_from_rows_to_predictions(system_py: System, tmp_path: Path):
    output = tmp_path / "small"
    content = {
        "output": str(output),
        "jobs": 2,
        "data": {
            "label_guide": "data/demo/label_guide.yaml",
            "train_file": "data/demo/train.json",
            "test_file": "data/demo/test.json",
            "fold_seed": 7,
        },
        "augment": {"labels": [2, 5], "k": 1},
        "runs": {
            "probe": {
                "script": "linear_probe.py",
                "model_name_or_path": make_tiny_encoder(tmp_path / "encoder"),
                "C": [1],
            },
            "decoder": {
                "config": str(tmp_path / "recipe.yaml"),
                "model_name_or_path": make_tiny_decoder(tmp_path / "decoder"),
                "variants": True,
            },
        },
        "calibrate": {"run": "probe", "method": "prior", "repeats": 1},
        "ensemble": {"weights": [0.5, 0.5], "method": "prior", "repeats": 1},
        "predict": {
            "input": "data/demo/test.json",
            "output": str(tmp_path / "labels.jsonl"),
            "turns": "last",
        },
    }
    recipe = {
        "num_train_epochs": 1,
        "lora_r": 4,
        "max_turns": 4,
        "max_train_samples": 30,
        "output_dir": "nowhere",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = tmp_path / "system.yaml"
    path.write_text(yaml.safe_dump(content))
    every = ("augment", "probe", "decoder", "calibrate", "ensemble", "predict")

    done = system_py(path, "--num_folds", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == dict.fromkeys(every, "done")
    assert "argmax" in done.stdout and "cross-fitted" in done.stdout
    assert json.loads((output / "prediction.json").read_text())[0]["label"] >= 0
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 40

    again = system_py(path, "--num_folds", 2)
    assert again.returncode == 0 and states(again.stdout) == dict.fromkeys(every, "complete")

    # A part that is lost, and another decision, are made again with all that rests on them; the rest is left alone.
    (tmp_path / "labels.jsonl").unlink()
    content["calibrate"]["method"] = "argmax"
    path.write_text(yaml.safe_dump(content))
    third = system_py(path, "--num_folds", 2)
    assert {name for name, state in states(third.stdout).items() if state == "done"} == {
        "calibrate",
        "predict",
    }
    (tmp_path / "small-decoder/oof/fold-1.parquet").unlink()
    (tmp_path / "small-decoder/run.json").touch()
    content["runs"]["decoder"]["logging_steps"] = (
        3  # a flag that may differ: the run's folds stay, one is completed
    )
    path.write_text(yaml.safe_dump(content))
    fourth = system_py(path, "--num_folds", 2)
    assert fourth.returncode == 0, fourth.stdout + fourth.stderr
    assert {name for name, state in states(fourth.stdout).items() if state == "done"} == {
        "decoder",
        "ensemble",
        "predict",
    }
    assert "skipped" in fourth.stdout


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"runs": {}}, "runs: "),
        ({"rums": {}}, "rums: "),
        ({"calibrate": {"run": "other"}}, "calibrate.run: 'other' is not one of the runs (probe)"),
        ({"runs": {"probe": {"variants": True}}}, "runs.probe: variants: true, but there is no augment"),
        ({"runs": {"decoder": {}}}, "runs.decoder: config: missing"),
        ({"runs": {"a b": {}}}, "runs.a b"),
        (
            {"data": {"train_file": "${NOWHERE_SET}/train.csv"}},
            "data: train_file: ${NOWHERE_SET}/train.csv: set the environment variable NOWHERE_SET",
        ),
    ],
)
def test_a_mistake_is_one_line(system_py: System, tmp_path: Path, change: dict, line: str):
    content = {"output": str(tmp_path / "x"), "runs": {"probe": {"script": "linear_probe.py"}}} | change
    (tmp_path / "system.yaml").write_text(yaml.safe_dump(content))
    done = system_py(tmp_path / "system.yaml", "--dry_run")
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_jobs_train_and_all_else_is_done_here(system_py: System):
    words = ("recipes/ladder/r5.yaml", "--dry_run", "--jobs", "l4x1", "--timeout", "6h")
    done = system_py(*words)
    assert done.returncode == 2 and "--jobs needs --hub_namespace and --hub_name" in done.stderr
    done = system_py("recipes/ladder/r5.yaml", "--dry_run", "--timeout", "6h")
    assert done.returncode == 2 and "--jobs is missing" in done.stderr
    done = system_py("systems/demo.yaml", *words[1:], "--hub_namespace", "org", "--hub_name", "sys")
    assert done.returncode == 2 and "--train_file data/demo/train.json: on this machine" in done.stderr
    lines = system_py(*words, "--hub_namespace", "org", "--hub_name", "sys").stdout.splitlines()
    assert len(lines) == 4 and all(
        "--hub_namespace org --hub_name sys --push_to_hub" in line for line in lines
    )
    trained = [line for line in lines if "launch_folds.sh" in line]
    assert trained == [line for line in lines if line.endswith(" --jobs l4x1 --timeout 6h")]
    assert all("--augmented_file org/sys-augmented:augmented.parquet" in line for line in trained)


def test_a_stage_that_fails_ends_the_system_with_its_status(system_py: System, tmp_path: Path):
    content = {
        "output": str(tmp_path / "x"),
        "data": {"train_file": str(tmp_path / "gone.json")},
        "runs": {"probe": {"script": "linear_probe.py", "model_name_or_path": "nowhere"}},
        "ensemble": {},
    }
    (tmp_path / "system.yaml").write_text(yaml.safe_dump(content))
    done = system_py(tmp_path / "system.yaml")
    assert done.returncode == 2 and "gone.json: no such file" in done.stderr
    assert "probe: ended with status 2" in done.stderr and not (tmp_path / "x").exists()


def test_extra_rows_are_for_runs_that_train(system_py: System, tmp_path: Path):
    data = {"train_file": "data/demo/train.json", "extra_train_file": "label_guides/dmrs_examples.csv"}
    content = {"output": str(tmp_path / "x"), "data": data, "ensemble": {}}
    content["runs"] = {name: {"script": f"{name}.py"} for name in ("linear_probe", "zero_shot")}
    (tmp_path / "system.yaml").write_text(yaml.safe_dump(content))
    lines = system_py(tmp_path / "system.yaml", "--dry_run").stdout.splitlines()
    assert ["--extra_train_file" in line for line in lines] == [True, False, False]
