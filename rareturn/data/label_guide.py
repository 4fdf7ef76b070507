"""The label guide: what the task is, which labels there are, who speaks."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rareturn.errors import InputError
from rareturn.files import packaged


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
        place = packaged(place)
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
