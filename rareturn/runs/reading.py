"""A run from its folder or from the Hub, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rareturn.data.folds import read_folds
from rareturn.data.rows import NO_LABEL
from rareturn.decisions.metrics import Truth
from rareturn.errors import InputError
from rareturn.files import read_json
from rareturn.runs.publish import pull_run
from rareturn.runs.references import parse_reference
from rareturn.runs.schemas import check_run_info
from rareturn.runs.tables import LogitTable, read_table


@dataclass
class Run:
    """A run whose out-of-fold table is whole.

    Attributes:
        reference: as the user gave it.
        revision: the commit SHA of a run read from the Hub; None for a folder.
        info: `run.json`.
        folds: row id to fold.
        oof: every row of `folds` once, in its order.
        test: one table a fold, in fold order, of the same rows in the same order; empty if a fold has none.
    """

    reference: str
    revision: str | None
    name: str
    info: dict[str, Any]
    folds: dict[str, int]
    oof: LogitTable
    test: list[LogitTable] = field(default_factory=list)

    @property
    def label_names(self) -> list[str]:
        return self.info["label_names"]

    @property
    def num_labels(self) -> int:
        return len(self.info["label_names"])

    @property
    def positive_labels(self) -> list[int]:
        return self.info["positive_labels"]

    def truth(self, metric: str = "macro_f1_positive", seed: int = 42) -> Truth:
        """What predictions of the out-of-fold rows are scored against."""
        return Truth(
            self.oof.label, self.oof.dialogue_id, self.num_labels, self.positive_labels, metric, seed
        )


def read_run(reference: str | os.PathLike, *, require_test: bool = False) -> Run:
    """Read and check a run, from its folder or from the Hub (at one commit).

    Raises:
        InputError: no such run, a file of it unreadable, a fold missing (of the test tables too with `require_test`),
            rows that `folds.json` has not or has in another fold, a dialogue in two folds though the folds are made of
            dialogues, labels or logits that do not fit the label names, or test tables of different rows.
    """
    where = parse_reference(reference)
    if where.folder is not None:
        root, revision, pattern = where.folder, None, "{}/fold-{}.parquet"
    else:
        (root, revision), pattern = pull_run(reference, where), "{}-fold-{}.parquet"
    info = check_run_info(read_json(root / "run.json"), f"{reference}: run.json")
    assignment = read_folds(root / "folds.json")
    for key in ("num_folds", "fold_seed", "fold_groups"):
        if assignment[key] != info[key]:
            raise InputError(
                f"{reference}: {key}: run.json has {info[key]!r}, folds.json {assignment[key]!r}"
            )
    tables: dict[str, list[LogitTable]] = {}
    for split in ("oof", "test"):
        paths = [root / pattern.format(split, fold) for fold in range(info["num_folds"])]
        missing = [str(fold) for fold, path in enumerate(paths) if not path.is_file()]
        if missing and (split == "oof" or require_test):
            which = f"fold{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            raise InputError(f"{reference}: the {split} table of {which} is missing")
        tables[split] = [] if missing else [read_table(path) for path in paths]
    folds = assignment["folds"]
    oof = _join_oof(reference, info, folds, tables["oof"])
    _check_test(reference, info, tables["test"])
    return Run(os.fspath(reference), revision, info["name"], info, folds, oof, tables["test"])


def _join_oof(
    reference: str | os.PathLike, info: dict[str, Any], folds: dict[str, int], tables: list[LogitTable]
) -> LogitTable:
    """The folds' tables as one, its rows in the order of `folds`."""
    problems = []
    for fold, table in enumerate(tables):
        where = f"{reference}: oof fold {fold}"
        problems += _content_problems(where, table, fold, len(info["label_names"]), 0)
        for row_id in table.id:
            if row_id not in folds:
                problems.append(f"{where}: row {row_id!r} is in no fold of folds.json")
            elif folds[row_id] != fold:
                problems.append(f"{where}: row {row_id!r} belongs to fold {folds[row_id]}")
        present = set(table.id)
        lacking = [row_id for row_id in folds if folds[row_id] == fold and row_id not in present]
        problems += [f"{where}: row {row_id!r} of folds.json is missing" for row_id in lacking[:1]]
    if problems:
        raise InputError(*problems)
    joined = LogitTable(
        [row_id for table in tables for row_id in table.id],
        [dialogue_id for table in tables for dialogue_id in table.dialogue_id],
        np.concatenate([table.fold for table in tables]),
        np.concatenate([table.label for table in tables]),
        np.concatenate([table.logits for table in tables if len(table)]),
    )
    if info["fold_groups"] == "dialogue":
        fold_of: dict[str, int] = {}
        for dialogue_id, fold in dict.fromkeys(zip(joined.dialogue_id, joined.fold.tolist(), strict=True)):
            if (first := fold_of.setdefault(dialogue_id, fold)) != fold:
                problems.append(f"{reference}: dialogue {dialogue_id!r} is in folds {first} and {fold}")
    if problems:
        raise InputError(*problems)
    position = {row_id: number for number, row_id in enumerate(joined.id)}
    return joined.take([position[row_id] for row_id in folds])


def _check_test(reference: str | os.PathLike, info: dict[str, Any], tables: list[LogitTable]) -> None:
    problems = []
    for fold, table in enumerate(tables):
        where = f"{reference}: test fold {fold}"
        problems += _content_problems(where, table, fold, len(info["label_names"]), NO_LABEL)
        if table.id != tables[0].id or table.dialogue_id != tables[0].dialogue_id:
            problems.append(f"{where}: other rows, or in another order, than fold 0")
        elif table.rows != tables[0].rows:
            problems.append(f"{where}: made for other texts than fold 0; launch both folds again")
    if problems:
        raise InputError(*problems)


def _content_problems(
    where: str, table: LogitTable, fold: int, num_labels: int, first_label: int
) -> Iterable[str]:
    if len(table) and table.logits.shape[1] != num_labels:
        yield f"{where}: {table.logits.shape[1]} logits a row for {num_labels} labels"
    unknown = (table.label < first_label) | (table.label >= num_labels)
    for wrong, what in (
        (table.fold != fold, "fold: not the fold of its file"),
        (unknown, f"label: not one of {first_label}..{num_labels - 1}"),
    ):
        if wrong.any():
            yield f"{where}: row {table.id[int(np.argmax(wrong))]!r}: {what}"
