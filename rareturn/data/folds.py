"""The rows of a run and their folds: the flags that name them, reading and checking them, who trains and who is judged.

A fold is held out, its rows judged by a model of the others. Runs that share `fold_seed` line up row by row.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rows import DataArguments, Row, data_fingerprint, load_rows
from rareturn.errors import InputError, first_line
from rareturn.files import read_json, write_json

logger = logging.getLogger(__name__)


FOLD_GROUPS = ("dialogue", "none")


@dataclass
class FoldDataArguments(DataArguments):
    """Flags of every script that trains a run: which rows, which folds, and how much of a dialogue a row sees."""

    train_file: str = field(
        default="AIMH/PsyDefConv:Splits/train.json",
        metadata={"help": "Labelled rows: a file, a folder, or a Hub dataset ORG/NAME[:path][@revision]."},
    )
    augmented_file: str | None = field(
        default=None, metadata={"help": "Variants made by augment.py; trained on only where their source is."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict; labels optional."})
    num_folds: int = field(default=5, metadata={"help": "Folds of the run. 5, as in the paper."})
    fold_seed: int = field(
        default=42,
        metadata={"help": "Seed of the folds; kept apart from --seed so that runs line up row by row."},
    )
    fold_groups: str = field(
        default="dialogue",
        metadata={
            "help": "dialogue: a dialogue is in one fold (estimates new dialogues); none: rows are split.",
            "choices": list(FOLD_GROUPS),
        },
    )
    label_scope: list[str] | None = field(
        default=None, metadata={"help": "Specialist: labels to train on, such as 1-8 or 1 2 3. Default: all."}
    )
    max_turns: int = field(default=30, metadata={"help": "Turns a row sees at most, its own included."})
    max_seq_length: int = field(
        default=1024,
        metadata={
            "help": "Tokens of a row at most; the oldest turns go first. (An encoder's probe: of a turn.)"
        },
    )
    window_stride: int = field(
        default=10,
        metadata={"help": "Turns by which a long dialogue's window moves; 1 is the paper's sliding window."},
    )

    @property
    def split(self) -> dict[str, Any]:
        """What decides the folds of given rows."""
        return {name: getattr(self, name) for name in ("num_folds", "fold_seed", "fold_groups")}

    @property
    def window(self) -> dict[str, int]:
        """How much of a dialogue a row sees, as `Renderer` takes it."""
        return {name: getattr(self, name) for name in ("max_turns", "max_seq_length", "window_stride")}


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
        """The rows within the scope that a fold's model is trained on, see `training_part`."""
        part = training_part(self.originals + self.augmented, self.folds, fold)
        return [row for row in part if row.label in self.scope]

    def held_out_part(self, fold: int) -> list[Row]:
        """The original rows that a fold's model is judged on, of all labels."""
        return held_out_part(self.originals, self.folds, fold)

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of the rows (DESIGN 6)."""
        everything = self.scope == list(self.guide.numbers)
        return {
            "label_names": self.guide.names,
            "positive_labels": list(self.guide.positive),
            "protected_label": self.guide.protected,
            "label_scope": None if everything else self.scope,
            "label_guide": self.guide.to_dict(),
            "data_fingerprint": data_fingerprint(self.originals),
        }


def read_run_data(arguments: FoldDataArguments, run_dir: Path) -> RunData:
    """Read and check the rows that the flags name, before any model is loaded, and give every original row its fold.

    Args:
        run_dir: where a `folds.json`, if there is one, must agree.

    Raises:
        InputError: what `load_rows`, `check_folds` and `write_folds` refuse; a variant among the originals.
    """
    guide = load_label_guide(arguments.label_guide)
    scope = sorted(parse_label_scope(arguments.label_scope, guide))
    read = {"label_guide": guide, "columns": arguments.columns}
    originals = load_rows(arguments.train_file, **read)
    problems = [
        f"{arguments.train_file}: {row.id}: augmented_from: variants belong in --augmented_file"
        for row in originals
        if row.augmented_from
    ]
    if problems:
        raise InputError(*problems)
    augmented: list[Row] = []
    if arguments.augmented_file:
        augmented = load_rows(arguments.augmented_file, **read, sources_of_augmented=originals)
    test: list[Row] = []
    if arguments.test_file:
        test = load_rows(arguments.test_file, **read, require_labels=False, split="test")
    folds = assign_folds(originals, **arguments.split)
    if (run_dir / "folds.json").exists():
        folds = write_folds(run_dir, folds, **arguments.split)
    check_folds(originals + augmented, folds, arguments.num_folds, arguments.fold_groups)
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

    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id for row in rows])
    units = len(set(groups)) if fold_groups == "dialogue" else len(rows)
    if num_folds < 2 or units < num_folds:
        raise InputError(
            f"{num_folds} folds cannot be made of {units} {'dialogues' if fold_groups == 'dialogue' else 'rows'}"
        )
    for label in np.unique(labels):
        of_label = labels == label
        count = len(set(groups[of_label])) if fold_groups == "dialogue" else int(of_label.sum())
        if count < num_folds:
            unit = "dialogues" if fold_groups == "dialogue" else "rows"
            logger.warning(
                f"label {label} is in {count} {unit} only, fewer than {num_folds} folds: some folds lack it"
            )
    splitter_class = StratifiedGroupKFold if fold_groups == "dialogue" else StratifiedKFold
    splitter = splitter_class(num_folds, shuffle=True, random_state=fold_seed)
    folds: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        try:
            parts = list(
                splitter.split(np.zeros(len(rows)), labels, groups if fold_groups == "dialogue" else None)
            )
        except ValueError as error:
            raise InputError(f"cannot make {num_folds} folds: {first_line(error)}") from None
    for fold, (_, held_out) in enumerate(parts):
        folds.update((rows[index].id, fold) for index in held_out)
    return folds


def check_folds(rows: Sequence[Row], folds: dict[str, int], num_folds: int, fold_groups: str) -> None:
    """Check what every result rests on, at every start.

    Args:
        rows: original and augmented rows.
        folds: row id to fold, original rows only.

    Raises:
        InputError: a row in no fold, a fold of an unknown row, a dialogue in two folds, an augmented row that has a
            fold of its own, an empty fold, or a class that is missing from a training part.
    """
    originals = [row for row in rows if row.augmented_from is None]
    ids = {row.id for row in originals}
    problems = [f"folds: row {row.id!r} is in no fold" for row in originals if row.id not in folds]
    problems += [
        f"folds: {row_id!r} is no original row of the training file" for row_id in folds if row_id not in ids
    ]
    problems += [
        f"folds: {row_id!r} has fold {fold!r}"
        for row_id, fold in folds.items()
        if fold not in range(num_folds)
    ]
    if problems:
        raise InputError(*problems)
    if fold_groups == "dialogue":
        fold_of_dialogue: dict[str, int] = {}
        for row in originals:
            if fold_of_dialogue.setdefault(row.dialogue_id, folds[row.id]) != folds[row.id]:
                problems.append(f"folds: dialogue {row.dialogue_id!r} is in two folds")
    classes = {row.label for row in originals}
    for fold in range(num_folds):
        held_out = sum(folds[row.id] == fold for row in originals)
        if not held_out:
            problems.append(f"folds: fold {fold} is empty")
        missing = classes - {row.label for row in originals if folds[row.id] != fold}
        problems += [
            f"folds: all rows of label {label} are in fold {fold}: nothing to train on"
            for label in sorted(missing)
        ]
    if problems:
        raise InputError(*problems)


def training_part(rows: Sequence[Row], folds: dict[str, int], fold: int) -> list[Row]:
    """The rows a fold's model is trained on: originals of the other folds, and variants whose source is among them.

    With `dialogue` folds an augmented row can never show a held-out dialogue. With `none` it may share its dialogue
    with held-out rows, but never its source.
    """
    return [row for row in rows if folds[row.augmented_from or row.id] != fold]


def held_out_part(rows: Sequence[Row], folds: dict[str, int], fold: int) -> list[Row]:
    """The original rows that a fold's model is judged on."""
    return [row for row in rows if row.augmented_from is None and folds[row.id] == fold]


def limit_rows(rows: Sequence[Row], max_samples: int | None) -> list[Row]:
    """At most `max_samples` rows (a smoke run), taken label by label in turn so that rare labels stay."""
    if max_samples is None or len(rows) <= max_samples:
        return list(rows)
    by_label: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_label[row.label].append(index)
    rank = {index: place for indices in by_label.values() for place, index in enumerate(indices)}
    chosen = sorted(range(len(rows)), key=lambda index: (rank[index], rows[index].label))[:max_samples]
    return [rows[index] for index in sorted(chosen)]


def parse_label_scope(scope: Sequence[str] | None, guide: LabelGuide) -> set[int]:
    """Label numbers from words such as `1-8` or `2`; all labels for None.

    Raises:
        InputError: a word that is neither, a label outside the guide, or a scope of fewer than two labels.
    """
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
    counts = Counter(row.label for row in rows)
    return np.array([counts.get(label, 0) for label in range(num_labels)], dtype=np.int64)


def read_folds(path: str | os.PathLike) -> dict[str, Any]:
    """What a `folds.json` holds: `num_folds`, `fold_seed`, `fold_groups`, and `folds` (row id to fold).

    Raises:
        InputError: unreadable, a key missing or of a wrong type, or a fold outside 0..num_folds - 1.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("folds"), dict) or not content["folds"]:
        raise InputError(f"{path}: folds: a mapping of row ids to folds expected")
    for key in ("num_folds", "fold_seed"):
        if type(content.get(key)) is not int:
            raise InputError(f"{path}: {key}: an integer expected")
    if content.get("fold_groups") not in FOLD_GROUPS:
        raise InputError(f"{path}: fold_groups: one of {', '.join(FOLD_GROUPS)} expected")
    wrong = [
        f"{path}: row {row_id!r}: fold {short(fold)} is not one of 0..{content['num_folds'] - 1}"
        for row_id, fold in content["folds"].items()
        if type(fold) is not int or not 0 <= fold < content["num_folds"]
    ]
    if wrong:
        raise InputError(*wrong)
    return content


def write_folds(
    run_dir: str | os.PathLike, folds: Mapping[str, int], *, num_folds: int, fold_seed: int, fold_groups: str
) -> dict[str, int]:
    """Write `folds.json` unless it is there, and return the folds to use: those of the file.

    A `folds.json` that is there already (another team's, copied, or this run's under another scikit-learn) is what
    counts, as long as it covers the same rows.

    Raises:
        InputError: the file covers other rows, or has another number or kind of folds.
    """
    path = Path(run_dir) / "folds.json"
    content = {
        "num_folds": num_folds,
        "fold_seed": fold_seed,
        "fold_groups": fold_groups,
        "folds": dict(folds),
    }
    write_json(path, content, overwrite=False)
    present = read_folds(path)
    for key in ("num_folds", "fold_seed", "fold_groups"):
        if present[key] != content[key]:
            raise InputError(f"{path}: {key}: {present[key]!r} there, {content[key]!r} asked for")
    for row_id in folds:
        if row_id not in present["folds"]:
            raise InputError(
                f"{path}: row {row_id!r} of the training file is in no fold; use another output_dir"
            )
    for row_id in present["folds"]:
        if row_id not in folds:
            raise InputError(f"{path}: row {row_id!r} is not in the training file; use another output_dir")
    return present["folds"]


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
