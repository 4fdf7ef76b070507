"""Features that are kept: equal with and without the cache, from a trunk's states, of several layers in one pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_script
from tiny_models import make_tiny_decoder, make_tiny_encoder
from transformers import AutoConfig, AutoModel

import ensemble
import linear_probe
import predict
import run_classification
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import load_rows
from rareturn.decisions.probabilities import softmax
from rareturn.models import probing, trunk
from rareturn.models.loading import find_base_model
from rareturn.models.probing import FrozenFeatures
from rareturn.runs.reading import read_run

DEMO = Path(__file__).parent.parent / "data/demo"
GUIDE = load_label_guide("label_guides/dmrs.yaml")
WINDOW = {"max_turns": 6, "max_seq_length": 700, "window_stride": 6}
ROWS = {"train_file": DEMO / "train.json", "test_file": DEMO / "test.json", "num_folds": 3, **WINDOW}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    return {
        "encoder": make_tiny_encoder(place / "encoder", num_hidden_layers=6),
        "decoder": make_tiny_decoder(place / "decoder", num_hidden_layers=6),
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/rareturn/trunk"


def probe(model: str, output_dir: Path, **flags: object) -> int:
    words = ROWS | {"model_name_or_path": model, "output_dir": output_dir, "run_name": "probe", "C": 3}
    return run_script(linear_probe.main, **words | flags)


def made(run_dir: Path) -> dict[str, bytes]:
    """Heads and tables."""
    paths = [*run_dir.rglob("*.parquet"), *run_dir.rglob("*.safetensors")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def features(model: str, layer: object) -> np.ndarray:
    frozen = FrozenFeatures(find_base_model(model), GUIDE, layer, WINDOW, 16, bf16=False)
    return frozen.extract(load_rows(str(DEMO / "train.json"), GUIDE)[:40])


ENCODERS = ("bert", "mpnet", "deberta-v2", "modernbert")


@pytest.mark.parametrize("architecture", [*ENCODERS, "qwen3", "gemma3_text"])
def test_several_layers_in_one_pass_are_the_layers_one_by_one(architecture, models, tmp_path):
    if architecture in ENCODERS:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 3000}
        shape |= dict.fromkeys(
            ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
        )
        config = AutoConfig.for_model(architecture, **shape, num_attention_heads=4, initializer_range=0.2)
        make_tiny_encoder(tmp_path)
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(tmp_path)
    else:
        make_tiny_decoder(tmp_path, architecture, num_hidden_layers=3)
    one_by_one = [features(str(tmp_path), layer) for layer in (1, 2, 3)]
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 0.1
    np.testing.assert_allclose(
        features(str(tmp_path), [1, 2, 3]), np.hstack(one_by_one), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_second_run_over_the_same_rows_computes_no_pass(kind, models, tmp_path, monkeypatch, capsys):
    model = models[kind]
    assert probe(model, tmp_path / "first") == 0
    assert probe(model, tmp_path / "uncached", trunk_cache_gb=0) == 0
    assert probe(model, tmp_path / "too-large", trunk_cache_gb=1e-6) == 0
    assert made(tmp_path / "first") == made(tmp_path / "uncached") == made(tmp_path / "too-large")
    assert probe(model, tmp_path / "first", trunk_cache_gb=0) == 0  # the same run, which is complete
    assert probe(model, tmp_path / "uncached-layers", layer=[2, 4], trunk_cache_gb=0) == 0

    def load_again(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(FrozenFeatures, "load", load_again)
    others = [
        {"class_weights": "none"},
        {"C": 1},
        {"label_scope": "1-8"},
        {"seed": 7, "C": [1, 9]},
        {"fold_seed": 7},
    ]
    for number, other in enumerate([*others, {"fold_groups": "none"}, {"layer": 2}]):
        assert probe(model, tmp_path / f"run-{number}", **other) == 0, other
        assert made(tmp_path / f"run-{number}") != made(tmp_path / "first")
    moved = shutil.copytree(model, tmp_path / "moved")
    assert probe(str(moved), tmp_path / "of-moved") == 0
    assert made(tmp_path / "of-moved") == made(tmp_path / "first")
    assert probe(model, tmp_path / "layers", layer=[4, 2, 4]) == 0
    assert made(tmp_path / "layers") == made(tmp_path / "uncached-layers")
    assert read_run(tmp_path / "first").info["features"]["layer"] == 4
    assert read_run(tmp_path / "run-6").info["recipe"]["layer"] == 2  # as before there were several
    assert read_run(tmp_path / "layers").info["features"]["layer"] == [2, 4]
    rows_change = {"max_turns": 5} if kind == "decoder" else {"max_seq_length": 8}  # of a turn
    for other in ({"layer": 5}, rows_change, {"bf16": True}):
        with pytest.raises(AssertionError, match="the model was loaded"):
            probe(model, tmp_path / "other", **other)
    assert probe(model, tmp_path / "other", layer=[2, 7]) == 2
    assert f"--layer 7: {model} has layers 1 to 6\n" in capsys.readouterr().err


def test_what_another_length_of_passes_left_is_not_gone_on_from(models, tmp_path, cache, monkeypatch):
    """The parts of a killed process hold other rows than those that are computed now."""
    monkeypatch.setattr(trunk, "PART_BYTES", 1 << 16)
    for tokens in (400, 2000):
        for module in (trunk, probing):
            monkeypatch.setattr(module, "TOKENS_PER_BATCH", tokens)
        assert probe(models["decoder"], tmp_path / f"cached-{tokens}") == 0
        parts = [sorted(folder.glob("*.safetensors")) for folder in cache.iterdir() if folder.is_dir()]
        assert any(len(of_folder) > 1 for of_folder in parts)
        for first, *others in filter(None, parts):  # of the training rows, and of the test rows
            for path in (first.with_name(trunk.INDEX), *others):
                path.unlink(missing_ok=True)
    assert probe(models["decoder"], tmp_path / "uncached", trunk_cache_gb=0) == 0
    assert made(tmp_path / "cached-2000") == made(tmp_path / "uncached")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers_that_training_left_in_the_cache_are_not_computed(kind, models, tmp_path, monkeypatch, caplog):
    model, own = models[kind], {"pooling": "turns", "tuning": "full"} if kind == "encoder" else {}
    flags = {"max_train_samples": 16, "num_train_epochs": 1, "lora_r": 4, "trainable_layers": 2} | own
    flags |= {"model_name_or_path": model, "output_dir": tmp_path / "trained"}
    assert run_script(run_classification.main, **ROWS | flags) == 0
    caplog.set_level("INFO")
    cut, seen, load = 2 if kind == "encoder" else 4, [], probing.load_classifier
    monkeypatch.setattr(
        probing, "load_classifier", lambda base, *what: [seen.append(base), load(base, *what)][1]
    )
    for layer in (cut, 5, [cut, 6]):
        name = f"layer-{layer}"
        caplog.clear()
        assert probe(model, tmp_path / name, layer=layer) == 0
        last = layer if isinstance(layer, int) else 6
        assert f"{cut} of {last} layers are in the cache" in caplog.text
        assert kind == "encoder" or seen[-1].layers == (4, 6)
        assert probe(model, tmp_path / f"{name}-0", layer=layer, trunk_cache_gb=0) == 0
        assert seen[-1].layers is None
        found, expected = (read_run(tmp_path / there, require_test=True) for there in (name, f"{name}-0"))
        for one, other in zip([found.oof, *found.test], [expected.oof, *expected.test], strict=True):
            np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-2)
    # The features themselves, to float32's precision.
    rows = (
        load_rows(str(ROWS["train_file"]), GUIDE),
        load_rows(str(ROWS["test_file"]), GUIDE, require_labels=False),
    )
    whole = FrozenFeatures(find_base_model(model), GUIDE, [cut, 6], WINDOW, 32, bf16=False)
    caplog.clear()
    cached = whole.extract_cached(rows, [*rows[0], *rows[1]], None, 1.0)
    assert "computed once" not in caplog.text
    for part, uncached in zip(cached, whole.extract_cached(rows, [], None, 0), strict=True):
        np.testing.assert_allclose(part, uncached, rtol=1e-5, atol=1e-5 * np.abs(uncached).max())
    # Below the cut nothing is known.
    caplog.clear()
    assert probe(model, tmp_path / "below", layer=cut - 1) == 0
    assert "layers are in the cache" not in caplog.text


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_bundle_of_probes_predicts_what_its_runs_say(kind, models, tmp_path):
    """Of one layer, with whose lower layers the bundle shares the computation; of several; and of pairs."""
    probes = {"one": {"layer": 4}, "several": {"layer": [2, 5]}}
    probes |= {"pairs": {"layer": [2, 3], "pairs": True}} if kind == "encoder" else {}
    for name, flags in probes.items():
        assert probe(models[kind], tmp_path / name, run_name=name, **flags) == 0
    runs, test = [tmp_path / name for name in probes], {"test_file": ROWS["test_file"]}
    flags = {"runs": runs, "method": "prior", "repeats": 1, "output_dir": tmp_path / "blend"}
    assert run_script(ensemble.main, **flags | test) == 0
    flags = {"ensemble": tmp_path / "blend", "input": ROWS["test_file"], "turns": "last"}
    assert run_script(predict.main, **flags, output=tmp_path / "labels.jsonl") == 0
    temperature = json.loads((tmp_path / "blend/ensemble.json").read_text())["decision"]["temperature"]
    of_runs = [
        np.mean(
            [softmax(table.logits / temperature) for table in read_run(run, require_test=True).test], axis=0
        )
        for run in runs
    ]
    with (tmp_path / "labels.jsonl").open() as lines:
        said = np.array([list(json.loads(line)["probabilities"].values()) for line in lines])
    assert np.abs(of_runs[0] - of_runs[1]).max() > 0.02
    np.testing.assert_allclose(said, np.mean(of_runs, axis=0), atol=1e-4)
