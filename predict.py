# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Classify new dialogues with a published ensemble.

    python predict.py --ensemble ORG/NAME --input dialogues.jsonl --output labels.jsonl
On a laptop, with the ensemble that `make demo` leaves:
    python predict.py --ensemble outputs/demo --input data/demo/test.json --turns last --output labels.jsonl

A dialogue is an object with `dialogue` (turns {"text", "speaker"}) and `dialogue_id` or `id`, and streamed; or the
input is a table of utterances. A .jsonl output has one line a classified turn: ids, label, probabilities, and by what it
was decided; no text. A .csv or .tsv output is the input's table with the columns label, probability (the label's) and
margin (over the next label's; below 0 where the rule overruled it). A run that was stopped goes on where it was. Several
GPUs: `accelerate launch predict.py …` or `torchrun --nproc_per_node N predict.py …`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rareturn.command_line import REQUIRED, flag, parse_arguments, run, start_logging
from rareturn.data.dialogues import Row, row_json
from rareturn.data.label_guide import LabelGuide
from rareturn.data.readers import DELIMITERS, read_records
from rareturn.data.rows import ColumnArguments, open_source
from rareturn.data.utterances import table_bytes
from rareturn.errors import InputError
from rareturn.runs.bundle import read_bundle
from rareturn.runs.references import check_name

ADDED = ("label", "probability", "margin")  # a table's columns


@dataclass(kw_only=True)
class PredictArguments(ColumnArguments):
    """What is classified, by what, and where the labels go."""

    _argument_group_name = "Prediction"

    ensemble: str = flag(REQUIRED, "ORG/NAME[@revision] on the Hub, or ensemble.py's output folder.")
    input: str = flag(REQUIRED, "Dialogues or a table of utterances: a file, a folder or a Hub id.")
    output: str = flag(REQUIRED, "File to write: .jsonl, or .csv or .tsv for a table.")
    turns: str = flag("all", "Which turns of the target speaker to classify.", choices=["all", "last"])
    rows_per_chunk: int = flag(256, "Turns between two writes. More is faster and takes more memory.")
    trust_remote_code: list[str] = flag([], "Names of base models that may run Python code of their own.")
    use_cpu: bool = flag(False, "Stay off the GPU.")

    def __post_init__(self) -> None:
        if Path(self.output).suffix not in (".jsonl", *DELIMITERS):
            raise ValueError(f"--output {self.output}: a .jsonl, .csv or .tsv file expected")
        if self.rows_per_chunk < 1:
            raise ValueError("--rows_per_chunk: one or more")


def read_chunks(arguments: PredictArguments, guide: LabelGuide) -> Iterator[list[Row]]:
    """Whole dialogues, at least `rows_per_chunk` rows but in the last."""
    from rareturn.classifier import rows_by_dialogue

    name, columns = arguments.input, arguments.columns
    records, is_table = open_source(name, "test", guide, columns)
    chunk: list[Row] = []
    for rows in rows_by_dialogue(records, is_table, name, guide, columns, arguments.turns):
        chunk += rows
        if len(chunk) >= arguments.rows_per_chunk:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def check_table(arguments: PredictArguments, guide: LabelGuide) -> None:
    """Refuse to write a table of whole dialogues, or over a table's own columns."""
    records, is_table = open_source(arguments.input, "test", guide, arguments.columns)
    if not is_table:
        problem = f"{arguments.input} is no table of utterances; name a .jsonl file"
        raise InputError(f"--output {arguments.output}: {problem}")
    first = next(records)
    if taken := [column for column in ADDED if column in first]:
        where = f"{arguments.input}: {', '.join(taken)}: there already, and predict.py would write over it"
        raise InputError(f"{where}; rename it, or name a .jsonl file as --output")


def output_line(row: Row, said: Any, table: bool, named: bool | None) -> dict[str, Any]:
    """What the output says of a row, given its `Prediction`; for a table the cells, and the place of their line."""
    if not table:
        return {"id": row.id, "dialogue_id": row.dialogue_id, **vars(said)}
    of_label = said.probabilities[said.label_name]
    others = max(value for name, value in said.probabilities.items() if name != said.label_name)
    cells = (said.label_name if named else said.label, of_label, round(of_label - others, 6))
    return {"place": row.place, **dict(zip(ADDED, cells, strict=True))}


def part_path(output: Path, rank: int) -> Path:
    """Where a process keeps the chunks that it has done."""
    return output.with_name(f".{output.name}.part-{rank}")


class Progress:
    """Chunks that are done, a line of JSON each, beside the output: what a stopped run goes on from.

    `job` is a digest of input, ensemble and flags; lines of another job are thrown away.
    """

    def __init__(self, output: Path, rank: int, job: str):
        self.path = part_path(output, rank)
        self.done = 0
        if self.path.exists():
            with open(self.path, "rb+") as file:
                whole = file.readline() == f"{job}\n".encode()
                end = file.tell()
                while whole and file.readline().endswith(b"\n"):
                    self.done, end = self.done + 1, file.tell()
                file.truncate(end if whole else 0)
        self.file = open(self.path, "ab")  # noqa: SIM115 (it stays open for the whole run)
        if not self.file.tell():
            self.write(job.encode())

    def write(self, line: bytes) -> None:
        """Append a line; it counts as done once it is on the disk."""
        try:
            self.file.write(line + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            problem = f"{error.strerror}; what is done stays, repeat to go on"
            raise InputError(f"{self.path}: cannot write: {problem}") from None


def merge(output: Path, job: str, num_processes: int, num_chunks: int, source: str | None = None) -> None:
    """Write the output from all processes' chunks, in the order of the input; `source` is the table that they fill in.

    An InputError where a process's chunks are not there, so that the output would be incomplete.
    """
    paths = [part_path(output, rank) for rank in range(num_processes)]
    for rank, path in enumerate(paths):
        lines = path.read_bytes().splitlines() if path.is_file() else []
        if lines[:1] != [job.encode()] or len(lines) != 1 + len(range(rank, num_chunks, num_processes)):
            problem = f"does not hold all chunks of process {rank}; all processes must write to one folder"
            raise InputError(f"{path}: {problem}")
    scratch = output.with_name(f".{output.name}.{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(scratch.unlink, missing_ok=True)
        parts = [stack.enter_context(open(path, "rb")) for path in paths]
        for part in parts:
            next(part)
        file = stack.enter_context(open(scratch, "wb"))
        chunks = itertools.chain.from_iterable(itertools.zip_longest(*parts, fillvalue=b"[]"))
        lines = (line for chunk in chunks for line in json.loads(chunk))
        if source is None:
            file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        else:
            records = list(read_records(source, "test"))
            for line in lines:
                records[line.pop("place")] |= line
            file.write(table_bytes(records, output.suffix))
        file.flush()
        os.fsync(file.fileno())
        os.replace(scratch, output)
    for path in paths:
        path.unlink()


def main() -> None:
    # Arguments
    (arguments,) = parse_arguments((PredictArguments,), __doc__)
    output = Path(arguments.output)
    if arguments.use_cpu:
        # Before torch looks: the models' loaders take a GPU that they see.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch
    from accelerate import PartialState

    from rareturn.classifier import DialogueClassifier

    state = PartialState(cpu=arguments.use_cpu or not torch.cuda.is_available())

    # Logging
    start_logging(logging.INFO if state.is_main_process else logging.ERROR)

    # Data
    bundle, _ = read_bundle(arguments.ensemble)
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    table = None if output.suffix == ".jsonl" else arguments.input
    if table:
        check_table(arguments, bundle.guide)

    # The whole input is read once, before any model is loaded.
    total, num_chunks, digest = 0, 0, hashlib.sha256()
    for chunk in read_chunks(arguments, bundle.guide):
        total, num_chunks = total + len(chunk), num_chunks + 1
        digest.update(row_json([(row.id, row.dialogue_id, row.turns) for row in chunk]))
    if not total:
        whose = " or ".join(map(repr, bundle.guide.targets)) or "any"
        raise InputError(f"{arguments.input}: no turn of the target speaker {whose} to classify")
    facts = [bundle.model_dump_json(), arguments.rows_per_chunk, state.num_processes, digest.hexdigest()]
    job = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # Model
    classifier = DialogueClassifier.from_pretrained(arguments.ensemble, arguments.trust_remote_code)

    # Predict and save
    progress = Progress(output, state.process_index, job)
    chunks = enumerate(read_chunks(arguments, bundle.guide))
    mine = itertools.islice(chunks, state.process_index, None, state.num_processes)
    with tqdm(total=total, unit="turn", desc="predict", disable=not state.is_main_process) as bar:
        for number, rows in mine:
            if number // state.num_processes >= progress.done:
                named = bundle.runs[0].labels_named
                lines = [
                    output_line(*said, table is not None, named) for said in classifier.predictions(rows)
                ]
                progress.write(json.dumps(lines, ensure_ascii=False).encode())
            bar.update(len(rows) * state.num_processes)
    progress.file.close()
    state.wait_for_everyone()
    if state.is_main_process:
        merge(output, job, state.num_processes, num_chunks, table)
        print(f"{output}: {total} turns classified by {check_name(bundle.name, 'name')}")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    run(main)
