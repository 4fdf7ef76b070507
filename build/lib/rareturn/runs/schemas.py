"""What `run.json` must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rareturn.data.label_guide import DEFAULT_METRIC, find_metric
from rareturn.errors import InputError
from rareturn.runs.references import check_name


def _name(name: str) -> str:
    try:
        return check_name(name, "")
    except InputError as error:
        raise ValueError(str(error)) from None


def _distinct(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError(f"different values expected, not {values}")
    return values


def metric_of(info: Mapping[str, Any], asked: str | None = None) -> str:
    """The metric of a run, or the one that `--metric` asks for, as `find_metric` gives it."""
    try:
        return find_metric(asked or info.get("metric", DEFAULT_METRIC), info["label_names"])
    except ValueError as error:
        raise InputError(f"--metric: {error}") from None


Labels = Annotated[list[int], Field(min_length=1), AfterValidator(_distinct)]
Name = Annotated[str, Field(min_length=1)]


class RunInfo(BaseModel):
    """The content of a `run.json`; other teams' tools may add keys and leave out those with a default."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, AfterValidator(_name)]
    label_names: Annotated[list[Name], Field(min_length=2), AfterValidator(_distinct)]
    positive_labels: Labels
    protected_label: int | None = None
    metric: str = DEFAULT_METRIC
    label_scope: Labels | None = None
    num_folds: Annotated[int, Field(ge=1)]
    fold_seed: int
    fold_groups: Literal["dialogue", "none"]
    seed: int
    base_model: str
    base_revision: str | None
    recipe: dict[str, Any]
    data_fingerprint: str
    prompt_fingerprint: str | None
    packages: dict[str, Any]
    command: str
    git_commit: str | None
    loader: dict[str, Any] = {}
    window: dict[str, int] = {}
    identity: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _labels_exist(self) -> RunInfo:
        last, problems = len(self.label_names) - 1, []
        for key in ("positive_labels", "protected_label", "label_scope"):
            value = getattr(self, key)
            labels = [value] if isinstance(value, int) else value or []
            if not all(0 <= label <= last for label in labels):
                problems.append(f"{key}: numbers of 0..{last} expected, not {labels}")
        try:
            find_metric(self.metric, self.label_names)
        except ValueError as error:
            problems.append(f"metric: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self
