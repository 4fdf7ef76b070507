"""What training a fold takes beside transformers' Trainer: arguments, class weights, planned batches, sealed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from rareturn.command_line import flag
from rareturn.data.rendering import Rendered
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.files import read_json, write_json

Step = list[list[int]]  # a step's micro-batches, each a list of indices into the data set
MEGABATCH_STEPS = 16


@dataclass
class FoldTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that a fold wants."""

    bf16: bool | None = flag(None, "bf16 autocast. Default: on a GPU, never on a CPU.")
    save_strategy: str = flag("epoch", "When to write a checkpoint to resume from.")
    save_total_limit: int | None = flag(2, "Checkpoints kept. 2: the newer may be half-written.")
    logging_steps: float = flag(10, "Steps between two log lines.")
    report_to: str = flag("none", "Where to log: tensorboard, wandb, …")

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu)
        if self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end would pick a model on its out-of-fold rows")
        # The script pushes, and its rows are no columns of a data set.
        self.push_to_hub = self.remove_unused_columns = False
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process: choose one by CUDA_VISIBLE_DEVICES (a fold each, "
                "scripts/launch_folds.sh), or start a process each by torchrun or accelerate launch"
            )


def plan_rows(
    lengths: Sequence[int], rows_per_step: int, micro_batches: int, seed: int, epoch: int
) -> list[Step]:
    """One epoch of unpacked rows: shuffled, then bucketed by length so that little is padding.

    Megabatches of 16 steps are sorted by length and dealt to steps, which are shuffled again. Which rows share a step
    depends on `rows_per_step` alone, not on how it is cut: 16x1, 4x4 and two processes of 8 take the same steps. Steps
    differ by at most one row in size, so none is a small remainder.

    Args:
        lengths: tokens of each row.
        rows_per_step: batch size x gradient accumulation x processes.
        micro_batches: gradient accumulation x processes; every step has exactly so many, none empty.

    Raises:
        InputError: fewer rows than micro-batches in a step.
    """
    if len(lengths) < micro_batches:
        raise InputError(
            f"{len(lengths)} training rows cannot fill the {micro_batches} batches of a step; use fewer processes or "
            "less --gradient_accumulation_steps"
        )
    rng = np.random.default_rng((seed, epoch))
    order, lengths = rng.permutation(len(lengths)), np.asarray(lengths)
    num_steps = min(-(-len(order) // rows_per_step), len(order) // micro_batches)
    bounds = np.linspace(0, len(order), num_steps + 1).astype(int)
    for first in range(0, num_steps, MEGABATCH_STEPS):
        megabatch = order[bounds[first] : bounds[min(first + MEGABATCH_STEPS, num_steps)]]
        megabatch[:] = megabatch[np.argsort(lengths[megabatch], kind="stable")]
    steps = np.split(order, bounds[1:-1])
    return [
        [part.tolist() for part in np.array_split(steps[step], micro_batches)]
        for step in rng.permutation(num_steps)
    ]


class StepBatchSampler:
    """A `DataLoader`'s batch sampler that follows a plan of optimizer steps and gives a process its share.

    Args:
        plan: epoch -> steps; the same number of steps, each of the same number of micro-batches, in every epoch.
        rank, world_size: of this process; micro-batches go round the processes.
    """

    def __init__(self, plan: Callable[[int], list[Step]], rank: int = 0, world_size: int = 1):
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


def with_labels(
    collate: Callable[[Sequence[Rendered]], dict[str, torch.Tensor]], items: Sequence[tuple[Rendered, int]]
) -> dict[str, torch.Tensor]:
    """A batch of (row, label) pairs: what `collate` makes of the rows, and `labels`."""
    return collate([row for row, _ in items]) | {"labels": torch.tensor([label for _, label in items])}


@dataclass
class RowBatches:
    """A row a sequence, padded to the batch's longest. `packing.PackedBatches` is the other way.

    Attributes:
        rows_per_step: rows of an optimizer step, over all processes.
        micro_batches: forward passes of an optimizer step, over all processes.
        prediction_rows: rows of a forward pass in prediction.
        segment_name: see `segment_name`.
    """

    pad_token_id: int
    rows_per_step: int
    micro_batches: int
    prediction_rows: int
    segment_name: str | None

    def collate(self, rendered: Sequence[Rendered]) -> dict[str, torch.Tensor]:
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
        self, rows: Sequence[Row], rendered: Sequence[Rendered], seed: int
    ) -> Callable[[int], list[Step]]:
        """Epoch -> its steps; see `plan_rows`."""
        lengths = [len(row) for row in rendered]
        return lambda epoch: plan_rows(lengths, self.rows_per_step, self.micro_batches, seed, epoch)

    def prediction_batches(self, rows: Sequence[Row], rendered: Sequence[Rendered]) -> list[list[int]]:
        """Longest first, so that memory runs out at once or never; rows of one length keep their order."""
        order, size = (
            sorted(range(len(rendered)), key=lambda index: -len(rendered[index])),
            self.prediction_rows,
        )
        return [order[begin : begin + size] for begin in range(0, len(order), size)]


def class_weights(counts: np.ndarray, method: str = "inverse_sqrt") -> np.ndarray:
    """Weights of the classes, scaled so that their mean over the training rows is 1.

    Ratios are 1/sqrt(n_c) for `inverse_sqrt` (paper, 'Loss & Training'), 1/n_c for `balanced`, 1 for `none`. With mean
    1 over the rows the loss keeps the size, and so the learning rate the meaning, that it has without weights.

    Args:
        counts: rows per class in the fold's training part, shape (num_labels,).

    Returns:
        float64 (num_labels,), 0 for a class without rows.
    """
    exponent = {"none": 0.0, "inverse_sqrt": -0.5, "balanced": -1.0}[method]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
    return weights * (counts.sum() / (weights * counts).sum())


class EpochDataLoader(DataLoader):
    """A loader that tells its batch sampler the epoch, as `Trainer` tells the loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class CheckpointSeal(TrainerCallback):
    """Marks a checkpoint as whole, and as this run's, by its identity: a killed process may leave half of one."""

    NAME = "sealed.json"

    def __init__(self, identity: str):
        self.identity = identity

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / self.NAME, {"identity": self.identity})

    def last(self, folder: Path) -> str | None:
        """The newest whole checkpoint in a folder; half-written ones are passed over.

        Raises:
            InputError: another run made it.
        """
        sealed = [path.parent for path in folder.glob(f"checkpoint-*/{self.NAME}")]
        if not sealed:
            return None
        newest = max(sealed, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        if read_json(newest / self.NAME).get("identity") != self.identity:
            raise InputError(
                f"{newest}: made with other arguments or data; delete the folder, or use another --output_dir"
            )
        return str(newest)
