"""Rows of labelled dialogue and what makes them valid.

A row is one utterance to classify (the target, the last turn) with the turns before it. See `Row`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rareturn.data.label_guide import LabelGuide
from rareturn.data.readers import read_records
from rareturn.errors import InputError

logger = logging.getLogger(__name__)


NO_LABEL = -1


MAX_PROBLEMS_KEPT = 10_000


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 and so every tokenizer cannot


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
    """The names of a row's fields in the file."""

    id: str = "id"
    dialogue_id: str = "dialogue_id"
    dialogue: str = "dialogue"
    current_text: str = "current_text"
    label: str = "label"

    @classmethod
    def from_flags(cls, arguments: Any) -> Columns:
        """From a script's `<name>_column` flags."""
        return cls(
            **{item.name: getattr(arguments, f"{item.name}_column") for item in dataclasses.fields(cls)}
        )


@dataclass
class DataArguments:
    """Flags shared by every script that reads rows: the guide and the column names."""

    label_guide: str = field(
        default="label_guides/dmrs.yaml",
        metadata={
            "help": "YAML file with the labels' numbers, names and definitions. Default: the nine DMRS levels."
        },
    )
    id_column: str = field(default="id", metadata={"help": "Column of the row's id."})
    dialogue_id_column: str = field(default="dialogue_id", metadata={"help": "Column of the dialogue's id."})
    dialogue_column: str = field(
        default="dialogue",
        metadata={"help": "Column of the turns ({text, speaker}, oldest first, the target last)."},
    )
    current_text_column: str = field(
        default="current_text", metadata={"help": "Column of the target's text."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the label's number."})

    @property
    def columns(self) -> Columns:
        return Columns.from_flags(self)


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
    turns: dict[Turn, Turn] = {}
    for position, record in enumerate(records):
        row = _check_record(record, position, where, label_guide, columns, require_labels, turns, problems)
        if row is None:
            continue
        if row.id in seen:
            problems.append(f"{where}: {row.id}: {columns.id}: duplicate id")
        seen.add(row.id)
        rows.append(row)
        if len(problems) >= MAX_PROBLEMS_KEPT:
            break
    if not rows and not problems:
        problems.append(f"{where}: holds no rows")
    origin = {row.id: row for row in (rows if sources_of_augmented is None else sources_of_augmented)}
    for row in rows:
        if row.augmented_from is None:
            if sources_of_augmented is not None:
                problems.append(f"{where}: {row.id}: augmented_from: missing in a file of augmented rows")
            continue
        parent = origin.get(row.augmented_from)
        if parent is None or parent.augmented_from is not None:
            problems.append(f"{where}: {row.id}: augmented_from: no original row {row.augmented_from!r}")
        elif parent.dialogue_id != row.dialogue_id:
            problems.append(
                f"{where}: {row.id}: augmented_from: {row.augmented_from!r} is in dialogue {parent.dialogue_id!r}, "
                f"not {row.dialogue_id!r}"
            )
        elif parent.label != row.label:
            problems.append(
                f"{where}: {row.id}: {columns.label}: {row.label}, but its source has {parent.label}"
            )
        elif parent.turns[:-1] != row.turns[:-1] or parent.turns[-1].speaker != row.turns[-1].speaker:
            problems.append(f"{where}: {row.id}: {columns.dialogue}: its context is not its source's")
    if problems:
        raise InputError(*problems)
    return rows


def _check_record(
    record: Any,
    position: int,
    where: str,
    guide: LabelGuide,
    columns: Columns,
    require_labels: bool,
    shared_turns: dict[Turn, Turn],
    problems: list[str],
) -> Row | None:
    name = f"row {position + 1}"
    if not isinstance(record, dict):
        problems.append(f"{where}: {name}: not an object with fields")
        return None
    before = len(problems)

    def report(column: str, problem: str) -> None:
        problems.append(f"{where}: {name}: {column}: {problem}")

    def text_of(column: str) -> str | None:
        value = record.get(column)
        if value is None:
            report(column, "missing")
        elif not isinstance(value, str):
            report(column, f"must be a text, not {_kind(value)}")
        elif not value.strip():
            report(column, "empty")
        elif LONE_SURROGATE.search(value):
            report(column, "holds half a character (a lone surrogate)")
        else:
            return value
        return None

    row_id = text_of(columns.id)
    name = row_id if row_id is not None else name
    dialogue_id = text_of(columns.dialogue_id)
    current_text = text_of(columns.current_text)
    dialogue = record.get(columns.dialogue)
    if isinstance(dialogue, str):  # CSV has no lists
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            dialogue = json.loads(dialogue)
    turns: list[Turn] = []
    if dialogue is None:
        report(columns.dialogue, "missing")
    elif not isinstance(dialogue, list):
        report(columns.dialogue, f"must be a list of turns, not {_kind(dialogue)}")
    elif not dialogue:
        report(columns.dialogue, "empty")
    else:
        for number, turn in enumerate(dialogue, 1):
            text = turn.get("text") if isinstance(turn, dict) else None
            speaker = turn.get("speaker") if isinstance(turn, dict) else None
            if not isinstance(text, str) or not isinstance(speaker, str):
                report(columns.dialogue, f"turn {number} must have a text and a speaker")
            elif speaker not in guide.speakers:
                report(
                    columns.dialogue,
                    f"turn {number} has unknown speaker {speaker!r} (not {' or '.join(guide.speakers)})",
                )
            elif not text.strip():
                report(columns.dialogue, f"turn {number} is empty")
            elif LONE_SURROGATE.search(text):
                report(columns.dialogue, f"turn {number} holds half a character (a lone surrogate)")
            else:
                turn = Turn(text, speaker)
                turns.append(shared_turns.setdefault(turn, turn))
        if (
            len(turns) == len(dialogue)
            and current_text is not None
            and turns[-1].text.strip() != current_text.strip()
        ):
            report(columns.current_text, "is not the last turn's text")
    label = record.get(columns.label)
    if isinstance(label, str) and re.fullmatch(r"\d+", label.strip()):  # CSV has no integers
        label = int(label)
    if label is None or label == "":
        label = NO_LABEL
        if require_labels:
            report(columns.label, "missing")
    elif type(label) is not int:
        report(columns.label, f"must be an integer, not {_kind(label)}")
    elif label not in guide.numbers:
        report(columns.label, f"{label} is not in the label guide (0 to {len(guide.labels) - 1})")
    augmented_from = record.get("augmented_from") or None
    if augmented_from is not None and not isinstance(augmented_from, str):
        report("augmented_from", f"must be a text, not {_kind(augmented_from)}")
    if len(problems) > before:
        return None
    return Row(row_id, dialogue_id, tuple(turns), label, augmented_from)


def _kind(value: Any) -> str:
    kinds = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' ids, dialogues, turns and labels in the order of their ids: tells two data sets apart."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        digest.update(
            json.dumps([row.id, row.dialogue_id, row.turns, row.label], ensure_ascii=False).encode()
        )
    return digest.hexdigest()
