"""The rows of a run and their folds: the flags that name them, reading and checking them, who trains and who is judged.

A fold is held out, its rows judged by a model of the others. Runs that share `fold_seed` line up row by row.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, Field, StrictInt, ValidationInfo, field_validator

from rareturn.command_line import flag
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rows import DataArguments, Row, data_fingerprint, load_rows
from rareturn.errors import InputError, first_line
from rareturn.files import check_content, read_json, write_json

logger = logging.getLogger(__name__)

FoldGroups = Literal["dialogue", "none"]
FOLD_GROUPS = get_args(FoldGroups)


class FoldsFile(BaseModel):
    """What a `folds.json` holds: how the folds were made, and the fold of each row by its id."""

    num_folds: Annotated[StrictInt, Field(ge=2)]
    fold_seed: StrictInt
    fold_groups: FoldGroups
    folds: Annotated[dict[str, StrictInt], Field(min_length=1)]

    @field_validator("folds")
    @classmethod
    def _exist(cls, folds: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        number = info.data.get("num_folds")
        wrong = [row_id for row_id, fold in folds.items() if number and not 0 <= fold < number]
        if wrong:
            more = f" (and {len(wrong) - 1} more rows like it)" if len(wrong) > 1 else ""
            raise ValueError(f"row {wrong[0]!r}: fold {folds[wrong[0]]} is not one of 0..{number - 1}{more}")
        return folds


@dataclass
class FoldDataArguments(DataArguments):
    """Flags of every script that trains a run: which rows, which folds, and how much of a dialogue a row sees."""

    _argument_group_name = "Rows, folds and window"

    train_file: str | None = flag(
        None, "Labelled rows: file, folder or Hub dataset ORG/NAME[:path][@revision]."
    )
    augmented_file: str | None = flag(
        None, "Variants by augment.py; one is trained on only where its source is."
    )
    test_file: str | None = flag(None, "Rows to predict; labels are optional.")
    num_folds: int = flag(5, "Folds of the run; 5 as in the paper.")
    fold_seed: int = flag(42, "Seed of the folds; not --seed, so that runs line up row by row.")
    fold_groups: str = flag(
        "dialogue",
        "dialogue: a dialogue is in one fold (estimates new dialogues); none: rows are split.",
        choices=list(FOLD_GROUPS),
    )
    label_scope: list[str] | None = flag(None, "Labels of a specialist, such as 1-8 or 1 2 3. Default: all.")
    max_turns: int = flag(30, "Turns that a row sees at most, its own included; 30 as in the paper.")
    max_seq_length: int = flag(
        1024,
        "Tokens of a row at most; the oldest turns go first. 1024 as in the paper. (An encoder's probe: of a turn.)",
    )
    window_stride: int = flag(
        10,
        "Turns by which a long dialogue's window moves, so that neighbouring rows share a prefix; 1 is the paper's "
        "sliding window. At most --max_turns: a larger number counts as that.",
    )

    @property
    def split(self) -> dict[str, Any]:
        """What decides the folds of given rows."""
        return {name: getattr(self, name) for name in ("num_folds", "fold_seed", "fold_groups")}

    @property
    def window(self) -> dict[str, int]:
        """How much of a dialogue a row sees, as `Renderer` takes it."""
        return {
            "max_turns": self.max_turns,
            "max_seq_length": self.max_seq_length,
            "window_stride": min(self.window_stride, self.max_turns),
        }


@dataclass(frozen=True)
class RunData:
    """All rows of a run, read and checked, and the fold of each original one."""

    guide: LabelGuide
    originals: list[Row]
    augmented: list[Row]
    test: list[Row]
    folds: dict[str, int]
    scope: list[int]

    def training_part(self, fold: int) -> list[Row]:
        """What a fold's model is trained on, within the scope: other folds' originals, and variants of those.

        With `dialogue` folds a variant can never show a held-out dialogue. With `none` it may share its dialogue with
        held-out rows, but never its source.
        """
        rows = [row for row in self.originals + self.augmented if row.label in self.scope]
        return [row for row in rows if self.folds[row.augmented_from or row.id] != fold]

    def held_out_part(self, fold: int) -> list[Row]:
        """The original rows that a fold's model is judged on, of all labels."""
        return [row for row in self.originals if self.folds[row.id] == fold]

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of the rows (DESIGN 6)."""
        return {
            "label_names": self.guide.names,
            "positive_labels": list(self.guide.positive),
            "protected_label": self.guide.protected,
            "label_scope": None if self.scope == list(self.guide.numbers) else self.scope,
            "label_guide": self.guide.to_dict(),
            "data_fingerprint": data_fingerprint(self.originals),
        }


def read_run_data(arguments: FoldDataArguments, run_dir: Path) -> RunData:
    """Read and check the rows that the flags name, before any model is loaded, and give every original row its fold.

    Args:
        run_dir: where a `folds.json`, if there is one, must agree.

    Raises:
        InputError: what `load_rows`, `read_folds` and `check_folds` refuse; a variant among the originals.
    """
    if not arguments.train_file:
        raise InputError("--train_file is missing; give it here or in the recipe")
    guide = load_label_guide(arguments.label_guide)
    scope = sorted(parse_label_scope(arguments.label_scope, guide))

    def read(source: str | None, **options: Any) -> list[Row]:
        return load_rows(source, guide, columns=arguments.columns, **options) if source else []

    originals = read(arguments.train_file)
    misplaced = "augmented_from: variants belong in --augmented_file"
    if variants := [row.id for row in originals if row.augmented_from]:
        raise InputError(*(f"{arguments.train_file}: {name}: {misplaced}" for name in variants))
    augmented = read(arguments.augmented_file, sources_of_augmented=originals)
    test = read(arguments.test_file, require_labels=False, split="test")
    path = run_dir / "folds.json"
    if path.exists():
        folds, where = _folds_made_by(path, arguments.split), str(path)
    else:
        folds, where = assign_folds(originals, **arguments.split), "folds"
    check_folds(originals + augmented, folds, arguments.num_folds, arguments.fold_groups, where)
    return RunData(guide, originals, augmented, test, folds, scope)


def assign_folds(
    rows: Sequence[Row], num_folds: int, fold_seed: int, fold_groups: str = "dialogue"
) -> dict[str, int]:
    """The fold in which each original row is validated.

    Args:
        rows: original rows only.
        fold_groups: `dialogue` keeps a dialogue in one fold (estimates new dialogues); `none` splits rows (estimates
            new rows of known dialogues, which is how the official test set was drawn).

    Raises:
        InputError: too few rows or dialogues for so many folds, or a fold whose training part lacks a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    by_dialogue = fold_groups == "dialogue"
    unit = "dialogues" if by_dialogue else "rows"
    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id if by_dialogue else row.id for row in rows])
    units = len(set(groups))
    if num_folds < 2 or units < num_folds:
        raise InputError(f"{num_folds} folds cannot be made of {units} {unit}")
    for label in np.unique(labels):
        count = len(set(groups[labels == label]))
        if count < num_folds:
            few = f"label {label} is in {count} {unit} only, fewer than {num_folds} folds: some folds lack it"
            logger.warning(few)
    make = StratifiedGroupKFold if by_dialogue else StratifiedKFold
    splitter = make(num_folds, shuffle=True, random_state=fold_seed)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        try:
            parts = list(splitter.split(labels, labels, groups))
        except ValueError as error:
            raise InputError(f"cannot make {num_folds} folds: {first_line(error)}") from None
    return {rows[index].id: fold for fold, (_, held_out) in enumerate(parts) for index in held_out}


def check_folds(
    rows: Sequence[Row], folds: dict[str, int], num_folds: int, fold_groups: str, where: str = "folds"
) -> None:
    """Check what every result rests on, at every start.

    Args:
        rows: original and augmented rows.
        folds: row id to fold, original rows only.
        where: what error lines begin with: the file that the folds come from.

    Raises:
        InputError: folds of other rows, a dialogue in two folds, an empty fold, a class that no model is trained on.
    """
    originals = [row for row in rows if row.augmented_from is None]
    _check_coverage([row.id for row in originals], folds, where)
    problems = []
    fold_of_dialogue: dict[str, int] = {}
    for row in originals if fold_groups == "dialogue" else []:
        if fold_of_dialogue.setdefault(row.dialogue_id, folds[row.id]) != folds[row.id]:
            problems.append(f"{where}: dialogue {row.dialogue_id!r} is in two folds")
    classes = {row.label for row in originals}
    for fold in range(num_folds):
        if fold not in folds.values():
            problems.append(f"{where}: fold {fold} is empty")
        missing = classes - {row.label for row in originals if folds[row.id] != fold}
        lost = f"are in fold {fold}: nothing to train on"
        problems += [f"{where}: all rows of label {label} {lost}" for label in sorted(missing)]
    if problems:
        raise InputError(*problems)


def _check_coverage(row_ids: Iterable[str], folds: Mapping[str, int], where: str) -> None:
    """Refuse folds that are not those of exactly these original rows."""
    wanted = dict.fromkeys(row_ids)
    lines = [f"{name!r} of the training file is in no fold" for name in wanted if name not in folds]
    lines += [f"{name!r} is not in the training file" for name in folds if name not in wanted]
    if lines:
        raise InputError(*(f"{where}: row {line}; use another output_dir" for line in lines))


def limit_rows(rows: Sequence[Row], max_samples: int | None) -> list[Row]:
    """At most `max_samples` rows (a smoke run), taken label by label in turn so that rare labels stay."""
    number = defaultdict(itertools.count)
    turns = sorted((next(number[row.label]), row.label, index) for index, row in enumerate(rows))
    return [rows[index] for index in sorted(index for *_, index in turns[:max_samples])]


def parse_label_scope(scope: Sequence[str] | None, guide: LabelGuide) -> set[int]:
    """Two or more label numbers of the guide from words such as `1-8` or `2`; all labels for None."""
    if scope is None:
        return set(guide.numbers)
    labels: set[int] = set()
    for word in scope:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None:
            raise InputError(f"--label_scope: {word!r} is neither a label nor a range such as 1-8")
        labels |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not labels <= set(guide.numbers):
        raise InputError(f"--label_scope: {min(labels - set(guide.numbers))} is not in the label guide")
    if len(labels) < 2:
        raise InputError("--label_scope: a classifier needs two labels at least")
    return labels


def label_counts(rows: Iterable[Row], num_labels: int) -> np.ndarray:
    """Rows per label, shape (num_labels,)."""
    return np.bincount([row.label for row in rows], minlength=num_labels)


def read_folds(path: str | os.PathLike) -> dict[str, Any]:
    """A `FoldsFile` as a dict; an InputError has a line for each key that is missing or wrong."""
    return check_content(FoldsFile, read_json(path), str(path)).model_dump()


def _folds_made_by(path: Path, split: Mapping[str, Any]) -> dict[str, int]:
    """The folds of a file that must have been made with these settings; one line for each that differs."""
    present = read_folds(path)
    differ = [key for key, wanted in split.items() if present[key] != wanted]
    if differ:
        raise InputError(
            *(f"{path}: {key}: {present[key]!r} there, {split[key]!r} asked for" for key in differ)
        )
    return present["folds"]


def write_folds(run_dir: str | os.PathLike, folds: Mapping[str, int], **split: Any) -> dict[str, int]:
    """Write `folds.json` unless it is there, and return the folds to use: those of the file.

    A `folds.json` that is there already (another team's, copied, or this run's under another scikit-learn) is what
    counts, as long as it covers the same rows.

    Args:
        split: as `FoldDataArguments.split` has it; a file of another split, or of other rows, is an InputError.
    """
    path = Path(run_dir) / "folds.json"
    write_json(path, {**split, "folds": dict(folds)}, overwrite=False)
    present = _folds_made_by(path, split)
    _check_coverage(folds, present, str(path))
    return present


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
