"""run_classification.py as a user runs it, on tiny models: training, resuming, reloading, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_script, words_of
from tiny_models import make_tiny_decoder, make_tiny_encoder, store_in_4bit

import run_classification
from rareturn.command_line import parse_arguments
from rareturn.data.folds import assign_folds
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import load_rows
from rareturn.models import losses
from rareturn.models.inference import segment_name
from rareturn.models.loading import LOADING, find_base_model, load_tokenizer, load_trained
from rareturn.models.training import (
    RowBatches,
    StepBatchSampler,
    class_weights,
)
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN, TEST = str(ROOT / "data/demo/train.json"), str(ROOT / "data/demo/test.json")
GUIDE = load_label_guide("label_guides/dmrs.yaml")
SMALL = {"max_train_samples": 48, "num_train_epochs": 2, "learning_rate": 3e-3, "num_folds": 3}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def command(model: str, output_dir: Path, **flags: object) -> list[str]:
    """The words after `python run_classification.py`, see `words_of`."""
    settings = {"model_name_or_path": model, "train_file": TRAIN, "output_dir": output_dir, **SMALL}
    return words_of(**settings | flags)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Run the script in this process, as from its command line: gives its exit status."""

    def run_here(words: list[str]) -> int:
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        return run_script(run_classification.main, *words)

    return run_here


# ----------------------------------------------------------------------------------------------------- loss and batches


def test_weights_have_mean_one_over_the_rows():
    counts = np.array([296, 108, 61, 99, 84, 48, 172, 968, 28])
    weights = class_weights(counts)
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    assert weights[8] / weights[7] == pytest.approx(np.sqrt(968 / 28))
    # The paper prints w_8 = 1.67, w_5 = 1.29 and w_7 = 0.28.
    assert weights[8] / weights[7] == pytest.approx(1.67 / 0.28, rel=0.02)
    assert weights[8] / weights[5] == pytest.approx(1.67 / 1.29, rel=0.02)
    assert class_weights(np.array([3, 0, 1]), "balanced")[1] == 0
    assert class_weights(counts, "none").tolist() == [1.0] * 9


@pytest.mark.parametrize("scope", [None, [1, 3, 4]])
def test_loss_against_plain_arithmetic(scope: list[int] | None):
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(7, 5)).astype(np.float32), rng.uniform(0.3, 2, 5)
    columns = list(range(5)) if scope is None else scope
    labels = rng.choice(columns, 7)
    expected = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = row[columns] - np.log(np.exp(row[columns]).sum())
        target = np.where(np.array(columns) == label, 0.9, 0.0) + 0.1 / len(columns)
        expected += weights[label] * -(target * log_p).sum()
    loss = losses.step_loss(
        {"logits": torch.from_numpy(logits)},
        torch.from_numpy(labels),
        32,
        class_weights=weights,
        label_smoothing_factor=0.1,
        label_scope=scope,
    )
    assert loss.item() == pytest.approx(expected / 32, rel=1e-5)


def test_loss_is_torchs_without_weights():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    ours = losses.step_loss({"logits": logits}, labels, class_weights=np.ones(4), label_smoothing_factor=0.2)
    assert ours.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2).item()
    )


@pytest.mark.parametrize(("rows", "rows_per_step"), [(100, 16), (16, 16), (17, 16), (5, 16), (64, 8)])
def test_every_row_once_an_epoch_and_the_same_steps_however_they_are_cut(rows: int, rows_per_step: int):
    lengths = np.random.default_rng(1).integers(5, 90, rows).tolist()
    whole, cut = (
        RowBatches(0, rows_per_step, passes, 1, None).plan([], [range(length) for length in lengths], 42)(3)
        for passes in (1, 4)
    )
    assert sorted(index for step in whole for batch in step for index in batch) == list(range(rows))
    sizes = [len(batch) for step in whole for batch in step]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= rows_per_step
    assert all(len(step) == 4 and all(step) for step in cut)
    if rows >= rows_per_step:
        assert [sorted(itertools.chain(*step)) for step in cut] == [sorted(step[0]) for step in whole]
    samplers = [StepBatchSampler(lambda epoch: cut, rank, 2) for rank in range(2)]
    assert len(samplers[0]) == len(samplers[1]) == len(list(samplers[0]))
    assert sorted(itertools.chain(*samplers[0], *samplers[1])) == list(range(rows))


# ------------------------------------------------------------------------------------------------------------- the script


def test_qlora_fold_its_files_and_its_reloaded_adapter(decoder: str, tmp_path: Path, run, capsys):
    run_dir = tmp_path / "qlora"
    words = command(
        decoder, run_dir, quantization="nf4", lora_r=4, lora_alpha=8, test_file=TEST, do_predict=True, logging_steps=1,
        report_to="tensorboard", activation_checkpointing=True, max_seq_length=512, max_turns=6, window_stride=2,
    )  # fmt: skip
    assert run(words) == 0
    assert "fold 0: macro_f1_positive" in capsys.readouterr().out
    fold = run_dir / "fold-0"
    assert sorted(path.name for path in fold.iterdir()) == ["adapter", "logs", "metrics.json"]
    assert not list(fold.rglob("*.bin")) and not list(fold.rglob("*.pt"))
    assert list((fold / "logs").glob("events.out.tfevents.*"))
    config = json.loads((fold / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == decoder and config["modules_to_save"] == ["score"]
    weights = modeling_keys(fold / "adapter/adapter_model.safetensors")
    assert [name for name in weights if "score" in name] == ["base_model.model.score.weight"]

    rows = load_rows(TRAIN, GUIDE)
    folds = assign_folds(rows, 3, 42, "dialogue")
    held_out = [row for row in rows if folds[row.id] == 0]
    table = read_table(run_dir / "oof/fold-0.parquet")
    assert table.id == [row.id for row in held_out] and table.label.tolist() == [
        row.label for row in held_out
    ]
    test = read_table(run_dir / "test/fold-0.parquet")
    assert len(test) == 40 and set(test.label) == {-1} and set(test.fold) == {0}
    info = json.loads((run_dir / "run.json").read_text())
    assert info["label_names"] == GUIDE.names and info["loader"]["quantization"] == "nf4"
    assert info["packages"]["torch"] and info["recipe"]["lora_r"] == 4

    # A stranger's way back, without our loader: base in 4 bits, adapter on top, one row at a time.
    base = find_base_model(
        decoder, **{name: info["loader"][name] for name in LOADING if name in info["loader"]}
    )
    tokenizer = load_tokenizer(base)
    rendered = Renderer(tokenizer, GUIDE, is_encoder=False, **info["window"]).render(held_out)
    model = load_trained(base, fold / "adapter", GUIDE.names, tokenizer.pad_token_id).eval()
    batches = RowBatches(tokenizer.pad_token_id, 1, 1, 1, None)
    with torch.inference_mode():
        alone = torch.cat([model(**batches.collate([row])).logits for row in rendered[:12]]).float().numpy()
    # Packed in training, alone here: the same sums in another order, in bf16, by whichever kernel the processor has.
    bf16_noise = 6e-2
    assert np.ptp(table.logits[:12], axis=0).mean() > 5 * bf16_noise
    assert np.abs(alone - table.logits[:12]).max() < bf16_noise

    # The same loader gives the same logits: tables lost, the script makes them from the saved adapter.
    (run_dir / "oof/fold-0.parquet").unlink()
    before = (fold / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert run(words) == 0
    again = read_table(run_dir / "oof/fold-0.parquet")
    assert np.abs(again.logits - table.logits).max() <= 1e-4
    assert (fold / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_base_that_is_stored_in_4_bits(decoder: str, tmp_path: Path, run, capsys):
    base, run_dir = store_in_4bit(decoder, tmp_path / "stored"), tmp_path / "run"
    flags = {"lora_r": 4, "num_train_epochs": 1, "max_train_samples": 16, "max_seq_length": 512}
    assert run(command(base, run_dir, **flags)) == 2 and not run_dir.exists()
    assert "its weights are in 4 bits already: give --quantization nf4" in capsys.readouterr().err
    assert run(command(base, run_dir, quantization="nf4", **flags)) == 0
    assert np.isfinite(read_table(run_dir / "oof/fold-0.parquet").logits).all()
    weights = modeling_keys(run_dir / "fold-0/adapter/adapter_model.safetensors")
    assert [name for name in weights if "score" in name] == ["base_model.model.score.weight"]


def modeling_keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_a_full_fine_tune_is_a_whole_model(encoder: str, tmp_path: Path, run, pooling: str):
    run_dir = tmp_path / "full"
    assert (
        run(command(encoder, run_dir, tuning="full", pooling=pooling, max_seq_length=48, label_scope="1-8"))
        == 0
    )
    table = read_table(run_dir / "oof/fold-0.parquet")
    assert (table.logits[:, 0] == -1e4).all() and np.abs(table.logits[:, 1:]).max() < 1e3
    assert (table.label == 0).any(), "a specialist still scores every row"
    adapter = run_dir / "fold-0/adapter"
    model_type = json.loads((adapter / "config.json").read_text())["model_type"]
    assert model_type == {"native": "bert", "mean": "segment_mean_classifier"}[pooling]
    base = find_base_model(encoder, pooling=pooling)
    model = load_trained(base, adapter, GUIDE.names, 0).eval()
    folds = assign_folds(load_rows(TRAIN, GUIDE), 3, 42, "dialogue")
    rows = [row for row in load_rows(TRAIN, GUIDE) if folds[row.id] == 0][:5]
    tokenizer = load_tokenizer(base)
    rendered = Renderer(tokenizer, GUIDE, is_encoder=True, max_seq_length=48).render(rows)
    collate = RowBatches(0, 1, 1, 1, segment_name(base, tokenizer)).collate
    with torch.inference_mode():
        logits = model(**collate(rendered)).logits.numpy()
    assert np.abs(logits[:, 1:] - table.logits[:5, 1:]).max() < 1e-4


def test_a_killed_fold_resumes_to_the_same_bytes_and_a_complete_one_is_skipped(
    python: str, encoder: str, tmp_path: Path, run, caplog
):
    flags = {"tuning": "full", "num_train_epochs": 4, "max_seq_length": 48, "bf16": "False"}
    flags |= {"ema_decay": 0.9, "drw_start": 0.6, "r_drop_alpha": 1, "oversample": 0.5}
    assert run(command(encoder, tmp_path / "whole", **flags)) == 0
    killed = tmp_path / "killed"
    words = command(encoder, killed, **flags)
    process = subprocess.Popen([python, str(ROOT / "run_classification.py"), *words], stderr=subprocess.PIPE)
    checkpoints = killed / "fold-0/checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*/sealed.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # to the end of what it writes: its own end
    steps = [int(path.parent.name.split("-")[1]) for path in checkpoints.glob("*/sealed.json")]
    assert max(steps) < 4 * 3, "killed before its last epoch"
    half_written = checkpoints / "checkpoint-99"
    shutil.copytree(checkpoints / f"checkpoint-{max(steps)}", half_written)
    (half_written / "sealed.json").unlink()

    assert run(command(encoder, killed, **(flags | {"learning_rate": 1e-4}))) == 2, (
        "other arguments must not resume"
    )
    assert run(words) == 0
    one, other = (read_table(path / "oof/fold-0.parquet") for path in (tmp_path / "whole", killed))
    assert one.logits.tobytes() == other.logits.tobytes()
    assert not checkpoints.exists()

    stamp = (killed / "fold-0/metrics.json").stat().st_mtime_ns
    caplog.set_level("INFO")
    assert run(words) == 0
    assert "is complete: nothing to train" in caplog.text
    assert (killed / "fold-0/metrics.json").stat().st_mtime_ns == stamp


def test_augmented_rows_train_only_where_their_source_does_and_extra_rows_everywhere(
    encoder: str, tmp_path: Path, run
):
    rows = json.loads(Path(TRAIN).read_text())
    variants = []
    for row in rows:
        if row["label"] in (2, 5, 8):
            turns = [*row["dialogue"][:-1], row["dialogue"][-1] | {"text": "Well, " + row["current_text"]}]
            copy = {"id": f"{row['id']}#aug0", "augmented_from": row["id"], "dialogue": turns}
            variants.append(row | copy | {"current_text": "Well, " + row["current_text"]})
    file = tmp_path / "augmented.jsonl"
    file.write_text("\n".join(map(json.dumps, variants)))
    (tmp_path / "extra.csv").write_text("dialogue_id,speaker,text,label\na,seeker,Fine.,3\nb,seeker,So?,5\n")
    flags = {
        "extra_train_file": tmp_path / "extra.csv",
        "tuning": "full",
        "augmented_file": file,
        "max_seq_length": 32,
        "num_train_epochs": 1,
        "max_train_samples": 999,
    }
    assert run(command(encoder, tmp_path / "run", **flags)) == 0
    folds = json.loads((tmp_path / "run/folds.json").read_text())["folds"]
    assert set(folds) == {row["id"] for row in rows}, "no augmented row has a fold"
    metrics = json.loads((tmp_path / "run/fold-0/metrics.json").read_text())
    trained = sum(fold != 0 for fold in folds.values()) + sum(
        folds[row["augmented_from"]] != 0 for row in variants
    )
    assert metrics["train_rows"] == trained + 2
    table = read_table(tmp_path / "run/oof/fold-0.parquet")
    assert sorted(table.id) == sorted(row_id for row_id, fold in folds.items() if fold == 0)


# ---------------------------------------------------------------------------------------------------------------- refusals


def refusals(tmp_path: Path, encoder: str) -> dict[str, tuple[dict[str, object], str]]:
    (tmp_path / "cut.json").write_text(Path(TRAIN).read_text()[:5000])
    (tmp_path / "unknown.yaml").write_text("learning_rat: 1e-4\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "type.yaml").write_text("num_train_epochs: many\n")
    (tmp_path / "guide.yaml").write_text(
        "task: t\nspeakers: [seeker, supporter]\ntarget_speaker: seeker\nlabels:\n- {number: 0, name: a, definition: d}\n- {number: 1, name: b, definition: d}\n"
    )
    return {
        "truncated": ({"train_file": tmp_path / "cut.json"}, "cut.json: not valid JSON"),
        "missing": ({"train_file": tmp_path / "none.json"}, "none.json: no such file"),
        "recipe key": (
            {"config": tmp_path / "unknown.yaml"},
            "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        "recipe kind": ({"config": tmp_path / "list.yaml"}, "a recipe is a mapping"),
        "recipe value": ({"config": tmp_path / "type.yaml"}, "type.yaml: argument --num_train_epochs"),
        "other guide": ({"label_guide": tmp_path / "guide.yaml"}, "is not in the label guide (0 to 1)"),
        "fold": ({"fold": 7}, "--fold 7 is not one of 0 to 2"),
        "no test file": ({"do_predict": True}, "--do_predict needs a --test_file"),
        "packed encoder": ({"pack_dialogues": "True"}, "--pack_dialogues"),
        "no model": ({"model_name_or_path": tmp_path / "nothing"}, "no such model folder"),
        "best model": ({"load_best_model_at_end": "True"}, "--load_best_model_at_end"),
        "4-bit full": ({"quantization": "nf4"}, "--quantization nf4 needs --tuning lora"),
        "scope": ({"label_scope": "1-12"}, "--label_scope: 9 is not in the label guide"),
        "window": ({"max_seq_length": 6}, "max_seq_length 6 leaves"),
        "push": ({"push_to_hub": "True"}, "--push_to_hub needs --hub_namespace and --hub_name"),
        "nothing to push": (
            {"push_only": True, "hub_namespace": "a", "hub_name": "b"},
            "no fold is complete",
        ),
        "run name": ({"run_name": "../x"}, "--run_name"),
    }


def test_a_mistake_is_one_line_and_exit_2_and_leaves_nothing(encoder: str, tmp_path: Path, run, capsys):
    for name, (flags, message) in refusals(tmp_path, encoder).items():
        run_dir = tmp_path / "out" / "run"
        assert run(command(encoder, run_dir, **({"tuning": "full"} | flags))) == 2, name
        error = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in error if line.startswith("run_classification.py: error: ")]
        assert lines and message in lines[0], (name, error[-3:])
        assert len(lines) <= 21 and "Traceback" not in "".join(error), name
        assert not run_dir.parent.exists(), name


def test_a_folder_of_another_run_is_refused(encoder: str, tmp_path: Path, run, capsys):
    run_dir = tmp_path / "run"
    flags = {"tuning": "full", "max_seq_length": 32, "num_train_epochs": 1}
    assert run(command(encoder, run_dir, **flags)) == 0
    before = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*"))
    assert run(command(encoder, run_dir, fold=1, fold_seed=7, **flags)) == 2
    assert "folds.json: fold_seed: 42 there, 7 asked for" in capsys.readouterr().err
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    "recipe",
    sorted(
        path
        for path in ROOT.glob("recipes/*/*.yaml")
        if path.parent.name != "accelerate" and "\nruns:" not in path.read_text()
    ),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_recipe_parses(recipe: Path):
    words = ["--config", str(recipe), "--bf16", "False"]
    data, model, training = parse_arguments(
        (run_classification.FoldArguments, run_classification.ModelArguments),
        "",
        words,
        training_arguments=run_classification.fold_training_arguments,
    )
    assert data.fold_seed == 42 and data.num_folds == 5 and data.train_file
    assert Path(training.output_dir).parent == Path("outputs")
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert effective in (8, 16) and training.num_train_epochs >= (1 if model.head_init == "probe" else 3)
    plain = training.output_dir in ("outputs/ladder-r0", "outputs/ladder-r1") or recipe.stem == "label-tokens"
    weights = "none" if plain else "balanced" if model.pooling == "turns" else "inverse_sqrt"
    assert model.class_weights == weights and (training.label_smoothing_factor == 0) == plain
