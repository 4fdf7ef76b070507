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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rareturn.command_line import (
    REQUIRED,
    HubArguments,
    LoaderArguments,
    TrunkCacheArguments,
    flag,
    parse_arguments,
    run,
    start_logging,
)
from rareturn.data.folds import FoldDataArguments, limit_rows, read_run_data, write_folds
from rareturn.errors import InputError
from rareturn.files import disk_errors
from rareturn.reports.push import check_push, push_folds
from rareturn.runs import folder
from rareturn.runs.references import check_name
from rareturn.runs.tables import make_table, rows_digest, write_table

if TYPE_CHECKING:  # imported where they are needed, so that --help does not wait for them
    import torch

    from rareturn.models.loading import BaseModel
    from rareturn.models.training import Plan

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FoldArguments(FoldDataArguments):
    """The run's rows and folder, the fold of this process, and how rows share a forward pass."""

    _argument_group_name = "Rows and folds"

    output_dir: str = flag(REQUIRED, "The run's folder.")
    run_name: str | None = flag(None, "Name of the run. Default: the output folder's name.")
    fold: int = flag(0, "The fold to hold out, counted from 0. One process trains one fold.")
    keep_checkpoints: bool = flag(False, "Keep a complete fold's checkpoints.")
    pack_dialogues: bool | None = flag(None, "One pass for a dialogue's rows. Default: yes for decoders.")
    rows_per_batch: int | None = flag(None, "Packed: rows of a pass on average. Default: all of a step's.")
    tokens_per_batch: int = flag(2048, "Packed: tokens of a pass at most. 2048: two of the paper's rows.")
    max_train_samples: int | None = flag(None, "Smoke runs: rows to train on at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fold < self.num_folds:
            raise ValueError(f"--fold {self.fold} is not one of 0 to {self.num_folds - 1}")


@dataclass(kw_only=True)
class ModelArguments(LoaderArguments, TrunkCacheArguments):
    """The base model, what of it is trained, and the loss."""

    _argument_group_name = "Model"

    model_name_or_path: str = flag(REQUIRED, "Base model: a Hub id or a folder.")
    head: Literal["classifier", "label_tokens"] = flag(
        "classifier",
        "classifier: a new linear head. label_tokens: no new head, the language model's own logits of the labels' "
        "numbers behind the row; serves models without a sequence-classification class.",
    )
    pooling: Literal["native", "mean", "turns"] = flag(
        "native",
        "native: the architecture's own head; for encoders, mean: averages of target and context; turns: the linear "
        "probe's averages of turns, each turn encoded once, --max_seq_length tokens of each at most.",
    )
    head_init: Literal["random", "probe"] = flag(
        "random",
        "probe: start from a logistic head on what the head sees before training (--pooling turns, packed decoders).",
    )
    head_C: float = flag(10.0, "probe: its inverse L2 penalty. 10: what linear_probe.py chose on PsyDefConv.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "Type of the unquantized weights. Default: bfloat16 with nf4, float32 otherwise."
    )
    tuning: str = flag("lora", "lora: adapters and the head; full: all weights.", choices=["lora", "full"])
    trainable_layers: int | None = flag(
        None, "Layers that are trained, from the top; those below are computed once. Default: all."
    )
    lora_r: int = flag(128, "Rank of the adapters. 128, as in the paper.")
    lora_alpha: int = flag(256, "Scale of the adapters. Twice the rank, as in the paper.")
    lora_dropout: float = flag(0.1, "Dropout before the adapters. 0.1, as in the paper.")
    lora_target_modules: list[str] | None = flag(None, "Layers that get adapters. Default: PEFT's choice.")
    class_weights: Literal["none", "inverse_sqrt", "balanced"] = flag(
        "inverse_sqrt", "In the loss, from the fold's training rows: 1/sqrt(n) as in the paper, 1/n, or none."
    )
    loss: Literal["cross_entropy", "focal", "logit_adjusted", "balanced_softmax", "ldam", "distance"] = flag(
        "cross_entropy",
        "docs/LOSSES.md compares them. cross_entropy as in the paper; the two after focal know how rare a class is: give "
        "them --class_weights none; distance needs `distances` in the label guide.",
    )
    focal_gamma: float = flag(2.0, "focal: how much less count rows that the model is sure of. 2: its paper.")
    tau: float = flag(1.0, "logit_adjusted: strength of the adjustment. 1: its paper.")
    ldam_margin: float = flag(0.5, "ldam: margin of the rarest class, in logits. 0.5: its paper.")
    ldam_scale: float = flag(1.0, "ldam: factor on the logits. 1: a cosine head, as in its paper, takes 30.")
    drw_start: float | None = flag(
        None, "Part of training without class weights. Default: 0.8 with ldam (its paper), else 0."
    )
    distance_beta: float = flag(3.0, "distance: at d, e^(-beta d) of the true label's share. 3: 5 % at 1.")
    r_drop_alpha: float = flag(0.0, "R-Drop: weight of two passes' divergence, in twice the time. 0: none.")
    ema_decay: float = flag(0.0, "Keep a moving average of the weights with this decay a step. 0: the last.")
    oversample: float = flag(0.0, "Draw rare classes' rows more often: 0 all rows once, 1 classes equally.")

    def __post_init__(self) -> None:
        self.dtype = self.dtype or ("bfloat16" if self.quantization == "nf4" else "float32")
        if self.quantization != "none" and self.tuning == "full":
            raise ValueError("--quantization nf4 needs --tuning lora: 4-bit weights cannot be trained")
        if self.trainable_layers is not None and self.trainable_layers < 1:
            raise ValueError(f"--trainable_layers {self.trainable_layers}: one layer or more")
        if not 0 < self.head_C < math.inf:
            raise ValueError(f"--head_C must be a positive number, not {self.head_C}")
        for name in ("drw_start", "ema_decay", "oversample"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: from 0 to 1")
        for name in ("focal_gamma", "tau", "ldam_margin", "ldam_scale", "distance_beta", "r_drop_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: 0 or a positive number")


def fold_training_arguments() -> type:
    """transformers' TrainingArguments with a fold's defaults."""
    from rareturn.models.training import FoldTrainingArguments

    return FoldTrainingArguments


@functools.cache
def weighted_trainer() -> type:
    """The class `WeightedTrainer`, made on first use because its parent takes seconds to import."""
    import torch
    from transformers import Trainer

    from rareturn.models import losses
    from rareturn.models.training import StepBatchSampler, ignore_sigterm

    class WeightedTrainer(Trainer):
        """`Trainer` with a loss for classes of unequal size (`losses.step_loss`), and batches that follow a plan.

        The loss is handed over as `compute_loss_func`, which sees `num_items_in_batch`; overriding `compute_loss` with
        a mean would make the gradients `gradient_accumulation_steps` times too large.
        """

        def __init__(
            self,
            plan: Plan,
            class_weights: np.ndarray,
            loss: Any = losses.cross_entropy,
            label_scope: Any = None,
            drw_start: float = 0.0,
            r_drop_alpha: float = 0.0,
            **kwargs: Any,
        ):
            super().__init__(compute_loss_func=self.step_loss, **kwargs)
            self.plan, self.class_weights, self.drw_start = plan, class_weights, drw_start
            self.options = {"loss": loss, "label_scope": label_scope, "r_drop_alpha": r_drop_alpha}
            self.options["label_smoothing_factor"] = self.args.label_smoothing_factor

        def step_loss(self, *batch: Any, **step: Any) -> torch.Tensor:
            """`losses.step_loss`; class weights hold from `drw_start` on, a fraction of the steps (DRW, docs/LOSSES.md)."""
            deferred = self.state.global_step < self.drw_start * self.state.max_steps
            weights = np.ones(len(self.class_weights)) if deferred else self.class_weights
            return losses.step_loss(*batch, **step, class_weights=weights, **self.options)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **kwargs: Any) -> Any:
            """`Trainer`'s; for R-Drop of two passes, which dropout makes differ."""

            def twice(**batch: Any) -> dict[str, torch.Tensor]:
                return {"logits": torch.stack([model(**batch)["logits"] for _ in range(2)])}

            passes = twice if self.options["r_drop_alpha"] else model
            return super().compute_loss(passes, inputs, *arguments, **kwargs)

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            sampler = StepBatchSampler(self.plan, self.args.process_index, self.args.world_size)
            loader = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                worker_init_fn=ignore_sigterm,
                pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
            )
            loader.set_epoch = sampler.set_epoch  # `Trainer` tells the loader
            return loader

    return WeightedTrainer


def load_model(
    base: BaseModel, saved: Path, options: ModelArguments, names: list[str], pad: int, cut: int, states: Any
) -> Any:
    """The model to train from layer `cut` on, or the trained one where a fold was cut off after its training."""
    from rareturn.models.heads import TrunkMemory
    from rareturn.models.layers import freeze_trunk, layer_list
    from rareturn.models.loading import add_lora, is_fsdp_enabled, load_classifier, load_trained

    if options.ema_decay and is_fsdp_enabled():
        raise InputError("--ema_decay: not under FSDP, where a process holds parts of weights")
    if saved.exists():
        return load_trained(base, saved, names, pad)
    model = load_classifier(base, names, pad)
    if cut:
        freeze_trunk(model, cut)
    if base.pooling == "turns" and states is not None:
        TrunkMemory(model.encoder, layer_list(model.encoder)[:cut], states)
    if options.tuning == "full":
        return model
    sizes = options.lora_r, options.lora_alpha, options.lora_dropout
    return add_lora(model, *sizes, options.lora_target_modules, cut)


def train_fold(trainer: Any, base: BaseModel, tokenizer: Any, saved: Path, checkpoint: str | None) -> float:
    """Train from the checkpoint, if any, and save the model unless training diverged; the mean training loss."""
    from rareturn.models.loading import save_trained

    with disk_errors(saved.parent.parent):
        loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        if not all(bool(weight.isfinite().all()) for weight in trained):
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
            reason = "training diverged to weights that are not finite"
            raise InputError(f"{saved.parent}: {reason}; lower --learning_rate, in another --output_dir")
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            save_trained(trainer.accelerator.unwrap_model(trainer.model), tokenizer, base, saved, state)
    return loss


def complete_fold(
    trainer: Any, run_dir: Path, info: dict[str, Any], arguments: FoldArguments, **costs: Any
) -> None:
    """Delete the checkpoints and write the metrics, which make the fold complete, to disk and to the tracker."""
    if not arguments.keep_checkpoints:  # first: a complete fold is not looked at again
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    if trainer.args.trackio_space_id:
        costs["trackio_space_id"] = trainer.args.trackio_space_id
    result = folder.write_fold_metrics(run_dir, info, arguments.fold, **costs)
    trainer.log({f"eval_{name}": value for name, value in result.items() if isinstance(value, float)})


def main() -> None:
    # Arguments
    own = (FoldArguments, ModelArguments, HubArguments), __doc__
    arguments, options, hub, training = parse_arguments(*own, training_arguments=fold_training_arguments)
    fold, run_dir, is_main = arguments.fold, Path(arguments.output_dir), training.process_index == 0
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    if hub.push_only:
        return push_folds(run_dir, hub) if is_main else None
    if training.do_predict and not arguments.test_file:
        raise InputError("--do_predict needs a --test_file")
    if is_main:
        check_push(hub, run_name)

    # Logging
    import transformers

    from rareturn.models import loading, losses, probing, turns
    from rareturn.models.inference import predict_logits
    from rareturn.models.packing import accept_packed, decide_packing
    from rareturn.models.training import CheckpointSeal, StopOnSigterm, WeightAverage, with_labels

    start_logging(logging.INFO if is_main else logging.ERROR)
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    fold_dir = run_dir / f"fold-{fold}"
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(fold_dir / "logs"))
    training.output_dir, training.run_name = str(fold_dir / "checkpoints"), f"{run_name}-fold-{fold}"
    training.project = training.project or hub.hub_name or run_name

    # Seed
    transformers.set_seed(training.seed)
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    train = limit_rows(data.training_part(fold), arguments.max_train_samples)
    labels = [row.label for row in train]
    counts = np.bincount(labels, minlength=len(data.guide.labels))
    loss = losses.find_loss(options, counts, data.guide, data.scope)

    # Model
    how = {name: getattr(options, name) for name in loading.LOADING}
    base = loading.find_base_model(options.model_name_or_path, options.model_revision, **how)
    encoder, tokenizer = loading.is_encoder(loading.load_config(base)), loading.load_tokenizer(base)
    renderer = turns.make_renderer(base, tokenizer, data.guide, arguments.window)
    cut, flags = loading.trunk_layers(base, options.trainable_layers), (arguments, options, training)
    loader = base.loader | {"bf16": training.bf16, "tuning": options.tuning}
    facts = {"prompt_fingerprint": renderer.fingerprint, "processes": training.world_size}
    info = folder.describe_run(run_name, data, base, *flags, seed=training.seed, loader=loader, **facts)
    folder.check_same_run(run_dir, info, *flags)  # before a large model is loaded
    decide_packing(arguments, training, encoder)
    missing = {} if folder.fold_is_complete(run_dir, fold) else {"oof": data.held_out_part(fold)}
    if training.do_predict and not folder.test_table_is_current(run_dir, fold, rows_digest(data.test)):
        missing["test"] = data.test
    if not missing:
        logger.info(f"fold {fold} of {run_dir} is complete: nothing to train")
        return push_folds(run_dir, hub, [fold]) if hub.push_to_hub and is_main else None
    seal, saved = CheckpointSeal(info["identity"]["digest"]), folder.adapter_dir(run_dir, fold)
    checkpoint = None if saved.exists() else seal.last(fold_dir / "checkpoints")
    cached = arguments.pack_dialogues or base.pooling == "turns"
    parts, limit = {"train": train, **missing}, options.trunk_cache_gb if cached else 0.0
    rendered, base, states = turns.render(parts, data, renderer, base, cut, limit, training.bf16)
    model = load_model(base, saved, options, data.guide.names, tokenizer.pad_token_id, cut, states)
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info(f"fold {fold}: {len(train)} rows {counts.tolist()}; {trainable:,} of {total:,} parameters")

    # Train
    batches = turns.make_batches(arguments, training, model, base, tokenizer, states)
    if arguments.pack_dialogues:
        accept_packed(model)
    plan = batches.plan(train, rendered["train"], training.seed, options.oversample)
    if options.head_init == "probe" and not (saved.exists() or checkpoint):
        probing.init_head(model, batches, train, rendered["train"], options, training.bf16, states)
    if is_main:
        write_folds(run_dir, data.folds, **arguments.split)
        folder.write_run_info(run_dir, info, *flags)
    trainer = weighted_trainer()(
        model=model,
        args=training,
        data_collator=functools.partial(with_labels, batches),
        train_dataset=list(zip(rendered["train"], labels, strict=True)),
        plan=plan,
        callbacks=[*([WeightAverage(options.ema_decay)] if options.ema_decay else ()), seal, StopOnSigterm()],
        **loss,
    )
    train_loss = None if saved.exists() else train_fold(trainer, base, tokenizer, saved, checkpoint)

    # Evaluate and save
    for name, rows in missing.items():
        how = {"scope": data.scope, "bf16": training.bf16, "description": f"fold {fold}: {name}"}
        logits = predict_logits(trainer.model, batches, rows, rendered[name], **how)
        if is_main:
            write_table(folder.table_path(run_dir, name, fold), make_table(rows, fold, logits))
    if is_main and "oof" in missing:
        seconds = round(time.perf_counter() - started, 1)
        costs = {"trainable_parameters": trainable, "train_loss": train_loss, "seconds": seconds}
        complete_fold(trainer, run_dir, info, arguments, train_rows=len(train), **costs)

    # Push
    if hub.push_to_hub and is_main:
        push_folds(run_dir, hub, [fold])


if __name__ == "__main__":
    run(main)
