"""The frozen trunk: equal numbers with and without its cache, and a cache that survives what befalls it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from running import run_script, words_of
from tiny_models import make_tiny_decoder

import augment
import run_classification
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import load_rows
from rareturn.errors import InputError
from rareturn.models import layers, loading, trunk
from rareturn.models.packing import PackedBatches, accept_packed
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN, TEST, GUIDE = (
    str(ROOT / "data/demo" / name) for name in ("train.json", "test.json", "label_guide.yaml")
)
FLAGS = {
    "train_file": TRAIN, "test_file": TEST, "label_guide": GUIDE, "do_predict": True, "num_folds": 3, "max_turns": 6,
    "max_train_samples": 40, "num_train_epochs": 1, "learning_rate": 3e-3, "per_device_train_batch_size": 8,
    "lora_r": 4, "lora_alpha": 8, "trainable_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_decoder(tmp_path_factory.mktemp("decoder"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def trained(decoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold of the flags as they are, in `run`, beside the cache that it filled."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert train(decoder, place / "run") == 0
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/rareturn/trunk"


def train(model: str, output_dir: Path, **flags: object) -> int:
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    return run_script(
        run_classification.main, model_name_or_path=model, output_dir=output_dir, **FLAGS | flags
    )


def logits(run_dir: Path, fold: int = 0) -> np.ndarray:
    """Of the held-out rows and the test rows, one below the other."""
    return np.concatenate(
        [read_table(run_dir / f"{part}/fold-{fold}.parquet").logits for part in ("oof", "test")]
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (run_dir / "fold-0/adapter").glob("*.safetensors")
    return safetensors.torch.load_file(path)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


# ------------------------------------------------------------------------------------------------------------ equality


WAYS = {
    "lora": ("qwen3", {}),
    "full": ("qwen3", {"tuning": "full"}),
    "nf4": ("qwen3", {"quantization": "nf4", "dtype": "float32"}),
    "dropout above the cut": ("llama", {"lora_dropout": 0.3}),
    "sliding windows": ("gemma3_text", {}),
    "rows cut short": ("qwen3", {"max_seq_length": 420}),
    "variants": ("qwen3", {"augmented_file": "augmented.jsonl", "max_train_samples": 90}),
}
CHANGES = {
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
    # Attention dropout in the trunk would make its states a matter of chance; above the cut it stays.
    "llama": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_on_cached_states_is_training_on_the_whole_model(tmp_path: Path, cache: Path, way: str):
    architecture, flags = WAYS[way]
    model = make_tiny_decoder(
        tmp_path / "base", architecture, num_hidden_layers=4, **CHANGES.get(architecture, {})
    )
    flags = {"lora_dropout": 0.0} | flags
    if "augmented_file" in flags:
        flags["augmented_file"] = tmp_path / "augmented.jsonl"
        words = {
            "train_file": TRAIN,
            "label_guide": GUIDE,
            "labels": [2, 5],
            "k": 2,
            "output_file": flags["augmented_file"],
        }
        assert run_script(augment.main, **words) == 0
    assert train(model, tmp_path / "cached", **flags) == 0
    assert len(folders(cache)) == 1
    assert train(model, tmp_path / "uncached", trunk_cache_gb=0, **flags) == 0
    cached, uncached = logits(tmp_path / "cached"), logits(tmp_path / "uncached")
    # nf4 computes its products in bf16, and batches of other shapes round otherwise.
    tolerance = 5e-2 if way == "nf4" else 1e-4
    assert np.ptp(uncached, axis=0).mean() > 10 * tolerance
    np.testing.assert_allclose(cached, uncached, atol=tolerance)
    assert weights(tmp_path / "cached").keys() == weights(tmp_path / "uncached").keys()
    identities = [
        json.loads((tmp_path / run / "run.json").read_text())["identity"] for run in ("cached", "uncached")
    ]
    assert identities[0] == identities[1]


def test_gradients_of_one_step(decoder: str, tmp_path: Path):
    """In float32, to 1e-5: states from the cache against the whole model, on the same batch."""
    guide = load_label_guide(GUIDE)
    rows = load_rows(TRAIN, guide)[:30]
    base = loading.find_base_model(decoder)
    tokenizer = loading.load_tokenizer(base)
    rendered = Renderer(tokenizer, guide, is_encoder=False, max_turns=6, window_stride=6).render(rows)
    numbered, order = trunk.number_tokens(rendered)
    (tmp_path / "states").mkdir()
    trunk.compute_states(numbered, order, base, 2, tmp_path / "states", bf16=False)
    states = trunk.TrunkStates(trunk.whole_parts(tmp_path / "states"))
    results = []
    for place, store in ((base, None), (loading.upper_layers(base, 2), states)):
        torch.manual_seed(0)
        model = loading.load_classifier(place, guide.names, tokenizer.pad_token_id)
        layers.freeze_trunk(model, 2)
        model = loading.add_lora(model, 4, 8, 0.0, ["q_proj", "down_proj"], 2)
        accept_packed(model)
        output = model(**PackedBatches(states=store).collate(numbered)).logits
        torch.nn.functional.cross_entropy(output, torch.tensor([row.label for row in rows])).backward()
        gradients = {
            name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
        }
        results.append((output.detach(), gradients))
    (whole, of_whole), (upper, of_upper) = results
    torch.testing.assert_close(upper, whole, rtol=1e-5, atol=1e-5)
    assert of_whole.keys() == of_upper.keys() and not any(".layers.1." in name for name in of_whole)
    for name, gradient in of_whole.items():
        torch.testing.assert_close(
            of_upper[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
        )


def test_two_processes_take_the_steps_of_one(python: str, decoder: str, tmp_path: Path, cache: Path):
    flags = FLAGS | {
        "model_name_or_path": decoder,
        "lora_dropout": 0,
        "use_cpu": True,
        "pack_dialogues": True,
    }
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = words_of(**flags | {"output_dir": tmp_path / "two", "per_device_train_batch_size": 4})
    command = [*torchrun, str(ROOT / "run_classification.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(folders(cache)) == 1
    # A step of two micro-batches of four rows is cut as two processes cut it.
    one = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "rows_per_batch": 4,
        "trunk_cache_gb": 0,
    }
    assert train(decoder, tmp_path / "one", lora_dropout=0, **one) == 0
    np.testing.assert_allclose(logits(tmp_path / "two"), logits(tmp_path / "one"), atol=1e-4)


def test_the_saved_adapter_on_the_whole_base_by_peft_alone(decoder: str, trained: Path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    saved, guide = trained / "run/fold-0/adapter", load_label_guide(GUIDE)
    assert json.loads((saved / "adapter_config.json").read_text())["layers_to_transform"] == [2, 3]
    base = AutoModelForSequenceClassification.from_pretrained(
        decoder, num_labels=len(guide.labels), dtype="float32"
    )
    model = PeftModel.from_pretrained(base, saved).eval()
    table = read_table(trained / "run/test/fold-0.parquet")
    tokenizer = loading.load_tokenizer(loading.find_base_model(decoder))
    window = json.loads((trained / "run/run.json").read_text())["window"]
    rows = load_rows(TEST, guide, require_labels=False)[:5]
    with torch.inference_mode():
        found = [
            model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0].numpy()
            for row in Renderer(tokenizer, guide, is_encoder=False, **window).render(rows)
        ]
    np.testing.assert_allclose(found, table.logits[:5], atol=1e-4)


def test_a_full_fine_tune_is_saved_whole(decoder: str, tmp_path: Path):
    assert train(decoder, tmp_path / "run", tuning="full") == 0
    base = loading.find_base_model(decoder)
    names, before = load_label_guide(GUIDE).names, loading.load_classifier(base, ["a", "b"], 0).state_dict()
    after = loading.load_trained(base, tmp_path / "run/fold-0/adapter", names, 0).state_dict()
    assert after.keys() == before.keys()
    same = {name for name in before if name != "score.weight" and torch.equal(before[name], after[name])}
    trained = {
        name for name in before if ".layers.2." in name or ".layers.3." in name or name == "model.norm.weight"
    }
    assert same == set(before) - trained - {"score.weight"}


# --------------------------------------------------------------------------------------------------------- one computation


def test_folds_seeds_and_losses_share_one_computation(
    decoder: str, trained: Path, tmp_path: Path, cache: Path, monkeypatch
):
    shutil.copytree(trained / "run", tmp_path / "a")
    shutil.copytree(trained / "cache", tmp_path / "cache")

    def compute_again(*arguments: object, **options: object) -> None:
        raise AssertionError("the trunk was computed again")

    monkeypatch.setattr(trunk, "compute_states", compute_again)
    assert train(decoder, tmp_path / "a", fold=1) == 0
    assert train(decoder, tmp_path / "b", seed=7, class_weights="none", learning_rate=1e-3) == 0
    assert len(folders(cache)) == 1
    with pytest.raises(AssertionError, match="computed again"):
        train(decoder, tmp_path / "c", trainable_layers=1)
    with pytest.raises(AssertionError, match="computed again"):
        train(decoder, tmp_path / "d", max_turns=5)


def test_two_folds_that_start_at_once(python: str, decoder: str, trained: Path, tmp_path: Path):
    command = [python, str(ROOT / "run_classification.py")]
    flags = FLAGS | {"model_name_or_path": decoder, "output_dir": tmp_path / "run", "use_cpu": True}
    started = [
        subprocess.Popen([*command, *words_of(fold=fold, **flags)], stderr=subprocess.PIPE, text=True)
        for fold in (0, 1)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("computed once" in text for text in said) == 1
    np.testing.assert_array_equal(logits(tmp_path / "run"), logits(trained / "run"))


def compute_slowly(model: str, folder: Path) -> None:
    """In a process of its own: compute the states of the demo corpus, a small part at a time."""
    guide = load_label_guide(GUIDE)
    base = loading.find_base_model(model)
    rendered = Renderer(loading.load_tokenizer(base), guide, is_encoder=False, max_turns=6, window_stride=6)
    numbered, order = trunk.number_tokens(rendered.render(load_rows(TRAIN, guide)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk, "PART_BYTES", 1 << 17)
        trunk.compute_states(numbered, order, base, 2, folder, bf16=False)


def test_a_killed_writer_s_parts_are_gone_on_from(decoder: str, tmp_path: Path):
    whole, cut_off = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut_off.mkdir()
    compute_slowly(decoder, whole)
    parts = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(parts) >= 5
    process = multiprocessing.get_context("fork").Process(target=compute_slowly, args=(decoder, cut_off))
    process.start()
    while process.is_alive() and len(list(cut_off.glob("*.safetensors"))) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert trunk.whole_parts(cut_off) is None  # no index, so nobody reads what is there
    kept = {path: path.stat().st_mtime_ns for path in cut_off.glob("*.safetensors")}
    assert kept
    compute_slowly(decoder, cut_off)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in (*parts, trunk.INDEX):
        assert (cut_off / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("damage", ["a bit", "cut short", "gone", "no index"])
def test_a_damaged_cache_is_computed_anew(
    decoder: str, trained: Path, tmp_path: Path, cache: Path, damage: str, caplog
):
    shutil.copytree(trained / "cache", tmp_path / "cache")
    (folder,) = folders(cache)
    part = folder / "00000.safetensors"
    content = bytearray(part.read_bytes())
    if damage == "a bit":
        content[-1] ^= 64
    if damage == "cut short":
        content = content[: len(content) // 2]
    part.write_bytes(content)
    if damage in ("gone", "no index"):
        (part if damage == "gone" else folder / trunk.INDEX).unlink()
    assert train(decoder, tmp_path / "after") == 0
    np.testing.assert_array_equal(logits(tmp_path / "after"), logits(trained / "run"))
    assert ("damaged or missing" in caplog.text) == (damage != "no index")


def test_room_is_made_from_what_was_used_longest_ago(decoder: str, tmp_path: Path, cache: Path):
    for age, name in enumerate(("newer", "older")):
        (cache / name).mkdir(parents=True)
        (cache / name / "00000.safetensors").write_bytes(b"0" * 3_000_000)
        (cache / name / trunk.INDEX).write_text("{}")
        at = time.time() - 1000 * (1 + age)
        os.utime(cache / name / trunk.INDEX, (at, at))
    assert train(decoder, tmp_path / "run", trunk_cache_gb=0.007) == 0
    assert sorted(path.name for path in folders(cache) if len(path.name) < 32) == ["newer"]


def test_too_large_for_the_limit_is_computed_in_every_pass(decoder: str, tmp_path: Path, cache: Path, caplog):
    assert train(decoder, tmp_path / "small", trunk_cache_gb=1e-6) == 0
    assert "more than --trunk_cache_gb 1e-06" in caplog.text and not cache.exists()
    assert train(decoder, tmp_path / "none", trunk_cache_gb=0) == 0
    np.testing.assert_array_equal(logits(tmp_path / "small"), logits(tmp_path / "none"))


def test_a_full_disk_is_one_line(decoder: str, tmp_path: Path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        assert train(decoder, tmp_path / "run") == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists() and not list(disk.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(disk, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"trainable_layers": 0}, "--trainable_layers 0: one layer or more"),
        ({"trainable_layers": 5}, "--trainable_layers 5: "),
    ],
)
def test_a_mistake_is_one_line(decoder: str, tmp_path: Path, capsys, flags: dict[str, object], line: str):
    assert train(decoder, tmp_path / "run", **flags) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert line in said and not (tmp_path / "run").exists()


def test_a_model_that_needs_more_than_the_layer_below_is_refused(tmp_path: Path):
    """Gemma 2 scales its embeddings in a module of their own; a model that did so in its forward would be refused."""
    guide = load_label_guide(GUIDE)
    base = loading.find_base_model(make_tiny_decoder(tmp_path / "base", "gemma2", num_hidden_layers=4))
    rendered = Renderer(loading.load_tokenizer(base), guide, is_encoder=False, max_turns=6, window_stride=6)
    numbered, order = trunk.number_tokens(rendered.render(load_rows(TRAIN, guide)[:4]))
    (rows, begin, end), *_ = trunk.in_passes(numbered, order)
    rows = [numbered[row] for row in rows]
    below = trunk.Trunk(loading.load_classifier(replace(base, layers=(0, 2)), ["a", "b"], 0).eval(), 2)
    assert below.states(rows, begin, end, bf16=False).shape == (end, 64)
    below.is_checked = False
    below.backbone.forward = scaling_forward(below.backbone)
    with pytest.raises(InputError, match="gemma2 layers need more than the layer below"):
        below.states(rows, begin, end, bf16=False)


def scaling_forward(backbone: torch.nn.Module):
    """The backbone's forward, but for one that scales what it embeds and not what it is given."""
    forward, embed = backbone.forward, backbone.get_input_embeddings()

    def scaling(input_ids: torch.Tensor | None = None, **inputs: object):
        if input_ids is not None:
            inputs["inputs_embeds"] = 3 * embed(input_ids)
        return forward(**inputs)

    return scaling
