"""Turns, dialogues and rows, and what makes a text of them valid."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rareturn.data.label_guide import LabelGuide, listed

NO_LABEL = -1
# JSON can spell a lone surrogate; UTF-8, and so every tokenizer, cannot. For U+FFFE see `readers`.
LONE_SURROGATE = re.compile("[\ud800-\udfff\ufffe]")
HALF = "holds half a character (a lone surrogate)"
KINDS = {"bool": "true/false", "int": "a number", "float": "a number", "str": "a text", "dict": "an object"}


class Turn(NamedTuple):
    """One turn of a dialogue; the speaker as the prompt has it (`LabelGuide.names_in_prompt`)."""

    text: str
    speaker: str


class Dialogue(tuple[Turn, ...]):
    """All turns of a table's dialogue, held once."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the turns."""
        return hashlib.sha256(json.dumps(self, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Turns(Sequence[Turn]):
    """The turns of a dialogue up to one of them: a view, so that a table's rows take memory in proportion to it."""

    dialogue: Dialogue
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, int):
            return self.dialogue[range(self.count)[place]]
        start, stop, step = place.indices(self.count)
        if step == 1:
            return tuple.__getitem__(self.dialogue, slice(start, stop))
        return tuple(map(self.dialogue.__getitem__, range(start, stop, step)))

    def __eq__(self, other: object) -> bool:
        return self[:] == tuple(other) if isinstance(other, (Turns, tuple)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self[:])

    def content(self) -> list[Any]:
        """What a digest of rows is made of: the dialogue's own digest, so that its turns are read once for all rows."""
        return [self.count, self.dialogue.digest]


@dataclass(frozen=True, slots=True)
class Row:
    """One utterance to classify: the target, the last of its turns."""

    id: str
    dialogue_id: str
    turns: tuple[Turn, ...] | Turns
    label: int = NO_LABEL
    augmented_from: str | None = None  # the id of the row that this one is a variant of
    place: int = field(default=-1, compare=False)  # of its record in the source, from 0


def turns_of(said: Sequence[tuple[str, str]], guide: LabelGuide) -> Iterator[Turn]:
    """The turns of a dialogue from its beginning, given as texts and speakers, with the speakers' names in the prompt."""
    names = guide.names_in_prompt(speaker for _, speaker in said)
    return (Turn(text, names[speaker]) for text, speaker in said)


def row_json(facts: Sequence[Any], **how: Any) -> bytes:
    """A row's fields for a digest over rows, in which a view of a dialogue is its `content`."""
    return json.dumps(facts, default=Turns.content, **how).encode()


def text_problem(value: Any) -> str | None:
    """What is wrong with a text, in words that go on from its field's name; None if nothing is."""
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return f"must be a text, not {kind(value)}"
    if not value.strip():
        return "empty"
    return HALF if LONE_SURROGATE.search(value) else None


def turn_problem(turn: Any, guide: LabelGuide) -> str | None:
    """What is wrong with a turn of a record, in words that go on from "turn 3"; None if nothing is."""
    text, speaker = (turn.get("text"), turn.get("speaker")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(text, str) or not isinstance(speaker, str):
        return "must have a text and a speaker"
    if not guide.knows(speaker):
        return f"has unknown speaker {speaker!r} (not {listed(guide.speakers)})"
    if not text.strip():
        return "is empty"
    return HALF if LONE_SURROGATE.search(text) else None


def kind(value: Any) -> str:
    """The kind of a value, in words."""
    name = type(value).__name__
    return KINDS.get(name, f"a {name}")
