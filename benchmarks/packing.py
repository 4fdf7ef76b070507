"""How much faster packed rows train and predict than rows one by one: same model, same rows, one process.

A GPU, Qwen3-8B's true shape with random NF4 weights (speed does not depend on the weights' values):
    python benchmarks/packing.py --train_file train.json --augmented_file augmented.jsonl --model qwen3-8b
A CPU, a small Qwen3, ten minutes of one core:
    OMP_NUM_THREADS=1 python benchmarks/packing.py --train_file train.json --augmented_file augmented.jsonl

The baseline is the paper's own loop, written down from its description: a row a sequence in random order, padded to the
batch's longest, 2 rows x 8 accumulation steps, gradient checkpointing. Beside it rows in buckets of like length at their
best batch size, packed rows, and packed rows that train the top third of the layers on the output of the others, which is
computed once. A step has 16 rows on average everywhere. The settings take turns, an epoch each, for several rounds; a
CPU's time is the processor's, not the wall's, so that a shared machine favours none. A whole run is added up from its
parts: five folds of ten epochs on four fifths of the rows, every row predicted once and, where it is cut, the trunk once.
"""

# ruff: noqa: E402
from __future__ import annotations

import functools
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own folder has a packing.py too

from rareturn.command_line import REQUIRED, flag, parse_arguments, provenance, run, start_logging
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rendering import Rendered, Renderer, render_instruction, render_turn
from rareturn.data.rows import Row, load_rows
from rareturn.errors import InputError
from rareturn.files import write_json
from rareturn.models.layers import PassThrough, layer_list
from rareturn.models.loading import add_lora
from rareturn.models.packing import PackedBatches, accept_packed
from rareturn.models.training import RowBatches, Step
from rareturn.models.trunk import Trunk, in_passes, number_tokens

ON_GPU = torch.cuda.is_available()
ROWS_PER_STEP = 16
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# hidden size, intermediate size, layers, query heads, key/value heads, head size, vocabulary, LoRA's rank. The small
# one has the large one's ratio of rank to hidden size, and is wide enough for the matrix products to matter most.
SHAPES = {
    "tiny": (384, 1152, 4, 6, 2, 64, 8192, 12),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, 128),
}
WINDOWS = {
    "stride 10": {"window_stride": 10},
    "stride 1": {"window_stride": 1},
    "whole dialogues": {"max_turns": 100, "max_seq_length": 2048},
}
FOLDS, EPOCHS = 5, 10  # of the run that is added up from the parts; an epoch has four fifths of the rows


@dataclass
class ScriptArguments:
    """What is measured."""

    _argument_group_name = "Benchmark"

    train_file: str = flag(REQUIRED, "Labelled rows.")
    augmented_file: str | None = flag(None, "Variants made by augment.py.")
    label_guide: str = flag("label_guides/dmrs.yaml", "The labels' YAML file.")
    model: str = flag("tiny", "Shape of the model; its weights are random.", choices=list(SHAPES))
    num_dialogues: int = flag(6, "Dialogues to take, drawn by the seed; 6 take minutes on one core.")
    batch_sizes: list[int] = flag([2, 4, 8], "Rows of an unpacked forward pass to try: divisors of 16.")
    tokens_per_batch: int = flag(2048, "Tokens of a packed pass: the baseline's two rows of 1,024.")
    repeats: int = flag(3, "Rounds; medians are reported, and three leave out an outlier.")
    seed: int = flag(42, "Of the weights, the choice of dialogues and the order.")
    output: str = flag("packing.json", "JSON file for all figures.")

    def __post_init__(self) -> None:
        if any(ROWS_PER_STEP % size for size in self.batch_sizes):
            raise ValueError(f"--batch_sizes: each must divide the {ROWS_PER_STEP} rows of a step")
        if self.model == "qwen3-8b" and not ON_GPU:
            raise ValueError("--model qwen3-8b needs a CUDA GPU; leave it out for the small model")


@dataclass(frozen=True)
class Setting:
    """One way to train: which window, packed or not, bucketed by length or in random order."""

    name: str
    window: str = "stride 10"
    packed: bool = False
    bucketed: bool = False
    batch_size: int = 2
    checkpointing: bool = False
    cut: bool = False  # only the top third of the layers, on states of the others that were computed once


# --------------------------------------------------------------------------------------------------------------- model


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


def make_model(shape: str, num_labels: int, seed: int, nf4: bool) -> nn.Module:
    """A Qwen3 classifier with random weights and LoRA as in the anchor recipe, ready for packed batches."""
    torch.manual_seed(seed)
    hidden, intermediate, layers, heads, key_heads, head_size, vocabulary, lora_r = SHAPES[shape]
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
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForSequenceClassification.from_config(config, **options)
    model.score.float()
    if nf4:
        to_nf4(model.model.layers)
    model = add_lora(model, lora_r, 2 * lora_r, 0.1, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # zero at first, which would leave lora_A without a gradient
    accept_packed(model)
    model.enable_input_require_grads()
    return model


# -------------------------------------------------------------------------------------------------------------- passes


def seconds() -> float:
    """A GPU's wall clock, or the processor's time of this process."""
    if not ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """Rows in every window, and one model for all settings, which is made when it is first used."""

    def __init__(self, arguments: ScriptArguments, guide: LabelGuide, rows: Sequence[Row], tokenizer: Any):
        self.arguments, self.guide, self.rows = arguments, guide, rows
        self.rendered = {
            name: Renderer(tokenizer, guide, is_encoder=False, **window).render(rows)
            for name, window in WINDOWS.items()
        }
        self.labels = torch.tensor([row.label for row in rows])

    @functools.cached_property
    def model(self) -> nn.Module:
        return make_model(self.arguments.model, len(self.guide.labels), self.arguments.seed, nf4=ON_GPU)

    @functools.cached_property
    def layers(self) -> list[nn.Module]:
        return list(layer_list(self.model.get_base_model().model))

    def keep_layers(self, kept: range) -> None:
        """Let the hidden states pass all other layers as they are."""
        for place, layer in enumerate(self.layers):
            layer_list(self.model.get_base_model().model)[place] = layer if place in kept else PassThrough()

    @functools.cached_property
    def trunk(self) -> tuple[list[Rendered], torch.Tensor, float]:
        """Rows with `nodes`, the states of the lower two thirds of the layers, and the seconds that these took."""
        cut = round(len(self.layers) * 2 / 3)
        self.keep_layers(range(cut))
        numbered, order = number_tokens(self.rendered["stride 10"])
        trunk, start = Trunk(self.model.get_base_model().eval(), cut), seconds()
        passes = list(in_passes(numbered, order))
        states = [trunk.states([numbered[row] for row in rows], *ends, ON_GPU) for rows, *ends in passes]
        return numbered, torch.cat(states), seconds() - start

    def batches(self, setting: Setting) -> RowBatches | PackedBatches:
        if setting.packed:
            states = self.trunk[1] if setting.cut else None
            budget = self.arguments.tokens_per_batch, self.arguments.repeats
            return PackedBatches(ROWS_PER_STEP, 1, *budget, states=states)
        return RowBatches(0, ROWS_PER_STEP, ROWS_PER_STEP // setting.batch_size, setting.batch_size, None)

    def inputs(self, setting: Setting, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        rendered = self.trunk[0] if setting.cut else self.rendered[setting.window]
        return self.batches(setting).collate([rendered[index] for index in batch])

    def count_tokens(self, setting: Setting, batch: Sequence[int]) -> int:
        inputs = self.inputs(setting, batch)
        return inputs.get("position_ids", inputs.get("input_ids")).numel()

    def steps(self, setting: Setting, epoch: int) -> list[Step]:
        if setting.packed or setting.bucketed:
            plan = self.batches(setting).plan(self.rows, self.rendered[setting.window], self.arguments.seed)
            return plan(epoch)
        order = np.random.default_rng((self.arguments.seed, epoch)).permutation(len(self.rows)).tolist()
        pairs = [order[begin : begin + 2] for begin in range(0, len(order), 2)]
        return [pairs[begin : begin + 8] for begin in range(0, len(pairs), 8)]

    def prediction(self, setting: Setting) -> list[list[int]]:
        return self.batches(setting).prediction_batches(self.rows, self.rendered[setting.window])

    def logits(self, setting: Setting, batch: Sequence[int]) -> torch.Tensor:
        inputs = self.inputs(setting, batch)
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=ON_GPU):
            return self.model(**{key: value.to(device) for key, value in inputs.items()}).logits.float()

    def backward(self, setting: Setting, batch: Sequence[int], num_rows: int) -> torch.Tensor:
        logits = self.logits(setting, batch)
        labels = self.labels[list(batch)].to(logits.device)
        (nn.functional.cross_entropy(logits, labels, reduction="sum") / num_rows).backward()
        return logits.detach().cpu()

    def prepare(self, setting: Setting, training: bool = True) -> None:
        first = round(len(self.layers) * 2 / 3) if setting.cut and self.trunk else 0
        self.keep_layers(range(first, len(self.layers)))
        self.model.train(training)
        if setting.checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()
        self.model.zero_grad()

    def measure(self, setting: Setting, epoch: int = 0) -> dict[str, float]:
        """Seconds of an epoch's training, of its forward and backward passes, and of predicting all rows."""
        self.prepare(setting)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)  # so that all settings find the same weights
        steps, passes, begin = self.steps(setting, epoch), 0.0, seconds()
        for step in tqdm(steps, desc=setting.name, unit="step", leave=False):
            start = seconds()
            for batch in step:
                self.backward(setting, batch, sum(map(len, step)))
            passes += seconds() - start
            nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            optimizer.zero_grad()
        taken = seconds() - begin
        self.model.eval()
        start = seconds()
        with torch.inference_mode():
            for batch in self.prediction(setting):
                self.logits(setting, batch)
        return {"epoch": taken, "forward_backward": passes, "forward": seconds() - start, "steps": len(steps)}

    def difference(self, setting: Setting) -> dict[str, float]:
        """Packed against unpacked rows, without dropout: largest differences of a logit and of a gradient."""
        found = []
        for way in (setting, Setting("rows", setting.window, batch_size=4)):
            self.prepare(way, training=False)
            logits = torch.zeros(len(self.rows), len(self.guide.labels))
            for batch in self.prediction(way):
                logits[batch] = self.backward(way, batch, len(self.rows))
            found.append((logits, [item.grad for item in self.model.parameters() if item.grad is not None]))
        (packed, gradients), (unpacked, own) = found
        relative = [
            float((one - other).norm() / other.norm()) for one, other in zip(gradients, own, strict=True)
        ]
        return {
            "logit_difference": float((packed - unpacked).abs().max()),
            "gradient_difference": max(relative),
        }


def peak_memory(bench: Bench, setting: Setting) -> int:
    """Bytes that the step with the largest batch takes beyond the model at rest; a process of its own on a CPU."""
    bench.prepare(setting)
    steps = bench.steps(setting, 0)
    tokens = [max(bench.count_tokens(setting, batch) for batch in step) for step in steps]
    step = steps[int(np.argmax(tokens))]
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated() if ON_GPU else _resident("VmRSS")
    for batch in step:
        bench.backward(setting, batch, sum(map(len, step)))
    return (torch.cuda.max_memory_allocated() if ON_GPU else _resident("VmHWM")) - at_rest


def _resident(name: str) -> int:
    """This process' memory, in bytes (Linux). `ru_maxrss` would count the process that started this one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


# -------------------------------------------------------------------------------------------------------------- report


def best_unpacked(bench: Bench) -> Setting:
    """The fastest bucketed setting of one epoch each; what does not fit the GPU is passed over.

    Raises:
        InputError: none fits.
    """
    tried: dict[Setting, float] = {}
    for batch_size in bench.arguments.batch_sizes:
        for checkpointing in (True, False) if ON_GPU else (False,):  # it only ever saves memory
            setting = Setting(
                f"rows, bucketed, {batch_size} a batch", "stride 10", False, True, batch_size, checkpointing
            )
            try:
                tried[setting] = bench.measure(setting)["epoch"]
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
    if not tried:
        raise InputError("--batch_sizes: none fits this GPU")
    return min(tried, key=tried.get)


def summarize(bench: Bench, measured: dict[Setting, list[dict[str, float]]], best: Setting) -> list[dict]:
    """A record a setting: medians over the rounds, ratios (medians of a round's own), tokens, memory, differences."""
    baseline = next(iter(measured))
    results = []
    for setting, rounds in measured.items():
        record: dict[str, Any] = asdict(setting) | {"rows": len(bench.rows), "rounds": rounds}
        for key in ("forward", "forward_backward", "epoch", "steps"):
            record[key] = statistics.median(item[key] for item in rounds)
        for key, other, part in (
            ("forward_ratio", baseline, "forward"),
            ("forward_backward_ratio", baseline, "forward_backward"),
            ("epoch_ratio", baseline, "epoch"),
            ("epoch_ratio_to_best", best, "epoch"),
        ):
            pairs = zip(measured[other], rounds, strict=True)
            record[key] = statistics.median(theirs[part] / own[part] for theirs, own in pairs)
        batches = [batch for step in bench.steps(setting, 0) for batch in step]
        record["tokens"] = sum(bench.count_tokens(setting, batch) for batch in batches)
        trunk = bench.trunk[2] if setting.cut else 0.0
        record["run"] = FOLDS * EPOCHS * 4 / 5 * record["epoch"] + record["forward"] + trunk
        if setting.packed and not setting.cut:
            record |= bench.difference(setting)
        if ON_GPU:
            record["peak_memory"] = peak_memory(bench, setting)
        else:
            for name in ("model", "layers"):
                vars(bench).pop(name, None)  # the process that measures makes its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                record["peak_memory"] = pool.submit(peak_memory, bench, setting).result()
        results.append(record)
    return results


def make_table(results: list[dict]) -> str:
    """Markdown; rows a second only from a GPU."""
    lines = [
        "| setting | checkpointing | tokens | steps | forward | epoch | to best unpacked | whole run | to best unpacked "
        "| peak memory | logit, gradient difference |" + (" rows/s |" if ON_GPU else ""),
        "|---|---" + "|---:" * (9 + ON_GPU) + "|",
    ]
    best = next(item for item in results if item["bucketed"])
    for item in results:
        differences = ""
        if "logit_difference" in item:
            differences = f"{item['logit_difference']:.0e}, {item['gradient_difference']:.0e}"
        lines.append(
            f"| {item['name']} | {'yes' if item['checkpointing'] else 'no'} | {item['tokens']:,} "
            f"| {item['steps']:.0f} | {item['forward_ratio']:.1f}x | {item['epoch_ratio']:.1f}x "
            f"| {item['epoch_ratio_to_best']:.1f}x "
            f"| {results[0]['run'] / item['run']:.1f}x | {best['run'] / item['run']:.1f}x "
            f"| {item['peak_memory'] / 2**20:,.0f} MiB | {differences} |"
            + (f" {item['rows'] / item['epoch']:.2f} |" if ON_GPU else "")
        )
    return "\n".join(lines)


def main() -> None:
    (arguments,) = parse_arguments((ScriptArguments,), __doc__)
    start_logging(logging.WARNING)

    guide = load_label_guide(arguments.label_guide)
    originals = load_rows(arguments.train_file, guide)
    augmented = []
    if arguments.augmented_file:
        augmented = load_rows(arguments.augmented_file, guide, sources_of_augmented=originals)
    tokenizer = train_tokenizer(originals, guide)
    names = sorted({row.dialogue_id for row in originals})
    chosen = set(np.random.default_rng(arguments.seed).permutation(names)[: arguments.num_dialogues])
    rows = [row for row in originals + augmented if row.dialogue_id in chosen]
    bench = Bench(arguments, guide, rows, tokenizer)

    best = best_unpacked(bench)
    packed = [Setting(f"packed, {window}", window, packed=True) for window in WINDOWS]
    settings = [
        Setting("rows, the paper's loop", checkpointing=True),
        best,
        replace(packed[0], checkpointing=True),
        *packed,
        replace(packed[0], name="packed, the top third on states of the trunk", cut=True),
    ]
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for number in range(arguments.repeats):
        for setting in settings:
            measured[setting].append(bench.measure(setting, number))
    results = summarize(bench, measured, best)

    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{arguments.model}, {device}: {len(rows)} rows of {len(chosen)} dialogues\n")
    print(make_table(results))
    facts = {"arguments": asdict(arguments), "device": device, "results": results}
    write_json(Path(arguments.output), facts | provenance())


if __name__ == "__main__":
    run(main)
