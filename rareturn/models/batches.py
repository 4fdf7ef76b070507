"""Which way a fold's rows become forward passes: packed by dialogue, or a row a sequence."""

from __future__ import annotations

import math
from typing import Any

from rareturn.errors import InputError
from rareturn.models.inference import segment_name
from rareturn.models.loading import BaseModel, is_encoder, load_config
from rareturn.models.packing import PackedBatches, can_branch
from rareturn.models.training import FoldTrainingArguments, RowBatches


def decide_packing(arguments: Any, training: FoldTrainingArguments, encoder: bool) -> None:
    """Settle the flags whose defaults depend on the architecture.

    Raises:
        InputError: packing asked for where rows share nothing.
    """
    if encoder and arguments.pack_dialogues:
        raise InputError(
            "--pack_dialogues: an encoder reads both ways, so its rows share nothing; leave it out"
        )
    arguments.pack_dialogues = not encoder if arguments.pack_dialogues is None else arguments.pack_dialogues
    if arguments.pack_dialogues and arguments.rows_per_batch is None:
        arguments.rows_per_batch = training.train_batch_size * training.gradient_accumulation_steps
        training.gradient_accumulation_steps = 1


def make_batches(
    arguments: Any, training: FoldTrainingArguments, model: Any, base: BaseModel, tokenizer: Any, longest: int
) -> RowBatches | PackedBatches:
    """How rows of at most `longest` tokens become forward passes: a dialogue at a time, or rows of like length."""
    micro_batches = training.gradient_accumulation_steps * training.world_size
    if not arguments.pack_dialogues:
        segments = segment_name(base, tokenizer) if is_encoder(load_config(base)) else None
        rows_per_step = training.train_batch_size * micro_batches
        prediction_rows = training.per_device_eval_batch_size
        return RowBatches(tokenizer.pad_token_id, rows_per_step, micro_batches, prediction_rows, segments)
    return PackedBatches(
        arguments.rows_per_batch * micro_batches,
        micro_batches,
        arguments.tokens_per_batch,
        math.ceil(training.num_train_epochs),
        can_branch(model, longest),
    )
