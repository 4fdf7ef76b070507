"""Classify new dialogues with a published ensemble.

    python predict.py --ensemble ORG/NAME --input dialogues.jsonl --output labels.jsonl
On a laptop, with the ensemble that `make demo` leaves:
    python predict.py --ensemble outputs/demo --input data/demo/test.json --turns last --output labels.jsonl

A dialogue is an object with `dialogue` (turns {"text", "speaker"}) and `dialogue_id` or `id`. The output has one line a
classified turn: ids, label, probabilities, and by what it was decided; no text. Input is streamed; a run that was
stopped goes on where it was. Several GPUs: `accelerate launch predict.py …` or `torchrun --nproc_per_node N predict.py …`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from rareturn.classifier import DefenseClassifier, check_dialogue, target_rows
from rareturn.command_line import parse_arguments, run
from rareturn.data.label_guide import LabelGuide, parse_label_guide
from rareturn.data.readers import read_records
from rareturn.data.rows import Row
from rareturn.errors import InputError
from rareturn.runs.bundle import read_bundle
from rareturn.runs.references import check_name


@dataclass
class PredictArguments:
    """What is classified, by what, and where the labels go."""

    ensemble: str = field(
        metadata={"help": "Ensemble: ORG/NAME[@revision] on the Hub, or ensemble.py's output folder."}
    )
    input: str = field(
        metadata={"help": "Dialogues: .json (an array), .jsonl, .parquet, .csv, a dataset folder or Hub id."}
    )
    output: str = field(metadata={"help": "File to write, .jsonl: one line a classified turn."})
    turns: str = field(
        default="all",
        metadata={
            "help": "Classify all turns of the target speaker, or the last one only.",
            "choices": ["all", "last"],
        },
    )
    dialogue_column: str = field(default="dialogue", metadata={"help": "Field of the turns."})
    rows_per_chunk: int = field(
        default=256,
        metadata={"help": "Turns to classify between two writes. More is faster and takes more memory."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let a base model run its own Python code."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay off the GPU."})

    def __post_init__(self) -> None:
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"--output {self.output}: a .jsonl file expected")
        if self.rows_per_chunk < 1:
            raise ValueError("--rows_per_chunk: one or more")


def read_dialogues(arguments: PredictArguments, guide: LabelGuide) -> Iterator[list[Row]]:
    """The rows to classify of each dialogue, in the order of the input.

    Raises:
        InputError: while iterating, a dialogue that is wrong.
    """
    name, records = read_records(arguments.input, "test")
    for number, record in enumerate(records, 1):
        where = f"{name}: dialogue {number}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: not an object with fields")
        dialogue_id = record.get("id", record.get("dialogue_id"))
        if not isinstance(dialogue_id, str) or not dialogue_id.strip():
            raise InputError(f"{where}: id: an id or a dialogue_id must be there, and be a text")
        dialogue = record.get(arguments.dialogue_column)
        if isinstance(dialogue, str):  # CSV has no lists
            try:
                dialogue = json.loads(dialogue)
            except (json.JSONDecodeError, RecursionError):
                raise InputError(
                    f"{name}: {dialogue_id}: {arguments.dialogue_column}: not valid JSON"
                ) from None
        turns = check_dialogue(dialogue, guide, f"{name}: {dialogue_id}: {arguments.dialogue_column}")
        yield list(target_rows(dialogue_id, turns, guide, arguments.turns))


def check_input(arguments: PredictArguments, guide: LabelGuide) -> int:
    """Read the whole input once, before any model is loaded: the number of turns to classify.

    Raises:
        InputError: a dialogue that is wrong, or nothing to classify.
    """
    count = sum(map(len, read_dialogues(arguments, guide)))
    if not count:
        raise InputError(f"{arguments.input}: no turn of speaker {guide.target_speaker!r} to classify")
    return count


def in_chunks(dialogues: Iterable[list[Row]], rows_per_chunk: int) -> Iterator[list[Row]]:
    """Whole dialogues together, in chunks of at least so many rows (the last has the rest)."""
    chunk: list[Row] = []
    for rows in dialogues:
        chunk += rows
        if len(chunk) >= rows_per_chunk:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Progress:
    """Chunks that are done, a line of JSON each, beside the output: what a stopped run goes on from.

    Args:
        job: a digest of input, ensemble and flags; lines of another job are thrown away.
    """

    def __init__(self, output: Path, rank: int, job: str):
        self.path = output.with_name(f".{output.name}.part-{rank}")
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
            raise InputError(
                f"{self.path}: cannot write: {error.strerror}; what is done stays, repeat to go on"
            ) from None

    def lines(self) -> Iterator[bytes]:
        """The chunks that are done."""
        with open(self.path, "rb") as file:
            next(file)
            yield from file


def describe(row: Row, prediction: Any) -> dict[str, Any]:
    """An output line: no word of the dialogue."""
    return {"id": row.id, "dialogue_id": row.dialogue_id, **prediction.to_dict()}


def merge(progress: list[Progress], output: Path) -> int:
    """Write the output from all processes' chunks, in the order of the input; the number of lines."""
    scratch = output.with_name(f".{output.name}.{os.getpid()}")
    count = 0
    with open(scratch, "w", encoding="utf-8") as file:
        for chunk in itertools.chain.from_iterable(
            itertools.zip_longest(*(part.lines() for part in progress))
        ):
            for line in json.loads(chunk) if chunk else []:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, output)
    for part in progress:
        part.file.close()
        part.path.unlink()
    return count


def main() -> None:
    # Arguments
    (arguments,) = parse_arguments((PredictArguments,), __doc__)
    state = PartialState(cpu=arguments.use_cpu or not torch.cuda.is_available())
    output = Path(arguments.output)

    # Logging
    logging.basicConfig(
        level=logging.INFO if state.is_main_process else logging.ERROR, format="%(levelname)s %(message)s"
    )

    # Data
    bundle, _ = read_bundle(arguments.ensemble)
    guide = parse_label_guide(bundle["label_guide"], f"{arguments.ensemble}: label_guide")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    total = check_input(arguments, guide)
    facts = [
        bundle,
        arguments.turns,
        arguments.rows_per_chunk,
        arguments.dialogue_column,
        state.num_processes,
        total,
    ]
    source = Path(arguments.input)
    if source.is_file():
        facts += [source.stat().st_size, source.stat().st_mtime_ns]
    job = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    # Model
    classifier = DefenseClassifier.from_pretrained(arguments.ensemble, arguments.trust_remote_code)

    # Predict and save
    progress = Progress(output, state.process_index, job)
    chunks = in_chunks(read_dialogues(arguments, guide), arguments.rows_per_chunk)
    mine = itertools.islice(enumerate(chunks), state.process_index, None, state.num_processes)
    with tqdm(total=total, unit="turn", desc="predict", disable=not state.is_main_process) as bar:
        for number, rows in mine:
            if number // state.num_processes >= progress.done:
                lines = [describe(row, prediction) for row, prediction in classifier.predictions(rows)]
                progress.write(json.dumps(lines, ensure_ascii=False).encode())
            bar.update(len(rows) * state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        parts = [progress] + [Progress(output, rank, job) for rank in range(1, state.num_processes)]
        count = merge(parts, output)
        print(f"{output}: {count} turns classified by {check_name(bundle['name'], 'name')}")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    run(main)
