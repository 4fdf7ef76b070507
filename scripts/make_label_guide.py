# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Write a label guide from a table of utterances: its labels and how often each occurs, its speakers, its columns.

    python scripts/make_label_guide.py corpus/train.csv --label_column emotion --output label_guides/corpus.yaml
    python scripts/make_label_guide.py data/german/train.csv --dialogue_id_column gespraech --turn_column nr \\
        --speaker_column sprecher --text_column aeusserung --label_column art --output /tmp/guide.yaml

Usual names of columns are found, others are named by flags. Definitions are left for you to fill in, and lines that only
you can decide on are marked with "TODO". Labels are numbered by frequency, numbers by their size.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import run as run_script
from rareturn.data.label_guide import ANY, TABLE_FIELDS, parse_label_guide
from rareturn.data.readers import read_records
from rareturn.data.utterances import cell_text, holds_several
from rareturn.errors import InputError
from rareturn.files import write_bytes

USUAL = {
    "dialogue_id": "dialogue_id dialog_id dialogueid conversation_id conv_id transcript_id session_id",
    "turn": "turn turn_id turn_index utterance_id utt_id utterance_index",
    "speaker": "speaker interlocutor role author participant",
    "text": "text utterance utterance_text transcript sentence",
    "label": "label labels class category emotion",
    "id": "id",
}
NEEDED = ("dialogue_id", "speaker", "text", "label")
MANY_SPEAKERS = 10


def find_columns(there: list[str], given: dict[str, str | None], table: str) -> dict[str, str]:
    """Field to column: what the flags say, else a usual name, in any case of letters.

    Raises:
        InputError: a column that is not there, or a needed one that neither is found nor named.
    """
    columns, problems = {}, []
    for field in TABLE_FIELDS:
        usual = [name for name in there if name.lower() in USUAL[field].split()]
        if given[field] and given[field] not in there:
            problems.append(f"--{field}_column: no column {given[field]!r}")
        elif given[field] or len(usual) == 1:
            columns[field] = given[field] or usual[0]
        elif field in NEEDED:
            problems.append(f"which column is the {field}? name it by --{field}_column")
    if problems:
        raise InputError(*(f"{table}: {problem}; there are: {', '.join(there)}" for problem in problems))
    return columns


def count_labels(
    records: list[dict[str, Any]], columns: dict[str, str], no_label: list[str], table: str
) -> tuple[Counter[str], dict[str, set[str]], dict[str, Counter[str]]]:
    """Lines of each label, its dialogues, and the labels of each speaker, in the order of the file."""
    counts, dialogues = Counter(), defaultdict(set)
    by_speaker: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        label, speaker, dialogue = (
            cell_text(record.get(columns[key])) for key in ("label", "speaker", "dialogue_id")
        )
        if isinstance(label, (list, dict)):
            raise InputError(
                f"{table}: {columns['label']}: {label}: several labels for one line (multi-label)"
            )
        by_speaker[str(speaker)]
        if label not in (None, "", *no_label):
            counts[str(label)] += 1
            dialogues[str(label)].add(dialogue)
            by_speaker[str(speaker)][str(label)] += 1
    if several := next((label for label in counts if holds_several(label, counts)), None):
        raise InputError(f"{table}: {columns['label']}: {several}: several labels for one line (multi-label)")
    if len(counts) < 2:
        raise InputError(f"{table}: {columns['label']}: {len(counts)} labels, but a task needs two")
    if len(counts) > 100:
        raise InputError(f"{table}: {columns['label']}: {len(counts)} different values: is this the label?")
    return counts, dialogues, by_speaker


def guide_text(
    table: str,
    columns: dict[str, str],
    no_label: list[str],
    found: tuple[Counter[str], dict[str, set[str]], dict[str, Counter[str]]],
) -> str:
    """The guide, in YAML with comments."""
    counts, dialogues, by_speaker = found
    numeric = all(re.fullmatch(r"-?\d+", label) for label in counts)
    # The number of a label that is a number is that number, where they count from 0.
    names = sorted(counts, key=int) if numeric else [label for label, _ in counts.most_common()]
    said = [name for name, labels in by_speaker.items() if labels]
    speakers: Any = list(by_speaker) if len(by_speaker) <= MANY_SPEAKERS else ANY
    targets: Any = ANY if len(said) == len(by_speaker) else said if len(said) > 1 else said[0]
    quoted = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731 (JSON is YAML)
    lines = [
        f"# Made by scripts/make_label_guide.py from {Path(table).name}: {counts.total():,} labelled lines.",
        "# docs/YOUR_CORPUS.md explains every key. Fill in the lines marked TODO.",
        'task: "Classify the last turn."  # TODO: one sentence, in the language of the corpus',
        "# language: en  # TODO: the language of the corpus; augment.py without --llm refuses any but en",
        "# license: cc-by-4.0  # TODO: of the corpus; model cards state it",
        "# dataset: ORG/NAME  # TODO: where the corpus is; model cards state it",
        "columns:  # of its tables; flags such as --text_column win",
        *(f"  {field}: {quoted(column)}" for field, column in columns.items()),
    ]
    if no_label:
        lines.append(f"no_label: {quoted(no_label)}  # such a line is context only")
    if speakers == ANY:
        lines += [
            f"speakers: any  # {len(by_speaker)} names in this file",
            "speaker_names: letters  # the prompt says A, B, C …; as_is: the names",
        ]
    else:
        lines.append(f"speakers: {quoted(speakers)}")
    whose = "everyone" if targets == ANY else "those who have labels"
    lines += [
        f"target_speaker: {quoted(targets)}  # {whose} in this file",
        f"positive: {quoted(list(range(len(names))))}  # TODO: the macro scores average over these",
        f"protected: {names.index(max(names, key=counts.__getitem__))}  # the most frequent label",
        "labels:",
    ]
    if numeric and names != [str(number) for number in range(len(names))]:
        lines.append(
            "  # Do not rename these: the table's numbers are not those of the guide, so they count as names."
        )
    for number, name in enumerate(names):
        few = f"{counts[name]:,} lines in {len(dialogues[name]):,} dialogues"
        lines += [f"  - number: {number}", f"    name: {quoted(name)}  # {few}", "    definition:  # TODO"]
    return "\n".join(lines) + "\n"


def main() -> None:
    # Arguments
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument(
        "table", help="Table of utterances: .csv, .tsv, .jsonl, .parquet, a folder or a Hub id."
    )
    parser.add_argument("--output", help="YAML file to write; not over one that is there. Default: print it.")
    for field in TABLE_FIELDS:
        parser.add_argument(
            f"--{field}_column", help=f"Column of the {field}. Default: a usual name, if found."
        )
    parser.add_argument("--no_label", nargs="*", default=[], help='Cells that mean "no label", such as n/a.')
    arguments = parser.parse_args()
    if arguments.output and Path(arguments.output).exists():
        raise InputError(f"{arguments.output}: there already; name another --output, or remove it")

    # Data
    records = list(read_records(arguments.table))
    if not records or not isinstance(records[0], dict):
        raise InputError(f"{arguments.table}: {'no table of utterances' if records else 'holds no rows'}")
    given = {field: getattr(arguments, f"{field}_column") for field in TABLE_FIELDS}
    columns = find_columns(list(records[0]), given, arguments.table)
    found = count_labels(records, columns, arguments.no_label, arguments.table)

    # Save
    text = guide_text(arguments.table, columns, arguments.no_label, found)
    import yaml

    parse_label_guide(yaml.safe_load(text), "the new guide")
    if not arguments.output:
        print(text, end="")
        return
    write_bytes(arguments.output, text.encode())
    print(f"wrote {arguments.output}: {len(found[0])} labels; fill in what is marked TODO")


if __name__ == "__main__":
    run_script(main)
