"""How much faster packed rows train and predict than rows one by one: same model, same rows, one process.

A GPU, Qwen3-8B's true shape with random NF4 weights (speed does not depend on the weights' values):
    python benchmarks/packing.py --model qwen3-8b --train_file train.json --augmented_file augmented.jsonl \
        --num_dialogues 20 --output result.json
A CPU, a small Qwen3, ten minutes:
    python benchmarks/packing.py --train_file train.json --augmented_file augmented.jsonl --output result.json

The baseline is the paper's own loop, written down from its description: a row a sequence in random order, padded to
the batch's longest, 2 rows x 8 accumulation steps, gradient checkpointing. Beside it rows in buckets of like length at
their best batch size, and packed rows. A step has 16 rows on average everywhere. Whole epochs take turns, several
rounds of them, so that a machine that is shared or throttles does not favour one.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own folder has a packing.py too

import artifacts  # noqa: E402
import command_line  # noqa: E402
import modeling  # noqa: E402
from batching import RowBatches, Step  # noqa: E402
from command_line import InputError  # noqa: E402
from dialogues import (  # noqa: E402
    LabelGuide,
    Rendered,
    Renderer,
    Row,
    Turn,
    load_label_guide,
    load_rows,
    render_instruction,
    render_turn,
)
from packing import PackedBatches, accept_packed  # noqa: E402

ROWS_PER_STEP = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    # a CPU's share of Qwen3: the ratio of LoRA to base and of attention heads to hidden size as in the 8B model
    "tiny": {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
        "lora_r": 12,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "lora_r": 128,
    },
}
WINDOWS = {
    "stride 10": {"window_stride": 10},
    "stride 1": {"window_stride": 1},
    "whole dialogues": {"max_turns": 100, "max_seq_length": 2048},
}


@dataclass
class ScriptArguments:
    """What is measured."""

    train_file: str = field(metadata={"help": "Labelled rows."})
    augmented_file: str | None = field(default=None, metadata={"help": "Variants made by augment.py."})
    label_guide: str = field(default="label_guides/dmrs.yaml", metadata={"help": "The labels' YAML file."})
    model: str = field(
        default="tiny",
        metadata={"help": "Shape of the model; its weights are random.", "choices": list(SHAPES)},
    )
    num_dialogues: int = field(default=6, metadata={"help": "Dialogues to take, drawn by the seed."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [2, 4, 8],
        metadata={"help": "Rows of a forward pass to try for unpacked rows, at most 16."},
    )
    tokens_per_batch: int = field(default=2048, metadata={"help": "Tokens of a packed forward pass at most."})
    turns: list[int] = field(
        default_factory=lambda: [25, 50, 100, 200, 400],
        metadata={"help": "Lengths of the made-up dialogues that show how the cost grows."},
    )
    repeats: int = field(default=3, metadata={"help": "Rounds; the median is reported."})
    seed: int = field(default=42, metadata={"help": "Of the weights, the choice of dialogues and the order."})
    output: str = field(default="packing.json", metadata={"help": "JSON file for all figures."})


@dataclass(frozen=True)
class Setting:
    """One way to train: the window, packed or not, and how."""

    name: str
    window: str = "stride 10"
    packed: bool = False
    bucketed: bool = False
    batch_size: int = 2
    checkpointing: bool = False


# --------------------------------------------------------------------------------------------------------------- model


def train_tokenizer(
    rows: Sequence[Row], guide: LabelGuide, vocab_size: int = 8192
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' own text: about as many tokens a row as Qwen's (252 for the DMRS guide, not 220)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = sorted({turn for row in rows for turn in row.turns})
    tokenizer.train_from_iterator([render_instruction(guide), *map(render_turn, turns)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def to_nf4(module: nn.Module) -> None:
    """Replace the linear layers inside by 4-bit NormalFloat ones (double quantization, bf16 compute), in place."""
    import bitsandbytes

    for name, child in module.named_children():
        if type(child) is nn.Linear:
            layer = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            setattr(module, name, layer.to(child.weight.device))
        else:
            to_nf4(child)


def make_model(shape: str, num_labels: int, seed: int, nf4: bool) -> nn.Module:
    """A Qwen3 classifier with random weights, LoRA as in the anchor recipe, and adapters that are not zero."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = dict(SHAPES[shape])
    lora_r = settings.pop("lora_r")
    config = AutoConfig.for_model(
        "qwen3",
        **settings,
        num_labels=num_labels,
        pad_token_id=0,
        use_cache=False,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16 if nf4 else torch.float32, attn_implementation="sdpa"
        )
    model.score.float()
    if nf4:
        to_nf4(model.model.layers)
    model = modeling.add_lora(model, lora_r, 2 * lora_r, 0.1, PROJECTIONS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    accept_packed(model)
    model.enable_input_require_grads()
    return model


# -------------------------------------------------------------------------------------------------------------- passes


def seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """The rows in every window, and the model that all settings share."""

    def __init__(self, arguments: ScriptArguments, rows: Sequence[Row], tokenizer: Any, guide: LabelGuide):
        self.arguments, self.rows, self.guide = arguments, rows, guide
        self.nf4 = torch.cuda.is_available()
        self.model = make_model(arguments.model, len(guide.labels), arguments.seed, self.nf4)
        self.device = next(self.model.parameters()).device
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.nf4)
        self.rendered = {
            name: Renderer(tokenizer, guide, is_encoder=False, **window).render(rows)
            for name, window in WINDOWS.items()
        }
        self.labels = torch.tensor([row.label for row in rows])

    def batches(self, setting: Setting) -> RowBatches | PackedBatches:
        if setting.packed:
            return PackedBatches(ROWS_PER_STEP, 1, self.arguments.tokens_per_batch, self.arguments.repeats)
        return RowBatches(0, ROWS_PER_STEP, ROWS_PER_STEP // setting.batch_size, setting.batch_size, None)

    def steps(self, setting: Setting, epoch: int) -> list[Step]:
        rendered = self.rendered[setting.window]
        if setting.packed or setting.bucketed:
            return self.batches(setting).plan(self.rows, rendered, self.arguments.seed)(epoch)
        order = np.random.default_rng((self.arguments.seed, epoch)).permutation(len(rendered)).tolist()
        cut = range(0, len(order), ROWS_PER_STEP)
        return [
            [
                order[begin : begin + setting.batch_size]
                for begin in range(first, min(first + ROWS_PER_STEP, len(order)), setting.batch_size)
            ]
            for first in cut
        ]

    def logits(self, setting: Setting, batch: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Logits of a micro-batch, and the tokens (padding included) that the model read for them."""
        collate = self.batches(setting).collate
        inputs = collate([self.rendered[setting.window][index] for index in batch])
        tokens = inputs["input_ids"].numel()
        with self.autocast():
            return self.model(**{key: value.to(self.device) for key, value in inputs.items()}).logits, tokens

    def loss(self, setting: Setting, batch: Sequence[int], num_rows: int) -> tuple[torch.Tensor, int]:
        logits, tokens = self.logits(setting, batch)
        labels = self.labels[list(batch)].to(self.device)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / num_rows, tokens

    def prepare(self, setting: Setting) -> None:
        self.model.train()
        if setting.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.model.zero_grad()

    def epoch(self, setting: Setting, epoch: int = 0) -> dict[str, float]:
        """One epoch of training: seconds, seconds of forward and backward alone, tokens, forward passes, steps."""
        self.prepare(setting)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)  # all settings keep the same weights
        steps = self.steps(setting, epoch)
        begin, passes, tokens = seconds(), 0.0, 0
        for step in tqdm.tqdm(steps, desc=setting.name, unit="step", leave=False):
            started = seconds()
            for batch in step:
                loss, count = self.loss(setting, batch, sum(map(len, step)))
                loss.backward()
                tokens += count
            passes += seconds() - started
            nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            optimizer.zero_grad()
        return {
            "epoch_seconds": seconds() - begin,
            "forward_backward_seconds": passes,
            "tokens": tokens,
            "batches": sum(map(len, steps)),
            "steps": len(steps),
        }

    def forward(self, setting: Setting) -> dict[str, float]:
        """Prediction of all rows: seconds."""
        self.model.eval()
        batches = self.batches(setting).prediction_batches(self.rows, self.rendered[setting.window])
        begin = seconds()
        with torch.inference_mode():
            for batch in batches:
                self.logits(setting, batch)
        return {"forward_seconds": seconds() - begin}

    def logits_and_gradients(self, setting: Setting) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.prepare(setting)
        self.model.eval()  # no dropout
        result = torch.zeros(len(self.rows), len(self.guide.labels))
        for batch in self.batches(setting).prediction_batches(self.rows, self.rendered[setting.window]):
            logits, _ = self.logits(setting, batch)
            labels = self.labels[batch].to(self.device)
            nn.functional.cross_entropy(logits.float(), labels, reduction="sum").div(
                len(self.rows)
            ).backward()
            result[batch] = logits.detach().float().cpu()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return result, gradients

    def difference(self, packed: Setting) -> dict[str, float]:
        """Packed against unpacked rows: largest logit difference, largest relative difference of a gradient."""
        logits, gradients = self.logits_and_gradients(packed)
        own_logits, own_gradients = self.logits_and_gradients(Setting("rows", packed.window))
        relative = [
            (gradients[name] - gradient).norm() / gradient.norm() for name, gradient in own_gradients.items()
        ]
        return {
            "largest_logit_difference": float((logits - own_logits).abs().max()),
            "largest_gradient_difference": float(max(relative)),
            "largest_logit": float(own_logits.abs().max()),
        }


def heaviest_step(bench: Bench, setting: Setting) -> Step:
    """The step whose largest forward pass has the most tokens."""

    def most_tokens(step: Step) -> int:
        collate, rendered = bench.batches(setting).collate, bench.rendered[setting.window]
        return max(collate([rendered[index] for index in batch])["input_ids"].numel() for batch in step)

    return max(bench.steps(setting, 0), key=most_tokens)


def peak_memory(make_bench: Callable[[], Bench], setting: Setting) -> int:
    """Bytes that the heaviest step of an epoch takes beyond the model at rest; in a process of its own on a CPU."""
    bench = make_bench()
    bench.prepare(setting)
    step = heaviest_step(bench, setting)
    at_rest = _memory(peak=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for batch in step:
        bench.loss(setting, batch, sum(map(len, step)))[0].backward()
    peak = _memory(peak=True) - at_rest
    bench.model.zero_grad()
    return peak


def _memory(peak: bool) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost_by_turns(bench: Bench, turns: int, tokenizer: Any) -> dict[str, float]:
    """Prediction of one made-up dialogue's seeker turns: tokens and seconds, row by row and packed."""
    words = "I was thinking about what you said and it is hard to say how it felt at work that day".split()
    rng = np.random.default_rng(turns)
    dialogue = tuple(
        Turn(" ".join(rng.choice(words, size=25)), ("seeker", "supporter")[place % 2])
        for place in range(turns)
    )
    rows = [Row(str(place), "made up", dialogue[: place + 1], 0) for place in range(0, turns, 2)]
    own = Bench.__new__(Bench)
    own.__dict__ |= bench.__dict__
    own.rows = rows
    own.rendered = {"stride 10": Renderer(tokenizer, bench.guide, is_encoder=False).render(rows)}
    result: dict[str, float] = {"turns": turns, "rows": len(rows)}
    for name, setting in {
        "rows": Setting("rows", batch_size=4),
        "packed": Setting("packed", packed=True),
    }.items():
        batches = own.batches(setting)
        rendered = own.rendered["stride 10"]
        result[f"{name}_tokens"] = sum(
            batches.collate([rendered[index] for index in batch])["input_ids"].numel()
            for batch in batches.prediction_batches(rows, rendered)
        )
        result[f"{name}_seconds"] = own.forward(setting)["forward_seconds"]
    return result


# -------------------------------------------------------------------------------------------------------------- report


def best_unpacked(bench: Bench, batch_sizes: Sequence[int]) -> tuple[Setting, list[dict[str, Any]]]:
    """The fastest bucketed setting of one epoch each; what does not fit the GPU is passed over."""
    tried = []
    for batch_size in batch_sizes:
        # Without a GPU's limit on memory, recomputing can only be slower.
        for checkpointing in (True, False) if torch.cuda.is_available() else (False,):
            setting = Setting(
                "rows, best batch size", bucketed=True, batch_size=batch_size, checkpointing=checkpointing
            )
            try:
                tried.append((bench.epoch(setting)["epoch_seconds"], setting))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
    if not tried:
        raise InputError("--batch_sizes: none fits this GPU")
    tried.sort(key=lambda item: item[0])
    record = [
        {"batch_size": setting.batch_size, "checkpointing": setting.checkpointing, "epoch_seconds": taken}
        for taken, setting in tried
    ]
    return tried[0][1], record


def make_table(results: list[dict[str, Any]], on_gpu: bool) -> str:
    """The figures as a Markdown table; seconds and rows a second only from a GPU."""
    columns = {
        "setting": lambda item: item["name"],
        "batch": lambda item: (
            f"{item['tokens_per_batch']} tokens" if item["packed"] else f"{item['batch_size']} rows"
        ),
        "ckpt": lambda item: "yes" if item["checkpointing"] else "no",
        "tokens": lambda item: f"{item['tokens']:,.0f}",
        "steps": lambda item: str(item["steps"]),
        "forward": lambda item: f"{item['forward_ratio']:.1f}x",
        "fwd + bwd": lambda item: f"{item['forward_backward_ratio']:.1f}x",
        "epoch": lambda item: f"{item['epoch_ratio']:.1f}x",
        "vs best rows": lambda item: f"{item['epoch_ratio_to_best']:.1f}x",
        "peak memory": lambda item: f"{item['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "logit diff": lambda item: f"{item['largest_logit_difference']:.0e}" if item["packed"] else "",
        "grad diff": lambda item: f"{item['largest_gradient_difference']:.0e}" if item["packed"] else "",
    }
    if on_gpu:
        columns["rows/s"] = lambda item: f"{item['rows_per_second']:.2f}"
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(cell(item) for cell in columns.values()) + " |" for item in results]
    return "\n".join(lines)


def read_bench(arguments: ScriptArguments) -> tuple[Bench, Any]:
    guide = load_label_guide(arguments.label_guide)
    originals = load_rows(arguments.train_file, guide)
    augmented = []
    if arguments.augmented_file:
        augmented = load_rows(arguments.augmented_file, guide, sources_of_augmented=originals)
    tokenizer = train_tokenizer(originals, guide)
    dialogues = sorted({row.dialogue_id for row in originals})
    chosen = np.random.default_rng(arguments.seed).permutation(dialogues)[: arguments.num_dialogues]
    rows = [row for row in originals + augmented if row.dialogue_id in set(chosen)]
    return Bench(arguments, rows, tokenizer, guide), tokenizer


def bench_of(arguments: ScriptArguments) -> Bench:
    return read_bench(arguments)[0]


def main() -> None:
    (arguments,) = command_line.parse_arguments((ScriptArguments,), __doc__)
    if arguments.model == "qwen3-8b" and not torch.cuda.is_available():
        raise InputError("--model qwen3-8b needs a CUDA GPU; leave it out for the small model")
    if any(ROWS_PER_STEP % size for size in arguments.batch_sizes):
        raise InputError(f"--batch_sizes: each must divide the {ROWS_PER_STEP} rows of a step")
    logging.basicConfig(level=logging.WARNING)
    on_gpu = torch.cuda.is_available()

    bench, tokenizer = read_bench(arguments)
    best, tried = best_unpacked(bench, arguments.batch_sizes)
    packed = [Setting(f"packed, {window}", window, packed=True) for window in WINDOWS]
    settings = [
        Setting("rows, the paper's loop", checkpointing=True),
        best,
        replace(packed[0], name="packed, stride 10, checkpointing", checkpointing=True),
        *(replace(setting, checkpointing=best.checkpointing) for setting in packed),
    ]
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for round_number in range(arguments.repeats):
        for setting in settings:
            measured[setting].append(bench.epoch(setting, round_number) | bench.forward(setting))

    results = []
    for setting, rounds in measured.items():
        medians = {key: statistics.median(item[key] for item in rounds) for key in rounds[0]}
        result = {**vars(setting), **medians, "rows": len(bench.rows), "rounds": rounds}
        result["tokens_per_batch"] = arguments.tokens_per_batch
        result["rows_per_second"] = len(bench.rows) / medians["epoch_seconds"]
        for key in ("forward", "forward_backward", "epoch"):
            pairs = zip(measured[settings[0]], rounds, strict=True)
            result[f"{key}_ratio"] = statistics.median(
                base[f"{key}_seconds"] / item[f"{key}_seconds"] for base, item in pairs
            )
        pairs = zip(measured[best], rounds, strict=True)
        result["epoch_ratio_to_best"] = statistics.median(
            base["epoch_seconds"] / item["epoch_seconds"] for base, item in pairs
        )
        if setting.packed:
            result |= bench.difference(setting)
        if on_gpu:
            result["peak_memory_bytes"] = peak_memory(lambda: bench, setting)
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                make_bench = functools.partial(bench_of, arguments)
                result["peak_memory_bytes"] = pool.submit(peak_memory, make_bench, setting).result()
        results.append(result)
    by_turns = [cost_by_turns(bench, turns, tokenizer) for turns in arguments.turns]

    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    num_dialogues = len({row.dialogue_id for row in bench.rows})
    print(f"\n{arguments.model}, {device}: {len(bench.rows)} rows of {num_dialogues} dialogues\n")
    print(make_table(results, on_gpu))
    print(
        "\n| turns | rows | tokens, rows | tokens, packed | per turn | time, rows : packed |\n|---|---:|---:|---:|---:|---:|"
    )
    for item in by_turns:
        ratio = item["rows_seconds"] / item["packed_seconds"]
        print(
            f"| {item['turns']} | {item['rows']} | {item['rows_tokens']:,} | {item['packed_tokens']:,} "
            f"| {item['packed_tokens'] / item['turns']:.0f} | {ratio:.1f}x |"
        )
    artifacts.write_json(
        Path(arguments.output),
        {
            "arguments": vars(arguments),
            "device": device,
            "results": results,
            "tried": tried,
            "by_turns": by_turns,
            **command_line.provenance(),
        },
    )


if __name__ == "__main__":
    command_line.run(main)
