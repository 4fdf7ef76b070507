# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Variants of the target utterances of rare classes, for training only: lexical ones, or a large model's (--llm).

Lexical variant j of source i (the running number of a source among the selected rows) takes pattern (i + j) mod 3; a pattern
that finds nothing to change hands on to the next. These patterns are English. --llm serves any language: a model behind
an OpenAI-compatible endpoint writes the variants and then judges each. The text of the selected dialogues leaves this
machine for --base_url, so see first that licence and consent allow that. Only the target changes, never its context. The
output holds the variants alone, each with the id `<source>#aug<j>` (j from 0) and its source's id in `augmented_from`.

    python augment.py --train_file AIMH/PsyDefConv:Splits/train.json --labels 2 3 4 5 8 --output_file augmented.jsonl
    python augment.py --label_guide data/demo/label_guide.yaml --train_file data/demo/train.json \\
        --labels 2 3 4 5 8 --output_file augmented.jsonl
    python augment.py --label_guide data/german/label_guide.yaml --train_file data/german/train.csv \\
        --llm qwen3-8b --base_url http://localhost:8000/v1 --output_file augmented.jsonl
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, run, start_logging
from rareturn.data.dialogues import text_problem
from rareturn.data.label_guide import LabelGuide, fold_whitespace, load_label_guide
from rareturn.data.rendering import render_turn
from rareturn.data.rows import DataArguments, Row, load_rows, row_columns
from rareturn.data.variants import augment_text
from rareturn.endpoint import Asking, Endpoint, lists_in, prompt_template
from rareturn.errors import InputError
from rareturn.files import write_bytes
from rareturn.runs.references import model_repo

CARD = """---
{{ card_data }}
---

# Augmented rows

{{ rows }} {{ "" if llm else "lexical " }}variants of {{ sources }} rows{{ " of " + corpus if corpus }}, {{ "written and judged by " + llm + "," if llm else "made" }} by rareturn's augment.py for
training only. Each names its source row in `augmented_from`: train on it only where its source is trained on, and
never score on it.

The rows hold dialogue text, so the licence of the source data applies to them.
"""


CONTEXT_TURNS = 30  # before the target: those that a decoder sees by default
YES = re.compile(r"(?is)(.*</think>)?\W*yes\b")
WRITING, JUDGING = Asking(), Asking(temperature=0.0)


@dataclass
class ScriptArguments:
    _argument_group_name = "Augmentation"

    train_file: str = flag(REQUIRED, "Labelled rows: file, folder or Hub dataset ORG/NAME[:path][@revision].")
    output_file: str = flag("augmented.jsonl", "Where the variants go: .jsonl or .parquet.")
    labels: list[str] = flag(["rare"], "Label numbers, or the word rare: those below --rare_below rows.")
    rare_below: int = flag(90, "A label of fewer rows is rare. 90 gives the paper's 2, 4, 5, 8, without 3.")
    k: int = flag(3, "Variants of a source row; 3 (the paper's) is one for each pattern.")
    seed: int = flag(42, "Chooses the words and their places; the same seed gives the same bytes.")
    llm: str | None = flag(None, "Model that writes and judges variants, in any language: it gets the text.")

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


def variants_of(source: Row, texts: Sequence[str]) -> list[Row]:
    """A variant of the source for each text."""
    *context, target = source.turns
    found = []
    for j, text in enumerate(texts):
        turns = (*context, target._replace(text=text))
        found.append(replace(source, id=f"{source.id}#aug{j}", turns=turns, augmented_from=source.id))
    return found


def prompt(template: str, source: Row, guide: LabelGuide, **parts: str | int) -> str:
    """A prompt about a row; the dialogue before it as a decoder sees it."""
    *context, (text, speaker) = source.turns[-CONTEXT_TURNS - 1 :]
    parts |= {"label": guide.labels[source.label], "context": "".join(map(render_turn, context))}
    return prompt_template(template).render(parts, guide=guide, text=text, speaker=speaker)


def texts_in(answer: str) -> list[str]:
    """The last JSON list of texts in an answer, whatever stands around it; none where there is no such list."""
    found = [value for value in lists_in(answer) if all(isinstance(text, str) for text in value)]
    return found[-1] if found else []


def usable(answer: str, source: str, k: int, dropped: Counter[str]) -> list[str]:
    """At most `k` texts of an answer that may be variants of the source; what is dropped is counted, by reason."""
    texts, kept = texts_in(answer), {fold_whitespace(source).casefold(): source}
    dropped["answers without a list of texts"] += not texts
    for text in map(str.strip, texts[:k]):
        folded = fold_whitespace(text).casefold()
        if text_problem(text):
            dropped["empty"] += 1
        elif folded in kept:
            dropped["repeated"] += 1
        elif len(text) > 2 * len(source) + 20:
            dropped["far longer than their source"] += 1
        else:
            kept[folded] = text
    return list(kept.values())[1:]


def written_texts(sources: Sequence[Row], k: int, guide: LabelGuide, endpoint: Endpoint) -> list[list[str]]:
    """For each source at most `k` texts that the model wrote and, asked again, found to keep label and facts."""

    def judging(found: Sequence[Sequence[str]]) -> list[str]:
        pairs = [(source, text) for source, texts in zip(sources, found, strict=True) for text in texts]
        return [prompt("judge", source, guide, variant=text) for source, text in pairs]

    def texts_of(answers: Sequence[str | None]) -> list[list[str]]:
        pairs = zip(answers, (source.turns[-1].text for source in sources), strict=True)
        return [[text] * k if answer is None else usable(answer, text, k, dropped) for answer, text in pairs]

    dropped: Counter[str] = Counter()
    writing = [prompt("paraphrase", source, guide, k=k) for source in sources]
    kept_answers = [endpoint.cached(text, WRITING) for text in writing]
    likely = texts_of([kept and kept[0]["text"] for kept in kept_answers])  # unknown: the source, k times
    asked = [*((text, WRITING) for text in writing), *((text, JUDGING) for text in judging(likely))]
    endpoint.plan(asked, len("".join(itertools.chain(*likely)).encode()) // 4)
    dropped.clear()
    found = texts_of([answers[0]["text"] for answers in endpoint.ask(writing, WRITING, "variants")])
    verdicts = iter(endpoint.ask(judging(found), JUDGING, "judgements"))
    kept = [[text for text in texts if YES.match(next(verdicts)[0]["text"])] for texts in found]
    dropped["refused by the judge"] = sum(map(len, found)) - sum(map(len, kept))
    print("dropped:", ", ".join(f"{count} {why}" for why, count in dropped.items() if count) or "nothing")
    return kept


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


def card(rows: Sequence[Row], guide: LabelGuide, llm: str | None = None) -> str:
    """The README.md of the pushed dataset; licence, language and corpus are those that the guide names."""
    from huggingface_hub import DatasetCard, DatasetCardData

    configs = [{"config_name": "default", "data_files": "augmented.parquet"}]
    corpus = {"license": guide.license, "language": guide.language}
    corpus |= {"source_datasets": [guide.dataset]} if guide.dataset else {}
    data = DatasetCardData(configs=configs, tags=["rareturn"], **corpus)
    numbers = {"rows": len(rows), "sources": len({row.augmented_from for row in rows})}
    parts = {"corpus": guide.dataset, "llm": llm, **numbers}
    return str(DatasetCard.from_template(data, template_str=CARD, **parts)) + "\n"


def push(
    rows: Sequence[Row], made: ScriptArguments, data: DataArguments, hub: HubArguments, guide: LabelGuide
) -> None:
    """Push the variants, and nothing else, as a dataset that `load_rows` and `datasets.load_dataset` read."""
    from rareturn.runs.hub import push_files

    repo_id = model_repo(hub.hub_namespace, hub.hub_name, "augmented")
    table = file_bytes(rows, data.columns, ".parquet")
    files = {"augmented.parquet": table, "README.md": card(rows, guide, made.llm).encode()}
    options = {"repo_type": "dataset", "private": hub.hub_private_repo, "kept_in": made.output_file}
    sha = push_files(repo_id, files, message=f"{len(rows)} augmented rows", **options)
    print(f"pushed {len(rows)} variants to {repo_id} at {sha}")


def main() -> None:
    # Arguments and logging
    own = (ScriptArguments, Endpoint, DataArguments, HubArguments)
    arguments, endpoint, data, hub = parse_arguments(own, __doc__)
    start_logging()

    if hub.push_to_hub:
        from rareturn.runs.hub import check_may_push

        check_may_push(model_repo(hub.hub_namespace, hub.hub_name, "augmented"), "dataset")

    # Data
    guide = load_label_guide(data.label_guide)
    english = not guide.language or guide.language.lower().split("-")[0] in ("en", "eng", "english")
    if not (arguments.llm or english):
        but = "but the patterns of augment.py are English; --llm MODEL writes in any language"
        raise InputError(f"{data.label_guide}: language: {guide.language!r}, {but}")
    train_file, output_file = arguments.train_file, arguments.output_file
    rows = load_rows(train_file, guide, columns=data.columns)
    originals = [row for row in rows if row.augmented_from is None]
    if hub.push_only:
        variants = load_rows(output_file, guide, columns=data.columns, sources_of_augmented=originals)
        return push(variants, arguments, data, hub, guide)
    labels = selected_labels(arguments, originals, guide)
    sources = [row for row in originals if row.label in labels]

    # Variants
    k, seed = arguments.k, arguments.seed
    if arguments.llm:
        endpoint.model, endpoint.seed = arguments.llm, seed
        texts = written_texts(sources, k, guide, endpoint)
    else:
        numbered = enumerate(sources)
        texts = [augment_text(row.turns[-1].text, number, k, f"{seed}/{row.id}") for number, row in numbered]
    made = [(source, variants_of(source, found)) for source, found in zip(sources, texts, strict=True)]
    variants = [variant for _, found in made for variant in found]
    taken = sorted({row.id for row in rows} & {variant.id for variant in variants})
    if taken:
        raise InputError(*(f"{train_file}: {name}: the file has this variant already" for name in taken))
    if not variants:
        raise InputError(f"{train_file}: no variant of {len(sources)} rows could be made")

    # Save
    write_bytes(output_file, file_bytes(variants, data.columns, Path(output_file).suffix))
    print(summary(originals, made, k, guide))
    print(f"wrote {len(variants)} variants to {output_file}")

    # Push
    if hub.push_to_hub:
        push(variants, arguments, data, hub, guide)


if __name__ == "__main__":
    run(main)
