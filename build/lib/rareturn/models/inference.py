"""How a model predicts."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from rareturn.data.rendering import Rendered
from rareturn.data.rows import Row
from rareturn.decisions.probabilities import OUT_OF_SCOPE_LOGIT
from rareturn.models.loading import BaseModel


def place(model: nn.Module, base: BaseModel) -> nn.Module:
    """The model in evaluation mode, on this process's GPU if there is one; a quantized model is there already."""
    if torch.cuda.is_available() and base.quantization == "none":
        model.to(torch.cuda.current_device())
    return model.eval()


def segment_name(base: BaseModel, tokenizer: Any) -> str | None:
    """The name under which a batch tells an encoder's target from its context; None if the encoder is not told."""
    if base.pooling == "mean":
        return "segment_ids"
    example = tokenizer("a", "b").get("token_type_ids") or [0]
    return "token_type_ids" if example[-1] == 1 else None


def predict_logits(
    model: nn.Module,
    batches: Any,
    rows: Sequence[Row],
    rendered: Sequence[Rendered],
    *,
    scope: Sequence[int] | None = None,
    bf16: bool = False,
    description: str | None = None,
    alone: bool = False,
) -> np.ndarray:
    """Logits of rows, float32 of shape (rows, num_labels), on every process; the processes share the batches.

    Args:
        batches: `RowBatches` or `PackedBatches`.
        scope: other labels get `OUT_OF_SCOPE_LOGIT`.
        description: of the progress bar; None shows none.
        alone: whether each process has rows of its own.
    """
    rank, world_size = 0, 1
    if torch.distributed.is_initialized() and not alone:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device, num_labels = next(model.parameters()).device, model.config.num_labels
    logits = np.full((len(rendered), num_labels), np.nan, dtype=np.float32)
    passes = batches.prediction_batches(rows, rendered)
    # A sharded model needs every process in each pass, so a process with one batch fewer repeats the last one.
    own = passes[rank::world_size] + passes[-1:] * (rank >= len(passes) % world_size > 0)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in tqdm(own, desc=description, unit="batch", disable=rank > 0 or not description):
            inputs = batches.collate([rendered[index] for index in batch])
            inputs = {key: value.to(device) for key, value in inputs.items()}
            logits[batch] = model(**inputs).logits.float().cpu().numpy()
    model.train(was_training)
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, logits)
        for part in parts:
            logits = np.where(np.isnan(logits), part, logits)
    if scope is not None:
        logits[:, np.setdiff1d(np.arange(num_labels), scope)] = OUT_OF_SCOPE_LOGIT
    return logits


def peak_memory() -> int:
    """Bytes: the most that this process had on the GPU, or in memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
