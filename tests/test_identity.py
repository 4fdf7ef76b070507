"""A run's identity: no folder ever mixes folds of two runs, whatever changes between two launches."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import run_script
from tiny_models import make_tiny_encoder

import linear_probe
import run_classification
from rareturn.command_line import HubArguments, parse_arguments
from rareturn.errors import InputError
from rareturn.files import read_json, write_json
from rareturn.runs.folder import adapter_dir, metrics_path, run_recipe, table_path
from rareturn.runs.reading import read_run
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN, TEST = str(ROOT / "data/demo/train.json"), str(ROOT / "data/demo/test.json")
GUIDE = str(ROOT / "label_guides/dmrs.yaml")
PAIRS = {"probe": 120, "fold": 80}
UNCHANGED = None  # what is expected where the logits must stay; otherwise what the refusal must name


class World:
    """A complete fold of each script, and files and models that differ from theirs by one thing."""

    def __init__(self, place: Path):
        self.place = place
        self.model = make_tiny_encoder(place / "encoder")
        shutil.copytree(self.model, place / "moved-encoder")
        make_tiny_encoder(place / "other-encoder", seed=1)
        records = json.loads(Path(TRAIN).read_text(encoding="utf-8"))
        target = records[3]["dialogue"][-1]
        self._write("moved.json", records)
        self._write(
            "label.json", [row | {"label": 1 - row["label"] % 2} for row in records[:1]] + records[1:]
        )
        changed = {"current_text": "Other words.", "dialogue": [target | {"text": "Other words."}]}
        self._write("text.json", [*records[:3], records[3] | changed, *records[4:]])
        self._write("order.json", records[::-1])
        variant = {"id": f"{records[3]['id']}#aug0", "augmented_from": records[3]["id"]}
        self._write("augmented.json", [records[3] | variant])
        guide = yaml.safe_load(Path(GUIDE).read_text(encoding="utf-8"))
        guide["labels"][0]["definition"] += " Indeed."
        (place / "guide.yaml").write_text(yaml.safe_dump(guide))
        shutil.copy(GUIDE, place / "moved-guide.yaml")
        common = {"train_file": TRAIN, "num_folds": 3, "model_name_or_path": self.model}
        self.flags = {
            "probe": common | {"C": [1]},
            "fold": common
            | {"tuning": "full", "max_seq_length": 32, "num_train_epochs": 1, "max_train_samples": 24}
            | {"save_strategy": "no", "learning_rate": 3e-3},
        }
        self.mains = {"probe": linear_probe.main, "fold": run_classification.main}
        for kind in self.flags:
            assert self.launch(kind, place / kind) == 0

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.place / name).write_text(json.dumps(rows), encoding="utf-8")

    def launch(self, kind: str, run_dir: Path, **changes: object) -> int:
        return run_script(self.mains[kind], **self.flags[kind] | {"output_dir": run_dir} | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def mutations(kind: str, place: Path) -> list[tuple[str, Callable[[random.Random], object], str | None]]:
    """(flag, another value of it, what the refusal names)."""

    def one_of(*values: object) -> Callable[[random.Random], object]:
        return lambda rng: rng.choice(values)

    def number(low: float, high: float) -> Callable[[random.Random], object]:
        return lambda rng: rng.uniform(low, high)

    refused: dict[str, Callable[[random.Random], object]] = {
        "seed": lambda rng: rng.randrange(43, 999),
        "fold_seed": lambda rng: rng.randrange(43, 999),
        "num_folds": one_of(2, 4, 5),
        "fold_groups": one_of("none"),
        "label_scope": one_of("1-8", "0-7"),
        "max_turns": one_of(10, 20, 40),
        "max_seq_length": lambda rng: rng.randrange(40, 400),
        "window_stride": lambda rng: rng.randrange(1, 9),
        "dtype": one_of("bfloat16"),
        "bf16": one_of(True),
        "attn_implementation": one_of("eager"),
        "class_weights": one_of("none"),
        "per_device_eval_batch_size": lambda rng: rng.randrange(33, 64),
    }
    if kind == "probe":
        refused |= {"layer": one_of(2), "C": one_of([2], [1, 10])}
    else:
        refused |= {
            "learning_rate": number(1e-4, 2e-3),
            "weight_decay": number(0.1, 0.5),
            "label_smoothing_factor": number(0.1, 0.5),
            "max_grad_norm": number(0.1, 0.5),
            "adam_beta1": number(0.5, 0.8),
            "num_train_epochs": one_of(2, 3),
            "warmup_steps": one_of(0.1, 3),
            "lr_scheduler_type": one_of("constant", "cosine"),
            "optim": one_of("sgd", "adafactor"),
            "gradient_accumulation_steps": one_of(2, 3),
            "per_device_train_batch_size": one_of(2, 4),
            "tokens_per_batch": one_of(512, 1024),
            "max_train_samples": one_of(20, 25),
            "pooling": one_of("mean"),
            "lora_r": one_of(4, 8),
            "full_determinism": one_of(True),
            "loss": one_of("focal", "ldam", "distance"),
            "ema_decay": one_of(0.9, 0.99),
            "r_drop_alpha": number(0.1, 2),
            "oversample": number(0.1, 1),
        }
    unchanged: dict[str, Callable[[random.Random], object]] = {
        "run_name": one_of("a", "b"),
        "test_file": one_of(TEST),
        "hub_name": one_of("x"),
        "label_guide": one_of(place / "moved-guide.yaml"),
        "train_file": one_of(place / "moved.json"),
        "model_name_or_path": one_of(place / "moved-encoder"),
    }
    if kind == "fold":
        unchanged |= {
            "logging_steps": one_of(1, 7),
            "save_strategy": one_of("epoch", "steps"),
            "disable_tqdm": one_of(True),
            "dataloader_prefetch_factor": one_of(None),
            "keep_checkpoints": one_of(True),
            "use_cpu": one_of(True),
        }
    by_content = [
        (
            "train_file",
            one_of(place / "text.json", place / "label.json", place / "order.json"),
            "--train_file",
        ),
        ("augmented_file", one_of(place / "augmented.json"), "--augmented_file"),
        ("extra_train_file", one_of("label_guides/dmrs_examples.csv"), "--extra_train_file"),
        ("model_name_or_path", one_of(place / "other-encoder"), "weights of --model_name_or_path"),
        ("label_guide", one_of(place / "guide.yaml"), "--label_guide"),
    ]
    cases = [(flag, make, flag) for flag, make in refused.items()] + by_content
    return cases + [(flag, make, UNCHANGED) for flag, make in unchanged.items()]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_change_between_two_folds_leaves_the_logits_or_is_refused_by_name(kind: str, world: World, capsys):
    cases, rng = mutations(kind, world.place), random.Random(kind)
    endings = {0: 0, 2: 0}
    whole = world.place / kind
    expected = table_path(whole, "oof", 0).read_bytes()
    run_dir = world.place / "copies" / kind
    for number in range(PAIRS[kind]):
        flag, make, named = cases[number] if number < len(cases) else rng.choice(cases)
        value = make(rng)
        # Every other time the trained model is there and only what was made of it is lost.
        shutil.copytree(whole, run_dir)
        metrics_path(run_dir, 0).unlink()
        table_path(run_dir, "oof", 0).unlink()
        if number % 2:
            shutil.rmtree(adapter_dir(run_dir, 0), ignore_errors=True)
        before = sorted(run_dir.rglob("*"))
        capsys.readouterr()
        status = world.launch(kind, run_dir, **{flag: value})
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if ".py: error: " in line]
        endings[status] += 1
        if named is UNCHANGED:
            assert status == 0, (flag, value, lines)
            assert table_path(run_dir, "oof", 0).read_bytes() == expected, (flag, value)
        else:
            assert status == 2 and named in lines[0], (flag, value, lines)
            assert sorted(run_dir.rglob("*")) == before, (flag, value)
        shutil.rmtree(run_dir)
    assert min(endings.values()) > PAIRS[kind] // 10, endings


def test_every_flag_that_differs_is_a_line_with_both_values(world: World, capsys):
    changes = {"seed": 2, "max_turns": 5, "window_stride": 5, "learning_rate": 1e-4}
    assert world.launch("fold", world.place / "fold", fold=1, **changes) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    there = {"seed": 42, "max_turns": 30, "window_stride": 10, "learning_rate": 0.003}
    assert [line.split("run.json: ")[1] for line in lines] == [
        f"--{flag}: {there[flag]} there, {changes[flag]} asked for; use another --output_dir"
        for flag in sorted(changes)
    ]


def test_run_json_holds_the_identity_and_only_secrets_are_left_out_of_the_recipe(world: World):
    words = [
        "--model_name_or_path",
        "m",
        "--output_dir",
        "o",
        "--tokens_per_batch",
        "512",
        "--hub_token",
        "hf_x",
    ]
    *own, _, training = parse_arguments(
        (run_classification.FoldArguments, run_classification.ModelArguments, HubArguments),
        "",
        words,
        training_arguments=run_classification.fold_training_arguments,
    )
    recipe = run_recipe(*own, training)
    assert recipe["tokens_per_batch"] == 512 and recipe["model_name_or_path"] == "m"
    assert "hf_x" not in json.dumps(recipe)
    identity = read_json(world.place / "fold/run.json")["identity"]
    assert len(identity["digest"]) == 64 and identity["flags"]["learning_rate"] == 0.003
    assert identity["processes"] == 1 and identity["base_model"] is None


@pytest.mark.parametrize("kind", PAIRS)
def test_a_run_without_identity_is_read_but_not_trained_on(kind: str, world: World, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(world.place / kind, run_dir)
    info = read_json(run_dir / "run.json")
    del info["identity"]
    write_json(run_dir / "run.json", info)
    assert world.launch(kind, run_dir) == 2
    assert "run.json: no identity" in capsys.readouterr().err
    if kind == "probe":
        assert read_run(run_dir).info["name"] == "probe"
    (run_dir / "run.json").unlink()
    assert world.launch(kind, run_dir) == 2
    assert "run.json: missing, so nothing says how" in capsys.readouterr().err


def test_a_label_scope_that_is_text_is_a_line(world: World, tmp_path: Path):
    shutil.copytree(world.place / "probe", tmp_path / "run")
    info = read_json(tmp_path / "run/run.json")
    write_json(tmp_path / "run/run.json", info | {"label_scope": "1-8", "seed": "x"})
    with pytest.raises(InputError) as caught:
        read_run(tmp_path / "run")
    assert len(caught.value.problems) == 2 and "run.json: label_scope: " in str(caught.value)


def test_a_fold_s_test_table_follows_the_test_file_without_training(world: World, tmp_path: Path, capsys):
    run_dir, test_file = tmp_path / "run", tmp_path / "test.json"
    records = json.loads(Path(TEST).read_text(encoding="utf-8"))
    test_file.write_text(json.dumps(records))
    flags = {"do_predict": True, "test_file": test_file}
    assert world.launch("fold", run_dir, **flags) == 0
    first = table_path(run_dir, "test", 0).read_bytes()
    kept = {
        path: path.stat().st_mtime_ns
        for path in run_dir.rglob("*")
        if path.is_file() and "test" not in path.parts
    }
    for record in records:
        record["current_text"] = record["dialogue"][-1]["text"] = "Something else altogether."
    test_file.write_text(json.dumps(records))
    assert world.launch("fold", run_dir, **flags) == 0
    assert table_path(run_dir, "test", 0).read_bytes() != first
    assert world.launch("fold", run_dir, **flags | {"test_file": TEST}) == 0
    assert table_path(run_dir, "test", 0).read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert read_table(table_path(run_dir, "test", 0)).rows is not None


def test_push_only_pushes_every_complete_fold(world: World, tmp_path: Path, hub_here):
    run_dir = tmp_path / "run"
    for fold in (0, 2):
        assert world.launch("fold", run_dir, fold=fold) == 0
    absent = {"model_name_or_path": "./absent", "train_file": "absent.json"}
    where = {"hub_namespace": "lab", "hub_name": "sys", "push_only": True}
    assert world.launch("fold", run_dir, fold=1, **absent, **where) == 0
    pushed = hub_here.files("lab/sys-run")
    assert {name.split("/")[0] for name in pushed if name.startswith("fold-")} == {"fold-0", "fold-2"}


def test_rows_too_few_for_a_step_and_a_training_that_diverges_are_a_line(
    world: World, tmp_path: Path, capsys
):
    few = {"gradient_accumulation_steps": 64, "max_train_samples": 24}
    assert world.launch("fold", tmp_path / "few", **few) == 2
    assert "24 training rows cannot fill the 64 batches of a step" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()
    assert (
        world.launch("fold", tmp_path / "wild", learning_rate=1e38, max_grad_norm=0, save_strategy="epoch")
        == 2
    )
    assert "training diverged" in capsys.readouterr().err
    assert not list((tmp_path / "wild/fold-0").glob("*"))
    assert world.launch("fold", tmp_path / "nan", learning_rate="nan") == 2
    assert "--learning_rate: nan is not a number" in capsys.readouterr().err
    assert not (tmp_path / "nan").exists()


def test_precision_does_not_depend_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for has_units in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=has_units: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=has_units: answer)
        arguments = run_classification.fold_training_arguments()
        assert arguments(str(tmp_path), use_cpu=True).bf16 is False
        assert arguments(str(tmp_path), use_cpu=True, bf16=True).bf16 is True
