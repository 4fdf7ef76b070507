"""How much faster packed rows train and predict than rows one by one: same model, same rows, one process.

A CPU, a small Qwen3 with random weights, ten minutes of one core:
    OMP_NUM_THREADS=1 python benchmarks/packing.py --train_file train.json --augmented_file augmented.jsonl
A real decoder: SmolLM2, or Gemma 3, whose windows slide:
    OMP_NUM_THREADS=1 python benchmarks/packing.py --train_file train.json --num_dialogues 2 \\
        --model "$(python scripts/packaged_model.py gemma3-270m)"
A GPU, Qwen3-8B's true shape with random NF4 weights (speed does not depend on their values): benchmarks/gpu.sh

The baseline is the paper's own loop, written down from its description: a row a sequence in random order, padded to the
batch's longest, 2 rows x 8 accumulation steps, gradient checkpointing. Beside it the best unpacked settings (rows in buckets
of like length, padded, or end to end without padding), packed rows, and packed rows that train the top third of the layers
on the output of the others, which is computed once. A step has 16 rows on average everywhere. The settings take turns, an
epoch each, for several rounds; a CPU's time is the processor's, not the wall's, so that a shared machine favours none. A
whole run is added up from its parts: five folds of ten epochs on four fifths of the rows, every row predicted once and,
where it is cut, the trunk once.
"""

# ruff: noqa: E402
from __future__ import annotations

import functools
import importlib.util
import itertools
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
from torch import nn
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own folder has a packing.py too

from benchmarks.decoders import SHAPES, make_model, train_tokenizer
from rareturn.command_line import REQUIRED, flag, parse_arguments, provenance, run, start_logging
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rendering import Rendered, Renderer
from rareturn.data.rows import Row, load_rows
from rareturn.errors import InputError
from rareturn.files import write_json
from rareturn.models import packing
from rareturn.models.layers import PassThrough, layer_list
from rareturn.models.loading import find_base_model, load_tokenizer
from rareturn.models.packing import PackedBatches
from rareturn.models.training import RowBatches, Step
from rareturn.models.trunk import Trunk, in_passes, number_tokens

ON_GPU = torch.cuda.is_available()
ROWS_PER_STEP = 16
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
    model: str = flag("tiny", f"A folder with a decoder, or a shape for random weights: {', '.join(SHAPES)}.")
    windows: list[str] = flag(list(WINDOWS), "Windows of packed rows to measure.", choices=list(WINDOWS))
    num_dialogues: int = flag(6, "Dialogues to take, drawn by the seed; 6 take minutes on one core.")
    batch_sizes: list[int] = flag([2, 4, 8], "Rows of an unpacked forward pass to try: divisors of 16.")
    tokens_per_batch: int = flag(2048, "Tokens of a packed pass: the baseline's two rows of 1,024.")
    repeats: int = flag(3, "Rounds; medians are reported, and three leave out an outlier.")
    seed: int = flag(42, "Of the weights, the choice of dialogues and the order.")
    output: str = flag("packing.json", "JSON file for all figures.")

    def __post_init__(self) -> None:
        if any(ROWS_PER_STEP % size for size in self.batch_sizes):
            raise ValueError(f"--batch_sizes: each must divide the {ROWS_PER_STEP} rows of a step")
        if self.model not in SHAPES and not Path(self.model).is_dir():
            raise ValueError(f"--model {self.model}: no such folder, nor one of {', '.join(SHAPES)}")
        if self.model == "qwen3-8b" and not ON_GPU:
            raise ValueError("--model qwen3-8b needs a CUDA GPU; leave it out for the small model")


@dataclass(frozen=True)
class Setting:
    """One way to train: which window, packed or not, bucketed by length or in random order, which attention kernel."""

    name: str
    window: str = "stride 10"
    packed: bool = False
    bucketed: bool = False
    end_to_end: bool = (
        False  # rows of a pass one after the other in place of padded, kept apart by their positions
    )
    batch_size: int = 2
    checkpointing: bool = False
    attention: str = "sdpa"
    cut: bool = False  # only the top third of the layers, on states of the others that were computed once


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
        self.arguments, self.guide, self.rows, self.pad = arguments, guide, rows, tokenizer.pad_token_id
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
        return RowBatches(
            self.pad, ROWS_PER_STEP, ROWS_PER_STEP // setting.batch_size, setting.batch_size, None
        )

    def inputs(self, setting: Setting, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        rendered = self.trunk[0] if setting.cut else self.rendered[setting.window]
        rows = [rendered[index] for index in batch]
        if not setting.end_to_end:
            return self.batches(setting).collate(rows)
        ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        ends = torch.tensor(list(itertools.accumulate(map(len, rows)))) - 1
        return {"input_ids": ids[None], "position_ids": positions[None], "row_positions": ends}

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
        backbone, flex = self.model.get_base_model().base_model, setting.attention == "flex_attention"
        backbone.default_attention = (
            "sdpa" if flex else None
        )  # flex as it is chosen for large trees, here for all
        backbone.config._attn_implementation = "sdpa" if flex else setting.attention
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


def weights_memory(bench: Bench, setting: Setting) -> int:
    """Bytes of the weights that training takes: above a cut neither the layers below it nor the embeddings."""
    bench.prepare(setting)
    unused = bench.model.get_input_embeddings().parameters() if setting.cut else ()
    return sum(weight.nbytes for weight in bench.model.parameters()) - sum(weight.nbytes for weight in unused)


def _resident(name: str) -> int:
    """This process' memory, in bytes (Linux). `ru_maxrss` would count the process that started this one."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


# -------------------------------------------------------------------------------------------------------------- report


def best_unpacked(bench: Bench, end_to_end: bool) -> Setting:
    """The fastest bucketed setting of one epoch each, padded or end to end; what does not fit the GPU is passed over.

    Raises:
        InputError: none fits.
    """
    tried: dict[Setting, float] = {}
    kernels = ["sdpa"] + ["flash_attention_2"] * (
        ON_GPU and importlib.util.find_spec("flash_attn") is not None
    )
    # Checkpointing only ever saves memory.
    ways = itertools.product(bench.arguments.batch_sizes, (True, False) if ON_GPU else (False,), kernels)
    for size, checkpointing, kernel in ways:
        name = f"rows, bucketed, {size} a batch, {'end to end' if end_to_end else 'padded'}"
        name += ", flash" if kernel != "sdpa" else ""
        setting = Setting(name, "stride 10", False, True, end_to_end, size, checkpointing, kernel)
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
        record["tokens_ratio"] = results[0]["tokens"] / record["tokens"] if results else 1.0
        record["weights"] = weights_memory(bench, setting)
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


def make_table(results: list[dict], best: str) -> str:
    """Markdown; tokens a second (of the setting's own) and rows a second from a GPU only."""
    lines = [
        "| setting | checkpointing | tokens | fewer | steps | forward | epoch | to best unpacked | whole run | to best unpacked "
        "| peak memory | with weights | logit, gradient difference |"
        + (" tokens/s | rows/s |" if ON_GPU else ""),
        "|---|---" + "|---:" * (11 + 2 * ON_GPU) + "|",
    ]
    best_run = next(item["run"] for item in results if item["name"] == best)
    for item in results:
        differences = ""
        if "logit_difference" in item:
            differences = f"{item['logit_difference']:.0e}, {item['gradient_difference']:.0e}"
        peak, weights = item["peak_memory"] / 2**20, item["weights"] / 2**20
        speed = f" {item['tokens'] / item['epoch']:,.0f} | {item['rows'] / item['epoch']:.2f} |"
        lines.append(
            f"| {item['name']} | {'yes' if item['checkpointing'] else 'no'} | {item['tokens']:,} "
            f"| {item['tokens_ratio']:.1f}x | {item['steps']:.0f} "
            f"| {item['forward_ratio']:.1f}x | {item['epoch_ratio']:.1f}x | {item['epoch_ratio_to_best']:.1f}x "
            f"| {results[0]['run'] / item['run']:.1f}x | {best_run / item['run']:.1f}x "
            f"| {peak:,.0f} MiB | {peak + weights:,.0f} MiB | {differences} |" + (speed if ON_GPU else "")
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
    is_shape = arguments.model in SHAPES
    tokenizer = (
        train_tokenizer(originals, guide) if is_shape else load_tokenizer(find_base_model(arguments.model))
    )
    names = sorted({row.dialogue_id for row in originals})
    chosen = set(np.random.default_rng(arguments.seed).permutation(names)[: arguments.num_dialogues])
    rows = [row for row in originals + augmented if row.dialogue_id in chosen]
    bench = Bench(arguments, guide, rows, tokenizer)

    unpacked = [best_unpacked(bench, end_to_end) for end_to_end in (False, True)]
    packed = [Setting(f"packed, {window}", window, packed=True) for window in arguments.windows]
    packing.FLEX_TOKENS = 0
    settings = [
        Setting("rows, the paper's loop", checkpointing=True),
        *unpacked,
        replace(packed[0], checkpointing=True),
        *packed,
        *[replace(packed[0], name="packed, flex attention", attention="flex_attention")] * ON_GPU,
        replace(packed[0], name="packed, the top third on states of the trunk", window="stride 10", cut=True),
    ]
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for number in range(arguments.repeats):
        for setting in settings:
            measured[setting].append(bench.measure(setting, number))
    times = {setting: statistics.median(item["epoch"] for item in measured[setting]) for setting in unpacked}
    best = min(times, key=times.get)
    results = summarize(bench, measured, best)

    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{arguments.model}, {device}: {len(rows)} rows of {len(chosen)} dialogues\n")
    print(make_table(results, best.name))
    print(f"\nBest unpacked: {best.name}")
    facts = {"arguments": asdict(arguments), "device": device, "results": results}
    write_json(Path(arguments.output), facts | provenance())


if __name__ == "__main__":
    run(main)
