"""What is loaded is what was saved, what cannot be loaded is refused in one line, and nothing else is said."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packing import GUIDE, PAD, demo_rows
from tiny_models import make_tiny_decoder, make_tiny_encoder, store_in_4bit
from transformers import AutoConfig

from rareturn.data.rendering import Renderer
from rareturn.errors import InputError
from rareturn.files import check_content
from rareturn.models.loading import (
    add_lora,
    find_base_model,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trained,
    save_trained,
)
from rareturn.models.training import RowBatches
from rareturn.runs.bundle import Loader

ROOT = Path(__file__).resolve().parent.parent


def in_a_process(
    code: str, *words: object, executable: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("bart", "bart is an encoder-decoder; give an encoder or a decoder"),
        ("t5", "t5 is an encoder-decoder; give an encoder or a decoder"),
        ("vit", "vit is not a text encoder or decoder that transformers knows"),
    ],
)
def test_what_is_neither_encoder_nor_decoder_is_refused(tmp_path, model_type, said):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    base = find_base_model(str(tmp_path))
    for load in (load_config, lambda base: load_classifier(base, GUIDE.names, 0)):
        with pytest.raises(InputError) as refused:
            load(base)
        assert refused.value.lines() == [f"{tmp_path}: {said}"]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_loading_is_silent_about_a_new_head_but_not_about_the_backbone(tmp_path, kind, caplog, capfd):
    folder = Path({"decoder": make_tiny_decoder, "encoder": make_tiny_encoder}[kind](tmp_path / kind))
    poolings = ["native", "mean"] if kind == "encoder" else ["native"]
    for pooling in poolings:
        load_classifier(find_base_model(str(folder), pooling=pooling), GUIDE.names, PAD)
    out, err = capfd.readouterr()
    assert not caplog.messages and "Loading weights" not in err and "LOAD REPORT" not in out + err
    weights = load_file(folder / "model.safetensors")
    name = min(key for key in weights if "layer" in key and weights[key].ndim == 2)
    for pooling in poolings:
        for change, said in ((None, "missing"), (torch.ones(3, 5), "shaped otherwise")):
            changed = {key: value for key, value in weights.items() if key != name or change is not None}
            if change is not None:
                changed[name] = change
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
            with pytest.raises(InputError, match=f"weights {said} in its files: 1, such as .*{name[-20:]}"):
                load_classifier(find_base_model(str(folder), pooling=pooling), GUIDE.names, PAD)


def test_a_trained_adapter_loads_without_a_word(tmp_path, caplog, capfd):
    base = find_base_model(make_tiny_decoder(tmp_path / "decoder"))
    model = add_lora(load_classifier(base, GUIDE.names, PAD), 4, 8, 0.0, ["q_proj"])
    save_trained(model, load_tokenizer(base), base, tmp_path / "adapter")
    caplog.clear()
    capfd.readouterr()
    loaded = load_trained(base, tmp_path / "adapter", GUIDE.names, PAD)
    assert not caplog.messages and capfd.readouterr() == ("", "")
    assert torch.equal(
        loaded.base_model.model.score.weight.float(), model.base_model.model.score.weight.float()
    )


def test_a_saved_mean_pooled_encoder_loads_by_its_auto_class(tmp_path, python):
    base = find_base_model(make_tiny_encoder(tmp_path / "encoder"), pooling="mean")
    tokenizer = load_tokenizer(base)
    model = load_classifier(base, GUIDE.names, tokenizer.pad_token_id).eval()
    save_trained(model, tokenizer, base, tmp_path / "saved")
    rows = demo_rows(num_dialogues=1)[3:8]
    rendered = Renderer(tokenizer, GUIDE, is_encoder=True, max_seq_length=200).render(rows)
    batch = RowBatches(tokenizer.pad_token_id, 1, 1, 8, "segment_ids").collate(rendered)
    torch.save(batch, tmp_path / "batch.pt")
    code = """if True:
        import sys
        import numpy, torch
        import rareturn.models.heads
        from transformers import AutoModelForSequenceClassification
        folder, batch, output, segments = sys.argv[1:]
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inputs = torch.load(batch)
        inputs[segments] = inputs.pop("segment_ids")
        with torch.inference_mode():
            numpy.save(output, model(**inputs).logits.numpy())
    """
    with torch.inference_mode():
        expected = model(**batch).logits.numpy()
    assert expected.std() > 0.1
    for segments in ("segment_ids", "token_type_ids"):  # ours, and what BERT's tokenizer calls them
        words = tmp_path / "saved", tmp_path / "batch.pt", tmp_path / "logits.npy", segments
        in_a_process(code, *words, executable=python)
        # float32 on both sides; the other process may align its weights otherwise and sum in another order
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["decoder", "mean"])
def test_a_whole_model_in_bf16_keeps_its_float_head(kind, tmp_path):
    make = make_tiny_decoder if kind == "decoder" else make_tiny_encoder
    pooling = "mean" if kind == "mean" else "native"
    base = find_base_model(make(tmp_path / "base"), dtype="bfloat16", pooling=pooling)
    trained = load_classifier(base, GUIDE.names, PAD).eval()
    head = trained.score if kind == "decoder" else trained.classifier
    torch.nn.init.normal_(head.weight)
    save_trained(trained, load_tokenizer(base), base, tmp_path / "saved")
    again = load_trained(base, tmp_path / "saved", GUIDE.names, PAD).eval()
    batch = {"input_ids": torch.arange(5, 11)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    batch |= {"segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])} if kind == "mean" else {}
    with torch.inference_mode():
        logits = trained(**batch).logits
        assert logits.dtype == torch.float32 and torch.equal(again(**batch).logits, logits)


def test_a_prediction_leaves_4bit_weights_as_they_are(tmp_path):
    """On processors with bf16 units bitsandbytes would repack them for good: other logits, and no gradients."""
    base = find_base_model(make_tiny_decoder(tmp_path), quantization="nf4")
    model = load_classifier(base, GUIDE.names, PAD)
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    layers = {name: item for name, item in model.named_modules() if hasattr(item, "compute_dtype")}
    before = {name: layer.weight.data.clone() for name, layer in layers.items()}
    with torch.inference_mode():
        model.train()
        trained = model(**inputs).logits
        predicted = model.eval()(**inputs).logits
    assert layers and all(torch.equal(layer.weight.data, before[name]) for name, layer in layers.items())
    assert torch.equal(trained, predicted)  # no dropout here, and one and the same kernel


@pytest.mark.parametrize("stored", [False, True])
def test_a_head_on_4bit_weights_is_float_trained_and_saved(tmp_path, stored, recwarn):
    """docs/TRAPS.md: a head in 4 bits, of another dtype, frozen, NaN, or left out of the adapter."""
    folder = make_tiny_decoder(tmp_path / "base")
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}

    def load(path):
        torch.manual_seed(0)
        base = find_base_model(path, quantization="nf4", dtype="bfloat16")
        return base, load_classifier(base, GUIDE.names, PAD).eval()

    base, model = load(store_in_4bit(folder, tmp_path / "stored") if stored else folder)
    assert "You passed `quantization_config`" not in str([str(one.message) for one in recwarn])
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, load(folder)[1](**inputs).logits)
    model = add_lora(model, 4, 8, 0.0, ["q_proj"])
    head = model.base_model.model.score
    assert (
        head.weight.dtype == torch.float32 and type(head.modules_to_save["default"]).__name__ == "FloatHead"
    )
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([3])).backward()
    optimizer.step()
    assert head.weight.isfinite().all() and not torch.equal(head.weight, before)
    assert torch.equal(head.original_module.weight, before)
    save_trained(model, load_tokenizer(base), base, tmp_path / "adapter")
    again = load_trained(base, tmp_path / "adapter", GUIDE.names, PAD).eval()
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_loading_settings_that_came_from_elsewhere_are_checked_all_at_once():
    assert Loader(dtype="bfloat16", layer=3).bf16 is False
    wrong = {
        "pooling": "max",
        "quantization": "int8",
        "trust_remote_code": "yes",
        "bf16": 1,
    }
    with pytest.raises(InputError) as refused:
        check_content(Loader, wrong, "run.json: loader")
    assert [line.split(": ")[2] for line in refused.value.lines()] == list(wrong)


def test_imports_say_nothing_of_a_kernel_that_is_not_used():
    code = """if True:
        import sys
        import rareturn.command_line
        from transformers import Trainer
        import bitsandbytes, logging
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
        print("kernels" in sys.modules)
    """
    finished = in_a_process(code)
    assert finished.stdout == "False\n"
    assert "something else" in finished.stderr and "gemm_4bit" not in finished.stderr


def test_the_users_environment_does_not_reach_the_tests(tmp_path):
    (tmp_path / "token").write_text("hf_file")
    code = """if True:
        import sys
        sys.path.insert(0, "tests")
        import conftest
        import datasets, huggingface_hub, transformers
        assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
        assert not transformers.utils.hub.is_offline_mode()
        assert huggingface_hub.get_token() is None
        assert huggingface_hub.constants.HF_HUB_CACHE.startswith(conftest._home.name)
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    tokens = {"HF_TOKEN": "hf_x", "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_CACHE": str(tmp_path)}
    in_a_process(code, **offline, **tokens)
