"""Tables of utterances, one a line, as most corpora come; a row is a place in a dialogue, which is held once (DESIGN 3)."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rareturn.data.dialogues import NO_LABEL, Dialogue, Row, Turns, text_problem, turns_of
from rareturn.data.label_guide import TABLE_FIELDS, LabelGuide, listed
from rareturn.data.readers import DELIMITERS
from rareturn.errors import InputError

logger = logging.getLogger(__name__)

SEVERAL = re.compile(r"\s*[|;,/+&]\s*|\s+")


@dataclass(frozen=True)
class Source:
    """The rows of a source, and how it puts them."""

    rows: list[Row]
    columns: dict[str, str] | None = None  # of a table's fields; None for rows that hold their own turns
    named: bool | None = None  # whether a table's labels are names, not numbers; None where no line has one


def table_columns(given: Mapping[str, str], guide: LabelGuide) -> dict[str, str]:
    """The column of each field of a table: what the flags say, else the guide, else the field's own name."""
    return {name: given.get(name) or guide.columns.get(name, name) for name in TABLE_FIELDS}


def read_table(
    records: Iterable[Any], source: str, guide: LabelGuide, given: Mapping[str, str], labels: bool | None
) -> Source:
    """The rows of a table, by dialogues and turns: its labelled lines or, where no line has a label, every turn of a target
    speaker.

    Args:
        given: columns that flags name.
        labels: whether labels must be there; None: they are not looked at.

    Raises:
        InputError: a line for each kind of problem.
    """
    columns = table_columns(given, guide)
    problems: dict[tuple[str, str], list[int]] = {}  # to the first row with each, and how many have it

    def note(place: int, column: str, problem: str | None) -> None:
        if problem:
            problems.setdefault((column, problem), [place + 1, 0])[1] += 1

    def refuse() -> None:
        lines = []
        for (column, problem), (first, count) in problems.items():
            more = f" (and {count - 1} more rows)" if count > 1 else ""
            lines.append(f"{source}: row {first}: {column}: {problem}{more}")
        if lines:
            raise InputError(*lines)

    names, blank = {*guide.names}, (None, "", *guide.no_label)
    dialogues: dict[str, list[tuple]] = {}  # of order, place, text, speaker, label and id
    shared: dict[str, str] = {}  # dialogue ids and speakers, each held once
    ids: set[str] = set()
    named, elsewhere, present, needed = None, 0, set(), ()
    for place, record in enumerate(records):
        if not isinstance(record, dict) or None in record:
            wrong = "more cells than columns" if isinstance(record, dict) else "not an object with fields"
            note(place, "cells", wrong)
            continue
        if not present:
            optional = {"turn", "id"} - {*given, *guide.columns} | (set() if labels else {"label"})
            present = _present(source, record, columns, {*TABLE_FIELDS} - optional)
            needed = ("dialogue_id", "speaker", "text", *({"turn", "id"} & present))
        cells = {name: cell_text(record.get(column)) for name, column in columns.items()}
        for name in needed:
            note(place, columns[name], text_problem(cells[name]))
        dialogue_id, turn, speaker, text, label, row_id = cells.values()
        if isinstance(speaker, str) and speaker and not guide.knows(speaker):
            unknown = f"unknown speaker {speaker!r} (not {listed(guide.speakers)})"
            note(place, columns["speaker"], unknown)
        number = NO_LABEL
        if labels is not None and label not in blank:
            known = _known(label, guide, f"{source}: row {place + 1}: {columns['label']}")
            number = guide.known_labels.get(known)
            if known is None:
                note(place, columns["label"], f"{label!r} is no name or number of the label guide")
            elif named not in (None, known in names):
                kinds = "a number, but names" if named else "a name, but numbers"
                note(place, columns["label"], f"{kinds} in the rows before")
            else:
                named = known in names
            elsewhere += not guide.is_target(speaker)
        if problems:
            continue
        lines = dialogues.setdefault(shared.setdefault(dialogue_id, dialogue_id), [])
        order = _order(turn) if "turn" in present else len(lines)
        if order is None:
            note(place, columns["turn"], f"must be a number (the order of the turns), not {turn!r}")
        if "id" not in present:
            row_id = f"{dialogue_id}/{order}"
        elif row_id in ids:
            note(place, columns["id"], f"duplicate id {row_id!r}")
        else:
            ids.add(row_id)
        lines.append((order, place, text, shared.setdefault(speaker, speaker), number, row_id))
    refuse()
    if elsewhere:
        whom = f"speakers other than the target ({listed(guide.targets)})"
        logger.warning(f"{source}: {elsewhere} labelled lines are by {whom}: context only")
    rows, every = [], named is None and not labels
    for dialogue_id in list(dialogues):
        lines = sorted(dialogues.pop(dialogue_id))
        dialogue, before = Dialogue(turns_of([line[2:4] for line in lines], guide)), None
        for count, (order, place, _, speaker, label, row_id) in enumerate(lines, 1):
            if order == before:
                note(place, columns["turn"], f"{order} is there twice in dialogue {dialogue_id!r}")
            if guide.is_target(speaker) and (every or label != NO_LABEL):
                rows.append(Row(row_id, dialogue_id, Turns(dialogue, count), label, None, place))
            before = order
    refuse()
    return Source(rows, columns, named)


def _present(source: str, record: dict[str, Any], columns: dict[str, str], needed: set[str]) -> set[str]:
    """The fields whose columns the first record has; an InputError where one that is needed is not there."""
    present = {name for name in TABLE_FIELDS if columns[name] in record}
    if missing := [name for name in TABLE_FIELDS if name in needed - present]:
        absent = ", ".join(repr(columns[name]) for name in missing)
        flags = ", ".join(f"--{name}_column" for name in missing)
        there = ", ".join(map(str, record))
        advice = f"Name them by {flags}, or in the guide"
        raise InputError(f"{source}: no column {absent}; there are: {there}. {advice}")
    return present


def cell_text(value: Any) -> Any:
    """A cell as a text; None where it is empty, and what is neither a text nor a whole number as it is."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return str(value) if type(value) is int else value


def _order(turn: Any) -> float | None:
    try:
        order = float(turn)
        return int(order) if order.is_integer() else order if math.isfinite(order) else None
    except (TypeError, ValueError):
        return None


def _known(label: Any, guide: LabelGuide, where: str) -> str | None:
    """The guide's word for a label's cell; None if it has none. An InputError where the cell holds several labels."""
    known, several = guide.known_labels, isinstance(label, (list, dict))
    if not several:
        text = str(label)
        # A column of whole numbers with gaps leaves pandas as 3.0.
        if found := next((word for word in (text, text.removesuffix(".0")) if word in known), None):
            return found
        several = holds_several(text, known)
    if several:
        raise InputError(f"{where}: {label}: several labels for one line (multi-label) cannot be learnt here")
    return None


def holds_several(label: str, known: Container[str]) -> bool:
    """Whether a label's text is several of the known ones, joined."""
    parts = [part.strip("[]{}()'\"") for part in SEVERAL.split(label)]
    return len(parts) > 1 and all(part in known for part in parts)


def table_bytes(records: Sequence[dict[str, Any]], suffix: str) -> bytes:
    """Records as a .csv or .tsv file with the columns of all of them."""
    header = dict.fromkeys(column for record in records for column in record)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(header), delimiter=DELIMITERS[suffix], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue().encode()
