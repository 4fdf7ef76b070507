"""Rows of labelled dialogue: where they come from, what makes them valid, how a model sees them.

A row is one utterance to classify (the target, the last turn) with the turns before it. See `Row`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from command_line import InputError, first_line

logger = logging.getLogger(__name__)

NO_LABEL = -1
HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<path>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
MAX_PROBLEMS_KEPT = 10_000
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one, UTF-8 and so every tokenizer cannot


class Turn(NamedTuple):
    """One turn of a dialogue, as the file has it."""

    text: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Row:
    """One utterance to classify.

    Attributes:
        turns: oldest first; the last is the target.
        label: the label's number, or -1 where there is none.
        augmented_from: id of the row that this one is a variant of; None for an original row.
    """

    id: str
    dialogue_id: str
    turns: tuple[Turn, ...]
    label: int = NO_LABEL
    augmented_from: str | None = None


@dataclass(frozen=True)
class Columns:
    """The names of a row's fields in the file."""

    id: str = "id"
    dialogue_id: str = "dialogue_id"
    dialogue: str = "dialogue"
    current_text: str = "current_text"
    label: str = "label"

    @classmethod
    def from_flags(cls, arguments: Any) -> Columns:
        """From a script's `<name>_column` flags."""
        return cls(
            **{item.name: getattr(arguments, f"{item.name}_column") for item in dataclasses.fields(cls)}
        )


@dataclass
class DataArguments:
    """Flags shared by every script that reads rows: the guide and the column names."""

    label_guide: str = field(
        default="label_guides/dmrs.yaml",
        metadata={
            "help": "YAML file with the labels' numbers, names and definitions. Default: the nine DMRS levels."
        },
    )
    id_column: str = field(default="id", metadata={"help": "Column of the row's id."})
    dialogue_id_column: str = field(default="dialogue_id", metadata={"help": "Column of the dialogue's id."})
    dialogue_column: str = field(
        default="dialogue",
        metadata={"help": "Column of the turns ({text, speaker}, oldest first, the target last)."},
    )
    current_text_column: str = field(
        default="current_text", metadata={"help": "Column of the target's text."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the label's number."})

    @property
    def columns(self) -> Columns:
        return Columns.from_flags(self)


# ---------------------------------------------------------------------------------------------------------- label guide


@dataclass(frozen=True)
class Label:
    """A class: its number in the rows, its name, and one sentence for the prompt."""

    number: int
    name: str
    definition: str


@dataclass(frozen=True)
class LabelGuide:
    """What the task is and which labels there are. Label numbers are 0 … n-1 and double as class indices.

    Attributes:
        positive: the labels that the macro scores average over.
        protected: the label that a decision's gate protects (the majority class), or None.
        speakers: the speakers that a turn may have.
        target_speaker: the speaker whose turns are classified.
    """

    task: str
    labels: tuple[Label, ...]
    positive: tuple[int, ...]
    protected: int | None
    speakers: tuple[str, ...]
    target_speaker: str

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def numbers(self) -> range:
        return range(len(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """The guide as the YAML file has it; `parse_label_guide` reads it back."""
        return {
            "task": self.task,
            "target_speaker": self.target_speaker,
            "speakers": list(self.speakers),
            "positive": list(self.positive),
            "protected": self.protected,
            "labels": [dataclasses.asdict(label) for label in self.labels],
        }


def load_label_guide(path: str | os.PathLike) -> LabelGuide:
    """Read a label guide; a relative path is looked up here first, then beside this file.

    Raises:
        InputError: no such file, or a guide that breaks a rule of `parse_label_guide`.
    """
    place = Path(path)
    if not place.is_absolute() and not place.exists():
        place = Path(__file__).parent / place
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the label guide: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None
    return parse_label_guide(content, str(path))


def parse_label_guide(content: Any, where: str) -> LabelGuide:
    """Check a guide's content (from YAML, or from a bundle's JSON).

    Raises:
        InputError: a missing or ill-typed entry, labels that do not count up from 0, an unknown positive label.
    """

    def demand(condition: bool, problem: str) -> None:
        if not condition:
            raise InputError(f"{where}: {problem}")

    demand(isinstance(content, dict), "a label guide is a mapping")
    unknown = set(content) - {"task", "target_speaker", "speakers", "positive", "protected", "labels"}
    demand(not unknown, f"unknown key {min(map(str, unknown), default='')!r}")
    task, entries = content.get("task"), content.get("labels")
    demand(isinstance(task, str) and bool(task.strip()), "task must be a sentence")
    demand(isinstance(entries, list) and len(entries) >= 2, "labels must list at least two labels")
    labels = []
    for position, entry in enumerate(entries):
        demand(
            isinstance(entry, dict) and set(entry) == {"number", "name", "definition"},
            f"labels: entry {position} must have number, name and definition",
        )
        demand(
            type(entry["number"]) is int and entry["number"] == position,
            f"labels: entry {position} must have number {position}, not {entry['number']!r}",
        )
        demand(
            isinstance(entry["name"], str) and bool(entry["name"].strip()),
            f"labels: {position}: name is empty",
        )
        demand(isinstance(entry["definition"], str), f"labels: {position}: definition is not a text")
        labels.append(Label(position, entry["name"].strip(), " ".join(entry["definition"].split())))
    demand(len({label.name for label in labels}) == len(labels), "labels: two labels have one name")
    positive = content.get("positive", list(range(len(labels))))
    demand(isinstance(positive, list) and bool(positive), "positive must list label numbers")
    for number in positive:
        demand(type(number) is int and 0 <= number < len(labels), f"positive: {number!r} is not a label")
    demand(len(set(positive)) == len(positive), "positive: a label stands twice")
    protected = content.get("protected")
    demand(
        protected is None or (type(protected) is int and 0 <= protected < len(labels)),
        f"protected: {protected!r} is not a label",
    )
    speakers = content.get("speakers", ["seeker", "supporter"])
    demand(
        isinstance(speakers, list)
        and bool(speakers)
        and all(isinstance(name, str) and name for name in speakers),
        "speakers must list names",
    )
    target_speaker = content.get("target_speaker", speakers[0])
    demand(target_speaker in speakers, f"target_speaker: {target_speaker!r} is not among the speakers")
    return LabelGuide(
        " ".join(task.split()),
        tuple(labels),
        tuple(sorted(positive)),
        protected,
        tuple(speakers),
        target_speaker,
    )


# -------------------------------------------------------------------------------------------------------------- reading


def read_records(source: str, split: str = "train") -> tuple[str, Iterable[Any]]:
    """Raw records of a source, and the name to call it in messages.

    Args:
        source: a .json (an array), .jsonl, .parquet or .csv file; a dataset folder (`save_to_disk`, or files that
            `datasets.load_dataset` reads); or a Hub dataset, `ORG/NAME[:path/of/file][@revision]`.
        split: the split to take where the source has several and names none.

    Raises:
        InputError: no such source, or not what its name says. Reading is lazy: iterating may raise it too.
    """
    path = Path(source)
    if path.is_file():
        return str(source), _read_file(path)
    if path.is_dir():
        return str(source), _read_dataset(source, None, split)
    match = HUB_FILE.fullmatch(source)
    if path.suffix in READERS and not (match and match["path"]):
        raise InputError(f"{source}: no such file")
    if match is None:
        raise InputError(f"{source}: no such file or folder, nor a Hub dataset ORG/NAME[:path][@revision]")
    if match["path"] is None:
        return source, _read_dataset(match["repo"], match["revision"], split)
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = hf_hub_download(match["repo"], match["path"], repo_type="dataset", revision=match["revision"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise InputError(f"{source}: cannot be fetched from the Hub: {first_line(error)}") from None
    return source, _read_file(Path(local))


def _read_file(path: Path) -> Iterable[Any]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: unknown kind of file; one of {', '.join(READERS)} is expected")
    return reader(path)


def _read_json(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one at a time: a file of any size needs the memory of its longest row."""
    decoder = json.JSONDecoder()
    buffer, place, passed, expected = "", 0, 0, "["
    with open(path, encoding="utf-8") as file:

        def more() -> bool:
            nonlocal buffer, place, passed
            passed, buffer, place = passed + place, buffer[place:], 0
            new = file.read(max(1 << 16, len(buffer)))
            buffer += new
            return bool(new)

        def fail(problem: str) -> InputError:
            return InputError(f"{path}: not valid JSON: {problem} (character {passed + place + 1})")

        try:
            while True:
                while place < len(buffer) and buffer[place] in " \t\r\n":
                    place += 1
                if place == len(buffer):
                    if more():
                        continue
                    if expected == "end":
                        return
                    raise fail("the file ends too early" if passed + place else "the file is empty")
                character = buffer[place]
                if expected == "end":
                    raise fail("something follows the array")
                if expected == "[" and character != "[":
                    raise InputError(f"{path}: a JSON file must hold an array of rows")
                if character in {"[": "[", "first": "]", "next": ",]"}.get(expected, ""):
                    expected = {"[": "first", ",": "row", "]": "end"}[character]
                    place += 1
                    continue
                if expected == "next":
                    raise fail("a comma or the end of the array is missing")
                try:
                    record, end = decoder.raw_decode(buffer, place)
                except (json.JSONDecodeError, RecursionError) as error:
                    if more():
                        continue
                    raise fail(getattr(error, "msg", "nested too deeply")) from None
                yield record
                place, expected = end, "next"
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise InputError(f"{path}: line {number}: not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text: {error}") from None


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from None


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file: {error}") from None


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_dataset(name: str, revision: str | None, split: str) -> Iterable[Any]:
    import datasets

    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the datasets library raises whatever its readers raise
        raise InputError(f"{name}: cannot be read as a dataset: {first_line(error)}") from None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise InputError(
                f"{name}: has no split {split!r} (it has {', '.join(dataset)}); name a file with {name}:path"
            )
        dataset = dataset[split]
    return dataset


# ----------------------------------------------------------------------------------------------------------- validation


def load_rows(
    source: str,
    label_guide: LabelGuide,
    *,
    columns: Columns | None = None,
    require_labels: bool = True,
    split: str = "train",
    sources_of_augmented: Sequence[Row] | None = None,
) -> list[Row]:
    """Read and check rows.

    Args:
        source: see `read_records`.
        require_labels: a missing label is an error; otherwise a label that is there is checked all the same.
        sources_of_augmented: the original rows, where the source holds augmented ones: each must name one of these,
            in the same dialogue and with the same label. None: augmented rows refer to rows of the same source.

    Raises:
        InputError: one line a problem, each naming the file, the row and the field.
    """
    columns = columns or Columns()
    where, records = read_records(source, split)
    problems: list[str] = []
    rows: list[Row] = []
    seen: set[str] = set()
    turns: dict[Turn, Turn] = {}
    for position, record in enumerate(records):
        row = _check_record(record, position, where, label_guide, columns, require_labels, turns, problems)
        if row is None:
            continue
        if row.id in seen:
            problems.append(f"{where}: {row.id}: {columns.id}: duplicate id")
        seen.add(row.id)
        rows.append(row)
        if len(problems) >= MAX_PROBLEMS_KEPT:
            break
    if not rows and not problems:
        problems.append(f"{where}: holds no rows")
    origin = {row.id: row for row in (rows if sources_of_augmented is None else sources_of_augmented)}
    for row in rows:
        if row.augmented_from is None:
            if sources_of_augmented is not None:
                problems.append(f"{where}: {row.id}: augmented_from: missing in a file of augmented rows")
            continue
        parent = origin.get(row.augmented_from)
        if parent is None or parent.augmented_from is not None:
            problems.append(f"{where}: {row.id}: augmented_from: no original row {row.augmented_from!r}")
        elif parent.dialogue_id != row.dialogue_id:
            problems.append(
                f"{where}: {row.id}: augmented_from: {row.augmented_from!r} is in dialogue {parent.dialogue_id!r}, "
                f"not {row.dialogue_id!r}"
            )
        elif parent.label != row.label:
            problems.append(
                f"{where}: {row.id}: {columns.label}: {row.label}, but its source has {parent.label}"
            )
        elif parent.turns[:-1] != row.turns[:-1] or parent.turns[-1].speaker != row.turns[-1].speaker:
            problems.append(f"{where}: {row.id}: {columns.dialogue}: its context is not its source's")
    if problems:
        raise InputError(*problems)
    return rows


def _check_record(
    record: Any,
    position: int,
    where: str,
    guide: LabelGuide,
    columns: Columns,
    require_labels: bool,
    shared_turns: dict[Turn, Turn],
    problems: list[str],
) -> Row | None:
    name = f"row {position + 1}"
    if not isinstance(record, dict):
        problems.append(f"{where}: {name}: not an object with fields")
        return None
    before = len(problems)

    def report(column: str, problem: str) -> None:
        problems.append(f"{where}: {name}: {column}: {problem}")

    def text_of(column: str) -> str | None:
        value = record.get(column)
        if value is None:
            report(column, "missing")
        elif not isinstance(value, str):
            report(column, f"must be a text, not {_kind(value)}")
        elif not value.strip():
            report(column, "empty")
        elif LONE_SURROGATE.search(value):
            report(column, "holds half a character (a lone surrogate)")
        else:
            return value
        return None

    row_id = text_of(columns.id)
    name = row_id if row_id is not None else name
    dialogue_id = text_of(columns.dialogue_id)
    current_text = text_of(columns.current_text)
    dialogue = record.get(columns.dialogue)
    if isinstance(dialogue, str):  # CSV has no lists
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            dialogue = json.loads(dialogue)
    turns: list[Turn] = []
    if dialogue is None:
        report(columns.dialogue, "missing")
    elif not isinstance(dialogue, list):
        report(columns.dialogue, f"must be a list of turns, not {_kind(dialogue)}")
    elif not dialogue:
        report(columns.dialogue, "empty")
    else:
        for number, turn in enumerate(dialogue, 1):
            text = turn.get("text") if isinstance(turn, dict) else None
            speaker = turn.get("speaker") if isinstance(turn, dict) else None
            if not isinstance(text, str) or not isinstance(speaker, str):
                report(columns.dialogue, f"turn {number} must have a text and a speaker")
            elif speaker not in guide.speakers:
                report(
                    columns.dialogue,
                    f"turn {number} has unknown speaker {speaker!r} (not {' or '.join(guide.speakers)})",
                )
            elif not text.strip():
                report(columns.dialogue, f"turn {number} is empty")
            elif LONE_SURROGATE.search(text):
                report(columns.dialogue, f"turn {number} holds half a character (a lone surrogate)")
            else:
                turn = Turn(text, speaker)
                turns.append(shared_turns.setdefault(turn, turn))
        if (
            len(turns) == len(dialogue)
            and current_text is not None
            and turns[-1].text.strip() != current_text.strip()
        ):
            report(columns.current_text, "is not the last turn's text")
    label = record.get(columns.label)
    if isinstance(label, str) and re.fullmatch(r"\d+", label.strip()):  # CSV has no integers
        label = int(label)
    if label is None or label == "":
        label = NO_LABEL
        if require_labels:
            report(columns.label, "missing")
    elif type(label) is not int:
        report(columns.label, f"must be an integer, not {_kind(label)}")
    elif label not in guide.numbers:
        report(columns.label, f"{label} is not in the label guide (0 to {len(guide.labels) - 1})")
    augmented_from = record.get("augmented_from") or None
    if augmented_from is not None and not isinstance(augmented_from, str):
        report("augmented_from", f"must be a text, not {_kind(augmented_from)}")
    if len(problems) > before:
        return None
    return Row(row_id, dialogue_id, tuple(turns), label, augmented_from)


def _kind(value: Any) -> str:
    kinds = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)


def data_fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' ids, dialogues, turns and labels in the order of their ids: tells two data sets apart."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.id):
        digest.update(
            json.dumps([row.id, row.dialogue_id, row.turns, row.label], ensure_ascii=False).encode()
        )
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ rendering


def fold_whitespace(text: str) -> str:
    """One line: inner runs of white space become one space."""
    return " ".join(text.split())


def render_turn(turn: Turn) -> str:
    """A turn as a decoder's prompt has it, closed by its newline."""
    return f"{turn.speaker.upper()}: {fold_whitespace(turn.text)}\n"


def render_instruction(guide: LabelGuide) -> str:
    """What stands before the dialogue: the task and the label guide."""
    lines = [f"{label.number}: {label.name} - {label.definition}" for label in guide.labels]
    return "\n".join([guide.task, "", "Labels:", *lines, "", "Dialogue:", ""])


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row in tokens.

    Attributes:
        pieces: int32 arrays whose concatenation is the row's sequence. A decoder's are the instruction and then one a
            turn; two rows of a dialogue with one `start` have the same arrays up to the shorter one's target.
        start: the first turn that the row sees.
        cut: whether the target itself lost its beginning.
        segment_ids: an encoder's: 0 up to the separator after the target, 1 on the context. None for decoders.
    """

    pieces: tuple[np.ndarray, ...]
    start: int
    cut: bool
    segment_ids: np.ndarray | None = None

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate(self.pieces)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


def window_start(lengths: Sequence[int], room: int, max_turns: int, window_stride: int) -> int:
    """The first turn that a row sees: at most `max_turns` turns and, target excepted, at most `room` tokens.

    The start moves in steps of `window_stride` turns, so that neighbouring rows of a long dialogue keep a common
    prefix; single steps are taken only where a whole one would pass the target.

    Args:
        lengths: tokens of each turn, the target last.
    """
    last = len(lengths) - 1
    start = max(0, -(-(len(lengths) - max_turns) // window_stride) * window_stride)
    tokens = sum(lengths[start:])
    while tokens > room and start < last:
        step = window_stride if start + window_stride <= last else 1
        tokens -= sum(lengths[start : start + step])
        start += step
    return start


class Renderer:
    """Rows to token pieces, for decoders (one prompt) and for encoders (the pair of target and context).

    Args:
        tokenizer: a fast tokenizer.
        is_encoder: render pairs.
        max_turns, max_seq_length, window_stride: the window, in turns, tokens and turns (DESIGN 4).

    Raises:
        InputError: a window that holds no target.
    """

    def __init__(
        self,
        tokenizer: Any,
        guide: LabelGuide,
        *,
        is_encoder: bool,
        max_turns: int = 30,
        max_seq_length: int = 1024,
        window_stride: int = 10,
    ):
        if not 1 <= window_stride <= max_turns:
            raise InputError(
                f"window_stride must be between 1 and max_turns ({max_turns}), not {window_stride}"
            )
        self.tokenizer = tokenizer
        self.is_encoder = is_encoder
        self.max_turns, self.max_seq_length, self.window_stride = max_turns, max_seq_length, window_stride
        self.instruction = "" if is_encoder else render_instruction(guide)
        if is_encoder:
            self._template = _pair_template(tokenizer)
            fixed = sum(map(len, self._template))
        else:
            with_special = tokenizer(self.instruction)["input_ids"]
            has_bos = tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]
            ids = tokenizer(self.instruction, add_special_tokens=False)["input_ids"]
            self.prefix = np.array([tokenizer.bos_token_id] * has_bos + ids, dtype=np.int32)
            fixed = len(self.prefix)
        self.room = max_seq_length - fixed
        if self.room < 8:
            raise InputError(
                f"max_seq_length {max_seq_length} leaves {self.room} tokens for the dialogue: the label guide and the "
                f"special tokens take {fixed}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides how a row is rendered, the tokenizer aside."""
        facts = [self.is_encoder, self.instruction, self.max_turns, self.max_seq_length, self.window_stride]
        facts.append(render_turn(Turn("text", "speaker")))
        return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()

    def render(self, rows: Sequence[Row]) -> list[Rendered]:
        """The rows in tokens, in their order; each distinct turn is tokenized once. Warns how many targets were cut."""
        turns = {turn for row in rows for turn in row.turns[-self.max_turns :]}
        if self.is_encoder:
            turns |= {_alone(row.turns[-1]) for row in rows}
        distinct, tokens = list(turns), {}
        for begin in range(0, len(distinct), 4096):
            chunk = distinct[begin : begin + 4096]
            texts = [self._text(turn) for turn in chunk]
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for turn, ids in zip(chunk, encoded["input_ids"], strict=True):
                tokens[turn] = np.array(ids, dtype=np.int32)
        render = self._render_pair if self.is_encoder else self._render_prompt
        rendered = [render(row, tokens) for row in rows]
        cut = sum(item.cut for item in rendered)
        if cut:
            logger.warning(
                f"{cut} of {len(rows)} targets are longer than {self.room} tokens and lost their beginning"
            )
        return rendered

    def _text(self, turn: Turn) -> str:
        if not turn.speaker:
            return fold_whitespace(turn.text)
        return render_turn(turn).rstrip("\n") if self.is_encoder else render_turn(turn)

    def _render_prompt(self, row: Row, tokens: dict[Turn, np.ndarray]) -> Rendered:
        # Turns before the window can hold no token of the row, so they are not looked at (nor tokenized).
        skipped = max(0, len(row.turns) - self.max_turns)
        pieces = [tokens[turn] for turn in row.turns[skipped:]]
        lengths = [0] * skipped + [len(piece) for piece in pieces]
        start = window_start(lengths, self.room, self.max_turns, self.window_stride)
        pieces = pieces[start - skipped :]
        cut = len(pieces[-1]) > self.room
        if cut:
            pieces[-1] = pieces[-1][-self.room :]
        return Rendered((self.prefix, *pieces), start, cut)

    def _render_pair(self, row: Row, tokens: dict[Turn, np.ndarray]) -> Rendered:
        target = tokens[_alone(row.turns[-1])]
        cut = len(target) > self.room
        target = target[-self.room :]
        skipped = max(0, len(row.turns) - self.max_turns)
        context = [tokens[turn] for turn in row.turns[skipped:-1]]
        room = self.room - len(target)
        joined = np.concatenate(context)[-room:] if context and room else np.zeros(0, dtype=np.int32)
        begin, middle, end = self._template
        segments = np.zeros(len(begin) + len(target) + len(middle) + len(joined) + len(end), dtype=np.int32)
        segments[len(begin) + len(target) + len(middle) :] = 1
        return Rendered((begin, target, middle, joined, end), skipped, cut, segments)


def _alone(turn: Turn) -> Turn:
    """An encoder's target: the text without its speaker."""
    return Turn(turn.text, "")


def _pair_template(tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The special tokens before, between and after a pair, learnt from an example pair."""
    example = tokenizer("a", "b", return_special_tokens_mask=True)
    ids = np.array(example["input_ids"], dtype=np.int32)
    body = np.flatnonzero(np.array(example["special_tokens_mask"]) == 0)
    gap = int(np.flatnonzero(np.diff(body) > 1)[0])
    return ids[: body[0]], ids[body[gap] + 1 : body[gap + 1]], ids[body[-1] + 1 :]
