"""What training a fold takes beside transformers' Trainer: arguments, class weights, planned batches, sealed checkpoints."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from rareturn.command_line import flag
from rareturn.data.rendering import Rendered
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.files import read_json, write_json

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
Step = list[list[int]]  # a step's micro-batches, each a list of indices into the data set
Plan = Callable[[int], list[Step]]  # epoch -> its steps, as many in every epoch
MEGABATCH_STEPS = 16


@dataclass
class FoldTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that a fold wants."""

    bf16: bool | None = flag(None, "bf16 autocast. Default: on a GPU, never on a CPU.")
    save_strategy: str = flag("epoch", "When to write a checkpoint to resume from.")
    save_total_limit: int | None = flag(2, "Checkpoints kept. 2: the newer may be half-written.")
    logging_steps: float = flag(10, "Steps between two log lines.")
    report_to: str = flag("none", "Where to log: trackio, tensorboard, wandb, …")
    project: str | None = flag(None, "Group of a tracker's runs. Default: --hub_name, or the run's name.")

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu)
        if self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end would pick a model on its out-of-fold rows")
        # The script pushes, and its rows are no columns of a data set.
        self.push_to_hub = self.remove_unused_columns = False
        # It saves inside a step, and `train` returns from it as if it were done: `StopOnSigterm` is there instead.
        self.enable_jit_checkpoint = False
        if self.trackio_static_space_id is None:
            self.trackio_static_space_id = False  # a public copy of the curves, one more for every fold
        super().__post_init__()
        if missing := set(self.report_to).difference(get_available_reporting_integrations()):
            raise ValueError(f"--report_to {missing.pop()}: no such tracker, or its package is not installed")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: choose one by CUDA_VISIBLE_DEVICES (a fold each, "
                "scripts/launch_folds.sh), or start a process each by torchrun or accelerate launch"
            )


class StepBatchSampler:
    """A `DataLoader`'s batch sampler that follows a plan; the micro-batches of a step go round the processes."""

    def __init__(self, plan: Plan, rank: int = 0, world_size: int = 1):
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = 0
        self._length = sum(len(step[rank::world_size]) for step in plan(0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.plan(self.epoch):
            yield from step[self.rank :: self.world_size]


def with_labels(batches: Any, items: Sequence[tuple[Rendered, int]]) -> Batch:
    """A batch of (row, label) pairs: what `batches.collate` makes of the rows, and `labels`."""
    labels = torch.tensor([label for _, label in items])
    return batches.collate([row for row, _ in items]) | {"labels": labels}


def row_draws(rows: Sequence[Row], num_rows: int, oversample: float, seed: int, epoch: int) -> np.ndarray:
    """How often an epoch has each row, int64 (num_rows,), in all as often as there are rows.

    On average a row of a class with n rows is drawn in proportion to n^-oversample: 0 takes every row once, 1 as many
    rows of each class (Kang et al. 2020, arXiv 1910.09217, eq. 1, q = 1 - oversample). Sampling is systematic: no row
    is one off its average, so an epoch leaves no class out and repeats no row by chance.
    """
    if not oversample:
        return np.ones(num_rows, dtype=np.int64)
    labels, rng = np.array([row.label for row in rows]), np.random.default_rng((seed, epoch, 1))
    share, order = np.bincount(labels)[labels] ** -oversample, rng.permutation(num_rows)
    ends = np.floor(np.cumsum(share[order]) * num_rows / share.sum() + rng.random()).astype(np.int64)
    ends[-1] = num_rows
    draws = np.zeros(num_rows, dtype=np.int64)
    draws[order] = np.diff(ends, prepend=0)
    return draws


@dataclass
class RowBatches:
    """A row a sequence, padded to the batch's longest. `packing.PackedBatches` is the other way.

    An optimizer step has `rows_per_step` rows (batch size x gradient accumulation x processes) in `micro_batches`
    forward passes (gradient accumulation x processes), a pass in prediction `prediction_rows`.
    """

    pad_token_id: int
    rows_per_step: int
    micro_batches: int
    prediction_rows: int
    segment_name: str | None  # see `inference.segment_name`

    def collate(self, rendered: Sequence[Rendered]) -> Batch:
        """One right-padded batch: `input_ids`, `attention_mask` and, where the encoder is told them, the segments."""

        def pad(sequences: list[np.ndarray], value: int) -> torch.Tensor:
            tensors = [torch.from_numpy(sequence.astype(np.int64)) for sequence in sequences]
            return pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {
            "input_ids": pad([row.input_ids for row in rendered], self.pad_token_id),
            "attention_mask": pad([np.ones(len(row)) for row in rendered], 0),
        }
        if self.segment_name is not None:
            batch[self.segment_name] = pad([row.segment_ids for row in rendered], 0)
        return batch

    def plan(
        self, rows: Sequence[Row], rendered: Sequence[Rendered], seed: int, oversample: float = 0.0
    ) -> Plan:
        """Rows of an epoch (see `row_draws`) shuffled, then bucketed by length so that little is padding.

        Megabatches of 16 steps are sorted by length and dealt to steps, which are shuffled again. Which rows share a
        step depends on `rows_per_step` alone, not on how it is cut: 16x1, 4x4 and two processes of 8 take the same
        steps. Steps differ by at most one row in size, so none is a small remainder, and no micro-batch is empty.
        """
        lengths, passes = np.array([len(row) for row in rendered]), self.micro_batches
        if len(lengths) < passes:
            raise InputError(
                f"{len(lengths)} training rows cannot fill the {passes} batches of a step; use fewer processes or less "
                "--gradient_accumulation_steps"
            )
        num_steps = min(-(-len(lengths) // self.rows_per_step), len(lengths) // passes)
        bounds = np.linspace(0, len(lengths), num_steps + 1).astype(int)

        def steps(epoch: int) -> list[Step]:
            rng = np.random.default_rng((seed, epoch))
            drawn = np.repeat(np.arange(len(lengths)), row_draws(rows, len(lengths), oversample, seed, epoch))
            order = drawn[rng.permutation(len(drawn))]
            for first in range(0, num_steps, MEGABATCH_STEPS):
                megabatch = order[bounds[first] : bounds[min(first + MEGABATCH_STEPS, num_steps)]]
                megabatch[:] = megabatch[np.argsort(lengths[megabatch], kind="stable")]
            whole = np.split(order, bounds[1:-1])
            return [
                [part.tolist() for part in np.array_split(whole[step], passes)]
                for step in rng.permutation(num_steps)
            ]

        return steps

    def prediction_batches(self, rows: Sequence[Row], rendered: Sequence[Rendered]) -> list[list[int]]:
        """Longest first, so that memory runs out at once or never; rows of one length keep their order."""
        order = sorted(range(len(rendered)), key=lambda index: -len(rendered[index]))
        return [order[at : at + self.prediction_rows] for at in range(0, len(order), self.prediction_rows)]


def class_weights(counts: np.ndarray, method: str = "inverse_sqrt") -> np.ndarray:
    """Weights of the classes, float64 (num_labels,), of their `counts` in training; 0 for a class without rows.

    Ratios are 1/sqrt(n_c) for `inverse_sqrt` (paper, 'Loss & Training'), 1/n_c for `balanced`, 1 for `none`. Their mean
    over the rows is 1: the loss keeps the size, and so the learning rate the meaning, that it has without weights.
    """
    exponent = {"none": 0.0, "inverse_sqrt": -0.5, "balanced": -1.0}[method]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
    return weights * (counts.sum() / (weights * counts).sum())


class WeightAverage(TrainerCallback):
    """An exponential moving average of the trained weights, in float32; it takes their place when training ends.

    Step t keeps d = min(decay, (1 + t) / (10 + t)) of the average, as TensorFlow's ExponentialMovingAverage with
    `num_updates`: a short training would else keep much of its random head. Checkpoints hold the average too.
    """

    NAME = "weight_average.safetensors"

    def __init__(self, decay: float):
        self.decay = decay
        self.average: Batch = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        saved = load_file(self._path(args, state)) if state.global_step else trained
        for name, weight in trained.items():
            self.average[name] = saved[name].detach().to(weight.device, torch.float32, copy=True)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                self.average[name].lerp_(weight.float(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_file(self.average, self._path(args, state))

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(self.average[name])

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.NAME


class CheckpointSeal(TrainerCallback):
    """Marks a checkpoint as whole, and as this run's, by its identity: a killed process may leave half of one."""

    NAME = "sealed.json"

    def __init__(self, identity: str):
        self.identity = identity

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # as often as this launch asks for, not the checkpoint's

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / self.NAME, {"identity": self.identity})

    def last(self, folder: Path) -> str | None:
        """The newest whole checkpoint in a folder, if any; an InputError where another run made it."""
        sealed = [path.parent for path in folder.glob(f"checkpoint-*/{self.NAME}")]
        if not sealed:
            return None
        newest = max(sealed, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        if read_json(newest / self.NAME).get("identity") != self.identity:
            raise InputError(
                f"{newest}: made with other arguments or data; delete the folder, or use another --output_dir"
            )
        return str(newest)


class StopOnSigterm(TrainerCallback):
    """On SIGTERM (preemption, a time limit) a checkpoint when the step is done, then exit status 143; after the seal."""

    def __init__(self) -> None:
        self.asked = self.stopping = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopping = self.asked
        if torch.distributed.is_initialized():  # the signal may come a step later to another process
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.stopping = bool(asked)
        control.should_save = control.should_save or self.stopping

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            logger.info(
                f"stopped at step {state.global_step}, checkpoint saved; the same command goes on there"
            )
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # who ends first has the others killed: not before the seal is set
            sys.exit(143)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, self.before)


def ignore_sigterm(worker: int) -> None:
    """For a data loader's workers: a signal to the whole process group must not take the step's batches away."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
