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

TEMPLATES = packaged("reports/templates")
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
    """Text cells under a header: printed, and put into the card and the page.

    Attributes:
        note: what a reader must know to read the figures; may be empty.
    """

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


def measure_predictions(run: Run, predictions: np.ndarray, seed: int = 42) -> dict[str, Any]:
    """Scores of predictions of a run's out-of-fold rows, with their intervals; see `metrics.score_predictions`.

    Args:
        predictions: int [n] or [repeats, n], in the row order of `run.oof`.
        seed: of the bootstrap.
    """
    return score_predictions(run.truth(seed=seed), predictions)


def measure_run(run: Run) -> dict[str, Any]:
    """A run on its own: `argmax`, the scores of its out-of-fold rows, and `rows_per_class`."""
    scores = measure_predictions(run, run.oof.logits.argmax(axis=1))
    return {"argmax": scores, "rows_per_class": rows_per_class(run)}


def rows_per_class(run: Run) -> list[int]:
    """How many out-of-fold rows each label has."""
    return np.bincount(run.oof.label, minlength=run.num_labels).tolist()


def interval_text(value: float, interval: Sequence[float] | None) -> str:
    """`0.392 [0.351, 0.428]`, or the value alone."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def score_table(metrics: Mapping[str, Any]) -> Table:
    """Argmax, cross-fitted and in-sample scores side by side.

    Args:
        metrics: `argmax`, `in_sample`, `cross_fitted`, each with the names of DESIGN 9 and `interval` (score's name to
            its bounds); `fold_groups`.
    """
    stages = {title: metrics[stage] for stage, title in STAGE_TITLES.items() if stage in metrics}
    rows = [
        [title, *(interval_text(scores[name], scores["interval"].get(name)) for scores in stages.values())]
        for name, title in SCORE_TITLES.items()
    ]
    note = f"[95 % interval, bootstrap over dialogues]; {FOLD_TEXTS[metrics['fold_groups']]}."
    return Table("Scores on out-of-fold rows", ("score", *stages), rows, note)


def per_class_table(label_names: Sequence[str], counts: Sequence[int], metrics: Mapping[str, Any]) -> Table:
    """F1 of each label, in the same columns; `counts` are its rows, `metrics` as `score_table` takes them."""
    stages = {title: metrics[stage] for stage, title in STAGE_TITLES.items() if stage in metrics}
    rows = []
    for label, (name, count) in enumerate(zip(label_names, counts, strict=True)):
        cells = [f"{label} {name}", str(count)]
        for scores in stages.values():
            intervals = scores["interval"].get("f1_per_class")
            cells.append(interval_text(scores["f1_per_class"][label], intervals and intervals[label]))
        rows.append(cells)
    return Table("F1 of each label on out-of-fold rows", ("label", "rows", *stages), rows)
