"""Rows made of single turns, for encoders: a turn is encoded once, however many rows of its dialogue see it.

An encoder reads both ways, so rows that are read whole share nothing, even where one begins with another. What it makes
of a turn on its own depends on that turn alone: a row is then a few averages of turn embeddings (`PARTS`), and the cost
of a dialogue grows with its length and not with its square.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import LABEL_CUE, Renderer, fold_whitespace
from rareturn.data.rows import Row
from rareturn.models import packing
from rareturn.models.label_tokens import label_tokens
from rareturn.models.loading import BaseModel, is_encoder, load_config
from rareturn.models.packing import PackedBatches, RowGroups
from rareturn.models.training import Batch, FoldTrainingArguments, RowBatches

logger = logging.getLogger(__name__)

# The target, all turns before it, those of its speaker among them, and the last one of another speaker.
PARTS = ("target", "context", "history", "previous")


@dataclass(frozen=True, slots=True)
class RenderedTurns:
    """A row in turns: the tokens of each, int64 with special tokens, and by `PARTS` the places of a part's turns."""

    turns: tuple[np.ndarray, ...]
    parts: tuple[list[int], ...]

    def __len__(self) -> int:
        return sum(map(len, self.turns))


class TurnRenderer:
    """Rows to turns. At most `max_turns` of a row, of each the last `max_seq_length` tokens, or what the encoder takes."""

    fingerprint = None  # there is no prompt

    def __init__(self, base: BaseModel, tokenizer: Any, window: Mapping[str, int]):
        config = load_config(base)
        config = getattr(config, "encoder", config)  # a trained `TurnClassifier`'s
        with torch.device("meta"):
            encoder = AutoModel.from_config(config, trust_remote_code=base.trust_remote_code)
        self.tokenizer, self.max_turns = tokenizer, window["max_turns"]
        self.limit = min(window["max_seq_length"], position_limit(encoder), tokenizer.model_max_length)

    def render(self, rows: Sequence[Row]) -> list[RenderedTurns]:
        """The rows in turns, in their order; each distinct turn is tokenized once. Warns how many turns were cut."""
        texts = [[fold_whitespace(turn.text) for turn in row.turns[-self.max_turns :]] for row in rows]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
        self.tokenizer.truncation_side = "left"
        whole = self.tokenizer(distinct, verbose=False)["input_ids"]
        if cut := sum(len(ids) > self.limit for ids in whole):
            logger.warning(f"{cut} turns are longer than {self.limit} tokens and lost their beginning")
            whole = self.tokenizer(distinct, truncation=True, max_length=self.limit)["input_ids"]
        tokens = dict(zip(distinct, map(np.array, whole), strict=True))
        return [
            RenderedTurns(tuple(tokens[text] for text in seen), self._parts(row))
            for row, seen in zip(rows, texts, strict=True)
        ]

    def _parts(self, row: Row) -> tuple[list[int], ...]:
        *before, target = [turn.speaker for turn in row.turns[-self.max_turns :]]
        own = [place for place, speaker in enumerate(before) if speaker == target]
        others = [place for place, speaker in enumerate(before) if speaker != target]
        return [len(before)], list(range(len(before))), own, others[-1:]


def make_renderer(
    base: BaseModel, tokenizer: Any, guide: LabelGuide, window: Mapping[str, int]
) -> Renderer | TurnRenderer:
    """How a classifier on this base sees rows: turn by turn, or whole."""
    if base.pooling == "turns":
        return TurnRenderer(base, tokenizer, window)
    encoder, cue = is_encoder(load_config(base)), ""
    if base.head == "label_tokens":
        label_tokens(tokenizer, len(guide.labels))  # refused here, before a large model is loaded
        cue = LABEL_CUE
    return Renderer(tokenizer, guide, is_encoder=encoder, cue=cue, **window)


def position_limit(backbone: nn.Module) -> int:
    """Tokens that an encoder has positions for; RoBERTa's begin after the padding's."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return 1 << 30
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions:
            return positions if module.padding_idx is None else positions - module.padding_idx - 1
    return positions


def share_turns(rendered: Sequence[RenderedTurns]) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """The distinct turns of rows, longest first, and what `heads.gather_vectors` puts the rows together by."""
    distinct = {ids.tobytes(): ids for row in rendered for ids in row.turns}
    turns = sorted(distinct.values(), key=len, reverse=True)
    places = {ids.tobytes(): place for place, ids in enumerate(turns)}
    members, sizes = [], []
    for row in rendered:
        own = [places[ids.tobytes()] for ids in row.turns]
        members += [own[place] for part in row.parts for place in part]
        sizes += map(len, row.parts)
    return turns, torch.tensor(members), torch.tensor(np.cumsum([0, *sizes[:-1]]))


def pad_turns(turns: Sequence[np.ndarray], pad_token_id: int) -> Batch:
    """`input_ids` and `attention_mask`, int64 of shape (turns, tokens), padded to the longest."""
    ids = [torch.from_numpy(turn) for turn in turns]
    mask = pad_sequence([torch.ones_like(turn) for turn in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, True, pad_token_id), "attention_mask": mask}


class TurnGroups(RowGroups):
    """Rows of one dialogue; one whose distinct turns pass the token budget is split, each part repeating what it sees."""

    def __init__(self, rows: Sequence[Row], rendered: Sequence[RenderedTurns], budget: int):
        self.budget, self.shared = budget, 0
        self.members: list[list[int]] = []
        together: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            together[row.dialogue_id].append(index)
        sizes: list[int] = []
        for indices in together.values():
            begin, seen = len(sizes), set()
            for index in indices:
                own = {ids.tobytes(): len(ids) for ids in rendered[index].turns}
                new = sum(own[turn] for turn in own.keys() - seen)
                if len(sizes) == begin or sizes[-1] + new > budget:
                    self.members.append([])
                    sizes.append(0)
                    seen, new = set(), sum(own.values())
                self.members[-1].append(index)
                sizes[-1] += new
                seen |= own.keys()
        self.tokens = np.array(sizes)
        self.num_rows = np.array([len(group) for group in self.members])


@dataclass
class TurnBatches(PackedBatches):
    """Batches in which every distinct turn stands once, for a `heads.TurnClassifier`; a dialogue's rows share a step."""

    pad_token_id: int = 0

    def groups(self, rows: Sequence[Row], rendered: Sequence[RenderedTurns]) -> TurnGroups:
        return TurnGroups(rows, rendered, self.tokens_per_batch)

    def collate(self, rendered: Sequence[RenderedTurns]) -> Batch:
        """One batch: the arguments of `TurnClassifier.vectors`."""
        turns, members, starts = share_turns(rendered)
        return pad_turns(turns, self.pad_token_id) | {"members": members, "starts": starts}


def make_batches(
    arguments: Any,
    training: FoldTrainingArguments,
    model: Any,
    base: BaseModel,
    tokenizer: Any,
    states: Any = None,
) -> RowBatches | PackedBatches:
    """How rows become forward passes: turn by turn, or as `packing.make_batches` decides."""
    if base.pooling != "turns":
        return packing.make_batches(arguments, training, model, base, tokenizer, states)
    passes = training.gradient_accumulation_steps * training.world_size
    sizes = training.train_batch_size * passes, passes, arguments.tokens_per_batch
    return TurnBatches(*sizes, math.ceil(training.num_train_epochs), pad_token_id=tokenizer.pad_token_id)
