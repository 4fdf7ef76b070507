"""What an ensemble's report shows: its figures, tables and pictures, and the page that puts them together."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rareturn.data.rows import NO_LABEL, Row
from rareturn.decisions.metrics import Truth, cohens_kappa, score_predictions
from rareturn.decisions.probabilities import probability_quality
from rareturn.decisions.rules import Outcome, Rule, decide
from rareturn.reports import figures
from rareturn.reports.tables import (
    SCORE_TITLES,
    TEMPLATES,
    Table,
    interval_text,
    measure_predictions,
    per_class_table,
    rows_per_class,
    score_table,
)
from rareturn.runs.alignment import display_names, protected_label
from rareturn.runs.reading import Run


@dataclass(frozen=True)
class Picture:
    """A PNG file's name, its bytes, and the sentence under it."""

    name: str
    png: bytes
    caption: str

    @property
    def data_uri(self) -> str:
        """The bytes as a page holds them."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def measure(
    runs: Sequence[Run], logits: Sequence[np.ndarray], outcome: Outcome, *, metric: str, seed: int
) -> dict[str, Any]:
    """What metrics.json holds, except for the test file.

    Args:
        logits: out-of-fold logits [n, c] of every run, in the row order of the first.
        metric: what the rule was fitted for.
        seed: of the bootstraps.
    """
    first, labels = runs[0], runs[0].oof.label
    systems = {name: run.argmax(axis=1) for name, run in zip(display_names(runs), logits, strict=True)}
    stages = {name: getattr(outcome, name) for name in ("argmax", "in_sample", "cross_fitted")}
    metrics = {
        "metric": metric,
        "method": outcome.rule.method,
        "fold_groups": first.info["fold_groups"],
        "rows": len(labels),
        "dialogues": len(set(first.oof.dialogue_id)),
        "notes": outcome.notes,
        **{name: measure_predictions(first, predictions, seed) for name, predictions in stages.items()},
        "runs": {
            name: measure_predictions(first, predictions, seed) for name, predictions in systems.items()
        },
        "probabilities": {
            "before_temperature": probability_quality(outcome.before, labels),
            "after_temperature_in_sample": probability_quality(outcome.after, labels),
            "after_temperature_cross_fitted": probability_quality(outcome.scaled, labels),
        },
    }
    if len(runs) > 1:
        systems["blend, argmax"] = outcome.argmax
    systems["decision, cross-fitted"] = outcome.cross_fitted[0]
    kappa = [
        [cohens_kappa(one, other, first.num_labels) for other in systems.values()] for one in systems.values()
    ]
    metrics["agreement"] = {"systems": list(systems), "cohens_kappa": kappa}
    return metrics


def score_test(
    rows: Sequence[Row], predicted: np.ndarray, argmax: np.ndarray, info: dict[str, Any], seed: int
) -> dict[str, Any]:
    """`test` for metrics.json: the scores of the rows that have a label; empty if none has."""
    labels = np.array([row.label for row in rows])
    known = labels != NO_LABEL
    if not known.any():
        return {}
    groups = [row.dialogue_id for row, use in zip(rows, known, strict=True) if use]
    truth = Truth(labels[known], groups, len(info["label_names"]), info["positive_labels"], seed=seed)
    scores = {
        stage: score_predictions(truth, of_stage[known])
        for stage, of_stage in (("argmax", argmax), ("decision", predicted))
    }
    return {"test": {"rows": int(known.sum()), **scores}}


def make_tables(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of terminal, report and card: `scores`, `per class`, `runs`, and `rule`, `probabilities`, `test` if any."""
    label_names, metric = runs[0].label_names, metrics["metric"]
    of_runs = []
    for name, run, weight in zip(display_names(runs), runs, outcome.rule.weights, strict=True):
        scores = metrics["runs"][name]
        base = run.info["base_model"].rstrip("/").split("/")[-1]
        revision = (run.revision or "folder")[:12]
        found = interval_text(scores[metric], scores["interval"].get(metric))
        of_runs.append([name, f"{weight:.3f}", base, revision, found])
    header = ("run", "weight", "base model", "revision", f"{SCORE_TITLES[metric]}, argmax")
    tables = {
        "scores": score_table(metrics),
        "per class": per_class_table(label_names, rows_per_class(runs[0]), metrics),
        "runs": Table("Runs and their weights", header, of_runs),
    }
    if outcome.rule.voting is None:
        tables |= _tables_of_rule(label_names, outcome.rule, metrics)
    if "test" in metrics:
        test = metrics["test"]
        tables["test"] = dataclasses.replace(
            score_table({**test, "fold_groups": metrics["fold_groups"]}),
            title=f"Scores on the {test['rows']:,} labelled rows of the test file",
            note="[95 % interval, bootstrap over dialogues]; nothing was tuned on these rows.",
        )
    return tables


def _tables_of_rule(label_names: Sequence[str], rule: Rule, metrics: Mapping[str, Any]) -> dict[str, Table]:
    decision, gate = rule.decision, "none"
    labels = [f"{label} {name}" for label, name in enumerate(label_names)]
    if decision.threshold is not None:
        protected = labels[decision.protected_class]
        gate = f"label {protected} wherever its probability is {decision.threshold:.3f} or more"
    biases = [[label, f"{bias:+.3f}"] for label, bias in zip(labels, decision.bias, strict=True)]
    note = f"Gate: {gate}. Temperature of every run's logits: {decision.temperature:.3f}."
    titles = {
        "before_temperature": "before temperature",
        "after_temperature_cross_fitted": "after temperature, cross-fitted",
        "after_temperature_in_sample": "after temperature, in-sample (tuned on these rows)",
    }
    quality = [
        [title, *(f"{value:.4f}" for value in metrics["probabilities"][key].values())]
        for key, title in titles.items()
    ]
    header = ("", "log loss (nats)", "Brier score (0 to 2)", "ECE (0 to 1)")
    return {
        "rule": Table(f"Decision rule ({rule.method})", ("label", "bias (nats)"), biases, note),
        "probabilities": Table("Probabilities of the blend on out-of-fold rows", header, quality),
    }


def make_pictures(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> list[Picture]:
    """The report's pictures; those of the rule's parameters only where a rule decides."""
    run, names = runs[0], runs[0].label_names
    before, after = (
        (metrics[stage]["f1_per_class"], metrics[stage]["interval"]["f1_per_class"])
        for stage in ("argmax", "cross_fitted")
    )
    counts = np.zeros((run.num_labels, run.num_labels), dtype=np.int64)
    np.add.at(counts, (run.oof.label, outcome.cross_fitted[0]), 1)
    rows = f"{metrics['rows']:,} out-of-fold rows, cross-fitted decision"
    pictures = [
        Picture(
            "per_class_f1.png",
            figures.per_class_f1(names, rows_per_class(run), before, after, run.positive_labels),
            "F1 of each label before (argmax) and after the decision rule, which was fitted on other dialogues than "
            "those it is scored on. Bars: 95 % intervals, bootstrap over dialogues.",
        ),
        Picture(
            "confusion.png",
            figures.confusion_matrix(names, counts, f"Where the rows of each label go\n({rows})"),
            "Each line is a true label: the share and the number of its rows that were given each label. The rule was "
            "fitted on other dialogues (first repeat of the cross-fitting).",
        ),
        Picture(
            "agreement.png",
            figures.agreement(
                metrics["agreement"]["systems"], np.array(metrics["agreement"]["cohens_kappa"])
            ),
            "Agreement of the labels that two systems choose (Cohen's kappa: 1 always, 0 no more than by chance). Of "
            "runs that are about equally good, those that agree less have more to gain from a blend.",
        ),
    ]
    return pictures if outcome.rule.voting else pictures + _pictures_of_rule(run, outcome, metrics)


def _pictures_of_rule(run: Run, outcome: Outcome, metrics: Mapping[str, Any]) -> list[Picture]:
    decision, quality, metric = outcome.rule.decision, metrics["probabilities"], metrics["metric"]
    protected = protected_label(run) if decision.protected_class is None else decision.protected_class
    label, unit = f"label {protected} {run.label_names[protected]}", np.eye(run.num_labels)[protected]
    offsets, thresholds = np.linspace(-3, 3, 121), np.linspace(0.02, 1, 99)

    def scores(**changes: Sequence[Any]) -> np.ndarray:
        rules = (
            dataclasses.replace(decision, **dict(zip(changes, values, strict=True)))
            for values in zip(*changes.values(), strict=True)
        )
        truth = run.truth(metric)
        return np.array([truth.score(decide(outcome.after, rule)) for rule in rules])

    of_bias = scores(bias=[decision.bias + offset * unit for offset in offsets])
    of_threshold = scores(threshold=thresholds, protected_class=[protected] * len(thresholds))
    bias = float(decision.bias[protected])
    curves = [
        (f"Bias of {label} (δ, nats)", bias + offsets, of_bias, bias),
        (f"Gate of {label} (τ, probability)", thresholds, of_threshold, decision.threshold),
    ]
    cross_fitted = metrics["cross_fitted"][metric], metrics["cross_fitted"]["interval"][metric]
    texts = (
        f"before: ECE {quality['before_temperature']['ece']:.3f}",
        f"after, fitted on other dialogues: ECE {quality['after_temperature_cross_fitted']['ece']:.3f}",
    )
    return [
        Picture(
            "reliability.png",
            figures.reliability_diagram(outcome.before, outcome.scaled, run.oof.label, texts),
            "Above the diagonal the blend is too modest, below it too sure of itself. ECE, the expected calibration "
            "error: mean distance to the diagonal.",
        ),
        Picture(
            "search_curves.png",
            figures.search_curves(curves, cross_fitted, SCORE_TITLES[metric]),
            "The blue line is in-sample: it scores the rows that the rule was fitted on, so its peaks promise too much. "
            "The dashed line and its band are what the rule scores when it is fitted on other dialogues.",
        ),
    ]


def make_page(
    name: str, metrics: Mapping[str, Any], tables: Mapping[str, Table], pictures: Sequence[Picture]
) -> str:
    """report.html: one file that holds everything it shows, without links, scripts or requests."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    metric = metrics["metric"]
    return environment.get_template("report.html.jinja").render(
        name=name,
        metrics=metrics,
        score=SCORE_TITLES[metric],
        scores={
            stage: interval_text(metrics[stage][metric], metrics[stage]["interval"].get(metric))
            for stage in ("argmax", "in_sample", "cross_fitted")
        },
        tables=tables,
        pictures={picture.name.removesuffix(".png"): picture for picture in pictures},
    )
