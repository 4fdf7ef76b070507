"""Rows of labelled dialogue, each an utterance to classify with the turns before it, and what makes them valid."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import namedtuple
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
KINDS = {"bool": "true/false", "int": "a number", "float": "a number", "str": "a text", "dict": "an object"}
FIELDS = ("id", "dialogue_id", "dialogue", "current_text", "label")
Columns = namedtuple("Columns", FIELDS, defaults=FIELDS)  # what a file calls the fields of a row


class Turn(NamedTuple):
    """One turn of a dialogue, as the file has it."""

    text: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Row:
    """One utterance to classify: the target, the last of its turns."""

    id: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    label: int = NO_LABEL
    augmented_from: str | None = None  # the id of the row that this one is a variant of


@dataclass
class DataArguments:
    """Flags of every script that reads rows: the label guide and the names of the columns."""

    _argument_group_name = "Label guide and columns"

    label_guide: str = flag("label_guides/dmrs.yaml", "YAML file of labels, their definitions and speakers.")
    id_column: str = flag("id", "Column of the row's id.")
    dialogue_id_column: str = flag("dialogue_id", "Column of the dialogue's id.")
    dialogue_column: str = flag("dialogue", "Column of the turns, each {text, speaker}, the target last.")
    current_text_column: str = flag("current_text", "Column of the target's text.")
    label_column: str = flag("label", "Column of the label's number.")

    @property
    def columns(self) -> Columns:
        return Columns(*(getattr(self, f"{name}_column") for name in FIELDS))


def load_rows(
    source: str | None,
    label_guide: LabelGuide,
    *,
    columns: Columns | None = None,
    require_labels: bool = True,
    sources_of_augmented: Sequence[Row] | None = None,
) -> list[Row]:
    """Read and check rows (none where there is no source); an InputError has a line for each problem in a row.

    Args:
        source: see `read_records`.
        require_labels: False for a test file: a label that is there is checked all the same.
        sources_of_augmented: the original rows, where the source holds augmented ones: each must name one of these,
            in the same dialogue and with the same label. None: augmented rows refer to rows of the same source.
    """
    if not source:
        return []
    columns = columns or Columns()
    problems: list[str] = []
    rows: dict[str, Row] = {}
    shared: dict[Turn, Turn] = {}
    for number, record in enumerate(read_records(source, "train" if require_labels else "test"), 1):
        if len(problems) >= MAX_PROBLEMS_KEPT:
            break
        if not isinstance(record, dict):
            problems.append(f"{source}: row {number}: not an object with fields")
            continue
        fields = _fields(record, columns)
        found = list(_field_problems(fields, label_guide, require_labels))
        name = f"row {number}" if any(field == "id" for field, _ in found) else fields["id"]
        problems += [f"{source}: {name}: {getattr(columns, field, field)}: {said}" for field, said in found]
        if not found:
            if name in rows:
                problems.append(f"{source}: {name}: {columns.id}: duplicate id")
            turns = (Turn(turn["text"], turn["speaker"]) for turn in fields["dialogue"])
            turns = tuple(shared.setdefault(turn, turn) for turn in turns)
            label = NO_LABEL if fields["label"] is None else fields["label"]
            rows[name] = Row(name, fields["dialogue_id"], turns, label, fields["augmented_from"])
    if not rows and not problems:
        problems.append(f"{source}: holds no rows")
    originals = rows if sources_of_augmented is None else {row.id: row for row in sources_of_augmented}
    for row in rows.values():
        if row.augmented_from or originals is not rows:
            said = _augmentation_problem(row, originals.get(row.augmented_from), columns)
            problems += [f"{source}: {row.id}: {said}"] if said else []
    if problems:
        raise InputError(*problems)
    return list(rows.values())


def _augmentation_problem(row: Row, source: Row | None, columns: Columns) -> str | None:
    """What is wrong with a variant, in words that go on from its id; None if nothing is."""
    if row.augmented_from is None:
        return "augmented_from: missing in a file of augmented rows"
    if source is None or source.augmented_from:
        return f"augmented_from: no original row {row.augmented_from!r}"
    if source.dialogue_id != row.dialogue_id:
        return f"augmented_from: {source.id!r} is in dialogue {source.dialogue_id!r}, not {row.dialogue_id!r}"
    if source.label != row.label:
        return f"{columns.label}: {row.label}, but its source has {source.label}"
    if source.turns[:-1] != row.turns[:-1] or source.turns[-1].speaker != row.turns[-1].speaker:
        return f"{columns.dialogue}: its context is not its source's"
    return None


def _fields(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A record's values by our names, unchecked. CSV has neither lists nor integers nor None: a text may stand for one."""
    fields = {name: record.get(column) for name, column in columns._asdict().items()}
    if isinstance(fields["dialogue"], str):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            fields["dialogue"] = json.loads(fields["dialogue"])
    label = fields["label"]
    if isinstance(label, str) and re.fullmatch(r"(\s*\d+\s*)?", label):
        fields["label"] = int(label) if label else None
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
        numbered = enumerate(wrong, 1)
        yield from (("dialogue", f"turn {number} {problem}") for number, problem in numbered if problem)
    else:
        text, speaker = dialogue[-1]["text"], dialogue[-1]["speaker"]
        if speaker != guide.target_speaker:
            wanted = f"the label guide's target_speaker {guide.target_speaker!r}"
            yield "dialogue", f"the last turn is by {speaker!r}, not by {wanted}"
        if not texts["current_text"] and text.strip() != fields["current_text"].strip():
            yield "current_text", "is not the last turn's text"
    if label is None:
        if require_labels:
            yield "label", "missing"
    elif type(label) is not int:
        yield "label", f"must be an integer, not {_kind(label)}"
    elif label not in guide.numbers:
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
    name = type(value).__name__
    return KINDS.get(name, f"a {name}")


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' ids, dialogues, turns and labels in the order of their ids: tells two data sets apart."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        facts = [row.id, row.dialogue_id, row.turns, row.label]
        digest.update(json.dumps(facts, ensure_ascii=False).encode())
    return digest.hexdigest()
