"""The decoder that `packing.py` measures: a real one, or a Qwen3 with random weights, whose values speed does not depend on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import render_instruction, render_turn
from rareturn.data.rows import Row
from rareturn.models.loading import add_lora, find_base_model, load_classifier, load_tokenizer
from rareturn.models.packing import accept_packed

LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# hidden size, intermediate size, layers, query heads, key/value heads, head size, vocabulary, LoRA's rank. The small
# one has the large one's ratio of rank to hidden size, and is wide enough for the matrix products to matter most.
SHAPES = {
    "tiny": (384, 1152, 4, 6, 2, 64, 8192, 12),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, 128),
}


def train_tokenizer(rows: Sequence[Row], guide: LabelGuide) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' own text, since Qwen's is not at hand: within 5 % of its tokens a row."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [render_turn(turn) for turn in sorted({turn for row in rows for turn in row.turns})]
    tokenizer.train_from_iterator([render_instruction(guide), *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def to_nf4(module: nn.Module) -> None:
    """Put 4-bit NormalFloat layers (double quantization, bf16 compute) in the place of linear ones."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            layer = Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, **nf4
            )
            layer.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, **nf4)
            setattr(module, name, layer.to(child.weight.device))
        else:
            to_nf4(child)


def make_model(name: str, num_labels: int, seed: int, nf4: bool) -> nn.Module:
    """A classifier from a folder, or a Qwen3 with random weights, with LoRA as in the anchor recipe, ready to be packed."""
    torch.manual_seed(seed)
    lora_r = 16
    if name not in SHAPES:
        base = find_base_model(
            name, dtype="bfloat16" if nf4 else "float32", quantization="nf4" if nf4 else "none"
        )
        model = load_classifier(base, list(map(str, range(num_labels))), load_tokenizer(base).pad_token_id)
    else:
        hidden, intermediate, layers, heads, key_heads, head_size, vocabulary, lora_r = SHAPES[name]
        config = AutoConfig.for_model(
            "qwen3",
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_size,
            vocab_size=vocabulary,
            num_labels=num_labels,
            pad_token_id=0,
            use_cache=False,
        )
        options = {"dtype": torch.bfloat16 if nf4 else torch.float32, "attn_implementation": "sdpa"}
        with torch.device("cuda" if nf4 else "cpu"):
            model = AutoModelForSequenceClassification.from_config(config, **options)
        model.score.float()
        if nf4:
            to_nf4(model.model.layers)
    model = add_lora(model, lora_r, 2 * lora_r, 0.1, LORA)
    for weight_name, parameter in model.named_parameters():
        if "lora_B" in weight_name:
            nn.init.normal_(parameter, std=0.02)  # zero at first, which would leave lora_A without a gradient
    accept_packed(model)
    model.enable_input_require_grads()
    return model
