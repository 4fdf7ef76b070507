"""Rows made of single turns, for encoders: a turn is encoded once, however many rows of its dialogue see it.

An encoder reads both ways, so rows that are read whole share nothing, even where one begins with another. What it makes
of a turn on its own depends on that turn alone: a row is then a few averages of turn embeddings (`PARTS`), and the cost
of a dialogue grows with its length and not with its square.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from rareturn.data.folds import RunData
from rareturn.data.label_guide import LabelGuide
from rareturn.data.rendering import LABEL_CUE, Renderer, fold_whitespace
from rareturn.data.rows import Row
from rareturn.models.heads import TrunkMemory, embed_turns, gather_vectors
from rareturn.models.inference import place, segment_name
from rareturn.models.label_tokens import label_tokens
from rareturn.models.layers import layer_list
from rareturn.models.loading import BaseModel, is_encoder, load_classifier, load_config, upper_layers
from rareturn.models.packing import PackedBatches, RowGroups, can_branch
from rareturn.models.training import Batch, FoldTrainingArguments, RowBatches
from rareturn.models.trunk import (
    INDEX,
    TOKENS_PER_BATCH,
    cache_folder,
    cached_trunk,
    number_tokens,
    sequences_digest,
    trunk_states,
    write_parts,
)

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
        self.tokenizer, self.max_turns = tokenizer, window["max_turns"]
        self.limit = min(window["max_seq_length"], token_limit(base, tokenizer))

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
    if encoder and window["max_seq_length"] > (limit := token_limit(base, tokenizer)):
        logger.warning(f"{base.name} takes {limit} tokens: rows are cut there, not at --max_seq_length")
        window = {**window, "max_seq_length": limit}
    return Renderer(tokenizer, guide, is_encoder=encoder, cue=cue, **window)


def token_limit(base: BaseModel, tokenizer: Any) -> int:
    """Tokens that an encoder takes at a time."""
    config = load_config(base)
    config = getattr(config, "encoder", config)  # a trained `TurnClassifier`'s
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, trust_remote_code=base.trust_remote_code)
    return min(position_limit(encoder), tokenizer.model_max_length)


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


class TurnStates(dict[bytes, Tensor]):
    """The frozen layers' output for turns, by the bytes of their tokens, mapped from the files of a complete cache.

    `embeddings`, (turns, hidden size), are those of the whole encoder before any training; the files hold whole turns in
    the order of `turns`.
    """

    def __init__(self, turns: Sequence[np.ndarray], files: Sequence[Path]):
        self.places = {ids.tobytes(): place for place, ids in enumerate(turns)}
        embeddings: list[Tensor] = []
        for file in files:
            with safe_open(file, "pt") as part:
                embeddings.append(part.get_tensor("embeddings"))
                own = turns[len(self) : len(self) + len(embeddings[-1])]
                states = part.get_tensor("states").split([len(ids) for ids in own])
            self.update(zip((ids.tobytes() for ids in own), states, strict=True))
        self.embeddings = torch.cat(embeddings)

    def vectors(self, rendered: Sequence[RenderedTurns]) -> Tensor:
        """`TurnClassifier.vectors` of rows before any training."""
        turns, members, starts = share_turns(rendered)
        places = torch.tensor([self.places[ids.tobytes()] for ids in turns])
        return gather_vectors(self.embeddings, places[members], starts, len(PARTS))


def turn_states(
    rows: Sequence[Row], renderer: TurnRenderer, base: BaseModel, cut: int, *, bf16: bool, limit_gb: float
) -> tuple[list[RenderedTurns], TurnStates | None]:
    """Rows, rendered; and the output of the encoder's first `cut` layers for their turns, or None: `trunk.cached_trunk`.

    A turn does not depend on its dialogue: each distinct one is computed once for all folds, epochs, seeds and runs.
    """
    rendered = renderer.render(rows)
    turns, *_ = share_turns(rendered)

    def compute(folder: Path) -> None:
        pad, names = renderer.tokenizer.pad_token_id, list(load_config(base).id2label.values())
        encoder = place(load_classifier(base, names, pad), base).encoder
        below: list[Tensor] = []
        layer_list(encoder)[cut - 1].register_forward_hook(lambda layer, inputs, output: below.append(output))

        def of_pass(batch: Sequence[np.ndarray], begin: int, end: int) -> dict[str, Tensor]:
            inputs = {name: value.to(encoder.device) for name, value in pad_turns(batch, pad).items()}
            with torch.inference_mode(), torch.autocast(encoder.device.type, torch.bfloat16, enabled=bf16):
                (embeddings,) = embed_turns(encoder, **inputs)
            output = below.pop()
            states = output[0] if isinstance(output, tuple) else output
            return {"states": states[inputs["attention_mask"].bool()].cpu(), "embeddings": embeddings.cpu()}

        width = encoder.config.hidden_size * getattr(torch, base.dtype).itemsize
        write_parts(folder, list(_in_passes(turns)), width, of_pass)

    tokens = sum(map(len, turns)), sum(map(len, rendered))
    files = cached_trunk(turns, tokens, (base, cut, bf16, limit_gb), compute)
    return rendered, None if files is None else TurnStates(turns, files)


def _in_passes(turns: Sequence[np.ndarray]) -> Iterator[tuple[Sequence[np.ndarray], int, int]]:
    """Turns, longest first, that go through the encoder together; their first token and the first after them."""
    at = token = 0
    while at < len(turns):
        batch = turns[at : at + max(1, TOKENS_PER_BATCH // len(turns[at]))]
        yield batch, token, token + sum(map(len, batch))
        at, token = at + len(batch), token + sum(map(len, batch))


def share_layers(encoders: Sequence[nn.Module]) -> list[dict[bytes, Tensor]]:
    """Let encoders whose lowest layers are equal compute these once a turn; what they remember, to be cleared at times.

    An encoder with several adapters is given several times.
    """
    groups: list[list[nn.Module]] = []
    for encoder in encoders:
        group = next((group for group in groups if _common_layers(group[0], encoder)), None)
        if group is None:
            groups.append([encoder])
        else:
            group.append(encoder)
    memories = []
    for group in (group for group in groups if len(group) > 1):
        cut, states = min(_common_layers(group[0], encoder) for encoder in group), {}
        for encoder in dict.fromkeys(group):
            TrunkMemory(encoder, layer_list(encoder)[:cut], states, keep=True)
        memories.append(states)
    return memories


def _common_layers(one: nn.Module, other: nn.Module) -> int:
    """How many of two encoders' first layers are equal and without adapters; none unless what serves all layers is."""

    def parts(encoder: nn.Module) -> list[dict[str, Tensor]]:
        layers = layer_list(encoder)
        inside, named = {id(weight) for weight in layers.parameters()}, encoder.named_parameters()
        beside = {name: item for name, item in named if id(item) not in inside and "pooler." not in name}
        return [beside, *(dict(layer.named_parameters()) for layer in layers)]

    def equal(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> bool:
        weights, others = pair
        same = weights.keys() == others.keys() and not any("lora_" in name for name in weights)
        return same and all(torch.equal(weight, others[name]) for name, weight in weights.items())

    alike = itertools.takewhile(equal, zip(parts(one), parts(other), strict=False))
    return max(0, len(list(alike)) - 1)


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


def render(
    parts: Mapping[str, Sequence[Row]],
    data: RunData,
    renderer: Renderer | TurnRenderer,
    base: BaseModel,
    cut: int,
    limit_gb: float,
    bf16: bool,
) -> tuple[dict[str, list[Any]], BaseModel, Any]:
    """Parts of the run's rows as tokens; where the layers below `cut` are computed beforehand, the rest and their states."""
    if not (cut and limit_gb):
        return {name: renderer.render(rows) for name, rows in parts.items()}, base, None
    rows, by_turns = data.rows, base.pooling == "turns"
    compute = turn_states if by_turns else trunk_states
    of_rows, states = compute(rows, renderer, base, cut, bf16=bf16, limit_gb=limit_gb)
    place = {id(row): index for index, row in enumerate(rows)}
    rendered = {name: [of_rows[place[id(row)]] for row in part] for name, part in parts.items()}
    return rendered, base if states is None or by_turns else upper_layers(base, cut), states


def cached_cut(
    rows: Sequence[Row], renderer: Renderer | TurnRenderer, base: BaseModel, top: int, bf16: bool
) -> int:
    """The most layers, up to `top`, whose output `render` finds in the cache for all rows of a run; 0 where there are none."""
    rendered = renderer.render(rows)
    if base.pooling == "turns":
        sequences, *_ = share_turns(rendered)
    else:
        numbered, order = number_tokens(rendered)
        sequences = [numbered[index].input_ids for index in order]
    name = functools.partial(cache_folder, base, sequences_digest(sequences), bf16)
    return next((cut for cut in range(top, 0, -1) if (name(cut=cut) / INDEX).exists()), 0)


def make_batches(
    arguments: Any,
    training: FoldTrainingArguments,
    model: Any,
    base: BaseModel,
    tokenizer: Any,
    states: Any = None,
) -> RowBatches | PackedBatches:
    """How rows become forward passes: turn by turn, a dialogue at a time, or rows of like length."""
    passes = training.gradient_accumulation_steps * training.world_size
    sizes, epochs = (training.train_batch_size * passes, passes), math.ceil(training.num_train_epochs)
    if base.pooling == "turns":
        return TurnBatches(*sizes, arguments.tokens_per_batch, epochs, pad_token_id=tokenizer.pad_token_id)
    if arguments.pack_dialogues:
        budget = arguments.rows_per_batch * passes, passes, arguments.tokens_per_batch
        return PackedBatches(*budget, epochs, can_branch(model), states)
    segments = segment_name(base, tokenizer) if is_encoder(load_config(base)) else None
    return RowBatches(tokenizer.pad_token_id, *sizes, training.per_device_eval_batch_size, segments)
