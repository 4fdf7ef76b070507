"""How a model sees a row: one prompt for a decoder, a pair of texts for an encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rareturn.data.label_guide import LabelGuide
from rareturn.data.rows import Row, Turn
from rareturn.errors import InputError

logger = logging.getLogger(__name__)


def fold_whitespace(text: str) -> str:
    """One line: inner runs of white space become one space."""
    return " ".join(text.split())


def render_turn(turn: Turn) -> str:
    """A turn as a decoder's prompt has it, closed by its newline."""
    return f"{turn.speaker.upper()}: {fold_whitespace(turn.text)}\n"


def render_instruction(guide: LabelGuide) -> str:
    """What stands before the dialogue: the task and the label guide."""
    lines = [f"{label.number}: {label.name} - {label.definition}" for label in guide.labels]
    return "\n".join([guide.task, "", "Labels:", *lines, "", "Dialogue:", ""])


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row in tokens.

    Attributes:
        pieces: int32 arrays whose concatenation is the row's sequence. A decoder's are the instruction and then one a
            turn; two rows of a dialogue with one `start` have the same arrays up to the shorter one's target.
        start: the first turn that the row sees.
        cut: whether the target itself lost its beginning.
        segment_ids: an encoder's: 0 up to the separator after the target, 1 on the context. None for decoders.
        nodes: the number of each token's state in `models.trunk`, where the lower layers are computed beforehand.
    """

    pieces: tuple[np.ndarray, ...]
    start: int
    cut: bool
    segment_ids: np.ndarray | None = None
    nodes: np.ndarray | None = None

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate(self.pieces)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


def window_start(lengths: Sequence[int], room: int, max_turns: int, window_stride: int) -> int:
    """The first turn that a row sees: at most `max_turns` turns and, target excepted, at most `room` tokens.

    The start moves in steps of `window_stride` turns, so that neighbouring rows of a long dialogue keep a common
    prefix; single steps are taken only where a whole one would pass the target.

    Args:
        lengths: tokens of each turn, the target last.
    """
    last = len(lengths) - 1
    start = max(0, -(-(len(lengths) - max_turns) // window_stride) * window_stride)
    tokens = sum(lengths[start:])
    while tokens > room and start < last:
        step = window_stride if start + window_stride <= last else 1
        tokens -= sum(lengths[start : start + step])
        start += step
    return start


class Renderer:
    """Rows to token pieces, for decoders (one prompt) and for encoders (the pair of target and context).

    Args:
        tokenizer: a fast tokenizer.
        is_encoder: render pairs.
        max_turns, max_seq_length, window_stride: the window, in turns, tokens and turns (DESIGN 4).

    Raises:
        InputError: a window that holds no target.
    """

    def __init__(
        self,
        tokenizer: Any,
        guide: LabelGuide,
        *,
        is_encoder: bool,
        max_turns: int = 30,
        max_seq_length: int = 1024,
        window_stride: int = 10,
    ):
        if not 1 <= window_stride <= max_turns:
            raise InputError(
                f"window_stride must be between 1 and max_turns ({max_turns}), not {window_stride}"
            )
        self.tokenizer = tokenizer
        self.is_encoder = is_encoder
        self.max_turns, self.max_seq_length, self.window_stride = max_turns, max_seq_length, window_stride
        self.instruction = "" if is_encoder else render_instruction(guide)
        if is_encoder:
            self._template = _pair_template(tokenizer)
            fixed = sum(map(len, self._template))
        else:
            bos = [tokenizer.bos_token_id]
            has_bos = bos != [None] and tokenizer(self.instruction)["input_ids"][:1] == bos
            ids = tokenizer(self.instruction, add_special_tokens=False)["input_ids"]
            self.prefix = np.array(bos * has_bos + ids, dtype=np.int32)
            fixed = len(self.prefix)
        self.room = max_seq_length - fixed
        if self.room < 8:
            taken = f"the label guide and the special tokens take {fixed}"
            raise InputError(
                f"max_seq_length {max_seq_length} leaves {self.room} tokens for the dialogue: {taken}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a row is rendered, the tokenizer aside."""
        facts = [self.is_encoder, self.instruction, self.max_turns, self.max_seq_length, self.window_stride]
        facts.append(render_turn(Turn("text", "speaker")))
        return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """The rows in tokens, in their order; each distinct turn is tokenized once. Warns how many targets were cut."""
        turns = {turn for row in rows for turn in row.turns[-self.max_turns :]}
        if self.is_encoder:
            turns |= {_alone(row.turns[-1]) for row in rows}
        distinct, tokens = list(turns), {}
        for begin in range(0, len(distinct), 4096):
            chunk = distinct[begin : begin + 4096]
            texts = [self._text(turn) for turn in chunk]
            ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.update(zip(chunk, (np.array(one, dtype=np.int32) for one in ids), strict=True))
        render = self._render_pair if self.is_encoder else self._render_prompt
        rendered = [render(row, tokens) for row in rows]
        cut = sum(item.cut for item in rendered)
        if cut:
            longer = f"{cut} of {len(rows)} targets are longer than {self.room} tokens"
            logger.warning(f"{longer} and lost their beginning")
        return rendered

    def _text(self, turn: Turn) -> str:
        if not turn.speaker:
            return fold_whitespace(turn.text)
        return render_turn(turn).rstrip("\n") if self.is_encoder else render_turn(turn)

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
        return Rendered((self.prefix, *pieces), start, cut)

    def _render_pair(self, row: Row, tokens: dict[Turn, np.ndarray]) -> Rendered:
        target = tokens[_alone(row.turns[-1])]
        cut, target = len(target) > self.room, target[-self.room :]
        skipped, room = max(0, len(row.turns) - self.max_turns), self.room - len(target)
        context = [tokens[turn] for turn in row.turns[skipped:-1]] if room else []
        context = np.concatenate([np.zeros(0, dtype=np.int32), *context])[-room:]
        begin, middle, end = self._template
        pieces = (begin, target, middle, context, end)
        segments = np.repeat(np.array([0, 0, 0, 1, 1], dtype=np.int32), [len(piece) for piece in pieces])
        return Rendered(pieces, skipped, cut, segments)


def _alone(turn: Turn) -> Turn:
    """An encoder's target: the text without its speaker."""
    return Turn(turn.text, "")


def _pair_template(tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The special tokens before, between and after a pair, learnt from an example pair."""
    example = tokenizer("a", "b", return_special_tokens_mask=True)
    ids = np.array(example["input_ids"], dtype=np.int32)
    body = np.flatnonzero(np.array(example["special_tokens_mask"]) == 0)
    gap = int(np.flatnonzero(np.diff(body) > 1)[0])
    return ids[: body[0]], ids[body[gap] + 1 : body[gap + 1]], ids[body[-1] + 1 :]
