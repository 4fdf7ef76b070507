"""How a model sees a row: one prompt for a decoder, a pair of texts for an encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from rareturn.data.label_guide import LabelGuide, fold_whitespace
from rareturn.data.rows import Row, Turn
from rareturn.errors import InputError

logger = logging.getLogger(__name__)

# Behind a target, for its label's number to follow: a number that begins a line, as in the label guide, merges with nothing.
LABEL_CUE = "Label:\n"


def render_turn(turn: Turn) -> str:
    """A turn as a decoder's prompt has it, closed by its newline."""
    return f"{turn.speaker.upper()}: {fold_whitespace(turn.text)}\n"


def render_instruction(guide: LabelGuide) -> str:
    """What stands before the dialogue: the task and the label guide."""
    lines = [
        f"{label.number}: {label.name} - {label.definition}".removesuffix(" - ") for label in guide.labels
    ]
    return "\n".join([guide.task, "", "Labels:", *lines, "", "Dialogue:", ""])


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row in tokens.

    The concatenation of `pieces`, int32, is the row's sequence. A decoder's are the instruction, one a turn and the cue,
    if any: two rows of a dialogue with one `start` (the first turn seen) share their arrays up to the shorter's target.
    `segment_ids`, an encoder's, are 0 up to the separator after the target and 1 on the context.
    """

    pieces: tuple[np.ndarray, ...]
    start: int
    cut: bool  # whether the target itself lost its beginning
    segment_ids: np.ndarray | None = None
    nodes: np.ndarray | None = None  # each token's number in the states of `models.trunk`

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate(self.pieces)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


def window_start(lengths: Sequence[int], room: int, max_turns: int, window_stride: int) -> int:
    """The first turn that a row sees: at most `max_turns` turns and, target excepted, at most `room` tokens.

    `lengths` are the tokens of each turn, the target last. The start moves in steps of `window_stride` turns, so that
    neighbouring rows of a long dialogue keep a common prefix, and in single ones where a step would pass the target.
    """
    last = len(lengths) - 1
    start = max(0, -(-(len(lengths) - max_turns) // window_stride) * window_stride)
    tokens = sum(lengths[start:])
    while tokens > room and start < last:
        step = window_stride if start + window_stride <= last else 1
        tokens -= sum(lengths[start : start + step])
        start += step
    return start


@dataclass
class Renderer:
    """Rows to token pieces: one prompt for a decoder, the pair of target and context for an encoder (DESIGN 4)."""

    tokenizer: Any  # a fast one
    guide: LabelGuide
    _: KW_ONLY
    is_encoder: bool
    max_turns: int = 30
    max_seq_length: int = 1024
    window_stride: int = 10
    cue: str = ""  # a decoder's: what stands behind the target, for an answer to follow

    def __post_init__(self) -> None:
        if not 1 <= self.window_stride <= self.max_turns:
            limits = f"between 1 and max_turns ({self.max_turns})"
            raise InputError(f"window_stride must be {limits}, not {self.window_stride}")
        self.instruction = "" if self.is_encoder else render_instruction(self.guide)
        if self.is_encoder:
            # The special tokens before, between and after a pair, learnt from an example.
            example = self.tokenizer("a", "b", return_special_tokens_mask=True)
            ids = np.array(example["input_ids"], dtype=np.int32)
            body = np.flatnonzero(np.array(example["special_tokens_mask"]) == 0)
            gap = int(np.flatnonzero(np.diff(body) > 1)[0])
            self.special = (ids[: body[0]], ids[body[gap] + 1 : body[gap + 1]], ids[body[-1] + 1 :])
            fixed = sum(map(len, self.special))
        else:
            bos = [self.tokenizer.bos_token_id]
            has_bos = bos != [None] and self.tokenizer(self.instruction)["input_ids"][:1] == bos
            ids = self.tokenizer(self.instruction, add_special_tokens=False)["input_ids"]
            self.prefix = np.array(bos * has_bos + ids, dtype=np.int32)
            cue = self.tokenizer(self.cue, add_special_tokens=False)["input_ids"]
            self.ending = [np.array(cue, dtype=np.int32)] if cue else []
            fixed = len(self.prefix) + len(cue)
        self.room = self.max_seq_length - fixed
        if self.room < 8:
            room = f"max_seq_length {self.max_seq_length} leaves {self.room} tokens for the dialogue"
            raise InputError(f"{room}: the label guide and the special tokens take {fixed}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a row is rendered, the tokenizer aside."""
        facts = [self.is_encoder, self.instruction, self.max_turns, self.max_seq_length, self.window_stride]
        facts.append(render_turn(Turn("text", "speaker")))
        facts += [self.cue] if self.cue else []
        return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """The rows in tokens, in their order; each distinct turn is tokenized once. Warns how many targets were cut."""
        turns = {turn for row in rows for turn in row.turns[-self.max_turns :]}
        if self.is_encoder:
            turns |= {row.turns[-1]._replace(speaker="") for row in rows}
        distinct, tokens = list(turns), {}
        for begin in range(0, len(distinct), 4096):
            chunk = distinct[begin : begin + 4096]
            texts = [self._text(turn) for turn in chunk]
            ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.update(zip(chunk, (np.array(one, dtype=np.int32) for one in ids), strict=True))
        render = self._render_pair if self.is_encoder else self._render_prompt
        rendered = [render(row, tokens) for row in rows]
        if cut := sum(item.cut for item in rendered):
            longer = f"{cut} of {len(rows)} targets are longer than {self.room} tokens"
            logger.warning(f"{longer} and lost their beginning")
        return rendered

    def _text(self, turn: Turn) -> str:
        """What is tokenized; an encoder's target has no speaker, its other turns no newline."""
        text = render_turn(turn) if turn.speaker else fold_whitespace(turn.text)
        return text.rstrip("\n") if self.is_encoder else text

    def _render_prompt(self, row: Row, tokens: dict[Turn, np.ndarray]) -> Rendered:
        # Turns before the window can hold no token of the row, so they are not looked at (nor tokenized).
        skipped = max(0, len(row.turns) - self.max_turns)
        pieces = [tokens[turn] for turn in row.turns[skipped:]]
        lengths = [0] * skipped + [len(piece) for piece in pieces]
        start = window_start(lengths, self.room, self.max_turns, self.window_stride)
        pieces = pieces[start - skipped :]
        cut = len(pieces[-1]) > self.room
        if cut:
            pieces[-1] = pieces[-1][-self.room :]
        return Rendered((self.prefix, *pieces, *self.ending), start, cut)

    def _render_pair(self, row: Row, tokens: dict[Turn, np.ndarray]) -> Rendered:
        target = tokens[row.turns[-1]._replace(speaker="")]
        cut, target = len(target) > self.room, target[-self.room :]
        skipped, room = max(0, len(row.turns) - self.max_turns), self.room - len(target)
        context = [tokens[turn] for turn in row.turns[skipped:-1]] if room else []
        context = np.concatenate([np.zeros(0, dtype=np.int32), *context])[-room:]
        begin, middle, end = self.special
        pieces = (begin, target, middle, context, end)
        segments = np.repeat(np.array([0, 0, 0, 1, 1], dtype=np.int32), [len(piece) for piece in pieces])
        return Rendered(pieces, skipped, cut, segments)
