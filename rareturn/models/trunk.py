"""Frozen layers, computed once: the hidden states below the trained layers, kept on disk for all that comes later.

With `--trainable_layers N` the layers below the top N are a trunk: no weight in them changes and no dropout is in them,
so what they make of a token is the same in every epoch, fold, seed and run. A decoder's depends on the tokens before it
alone: a data set has one state for each distinct prefix of its rows, and the upper layers take the states as their
embeddings. For encoders, whose turns are read one by one, see `turns.turn_states`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from rareturn.data.rendering import Rendered, Renderer
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.files import cache_dir, file_digest, read_json, write_bytes, write_json
from rareturn.models import loading
from rareturn.models.inference import place
from rareturn.models.layers import layer_list
from rareturn.models.loading import BaseModel
from rareturn.models.packing import PackedBatches, can_branch, hidden_states, in_trie_order, lay_out
from rareturn.models.training import Batch

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 1024  # of a pass through the trunk; with 2048, attention makes a CPU 1.7 times as slow
PART_BYTES = 1 << 26  # of a file: what a killed process computes again at most
INDEX = "index.json"


class TrunkStates:
    """The states of a data set's tokens, mapped from the files of a complete cache; `ends` are the parts' last tokens + 1."""

    def __init__(self, parts: Sequence[Path]):
        self.parts: list[Tensor] = []
        for part in parts:
            with safe_open(part, "pt") as file:
                self.parts.append(file.get_tensor("states"))
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __getitem__(self, nodes: np.ndarray) -> Tensor:
        """The states, (tokens, hidden size), of tokens given by their numbers, int64 of shape (tokens,)."""
        states = self.parts[0].new_empty((len(nodes), self.parts[0].shape[1]))
        part_of = np.searchsorted(self.ends, nodes, side="right")
        for part in np.unique(part_of):
            here = np.flatnonzero(part_of == part)
            begin = self.ends[part] - len(self.parts[part])
            states[here] = self.parts[part][nodes[here] - begin]
        return states


def number_tokens(rendered: Sequence[Rendered]) -> tuple[list[Rendered], list[int]]:
    """The rows with a number for each distinct prefix, their `nodes`; and the rows' indices in trie order.

    The numbers go up along that order: the tokens that a row adds to those before it have the next ones.
    """
    rows = [row.input_ids for row in rendered]
    numbered, order = list(rendered), []
    path, total = np.zeros(0, dtype=np.int64), 0
    for index, shared in in_trie_order(rows):
        end = total + len(rows[index]) - shared
        path = np.concatenate([path[:shared], np.arange(total, end)])
        numbered[index], total = replace(rendered[index], nodes=path), end
        order.append(index)
    return numbered, order


def trunk_states(
    rows: Sequence[Row], renderer: Renderer, base: BaseModel, cut: int, *, bf16: bool, limit_gb: float
) -> tuple[list[Rendered], TrunkStates | None]:
    """Rows, rendered, with `nodes`; and the output of the first `cut` layers for all of them, or None: `cached_trunk`."""
    numbered, order = number_tokens(renderer.render(rows))
    tokens = int(max(row.nodes[-1] for row in numbered)) + 1, sum(map(len, numbered))
    files = cached_trunk(
        [numbered[index].input_ids for index in order],
        tokens,
        (base, cut, bf16, limit_gb),
        lambda folder: compute_states(numbered, order, base, cut, folder, bf16),
    )
    return numbered, None if files is None else TrunkStates(files)


def cached_trunk(
    sequences: Sequence[np.ndarray],
    tokens: tuple[int, int],
    how: tuple[BaseModel, int, bool, float],
    compute: Callable[[Path], None],
) -> list[Path] | None:
    """`cached_parts` with the output of the first layers for token sequences.

    Args:
        tokens: whose output it is, and how many they are without sharing.
        how: the base, its layers below the cut, bf16 autocast or not, and the limit in GB (10^9 bytes).
    """
    base, cut, bf16, limit_gb = how
    config = loading.load_config(base)
    width = getattr(config, "encoder", config).get_text_config().hidden_size
    size = tokens[0] * width * getattr(torch, base.dtype).itemsize
    what = f"trunk of {cut} layers: {tokens[0]:,} tokens of {tokens[1]:,}"
    folder = cache_folder(base, sequences_digest(sequences), bf16, cut=cut)
    return cached_parts(folder, what, size, limit_gb, compute)


def cache_folder(base: BaseModel, sequences: str, bf16: bool, **facts: Any) -> Path:
    """Where the cache has what a base makes of token sequences (`sequences_digest`); `facts` tell what that is.

    How it is cut into passes and files is one of them: `write_parts` goes on from files that it finds.
    """
    weights = base.weights_digest  # of a folder, which may move
    facts |= {"base": [weights or base.name, base.revision], "bf16": bf16, **base.loader}
    facts |= {"sequences": sequences, "cut_by": [TOKENS_PER_BATCH, PART_BYTES]}
    return cache_dir("trunk") / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def sequences_digest(sequences: Iterable[np.ndarray]) -> str:
    """SHA-256 of token sequences in their order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little") + sequence.tobytes())
    return digest.hexdigest()


def cached_parts(
    folder: Path, what: str, size: int, limit_gb: float, compute: Callable[[Path], None]
) -> list[Path] | None:
    """The files in a folder of the cache; where they are not there, `compute` leaves them there by `write_parts`.

    One process computes while others wait; what a killed one had done is gone on from, what is damaged on the disk is
    computed anew, and what was not used for longest makes room. None where the `size`, in bytes, is above the limit, in
    GB: nothing is kept then. `what` it is goes into the log.
    """
    what += f", {size / 1e9:.2f} GB"
    if size > limit_gb * 1e9:
        if limit_gb:
            logger.warning(f"{what}: more than --trunk_cache_gb {limit_gb:g}, so it is not kept")
        return None
    with _locked(folder, what):
        files = whole_parts(folder)
        if files is None:
            logger.info(f"{what}: computed once, into {folder}")
            make_room(folder, limit_gb * 1e9 - size)
            with torch.random.fork_rng():  # a run with a warm cache draws the same numbers
                compute(folder)
            files = whole_parts(folder)
        os.utime(folder / INDEX)
        return files


@contextlib.contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"{what}: another process computes it, waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def whole_parts(folder: Path) -> list[Path] | None:
    """The files of a complete cache, in order; None where it is not complete, or a file is damaged, which is deleted."""
    if not (folder / INDEX).is_file():
        return None
    parts = {folder / name: digest for name, digest in read_json(folder / INDEX).items()}
    damaged = [part for part, digest in parts.items() if not part.is_file() or file_digest(part) != digest]
    for path in [*damaged, *([folder / INDEX] if damaged else [])]:
        logger.warning(f"{path}: damaged or missing, computed anew")
        path.unlink(missing_ok=True)
    return None if damaged else list(parts)


def make_room(folder: Path, room: float) -> None:
    """Delete the caches beside `folder` that were used longest ago until the others take at most `room` bytes."""
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    others.sort(
        key=lambda path: (
            path.stat().st_mtime if not (path / INDEX).exists() else (path / INDEX).stat().st_mtime
        )
    )
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in others]
    while others and sum(sizes) > room:
        oldest, _ = others.pop(0), sizes.pop(0)
        with contextlib.suppress(Timeout), FileLock(oldest.with_suffix(".lock"), timeout=0):
            logger.info(f"{oldest}: deleted to make room")
            shutil.rmtree(oldest, ignore_errors=True)


def compute_states(
    numbered: Sequence[Rendered], order: Sequence[int], base: BaseModel, cut: int, folder: Path, bf16: bool
) -> None:
    """`write_parts` of the states of a decoder's rows."""
    lower = replace(base, layers=(0, cut))
    trunk = Trunk(place(loading.load_classifier(lower, ["no", "yes"], pad_token_id=0), lower), cut)
    width = trunk.backbone.config.get_text_config().hidden_size * getattr(torch, base.dtype).itemsize

    def compute(rows: Sequence[int], begin: int, end: int) -> dict[str, Tensor]:
        return {"states": trunk.states([numbered[row] for row in rows], begin, end, bf16)}

    write_parts(folder, list(in_passes(numbered, order)), width, compute)


def write_parts(
    folder: Path,
    passes: Sequence[tuple[Any, int, int]],
    width: int,
    compute: Callable[..., dict[str, Tensor]],
) -> None:
    """Write the parts that are not there yet and then the index, which makes the cache complete.

    Parts that are there must be of the same passes: see `cache_folder`.
    A pass is what `compute` is given; its last two members are its first token and the first after it, of `width` bytes.
    """
    part_of = np.array([begin for _, begin, _ in passes]) // (PART_BYTES // width)
    index = {}
    with tqdm(total=passes[-1][2], desc="states", unit="token") as bar:
        for part in np.unique(part_of):
            path, found = folder / f"{part:05}.safetensors", []
            there = path.exists()
            for number in np.flatnonzero(part_of == part):
                if not there:
                    found.append(compute(*passes[number]))
                bar.update(passes[number][2] - passes[number][1])
            if not there:
                whole = {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}
                write_bytes(path, safetensors.torch.save(whole))
            index[path.name] = file_digest(path)
    write_json(folder / INDEX, index)


def read_parts(files: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the files that `write_parts` left, each whole."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in names:
                found[name].append(file.get_tensor(name))
    return {name: torch.cat(tensors) for name, tensors in found.items()}


class Trunk:
    """A decoder whose layers from `cut` on let everything pass, and what comes out of those below."""

    def __init__(self, model: nn.Module, cut: int):
        self.backbone, self.batches = model.base_model, PackedBatches(branches=can_branch(model))
        self.output: list[Tensor] = []
        self.is_checked = False
        top = layer_list(self.backbone)[cut]
        top.register_forward_hook(lambda layer, inputs, states: self.output.append(states[0]))

    def states(self, rows: Sequence[Rendered], begin: int, end: int, bf16: bool) -> Tensor:
        """The states, (end - begin, hidden size), of the tokens `begin` to `end` of rows that go through together."""
        device = self.backbone.device
        batch = {key: value.to(device) for key, value in self.batches.collate(rows).items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden_states(self.backbone, batch)
            if not self.is_checked:
                self.check(batch)
        nodes = lay_out([row.nodes for row in rows], self.batches.branches).input_ids
        place_of = np.zeros(end - begin, dtype=np.int64)
        place_of[nodes[nodes >= begin] - begin] = np.flatnonzero(nodes >= begin)
        return self.output.pop()[place_of].cpu()

    def check(self, batch: Batch) -> None:
        """Refuse an architecture whose layers need more than the output of the layer below, such as the tokens."""
        others = {key: value for key, value in batch.items() if key != "input_ids"}
        embedded = self.backbone.get_input_embeddings()(batch["input_ids"])
        hidden_states(self.backbone, others | {"inputs_embeds": embedded})
        again, first = self.output.pop().float(), self.output[-1].float()
        if not torch.allclose(again, first, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
            kind = self.backbone.config.model_type
            raise InputError(f"{kind} layers need more than the layer below; use --trunk_cache_gb 0")
        self.is_checked = True


def in_passes(numbered: Sequence[Rendered], order: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
    """Rows that go through the trunk together, the first number that is new in them, and the first that is not any more."""
    rows, tokens, begin, end = [], 0, 0, 0
    for index in order:
        first_after = int(numbered[index].nodes[-1]) + 1
        new = max(0, first_after - end)
        if rows and tokens + new > TOKENS_PER_BATCH:
            yield rows, begin, end
            rows, tokens, begin = [], 0, end
        tokens += new if rows else len(numbered[index])
        rows.append(index)
        end += new
    yield rows, begin, end
