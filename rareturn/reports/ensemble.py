"""What an ensemble's report shows: its figures, tables and pictures, and the page that puts them together."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rareturn.decisions.metrics import Truth, cohens_kappa, score_predictions
from rareturn.decisions.probabilities import probability_quality
from rareturn.decisions.rules import Outcome, Rule, decide
from rareturn.reports import figures
from rareturn.reports.tables import (
    Table,
    per_class_table,
    render,
    rows_per_class,
    score_table,
    score_text,
    score_titles,
    tables_of_test,
)
from rareturn.runs.alignment import display_names, protected_label
from rareturn.runs.reading import Run


def measure(
    runs: Sequence[Run], logits: Sequence[np.ndarray], outcome: Outcome, truth: Truth
) -> dict[str, Any]:
    """What metrics.json holds, except for the test file; the runs' logits [n, c] are in the row order of the first."""
    systems = {name: run.argmax(axis=1) for name, run in zip(display_names(runs), logits, strict=True)}
    stages = {name: getattr(outcome, name) for name in ("argmax", "in_sample", "cross_fitted")}
    metrics = {
        "metric": truth.metric,
        "method": outcome.rule.method,
        "fold_groups": runs[0].info["fold_groups"],
        "num_folds": runs[0].info["num_folds"],
        "rows": len(truth.labels),
        "dialogues": truth.num_groups,
        "notes": outcome.notes,
        **{name: score_predictions(truth, predictions) for name, predictions in stages.items()},
        "runs": {name: score_predictions(truth, predictions) for name, predictions in systems.items()},
        "probabilities": {
            "before_temperature": probability_quality(outcome.before, truth.labels),
            "after_temperature_in_sample": probability_quality(outcome.after, truth.labels),
            "after_temperature_cross_fitted": probability_quality(outcome.scaled, truth.labels),
        },
    }
    if len(runs) > 1:
        systems["blend, argmax"] = outcome.argmax
    systems["decision, cross-fitted"] = outcome.cross_fitted[0]
    labels = list(systems.values())
    kappa = [[cohens_kappa(one, other, truth.num_labels) for other in labels] for one in labels]
    return metrics | {"agreement": {"systems": list(systems), "cohens_kappa": kappa}}


def make_tables(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of terminal, report and card: `scores`, `per class`, `runs`, and `rule`, `probabilities`, those of the test if any."""
    label_names, metric = runs[0].label_names, metrics["metric"]
    of_runs = []
    for name, run, weight in zip(display_names(runs), runs, outcome.rule.weights, strict=True):
        base, revision = run.info["base_model"].rstrip("/").split("/")[-1], (run.revision or "folder")[:12]
        of_runs.append([name, revision, f"{weight:.3f}", base, score_text(metrics["runs"][name], metric)])
    header = ("run", "revision", "weight", "base model", f"{score_titles(metric)[metric]}, argmax")
    tables = {
        "scores": score_table(metrics),
        "per class": per_class_table(label_names, rows_per_class(runs[0].truth()), metrics),
        "runs": Table("Runs and their weights", header, of_runs),
    }
    if outcome.rule.voting is None:
        tables |= _tables_of_rule(label_names, outcome.rule, metrics)
    return tables | tables_of_test(label_names, metrics)


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
    found = metrics["probabilities"]
    quality = [[title, *(f"{value:.4f}" for value in found[key].values())] for key, title in titles.items()]
    header = ("", "log loss (nats)", "Brier score (0 to 2)", "ECE (0 to 1)")
    return {
        "rule": Table(f"Decision rule ({rule.method})", ("label", "bias (nats)"), biases, note),
        "probabilities": Table("Probabilities of the blend on out-of-fold rows", header, quality),
    }


def make_pictures(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name, those of the rule's parameters only where a rule decides; the templates have the captions."""
    run, kappa = runs[0], metrics["agreement"]
    counts = np.zeros((run.num_labels, run.num_labels), dtype=np.int64)
    np.add.at(counts, (run.oof.label, outcome.cross_fitted[0]), 1)
    title = f"Where the rows of each label go\n({metrics['rows']:,} out-of-fold rows, cross-fitted decision)"
    stages = metrics["argmax"], metrics["cross_fitted"]
    pictures = {
        "per_class_f1": figures.per_class_f1(
            run.label_names, rows_per_class(run.truth()), *stages, run.positive_labels
        ),
        "confusion": figures.confusion_matrix(run.label_names, counts, title),
        "agreement": figures.agreement(kappa["systems"], np.array(kappa["cohens_kappa"])),
    }
    return pictures if outcome.rule.voting else pictures | _pictures_of_rule(run, outcome, metrics)


def _pictures_of_rule(run: Run, outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, bytes]:
    decision, quality, metric = outcome.rule.decision, metrics["probabilities"], metrics["metric"]
    protected = protected_label(run) if decision.protected_class is None else decision.protected_class
    label, unit = f"label {protected} {run.label_names[protected]}", np.eye(run.num_labels)[protected]
    offsets, thresholds = np.linspace(-3, 3, 121), np.linspace(0.02, 1, 99)

    truth = run.truth(metric)

    def in_sample(**changes: Any) -> float:
        return truth.score(decide(outcome.after, dataclasses.replace(decision, **changes)))

    bias, of_bias = decision.bias[protected], [in_sample(bias=decision.bias + by * unit) for by in offsets]
    of_threshold = [in_sample(threshold=at, protected_class=protected) for at in thresholds]
    curves = [
        (f"Bias of {label} (δ, nats)", bias + offsets, of_bias, bias),
        (f"Gate of {label} (τ, probability)", thresholds, of_threshold, decision.threshold),
    ]
    texts = (
        f"before: ECE {quality['before_temperature']['ece']:.3f}",
        f"after, fitted on other dialogues: ECE {quality['after_temperature_cross_fitted']['ece']:.3f}",
    )
    cross_fitted, title = metrics["cross_fitted"], score_titles(metric)[metric]
    return {
        "reliability": figures.reliability_diagram(outcome.before, outcome.scaled, run.oof.label, texts),
        "search_curves": figures.search_curves(curves, cross_fitted, metric, title),
    }


def make_page(
    name: str, metrics: Mapping[str, Any], tables: Mapping[str, Table], pictures: Mapping[str, bytes]
) -> str:
    """report.html: one file that holds everything it shows, without links, scripts or requests."""
    uris = {key: f"data:image/png;base64,{base64.b64encode(png).decode()}" for key, png in pictures.items()}
    parts = {"name": name, "metrics": metrics, "tables": tables, "uris": uris, "score_text": score_text}
    return render("report.html.jinja", **parts, score=score_titles(metrics["metric"])[metrics["metric"]])
