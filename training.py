"""The Trainer of a fold: a weighted loss, batches that follow a plan, checkpoints that are whole or ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import artifacts
from batching import Step, StepBatchSampler
from command_line import InputError
from dialogues import Rendered
from losses import WeightedCrossEntropy


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
            artifacts.write_json(checkpoint / self.NAME, {"arguments": self.arguments})

    def last(self, folder: Path) -> str | None:
        """The newest whole checkpoint in a folder; what is half-written is passed over.

        Raises:
            InputError: it was made with other arguments.
        """
        sealed = [path.parent for path in folder.glob(f"checkpoint-*/{self.NAME}")]
        if not sealed:
            return None
        newest = max(sealed, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        if artifacts.read_json(newest / self.NAME).get("arguments") != self.arguments:
            raise InputError(
                f"{newest}: made with other arguments or data; repeat those, delete the folder, or use another "
                "--output_dir"
            )
        return str(newest)
