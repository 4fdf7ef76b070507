# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Lexical variants of the target utterances of rare classes, for training only.

Variant j of source i (the running number of a source among the selected rows) takes pattern (i + j) mod 3; a pattern
that finds nothing to change hands on to the next. Only the target changes, never its context. The output holds the
variants alone, each with the id `<source>#aug<j>` (j from 0) and its source's id in `augmented_from`.

    python augment.py --train_file AIMH/PsyDefConv:Splits/train.json --labels 2 3 4 5 8 --output_file augmented.jsonl
    python augment.py --label_guide data/demo/label_guide.yaml --train_file data/demo/train.json \\
        --labels 2 3 4 5 8 --output_file augmented.jsonl
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, run, start_logging
from rareturn.data.label_guide import LabelGuide, load_label_guide
from rareturn.data.rows import DataArguments, Row, load_rows, row_columns
from rareturn.data.variants import augment_text
from rareturn.errors import InputError
from rareturn.files import write_bytes

CARD = """---
{{ card_data }}
---

# Augmented rows

{{ rows }} lexical variants of {{ sources }} rows{{ " of " + corpus if corpus }}, made by rareturn's augment.py for
training only. Each names its source row in `augmented_from`: train on it only where its source is trained on, and
never score on it.

The rows hold dialogue text, so the licence of the source data applies to them.
"""


@dataclass
class ScriptArguments:
    _argument_group_name = "Augmentation"

    train_file: str = flag(REQUIRED, "Labelled rows: file, folder or Hub dataset ORG/NAME[:path][@revision].")
    output_file: str = flag("augmented.jsonl", "Where the variants go: .jsonl or .parquet.")
    labels: list[str] = flag(["rare"], "Label numbers, or the word rare: those below --rare_below rows.")
    rare_below: int = flag(90, "A label of fewer rows is rare. 90 gives the paper's 2, 4, 5, 8, without 3.")
    k: int = flag(3, "Variants of a source row; 3 (the paper's) is one for each pattern.")
    seed: int = flag(42, "Chooses the words and their places; the same seed gives the same bytes.")

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, not {self.k}")
        if self.labels != ["rare"] and not all(label.isdecimal() for label in self.labels):
            given = " ".join(self.labels)
            raise ValueError(f"--labels takes label numbers, or the one word rare, not {given}")
        if Path(self.output_file).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"--output_file must end with .jsonl or .parquet, not {self.output_file}")


def selected_labels(arguments: ScriptArguments, rows: Sequence[Row], guide: LabelGuide) -> list[int]:
    """The labels to augment; an InputError where one is outside the guide, or has no row."""
    counts = Counter(row.label for row in rows)
    if arguments.labels == ["rare"]:
        labels = [label for label in guide.numbers if 0 < counts[label] < arguments.rare_below]
        if not labels:
            raise InputError(f"{arguments.train_file}: no label has fewer than {arguments.rare_below} rows")
        return labels
    labels = sorted(set(map(int, arguments.labels)))
    if unknown := set(labels).difference(guide.numbers):
        raise InputError(*(f"--labels: {label} is not in the label guide" for label in sorted(unknown)))
    if empty := [label for label in labels if not counts[label]]:
        raise InputError(*(f"{arguments.train_file}: no row has label {label}" for label in empty))
    return labels


def variants_of(source: Row, number: int, k: int, seed: int) -> list[Row]:
    """At most `k` variants of the source, the selected row of that running number."""
    *context, target = source.turns
    found = []
    for j, text in enumerate(augment_text(target.text, number, k, f"{seed}/{source.id}")):
        turns = (*context, target._replace(text=text))
        found.append(replace(source, id=f"{source.id}#aug{j}", turns=turns, augmented_from=source.id))
    return found


def file_bytes(rows: Sequence[Row], columns: Mapping[str, str], suffix: str) -> bytes:
    """The output file; equal rows give equal bytes."""
    records = []
    for row in rows:
        turns = [turn._asdict() for turn in row.turns]
        values = (row.id, row.dialogue_id, turns, row.turns[-1].text, row.label, row.augmented_from)
        records.append(dict(zip((*row_columns(columns).values(), "augmented_from"), values, strict=True)))
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def summary(rows: Sequence[Row], made: Sequence[tuple[Row, list[Row]]], k: int, guide: LabelGuide) -> str:
    """The number of rows of each label before and after, and the sources that gave fewer than `k` variants."""
    from rareturn.reports.tables import Table

    before = Counter(row.label for row in rows)
    added = Counter(source.label for source, found in made for _ in found)
    cells = [(f"{number} {name}", before[number], added[number]) for number, name in enumerate(guide.names)]
    cells.append(("total", before.total(), added.total()))
    lines = [(name, str(had), str(new), str(had + new)) for name, had, new in cells]
    table = Table("Rows before and after", ("label", "before", "variants", "after"), lines)
    few = [f"{source.id} ({len(found)})" for source, found in made if len(found) < k]
    listed = f": {', '.join(few[:20])}" if few else ""
    more = f" and {len(few) - 20} more" if len(few) > 20 else ""
    return f"{table.text()}\n{len(few)} of {len(made)} sources gave fewer than {k} variants{listed}{more}"


def card(rows: Sequence[Row], guide: LabelGuide) -> str:
    """The README.md of the pushed dataset; licence, language and corpus are those that the guide names."""
    from huggingface_hub import DatasetCard, DatasetCardData

    configs = [{"config_name": "default", "data_files": "augmented.parquet"}]
    corpus = {"license": guide.license, "language": guide.language}
    corpus |= {"source_datasets": [guide.dataset]} if guide.dataset else {}
    data = DatasetCardData(configs=configs, tags=["rareturn"], **corpus)
    numbers = {"rows": len(rows), "sources": len({row.augmented_from for row in rows})}
    return str(DatasetCard.from_template(data, template_str=CARD, corpus=guide.dataset, **numbers)) + "\n"


def push(
    rows: Sequence[Row], kept_in: str, columns: Mapping[str, str], hub: HubArguments, guide: LabelGuide
) -> None:
    """Push the variants, and nothing else, as a dataset that `load_rows` and `datasets.load_dataset` read."""
    from rareturn.runs.hub import push_files
    from rareturn.runs.references import check_name

    namespace = check_name(hub.hub_namespace, "hub_namespace")
    repo_id = f"{namespace}/{check_name(f'{hub.hub_name}-augmented', 'hub_name: repo')}"
    table = file_bytes(rows, columns, ".parquet")
    files = {"augmented.parquet": table, "README.md": card(rows, guide).encode()}
    options = {"repo_type": "dataset", "private": hub.hub_private_repo, "kept_in": kept_in}
    sha = push_files(repo_id, files, message=f"{len(rows)} augmented rows", **options)
    print(f"pushed {len(rows)} variants to {repo_id} at {sha}")


def main() -> None:
    # Arguments and logging
    arguments, data, hub = parse_arguments((ScriptArguments, DataArguments, HubArguments), __doc__)
    start_logging()

    # Data
    guide = load_label_guide(data.label_guide)
    if guide.language and guide.language.lower().split("-")[0] not in ("en", "eng", "english"):
        but = "but the patterns of augment.py are English"
        raise InputError(f"{data.label_guide}: language: {guide.language!r}, {but}")
    train_file, output_file = arguments.train_file, arguments.output_file
    rows = load_rows(train_file, guide, columns=data.columns)
    originals = [row for row in rows if row.augmented_from is None]
    if hub.push_only:
        variants = load_rows(output_file, guide, columns=data.columns, sources_of_augmented=originals)
        return push(variants, output_file, data.columns, hub, guide)
    labels = selected_labels(arguments, originals, guide)
    sources = [row for row in originals if row.label in labels]

    # Variants
    numbered = enumerate(sources)
    made = [(source, variants_of(source, number, arguments.k, arguments.seed)) for number, source in numbered]
    variants = [variant for _, found in made for variant in found]
    taken = sorted({row.id for row in rows} & {variant.id for variant in variants})
    if taken:
        raise InputError(*(f"{train_file}: {name}: the file has this variant already" for name in taken))
    if not variants:
        raise InputError(f"{train_file}: no pattern finds anything to change in {len(sources)} rows")

    # Save
    write_bytes(output_file, file_bytes(variants, data.columns, Path(output_file).suffix))
    print(summary(originals, made, arguments.k, guide))
    print(f"wrote {len(variants)} variants to {output_file}")

    # Push
    if hub.push_to_hub:
        push(variants, output_file, data.columns, hub, guide)


if __name__ == "__main__":
    run(main)
