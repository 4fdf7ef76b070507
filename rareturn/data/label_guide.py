"""The label guide: what the task is, which labels there are, who speaks."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, PlainSerializer, StrictInt, StrictStr, ValidationInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator, WrapValidator, field_validator

from rareturn.errors import InputError
from rareturn.files import check_content, packaged

logger = logging.getLogger(__name__)

ANY = "any"  # as `speakers`: whoever speaks; as `target_speaker`: everyone's turns are classified
TableField = Literal["dialogue_id", "turn", "speaker", "text", "label", "id"]
TABLE_FIELDS = get_args(TableField)


def fold_whitespace(text: str) -> str:
    """One line: inner runs of white space become one space."""
    return " ".join(text.split())


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


# Every score that is given; a guide's `metric` is one of them, or the F1 of one label (`find_metric`).
METRIC_NAMES = (
    "accuracy",
    "macro_f1_positive",
    "macro_precision_positive",
    "macro_recall_positive",
    "macro_f1",
    "weighted_f1",
    "balanced_accuracy",
    "kappa",
)
METRICS_HELP = f"{', '.join(METRIC_NAMES)}, or f1:LABEL, a label's number or name"
DEFAULT_METRIC = "macro_f1_positive"


def find_metric(name: str, label_names: Sequence[str]) -> str:
    """A metric by its name; `f1:LABEL`, by the label's number or name, becomes `f1:NUMBER`. A ValueError for any other.

    A number is always the label's own, even where another label is named like it.
    """
    if name in METRIC_NAMES:
        return name
    kind, _, label = name.partition(":")
    if kind != "f1":
        raise ValueError(f"{name!r} is not one of {METRICS_HELP}")
    numbers = {known: number for number, known in enumerate(label_names)}
    numbers |= {str(number): number for number in range(len(label_names))}
    if label not in numbers:
        raise ValueError(f"{name!r}: no label has this number or name")
    return f"f1:{numbers[label]}"


Definition = Annotated[StrictStr, AfterValidator(fold_whitespace)]
Text = Annotated[Definition, AfterValidator(_not_empty)]
Numbers = Annotated[tuple[StrictInt, ...], Field(min_length=1)]
Name = Annotated[StrictStr, AfterValidator(str.strip), AfterValidator(_not_empty)]
Names = Annotated[tuple[Name, ...], Field(min_length=1), PlainSerializer(lambda names: names)]
AnyNames = Annotated[Names, WrapValidator(lambda given, check: given if given == ANY else check(given))]
WORD = (str, type(None))
Distance = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Targets = Annotated[Names, WrapValidator(lambda given, check: given if type(given) in WORD else check(given))]


class Label(BaseModel, frozen=True, extra="forbid"):
    """A class: its number in the rows, its name, and one sentence for the prompt, which may be left empty."""

    number: StrictInt
    name: Name
    definition: Annotated[Definition, BeforeValidator(lambda text: "" if text is None else text)]


class LabelGuide(BaseModel, frozen=True, extra="forbid"):
    """What the task is and which labels there are. Label numbers are 0 … n-1 and double as class indices.

    `positive` are the labels that the macro scores average over (all by default); `protected` is the one that a
    decision's gate protects (the majority class). `columns` are what the corpus's tables call theirs, and `no_label` the
    cells of their label column that mean "context only". `metric` is what is optimised, and shown first: see
    `find_metric`. `distances` between labels, a row a label, are for the loss of that name. docs/YOUR_CORPUS.md has every
    key and its default.
    """

    # A field's check sees the fields above it, so the order matters. What the corpus is stands in the Hub's words.
    task: Text
    license: Text | None = None
    language: Text | None = None
    dataset: Text | None = None
    columns: dict[TableField, Name] = {}
    no_label: tuple[Annotated[StrictStr, AfterValidator(str.strip)], ...] = ()
    speakers: AnyNames
    speaker_names: Literal["letters", "as_is"] = "letters"
    target_speaker: Targets = Field(None, validate_default=True)
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    positive: Numbers | None = Field(None, validate_default=True)
    protected: StrictInt | None = None
    metric: StrictStr = DEFAULT_METRIC
    distances: tuple[tuple[Distance, ...], ...] | None = None

    @field_validator("target_speaker")
    @classmethod
    def _speak(
        cls, given: str | tuple[str, ...] | None, info: ValidationInfo
    ) -> str | tuple[str, ...] | None:
        speakers = info.data.get("speakers")
        if speakers is None or (given is not None and ANY in (given, speakers)):
            return given
        if given is None and speakers != ANY and len(speakers) == 1:
            return speakers[0]
        if given is None:
            names, first = (ANY, ANY) if speakers == ANY else (listed(speakers), speakers[0])
            whose = f"whose turns are classified ({names}), such as 'target_speaker: {first}'"
            raise ValueError(f"missing; write {whose}")
        for name in (given,) if isinstance(given, str) else given:
            if name not in speakers:
                raise ValueError(f"{name!r} is not among the speakers ({listed(speakers)})")
        return given

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

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str, info: ValidationInfo) -> str:
        if "labels" in info.data:
            find_metric(metric, [label.name for label in info.data["labels"]])
        return metric

    @field_validator("distances")
    @classmethod
    def _lie_between_labels(cls, rows: tuple[tuple[float, ...], ...] | None, info: ValidationInfo) -> Any:
        if rows is None or "labels" not in info.data:
            return rows
        count = len(info.data["labels"])
        if [len(row) for row in rows] != [count] * count:
            raise ValueError(f"must be {count} rows of {count} numbers, one for each label")
        for one, other in itertools.combinations_with_replacement(range(count), 2):
            there, back = rows[one][other], rows[other][one]
            if there != back or (one == other and there):
                raise ValueError(f"from {one} to {other} it is {there:g}, and back {back:g}")
        return rows

    @functools.cached_property
    def known_labels(self) -> dict[str, int]:
        """What a label may be in data: its name, or its number unless some name reads as a number (such as 1 to 5)."""
        names = {label.name: label.number for label in self.labels}
        counted = any(name.lstrip("-").isdecimal() for name in names)
        return names if counted else {str(number): number for number in self.numbers} | names

    @functools.cached_property
    def targets(self) -> tuple[str, ...]:
        """The names in `target_speaker`; none where it is `any`."""
        given = self.target_speaker
        return () if given == ANY else (given,) if isinstance(given, str) else given

    def is_target(self, speaker: str) -> bool:
        """Whether this speaker's turns are classified."""
        return not self.targets or speaker in self.targets

    def knows(self, speaker: str) -> bool:
        """Whether this speaker may occur."""
        return self.speakers == ANY or speaker in self.speakers

    def names_in_prompt(self, speakers: Iterable[str]) -> dict[str, str]:
        """What the prompt calls the speakers of a dialogue, given in the order of their turns.

        Where anyone may speak and `speaker_names` is `letters`, that is A, B, C, … by first appearance, except for those
        whom `target_speaker` names. A prefix of a dialogue, and a dialogue that has letters already, keep them.
        """
        names = dict.fromkeys(speakers)
        if self.speakers != ANY or self.speaker_names == "as_is":
            return {name: name for name in names}
        times = itertools.chain([""], map(str, itertools.count(2)))  # A … Z, A2 … Z2, A3 …
        letters = (letter + round for round in times for letter in string.ascii_uppercase)
        letters = filter(lambda letter: letter not in self.targets, letters)
        return {name: name if name in self.targets else next(letters) for name in names}

    @property
    def example_speakers(self) -> tuple[str, str]:
        """Two names for an example: of a speaker and of one whose turn is classified, another one where there is one."""
        names = ["A", "B"] if self.speakers == ANY else list(self.speakers)
        target = self.targets[0] if self.targets else names[-1]
        return next((name for name in names if name != target), target), target

    @property
    def names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def numbers(self) -> range:
        return range(len(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """The guide as the YAML file has it, without `distances`, which only a run that trains with them records;
        `parse_label_guide` reads it back."""
        optional = ("license", "language", "dataset", "columns", "no_label", "speaker_names", "metric")
        unsaid = {key for key in optional if getattr(self, key) == type(self).model_fields[key].default}
        return self.model_dump(mode="json", exclude=unsaid | {"distances"})


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
    guide = parse_label_guide(content, str(path))
    if bare := [label.name for label in guide.labels if not label.definition]:
        without = f"{len(bare)} of {len(guide.labels)} labels have no definition"
        logger.warning(f"{path}: {without}: the prompt shows the names only")
    return guide


def parse_label_guide(content: Any, where: str) -> LabelGuide:
    """A guide from YAML, a run or a bundle; an InputError has a line for each bad key."""
    return check_content(LabelGuide, content, where)
