"""The label-token head: labels as the numbers that a causal language model writes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from running import run_script
from tiny_models import make_tiny_decoder, make_tiny_encoder, make_tokenizer
from transformers import AutoModelForCausalLM

import calibrate
import ensemble
import predict
import run_classification
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import LABEL_CUE, Renderer
from rareturn.data.rows import Row, load_rows
from rareturn.decisions.probabilities import softmax
from rareturn.errors import InputError
from rareturn.files import read_json
from rareturn.models.inference import predict_logits
from rareturn.models.label_tokens import label_sequences
from rareturn.models.loading import find_base_model, load_classifier, load_tokenizer
from rareturn.models.packing import PackedBatches, accept_packed, can_branch, lay_out
from rareturn.models.training import RowBatches
from rareturn.models.turns import make_renderer
from rareturn.runs.reading import read_run
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
TRAIN, TEST, GUIDE = (
    str(ROOT / "data/demo" / name) for name in ("train.json", "test.json", "label_guide.yaml")
)
NAMES = load_label_guide(GUIDE).names
WINDOW = {"max_turns": 6, "max_seq_length": 512, "window_stride": 3}
FLAGS = {
    "head": "label_tokens", "train_file": TRAIN, "test_file": TEST, "label_guide": GUIDE, "do_predict": True,
    "num_folds": 2, "max_train_samples": 32, "num_train_epochs": 1, "learning_rate": 3e-3, "lora_r": 4, "lora_dropout": 0,
    "per_device_train_batch_size": 8, "bf16": False, **WINDOW,
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose output matrix is its embeddings."""
    folder = tmp_path_factory.mktemp("decoder")
    return make_tiny_decoder(folder, num_hidden_layers=3, tie_word_embeddings=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def run(decoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "tokens"
    assert [train(decoder, run_dir, fold=fold) for fold in range(2)] == [0, 0]
    return run_dir


def train(model: str, output_dir: Path, **flags: object) -> int:
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    return run_script(
        run_classification.main, model_name_or_path=model, output_dir=output_dir, **FLAGS | flags
    )


def demo(number: int) -> list[Row]:
    return load_rows(TRAIN, load_label_guide(GUIDE))[:number]


def own_logits(model: torch.nn.Module, folder: Path | str, rows: list[Row]) -> np.ndarray:
    """A causal model's logits of the labels' numbers behind each row and the cue, one row at a time."""
    tokenizer = load_tokenizer(find_base_model(str(folder)))
    renderer = Renderer(tokenizer, load_label_guide(GUIDE), is_encoder=False, cue=LABEL_CUE, **WINDOW)
    numbers = tokenizer.convert_tokens_to_ids([str(number) for number in range(len(NAMES))])
    with torch.inference_mode():
        ids = [torch.from_numpy(row.input_ids.astype(np.int64))[None] for row in renderer.render(rows)]
        return np.stack([model(input_ids=row).logits[0, -1, numbers].numpy() for row in ids])


def oof(run_dir: Path) -> np.ndarray:
    return read_table(run_dir / "oof/fold-0.parquet").logits


# -------------------------------------------------------------------------------------------------------------- tokens


def test_a_labels_tokens_are_those_of_its_number_behind_the_prefix():
    tokenizer = make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for prefix in ("Label:", "<eos>", LABEL_CUE):
        sequences = label_sequences(tokenizer, 9, prefix)
        assert all([*ids(prefix), *sequence] == ids(f"{prefix}{n}") for n, sequence in enumerate(sequences))
    assert all(map(len, sequences)) and len(set(sequences)) == 9


def test_labels_that_cannot_be_told_apart_and_prefixes_that_merge_are_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="the tokens of 1 begin those of 10"):
        label_sequences(tokenizer, 11, "Label:")
    tokenizer.add_tokens(["=3"])
    with pytest.raises(InputError, match="3 behind 'Label=' changes the tokens before it"):
        label_sequences(tokenizer, 9, "Label=")


# --------------------------------------------------------------------------------------------------------------- logits

ARCHITECTURES = {
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.5},
    "phi": {},  # with a bias
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_single_rows_have_the_causal_models_own_logits(tmp_path: Path, architecture: str):
    folder = make_tiny_decoder(tmp_path, architecture, **ARCHITECTURES[architecture])
    base, guide, rows = find_base_model(folder, head="label_tokens"), load_label_guide(GUIDE), demo(12)
    tokenizer = load_tokenizer(base)
    renderer = make_renderer(base, tokenizer, guide, WINDOW)
    assert renderer.fingerprint != make_renderer(replace(base, head="classifier"), tokenizer, guide, WINDOW).fingerprint  # fmt: skip
    rendered = renderer.render(rows)
    ids = [row.input_ids for row in rendered]
    assert len(lay_out(ids).input_ids) < 0.5 * sum(map(len, ids)), "rows share their pass in spite of the cue"
    model = load_classifier(base, NAMES, tokenizer.pad_token_id)
    accept_packed(model)
    expected = own_logits(AutoModelForCausalLM.from_pretrained(folder), folder, rows)
    labels, gradients = torch.arange(len(rows)) % 9, []
    assert expected.std() > 0.2
    for way in RowBatches(tokenizer.pad_token_id, 1, 1, 5, None), PackedBatches(branches=can_branch(model)):
        np.testing.assert_allclose(predict_logits(model, way, rows, rendered), expected, atol=1e-5)
        model.zero_grad()
        for batch in way.prediction_batches(rows, rendered):
            logits = model(**way.collate([rendered[index] for index in batch])).logits
            assert logits.shape == (len(batch), 9)
            torch.nn.functional.cross_entropy(logits, labels[batch], reduction="sum").backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_model_with_code_of_its_own_and_no_classifier_of_sequences_is_trained(tmp_path: Path):
    folder = Path(make_tiny_decoder(tmp_path / "own"))
    config = read_json(folder / "config.json")
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (folder / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    flags = {"trust_remote_code": True, "lora_target_modules": ["q_proj"], "do_predict": None}
    assert train(str(folder), tmp_path / "run", **flags) == 0
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model = PeftModel.from_pretrained(base, tmp_path / "run/fold-0/adapter").eval()
    held_out = set(read_table(tmp_path / "run/oof/fold-0.parquet").id)
    rows = [row for row in demo(500) if row.id in held_out][:30]
    np.testing.assert_allclose(own_logits(model, folder, rows), oof(tmp_path / "run")[:30], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_peft_alone_gives_the_out_of_fold_logits(run: Path, decoder: str):
    config = read_json(run / "fold-0/adapter/adapter_config.json")
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None
    assert read_json(run / "run.json")["loader"]["head"] == "label_tokens"
    held_out = set(read_table(run / "oof/fold-0.parquet").id)
    rows = [row for row in demo(500) if row.id in held_out][:30]
    base = AutoModelForCausalLM.from_pretrained(decoder)
    before = own_logits(base, decoder, rows)
    model = PeftModel.from_pretrained(base, run / "fold-0/adapter").eval()
    np.testing.assert_allclose(own_logits(model, decoder, rows), oof(run)[:30], atol=1e-5)
    assert np.abs(before - oof(run)[:30]).max() > 0.1


def test_a_run_goes_through_calibration_blending_and_prediction(run: Path, tmp_path: Path):
    assert run_script(calibrate.main, run=run, method="prior", repeats=1, output=tmp_path / "rule.json") == 0
    flags = {"runs": run, "decision": tmp_path / "rule.json", "repeats": 1, "test_file": TEST}
    assert run_script(ensemble.main, **flags, output_dir=tmp_path / "ensemble") == 0
    output = tmp_path / "labels.jsonl"
    flags = {"ensemble": tmp_path / "ensemble", "input": TEST, "turns": "last"}
    assert run_script(predict.main, **flags, output=output) == 0
    lines, rule = [json.loads(line) for line in output.open()], read_json(tmp_path / "rule.json")
    tables = [table.logits / rule["temperature"] for table in read_run(run, require_test=True).test]
    expected = np.mean([softmax(logits) for logits in tables], axis=0)
    said = [list(line["probabilities"].values()) for line in lines]
    np.testing.assert_allclose(said, expected, atol=1e-5)
    submitted = read_json(tmp_path / "ensemble/prediction.json")
    assert [line["label"] for line in lines] == [row["label"] for row in submitted]


@pytest.mark.parametrize(("tuning", "tied"), [("lora", True), ("full", False)])
def test_upper_layers_alone_are_trained_as_in_the_whole_model(tmp_path: Path, monkeypatch, tuning, tied):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_tiny_decoder(tmp_path / "base", num_hidden_layers=3, tie_word_embeddings=tied)
    flags = {"tuning": tuning, "trainable_layers": 1, "gradient_checkpointing": True, "do_predict": None}
    assert train(model, tmp_path / "cached", **flags) == 0
    assert train(model, tmp_path / "uncached", **flags, trunk_cache_gb=0) == 0
    assert len([*(tmp_path / "cache/rareturn/trunk").glob("*/index.json")]) == 1
    np.testing.assert_allclose(oof(tmp_path / "cached"), oof(tmp_path / "uncached"), atol=1e-4)
    if tuning == "full":
        saved = tmp_path / "cached/fold-0/adapter"
        held_out = set(read_table(tmp_path / "cached/oof/fold-0.parquet").id)
        rows = [row for row in demo(500) if row.id in held_out][:30]
        own = own_logits(AutoModelForCausalLM.from_pretrained(saved), saved, rows)
        np.testing.assert_allclose(own, oof(tmp_path / "cached")[:30], atol=1e-4)


def test_a_step_is_the_same_however_it_is_cut(decoder: str, tmp_path: Path):
    """Trainer would leave out the first label of every batch, as the first token of a text has nothing before it."""
    flags = {
        "no_pack_dialogues": True,
        "do_predict": None,
        "max_grad_norm": 0,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    for name, rows in (("one", 8), ("many", 2)):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        assert train(decoder, tmp_path / name, **flags | sizes) == 0
    np.testing.assert_allclose(oof(tmp_path / "one"), oof(tmp_path / "many"), atol=1e-4)


def test_what_cannot_be_read_at_label_tokens_is_refused_in_one_line(decoder: str, tmp_path: Path, capsys):
    eleven = load_label_guide(GUIDE).to_dict()
    eleven["labels"] += [
        {"number": number, "name": f"label {number}", "definition": ""} for number in (9, 10)
    ]
    guide = tmp_path / "eleven.json"
    guide.write_text(json.dumps(eleven))
    refused = {
        "is for decoders": {"model": make_tiny_encoder(tmp_path / "encoder")},
        "the tokens of 1 begin those of 10": {"label_guide": guide},
        "reads 'lm_head' as it is": {"lora_target_modules": ["q_proj", "lm_head"]},
    }
    for problem, flags in refused.items():
        capsys.readouterr()
        assert train(**{"model": decoder, "output_dir": tmp_path / "run"} | flags) == 2
        assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()
