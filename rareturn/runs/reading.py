"""A run from its folder or from the Hub, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.folds import read_folds
from rareturn.data.rows import NO_LABEL
from rareturn.decisions.metrics import Truth
from rareturn.errors import InputError
from rareturn.runs.folder import read_run_info
from rareturn.runs.publish import pull_run
from rareturn.runs.references import parse_reference
from rareturn.runs.schemas import metric_of
from rareturn.runs.tables import LogitTable, read_table


@dataclass
class Run:
    """A run whose out-of-fold table is whole.

    Attributes:
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

    def truth(self, metric: str | None = None, seed: int = 42) -> Truth:
        """What predictions of the out-of-fold rows are scored against, by default with the run's own metric."""
        labels, dialogues, metric = self.oof.label, self.oof.dialogue_id, metric_of(self.info, metric)
        return Truth(labels, dialogues, self.num_labels, self.positive_labels, metric, seed)


def read_run(
    reference: str | os.PathLike, *, require_test: bool = False, folds: Sequence[int] | None = None
) -> Run:
    """Read and check a run, from its folder or from the Hub (at one commit); of one that lacks the others, `folds` alone.

    An InputError where there is no such run, a file of it is unreadable, a fold is missing (of the test tables too with
    `require_test`), or its files contradict each other: in their settings, rows, dialogues, labels or logits.
    """
    where = parse_reference(reference)
    if where.folder is not None:
        root, revision, pattern = where.folder, None, "{}/fold-{}.parquet"
        if not (root / "run.json").is_file():
            raise InputError(f"{reference}: {_other_kind(root)}")
    else:
        (root, revision), pattern = pull_run(reference, where), "{}-fold-{}.parquet"
    info = read_run_info(root, f"{reference}: run.json")
    assignment = read_folds(root / "folds.json")
    for key in ("num_folds", "fold_seed", "fold_groups"):
        here, there = info[key], assignment[key]
        if here != there:
            raise InputError(f"{reference}: {key}: run.json has {here!r}, folds.json {there!r}")
    tables: dict[str, dict[int, LogitTable]] = {}
    for split in ("oof", "test"):
        paths = {fold: root / pattern.format(split, fold) for fold in folds or range(info["num_folds"])}
        missing = [str(fold) for fold, path in paths.items() if not path.is_file()]
        if missing and (split == "oof" or require_test):
            which = f"fold{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            raise InputError(f"{reference}: the {split} table of {which} is missing")
        tables[split] = {} if missing else {fold: read_table(path) for fold, path in paths.items()}
    fold_of = {row_id: fold for row_id, fold in assignment["folds"].items() if fold in tables["oof"]}
    if problems := [*_oof_problems(info, fold_of, tables["oof"]), *_test_problems(info, tables["test"])]:
        raise InputError(*(f"{reference}: {problem}" for problem in problems))
    oof, test = _join([*tables["oof"].values()], fold_of), [*tables["test"].values()]
    return Run(os.fspath(reference), revision, info["name"], info, fold_of, oof, test)


def _other_kind(folder: Path) -> str:
    """What a folder is that is not a run's."""
    if (folder / "ensemble.json").is_file():
        return "is an ensemble, not a run; name the runs that it was made of"
    for parent in folder.resolve().parents[:2]:
        if (parent / "run.json").is_file():
            return f"is a part of a run, which is {parent.name}"
    return "is not a run: it holds no run.json"


def _join(tables: list[LogitTable], row_ids: Iterable[str]) -> LogitTable:
    """The folds' tables as one, its rows in this order."""
    ids = [row_id for table in tables for row_id in table.id]
    dialogues = [dialogue_id for table in tables for dialogue_id in table.dialogue_id]
    fold, label = (np.concatenate([getattr(table, name) for table in tables]) for name in ("fold", "label"))
    logits = np.concatenate([table.logits for table in tables if len(table)])
    position = {row_id: number for number, row_id in enumerate(ids)}
    joined = LogitTable(ids, dialogues, fold, label, logits)
    return joined.take([position[row_id] for row_id in row_ids])


def _oof_problems(
    info: dict[str, Any], folds: dict[str, int], tables: dict[int, LogitTable]
) -> Iterable[str]:
    fold_of: dict[str, int] = {}  # of each dialogue
    for fold, table in tables.items():
        where, present = f"oof fold {fold}", set(table.id)
        yield from _problems(where, table, fold, len(info["label_names"]), 0)
        for row_id in table.id:
            if (own := folds.get(row_id)) != fold:
                belongs = "is in no fold of folds.json" if own is None else f"belongs to fold {own}"
                yield f"{where}: row {row_id!r} {belongs}"
        lacking = [row_id for row_id in folds if folds[row_id] == fold and row_id not in present]
        if lacking:
            yield f"{where}: row {lacking[0]!r} of folds.json is missing"
        for dialogue_id in dict.fromkeys(table.dialogue_id) if info["fold_groups"] == "dialogue" else ():
            if (first := fold_of.setdefault(dialogue_id, fold)) != fold:
                yield f"dialogue {dialogue_id!r} is in folds {first} and {fold}"


def _test_problems(info: dict[str, Any], tables: dict[int, LogitTable]) -> Iterable[str]:
    for fold, table in tables.items():
        where, first = f"test fold {fold}", next(iter(tables.values()))
        yield from _problems(where, table, fold, len(info["label_names"]), NO_LABEL)
        if table.id != first.id or table.dialogue_id != first.dialogue_id:
            yield f"{where}: other rows, or in another order, than fold 0"
        elif table.rows != first.rows:
            yield f"{where}: made for other texts than fold 0; launch both folds again"


def _problems(where: str, table: LogitTable, fold: int, num_labels: int, first_label: int) -> Iterable[str]:
    if len(table) and table.logits.shape[1] != num_labels:
        yield f"{where}: {table.logits.shape[1]} logits a row for {num_labels} labels"
    unknown = (table.label < first_label) | (table.label >= num_labels)
    known = f"label: not one of {first_label}..{num_labels - 1}"
    for wrong, what in ((table.fold != fold, "fold: not the fold of its file"), (unknown, known)):
        if wrong.any():
            yield f"{where}: row {table.id[int(np.argmax(wrong))]!r}: {what}"
