"""The scores of a decision in trackio, in the project that has the curves of its runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rareturn.command_line import flag


@dataclass(kw_only=True)
class TrackingArguments:
    """Where scores are logged; named as in transformers' TrainingArguments, which has these flags for a training."""

    _argument_group_name = "Tracking"

    report_to: Literal["none", "trackio"] = flag("none", "Log the scores to trackio too.")
    project: str | None = flag(None, "Group of trackio's runs. Default: --hub_name, or the first run's name.")
    trackio_space_id: str | None = flag(None, "Space to log to; a new one is private. Default: this machine.")

    def __post_init__(self) -> None:
        if self.report_to == "trackio" and importlib.util.find_spec("trackio") is None:
            raise ValueError("--report_to trackio: its package is not installed (pip install trackio)")


def log_scores(
    tracking: TrackingArguments, project: str, name: str, metrics: Mapping[str, Mapping[str, Any]]
) -> None:
    """Log `metrics` (stage: its scores) as one point of the trackio run `name`, if that is asked for."""
    if tracking.report_to != "trackio":
        return
    import trackio

    project, space = tracking.project or project, tracking.trackio_space_id
    trackio.init(project=project, name=name, space_id=space, private=True, resume="allow", auto_log_cpu=False)
    scores = [
        (stage, *item) for stage in ("argmax", "in_sample", "cross_fitted") for item in metrics[stage].items()
    ]
    trackio.log({f"{stage}/{key}": value for stage, key, value in scores if isinstance(value, float)})
    trackio.finish()
