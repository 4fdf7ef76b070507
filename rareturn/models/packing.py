"""One pass per dialogue: rows that begin alike share their beginning, and each keeps the logits that it has alone.

A decoder's hidden state depends on the tokens before it and on nothing after it, and a dialogue's rows are prefixes of
one another. So the rows of a batch are laid out as a trie in depth-first order, with one token for every distinct
prefix. A token sees its ancestors only and has its depth as its position, so its hidden state is the one that it has
in the row alone; a row is classified at its last token. An augmented variant is a branch beside its source's target,
the label guide stands once a batch, and nothing is padded.

Any set of rows may share a batch; which ones do matters for cost alone (`RowGroups`, `PackedBatches`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from rareturn.data.rendering import Rendered
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.models.training import Batch, FoldTrainingArguments, Plan, Step, row_draws

logger = logging.getLogger(__name__)

FLEX_TOKENS, FLEX_BLOCK = 2048, 128  # tokens of a pass from which flex attention pays; its blocks' size
STEP_GROWTH = 1.02  # by which the number of steps is raised until every batch of every epoch keeps its tokens


class Layout(NamedTuple):
    """Rows as one sequence of tokens; int64 of shape (tokens,), `row_positions` of shape (rows,).

    Attributes:
        position_ids: the place of each token in the rows that hold it.
        subtree_end: the first token after those that see this one: token i sees j where j <= i < subtree_end[j].
        row_positions: the last token of each row, in the rows' order.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    row_positions: np.ndarray


def lay_out(rows: Sequence[np.ndarray], branches: bool = True) -> Layout:
    """The trie of the rows' token ids, none empty, in depth-first order.

    Without `branches` it starts anew, at position 0, where a row does not continue the one before it: plain causal
    sequences, one after the other, for attention kernels that know no other mask.
    """
    ids, positions = [], []
    subtree_end = np.zeros(sum(map(len, rows)), dtype=np.int64)
    row_positions = np.zeros(len(rows), dtype=np.int64)
    path, total = np.zeros(0, dtype=np.int64), 0
    for index, shared in in_trie_order(rows, branches):
        row = rows[index]
        subtree_end[path[shared:]] = total
        end = total + len(row) - shared
        path = np.concatenate([path[:shared], np.arange(total, end)])
        ids.append(row[shared:])
        positions.append(np.arange(shared, len(row)))
        total, row_positions[index] = end, path[-1]
    subtree_end[path] = total
    input_ids = np.concatenate(ids).astype(np.int64)
    return Layout(input_ids, np.concatenate(positions), subtree_end[:total], row_positions)


def in_trie_order(rows: Sequence[np.ndarray], branches: bool = True) -> Iterator[tuple[int, int]]:
    """Each row's index, sorted by tokens, and how many first tokens it has in common with the row before it."""
    previous = np.zeros(0, dtype=np.int64)
    for index in sorted(range(len(rows)), key=lambda index: rows[index].astype(">u4").tobytes()):
        common = common_prefix(previous, rows[index])
        yield index, common if branches or common == len(previous) else 0
        previous = rows[index]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens two rows have in common."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def tree_mask(subtree_end: Tensor, dtype: torch.dtype, window: tuple[Tensor, int] | None = None) -> Tensor:
    """Attention bias, (1, 1, tokens, tokens), of a layout's `subtree_end`, (1, tokens).

    0 where token i (second last axis) sees token j, the type's minimum elsewhere: a boolean mask would be right under
    sdpa and silently wrong under eager attention. In a sliding `window`, the layout's `position_ids` and a number of
    tokens, i sees j only if it stands fewer tokens behind it in the rows that hold both.
    """
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    sees = (place[:, None] >= place) & (place[:, None] < subtree_end[:, None, None, :])
    if window is not None:
        positions, size = window
        sees &= (positions[:, :, None] - positions[:, None, :] < size)[:, None]
    mask = torch.full(sees.shape, torch.finfo(dtype).min, dtype=dtype, device=sees.device)
    return mask.masked_fill_(sees, 0.0)


def block_mask(subtree_end: Tensor, window: tuple[Tensor, int] | None = None) -> Any:
    """`tree_mask` as flex attention takes it: blocks of 128 tokens, those that nothing sees left out."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        in_tree = (i >= j) & (i < subtree_end[0, j])
        return in_tree if window is None else in_tree & (window[0][0, i] - window[0][0, j] < window[1])

    tokens = subtree_end.shape[1]
    return create_block_mask(sees, None, None, tokens, tokens, device=subtree_end.device)


def attention_masks(config: Any, batch: Batch, dtype: torch.dtype) -> Any:
    """What a backbone takes as `attention_mask` for a packed batch: one mask, or one for each type of its layers."""

    def mask(size: int | None) -> Any:
        window = None if size is None else (batch["position_ids"], size)
        if config._attn_implementation == "flex_attention":
            return block_mask(batch["subtree_end"], window)
        return tree_mask(batch["subtree_end"], dtype, window)

    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    if "sliding_attention" in types:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(None if types else window)  # without types (Mistral) all layers have the window


def takes_flex(backbone: nn.Module, batch: Batch) -> bool:
    """Whether a batch is worth flex attention: a tree so large that a dense mask, which SDPA's fast kernels refuse, is slow."""
    end, compilers = batch.get("subtree_end"), ("gcc", "clang", "cc")
    large = end is not None and end.is_cuda and end.shape[1] > FLEX_TOKENS
    return large and backbone._supports_flex_attn and any(map(shutil.which, compilers))


def padded(batch: Batch) -> Batch:
    """The batch with tokens that see only themselves, up to a multiple of flex attention's blocks: few shapes to compile."""
    tokens = batch["subtree_end"].shape[1]
    more = -tokens % FLEX_BLOCK
    ends = {"input_ids": (0, more), "position_ids": (0, more), "inputs_embeds": (0, 0, 0, more)}
    longer = {name: nn.functional.pad(batch[name], end) for name, end in ends.items() if name in batch}
    own = torch.arange(tokens + 1, tokens + more + 1, device=batch["subtree_end"].device)[None]
    return batch | longer | {"subtree_end": torch.cat([batch["subtree_end"], own], dim=1)}


def model_inputs(backbone: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a decoder, or a model around it, takes for a packed batch.

    The batch has `input_ids` or, where the lower layers are computed already, their output as `inputs_embeds`. Where the
    user named no attention kernel, a large tree takes flex attention, and some more tokens that nothing sees.
    """
    if getattr(backbone, "default_attention", None) is not None:
        # It stays after the pass, since activation checkpointing repeats the pass with it.
        flex = takes_flex(backbone, batch)
        backbone.config._attn_implementation = "flex_attention" if flex else backbone.default_attention
        batch = padded(batch) if flex else batch
    known = {name: batch.get(name) for name in ("input_ids", "inputs_embeds", "position_ids")}
    inputs = {name: value for name, value in known.items() if value is not None}
    config, mask = backbone.config.get_text_config(), None
    if "subtree_end" in batch:
        embeds, device = inputs.get("inputs_embeds"), batch["subtree_end"].device.type
        dtype = (backbone.get_input_embeddings().weight if embeds is None else embeds).dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        mask = attention_masks(config, batch, dtype)
    return inputs | {"attention_mask": mask, "use_cache": False}


def hidden_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """Last hidden state of each token of a packed batch, (tokens, hidden size), from a decoder without head."""
    return backbone(**model_inputs(backbone, batch)).last_hidden_state[0]


def row_hidden_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """Last hidden state of each row's last token, (rows, hidden size); see `hidden_states`."""
    hidden = hidden_states(backbone, batch)
    return hidden[batch["row_positions"].to(hidden.device)]


def accept_packed(model: nn.Module) -> None:
    """Let a decoder's classifier, or a PEFT model around one, take batches of `PackedBatches`.

    Such a batch runs through the backbone once, and `score` sees the rows' last tokens only; the logits have shape
    (rows, num_labels). Other batches take the model's own path. The model's class, weights and saved files stay.
    """
    classifier, backbone = _parts(model)
    own_forward = classifier.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        if "row_positions" not in inputs:
            return own_forward(*args, **inputs)
        return SequenceClassifierOutputWithPast(logits=classifier.score(row_hidden_states(backbone, inputs)))

    classifier.forward = forward


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(classifier, backbone) of a classifier or a PEFT model around one."""
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    return classifier, getattr(classifier, classifier.base_model_prefix)


def can_branch(model: nn.Module) -> bool:
    """Whether the model's attention takes a tree, or causal sequences only.

    sdpa, eager and flex attention take any mask. Flash attention takes causal sequences only; variants then repeat their
    context, and everything else stays shared. An InputError where a token's hidden state depends on more than its
    position and its predecessors (an encoder, a recurrent layer), or positions cannot be passed in.
    """
    classifier, backbone = _parts(model)
    config = backbone.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    reads_last = hasattr(classifier, "score") or classifier.get_output_embeddings() is not None
    if unknown or not takes_positions or getattr(config, "alibi", False) or not reads_last:
        kind = f"{config.model_type} models"
        raise InputError(f"--pack_dialogues: {kind} cannot be packed; use --no_pack_dialogues")
    return config._attn_implementation in ("sdpa", "eager", "flex_attention")


class RowGroups:
    """Rows that are cheap together: those of one dialogue that start at the same turn.

    A group above the token budget is split, each part repeating the common beginning; a row above it on its own is a
    group of its own.

    `members` has the rows' indices, a list a group; `tokens` has shape (groups,). A batch holds the `shared` tokens
    that all rows begin with (the label guide) once; `tokens` counts what each group adds to them.
    """

    def __init__(self, rows: Sequence[Row], rendered: Sequence[Rendered], budget: int, branches: bool = True):
        self.budget = budget
        together: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, (row, tokens) in enumerate(zip(rows, rendered, strict=True)):
            together[row.dialogue_id, tokens.start].append(index)
        self.members: list[list[int]] = []
        sizes: list[int] = []
        for indices in together.values():
            ids = [rendered[index].input_ids for index in indices]
            begin = len(sizes)
            for place, shared in in_trie_order(ids, branches):
                new = len(ids[place]) - shared
                if len(sizes) == begin or sizes[-1] + new > budget:
                    self.members.append([])
                    sizes.append(shared)
                self.members[-1].append(indices[place])
                sizes[-1] += new
        first_rows = [rendered[group[0]].input_ids for group in self.members]
        self.shared = min(common_prefix(first_rows[0], ids) for ids in first_rows) if branches else 0
        self.tokens = np.array(sizes) - self.shared
        alone = sum(size > budget for size in sizes)
        if alone:
            logger.warning(f"{alone} rows have more than {budget} tokens: each is a batch alone")

    def drawn(self, draws: np.ndarray) -> np.ndarray:
        """Rows that are drawn of each group, (groups,), where each row is drawn so often."""
        return np.array([draws[group].sum() for group in self.members])

    def deal(
        self, num_batches: int, seed: int, epoch: int, draws: np.ndarray
    ) -> tuple[list[list[int]], bool]:
        """Batches of row indices, none empty as at least so many groups are drawn; and whether all keep the budget.

        Groups are shuffled, and each goes to the batch with the fewest rows among those with room for its tokens.
        `draws` says how often each row is there; copies of a row have their tokens in common.
        """
        num_rows = self.drawn(draws)
        rows = np.zeros(num_batches, dtype=np.int64)
        tokens = np.full(num_batches, self.shared)
        batches: list[list[int]] = [[] for _ in range(num_batches)]
        fits = True
        order = np.random.default_rng((seed, epoch)).permutation(len(self.members))
        is_large = 2 * self.tokens > self.budget - self.shared
        for group in order[np.argsort(~is_large[order], kind="stable")]:
            if not num_rows[group]:
                continue
            has_room = (tokens + self.tokens[group] <= self.budget) | (rows == 0)
            if has_room.any():
                batch = np.where(has_room, rows, np.iinfo(np.int64).max).argmin()
            else:
                batch, fits = tokens.argmin(), False
            batches[batch] += np.repeat(self.members[group], draws[self.members[group]]).tolist()
            rows[batch] += num_rows[group]
            tokens[batch] += self.tokens[group]
        return batches, fits


@dataclass
class PackedBatches:
    """Batches in which a dialogue's rows share a sequence; `training.RowBatches`, a row a sequence, has the same methods.

    Two budgets fill them. A step has `rows_per_step` rows on average, as without packing; a single step may have more
    or fewer, since no dialogue is split for it, and the loss divides by the true number. No batch has more than
    `tokens_per_batch` tokens in any of `num_epochs`; where that is tight, an epoch has more and smaller steps. A larger
    budget saves little (batches share only the label guide) and costs memory. For the optimizer one thing changes: a
    dialogue's rows share a step. `micro_batches` counts a step's passes; rows and passes are over all processes.
    For `branches` see `lay_out`; `can_branch` knows.
    """

    rows_per_step: int = 1
    micro_batches: int = 1
    tokens_per_batch: int = 4096  # as much as a prediction takes; a batch's mask grows with its square
    num_epochs: int = 1
    branches: bool = True
    states: Any = None  # `trunk.TrunkStates`, of rows that have `nodes`

    def groups(self, rows: Sequence[Row], rendered: Sequence[Rendered]) -> RowGroups:
        return RowGroups(rows, rendered, self.tokens_per_batch, self.branches)

    def collate(self, rendered: Sequence[Rendered]) -> Batch:
        """Rows as one packed batch for a model that `accept_packed` prepared.

        `input_ids` and `position_ids` have shape (1, tokens), `row_positions` has shape (rows,); `subtree_end`, (1,
        tokens), is there unless the rows form a single causal sequence. Without `branches` it is left out: transformers
        itself keeps sequences apart where `position_ids` start anew, under flash attention too. With `states` of a trunk
        there are `inputs_embeds` in place of `input_ids`.
        """
        if self.states is None:
            layout = lay_out([row.input_ids for row in rendered], self.branches)
            tokens = {"input_ids": torch.from_numpy(layout.input_ids)[None]}
        else:  # nodes are numbered in trie order, so their trie is that of the tokens
            layout = lay_out([row.nodes for row in rendered], self.branches)
            tokens = {"inputs_embeds": self.states[layout.input_ids][None]}
        batch = tokens | {
            "position_ids": torch.from_numpy(layout.position_ids)[None],
            "row_positions": torch.from_numpy(layout.row_positions),
        }
        if self.branches and (layout.subtree_end < len(layout.input_ids)).any():
            batch["subtree_end"] = torch.from_numpy(layout.subtree_end)[None]
        return batch

    def plan(
        self, rows: Sequence[Row], rendered: Sequence[Rendered], seed: int, oversample: float = 0.0
    ) -> Plan:
        """Epoch -> its steps, each of `micro_batches` lists of row indices.

        Which rows share a step depends on `rows_per_step` and `micro_batches` alone: two processes that accumulate
        over 4 batches take the steps that one takes over 8. There are ceil(rows / rows_per_step) of them, or as many
        more as every epoch needs to keep the token budget: the learning rate's schedule and a resumed run rely on it
        that all epochs have the same number.
        """
        groups, passes = self.groups(rows, rendered), self.micro_batches
        epochs = range(max(self.num_epochs, 1))
        draws = functools.cache(lambda epoch: row_draws(rows, len(rows), oversample, seed, epoch))
        wanted = -(-len(rows) // self.rows_per_step)
        most = min(np.count_nonzero(groups.drawn(draws(at))) for at in epochs) // passes
        if not most:
            raise InputError(
                f"{len(groups.members)} dialogues cannot fill the {passes} batches of a step; use fewer processes or "
                "less --gradient_accumulation_steps (decoders: or --no_pack_dialogues)"
            )
        if wanted > most:
            average = f"a step has {len(rows) / most:.1f} rows on average, not {self.rows_per_step}"
            logger.warning(f"{average}: {len(groups.members)} packed dialogues, {passes} batches a step")
        num_steps = min(wanted, most)

        def deal(epoch: int) -> tuple[list[list[int]], bool]:
            return groups.deal(num_steps * passes, seed, epoch, draws(epoch))

        while num_steps < most and not all(deal(at)[1] for at in epochs):
            num_steps = min(max(num_steps + 1, int(num_steps * STEP_GROWTH)), most)

        def steps(epoch: int) -> list[Step]:
            batches, _ = deal(epoch)
            return [batches[first : first + passes] for first in range(0, len(batches), passes)]

        return steps

    def prediction_batches(self, rows: Sequence[Row], rendered: Sequence[Rendered]) -> list[list[int]]:
        """Most tokens first, so that memory runs out at once or never."""
        groups = self.groups(rows, rendered)
        batches: list[list[int]] = []
        tokens = 0
        for group in np.argsort(-groups.tokens, kind="stable"):
            if not batches or tokens + groups.tokens[group] > self.tokens_per_batch:
                batches.append([])
                tokens = groups.shared
            batches[-1] += groups.members[group]
            tokens += groups.tokens[group]
        return batches


def decide_packing(arguments: Any, training: FoldTrainingArguments, encoder: bool) -> None:
    """Settle the flags whose defaults depend on the architecture; an InputError where rows to pack share nothing."""
    if encoder and arguments.pack_dialogues:
        raise InputError("--pack_dialogues: an encoder reads both ways, so rows share nothing; leave it out")
    arguments.pack_dialogues = not encoder and arguments.pack_dialogues is not False
    if arguments.pack_dialogues and arguments.rows_per_batch is None:
        arguments.rows_per_batch = training.train_batch_size * training.gradient_accumulation_steps
        training.gradient_accumulation_steps = 1
