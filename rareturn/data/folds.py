"""The rows of a run and their folds: the flags that name them, reading and checking them, who trains and who is judged.

A fold is held out, its rows judged by a model of the others. Runs that share `fold_seed` line up row by row. With a
validation file that file is the one fold, and every training row is trained on.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, StrictInt, ValidationInfo, field_validator

from rareturn.command_line import flag
from rareturn.data.label_guide import LabelGuide, find_metric, fold_whitespace, load_label_guide
from rareturn.data.rows import DataArguments, Row, Turn, data_fingerprint, load_rows, load_source
from rareturn.errors import InputError, first_line
from rareturn.files import check_content, read_json, write_json

logger = logging.getLogger(__name__)

REPEATED = 40  # characters of a text that two people do not say by chance
FoldGroups = Literal["dialogue", "none"]


class FoldsFile(BaseModel):
    """A `folds.json`: how the folds were made, and the fold of each row by its id."""

    num_folds: Annotated[StrictInt, Field(ge=1)]
    fold_seed: StrictInt
    fold_groups: FoldGroups
    folds: Annotated[dict[str, StrictInt], Field(min_length=1)]

    @field_validator("folds")
    @classmethod
    def _exist(cls, folds: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        number = info.data.get("num_folds")
        wrong = [name for name, fold in folds.items() if number and not 0 <= fold < number]
        if wrong:
            lines = (f"row {name!r}: fold {folds[name]} is not one of 0..{number - 1}" for name in wrong)
            raise ValueError("\n".join(lines))
        return folds


@dataclass
class FoldDataArguments(DataArguments):
    """Flags of every script that trains a run."""

    _argument_group_name = "Rows, folds and window"

    train_file: str | None = flag(None, "Labelled rows: file, folder or Hub data ORG/NAME[:path][@revision].")
    augmented_file: str | None = flag(None, "Variants by augment.py; trained on only where the source is.")
    extra_train_file: str | None = flag(
        None,
        "Labelled rows of other dialogues, such as written examples of rare labels, in the columns of --train_file: "
        "every fold is trained on them, none is judged on them.",
    )
    validation_file: str | None = flag(
        None,
        "Labelled rows to hold out, of a corpus with a split of its own: one model, fold 0, trained on all of "
        "--train_file; --num_folds has no effect.",
    )
    test_file: str | None = flag(None, "Rows to predict; those with labels are scored, never learnt from.")
    num_folds: int = flag(5, "Folds of the run; 5 as in the paper.")
    fold_seed: int = flag(42, "Seed of the folds; not --seed, so that runs line up row by row.")
    fold_groups: FoldGroups = flag(
        "dialogue", "dialogue: a dialogue is in one fold (estimates new dialogues); none: rows are split."
    )
    label_scope: list[str] | None = flag(None, "Labels of a specialist, such as 1-8 or 1 2 3. Default: all.")
    max_turns: int = flag(30, "Turns that a row sees at most, its own included; 30 as in the paper.")
    max_seq_length: int = flag(
        1024, "Tokens of a row (encoder's probe: of a turn), oldest turns cut first; 1024 as in the paper."
    )
    window_stride: int = flag(
        10,
        "Turns by which a long dialogue's window moves, so that neighbouring rows share a prefix; 1 is the paper's "
        "sliding window. At most --max_turns: a larger number counts as that.",
    )

    def __post_init__(self) -> None:
        if self.validation_file:
            self.num_folds = 1

    @property
    def split(self) -> dict[str, Any]:
        """What decides the folds of given rows."""
        return {name: getattr(self, name) for name in ("num_folds", "fold_seed", "fold_groups")}

    @property
    def window(self) -> dict[str, int]:
        """How much of a dialogue a row sees, as `Renderer` takes it."""
        stride = min(self.window_stride, self.max_turns)
        return {"max_turns": self.max_turns, "max_seq_length": self.max_seq_length, "window_stride": stride}


@dataclass(frozen=True)
class RunData:
    """All rows of a run, read and checked, and the fold of each that is held out once.

    These are the original rows, or those of the validation file. The latter are kept apart, as test rows are: their ids
    and their dialogues' may be those of other rows in the training file.
    """

    guide: LabelGuide
    originals: list[Row]
    augmented: list[Row]
    test: list[Row]
    folds: dict[str, int]
    scope: list[int]
    validation: list[Row] = field(default_factory=list)
    extra: list[Row] = field(default_factory=list)
    labels_named: bool | None = None  # of a table (`Source.named`)

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.originals, *self.augmented, *self.validation, *self.extra, *self.test]

    def placed(self) -> list[tuple[Row, int, bool]]:
        """Every row but test rows, in this order; its fold, a variant that of its source, or -1 where all models are
        trained on it; and whether it may be judged, as variants and extra rows never are."""
        own = {} if self.validation else self.folds
        originals = [(row, own.get(row.id, -1), True) for row in self.originals]
        variants = [(row, own.get(row.augmented_from, -1), False) for row in self.augmented]
        validation = [(row, self.folds[row.id], True) for row in self.validation]
        return originals + variants + validation + [(row, -1, False) for row in self.extra]

    def training_part(self, fold: int) -> list[Row]:
        """What a fold's model is trained on, within the scope: other folds' originals, their variants, extra rows."""
        return [row for row, own, _ in self.placed() if own != fold and row.label in self.scope]

    def held_out_part(self, fold: int) -> list[Row]:
        """The rows that a fold's model is judged on, of all labels."""
        return [row for row, own, judged in self.placed() if own == fold and judged]

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of the rows (DESIGN 6)."""
        return {
            "label_names": self.guide.names,
            "positive_labels": list(self.guide.positive),
            "protected_label": self.guide.protected,
            "metric": find_metric(self.guide.metric, self.guide.names),
            "label_scope": None if self.scope == list(self.guide.numbers) else self.scope,
            "label_guide": self.guide.to_dict(),
            **({} if self.labels_named is None else {"labels_named": self.labels_named}),
            "data_fingerprint": data_fingerprint(self.originals + self.validation),
        }


def read_run_data(arguments: FoldDataArguments, run_dir: Path) -> RunData:
    """Read and check the rows that the flags name, before any model is loaded, and give every original row its fold:
    that of the `folds.json` in `run_dir`, if there is one. It must be of these rows, and made in this way."""
    if not arguments.train_file:
        raise InputError("--train_file is missing; give it here or in the recipe")
    guide, columns = load_label_guide(arguments.label_guide), arguments.columns
    scope = sorted(parse_label_scope(arguments.label_scope, guide))
    train = load_source(arguments.train_file, guide, columns=columns)
    originals = train.rows
    misplaced = "augmented_from: variants belong in --augmented_file"
    if variants := [row.id for row in originals if row.augmented_from]:
        raise InputError(*(f"{arguments.train_file}: {name}: {misplaced}" for name in variants))
    augmented = load_rows(arguments.augmented_file, guide, columns=columns, sources_of_augmented=originals)
    validation = load_source(arguments.validation_file, guide, columns=columns, split="validation")
    extra = load_source(arguments.extra_train_file, guide, columns=columns)
    test = load_source(arguments.test_file, guide, columns=columns, require_labels=False)
    for path, other in ((arguments.validation_file, validation), (arguments.test_file, test)):
        if {train.named, other.named} == {True, False}:
            kinds = "names, but numbers" if other.named else "numbers, but names"
            raise InputError(f"{path}: {other.columns['label']}: {kinds} in {arguments.train_file}")
    validation, extra, test = validation.rows, extra.rows, test.rows
    by_dialogue = arguments.fold_groups == "dialogue"
    if extra:
        check_new(arguments.extra_train_file, extra, originals + validation + test)
    check_apart(arguments.validation_file, validation, arguments.train_file, originals, by_dialogue)
    check_apart(arguments.test_file, test, arguments.train_file, originals)
    check_apart(arguments.test_file, test, arguments.validation_file, validation)
    path, split = run_dir / "folds.json", arguments.split
    if path.exists():
        there = read_folds(path)
        differ = [key for key in split if there[key] != split[key]]
        lines = [f"{path}: {key}: {there[key]!r} there, {split[key]!r} asked for" for key in differ]
        if lines:
            raise InputError(*lines)
        folds, where = there["folds"], str(path)
    elif validation:
        folds, where = {row.id: 0 for row in validation}, arguments.validation_file
    else:
        folds, where = assign_folds(originals, **split), "folds"
    held_out, trained = (validation, originals) if validation else (originals, ())
    check_folds(held_out, folds, arguments.num_folds, arguments.fold_groups, where, trained, extra)
    return RunData(guide, originals, augmented, test, folds, scope, validation, extra, train.named)


def check_new(source: str, rows: Sequence[Row], others: Sequence[Row]) -> None:
    """Refuse extra rows of a dialogue that another file has, by its id, or with a long text that a row there has."""

    def said(row: Row) -> str:
        return fold_whitespace(row.turns[-1].text).casefold()

    dialogues, texts, lines = {row.dialogue_id for row in others}, {said(row): row.id for row in others}, []
    for row in rows:
        if row.dialogue_id in dialogues:
            lines.append(f"dialogue {row.dialogue_id!r} is in another file too")
        elif len(said(row)) >= REPEATED and said(row) in texts:
            lines.append(f"row {row.id!r} says what row {texts[said(row)]!r} of another file says")
    if lines:
        why = "extra rows are of other dialogues"
        raise InputError(*(f"{source}: {line}; {why}" for line in dict.fromkeys(lines)))
    logger.info(f"{source}: {len(rows)} rows, on which every fold is trained")


def check_apart(
    source: str | None,
    rows: Sequence[Row],
    other: str | None,
    others: Sequence[Row],
    by_dialogue: bool = False,
) -> None:
    """Refuse rows that another file has too; with `by_dialogue`, rows of its dialogues.

    Ids may begin anew in each file, so the text tells. A row is the same where id and turns are; a dialogue, where its
    id is, and its turns are as far as the shorter of the two goes.
    """
    known = {row.id: row for row in others}
    same = [row for row in rows if row.id in known and row.turns == known[row.id].turns]
    lines = [f"row {row.id!r} is in {other} too, with the same turns" for row in same]
    if by_dialogue and not lines:
        mine, theirs = longest_turns(rows), longest_turns(others)
        for name in filter(theirs.__contains__, mine):
            shorter = min(len(mine[name]), len(theirs[name]))
            if mine[name][:shorter] == theirs[name][:shorter]:
                shared = f"dialogue {name!r} is in {other} too, with the same turns"
                lines.append(f"{shared}; --fold_groups none holds out rows of known dialogues")
    if lines:
        raise InputError(*(f"{source}: {line}" for line in lines))


def longest_turns(rows: Sequence[Row]) -> dict[str, Sequence[Turn]]:
    """Each dialogue's turns, as far as its last row goes."""
    return {row.dialogue_id: row.turns for row in sorted(rows, key=lambda row: len(row.turns))}


def assign_folds(rows: Sequence[Row], num_folds: int, fold_seed: int, fold_groups: str) -> dict[str, int]:
    """The fold in which each original row is validated; an InputError where there are too few rows or dialogues.

    With `dialogue` a dialogue is in one fold (estimates new dialogues); with `none` rows are split (estimates new rows
    of known dialogues, which is how the official test set was drawn).
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    by_dialogue = fold_groups == "dialogue"
    unit = "dialogues" if by_dialogue else "rows"
    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id if by_dialogue else row.id for row in rows])
    units = len(set(groups))
    if num_folds < 2:
        raise InputError(
            f"--num_folds {num_folds}: 2 or more; for one model, judged on a file, give --validation_file"
        )
    if units < num_folds:
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
    held_out: Sequence[Row],
    folds: Mapping[str, int],
    num_folds: int,
    fold_groups: str,
    where: str = "folds",
    trained: Sequence[Row] = (),
    extra: Sequence[Row] = (),
) -> None:
    """Refuse folds of other rows, a dialogue in two folds, an empty fold, a class that no model is trained on.

    `where` is what the error lines begin with: the file that the folds come from. `trained` are, where the held-out rows
    are a validation file's, the rows of the training file; `extra` train every fold.
    """
    wanted, file = {row.id: row for row in held_out}, "validation file" if trained else "training file"
    lines = [f"row {name!r} of the {file} is in no fold" for name in wanted if name not in folds]
    lines += [f"row {name!r} is not in the {file}" for name in folds if name not in wanted]
    if lines:
        raise InputError(*(f"{where}: {line}; use another output_dir" for line in lines))
    folds_of, classes = defaultdict(set), {row.label for row in held_out}
    for row in held_out:
        folds_of[row.dialogue_id].add(folds[row.id])
    if fold_groups == "dialogue":
        lines = [f"dialogue {name!r} is in two folds" for name, found in folds_of.items() if len(found) > 1]
    for fold in range(num_folds):
        if fold not in folds.values():
            lines.append(f"fold {fold} is empty")
        there = (*trained, *extra, *(row for row in held_out if folds[row.id] != fold))
        missing = classes - {row.label for row in there}
        lost = f"are in {'the validation file' if trained else f'fold {fold}'}: nothing to train on"
        lines += [f"all rows of label {label} {lost}" for label in sorted(missing)]
    if lines:
        raise InputError(*(f"{where}: {line}" for line in lines))


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


def read_folds(path: str | os.PathLike) -> dict[str, Any]:
    """A `FoldsFile` as a dict; an InputError has a line for each key that is missing or wrong."""
    return check_content(FoldsFile, read_json(path), str(path)).model_dump()


def write_folds(run_dir: str | os.PathLike, folds: Mapping[str, int], **split: Any) -> None:
    """Write `folds.json`, `split` as in `FoldDataArguments`. One that is there stays: what `read_run_data` read counts."""
    write_json(Path(run_dir) / "folds.json", {**split, "folds": dict(folds)}, overwrite=False)
