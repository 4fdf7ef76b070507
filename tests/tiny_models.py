"""Tiny models with random weights and a real tokenizer, for tests that load, train and save like a user.

A decoder is a Qwen3, Llama or Mistral `*ForSequenceClassification`-shaped base model of two layers with grouped
key/value heads; an encoder is a BERT. Both are saved as safetensors folders, the same bytes for the same seed.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertTokenizerFast,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import render_instruction, render_turn
from rareturn.data.rows import Turn

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _texts() -> list[str]:
    """The demo corpus and the label guide, as a decoder's prompt has them."""
    rows = json.loads((ROOT / "data/demo/train.json").read_text(encoding="utf-8"))
    turns = {Turn(turn["text"], turn["speaker"]) for row in rows for turn in row["dialogue"]}
    return [render_instruction(load_label_guide("label_guides/dmrs.yaml")), *map(render_turn, sorted(turns))]


@functools.cache
def _byte_level_bpe(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer.to_str()


def make_tokenizer(vocab_size: int = 2048, model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of Qwen's: no bos, `<eos>`, and a `<pad>` that is not the eos."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe(vocab_size)),
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=model_max_length,
    )


def decoder_config(architecture: str = "qwen3", **changes):
    """The configuration of a tiny decoder: 2 layers, 4 query and 2 key/value heads, hidden size 64."""
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(architecture, **{**settings, **changes})


def make_tiny_decoder(path: str | Path, architecture: str = "qwen3", seed: int = 0, **changes) -> str:
    """Save a tiny causal language model and its tokenizer in `path`.

    Args:
        architecture: `qwen3`, `llama` or `mistral` (a `model_type` of transformers with grouped heads).
        changes: other values for the configuration, such as `hidden_size` or `num_hidden_layers`.
    """
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(decoder_config(architecture, **changes)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def store_in_4bit(model: str, path: str | Path) -> str:
    """Save a tiny decoder as many bases are shared: in NF4, with a list of what was left out that knows no new head."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "multi_modal_projector"],
    )
    stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=nf4)
    stored.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def make_tiny_encoder(path: str | Path, seed: int = 0, **changes) -> str:
    """Save a tiny BERT (2 layers, hidden size 64, 512 positions) and a WordPiece tokenizer in `path`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = list("0123456789.,!?'-:()")
    pieces = [*letters, *marks, *("##" + letter for letter in letters + list("0123456789"))]
    words = sorted(set(re.findall(r"[a-z]{2,}", " ".join(_texts()).lower())))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *words]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(path / "vocab.txt"), do_lower_case=True, model_max_length=512)
    settings = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.for_model("bert", **{**settings, **changes})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
