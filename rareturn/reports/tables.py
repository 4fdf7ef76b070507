"""Tables as text, Markdown and HTML.

A figure that was tuned on the rows it scores says so wherever it stands, and has its cross-fitted one beside it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        """Aligned columns; the first to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *others = (
                cell.rjust(width) if position else cell.ljust(width)
                for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([first, *others]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        note = [self.note] if self.note else []
        return "\n".join([self.title, line(self.header), rule, *map(line, self.rows), *note])

    def markdown(self) -> str:
        """A GitHub-flavoured table, without the title."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        marks = "|" + "|".join(["---", *["---:"] * (len(self.header) - 1)]) + "|"
        note = ["", self.note] if self.note else []
        return "\n".join([line(self.header), marks, *map(line, self.rows), *note])

    def html(self) -> str:
        """A table that scrolls sideways where the screen is too narrow."""

        def line(cells: Sequence[str], tag: str) -> str:
            texts = (
                re.sub(r"(\[\S+) (\S+\])", r"\1&nbsp;\2", html.escape(cell)) for cell in cells
            )  # an interval stays on one line
            return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        body = "".join(line(row, "td") for row in self.rows)
        return (
            f'<h3>{html.escape(self.title)}</h3><div class="scroll"><table><thead>{line(self.header, "th")}</thead>'
            f"<tbody>{body}</tbody></table></div>{note}"
        )


def interval_text(value: float, interval: Sequence[float] | None) -> str:
    """`0.392 [0.351, 0.428]`, or the value alone."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def score_table(metrics: Mapping[str, Any]) -> Table:
    """Argmax, in-sample and cross-fitted scores side by side.

    Args:
        metrics: `argmax`, `in_sample`, `cross_fitted`, each with the names of DESIGN 9 and `interval` (score's name to
            its bounds); `fold_groups`.
    """
    stages = [stage for stage in STAGE_TITLES if stage in metrics]
    rows = [
        [
            title,
            *(interval_text(metrics[stage][name], metrics[stage]["interval"].get(name)) for stage in stages),
        ]
        for name, title in SCORE_TITLES.items()
    ]
    note = f"[95 % interval, bootstrap over dialogues]; {FOLD_TEXTS[metrics['fold_groups']]}."
    return Table(
        "Scores on out-of-fold rows", ("score", *(STAGE_TITLES[stage] for stage in stages)), rows, note
    )


def per_class_table(
    label_names: Sequence[str], rows_per_class: Sequence[int], metrics: Mapping[str, Any]
) -> Table:
    """F1 of each label, the same three ways; `metrics` as `score_table` takes them."""
    stages = [stage for stage in STAGE_TITLES if stage in metrics]
    rows = [
        [
            f"{label} {name}",
            str(count),
            *(
                interval_text(
                    metrics[stage]["f1_per_class"][label], metrics[stage]["interval"]["f1_per_class"][label]
                )
                for stage in stages
            ),
        ]
        for label, (name, count) in enumerate(zip(label_names, rows_per_class, strict=True))
    ]
    header = ("label", "rows", *(STAGE_TITLES[stage] for stage in stages))
    return Table("F1 of each label on out-of-fold rows", header, rows)
