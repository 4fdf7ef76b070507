# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Examples of a guide's labels, written by a large model, as a table for --extra_train_file.

    python scripts/write_examples.py --label_guide data/german/label_guide.yaml --llm qwen3-8b \\
        --base_url http://localhost:8000/v1 --about "calls of tenants to their housing office" --output_file examples.csv
    python scripts/write_examples.py --label_guide data/german/label_guide.yaml

Each label is asked for in several requests, each for another style. The model gets the guide and nothing of the corpus.
Without --llm the prompts are printed, to be asked by hand. Answers are kept, as those of augment.py --llm: the same command
goes on where it stopped, and costs nothing once it is complete. Read what was written before you train on it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import flag, parse_arguments, run, start_logging
from rareturn.data.dialogues import text_problem
from rareturn.data.label_guide import LabelGuide, fold_whitespace, load_label_guide
from rareturn.data.readers import DELIMITERS
from rareturn.data.rows import DataArguments
from rareturn.data.utterances import table_bytes, table_columns
from rareturn.endpoint import Asking, Endpoint, lists_in, prompt_template
from rareturn.errors import InputError
from rareturn.files import write_bytes
from rareturn.reports.tables import Table

STYLES = (
    "The answers are a sentence or two.",
    "The answers are two or three long sentences, with details of a life.",
    "The answers are casual, in lower case, with slang and a few typos.",
    "The answers are short, and the topics are unusual.",
)
PER_ANSWER = 10  # examples; more would not fit into --max_new_tokens


@dataclass(kw_only=True)
class ExampleArguments:
    _argument_group_name = "Examples"

    output_file: str = flag("examples.csv", "Where the table goes: .csv or .tsv.")
    number: int = flag(
        80, "Examples to ask for, of each label; label_guides/dmrs_examples.csv has 74 to 104."
    )
    about: str | None = flag(
        None, "What the conversations are, in a few words: they are for a classifier of such."
    )
    llm: str | None = flag(None, "Model that writes. Default: print the prompts.")
    seed: int = flag(42, "Seed of the requests.")

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"--number must be 1 or more, not {self.number}")
        if Path(self.output_file).suffix not in DELIMITERS:
            raise ValueError(f"--output_file must end with .csv or .tsv, not {self.output_file}")


def make_prompts(guide: LabelGuide, number: int, about: str | None) -> list[tuple[int, str]]:
    """Label and prompt of each request for `number` examples."""
    first, target = guide.example_speakers
    parts = {"guide": guide, "number": number, "about": about, "first": first, "target": target}
    template = prompt_template("examples")
    wanted = itertools.product(guide.labels, STYLES)
    return [(label.number, template.render(parts, label=label, style=style)) for label, style in wanted]


def pairs_in(answer: str) -> list[tuple[str, str]]:
    """The pairs of texts in an answer, whatever stands around them, also where it was cut off; not its thoughts."""
    lists = lists_in(answer.rpartition("</think>")[2])
    return [tuple(pair) for pair in lists if len(pair) == 2 and not any(map(text_problem, pair))]


def make_table(
    found: Mapping[int, Sequence[tuple[str, str]]], guide: LabelGuide, columns: Mapping[str, str]
) -> list[dict]:
    """The pairs of each label as lines of a table; the label stands by the second."""
    speakers, records = guide.example_speakers, []
    for label, pairs in found.items():
        for number, pair in enumerate(pairs, 1):
            for turn, text in enumerate(pair, 1):
                cells = {
                    "dialogue_id": f"example-{label}-{number:03d}",
                    "turn": turn,
                    "speaker": speakers[turn - 1],
                }
                cells |= {"text": fold_whitespace(text), "label": guide.names[label] if turn == 2 else ""}
                records.append({columns[name]: cell for name, cell in cells.items()})
    return records


def main() -> None:
    arguments, endpoint, data = parse_arguments((ExampleArguments, Endpoint, DataArguments), __doc__)
    start_logging()
    guide = load_label_guide(data.label_guide)
    samples = math.ceil(arguments.number / (PER_ANSWER * len(STYLES))) if arguments.llm else 1
    prompts = make_prompts(guide, math.ceil(arguments.number / (samples * len(STYLES))), arguments.about)
    if not arguments.llm:
        return print(*(prompt for _, prompt in prompts), sep=f"\n\n{'-' * 100}\n\n")

    # Ask
    endpoint.model, endpoint.seed = arguments.llm, arguments.seed
    texts, writing = [prompt for _, prompt in prompts], Asking(samples=samples)
    endpoint.plan([(text, writing) for text in texts])
    answers = endpoint.ask(texts, writing, "examples")

    # Save, each answer once
    found: dict[int, list[tuple[str, str]]] = {label: [] for label in guide.numbers}
    seen: set[str] = set()
    for (label, _), of_prompt in zip(prompts, answers, strict=True):
        for pair in itertools.chain(*(pairs_in(answer["text"]) for answer in of_prompt)):
            folded = fold_whitespace(pair[1]).casefold()
            found[label] += [pair] * (folded not in seen)
            seen.add(folded)
    if lacking := [guide.names[label] for label, pairs in found.items() if not pairs]:
        raise InputError(f"{endpoint.host}: no pair of texts in the answers for {', '.join(lacking)}")
    table = make_table(found, guide, table_columns(data.columns, guide))
    write_bytes(arguments.output_file, table_bytes(table, Path(arguments.output_file).suffix))
    counts = [(f"{label} {guide.names[label]}", str(len(pairs))) for label, pairs in found.items()]
    print(Table(f"Examples in {arguments.output_file}", ("label", "examples"), counts).text())


if __name__ == "__main__":
    run(main)
