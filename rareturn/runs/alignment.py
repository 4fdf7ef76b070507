"""Several runs side by side: their rows lined up, and whether they fit together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rareturn.data.rows import NO_LABEL, Row
from rareturn.decisions.probabilities import check_logits
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError
from rareturn.runs.reading import Run
from rareturn.runs.tables import LogitTable, make_table

SHARED_KEYS = ("label_names", "positive_labels", "fold_groups")


def check_shared(where: str, info: Mapping[str, Any], first_where: str, first: Mapping[str, Any]) -> None:
    """Refuse a run or system that was made for other labels or other folds than the first (`SHARED_KEYS`)."""
    for key in SHARED_KEYS:
        what, mine, other = key, info[key], first[key]
        if mine == other:
            continue
        if key == "label_names" and len(mine) == len(other):
            label = next(label for label, name in enumerate(mine) if name != other[label])
            what, mine, other = f"{key}: label {label}", mine[label], other[label]
        raise InputError(f"{where}: {what}: {json.dumps(mine)}, but {json.dumps(other)} in {first_where}")


def row_positions(where: str, table: LogitTable, first_where: str, first: LogitTable) -> np.ndarray:
    """Where each row of `first` stands in `table`; an InputError if either lacks a row, or a label or dialogue differs."""
    left, positions = {row_id: number for number, row_id in enumerate(table.id)}, []
    for row_id, *expected in zip(first.id, first.label.tolist(), first.dialogue_id, strict=True):
        if row_id not in left:
            raise InputError(f"{where}: row {row_id!r} of {first_where} is missing")
        positions.append(here := left.pop(row_id))
        found = int(table.label[here]), table.dialogue_id[here]
        for name, mine, other in zip(("label", "dialogue_id"), found, expected, strict=True):
            if mine != other:
                raise InputError(f"{where}: row {row_id!r}: {name}: {mine!r}, but {other!r} in {first_where}")
    if left:
        raise InputError(f"{where}: row {next(iter(left))!r} is not in {first_where}")
    return np.array(positions)


def align_runs(runs: Sequence[Run]) -> list[np.ndarray]:
    """Out-of-fold logits [n, c] of every run, in the row order of the first; an InputError where runs do not fit."""
    aligned, first = [], runs[0]
    for run in runs:
        check_shared(run.reference, run.info, first.reference, first.info)
        check_logits(run.oof.logits, run.reference)
        logits = run.oof.logits[row_positions(run.reference, run.oof, first.reference, first.oof)]
        for other, theirs in zip(runs, aligned, strict=False):
            if other.name == run.name and np.array_equal(theirs, logits):
                raise InputError(f"{run.reference}: the same run as {other.reference}; leave one out")
        aligned.append(logits)
    return aligned


def align_test(runs: Sequence[Run], rows: Sequence[Row], test_file: str) -> list[list[np.ndarray]]:
    """Test logits of every run's every fold, [n, c] each, in the row order of the test file.

    Labels are compared where both the table and the file have all of theirs.
    """
    asked, label_of = make_table(rows, 0, np.zeros((len(rows), 1))), {row.id: row.label for row in rows}
    aligned = []
    for run in runs:
        where, table = f"{run.reference}: test table", run.test[0]
        if NO_LABEL in asked.label or NO_LABEL in table.label:
            known = np.array([label_of.get(row_id, NO_LABEL) for row_id in table.id])
            table = replace(table, label=known)
        positions = row_positions(where, table, test_file, asked)
        aligned.append([fold.logits[positions] for fold in run.test])
        for fold in aligned[-1]:
            check_logits(fold, where)
    return aligned


def display_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their references where two runs of different teams share a name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.reference for run in runs]


def protected_label(run: Run) -> int:
    """The label that a gate protects and to which a vote's ties go: the run's, or the most frequent one."""
    label = run.info.get("protected_label")
    return int(np.bincount(run.oof.label).argmax()) if label is None else label


def make_voting(runs: Sequence[Run], protected_class: int | None, soft: bool) -> Voting:
    """The vote of these runs. Its gate is the label that every specialist lacks, or else the one that is not positive."""
    every = set(range(runs[0].num_labels))
    given = [tuple(run.info.get("label_scope") or every) for run in runs]
    scopes = tuple(None if set(scope) == every else scope for scope in given)
    lacking = every.difference(*filter(None, scopes))
    gates = lacking if lacking != every else every - set(runs[0].positive_labels)
    if len(gates) != 1:
        raise InputError(
            f"vote: the gatekeepers decide one label, but {len(gates)} qualify: either all specialists lack the same "
            "label, or all labels but one are positive"
        )
    return Voting(gates.pop(), protected_class, scopes, soft)
