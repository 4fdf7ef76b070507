"""Records from files, dataset folders and the Hub, one at a time."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from rareturn.errors import InputError, first_line

# Each escape of a JSON text; a pair of surrogates is one.
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)", re.DOTALL)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_DEPTH = 100  # a row's turns are three deep
HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<path>[^@]+))?(?:@(?P<revision>[\w./-]+))?")


def check_on_hub(flag: str, source: str) -> None:
    """An InputError for rows that a job on the Hub's machines could not read."""
    if Path(source).exists() or not HUB_FILE.fullmatch(source):
        advice = "a job reads from the Hub only, and whether data may go there is for you to say"
        raise InputError(f"--{flag} {source}: on this machine: {advice}")


def read_records(source: str, split: str = "train") -> Iterable[Any]:
    """Raw records of a source. Reading is lazy: iterating, too, may raise an InputError.

    Args:
        source: a .json (an array), .jsonl, .parquet, .csv or .tsv file; a dataset folder (`save_to_disk`, or files that
            `datasets.load_dataset` reads); or a Hub dataset, `ORG/NAME[:path/of/file][@revision]`.
        split: the split to take where the source has several and names none.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_dataset(source, None, split)
    match = HUB_FILE.fullmatch(source)
    if path.suffix in READERS and not (match and match["path"]):
        raise InputError(f"{source}: no such file")
    if match is None:
        raise InputError(f"{source}: no such file or folder, nor a Hub dataset ORG/NAME[:path][@revision]")
    repo, inside, revision = match.groups()
    if inside is None:
        return _read_dataset(repo, revision, split)
    import httpx2
    from huggingface_hub import hf_hub_download

    try:
        local = hf_hub_download(repo, inside, repo_type="dataset", revision=revision)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be fetched from the Hub: {first_line(error)}") from None
    return _read_file(Path(local))


def _read_file(path: Path) -> Iterable[Any]:
    if path.suffix not in READERS:
        raise InputError(f"{path}: unknown kind of file; one of {', '.join(READERS)} is expected")
    return READERS[path.suffix](path)


def _read_json(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one at a time: a file of any size needs the memory of its longest row."""
    number = 1
    try:
        with open(path, "rb") as file:
            events = ijson.basic_parse(ijson.from_iter(_marked_pieces(file)), use_float=True)
            for row in ijson.items(ijson.parse(_rows_only(events, path)), "item"):
                yield row
                number += 1
    except (ijson.JSONError, ValueError) as error:
        said = error.args[0]
        reason = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
        raise InputError(f"{path}: not valid JSON at row {number}: {reason.splitlines()[0]}") from None


def _marked_pieces(file: BinaryIO) -> Iterator[bytes]:
    """A JSON file in pieces that cut no escape. U+FFFE, which is refused with its row, stands for each half of a
    character (a lone surrogate), of which ijson would silently make "?"."""
    while piece := file.read(1 << 16):
        while b"\\" in piece[-12:] and (more := file.read(1 << 6)):
            piece += more
        yield ESCAPE.sub(lambda match: b"\\ufffe" if match["half"] else match[0], piece)


def _rows_only(events: Iterable[tuple[str, Any]], path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON parser's events; refused unless an array's, and where their nesting would fill the memory."""
    depth = 0
    for event, value in events:
        if depth == 0 and event != "start_array":
            raise InputError(f"{path}: a JSON file must hold an array of rows")
        depth += event.startswith("start_") - event.startswith("end_")
        if depth > MAX_DEPTH:
            raise InputError(f"{path}: not valid JSON: nested too deeply")
        yield event, value


def _read_jsonl(path: Path) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise InputError(f"{path}: line {number}: not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> InputError:
    """With the line where other bytes begin: a file may be joined from parts in several encodings."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return InputError(f"{path}: line {line}: not a UTF-8 text: byte {content[error.start]:#x}")


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from None


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)
    try:
        # Excel begins a UTF-8 file with a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file: {error}") from None


READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def _read_dataset(name: str, revision: str | None, split: str) -> Iterable[Any]:
    import datasets

    saved = any((Path(name) / file).exists() for file in ("dataset_info.json", "dataset_dict.json"))
    try:
        dataset = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the datasets library raises whatever its readers raise
        raise InputError(f"{name}: cannot be read as a dataset: {first_line(error)}") from None
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        has = f"has no split {split!r} (it has {', '.join(dataset)})"
        raise InputError(f"{name}: {has}; name a file with {name}:path")
    return dataset[split]
