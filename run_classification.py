"""Train one fold of one run, and write its out-of-fold and test logits.

Full system, one fold on a 24 GB GPU:
    python run_classification.py --config recipes/qwen3-8b/anchor.yaml --augmented_file augmented.jsonl --fold 0
A laptop, a minute or two:
    python run_classification.py --config recipes/minilm/demo.yaml --fold 0

All folds of a run: scripts/launch_folds.sh RECIPE. A complete fold is skipped, an incomplete one resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments, set_seed

from rareturn.command_line import parse_arguments, provenance, run
from rareturn.data.folds import (
    FoldDataArguments,
    RunData,
    label_counts,
    limit_rows,
    read_run_data,
    write_folds,
)
from rareturn.data.rendering import Rendered, Renderer
from rareturn.data.rows import Row, data_fingerprint
from rareturn.decisions.metrics import scores as all_scores
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT
from rareturn.errors import InputError
from rareturn.files import disk_errors, read_json, write_json
from rareturn.models import training as training_module
from rareturn.models.inference import (
    count_parameters,
    has_fast_bf16,
    peak_memory,
    predict_logits,
    segment_name,
)
from rareturn.models.loading import (
    LOADING,
    BaseModel,
    add_lora,
    find_base_model,
    is_encoder,
    load_classifier,
    load_config,
    load_tokenizer,
    load_trained,
    save_trained,
)
from rareturn.models.packing import PackedBatches, accept_packed, can_branch
from rareturn.models.training import (
    CLASS_WEIGHTS,
    CheckpointSeal,
    RowBatches,
    RowDataset,
    WeightedTrainer,
    with_labels,
)
from rareturn.reports.cards import run_card, run_results
from rareturn.runs import publish
from rareturn.runs.folder import (
    adapter_dir,
    check_same_run,
    fold_is_complete,
    metrics_path,
    table_path,
    write_run_info,
)
from rareturn.runs.publish import push_run
from rareturn.runs.references import check_name, model_repo
from rareturn.runs.tables import LogitTable, make_table, write_table

logger = logging.getLogger(__name__)


# What may differ between two launches of one run: where, how loudly, and what TrainingArguments derives from the machine.
NOT_OF_THE_RUN = (
    *(
        "fold",
        "output_dir",
        "push_only",
        "push_to_hub",
        "hub_namespace",
        "hub_name",
        "hub_private_repo",
        "use_cpu",
    ),
    *("disable_tqdm", "report_to", "logging_steps", "logging_strategy", "log_level", "dataloader_pin_memory"),
    *("dataloader_num_workers", "debug", "include_for_metrics", "accelerator_config", "keep_checkpoints"),
)


@dataclass
class FoldArguments(FoldDataArguments):
    """The run's rows, the fold of this process, and how rows share a forward pass."""

    fold: int = field(default=0, metadata={"help": "The fold to hold out, counted from 0."})
    pack_dialogues: bool | None = field(
        default=None,
        metadata={"help": "One pass a dialogue (packing.py). Default: yes for decoders, no for encoders."},
    )
    rows_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Packed: rows of a forward pass on average. Default: all of a step's, per_device_train_batch_size x "
            "gradient_accumulation_steps, in one pass."
        },
    )
    tokens_per_batch: int = field(
        default=2048,
        metadata={"help": "Packed: tokens of a forward pass at most. 2048: the paper's two rows of 1,024."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Smoke runs: rows to train on at most."}
    )


@dataclass
class ModelArguments:
    """The base model, what of it is trained, and the loss."""

    model_name_or_path: str = field(metadata={"help": "Base model: a Hub id or a folder."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let a Hub model run its own Python code."}
    )
    pooling: str = field(
        default="native",
        metadata={
            "help": "native: the architecture's own way to the head; mean (encoders): averages of target and context.",
            "choices": ["native", "mean"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention kernel: sdpa, eager, … Default: the fastest that the model has."},
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Type of the unquantized weights. Default: bfloat16 with nf4, float32 otherwise."},
    )
    quantization: str = field(
        default="none", metadata={"help": "nf4 loads the base in 4 bits (QLoRA).", "choices": ["none", "nf4"]}
    )
    tuning: str = field(
        default="lora",
        metadata={"help": "lora trains adapters and the head, full trains all.", "choices": ["lora", "full"]},
    )
    lora_r: int = field(default=128, metadata={"help": "Rank. 128, as in the paper."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale; twice the rank, as in the paper."})
    lora_dropout: float = field(
        default=0.1, metadata={"help": "Dropout before the adapters. 0.1, as in the paper."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Projections that get adapters. Default: PEFT's choice for the architecture."},
    )
    class_weights: str = field(
        default="inverse_sqrt",
        metadata={
            "help": "Of the loss, from the fold's training rows: 1/sqrt(n), 1/n or none.",
            "choices": list(CLASS_WEIGHTS),
        },
    )

    def __post_init__(self) -> None:
        self.dtype = self.dtype or ("bfloat16" if self.quantization == "nf4" else "float32")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype}: one of float32, bfloat16, float16")
        if self.quantization != "none" and self.tuning == "full":
            raise ValueError("--quantization nf4 needs --tuning lora: 4-bit weights cannot be trained")


@dataclass
class FoldTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with the defaults that a fold wants, and where the results go."""

    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast. Default: where the processor or GPU computes in bf16 natively."},
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint to resume from."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept: one may be half-written."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    report_to: str = field(default="none", metadata={"help": "Where to log: tensorboard, wandb, …"})
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run. Default: the output folder's name."}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep a complete fold's checkpoints."})
    hub_namespace: str | None = field(default=None, metadata={"help": "User or organisation to push to."})
    hub_name: str | None = field(
        default=None, metadata={"help": "System's name: repos NAME-RUN and NAME-oof."}
    )
    push_only: bool = field(
        default=False, metadata={"help": "Push a fold that is complete on disk; train nothing."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = has_fast_bf16() and not (self.fp16 or (self.use_cpu and torch.cuda.is_available()))
        if not torch.cuda.is_available():
            self.use_cpu = True
        if self.load_best_model_at_end:
            raise ValueError(
                "--load_best_model_at_end would pick a model on the fold that is the out-of-fold estimate"
            )
        if (self.push_to_hub or self.push_only) and not (self.hub_namespace and self.hub_name):
            raise ValueError("--push_to_hub needs --hub_namespace and --hub_name")
        super().__post_init__()


def check_arguments(data: FoldArguments, training: FoldTrainingArguments) -> None:
    """Refuse what no fold can be trained with.

    Raises:
        InputError: a fold that the run does not have, several GPUs, or --do_predict without a test file.
    """
    if not 0 <= data.fold < data.num_folds:
        raise InputError(f"--fold {data.fold} is not one of 0 to {data.num_folds - 1}")
    if training.n_gpu > 1:
        raise InputError(
            f"{training.n_gpu} GPUs are visible to one process: choose one by CUDA_VISIBLE_DEVICES (a fold each, "
            "scripts/launch_folds.sh), or start a process each by torchrun or accelerate launch"
        )
    if training.do_predict and not data.test_file:
        raise InputError("--do_predict needs a --test_file")


def resolved_recipe(*argument_sets: Any) -> dict[str, Any]:
    """The arguments that differ from their defaults, or that have none: enough to run the run again, no token."""
    recipe: dict[str, Any] = {}
    for arguments in argument_sets:
        for item in dataclasses.fields(arguments):
            value = getattr(arguments, item.name)
            has_default = item.default is not dataclasses.MISSING and value == item.default
            if (
                item.init
                and (item.name == "train_file" or not has_default)
                and "token" not in item.name
                and not item.name.startswith("_")
            ):
                recipe[item.name] = getattr(value, "value", value)
    for key in NOT_OF_THE_RUN:
        recipe.pop(key, None)
    return json.loads(json.dumps(recipe, default=str))


def push_fold(run_dir: Path, fold: int, training: FoldTrainingArguments) -> None:
    """Push a complete fold, then the run's card, which tells of all folds that are complete by then."""
    private = training.hub_private_repo is not False
    where = (training.hub_namespace, training.hub_name)
    shas = publish.push_fold(run_dir, fold, *where, private=private)
    info = read_json(run_dir / "run.json")
    repo = model_repo(*where, info["name"])
    card = run_card(info, run_results(run_dir, info), repo)
    shas |= push_run(run_dir, *where, model_card=card, private=private)
    for pushed, sha in shas.items():
        print(f"pushed fold {fold} to {pushed} at {sha}")


def prepare_model(
    options: ModelArguments, base: BaseModel, data: RunData, pad_token_id: int, saved: Path
) -> torch.nn.Module:
    """The model to train, or the trained one where a fold was cut off after its training."""
    if saved.exists():
        return load_trained(base, saved, data.guide.names, pad_token_id)
    model = load_classifier(base, data.guide.names, pad_token_id)
    if options.tuning == "full":
        return model
    lora = {name: getattr(options, name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
    return add_lora(model, **lora, target_modules=options.lora_target_modules)


def prepare_batches(
    arguments: FoldArguments,
    training: FoldTrainingArguments,
    model: torch.nn.Module,
    longest: int,
    pad_token_id: int,
    segments: str | None,
) -> RowBatches | PackedBatches:
    """How rows become forward passes: a dialogue at a time, or rows of like length."""
    micro_batches = training.gradient_accumulation_steps * training.world_size
    if not arguments.pack_dialogues:
        rows_per_step = training.train_batch_size * micro_batches
        return RowBatches(
            pad_token_id, rows_per_step, micro_batches, training.per_device_eval_batch_size, segments
        )
    branches = can_branch(model, longest)
    accept_packed(model)
    return PackedBatches(
        arguments.rows_per_batch * micro_batches,
        micro_batches,
        arguments.tokens_per_batch,
        math.ceil(training.num_train_epochs),
        branches,
    )


def decide_packing(
    arguments: FoldArguments, training: FoldTrainingArguments, base: BaseModel, encoder: bool
) -> None:
    """Settle the flags whose defaults hang on the architecture.

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


def train_unless_saved(
    trainer: WeightedTrainer,
    base: BaseModel,
    tokenizer: Any,
    saved: Path,
    checkpoint: str | None,
    is_main: bool,
) -> float | None:
    """Train from the checkpoint, if any, and save the adapter; the mean training loss, or None if it was saved before."""
    if saved.exists():
        return None
    with disk_errors(saved.parent.parent):
        loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if is_main:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            save_trained(trained, tokenizer, base, saved, state)
    return loss


def main() -> None:
    # Arguments
    classes = (FoldArguments, ModelArguments, FoldTrainingArguments)
    arguments, options, training = parse_arguments(classes, __doc__)
    check_arguments(arguments, training)
    fold, run_dir = arguments.fold, Path(training.output_dir)
    fold_dir = run_dir / f"fold-{fold}"
    run_name = check_name(training.run_name or run_dir.resolve().name, "--run_name")
    push, is_main = training.push_to_hub or training.push_only, training.process_index == 0
    # What the Trainer itself would do with these is not what a fold wants.
    training.push_to_hub, training.run_name, training.remove_unused_columns = False, run_name, False
    training.output_dir = str(fold_dir / "checkpoints")
    recipe = resolved_recipe(arguments, options, training)

    # Logging
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if is_main else logging.ERROR,
    )
    transformers.utils.logging.set_verbosity(training.get_process_log_level())
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(fold_dir / "logs"))

    if fold_is_complete(run_dir, fold, training.do_predict):
        logger.info(f"fold {fold} of {run_dir} is complete: nothing to train")
        if push and is_main:
            push_fold(run_dir, fold, training)
        return
    if training.push_only:
        raise InputError(f"{run_dir}: fold {fold} is not complete, so there is nothing to push")

    # Seed
    set_seed(training.seed)
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    train = limit_rows(data.training_part(fold), arguments.max_train_samples)
    held_out, num_labels = data.held_out_part(fold), len(data.guide.labels)
    counts = label_counts(train, num_labels)

    # Model
    loading = {name: getattr(options, name) for name in LOADING}
    base = find_base_model(options.model_name_or_path, options.model_revision, **loading)
    encoder = is_encoder(load_config(base))
    decide_packing(arguments, training, base, encoder)
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, data.guide, is_encoder=encoder, **arguments.window)
    train_rendered, held_out_rendered, test_rendered = map(renderer.render, (train, held_out, data.test))
    run_info = {
        "name": run_name,
        **data.describe(),
        **arguments.split,
        "seed": training.seed,
        "base_model": base.name,
        "base_revision": base.revision,
        "loader": base.loader | {"bf16": training.bf16, "tuning": options.tuning},
        "window": arguments.window,
        "recipe": recipe,
        "prompt_fingerprint": renderer.fingerprint,
        **provenance(),
    }
    check_same_run(run_dir, run_info)  # before a large model is loaded
    decides = [
        recipe,
        data_fingerprint(train),
        run_info["data_fingerprint"],
        base.revision,
        training.world_size,
    ]
    seal = CheckpointSeal(hashlib.sha256(json.dumps(decides).encode()).hexdigest())
    checkpoint = seal.last(fold_dir / "checkpoints")
    saved = adapter_dir(run_dir, fold)
    model = prepare_model(options, base, data, tokenizer.pad_token_id, saved)
    trainable, total = count_parameters(model)
    logger.info(f"fold {fold}: {len(train)} training rows {counts.tolist()}, {len(held_out)} held out")
    logger.info(f"{base.name}: {trainable:,} of {total:,} parameters are trained")
    if is_main:
        write_folds(run_dir, data.folds, **arguments.split)
        write_run_info(run_dir, run_info)

    # Train
    longest = max(map(len, train_rendered + held_out_rendered + test_rendered))
    segments = segment_name(base, tokenizer) if encoder else None
    batches = prepare_batches(arguments, training, model, longest, tokenizer.pad_token_id, segments)
    trainer = WeightedTrainer(
        model=model,
        args=training,
        data_collator=functools.partial(with_labels, batches.collate),
        train_dataset=RowDataset(train_rendered, [row.label for row in train]),
        class_weights=training_module.class_weights(counts, options.class_weights),
        label_scope=data.scope,
        plan=batches.plan(train, train_rendered, training.seed),
        callbacks=[seal],
    )
    train_loss = train_unless_saved(trainer, base, tokenizer, saved, checkpoint, is_main)

    # Evaluate and save
    def predict(rows: list[Row], rendered: list[Rendered], name: str) -> LogitTable:
        logits = predict_logits(
            trainer.model,
            rendered,
            batches.prediction_batches(rows, rendered),
            batches.collate,
            num_labels=num_labels,
            bf16=training.bf16,
            description=f"fold {fold}: {name}",
        )
        outside = [label for label in data.guide.numbers if label not in data.scope]
        logits[:, outside] = OUT_OF_SCOPE_LOGIT
        table = make_table(rows, fold, logits)
        if is_main:
            write_table(table_path(run_dir, name, fold), table)
        return table

    oof = predict(held_out, held_out_rendered, "oof")
    if training.do_predict:
        predict(data.test, test_rendered, "test")
    if not is_main:
        return
    scores = all_scores(oof.label, oof.logits.argmax(1), num_labels, data.guide.positive)
    fold_metrics = {
        **scores,
        "fold": fold,
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "trainable_parameters": trainable,
        "train_loss": train_loss,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory(),
    }
    # Before the metrics, which make the fold complete: a complete fold is not looked at again.
    if not training.keep_checkpoints:
        shutil.rmtree(fold_dir / "checkpoints", ignore_errors=True)
    write_json(metrics_path(run_dir, fold), fold_metrics)
    print(
        f"fold {fold}: macro_f1_positive {scores['macro_f1_positive']:.4f}, accuracy {scores['accuracy']:.4f}"
    )

    # Push
    if push:
        push_fold(run_dir, fold, training)


if __name__ == "__main__":
    run(main)
