"""Rows of labelled dialogue and what makes them valid.

A row is one utterance to classify (the target, the last turn) with the turns before it. See `Row`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rareturn.command_line import flag
from rareturn.data.label_guide import LabelGuide, listed
from rareturn.data.readers import read_records
from rareturn.errors import InputError

NO_LABEL = -1
MAX_PROBLEMS_KEPT = 10_000
# JSON can spell a lone surrogate; UTF-8, and so every tokenizer, cannot. For U+FFFE see `readers`.
LONE_SURROGATE = re.compile("[\ud800-\udfff\ufffe]")
HALF = "holds half a character (a lone surrogate)"
KINDS = {
    bool: "true/false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class Turn(NamedTuple):
    """One turn of a dialogue, as the file has it."""

    text: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Row:
    """One utterance to classify.

    Attributes:
        turns: oldest first; the last is the target.
        label: the label's number, or -1 where there is none.
        augmented_from: id of the row that this one is a variant of; None for an original row.
    """

    id: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    label: int = NO_LABEL
    augmented_from: str | None = None


@dataclass(frozen=True)
class Columns:
    """What a file calls the fields of a row."""

    id: str = "id"
    dialogue_id: str = "dialogue_id"
    dialogue: str = "dialogue"
    current_text: str = "current_text"
    label: str = "label"


@dataclass
class DataArguments:
    """Flags of every script that reads rows: the label guide and the names of the columns."""

    _argument_group_name = "Label guide and columns"

    label_guide: str = flag(
        "label_guides/dmrs.yaml", "YAML file of the labels, their definitions and the speakers."
    )
    id_column: str = flag("id", "Column of the row's id.")
    dialogue_id_column: str = flag("dialogue_id", "Column of the dialogue's id.")
    dialogue_column: str = flag("dialogue", "Column of the turns, each {text, speaker}, the target last.")
    current_text_column: str = flag("current_text", "Column of the target's text.")
    label_column: str = flag("label", "Column of the label's number.")

    @property
    def columns(self) -> Columns:
        return Columns(**{name: getattr(self, f"{name}_column") for name in vars(Columns())})


def load_rows(
    source: str,
    label_guide: LabelGuide,
    *,
    columns: Columns | None = None,
    require_labels: bool = True,
    split: str = "train",
    sources_of_augmented: Sequence[Row] | None = None,
) -> list[Row]:
    """Read and check rows.

    Args:
        source: see `read_records`.
        require_labels: a missing label is an error; otherwise a label that is there is checked all the same.
        sources_of_augmented: the original rows, where the source holds augmented ones: each must name one of these,
            in the same dialogue and with the same label. None: augmented rows refer to rows of the same source.

    Raises:
        InputError: one line a problem, each naming the file, the row and the field.
    """
    columns = columns or Columns()
    where, records = read_records(source, split)
    problems: list[str] = []
    rows: list[Row] = []
    seen: set[str] = set()
    shared: dict[Turn, Turn] = {}
    for number, record in enumerate(records, 1):
        if len(problems) >= MAX_PROBLEMS_KEPT:
            break
        if not isinstance(record, dict):
            problems.append(f"{where}: row {number}: not an object with fields")
            continue
        fields = _fields(record, columns)
        found = list(_field_problems(fields, label_guide, require_labels))
        name = f"row {number}" if any(field == "id" for field, _ in found) else fields["id"]
        problems += [f"{where}: {name}: {getattr(columns, field, field)}: {said}" for field, said in found]
        if not found:
            if name in seen:
                problems.append(f"{where}: {name}: {columns.id}: duplicate id")
            seen.add(name)
            turns = (Turn(turn["text"], turn["speaker"]) for turn in fields["dialogue"])
            turns = tuple(shared.setdefault(turn, turn) for turn in turns)
            label = NO_LABEL if fields["label"] is None else fields["label"]
            rows.append(Row(name, fields["dialogue_id"], turns, label, fields["augmented_from"]))
    if not rows and not problems:
        problems.append(f"{where}: holds no rows")
    problems += _augmentation_problems(rows, sources_of_augmented, where, columns)
    if problems:
        raise InputError(*problems)
    return rows


def _augmentation_problems(
    rows: Sequence[Row], sources: Sequence[Row] | None, where: str, columns: Columns
) -> Iterator[str]:
    """What is wrong with the rows that are variants of others; `sources` as in `load_rows`."""
    origin = {row.id: row for row in (rows if sources is None else sources)}
    for row in rows:
        place = f"{where}: {row.id}"
        if row.augmented_from is None:
            if sources is not None:
                yield f"{place}: augmented_from: missing in a file of augmented rows"
            continue
        source = origin.get(row.augmented_from)
        if source is None or source.augmented_from:
            yield f"{place}: augmented_from: no original row {row.augmented_from!r}"
        elif source.dialogue_id != row.dialogue_id:
            there = f"{row.augmented_from!r} is in dialogue {source.dialogue_id!r}"
            yield f"{place}: augmented_from: {there}, not {row.dialogue_id!r}"
        elif source.label != row.label:
            yield f"{place}: {columns.label}: {row.label}, but its source has {source.label}"
        elif source.turns[:-1] != row.turns[:-1] or source.turns[-1].speaker != row.turns[-1].speaker:
            yield f"{place}: {columns.dialogue}: its context is not its source's"


def _fields(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A record's values by our names, unchecked. CSV has neither lists nor integers nor None: a text may stand for one."""
    fields = {name: record.get(column) for name, column in vars(columns).items()}
    if isinstance(fields["dialogue"], str):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            fields["dialogue"] = json.loads(fields["dialogue"])
    if fields["label"] == "":
        fields["label"] = None
    elif isinstance(fields["label"], str) and re.fullmatch(r"\d+", fields["label"].strip()):
        fields["label"] = int(fields["label"])
    return fields | {"augmented_from": record.get("augmented_from") or None}


def _field_problems(
    fields: dict[str, Any], guide: LabelGuide, require_labels: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with a row: our name of each bad field, and what to say of it."""
    texts = {name: _text_problem(fields[name]) for name in ("id", "dialogue_id", "current_text")}
    yield from ((name, problem) for name, problem in texts.items() if problem)
    dialogue, label, source = fields["dialogue"], fields["label"], fields["augmented_from"]
    if dialogue is None:
        yield "dialogue", "missing"
    elif not isinstance(dialogue, list):
        yield "dialogue", f"must be a list of turns, not {_kind(dialogue)}"
    elif not dialogue:
        yield "dialogue", "empty"
    elif any(wrong := [turn_problem(turn, guide) for turn in dialogue]):
        yield from (
            ("dialogue", f"turn {number} {problem}") for number, problem in enumerate(wrong, 1) if problem
        )
    else:
        last, target = dialogue[-1], guide.target_speaker
        if last["speaker"] != target:
            by = f"the last turn is by {last['speaker']!r}"
            yield "dialogue", f"{by}, not by the label guide's target_speaker {target!r}"
        if not texts["current_text"] and last["text"].strip() != fields["current_text"].strip():
            yield "current_text", "is not the last turn's text"
    if label is None and require_labels:
        yield "label", "missing"
    elif label is not None and type(label) is not int:
        yield "label", f"must be an integer, not {_kind(label)}"
    elif label is not None and label not in guide.numbers:
        yield "label", f"{label} is not in the label guide (0 to {len(guide.labels) - 1})"
    if source is not None and not isinstance(source, str):
        yield "augmented_from", f"must be a text, not {_kind(source)}"


def _text_problem(value: Any) -> str | None:
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return f"must be a text, not {_kind(value)}"
    if not value.strip():
        return "empty"
    return HALF if LONE_SURROGATE.search(value) else None


def turn_problem(turn: Any, guide: LabelGuide) -> str | None:
    """What is wrong with a turn of a record, in words that go on from "turn 3"; None if nothing is."""
    text, speaker = (turn.get("text"), turn.get("speaker")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(text, str) or not isinstance(speaker, str):
        return "must have a text and a speaker"
    if speaker not in guide.speakers:
        return f"has unknown speaker {speaker!r} (not {listed(guide.speakers)})"
    if not text.strip():
        return "is empty"
    return HALF if LONE_SURROGATE.search(text) else None


def _kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' ids, dialogues, turns and labels in the order of their ids: tells two data sets apart."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        facts = [row.id, row.dialogue_id, row.turns, row.label]
        digest.update(json.dumps(facts, ensure_ascii=False).encode())
    return digest.hexdigest()
