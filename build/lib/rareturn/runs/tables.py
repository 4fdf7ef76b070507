"""Logit tables: Parquet files with no word of any dialogue."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rareturn.data.dialogues import Row, row_json
from rareturn.errors import InputError
from rareturn.files import write_bytes

COLUMNS = {"id": pa.string(), "dialogue_id": pa.string(), "fold": pa.int32(), "label": pa.int32()}
TABLE_SCHEMA = pa.schema({**COLUMNS, "logits": pa.list_(pa.float32())})
# Another tool's table may hold wider types (pandas: large strings, int64, lists of doubles).
STRINGS, INTEGERS = ("strings", "(large_)?string"), ("integers", r"int\d+")
LISTS = ("lists of float32", r"(large_)?list<\w+: (halffloat|float|double)( not null)?>")
TYPES = {"id": STRINGS, "dialogue_id": STRINGS, "fold": INTEGERS, "label": INTEGERS, "logits": LISTS}
ROWS_KEY = b"rareturn.rows"  # in the schema's metadata: the digest of the rows that a table was made for


@dataclass
class LogitTable:
    """Logits of rows, with no word of their dialogues.

    Attributes:
        id, dialogue_id: n strings each.
        fold: int64 [n], the fold whose model made the logits.
        label: int64 [n], -1 where there is none.
        logits: float32 [n, c].
        rows: digest of the rows that the logits were made for; None where another tool wrote the table.
    """

    id: list[str]
    dialogue_id: list[str]
    fold: np.ndarray
    label: np.ndarray
    logits: np.ndarray
    rows: str | None = None

    def __len__(self) -> int:
        return len(self.id)

    def take(self, positions: Sequence[int] | np.ndarray) -> LogitTable:
        """The rows at these positions, in this order."""
        ids = [self.id[position] for position in positions]
        dialogues = [self.dialogue_id[position] for position in positions]
        return LogitTable(ids, dialogues, self.fold[positions], self.label[positions], self.logits[positions])


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 of rows in their order: ids, dialogues, turns, labels and the sources of variants."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_json([row.id, row.dialogue_id, row.turns, row.label, row.augmented_from]))
    return digest.hexdigest()


def make_table(rows: Sequence[Row], fold: int, logits: np.ndarray) -> LogitTable:
    """The table of a fold's model on these rows; `logits` of shape (rows, labels)."""
    ids, dialogues = [row.id for row in rows], [row.dialogue_id for row in rows]
    folds = np.full(len(rows), fold, dtype=np.int64)
    labels = np.array([row.label for row in rows], dtype=np.int64)
    return LogitTable(ids, dialogues, folds, labels, logits.astype(np.float32), rows_digest(rows))


def write_table(path: str | os.PathLike, table: LogitTable) -> None:
    """Write a table as Parquet (columns of `TABLE_SCHEMA`, zstd); equal tables give equal bytes.

    An InputError where a logit is not finite, the disk is full or the place cannot be written.
    """
    finite = np.isfinite(table.logits).all(1)
    if not finite.all():
        row = table.id[int(np.argmin(finite))]
        raise InputError(f"{path}: row {row!r}: logits are not finite, so the model's training diverged")
    schema = TABLE_SCHEMA if table.rows is None else TABLE_SCHEMA.with_metadata({ROWS_KEY: table.rows})
    columns = {name: getattr(table, name) for name in schema.names} | {"logits": list(table.logits)}
    whole, buffer = pa.table(columns, schema=schema), io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", write_page_checksum=True)
    write_bytes(path, buffer.getvalue())


def read_rows_digest(path: str | os.PathLike) -> str | None:
    """The digest of the rows that a table was made for; None where there is no table or it does not say."""
    try:
        return _rows_digest_in(pq.read_schema(path))
    except (pa.ArrowException, OSError, ValueError):
        return None


def _rows_digest_in(schema: pa.Schema) -> str | None:
    return (schema.metadata or {}).get(ROWS_KEY, b"").decode(errors="replace") or None


def read_table(path: str | os.PathLike) -> LogitTable:
    """Read and check one table; an InputError names the file and the first row that is wrong.

    Refused are a missing column, a wrong type, an empty cell, an id that appears twice, and logits that are not finite or
    whose number changes from row to row.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if missing := [name for name in TABLE_SCHEMA.names if name not in file.schema_arrow.names]:
                raise InputError(f"{path}: no column {', '.join(map(repr, missing))}")
            table = file.read(columns=TABLE_SCHEMA.names)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error)[:200]}") from None
    for name, (expected, pattern) in TYPES.items():
        found = table.schema.field(name).type
        if not re.fullmatch(pattern, str(found)):
            raise InputError(f"{path}: column {name!r}: {expected} expected, not {found}")
    ids = table["id"].to_pylist()

    def check(right: np.ndarray, what: str) -> None:
        if not right.all():
            raise InputError(f"{path}: row {ids[int(np.argmin(right))]!r}: {what}")

    for name in TABLE_SCHEMA.names:
        check(table[name].is_valid().to_numpy(), f"{name}: empty")
    count = Counter(ids)
    check(np.array([count[row_id] == 1 for row_id in ids], dtype=bool), "id: appears more than once")
    widths = pc.list_value_length(table["logits"]).to_numpy()
    width = int(widths[0]) if ids else 0
    check(widths == width, f"logits: not {width} numbers, as in the first row")
    logits = pc.list_flatten(table["logits"]).cast(pa.float32()).to_numpy().reshape(len(ids), width)
    check(np.isfinite(logits).all(1), "logits: not finite")
    dialogues, digest = table["dialogue_id"].to_pylist(), _rows_digest_in(table.schema)
    fold, label = (table[name].to_numpy().astype(np.int64) for name in ("fold", "label"))
    return LogitTable(ids, dialogues, fold, label, np.array(logits), digest)
