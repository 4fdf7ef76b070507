"""The label guide: what the task is, which labels there are, who speaks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, Field, StrictInt, StrictStr, ValidationInfo, field_validator

from rareturn.errors import InputError
from rareturn.files import check_content, packaged


def fold_whitespace(text: str) -> str:
    """One line: inner runs of white space become one space."""
    return " ".join(text.split())


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


Definition = Annotated[StrictStr, AfterValidator(fold_whitespace)]
Text = Annotated[Definition, AfterValidator(_not_empty)]
Numbers = Annotated[tuple[StrictInt, ...], Field(min_length=1)]
Name = Annotated[StrictStr, AfterValidator(str.strip), AfterValidator(_not_empty)]


class Label(BaseModel, frozen=True, extra="forbid"):
    """A class: its number in the rows, its name, and one sentence for the prompt."""

    number: StrictInt
    name: Name
    definition: Definition


class LabelGuide(BaseModel, frozen=True, extra="forbid"):
    """What the task is and which labels there are. Label numbers are 0 … n-1 and double as class indices.

    `positive` are the labels that the macro scores average over (all by default); `protected` is the one that a
    decision's gate protects (the majority class).
    """

    # A field's check sees the fields above it, so the order matters. What the corpus is stands in the Hub's words.
    task: Text
    license: Text | None = None
    language: Text | None = None
    dataset: Text | None = None
    speakers: Annotated[tuple[Annotated[StrictStr, AfterValidator(_not_empty)], ...], Field(min_length=1)]
    target_speaker: StrictStr | None = Field(None, validate_default=True)
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    positive: Numbers | None = Field(None, validate_default=True)
    protected: StrictInt | None = None

    @field_validator("target_speaker")
    @classmethod
    def _speaks(cls, name: str | None, info: ValidationInfo) -> str | None:
        speakers = info.data.get("speakers", (name,))
        if name is None and len(speakers) == 1:
            return speakers[0]
        if name is None:
            whose = (
                f"whose turns are classified ({listed(speakers)}), such as 'target_speaker: {speakers[0]}'"
            )
            raise ValueError(f"missing; write {whose}")
        if name not in speakers:
            raise ValueError(f"{name!r} is not among the speakers ({listed(speakers)})")
        return name

    @field_validator("labels")
    @classmethod
    def _count_up(cls, labels: tuple[Label, ...]) -> tuple[Label, ...]:
        for position, label in enumerate(labels):
            if label.number != position:
                raise ValueError(f"entry {position} must have number {position}, not {label.number}")
        if len({label.name for label in labels}) < len(labels):
            raise ValueError("two labels have the same name")
        return labels

    @field_validator("positive", "protected")
    @classmethod
    def _are_labels(cls, given: tuple[int, ...] | int | None, info: ValidationInfo) -> Any:
        if "labels" not in info.data:
            return given
        known, one = range(len(info.data["labels"])), info.field_name == "protected"
        if given is None:
            return None if one else tuple(known)
        numbers = [given] if one else sorted(given)
        if unknown := set(numbers).difference(known):
            raise ValueError(f"{min(unknown)} is not a label")
        if len(set(numbers)) < len(numbers):
            raise ValueError("a label is listed twice")
        return given if one else tuple(numbers)

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def numbers(self) -> range:
        return range(len(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """The guide as the YAML file has it; `parse_label_guide` reads it back."""
        unnamed = {key for key in ("license", "language", "dataset") if getattr(self, key) is None}
        return self.model_dump(mode="json", exclude=unnamed)


def listed(names: Sequence[str], shown: int = 5) -> str:
    """Names for a message: all of them, or the first few and how many more there are."""
    if len(names) <= shown:
        return " or ".join(names)
    return f"{', '.join(names[:shown])} or one of {len(names) - shown} more"


def load_label_guide(path: str | os.PathLike) -> LabelGuide:
    """Read and check a guide; a relative path is looked up here first, then among the guides of this project."""
    place = Path(path) if Path(path).exists() else packaged(path)
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the label guide: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None
    return parse_label_guide(content, str(path))


def parse_label_guide(content: Any, where: str) -> LabelGuide:
    """A guide from YAML, a run or a bundle; an InputError has a line for each bad key."""
    return check_content(LabelGuide, content, where)
