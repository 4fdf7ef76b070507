"""Runs on disk and on the Hub: logit tables, run folders, and pushing and pulling them whole.

A run folder holds `run.json`, `folds.json`, `fold-<k>/` (adapter or head, `metrics.json`), `oof/fold-<k>.parquet` and
`test/fold-<k>.parquet`. On the Hub the models lie in `ORG/NAME-RUN` and the tables of all runs in the dataset
`ORG/NAME-oof`, a config a run. A reference to a run is its folder, or `ORG/NAME-oof:RUN[@REVISION]`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import hub
from command_line import InputError
from dialogues import Row

TABLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dialogue_id", pa.string()),
        ("fold", pa.int32()),
        ("label", pa.int32()),
        ("logits", pa.list_(pa.float32())),
    ]
)
# The logit of a label that a run was not trained on: finite, so that tables and averages stay finite.
OUT_OF_SCOPE_LOGIT = -1e4
FOLD_GROUPS = ("dialogue", "none")
REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<run>[^@/:]+)(?:@(?P<revision>[^@\s]+))?"
)
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*")

# ------------------------------------------------------------------------------------------------------- writing


def write_bytes(path: str | os.PathLike, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file beside its place and rename it there: a killed process leaves the old file or the new one.

    Args:
        overwrite: if false, a file that is there already (or that another process is first to put there) stays.

    Raises:
        InputError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    path = Path(path)
    # The name is unique: the folds of a run are processes that write into one folder.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(beside, path)
            elif not path.exists():
                _link(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk, each its own, into one line.

    Raises:
        InputError: the block failed and there is no room in the folder.
    """
    try:
        yield
    except Exception as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, InputError) or not (full or shutil.disk_usage(folder).free < 1 << 16):
            raise
        raise InputError(
            f"{folder}: no space left on the disk; make room and repeat, what is complete stays"
        ) from None


def _link(beside: Path, path: Path) -> None:
    """Give a file its name unless another process took it; network drives without hard links rename instead."""
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.replace(beside, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any, *, overwrite: bool = True) -> None:
    """`write_bytes` of indented JSON; a NaN or an infinity in it is a ValueError, since other readers refuse them."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), overwrite=overwrite)


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: the file is missing, unreadable, cut short or no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# -------------------------------------------------------------------------------------------------------- tables


@dataclass
class LogitTable:
    """Logits of rows, with no word of their dialogues.

    Attributes:
        id, dialogue_id: n strings each.
        fold: int64 [n], the fold whose model made the logits.
        label: int64 [n], -1 where there is none.
        logits: float32 [n, c].
    """

    id: list[str]
    dialogue_id: list[str]
    fold: np.ndarray
    label: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    def take(self, positions: Sequence[int] | np.ndarray) -> LogitTable:
        """The rows at these positions, in this order."""
        return LogitTable(
            [self.id[position] for position in positions],
            [self.dialogue_id[position] for position in positions],
            self.fold[positions],
            self.label[positions],
            self.logits[positions],
        )


def make_table(rows: Sequence[Row], fold: int, logits: np.ndarray) -> LogitTable:
    """The table of a fold's model on these rows; `logits` of shape (rows, labels)."""
    return LogitTable(
        [row.id for row in rows],
        [row.dialogue_id for row in rows],
        np.full(len(rows), fold, dtype=np.int64),
        np.array([row.label for row in rows], dtype=np.int64),
        logits.astype(np.float32),
    )


def write_table(path: str | os.PathLike, table: LogitTable) -> None:
    """Write a table as Parquet (columns of `TABLE_SCHEMA`, zstd); equal tables give equal bytes.

    Raises:
        InputError: the disk is full or the place cannot be written.
        ValueError: the columns disagree in length, or a logit is not finite.
    """
    logits = np.ascontiguousarray(table.logits, dtype=np.float32)
    if logits.ndim != 2 or {len(table.id), len(table.dialogue_id), len(table.fold), len(table.label)} != {
        len(logits)
    }:
        raise ValueError(f"{path}: the columns of a table must have one length")
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{path}: row {table.id[int(np.argmin(np.isfinite(logits).all(1)))]!r}: logits not finite"
        )
    offsets = np.arange(len(logits) + 1, dtype=np.int32) * logits.shape[1]
    columns = [
        pa.array(table.id, pa.string()),
        pa.array(table.dialogue_id, pa.string()),
        pa.array(np.asarray(table.fold), pa.int32()),
        pa.array(np.asarray(table.label), pa.int32()),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(logits.reshape(-1))),
    ]
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=TABLE_SCHEMA),
        buffer,
        compression="zstd",
        write_page_checksum=True,
    )
    write_bytes(path, buffer.getvalue())


def read_table(path: str | os.PathLike) -> LogitTable:
    """Read and check one table.

    Raises:
        InputError: no Parquet file, a missing column, a wrong type, an empty cell, a duplicate id, logits that are not
            finite or whose number changes from row to row; names the file and the first row.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in TABLE_SCHEMA.names if name not in file.schema_arrow.names]
            if missing:
                raise InputError(f"{path}: no column {', '.join(map(repr, missing))}")
            table = file.read(columns=TABLE_SCHEMA.names).combine_chunks()
        table.validate(full=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error)[:200]}") from None
    _check_types(path, table.schema)
    ids = table["id"].to_pylist()
    for name in TABLE_SCHEMA.names:
        if table[name].null_count:
            row = int(np.argmax(table[name].is_null().to_numpy(zero_copy_only=False)))
            raise InputError(f"{path}: row {ids[row]!r}: {name}: empty")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        duplicate = next(row_id for row_id in ids if row_id in seen or seen.add(row_id))
        raise InputError(f"{path}: row {duplicate!r}: id: appears more than once")
    lists = table["logits"].combine_chunks().cast(pa.large_list(pa.float32()))
    widths = np.diff(lists.offsets.to_numpy()) if ids else np.zeros(0, np.int64)
    if ids and (widths != widths[0]).any():
        row = int(np.argmax(widths != widths[0]))
        raise InputError(
            f"{path}: row {ids[row]!r}: logits: {widths[row]} numbers, {widths[0]} in the row before"
        )
    values = lists.flatten().to_numpy(zero_copy_only=False)
    logits = values.reshape(len(ids), int(widths[0]) if ids else 0)
    if not np.isfinite(logits).all():
        row = int(np.argmin(np.isfinite(logits).all(1)))
        raise InputError(f"{path}: row {ids[row]!r}: logits: not finite")
    return LogitTable(
        ids,
        table["dialogue_id"].to_pylist(),
        table["fold"].to_numpy().astype(np.int64),
        table["label"].to_numpy().astype(np.int64),
        np.array(logits, dtype=np.float32),
    )


def _check_types(path: str | os.PathLike, schema: pa.Schema) -> None:
    """A table that another tool wrote may hold wider types (pandas: large strings, int64, lists of doubles)."""
    types = {name: schema.field(name).type for name in TABLE_SCHEMA.names}
    for name in ("id", "dialogue_id"):
        if not (pa.types.is_string(types[name]) or pa.types.is_large_string(types[name])):
            raise InputError(f"{path}: column {name!r}: strings expected, not {types[name]}")
    for name in ("fold", "label"):
        if not pa.types.is_signed_integer(types[name]):
            raise InputError(f"{path}: column {name!r}: integers expected, not {types[name]}")
    kind = types["logits"]
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_floating(
        kind.value_type
    ):
        raise InputError(f"{path}: column 'logits': lists of float32 expected, not {kind}")


# ------------------------------------------------------------------------------------------------- names and references


def check_name(name: str, what: str) -> str:
    """The name, if it can be a part of a path and of a repo id: letters, digits, `_`, `.`, `-`.

    Raises:
        InputError: empty, too long, another character, `..` or `--` in it, a dot or dash at an end, or `.git` there.
    """
    if (
        not isinstance(name, str)
        or not NAME.fullmatch(name)
        or ".." in name
        or "--" in name
        or name.endswith(".git")
        or len(name) > 96
    ):
        raise InputError(
            f"{what} {name!r}: letters, digits, '_', '.', '-' only (no '..' or '--'; starts with a letter or a digit)"
        )
    return name


@dataclass(frozen=True)
class Reference:
    """Where a run lies: a folder, or a config of a dataset repo at a revision (None: the newest)."""

    folder: Path | None = None
    repo_id: str | None = None
    run: str | None = None
    revision: str | None = None


def parse_reference(reference: str | os.PathLike) -> Reference:
    """Read a run reference; a folder that exists wins over a Hub reference of the same spelling.

    Raises:
        InputError: neither a folder nor of the form `ORG/NAME-oof:RUN[@REVISION]`.
    """
    if os.path.isdir(reference):
        return Reference(folder=Path(reference))
    match = REFERENCE.fullmatch(os.fspath(reference))
    if match is None:
        raise InputError(
            f"{reference}: no such run: a run is a folder that exists, or ORG/NAME-oof:RUN[@REVISION] on the Hub"
        )
    organisation, repo = match["repo"].split("/")
    check_name(organisation, f"{reference}: organisation")
    check_name(repo, f"{reference}: dataset")
    check_name(match["run"], f"{reference}: run")
    if match["revision"] is not None:
        check_revision(match["revision"], os.fspath(reference))
    return Reference(repo_id=match["repo"], run=match["run"], revision=match["revision"])


def check_revision(revision: str, where: str) -> str:
    """The revision, if it can be a branch, a tag or a SHA.

    Raises:
        InputError: another character, or `..` in it.
    """
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise InputError(f"{where}: {revision!r} is no revision: a branch, a tag or a commit SHA")
    return revision


# ------------------------------------------------------------------------------------------------------------ run folders

RUN_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "label_names": (list,),
    "positive_labels": (list,),
    "num_folds": (int,),
    "fold_seed": (int,),
    "fold_groups": (str,),
    "seed": (int,),
    "base_model": (str,),
    "base_revision": (str, type(None)),
    "recipe": (dict,),
    "data_fingerprint": (str,),
    "prompt_fingerprint": (str, type(None)),
    "packages": (dict,),
    "command": (str,),
    "git_commit": (str, type(None)),
}
SHARED_KEYS = (
    "label_names",
    "positive_labels",
    "num_folds",
    "fold_seed",
    "fold_groups",
    "base_model",
    "data_fingerprint",
)


def check_run_info(info: Any, where: str) -> dict[str, Any]:
    """The content of a `run.json`, if every key is there and of its type; further keys are left alone.

    Raises:
        InputError: one line a key that is missing or wrong.
    """
    if not isinstance(info, dict):
        raise InputError(f"{where}: a mapping expected")
    problems = []
    for key, kinds in RUN_KEYS.items():
        if key not in info:
            problems.append(f"{where}: {key}: missing")
        elif not isinstance(info[key], kinds) or isinstance(info[key], bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            problems.append(f"{where}: {key}: {wanted} expected, not {type(info[key]).__name__}")
    if problems:
        raise InputError(*problems)
    check_name(info["name"], f"{where}: name:")
    names = info["label_names"]
    if (
        len(names) < 2
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        problems.append(f"{where}: label_names: two or more different names expected")
    positive = info["positive_labels"]
    if (
        not positive
        or len({str(label) for label in positive}) != len(positive)
        or not all(type(label) is int and 0 <= label < len(names) for label in positive)
    ):
        problems.append(f"{where}: positive_labels: different numbers of 0..{len(names) - 1} expected")
    if info["num_folds"] < 2:
        problems.append(f"{where}: num_folds: 2 or more expected, not {info['num_folds']}")
    if info["fold_groups"] not in FOLD_GROUPS:
        problems.append(f"{where}: fold_groups: one of {', '.join(FOLD_GROUPS)} expected")
    if problems:
        raise InputError(*problems)
    return info


def check_same_run(run_dir: str | os.PathLike, info: dict[str, Any]) -> None:
    """Refuse a folder that holds another run; a folder without a run is fine.

    Raises:
        InputError: the folder holds a run with other labels, folds, base model or data.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        return
    present = check_run_info(read_json(path), str(path))
    for key in SHARED_KEYS:
        if present[key] != info[key]:
            raise InputError(
                f"{path}: {key}: the folder holds a run with {_short(present[key])}, this one has {_short(info[key])}; "
                "use another output_dir"
            )


def write_run_info(run_dir: str | os.PathLike, info: dict[str, Any]) -> None:
    """Write `run.json`, once: another fold of the same run finds it there and must be of one mind with it.

    Raises:
        InputError: see `check_same_run`.
    """
    path = Path(run_dir) / "run.json"
    check_run_info(info, str(path))
    write_json(path, info, overwrite=False)
    check_same_run(run_dir, info)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


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
        f"{path}: row {row_id!r}: fold {_short(fold)} is not one of 0..{content['num_folds'] - 1}"
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


def adapter_dir(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/adapter`."""
    return Path(run_dir) / f"fold-{fold}" / "adapter"


def metrics_path(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/metrics.json`, the last file that a fold writes."""
    return Path(run_dir) / f"fold-{fold}" / "metrics.json"


def table_path(run_dir: str | os.PathLike, split: str, fold: int) -> Path:
    """`RUN/oof/fold-<k>.parquet` or `RUN/test/fold-<k>.parquet`."""
    return Path(run_dir) / split / f"fold-{fold}.parquet"


def complete_folds(run_dir: str | os.PathLike, num_folds: int, needs_test: bool = False) -> list[int]:
    """The folds of a run folder that are complete."""
    return [fold for fold in range(num_folds) if fold_is_complete(run_dir, fold, needs_test)]


def fold_is_complete(run_dir: str | os.PathLike, fold: int, needs_test: bool) -> bool:
    """Whether a fold's tables and metrics are there; being renamed into place, they are whole if they are."""
    return (
        metrics_path(run_dir, fold).is_file()
        and table_path(run_dir, "oof", fold).is_file()
        and (not needs_test or table_path(run_dir, "test", fold).is_file())
    )


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
        (root, revision), pattern = pull_run(reference), "{}-fold-{}.parquet"
    info = check_run_info(read_json(root / "run.json"), f"{reference}: run.json")
    assignment = read_folds(root / "folds.json")
    for key in ("num_folds", "fold_seed", "fold_groups"):
        if assignment[key] != info[key]:
            raise InputError(
                f"{reference}: {key}: run.json has {info[key]!r}, folds.json {assignment[key]!r}"
            )
    paths = {
        split: [root / pattern.format(split, fold) for fold in range(info["num_folds"])]
        for split in ("oof", "test")
    }
    missing = {
        split: [str(fold) for fold, path in enumerate(of_split) if not path.is_file()]
        for split, of_split in paths.items()
    }
    for split in ("oof", "test") if require_test else ("oof",):
        if missing[split]:
            folds = "fold" if len(missing[split]) == 1 else "folds"
            raise InputError(
                f"{reference}: the {split} table of {folds} {', '.join(missing[split])} is missing"
            )
    oof = _join_oof(reference, info, assignment["folds"], [read_table(path) for path in paths["oof"]])
    test = [] if missing["test"] else [read_table(path) for path in paths["test"]]
    _check_test(reference, info, test)
    return Run(os.fspath(reference), revision, info["name"], info, assignment["folds"], oof, test)


def _join_oof(
    reference: str | os.PathLike, info: dict[str, Any], folds: dict[str, int], tables: list[LogitTable]
) -> LogitTable:
    """The folds' tables as one, its rows in the order of `folds`."""
    problems = []
    num_labels = len(info["label_names"])
    for fold, table in enumerate(tables):
        where = f"{reference}: oof fold {fold}"
        problems += _content_problems(where, table, fold, num_labels, first_label=0)
        for row_id in table.id:
            if row_id not in folds:
                problems.append(f"{where}: row {row_id!r} is in no fold of folds.json")
            elif folds[row_id] != fold:
                problems.append(f"{where}: row {row_id!r} belongs to fold {folds[row_id]}")
        if not problems and len(table) != sum(of_row == fold for of_row in folds.values()):
            covered = set(table.id)
            lacking = next(
                row_id for row_id, of_row in folds.items() if of_row == fold and row_id not in covered
            )
            problems.append(f"{where}: row {lacking!r} of folds.json is missing")
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
        for dialogue_id, fold in zip(joined.dialogue_id, joined.fold, strict=True):
            if fold_of.setdefault(dialogue_id, int(fold)) != fold:
                problems.append(
                    f"{reference}: dialogue {dialogue_id!r} is in folds {fold_of[dialogue_id]} and {fold}"
                )
        if problems:
            raise InputError(*dict.fromkeys(problems))
    position = {row_id: number for number, row_id in enumerate(joined.id)}
    return joined.take([position[row_id] for row_id in folds])


def _check_test(reference: str | os.PathLike, info: dict[str, Any], tables: list[LogitTable]) -> None:
    problems = []
    for fold, table in enumerate(tables):
        where = f"{reference}: test fold {fold}"
        problems += _content_problems(where, table, fold, len(info["label_names"]), first_label=-1)
        if table.id != tables[0].id or table.dialogue_id != tables[0].dialogue_id:
            problems.append(f"{where}: other rows, or in another order, than fold 0")
    if problems:
        raise InputError(*problems)


def _content_problems(
    where: str, table: LogitTable, fold: int, num_labels: int, first_label: int
) -> Iterable[str]:
    if len(table) and table.logits.shape[1] != num_labels:
        yield f"{where}: {table.logits.shape[1]} logits a row for {num_labels} labels"
    for wrong, what in (
        (table.fold != fold, "fold: not the fold of its file"),
        (
            (table.label < first_label) | (table.label >= num_labels),
            f"label: not one of {first_label}..{num_labels - 1}",
        ),
    ):
        if wrong.any():
            yield f"{where}: row {table.id[int(np.argmax(wrong))]!r}: {what}"


# ----------------------------------------------------------------------------------------------------------- on the Hub

DATASET_CARD = """
# {name}: logits

Out-of-fold (`oof`) and test (`test`) logits of the runs of `{name}`, one config a run, made with rareturn. A row has
`id`, `dialogue_id`, `fold` (of the model that made the logits), `label` (-1: none) and `logits` (float32, one a label);
`data/<run>/run.json` names the labels, `data/<run>/folds.json` holds the folds. There is no word of any dialogue here.

```python
from datasets import load_dataset

oof = load_dataset("{repo_id}", "{run}", split="oof")
```

In a script of rareturn: `calibrate.py --run {repo_id}:{run}`.
"""


def model_repo(namespace: str, name: str, run: str) -> str:
    """`ORG/NAME-RUN`, the model repo of a run.

    Raises:
        InputError: a part that cannot be one of a repo id.
    """
    check_name(namespace, "hub_namespace")
    return f"{namespace}/{check_name(f'{name}-{run}', 'hub_name and run_name: repo')}"


def table_repo(namespace: str, name: str) -> str:
    """`ORG/NAME-oof`, the dataset repo with the tables of all runs.

    Raises:
        InputError: a part that cannot be one of a repo id.
    """
    check_name(namespace, "hub_namespace")
    return f"{namespace}/{check_name(f'{name}-oof', 'hub_name: repo')}"


def push_fold(
    run_dir: str | os.PathLike, fold: int, namespace: str, name: str, *, private: bool = True
) -> dict[str, str]:
    """Push a complete fold: one commit to the model repo, one to the dataset repo, of paths that no other fold writes.

    The model's files are those of `RUN/fold-<k>/adapter/` and the files that lie in `RUN/fold-<k>/` itself (metrics, a
    linear head). Pushing it again changes nothing.

    Returns:
        Repo id to the SHA of a commit that holds the files.

    Raises:
        InputError: the fold is not complete, or a name cannot be one.
        PushError: see `hub.push_files`.
    """
    run_dir = Path(run_dir)
    run = _run_name(run_dir)
    if not fold_is_complete(run_dir, fold, needs_test=False):
        raise InputError(f"{run_dir}: fold {fold} is not complete: nothing to push")
    adapter = adapter_dir(run_dir, fold)
    sources = [(path, path.name) for path in sorted(adapter.parent.iterdir())]
    sources += [(path, path.relative_to(adapter).as_posix()) for path in sorted(adapter.rglob("*"))]
    model_files: dict[str, hub.Content] = {
        f"fold-{fold}/{place}": path
        for path, place in sources
        # PEFT writes an empty card template beside each adapter; the run's own card is at the root.
        if path.is_file() and hub.may_travel(place) and path.name != "README.md" and path.name[0] != "."
    }
    tables: dict[str, hub.Content] = {
        f"data/{run}/{split}-fold-{fold}.parquet": table_path(run_dir, split, fold)
        for split in ("oof", "test")
        if table_path(run_dir, split, fold).is_file()
    }
    options = {"message": f"{run}: fold {fold}", "kept_in": run_dir, "private": private}
    repos = model_repo(namespace, name, run), table_repo(namespace, name)
    return {
        repos[0]: hub.push_files(repos[0], model_files, **options),
        repos[1]: hub.push_files(repos[1], tables, repo_type="dataset", **options),
    }


def push_run(
    run_dir: str | os.PathLike,
    namespace: str,
    name: str,
    *,
    model_card: str,
    private: bool = True,
    collection: bool = True,
) -> dict[str, str]:
    """Push what belongs to the whole run: `run.json`, `folds.json`, the card, and the run's config in the dataset's card.

    Other configs and all prose of a dataset card that is there are kept, also against another process that changes it
    at the same moment. The repos are tied together by a collection of the name `NAME`.

    Args:
        model_card: text of the model repo's README.md, YAML header included.

    Returns:
        Repo id to the SHA of a commit that holds the files.

    Raises:
        InputError, PushError: as `push_fold`.
    """
    run_dir = Path(run_dir)
    run = _run_name(run_dir)
    repos = model_repo(namespace, name, run), table_repo(namespace, name)
    has_test = any((run_dir / "test").glob("fold-*.parquet"))
    facts = {file: run_dir / file for file in ("run.json", "folds.json")}
    read_folds(facts["folds.json"])
    options = {"message": f"{run}: run and card", "kept_in": run_dir, "private": private}
    shas = {
        repos[0]: hub.push_files(repos[0], {**facts, "README.md": model_card.encode()}, **options),
        repos[1]: hub.push_files(
            repos[1],
            {
                **{f"data/{run}/{file}": path for file, path in facts.items()},
                "README.md": lambda present: dataset_card(present, repos[1], run, has_test),
            },
            repo_type="dataset",
            **options,
        ),
    }
    if collection:
        hub.add_to_collection(namespace, name, [(repos[0], "model"), (repos[1], "dataset")], private=private)
    return shas


def _run_name(run_dir: Path) -> str:
    return check_run_info(read_json(run_dir / "run.json"), str(run_dir / "run.json"))["name"]


def dataset_card(present: bytes | None, repo_id: str, run: str, has_test: bool) -> bytes:
    """The dataset repo's README.md with the config of one run in it; everything else in it stays.

    Args:
        present: the README as it is; None if there is none.

    Raises:
        ValueError: the README's YAML header cannot be read, so nothing can be kept of it.
    """
    splits = ("oof", "test") if has_test else ("oof",)
    config = {
        "config_name": run,
        "data_files": [{"split": split, "path": f"data/{run}/{split}-fold-*.parquet"} for split in splits],
    }
    name = repo_id.split("/")[1].removesuffix("-oof")
    if present is None:
        header, prose = {"tags": ["rareturn"]}, DATASET_CARD.format(name=name, repo_id=repo_id, run=run)
    else:
        text = present.decode()
        match = re.match(r"---[ \t]*\r?\n(.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
        prose = text[match.end() :] if match else text
        try:
            header = (yaml.safe_load(match[1] or "") if match else None) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"the YAML header of its README.md cannot be read: {error}") from None
    configs = (header.get("configs") or []) if isinstance(header, dict) else None
    if not isinstance(configs, list) or not all(isinstance(other, dict) for other in configs):
        raise ValueError("the configs in the YAML header of its README.md are no list of mappings")
    if present is not None and config in configs:
        return present
    names = [other.get("config_name") for other in configs]
    if run in names:
        configs[names.index(run)] = config
    else:
        configs = [*configs, config]
    header = yaml.safe_dump({**header, "configs": configs}, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{header}---\n{prose}".encode()


def pull_run(reference: str | os.PathLike) -> tuple[Path, str]:
    """Fetch a run's tables from the Hub into the cache: the folder with `run.json`, and the commit's SHA.

    Raises:
        InputError: not a Hub reference, no such repo, revision or run, or the Hub cannot be reached.
    """
    where = parse_reference(reference)
    if where.repo_id is None or where.run is None:
        raise InputError(f"{reference}: a folder, not a run on the Hub")
    folder, sha = hub.pull_files(
        where.repo_id, repo_type="dataset", revision=where.revision, patterns=[f"data/{where.run}/*"]
    )
    if not (folder / "data" / where.run).is_dir():
        raise InputError(f"{reference}: {where.repo_id} has no run {where.run!r}")
    return folder / "data" / where.run, sha


def pull_adapters(repo_id: str, *, revision: str | None = None, folds: Iterable[int]) -> tuple[Path, str]:
    """Fetch a run's adapters from its model repo into the cache: the folder with `fold-<k>/`, and the commit's SHA.

    Raises:
        InputError: as `hub.pull_files`, or a fold without safetensors.
    """
    folds = list(folds)
    folder, sha = hub.pull_files(repo_id, revision=revision, patterns=[f"fold-{fold}/*" for fold in folds])
    for fold in folds:
        if not any((folder / f"fold-{fold}").glob("*.safetensors")):
            raise InputError(f"{repo_id}: fold-{fold} holds no safetensors at {sha}")
    return folder, sha
