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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, run, start_logging
from rareturn.data.folds import FoldDataArguments, RunData, limit_rows, read_run_data, write_folds
from rareturn.data.rendering import Rendered, Renderer
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.files import disk_errors
from rareturn.reports.push import push_folds
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
class ModelArguments:
    """The base model, what of it is trained, and the loss."""

    _argument_group_name = "Model"

    model_name_or_path: str = flag(REQUIRED, "Base model: a Hub id or a folder.")
    model_revision: str | None = flag(None, "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = flag(False, "Let a Hub model run its own Python code.")
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
        "probe (turns): start from the logistic head that linear_probe.py fits, not from a random one.",
    )
    head_C: float = flag(10.0, "Its inverse L2 penalty. 10: what linear_probe.py chose on PsyDefConv.")
    attn_implementation: str | None = flag(None, "Attention kernel: sdpa, eager, … Default: the fastest.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "Type of the unquantized weights. Default: bfloat16 with nf4, float32 otherwise."
    )
    quantization: str = flag("none", "nf4 loads the base in 4 bits (QLoRA).", choices=["none", "nf4"])
    gguf_file: str | None = flag(None, "GGUF file in that repo or folder to read weights and tokenizer from.")
    tuning: str = flag("lora", "lora: adapters and the head; full: all weights.", choices=["lora", "full"])
    trainable_layers: int | None = flag(
        None, "Layers that are trained, from the top; those below are computed once. Default: all."
    )
    trunk_cache_gb: float = flag(
        20, "Disk for the frozen layers' output of all data sets, in GB; 0 computes it in every pass."
    )
    lora_r: int = flag(128, "Rank of the adapters. 128, as in the paper.")
    lora_alpha: int = flag(256, "Scale of the adapters. Twice the rank, as in the paper.")
    lora_dropout: float = flag(0.1, "Dropout before the adapters. 0.1, as in the paper.")
    lora_target_modules: list[str] | None = flag(None, "Layers that get adapters. Default: PEFT's choice.")
    class_weights: Literal["none", "inverse_sqrt", "balanced"] = flag(
        "inverse_sqrt", "In the loss, from the fold's training rows: 1/sqrt(n) as in the paper, 1/n, or none."
    )

    def __post_init__(self) -> None:
        self.dtype = self.dtype or ("bfloat16" if self.quantization == "nf4" else "float32")
        if self.quantization != "none" and self.tuning == "full":
            raise ValueError("--quantization nf4 needs --tuning lora: 4-bit weights cannot be trained")
        if self.trainable_layers is not None and self.trainable_layers < 1:
            raise ValueError(f"--trainable_layers {self.trainable_layers}: one layer or more")
        if self.head_init == "probe" and self.pooling != "turns":
            raise ValueError("--head_init probe needs --pooling turns, whose vectors are the probe's")
        if not 0 < self.head_C < math.inf:
            raise ValueError(f"--head_C must be a positive number, not {self.head_C}")


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
    """Sum over the rows of w_y · CE_ε, divided by the rows of the optimizer step (None, in evaluation: those given).

    CE_ε is cross-entropy against (1 - ε) · onehot(y) + ε / C, with the row's class weight on the whole of it. Dividing
    by `num_items_in_batch`, which `Trainer` counts over all micro-batches (and processes) of the step, makes 16x1 and
    1x16 rows the same step; a mean over each micro-batch would not, and at one row a micro-batch would cancel the
    weights. Logits of shape (rows, num_labels) have any floating type; the loss is float32. `label_scope` are the
    ascending labels that a specialist tells apart; the others' logits stay out of the softmax.
    """
    import torch

    scope = torch.tensor(label_scope or range(len(class_weights)), device=labels.device)
    weights = torch.tensor(class_weights, dtype=torch.float32, device=labels.device)
    logits, places = outputs["logits"].float()[:, scope], torch.searchsorted(scope, labels)
    options = {"reduction": "none", "label_smoothing": label_smoothing_factor}
    row_loss = torch.nn.functional.cross_entropy(logits, places, **options)
    rows = len(labels) if num_items_in_batch is None else num_items_in_batch
    return (weights[labels] * row_loss).sum() / rows


@functools.cache
def weighted_trainer() -> type:
    """The class `WeightedTrainer`, made on first use because its parent takes seconds to import."""
    import torch
    from transformers import Trainer

    from rareturn.models.training import StepBatchSampler

    class WeightedTrainer(Trainer):
        """`Trainer` with class weights and smoothing in the loss, and batches that follow a plan.

        The loss is handed over as `compute_loss_func`, which sees `num_items_in_batch`; overriding `compute_loss` with
        a mean would make the gradients `gradient_accumulation_steps` times too large.
        """

        def __init__(self, plan: Plan, class_weights: np.ndarray, label_scope: Any = None, **kwargs: Any):
            options = {"class_weights": class_weights, "label_scope": label_scope}
            options["label_smoothing_factor"] = kwargs["args"].label_smoothing_factor
            loss = functools.partial(weighted_cross_entropy, **options)
            super().__init__(compute_loss_func=loss, **kwargs)
            self.plan = plan

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            sampler = StepBatchSampler(self.plan, self.args.process_index, self.args.world_size)
            loader = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=torch.cuda.is_available() and self.args.dataloader_pin_memory,
            )
            loader.set_epoch = sampler.set_epoch  # `Trainer` tells the loader
            return loader

    return WeightedTrainer


def render(
    parts: dict[str, list[Row]],
    data: RunData,
    renderer: Renderer,
    base: BaseModel,
    cut: int,
    limit_gb: float,
    bf16: bool,
) -> tuple[dict[str, list[Rendered]], BaseModel, Any]:
    """Parts of the run's rows as tokens; where the layers below `cut` are computed beforehand, the rest and their states."""
    if not (cut and limit_gb):
        return {name: renderer.render(rows) for name, rows in parts.items()}, base, None
    from rareturn.models.loading import upper_layers
    from rareturn.models.trunk import trunk_states

    rendered, states = trunk_states(parts, data, renderer, base, cut, bf16=bf16, limit_gb=limit_gb)
    return rendered, base if states is None else upper_layers(base, cut), states


def load_model(
    base: BaseModel, saved: Path, options: ModelArguments, names: list[str], pad: int, cut: int
) -> Any:
    """The model to train from layer `cut` on, or the trained one where a fold was cut off after its training."""
    from rareturn.models.layers import freeze_trunk
    from rareturn.models.loading import add_lora, load_classifier, load_trained

    if saved.exists():
        return load_trained(base, saved, names, pad)
    model = load_classifier(base, names, pad)
    if cut:
        freeze_trunk(model, cut)
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
            reason = "training diverged to weights that are not finite; lower --learning_rate"
            raise InputError(f"{saved.parent}: {reason}")
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            save_trained(trainer.accelerator.unwrap_model(trainer.model), tokenizer, base, saved, state)
    return loss


def main() -> None:
    # Arguments
    own = (FoldArguments, ModelArguments, HubArguments)
    parsed = parse_arguments(own, __doc__, training_arguments=fold_training_arguments)
    arguments, options, hub, training = parsed
    fold, run_dir, is_main = arguments.fold, Path(arguments.output_dir), training.process_index == 0
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    if hub.push_only:
        return push_folds(run_dir, hub) if is_main else None
    if training.do_predict and not arguments.test_file:
        raise InputError("--do_predict needs a --test_file")

    # Logging
    import transformers

    from rareturn.models import loading, probing, turns
    from rareturn.models.inference import predict_logits
    from rareturn.models.packing import accept_packed, decide_packing
    from rareturn.models.training import CheckpointSeal, class_weights, with_labels

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
    labels = [row.label for row in train]
    counts = np.bincount(labels, minlength=len(data.guide.labels))

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
    parts, limit = {"train": train, **missing}, options.trunk_cache_gb if arguments.pack_dialogues else 0.0
    rendered, base, states = render(parts, data, renderer, base, cut, limit, training.bf16)
    model = load_model(base, saved, options, data.guide.names, tokenizer.pad_token_id, cut)
    trainable, total = model.num_parameters(only_trainable=True), model.num_parameters()
    logger.info(f"fold {fold}: {len(train)} rows {counts.tolist()}; {trainable:,} of {total:,} parameters")

    # Train
    batches = turns.make_batches(arguments, training, model, base, tokenizer, states)
    if arguments.pack_dialogues:
        accept_packed(model)
    plan = batches.plan(train, rendered["train"], training.seed)
    if options.head_init == "probe" and not (saved.exists() or checkpoint):
        probing.init_head(model, batches, train, rendered["train"], options, training.bf16)
    if is_main:
        write_folds(run_dir, data.folds, **arguments.split)
        folder.write_run_info(run_dir, info, *flags)
    trainer = weighted_trainer()(
        model=model,
        args=training,
        data_collator=functools.partial(with_labels, batches),
        train_dataset=list(zip(rendered["train"], labels, strict=True)),
        class_weights=class_weights(counts, options.class_weights),
        label_scope=data.scope,
        plan=plan,
        callbacks=[seal],
    )
    train_loss = None if saved.exists() else train_fold(trainer, base, tokenizer, saved, checkpoint)

    # Evaluate and save
    for name, rows in missing.items():
        how = {"scope": data.scope, "bf16": training.bf16, "description": f"fold {fold}: {name}"}
        logits = predict_logits(trainer.model, batches, rows, rendered[name], **how)
        if is_main:
            write_table(folder.table_path(run_dir, name, fold), make_table(rows, fold, logits))
    if is_main and "oof" in missing:
        # Before the metrics, which make the fold complete: a complete fold is not looked at again.
        if not arguments.keep_checkpoints:
            shutil.rmtree(fold_dir / "checkpoints", ignore_errors=True)
        seconds = round(time.perf_counter() - started, 1)
        costs = {"trainable_parameters": trainable, "train_loss": train_loss, "seconds": seconds}
        folder.write_fold_metrics(run_dir, info, fold, train_rows=len(train), **costs)

    # Push
    if hub.push_to_hub and is_main:
        push_folds(run_dir, hub, [fold])


if __name__ == "__main__":
    run(main)
