"""Rows of labelled dialogue, each an utterance to classify with the turns before it, and what makes them valid."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rareturn.command_line import flag
from rareturn.data.dialogues import NO_LABEL, Row, Turn, kind, row_json, text_problem, turn_problem, turns_of
from rareturn.data.label_guide import LabelGuide
from rareturn.data.readers import read_records
from rareturn.data.utterances import Source, holds_several, read_table, table_columns
from rareturn.errors import InputError

MAX_PROBLEMS_KEPT = 10_000
FIELDS = ("id", "dialogue_id", "dialogue", "current_text", "label")  # of a row that holds its own turns


@dataclass
class ColumnArguments:
    """Flags of every script that reads dialogues: the names of the columns."""

    _argument_group_name = "Columns (default: for a table the label guide's, then the name in the flag)"

    dialogue_id_column: str | None = flag(None, "Column of the dialogue's id.")
    label_column: str | None = flag(None, "Column of the label: a number or a name of the label guide.")
    id_column: str | None = flag(None, "Column of the row's id. A table without has DIALOGUE/TURN.")
    turn_column: str | None = flag(None, "Table: column of the turn's number. File order where it has none.")
    speaker_column: str | None = flag(None, "Table: column of the speaker.")
    text_column: str | None = flag(None, "Table: column of the utterance.")
    dialogue_column: str | None = flag(None, "Rows: column of the turns, each {text, speaker}, target last.")
    current_text_column: str | None = flag(None, "Rows: column of the target's text.")

    @property
    def columns(self) -> dict[str, str]:
        """Field to column, where a flag says so."""
        named = [item.name for item in fields(ColumnArguments) if getattr(self, item.name)]
        return {name.removesuffix("_column"): getattr(self, name) for name in named}


@dataclass
class DataArguments(ColumnArguments):
    """The label guide, besides."""

    label_guide: str = flag("label_guides/dmrs.yaml", "YAML file of labels, their definitions and speakers.")


def row_columns(given: Mapping[str, str]) -> dict[str, str]:
    """The column of each field of rows that hold their own turns."""
    return {name: given.get(name, name) for name in FIELDS}


def open_source(
    source: str, split: str, guide: LabelGuide, given: Mapping[str, str]
) -> tuple[Iterator[Any], bool]:
    """The records of a source, and whether they are a table's: whether the first one has no column of turns."""
    records, column = iter(read_records(source, split)), row_columns(given)["dialogue"]
    first = list(itertools.islice(records, 1))
    is_table = any(isinstance(record, dict) and column not in record for record in first)
    if first and not is_table and table_columns(given, guide)["dialogue_id"] == column:
        is_table = not str(first[0][column]).lstrip().startswith("[")
    return itertools.chain(first, records), is_table


def load_rows(source: str | None, label_guide: LabelGuide, **how: Any) -> list[Row]:
    """The rows of `load_source`, which has the arguments."""
    return load_source(source, label_guide, **how).rows


def load_source(
    source: str | None,
    label_guide: LabelGuide,
    *,
    columns: Mapping[str, str] | None = None,
    require_labels: bool = True,
    split: str | None = None,
    sources_of_augmented: Sequence[Row] | None = None,
) -> Source:
    """Read and check rows (none where there is no source); an InputError has a line for each problem in a row.

    Args:
        source: see `read_records`; rows that hold their own turns, or a table of utterances.
        columns: columns that flags name, by field.
        require_labels: False for a test file: a label that is there is checked all the same.
        split: of a source that has several. Default: train, or test for a test file.
        sources_of_augmented: the original rows, where the source holds augmented ones: each must name one of these,
            in the same dialogue and with the same label. None: augmented rows refer to rows of the same source.
    """
    if not source:
        return Source([])
    given, split = columns or {}, split or ("train" if require_labels else "test")
    records, is_table = open_source(source, split, label_guide, given)
    if is_table:
        table = read_table(records, source, label_guide, given, require_labels)
        if not table.rows:
            labelled = " that has a label" if require_labels else ""
            raise InputError(f"{source}: holds no rows: no turn of a target speaker{labelled}")
        if sources_of_augmented is not None:
            raise InputError(f"{source}: a table of utterances, but variants are rows that hold their turns")
        return table
    columns = row_columns(given)
    problems: list[str] = []
    rows: dict[str, Row] = {}
    shared: dict[Turn, Turn] = {}
    for number, record in enumerate(records, 1):
        if len(problems) >= MAX_PROBLEMS_KEPT:
            break
        if not isinstance(record, dict):
            problems.append(f"{source}: row {number}: not an object with fields")
            continue
        cells = _cells(record, columns, label_guide)
        found = list(_field_problems(cells, label_guide, require_labels))
        name = f"row {number}" if any(field == "id" for field, _ in found) else cells["id"]
        problems += [f"{source}: {name}: {columns.get(field, field)}: {said}" for field, said in found]
        if not found:
            if name in rows:
                problems.append(f"{source}: {name}: {columns['id']}: duplicate id")
            said = [(turn["text"], turn["speaker"]) for turn in cells["dialogue"]]
            turns = tuple(shared.setdefault(turn, turn) for turn in turns_of(said, label_guide))
            label = NO_LABEL if cells["label"] is None else cells["label"]
            rows[name] = Row(name, cells["dialogue_id"], turns, label, cells["augmented_from"], number - 1)
    if not rows and not problems:
        problems.append(f"{source}: holds no rows")
    originals = rows if sources_of_augmented is None else {row.id: row for row in sources_of_augmented}
    for row in rows.values():
        if row.augmented_from or originals is not rows:
            said = _augmentation_problem(row, originals.get(row.augmented_from), columns)
            problems += [f"{source}: {row.id}: {said}"] if said else []
    if problems:
        raise InputError(*problems)
    return Source(list(rows.values()))


def _augmentation_problem(row: Row, source: Row | None, columns: Mapping[str, str]) -> str | None:
    """What is wrong with a variant, in words that go on from its id; None if nothing is."""
    if row.augmented_from is None:
        return "augmented_from: missing in a file of augmented rows"
    if source is None or source.augmented_from:
        return f"augmented_from: no original row {row.augmented_from!r}"
    if source.dialogue_id != row.dialogue_id:
        return f"augmented_from: {source.id!r} is in dialogue {source.dialogue_id!r}, not {row.dialogue_id!r}"
    if source.label != row.label:
        return f"{columns['label']}: {row.label}, but its source has {source.label}"
    if source.turns[:-1] != row.turns[:-1] or source.turns[-1].speaker != row.turns[-1].speaker:
        return f"{columns['dialogue']}: its context is not its source's"
    return None


def _cells(record: dict[str, Any], columns: Mapping[str, str], guide: LabelGuide) -> dict[str, Any]:
    """A record's values by our names, unchecked. CSV has neither lists nor integers nor None: a text may stand for one."""
    cells = {name: record.get(column) for name, column in columns.items()}
    if isinstance(cells["dialogue"], str):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            cells["dialogue"] = json.loads(cells["dialogue"])
    if isinstance(label := cells["label"], str):
        label = label.strip() or None
        digits = label and re.fullmatch(r"\d+", label)
        cells["label"] = int(label) if digits else guide.known_labels.get(label, label)
    return cells | {"augmented_from": record.get("augmented_from") or None}


def _field_problems(
    cells: dict[str, Any], guide: LabelGuide, require_labels: bool
) -> Iterator[tuple[str, str]]:
    """What is wrong with a row: our name of each bad field, and what to say of it."""
    texts = {name: text_problem(cells[name]) for name in ("id", "dialogue_id", "current_text")}
    yield from ((name, problem) for name, problem in texts.items() if problem)
    dialogue, label, source = cells["dialogue"], cells["label"], cells["augmented_from"]
    if dialogue is None:
        yield "dialogue", "missing"
    elif not isinstance(dialogue, list):
        yield "dialogue", f"must be a list of turns, not {kind(dialogue)}"
    elif not dialogue:
        yield "dialogue", "empty"
    elif any(wrong := [turn_problem(turn, guide) for turn in dialogue]):
        numbered = enumerate(wrong, 1)
        yield from (("dialogue", f"turn {number} {problem}") for number, problem in numbered if problem)
    else:
        text, speaker = dialogue[-1]["text"], dialogue[-1]["speaker"]
        if not guide.is_target(speaker):
            wanted = f"the label guide's target_speaker {' or '.join(map(repr, guide.targets))}"
            yield "dialogue", f"the last turn is by {speaker!r}, not by {wanted}"
        if not texts["current_text"] and text.strip() != cells["current_text"].strip():
            yield "current_text", "is not the last turn's text"
    if label is None:
        if require_labels:
            yield "label", "missing"
    elif isinstance(label, list) or holds_several(str(label), guide.known_labels):
        yield "label", f"{label}: several labels for one row (multi-label) cannot be learnt here"
    elif isinstance(label, str):
        yield "label", f"{label!r} is no name or number of the label guide"
    elif type(label) is not int:
        yield "label", f"must be an integer, not {kind(label)}"
    elif label not in guide.numbers:
        yield "label", f"{label} is not in the label guide (0 to {len(guide.labels) - 1})"
    if source is not None and not isinstance(source, str):
        yield "augmented_from", f"must be a text, not {kind(source)}"


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' ids, dialogues, turns and labels in the order of their ids: tells two data sets apart."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        facts = [row.id, row.dialogue_id, row.turns, row.label]
        digest.update(row_json(facts, ensure_ascii=False))
    return digest.hexdigest()
