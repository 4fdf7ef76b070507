# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Train one fold of one run, and write its out-of-fold and test logits.

Full system, one fold on a 24 GB GPU:
    python run_classification.py --config recipes/qwen3-8b/anchor.yaml --augmented_file augmented.jsonl --fold 0
A laptop, a minute or two:
    python run_classification.py --config recipes/minilm/demo.yaml --fold 0

All folds of a run: scripts/launch_folds.sh RECIPE. A complete fold is skipped, an incomplete one resumes.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, run, start_logging
from rareturn.data.folds import FoldDataArguments, label_counts, limit_rows, read_run_data, write_folds
from rareturn.data.rendering import Renderer
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT
from rareturn.errors import InputError
from rareturn.files import disk_errors
from rareturn.reports.push import push_folds
from rareturn.runs.folder import (
    adapter_dir,
    check_same_run,
    describe_run,
    fold_is_complete,
    table_path,
    test_table_is_current,
    write_fold_metrics,
    write_run_info,
)
from rareturn.runs.references import check_name
from rareturn.runs.tables import make_table, rows_digest, write_table

if TYPE_CHECKING:  # imported where they are needed, so that --help does not wait for them
    import torch

    from rareturn.models.loading import BaseModel
    from rareturn.models.packing import PackedBatches
    from rareturn.models.training import FoldTrainingArguments, RowBatches, Step

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FoldArguments(FoldDataArguments):
    """The run's rows and folder, the fold of this process, and how rows share a forward pass."""

    _argument_group_name = "Rows and folds"

    output_dir: str = flag(REQUIRED, "The run's folder.")
    run_name: str | None = flag(None, "Name of the run. Default: the output folder's name.")
    fold: int = flag(0, "The fold to hold out, counted from 0.")
    keep_checkpoints: bool = flag(False, "Keep a complete fold's checkpoints.")
    pack_dialogues: bool | None = flag(
        None, "One pass for all rows of a dialogue. Default: yes for decoders, no for encoders."
    )
    rows_per_batch: int | None = flag(
        None,
        "Packed: rows of a forward pass on average. Default: all of a step's, per_device_train_batch_size x "
        "gradient_accumulation_steps, in one pass.",
    )
    tokens_per_batch: int = flag(
        2048, "Packed: tokens of a forward pass at most. 2048: the paper's two rows of 1,024."
    )
    max_train_samples: int | None = flag(None, "Smoke runs: rows to train on at most.")

    def __post_init__(self) -> None:
        if not 0 <= self.fold < self.num_folds:
            raise ValueError(f"--fold {self.fold} is not one of 0 to {self.num_folds - 1}")


@dataclass(kw_only=True)
class ModelArguments:
    """The base model, what of it is trained, and the loss."""

    _argument_group_name = "Model"

    model_name_or_path: str = flag(REQUIRED, "Base model: a Hub id or a folder.")
    model_revision: str | None = flag(None, "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = flag(False, "Let a Hub model run its own Python code.")
    pooling: str = flag(
        "native",
        "native: the architecture's own way to the head; mean (encoders): averages of target and context.",
        choices=["native", "mean"],
    )
    attn_implementation: str | None = flag(
        None, "Attention kernel: sdpa, eager, … Default: the fastest that the model has."
    )
    dtype: str | None = flag(
        None,
        "Type of the unquantized weights. Default: bfloat16 with nf4, float32 otherwise.",
        choices=["float32", "bfloat16", "float16"],
    )
    quantization: str = flag("none", "nf4 loads the base in 4 bits (QLoRA).", choices=["none", "nf4"])
    tuning: str = flag(
        "lora", "lora trains adapters and the head, full trains all weights.", choices=["lora", "full"]
    )
    lora_r: int = flag(128, "Rank of the adapters. 128, as in the paper.")
    lora_alpha: int = flag(256, "Scale of the adapters. Twice the rank, as in the paper.")
    lora_dropout: float = flag(0.1, "Dropout before the adapters. 0.1, as in the paper.")
    lora_target_modules: list[str] | None = flag(
        None, "Projections that get adapters. Default: PEFT's choice for the architecture."
    )
    class_weights: str = flag(
        "inverse_sqrt",
        "Weights in the loss, from the fold's training rows: 1/sqrt(n) as in the paper, 1/n, or none.",
        choices=["none", "inverse_sqrt", "balanced"],
    )

    def __post_init__(self) -> None:
        self.dtype = self.dtype or ("bfloat16" if self.quantization == "nf4" else "float32")
        if self.quantization != "none" and self.tuning == "full":
            raise ValueError("--quantization nf4 needs --tuning lora: 4-bit weights cannot be trained")


def fold_training_arguments() -> type:
    """transformers' TrainingArguments with a fold's defaults."""
    from rareturn.models.training import FoldTrainingArguments

    return FoldTrainingArguments


def weighted_cross_entropy(
    outputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    class_weights: np.ndarray,
    label_smoothing_factor: float = 0.0,
    label_scope: Sequence[int] | None = None,
) -> torch.Tensor:
    """Sum over the rows of w_y · CE_ε, divided by the rows of the optimizer step.

    CE_ε is cross-entropy against (1 - ε) · onehot(y) + ε / C, with the row's class weight on the whole of it. Dividing
    by `num_items_in_batch`, which `Trainer` counts over all micro-batches (and processes) of the step, makes 16x1 and
    1x16 rows the same step; a mean over each micro-batch would not, and at one row a micro-batch would cancel the
    weights.

    Args:
        outputs: with `logits` of shape (rows, num_labels), of any floating type; the loss is float32.
        labels: class indices of shape (rows,).
        num_items_in_batch: None (evaluation) divides by the rows given.
        class_weights: shape (num_labels,).
        label_scope: the labels that a specialist tells apart; the others' logits stay out of the softmax.
    """
    import torch

    scope = torch.arange(len(class_weights)) if label_scope is None else torch.tensor(list(label_scope))
    place = torch.full((len(class_weights),), -1).scatter(0, scope, torch.arange(len(scope)))
    weights = torch.tensor(class_weights, dtype=torch.float32, device=labels.device)
    logits = outputs["logits"].float()[:, scope.to(labels.device)]
    log_probabilities = torch.nn.functional.log_softmax(logits, dim=-1)
    chosen = log_probabilities.gather(1, place.to(labels.device)[labels][:, None]).squeeze(1)
    smoothing = label_smoothing_factor
    row_loss = -(1 - smoothing) * chosen - smoothing * log_probabilities.mean(dim=-1)
    total = (weights[labels] * row_loss).sum()
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@functools.cache
def weighted_trainer() -> type:
    """The class `WeightedTrainer`, made on first use because its parent takes seconds to import."""
    import torch
    from transformers import Trainer

    from rareturn.models.training import EpochDataLoader, StepBatchSampler

    class WeightedTrainer(Trainer):
        """`Trainer` with class weights and smoothing in the loss, and batches that follow a plan.

        The loss is handed over as `compute_loss_func`, which sees `num_items_in_batch`; overriding `compute_loss` with
        a mean would make the gradients `gradient_accumulation_steps` times too large.

        Args:
            class_weights: shape (num_labels,); see `training.class_weights`.
            label_scope: see `weighted_cross_entropy`.
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
            loss = functools.partial(
                weighted_cross_entropy,
                class_weights=class_weights,
                label_smoothing_factor=kwargs["args"].label_smoothing_factor,
                label_scope=label_scope,
            )
            super().__init__(*args, compute_loss_func=loss, **kwargs)
            self.plan = plan

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return EpochDataLoader(
                self.train_dataset,
                batch_sampler=StepBatchSampler(self.plan, self.args.process_index, self.args.world_size),
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
            )

    return WeightedTrainer


def decide_packing(
    arguments: FoldArguments, training: FoldTrainingArguments, base: BaseModel, encoder: bool
) -> None:
    """Settle the flags whose defaults depend on the architecture.

    Raises:
        InputError: packing asked for where rows share nothing.
    """
    if arguments.pack_dialogues is None:
        arguments.pack_dialogues = not encoder
    if not arguments.pack_dialogues:
        return
    if encoder:
        raise InputError(
            f"--pack_dialogues: {base.name} reads both ways, so its rows share nothing; leave it out"
        )
    if arguments.rows_per_batch is None:
        arguments.rows_per_batch = training.train_batch_size * training.gradient_accumulation_steps
        training.gradient_accumulation_steps = 1


def make_batches(
    arguments: FoldArguments,
    training: FoldTrainingArguments,
    model: torch.nn.Module,
    longest: int,
    pad_token_id: int,
    segments: str | None,
) -> RowBatches | PackedBatches:
    """How rows become forward passes: a dialogue at a time, or rows of like length.

    Args:
        longest: tokens of the longest row.
        segments: see `segment_name`.
    """
    from rareturn.models.packing import PackedBatches, can_branch
    from rareturn.models.training import RowBatches

    micro_batches = training.gradient_accumulation_steps * training.world_size
    if not arguments.pack_dialogues:
        rows_per_step = training.train_batch_size * micro_batches
        prediction_rows = training.per_device_eval_batch_size
        return RowBatches(pad_token_id, rows_per_step, micro_batches, prediction_rows, segments)
    return PackedBatches(
        arguments.rows_per_batch * micro_batches,
        micro_batches,
        arguments.tokens_per_batch,
        math.ceil(training.num_train_epochs),
        can_branch(model, longest),
    )


def train_and_save(
    trainer: Any, base: BaseModel, tokenizer: Any, saved: Path, checkpoint: str | None
) -> float:
    """Train from the checkpoint, if any, and save the model; the mean training loss.

    Raises:
        InputError: no room on the disk, or a training that diverged; nothing is saved then.
    """
    from rareturn.models.loading import save_trained

    with disk_errors(saved.parent.parent):
        loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        if not all(
            bool(weight.isfinite().all()) for weight in trainer.model.parameters() if weight.requires_grad
        ):
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
            raise InputError(
                f"{saved.parent}: training diverged to weights that are not finite; lower --learning_rate"
            )
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            save_trained(trainer.accelerator.unwrap_model(trainer.model), tokenizer, base, saved, state)
    return loss


def main() -> None:
    # Arguments
    classes = (FoldArguments, ModelArguments, HubArguments)
    arguments, options, hub, training = parse_arguments(
        classes, __doc__, training_arguments=fold_training_arguments
    )
    fold, run_dir = arguments.fold, Path(arguments.output_dir)
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    is_main = training.process_index == 0
    if hub.push_only:
        return push_folds(run_dir, hub) if is_main else None
    if training.n_gpu > 1:
        raise InputError(
            f"{training.n_gpu} GPUs are visible to one process: choose one by CUDA_VISIBLE_DEVICES (a fold each, "
            "scripts/launch_folds.sh), or start a process each by torchrun or accelerate launch"
        )
    if training.do_predict and not arguments.test_file:
        raise InputError("--do_predict needs a --test_file")

    # Logging
    import transformers

    from rareturn.models import inference, loading, packing
    from rareturn.models.training import CheckpointSeal, RowDataset, class_weights, with_labels

    start_logging(logging.INFO if is_main else logging.ERROR)
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    fold_dir = run_dir / f"fold-{fold}"
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(fold_dir / "logs"))
    training.output_dir, training.run_name = str(fold_dir / "checkpoints"), run_name

    # Seed
    transformers.set_seed(training.seed)
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    train = limit_rows(data.training_part(fold), arguments.max_train_samples)
    wanted = {"oof": data.held_out_part(fold), "test": data.test if training.do_predict else []}
    counts = label_counts(train, len(data.guide.labels))

    # Model
    flags = {name: getattr(options, name) for name in loading.LOADING}
    base = loading.find_base_model(options.model_name_or_path, options.model_revision, **flags)
    encoder = loading.is_encoder(loading.load_config(base))
    tokenizer = loading.load_tokenizer(base)
    renderer = Renderer(tokenizer, data.guide, is_encoder=encoder, **arguments.window)
    info = describe_run(
        *(run_name, data, base, arguments, options, training),
        seed=training.seed,
        loader=base.loader | {"bf16": training.bf16, "tuning": options.tuning},
        prompt_fingerprint=renderer.fingerprint,
        processes=training.world_size,
    )
    check_same_run(run_dir, info, arguments, options, training)  # before a large model is loaded
    complete = fold_is_complete(run_dir, fold, needs_test=False)
    if not wanted["test"] or test_table_is_current(run_dir, fold, rows_digest(wanted["test"])):
        del wanted["test"]
    if complete:
        del wanted["oof"]
    if not wanted:
        logger.info(f"fold {fold} of {run_dir} is complete: nothing to train")
        return push_folds(run_dir, hub, [fold]) if hub.push_to_hub and is_main else None
    decide_packing(arguments, training, base, encoder)
    seal, saved = CheckpointSeal(info["identity"]["digest"]), adapter_dir(run_dir, fold)
    checkpoint = None if saved.exists() else seal.last(fold_dir / "checkpoints")
    rendered = {name: renderer.render(rows) for name, rows in {"train": train, **wanted}.items()}
    if saved.exists():
        model = loading.load_trained(base, saved, data.guide.names, tokenizer.pad_token_id)
    else:
        model = loading.load_classifier(base, data.guide.names, tokenizer.pad_token_id)
        if options.tuning == "lora":
            lora = {name: getattr(options, name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
            model = loading.add_lora(model, **lora, target_modules=options.lora_target_modules)
    trainable, total = inference.count_parameters(model)
    logger.info(f"fold {fold}: {len(train)} training rows {counts.tolist()}")
    logger.info(f"{base.name}: {trainable:,} of {total:,} parameters are trained")

    # Train
    segments = inference.segment_name(base, tokenizer) if encoder else None
    batches = {
        name: make_batches(arguments, training, model, max(map(len, rows)), tokenizer.pad_token_id, segments)
        for name, rows in rendered.items()
    }
    if arguments.pack_dialogues:
        packing.accept_packed(model)
    plan = batches["train"].plan(train, rendered["train"], training.seed)
    plan(0)  # rows that cannot fill a step are found before anything is written
    if is_main:
        write_folds(run_dir, data.folds, **arguments.split)
        write_run_info(run_dir, info, arguments, options, training)
    trainer = weighted_trainer()(
        model=model,
        args=training,
        data_collator=functools.partial(with_labels, batches["train"].collate),
        train_dataset=RowDataset(rendered["train"], [row.label for row in train]),
        class_weights=class_weights(counts, options.class_weights),
        label_scope=data.scope,
        plan=plan,
        callbacks=[seal],
    )
    train_loss = None if saved.exists() else train_and_save(trainer, base, tokenizer, saved, checkpoint)

    # Evaluate and save
    for name, rows in wanted.items():
        logits = inference.predict_logits(
            trainer.model,
            rendered[name],
            batches[name].prediction_batches(rows, rendered[name]),
            batches[name].collate,
            num_labels=len(data.guide.labels),
            bf16=training.bf16,
            description=f"fold {fold}: {name}",
        )
        logits[:, [label for label in data.guide.numbers if label not in data.scope]] = OUT_OF_SCOPE_LOGIT
        if is_main:
            write_table(table_path(run_dir, name, fold), make_table(rows, fold, logits))
    if not is_main:
        return None
    if not complete:
        # Before the metrics, which make the fold complete: a complete fold is not looked at again.
        if not arguments.keep_checkpoints:
            shutil.rmtree(fold_dir / "checkpoints", ignore_errors=True)
        costs = {
            "trainable_parameters": trainable,
            "train_loss": train_loss,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": inference.peak_memory(),
        }
        write_fold_metrics(run_dir, info, fold, train_rows=len(train), **costs)

    # Push
    if hub.push_to_hub:
        push_folds(run_dir, hub, [fold])


if __name__ == "__main__":
    run(main)
