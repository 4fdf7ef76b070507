"""Tables: text here, Markdown and HTML in the templates of the card and the page.

A figure that was tuned on the rows it scores says so wherever it stands, and has its cross-fitted one beside it.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.rows import NO_LABEL, Row
from rareturn.decisions.metrics import Truth, bootstrap_interval, score_predictions
from rareturn.decisions.probabilities import softmax
from rareturn.files import packaged, write_bytes
from rareturn.runs.reading import Run
from rareturn.runs.systems import System

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
    "balanced_accuracy": "balanced accuracy",
    "kappa": "Cohen's kappa",
}
STAGE_TITLES = {
    "argmax": "argmax, nothing tuned",
    "cross_fitted": "decision, cross-fitted",
    "in_sample": "decision, in-sample (tuned on these rows)",
    "decision": "decision",
}
SYSTEM_TITLES = {  # of what `system_figures` and the scripts that show systems know of each
    "rows": "rows",
    "held_out": "held out",
    "argmax": "argmax",
    "cross_fitted": "rule, cross-fitted",
    "difference": "to the best",
    "test_argmax": "test, argmax",
    "test_rule": "test, rule",
    "seconds": "seconds",
    "trainable_parameters": "trainable parameters",
    "peak_memory_bytes": "peak memory (MiB)",
}


def fold_text(info: Mapping[str, Any]) -> str:
    """How rows were held out, and so what the figures estimate; of a `run.json`, or what an ensemble writes."""
    text = FOLD_TEXTS[info["fold_groups"]]
    return text.replace("folds", "one validation file", 1) if info.get("num_folds") == 1 else text


def score_titles(metric: str) -> dict[str, str]:
    """The titles of all scores by name, the metric's first; `f1:3` is the F1 of label 3."""
    return {metric: SCORE_TITLES.get(metric) or f"F1 of label {metric.removeprefix('f1:')}"} | SCORE_TITLES


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
    """A run on its own: its `metric`; `argmax`, the scores of its out-of-fold rows; `rows_per_class`; `score_test`."""
    truth = run.truth()
    scores = score_predictions(truth, run.oof.logits.argmax(axis=1))
    results = {"metric": truth.metric, "argmax": scores, "rows_per_class": rows_per_class(truth)}
    if run.test:
        argmax = np.mean([softmax(fold.logits) for fold in run.test], axis=0).argmax(axis=1)
        results |= score_test(run.test[0].label, run.test[0].dialogue_id, {"argmax": argmax}, truth)
    return results


def score_test(
    labels: Sequence[int], dialogues: Sequence[str], stages: Mapping[str, np.ndarray], truth: Truth
) -> dict[str, Any]:
    """`test` for a metrics file: each stage's scores of the test rows that have a label; empty if none has.

    `truth` is that of the out-of-fold rows: metric, labels and seed are the same.
    """
    known = np.array(labels) != NO_LABEL
    if not known.any():
        return {}
    truth = replace(truth, labels=np.array(labels)[known], groups=np.array(dialogues)[known])
    scores = {name: score_predictions(truth, predictions[known]) for name, predictions in stages.items()}
    facts = {"rows": int(known.sum()), "dialogues": truth.num_groups, "rows_per_class": rows_per_class(truth)}
    return {"test": {"metric": truth.metric, **facts, **scores}}


def rows_per_class(truth: Truth) -> list[int]:
    """How many rows each label has."""
    return np.bincount(truth.labels, minlength=truth.num_labels).tolist()


def interval_text(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    """`0.392 [0.351, 0.428]`, or the value alone; with `sign` "+", signed."""
    text = [f"{number:{sign}.3f}" for number in (value, *(interval or ()))]
    return text[0] + (f" [{text[1]}, {text[2]}]" if interval else "")


def score_text(scores: Mapping[str, Any], name: str, label: int | None = None) -> str:
    """One of what `score_predictions` gives, or a label's part of it, as `interval_text` writes it."""
    value, interval = scores[name], scores["interval"].get(name)
    if label is not None:
        value, interval = value[label], interval and interval[label]
    return interval_text(value, interval)


def _stages(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {title: metrics[stage] for stage, title in STAGE_TITLES.items() if stage in metrics}


def score_table(
    metrics: Mapping[str, Any], where: str = "out-of-fold rows", note: str | None = None
) -> Table:
    """The scores of each stage of `STAGE_TITLES` in `metrics`, side by side, its `metric` first."""
    stages = _stages(metrics)
    rows = [
        [title, *(score_text(scores, name) for scores in stages.values())]
        for name, title in score_titles(metrics["metric"]).items()
    ]
    note = f"[95 % interval, bootstrap over dialogues]; {note or fold_text(metrics)}."
    return Table(f"Scores on {where}", ("score", *stages), rows, note)


def tables_of_test(label_names: Sequence[str], metrics: Mapping[str, Any]) -> dict[str, Table]:
    """`test` and `test per class`, the same tables of what `score_test` gives, if the metrics have it."""
    if (test := metrics.get("test")) is None:
        return {}
    where = f"the {test['rows']:,} labelled rows of the test file ({test['dialogues']:,} dialogues)"
    note = "nothing was tuned or chosen on these rows"
    per_class = per_class_table(label_names, test["rows_per_class"], test, where)
    return {"test": score_table(test, where, note), "test per class": per_class}


def per_class_table(
    label_names: Sequence[str],
    counts: Sequence[int],
    metrics: Mapping[str, Any],
    where: str = "out-of-fold rows",
) -> Table:
    """F1 of each label, in the same columns; `counts` are its rows."""
    stages = _stages(metrics)
    rows = [
        [f"{label} {name}", str(count), *(score_text(of, "f1_per_class", label) for of in stages.values())]
        for label, (name, count) in enumerate(zip(label_names, counts, strict=True))
    ]
    return Table(f"F1 of each label on {where}", ("label", "rows", *stages), rows)


def system_figures(
    system: System, truth: Truth, test: Sequence[Row] = (), test_file: str = ""
) -> dict[str, Any]:
    """A system in numbers, by the keys of `SYSTEM_TITLES`: a score is [score, low, high], its 95 % interval last.

    `truth` is that of its own rows; of `test` rows, read from `test_file`, the labels are scored where it has any.
    """

    def scored(predictions: np.ndarray, against: Truth = truth) -> list[float]:
        interval = bootstrap_interval(against, predictions) if against.num_groups > 1 else ()
        return [against.score(predictions), *interval]

    held_out = "dialogues" if system.info["fold_groups"] == "dialogue" else "rows"
    figures: dict[str, Any] = {"rows": len(truth.labels), "held_out": held_out}
    of_ensemble = system.info.get("argmax") or {}
    if system.run is not None:
        figures["argmax"] = scored(system.table.logits.argmax(axis=1))
    elif truth.metric in of_ensemble:
        interval = of_ensemble["interval"].get(truth.metric, [])
        figures["argmax"] = [of_ensemble[truth.metric], *interval]
    figures["cross_fitted"] = scored(system.predictions)
    if test:
        labels, dialogues = [row.label for row in test], [row.dialogue_id for row in test]
        of_test = replace(truth, labels=np.array(labels), groups=np.array(dialogues))
        found = system.label_test(test, test_file, truth)
        figures |= {f"test_{name}": scored(predicted, of_test) for name, predicted in found.items()}
    return figures


def systems_table(title: str, figures: Mapping[str, Mapping[str, Any]], method: str, note: str) -> Table:
    """One line a system, with the columns of `SYSTEM_TITLES` that any of them has; runs decide by this `method`."""

    def cell(key: str, value: Any) -> str:
        if isinstance(value, list):
            return interval_text(value[0], value[1:], "+" if key == "difference" else "")
        if isinstance(value, (int, float)):
            return f"{value / 2**20 if key == 'peak_memory_bytes' else value:,.0f}"
        return value or "-"

    keys = [key for key in SYSTEM_TITLES if any(key in of for of in figures.values())]
    rows = [[name, *(cell(key, of.get(key)) for key in keys)] for name, of in figures.items()]
    how = f"Rule: {method}, fitted on other dialogues (ensembles: their own); [95 % interval over dialogues]"
    return Table(title, ("system", *(SYSTEM_TITLES[key] for key in keys)), rows, f"{how}. {note}")


def write_systems(
    stem: Path, title: str, tables: Sequence[Table], figures: Mapping[str, Mapping[str, Any]], metric: str
) -> None:
    """Write the tables as STEM.md and STEM.html, the first one's numbers as STEM.csv, its scores as STEM.png."""
    from rareturn.reports.figures import scores_of_systems

    picture = scores_of_systems(figures, SYSTEM_TITLES, score_titles(metric)[metric])
    parts = {"title": title, "tables": tables, "picture": f"{stem.name}.png"}
    parts["uri"] = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    lines: list[dict[str, Any]] = []
    for name, of_system in figures.items():
        lines.append({"system": name})
        for key, value in of_system.items():
            ends = ("", "_low", "_high") if isinstance(value, list) else ("",)
            values = value if isinstance(value, list) else [value]
            lines[-1] |= {f"{key}{end}": one for end, one in zip(ends, values, strict=False)}
    numbers = io.StringIO()
    writer = csv.DictWriter(numbers, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    files = {"csv": numbers.getvalue().encode(), "png": picture}
    files |= {kind: render(f"systems.{kind}.jinja", **parts).encode() for kind in ("md", "html")}
    for kind, content in files.items():
        write_bytes(stem.with_name(f"{stem.name}.{kind}"), content)
