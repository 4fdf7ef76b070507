"""Rows of labelled dialogue and what makes them valid.

A row is one utterance to classify (the target, the last turn) with the turns before it. See `Row`.
"""

from __future__ import annotations

import contextlib
import dataclasses
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


@dataclass
class DataArguments:
    """Flags of every script that reads rows: the label guide and the names of the columns."""

    _argument_group_name = "Label guide and columns"

    label_guide: str = flag(
        "label_guides/dmrs.yaml",
        "YAML file with the labels' numbers, names and definitions, and the speakers.",
    )
    id_column: str = flag("id", "Column of the row's id.")
    dialogue_id_column: str = flag("dialogue_id", "Column of the dialogue's id.")
    dialogue_column: str = flag(
        "dialogue", "Column of the turns ({text, speaker}, oldest first, the target last)."
    )
    current_text_column: str = flag("current_text", "Column of the target's text.")
    label_column: str = flag("label", "Column of the label's number.")

    @property
    def columns(self) -> Columns:
        names = (item.name for item in dataclasses.fields(Columns))
        return Columns(**{name: getattr(self, f"{name}_column") for name in names})


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
        if source is None or source.augmented_from is not None:
            yield f"{place}: augmented_from: no original row {row.augmented_from!r}"
        elif source.dialogue_id != row.dialogue_id:
            yield (
                f"{place}: augmented_from: {row.augmented_from!r} is in dialogue {source.dialogue_id!r}, "
                f"not {row.dialogue_id!r}"
            )
        elif source.label != row.label:
            yield f"{place}: {columns.label}: {row.label}, but its source has {source.label}"
        elif source.turns[:-1] != row.turns[:-1] or source.turns[-1].speaker != row.turns[-1].speaker:
            yield f"{place}: {columns.dialogue}: its context is not its source's"


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
        for number, said in enumerate(dialogue, 1):
            problem = turn_problem(said, guide)
            if problem:
                report(columns.dialogue, f"turn {number} {problem}")
            else:
                turn = Turn(said["text"], said["speaker"])
                turns.append(shared_turns.setdefault(turn, turn))
        if len(turns) == len(dialogue):
            if turns[-1].speaker != guide.target_speaker:
                report(
                    columns.dialogue,
                    f"the last turn is by {turns[-1].speaker!r}, not by the label guide's target_speaker "
                    f"{guide.target_speaker!r}",
                )
            if current_text is not None and turns[-1].text.strip() != current_text.strip():
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


def turn_problem(turn: Any, guide: LabelGuide) -> str | None:
    """What is wrong with a turn of a record, in words that go on from "turn 3"; None if nothing is."""
    text, speaker = (turn.get("text"), turn.get("speaker")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(text, str) or not isinstance(speaker, str):
        return "must have a text and a speaker"
    if speaker not in guide.speakers:
        return f"has unknown speaker {speaker!r} (not {listed(guide.speakers)})"
    if not text.strip():
        return "is empty"
    return "holds half a character (a lone surrogate)" if LONE_SURROGATE.search(text) else None


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
