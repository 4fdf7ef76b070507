"""Lexical variants of the target utterances of rare classes, for training only.

Variant j of source i (the running number of a source among the selected rows) takes pattern (i + j) mod 3; a pattern
that finds nothing to change hands on to the next. Only the target changes, never its context. The output holds the
variants alone, each with the id `<source>#aug<j>` (j from 0) and its source's id in `augmented_from`.

    python augment.py --train_file AIMH/PsyDefConv:Splits/train.json --labels 2 3 4 5 8 --output_file augmented.jsonl
    python augment.py --train_file data/demo/train.json --labels 2 3 4 5 8 --output_file augmented.jsonl
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rareturn.command_line import parse_arguments, run
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rows import Columns, DataArguments, Row, load_rows
from rareturn.data.variants import augment_text
from rareturn.errors import InputError
from rareturn.files import write_bytes
from rareturn.reports.tables import Table
from rareturn.runs.hub import push_files
from rareturn.runs.references import check_name

DATASET_CARD = """---
configs:
- config_name: default
  data_files: augmented.parquet
license: other
license_name: that-of-the-source-rows
language: en
tags:
- rareturn
---

# Augmented rows

{rows} lexical variants of {sources} rows, made by rareturn's augment.py for training only. Each names its source row in
`augmented_from`; train on it only where its source is trained on, and never score on it.

The rows hold dialogue text: the licence of the source data binds them.
"""


@dataclass
class ScriptArguments:
    train_file: str = field(
        default="AIMH/PsyDefConv:Splits/train.json",
        metadata={"help": "Labelled rows: a file, a folder, or a Hub dataset ORG/NAME[:path][@revision]."},
    )
    output_file: str = field(
        default="augmented.jsonl", metadata={"help": "Where the variants go: .jsonl or .parquet."}
    )
    labels: list[str] = field(
        default_factory=lambda: ["rare"],
        metadata={
            "help": "Numbers of the labels to augment, or the word rare (default): those below --rare_below."
        },
    )
    rare_below: int = field(
        default=90,
        metadata={
            "help": "A label with fewer rows is rare. 90: the paper's labels 2, 4, 5 and 8, without 3."
        },
    )
    k: int = field(default=3, metadata={"help": "Variants a source row; 3 (the paper): one a pattern."})
    seed: int = field(
        default=42, metadata={"help": "Chooses the words and their places; same seed, same bytes."}
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Push the variants as the dataset <hub_namespace>/<hub_name>-augmented."},
    )
    hub_namespace: str | None = field(default=None, metadata={"help": "User or organisation to push to."})
    hub_name: str | None = field(default=None, metadata={"help": "First part of the repo's name."})
    hub_private_repo: bool = field(
        default=True, metadata={"help": "Make the repo private (default): the variants are dialogue text."}
    )
    push_only: bool = field(
        default=False, metadata={"help": "Push the variants that --output_file holds; make none."}
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, not {self.k}")
        if self.labels != ["rare"] and not all(label.isdecimal() for label in self.labels):
            raise ValueError(
                f"--labels takes label numbers, or the one word rare, not {' '.join(self.labels)}"
            )
        if Path(self.output_file).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"--output_file must end with .jsonl or .parquet, not {self.output_file}")
        if (self.push_to_hub or self.push_only) and not (self.hub_namespace and self.hub_name):
            raise ValueError("--push_to_hub needs --hub_namespace and --hub_name")


def selected_labels(arguments: ScriptArguments, rows: Sequence[Row], guide: LabelGuide) -> list[int]:
    """The labels to augment, ascending.

    Raises:
        InputError: a label outside the guide, or none that has a row.
    """
    counts = Counter(row.label for row in rows)
    if arguments.labels == ["rare"]:
        labels = [label for label in guide.numbers if 0 < counts[label] < arguments.rare_below]
        if not labels:
            raise InputError(f"{arguments.train_file}: no label has fewer than {arguments.rare_below} rows")
        return labels
    labels = sorted({int(label) for label in arguments.labels})
    unknown = [
        f"--labels: {label} is not in the label guide" for label in labels if label not in guide.numbers
    ]
    empty = [f"{arguments.train_file}: no row has label {label}" for label in labels if not counts[label]]
    if unknown or empty:
        raise InputError(*(unknown or empty))
    return labels


def augment_rows(sources: Sequence[Row], k: int, seed: int) -> list[tuple[Row, list[Row]]]:
    """Each source with its variants, at most `k`."""
    made = []
    for number, source in enumerate(sources):
        target = source.turns[-1]
        texts = augment_text(target.text, number, k, f"{seed}/{source.id}")
        variants = [
            replace(
                source,
                id=f"{source.id}#aug{j}",
                turns=(*source.turns[:-1], target._replace(text=text)),
                augmented_from=source.id,
            )
            for j, text in enumerate(texts)
        ]
        made.append((source, variants))
    return made


def to_record(row: Row, columns: Columns) -> dict[str, Any]:
    return {
        columns.id: row.id,
        columns.dialogue_id: row.dialogue_id,
        columns.dialogue: [turn._asdict() for turn in row.turns],
        columns.current_text: row.turns[-1].text,
        columns.label: row.label,
        "augmented_from": row.augmented_from,
    }


def file_bytes(rows: Sequence[Row], columns: Columns, suffix: str) -> bytes:
    """The output file; equal rows give equal bytes."""
    if suffix == ".jsonl":
        return "".join(
            json.dumps(to_record(row, columns), ensure_ascii=False) + "\n" for row in rows
        ).encode()
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist([to_record(row, columns) for row in rows])
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def summary(rows: Sequence[Row], made: Sequence[tuple[Row, list[Row]]], k: int, guide: LabelGuide) -> str:
    """Counts a label before and after, and the sources that gave fewer than `k` variants."""
    before = Counter(row.label for row in rows)
    added = Counter(variant.label for _, found in made for variant in found)
    cells = [
        (f"{label.number} {label.name}", before[label.number], added[label.number]) for label in guide.labels
    ]
    cells.append(("total", len(rows), added.total()))
    table = Table(
        "Rows before and after",
        ("label", "before", "variants", "after"),
        [(name, str(had), str(new), str(had + new)) for name, had, new in cells],
    )
    short = [f"{source.id} ({len(found)})" for source, found in made if len(found) < k]
    listed = ", ".join(short[:20]) + (f" and {len(short) - 20} more" if len(short) > 20 else "")
    return f"{table.text()}\n{len(short)} of {len(made)} sources gave fewer than {k} variants" + (
        f": {listed}" if short else ""
    )


def push(rows: Sequence[Row], columns: Columns, arguments: ScriptArguments) -> None:
    """Push the variants, and nothing else, as a dataset; `load_rows` and `datasets.load_dataset` read it.

    Raises:
        InputError: a name that no repo can have.
        PushError: the Hub does not take it; the output file stays.
    """
    namespace = check_name(arguments.hub_namespace, "hub_namespace")
    repo_id = f"{namespace}/{check_name(f'{arguments.hub_name}-augmented', 'hub_name: repo')}"
    readme = DATASET_CARD.format(rows=len(rows), sources=len({row.augmented_from for row in rows}))
    sha = push_files(
        repo_id,
        {"augmented.parquet": file_bytes(rows, columns, ".parquet"), "README.md": readme.encode()},
        message=f"{len(rows)} augmented rows",
        kept_in=arguments.output_file,
        repo_type="dataset",
        private=arguments.hub_private_repo,
    )
    print(f"pushed {len(rows)} variants to {repo_id} at {sha}")


def main() -> None:
    # Arguments and logging
    arguments, data = parse_arguments((ScriptArguments, DataArguments), __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # Data
    guide = load_label_guide(data.label_guide)
    rows = load_rows(arguments.train_file, guide, columns=data.columns)
    originals = [row for row in rows if row.augmented_from is None]
    if arguments.push_only:
        variants = load_rows(
            arguments.output_file, guide, columns=data.columns, sources_of_augmented=originals
        )
        push(variants, data.columns, arguments)
        return
    labels = selected_labels(arguments, originals, guide)
    sources = [row for row in originals if row.label in labels]

    # Variants
    made = augment_rows(sources, arguments.k, arguments.seed)
    variants = [variant for _, found in made for variant in found]
    taken = {row.id for row in rows} & {variant.id for variant in variants}
    if taken:
        raise InputError(
            *(
                f"{arguments.train_file}: {row_id}: the file has this variant already"
                for row_id in sorted(taken)
            )
        )
    if not variants:
        raise InputError(
            f"{arguments.train_file}: no pattern finds anything to change in {len(sources)} rows"
        )

    # Save and push
    content = file_bytes(variants, data.columns, Path(arguments.output_file).suffix)
    write_bytes(arguments.output_file, content)
    print(summary(originals, made, arguments.k, guide))
    print(f"wrote {len(variants)} variants to {arguments.output_file}")
    if arguments.push_to_hub:
        push(variants, data.columns, arguments)


if __name__ == "__main__":
    run(main)
