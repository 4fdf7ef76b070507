"""What training a fold takes beside transformers' Trainer: class weights, batches by plan, sealed checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from rareturn.data.rendering import Rendered
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.files import read_json, write_json

Step = list[list[int]]  # a step's micro-batches, each a list of indices into the data set


MEGABATCH_STEPS = 16


def plan_rows(
    lengths: Sequence[int], rows_per_step: int, micro_batches: int, seed: int, epoch: int
) -> list[Step]:
    """One epoch of unpacked rows: shuffled, then bucketed by length so that little is padding.

    Rows are shuffled, cut into megabatches of 16 steps, sorted by length within each, and dealt to steps; the steps
    are shuffled again. Which rows share a step depends on `rows_per_step` alone, not on how it is cut: 16x1, 4x4 and
    two processes of 8 take the same steps. Steps differ by at most one row in size, so none is a small remainder.

    Args:
        lengths: tokens of each row.
        rows_per_step: batch size x gradient accumulation x processes.
        micro_batches: gradient accumulation x processes; every step has exactly so many, none empty.

    Raises:
        ValueError: fewer rows than micro-batches in a step.
    """
    if len(lengths) < micro_batches:
        raise ValueError(f"{len(lengths)} training rows cannot fill {micro_batches} micro-batches")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    num_steps = max(1, min(-(-len(lengths) // rows_per_step), len(lengths) // micro_batches))
    lengths = np.asarray(lengths)
    steps: list[Step] = []
    bounds = np.linspace(0, len(order), num_steps + 1).astype(int)
    for first in range(0, num_steps, MEGABATCH_STEPS):
        last = min(first + MEGABATCH_STEPS, num_steps)
        megabatch = order[bounds[first] : bounds[last]]
        megabatch = megabatch[np.argsort(lengths[megabatch], kind="stable")]
        for step in range(first, last):
            rows = megabatch[bounds[step] - bounds[first] : bounds[step + 1] - bounds[first]]
            steps.append([part.tolist() for part in np.array_split(rows, micro_batches)])
    return [steps[index] for index in rng.permutation(num_steps)]


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


class RowBatches:
    """A row a sequence, padded to the batch's longest. `packing.PackedBatches` is the other way.

    Args:
        rows_per_step: rows of an optimizer step, over all processes.
        micro_batches: forward passes of an optimizer step, over all processes.
        prediction_rows: rows of a forward pass in prediction.
        segment_name: see `segment_name`.
    """

    def __init__(
        self,
        pad_token_id: int,
        rows_per_step: int,
        micro_batches: int,
        prediction_rows: int,
        segment_name: str | None,
    ):
        self.pad_token_id, self.segment_name = pad_token_id, segment_name
        self.rows_per_step, self.micro_batches = rows_per_step, micro_batches
        self.prediction_rows = prediction_rows

    def collate(self, rendered: Sequence[Rendered]) -> dict[str, torch.Tensor]:
        """One right-padded batch: `input_ids`, `attention_mask` and, where the encoder is told them, the segments."""
        shape = (len(rendered), max(map(len, rendered)))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        if self.segment_name is not None:
            batch[self.segment_name] = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rendered):
            batch["input_ids"][index, : len(row)] = torch.from_numpy(row.input_ids.astype(np.int64))
            batch["attention_mask"][index, : len(row)] = 1
            if self.segment_name is not None:
                segments = torch.from_numpy(row.segment_ids.astype(np.int64))
                batch[self.segment_name][index, : len(row)] = segments
        return batch

    def plan(
        self, rows: Sequence[Row], rendered: Sequence[Rendered], seed: int
    ) -> Callable[[int], list[Step]]:
        """Epoch -> its steps; see `plan_rows`."""
        lengths = [len(row) for row in rendered]
        return lambda epoch: plan_rows(lengths, self.rows_per_step, self.micro_batches, seed, epoch)

    def prediction_batches(self, rows: Sequence[Row], rendered: Sequence[Rendered]) -> list[list[int]]:
        """Longest first, so that memory runs out at once or never; rows of one length keep their order."""
        order = sorted(range(len(rendered)), key=lambda index: -len(rendered[index]))
        return [
            order[begin : begin + self.prediction_rows]
            for begin in range(0, len(order), self.prediction_rows)
        ]


CLASS_WEIGHTS = ("none", "inverse_sqrt", "balanced")


def class_weights(counts: np.ndarray, method: str = "inverse_sqrt") -> np.ndarray:
    """Weights of the classes, scaled so that their mean over the training rows is 1.

    Ratios are 1/sqrt(n_c) for `inverse_sqrt` (paper, 'Loss & Training'), 1/n_c for `balanced`, 1 for `none`. With mean
    1 over the rows the loss keeps the size, and so the learning rate the meaning, that it has without weights.

    Args:
        counts: rows per class in the fold's training part, shape (num_labels,).

    Returns:
        float64 of shape (num_labels,); a class without rows has weight 0.
    """
    exponent = {"none": 0.0, "inverse_sqrt": -0.5, "balanced": -1.0}[method]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
    return weights * (counts.sum() / (weights * counts).sum())


class WeightedCrossEntropy:
    """A `compute_loss_func` for `Trainer`: sum over the rows of w_y · CE_ε, divided by the rows of the optimizer step.

    CE_ε is cross-entropy against (1 - ε) · onehot(y) + ε / C, with the row's class weight on the whole of it. Dividing
    by `num_items_in_batch`, which `Trainer` counts over all micro-batches (and processes) of the step, makes 16x1 and
    1x16 rows one and the same step; a mean over each micro-batch would not, and at one row a micro-batch would cancel
    the weights. `outputs.logits` may be any floating type; the loss is float32.

    Args:
        weights: of the classes, shape (num_labels,), as `class_weights` gives them.
        label_scope: the labels that a specialist tells apart; the others' logits stay out of the softmax.
    """

    def __init__(
        self,
        weights: np.ndarray,
        label_smoothing_factor: float = 0.0,
        label_scope: Sequence[int] | None = None,
    ):
        scope = list(range(len(weights)) if label_scope is None else label_scope)
        self.scope = torch.tensor(scope)
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.place = torch.full((len(weights),), -1).scatter(0, self.scope, torch.arange(len(scope)))
        self.label_smoothing_factor = label_smoothing_factor

    def __call__(
        self, outputs: dict, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of a micro-batch; `num_items_in_batch` None (evaluation) divides by its own rows.

        Args:
            outputs: with `logits` of shape (rows, num_labels).
            labels: class indices of shape (rows,).
        """
        if self.weights.device != labels.device:
            self.scope, self.weights, self.place = (
                tensor.to(labels.device) for tensor in (self.scope, self.weights, self.place)
            )
        log_probabilities = nn.functional.log_softmax(outputs["logits"].float()[:, self.scope], dim=-1)
        chosen = log_probabilities.gather(1, self.place[labels][:, None]).squeeze(1)
        smoothing = self.label_smoothing_factor
        row_loss = -(1 - smoothing) * chosen - smoothing * log_probabilities.mean(dim=-1)
        total = (self.weights[labels] * row_loss).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class RowDataset(Dataset):
    """(rendered row, label) pairs."""

    def __init__(self, rendered: Sequence[Rendered], labels: Sequence[int]):
        self.rendered, self.labels = rendered, labels

    def __len__(self) -> int:
        return len(self.rendered)

    def __getitem__(self, index: int) -> tuple[Rendered, int]:
        return self.rendered[index], self.labels[index]


class EpochDataLoader(DataLoader):
    """A loader that tells its batch sampler the epoch, as `Trainer` tells the loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class WeightedTrainer(Trainer):
    """`Trainer` with class weights and smoothing in the loss, and batches that follow a plan.

    The loss is handed over as `compute_loss_func`, which sees `num_items_in_batch`; overriding `compute_loss` with a
    mean would make the gradients `gradient_accumulation_steps` times too large.

    Args:
        class_weights: shape (num_labels,); see `losses.class_weights`.
        label_scope: see `WeightedCrossEntropy`.
        plan: epoch -> steps; see `StepBatchSampler`.
    """

    def __init__(
        self,
        *args: Any,
        class_weights: np.ndarray,
        plan: Callable[[int], list[Step]],
        label_scope: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        loss = WeightedCrossEntropy(class_weights, kwargs["args"].label_smoothing_factor, label_scope)
        super().__init__(*args, compute_loss_func=loss, **kwargs)
        self.plan = plan

    def get_train_dataloader(self) -> DataLoader:
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=StepBatchSampler(self.plan, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
        )


class CheckpointSeal(TrainerCallback):
    """Marks a checkpoint as whole, and as made with these arguments: a killed process may leave half of one.

    Args:
        arguments: a digest of all that decides the training.
    """

    NAME = "sealed.json"

    def __init__(self, arguments: str):
        self.arguments = arguments

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / self.NAME, {"arguments": self.arguments})

    def last(self, folder: Path) -> str | None:
        """The newest whole checkpoint in a folder; what is half-written is passed over.

        Raises:
            InputError: it was made with other arguments.
        """
        sealed = [path.parent for path in folder.glob(f"checkpoint-*/{self.NAME}")]
        if not sealed:
            return None
        newest = max(sealed, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        if read_json(newest / self.NAME).get("arguments") != self.arguments:
            raise InputError(
                f"{newest}: made with other arguments or data; repeat those, delete the folder, or use another "
                "--output_dir"
            )
        return str(newest)
