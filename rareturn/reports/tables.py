"""Tables: text here, Markdown and HTML in the templates of the card and the page.

A figure that was tuned on the rows it scores says so wherever it stands, and has its cross-fitted one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rareturn.decisions.metrics import score_predictions
from rareturn.files import packaged
from rareturn.runs.reading import Run

FOLD_TEXTS = {
    "dialogue": "folds of whole dialogues: the figures estimate rows of new dialogues",
    "none": "folds of rows: the figures estimate new rows of dialogues that the model has seen other rows of",
}
SCORE_TITLES = {
    "macro_f1_positive": "macro F1, positive labels",
    "macro_precision_positive": "macro precision, positive labels",
    "macro_recall_positive": "macro recall, positive labels",
    "accuracy": "accuracy",
    "macro_f1": "macro F1, all labels",
    "weighted_f1": "weighted F1",
}
STAGE_TITLES = {
    "argmax": "argmax, nothing tuned",
    "cross_fitted": "decision, cross-fitted",
    "in_sample": "decision, in-sample (tuned on these rows)",
    "decision": "decision",
}


@dataclass(frozen=True)
class Table:
    """Text cells under a header; `note` is what a reader must know to read the figures, and may be empty."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """Aligned columns, the first to the left and the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = []
        for first, *others in (self.header, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])


def render(template: str, **parts: Any) -> str:
    """A template filled in; only in HTML are cells and names escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    loader, escape = FileSystemLoader(packaged("reports/templates")), select_autoescape(["html.jinja"])
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined)
    return environment.get_template(template).render(parts)


def measure_run(run: Run) -> dict[str, Any]:
    """A run on its own: `argmax`, the scores of its out-of-fold rows, and `rows_per_class`."""
    scores = score_predictions(run.truth(), run.oof.logits.argmax(axis=1))
    return {"argmax": scores, "rows_per_class": rows_per_class(run)}


def rows_per_class(run: Run) -> list[int]:
    """How many out-of-fold rows each label has."""
    return np.bincount(run.oof.label, minlength=run.num_labels).tolist()


def interval_text(value: float, interval: Sequence[float] | None) -> str:
    """`0.392 [0.351, 0.428]`, or the value alone."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def score_text(scores: Mapping[str, Any], name: str, label: int | None = None) -> str:
    """One of what `score_predictions` gives, or a label's part of it, as `interval_text` writes it."""
    value, interval = scores[name], scores["interval"].get(name)
    if label is not None:
        value, interval = value[label], interval and interval[label]
    return interval_text(value, interval)


def _stages(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {title: metrics[stage] for stage, title in STAGE_TITLES.items() if stage in metrics}


def score_table(metrics: Mapping[str, Any]) -> Table:
    """The scores of each stage of `STAGE_TITLES` in `metrics`, side by side."""
    stages = _stages(metrics)
    rows = [
        [title, *(score_text(scores, name) for scores in stages.values())]
        for name, title in SCORE_TITLES.items()
    ]
    note = f"[95 % interval, bootstrap over dialogues]; {FOLD_TEXTS[metrics['fold_groups']]}."
    return Table("Scores on out-of-fold rows", ("score", *stages), rows, note)


def per_class_table(label_names: Sequence[str], counts: Sequence[int], metrics: Mapping[str, Any]) -> Table:
    """F1 of each label, in the same columns; `counts` are its rows."""
    stages = _stages(metrics)
    rows = [
        [f"{label} {name}", str(count), *(score_text(of, "f1_per_class", label) for of in stages.values())]
        for label, (name, count) in enumerate(zip(label_names, counts, strict=True))
    ]
    return Table("F1 of each label on out-of-fold rows", ("label", "rows", *stages), rows)
