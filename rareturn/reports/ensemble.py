"""What an ensemble's report shows: its figures, tables and pictures, and the page that puts them together."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rareturn.data.rows import NO_LABEL, Row
from rareturn.decisions import metrics as metrics_module
from rareturn.decisions.metrics import cohens_kappa, score_predictions
from rareturn.decisions.probabilities import probability_quality
from rareturn.decisions.rules import Decision, Outcome, decide
from rareturn.reports.figures import (
    agreement,
    confusion_matrix,
    per_class_f1,
    reliability_diagram,
    search_curves,
)
from rareturn.reports.tables import SCORE_TITLES, Table, interval_text, per_class_table, score_table
from rareturn.runs.alignment import display_names, protected_label
from rareturn.runs.reading import Run


@dataclass(frozen=True)
class Picture:
    """A PNG file's name, its bytes, and the sentence under it."""

    name: str
    png: bytes
    caption: str

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 56rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }}
h3 {{ font-size: 1rem; margin-bottom: .5rem; }}
p {{ max-width: 42rem; overflow-wrap: anywhere; }}
.note, figcaption {{ font-size: .875rem; color: #444; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }}
@media (max-width: 40rem) {{ table {{ font-size: .75rem; }} th, td {{ padding: .25rem .3rem; }} }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ overflow-wrap: break-word; }}
figure {{ margin: 1rem 0; }}
img {{ width: 100%; max-width: 42rem; height: auto; display: block; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def report_page(title: str, sections: Sequence[tuple[str, Sequence[str | Table | Picture]]]) -> str:
    """One HTML file that holds everything it shows: no link, no script, no request.

    Args:
        sections: heading and what stands under it; a string is a paragraph. The first section's heading may be empty.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        if heading:
            body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in parts]
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def measure(
    runs: Sequence[Run], logits: Sequence[np.ndarray], outcome: Outcome, *, metric: str, seed: int
) -> dict[str, Any]:
    """metrics.json, the test file's part excepted.

    Args:
        logits: out-of-fold logits [n, c] of every run, in the row order of the first.
        metric: what the rule was fitted for.
        seed: of the bootstraps.
    """
    info, oof = runs[0].info, runs[0].oof
    names, labels = display_names(runs), oof.label
    options = {
        "num_labels": len(info["label_names"]),
        "positive_labels": info["positive_labels"],
        "seed": seed,
    }
    systems = {name: run.argmax(axis=1) for name, run in zip(names, logits, strict=True)}
    metrics = {
        "metric": metric,
        "method": outcome.rule.method,
        "fold_groups": info["fold_groups"],
        "rows": len(labels),
        "dialogues": len(set(oof.dialogue_id)),
        "notes": outcome.notes,
        **{
            stage: score_predictions(labels, predictions, oof.dialogue_id, **options)
            for stage, predictions in (
                ("argmax", outcome.argmax),
                ("in_sample", outcome.in_sample),
                ("cross_fitted", outcome.cross_fitted),
            )
        },
        "runs": {
            name: score_predictions(labels, predictions, oof.dialogue_id, **options)
            for name, predictions in systems.items()
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
    metrics["agreement"] = {
        "systems": list(systems),
        "cohens_kappa": [
            [cohens_kappa(one, other, options["num_labels"]) for other in systems.values()]
            for one in systems.values()
        ],
    }
    return metrics


def score_test(
    rows: Sequence[Row], predicted: np.ndarray, argmax: np.ndarray, info: dict[str, Any], seed: int
) -> dict[str, Any]:
    """`test` for metrics.json: the scores of the rows that have a label; nothing if none has."""
    labels = np.array([row.label for row in rows])
    known = labels != NO_LABEL
    if not known.any():
        return {}
    groups = [row.dialogue_id for row, use in zip(rows, known, strict=True) if use]
    options = {
        "num_labels": len(info["label_names"]),
        "positive_labels": info["positive_labels"],
        "seed": seed,
    }
    scores = {
        stage: score_predictions(labels[known], labels_of_stage[known], groups, **options)
        for stage, labels_of_stage in (("argmax", argmax), ("decision", predicted))
    }
    return {"test": {"rows": int(known.sum()), **scores}}


def make_tables(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, Table]:
    """What is printed, and stands in the report and the card: `scores`, `per class`, `runs`, and the rest where it is."""
    label_names = runs[0].label_names
    metric, decision = metrics["metric"], outcome.rule.decision
    of_runs = [
        [
            name,
            f"{weight:.3f}",
            run.info["base_model"].rstrip("/").split("/")[-1],
            (run.revision or "folder")[:12],
            interval_text(metrics["runs"][name][metric], metrics["runs"][name]["interval"][metric]),
        ]
        for name, run, weight in zip(display_names(runs), runs, outcome.rule.weights, strict=True)
    ]
    counts = np.bincount(runs[0].oof.label, minlength=len(label_names))
    tables = {
        "scores": score_table(metrics),
        "per class": per_class_table(label_names, counts, metrics),
        "runs": Table(
            "Runs and their weights",
            ("run", "weight", "base model", "revision", f"{SCORE_TITLES[metric]}, argmax"),
            of_runs,
        ),
    }
    if outcome.voting is None:
        gate = "none"
        if decision.threshold is not None:
            protected = f"{decision.protected_class} {label_names[decision.protected_class]}"
            gate = f"label {protected} wherever its probability is {decision.threshold:.3f} or more"
        tables["rule"] = Table(
            f"Decision rule ({outcome.rule.method})",
            ("label", "bias (nats)"),
            [
                [f"{label} {name}", f"{bias:+.3f}"]
                for label, (name, bias) in enumerate(zip(label_names, decision.bias, strict=True))
            ],
            f"Gate: {gate}. Temperature of every run's logits: {decision.temperature:.3f}.",
        )
        tables["probabilities"] = Table(
            "Probabilities of the blend on out-of-fold rows",
            ("", "log loss (nats)", "Brier score (0 to 2)", "ECE (0 to 1)"),
            [
                [title, *(f"{value:.4f}" for value in metrics["probabilities"][key].values())]
                for key, title in (
                    ("before_temperature", "before temperature"),
                    ("after_temperature_cross_fitted", "after temperature, cross-fitted"),
                    ("after_temperature_in_sample", "after temperature, in-sample (tuned on these rows)"),
                )
            ],
        )
    if "test" in metrics:
        test = metrics["test"]
        stages = {
            "argmax": test["argmax"],
            "decision": test["decision"],
            "fold_groups": metrics["fold_groups"],
        }
        tables["test"] = dataclasses.replace(
            score_table(stages),
            title=f"Scores on the {test['rows']:,} labelled rows of the test file",
            note="[95 % interval, bootstrap over dialogues]; nothing was tuned on these rows.",
        )
    return tables


def make_pictures(runs: Sequence[Run], outcome: Outcome, metrics: Mapping[str, Any]) -> list[Picture]:
    """The report's pictures; those of the rule's parameters only where there is a rule and no vote."""
    info, labels = runs[0].info, runs[0].oof.label
    names, num_labels = info["label_names"], len(info["label_names"])
    before, after = metrics["argmax"], metrics["cross_fitted"]
    confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(confusion, (labels, outcome.cross_fitted[0]), 1)
    pictures = [
        Picture(
            "per_class_f1.png",
            per_class_f1(
                names,
                np.bincount(labels, minlength=num_labels),
                (before["f1_per_class"], before["interval"]["f1_per_class"]),
                (after["f1_per_class"], after["interval"]["f1_per_class"]),
                info["positive_labels"],
            ),
            "F1 of each label before (argmax) and after the decision rule, which was fitted on other dialogues than "
            "those it is scored on. Bars: 95 % intervals, bootstrap over dialogues.",
        ),
        Picture(
            "confusion.png",
            confusion_matrix(
                names,
                confusion,
                f"Where the rows of each label go\n({metrics['rows']:,} out-of-fold rows, cross-fitted decision)",
            ),
            "Each line is a true label: the share of its rows, and their number, that were given each label. The rule "
            "was fitted on other dialogues (first repeat of the cross-fitting).",
        ),
        Picture(
            "agreement.png",
            agreement(metrics["agreement"]["systems"], np.array(metrics["agreement"]["cohens_kappa"])),
            "Agreement of the labels that two systems choose (Cohen's kappa: 1 always, 0 no more than by chance). Of "
            "runs that are about as good, those that agree less have more to gain from a blend.",
        ),
    ]
    return pictures if outcome.voting else pictures + _pictures_of_rule(runs[0], outcome, metrics)


def _pictures_of_rule(run: Run, outcome: Outcome, metrics: Mapping[str, Any]) -> list[Picture]:
    info, labels = run.info, run.oof.label
    decision, quality, metric = outcome.rule.decision, metrics["probabilities"], metrics["metric"]
    texts = (
        f"before: ECE {quality['before_temperature']['ece']:.3f}",
        f"after, fitted on other dialogues: ECE {quality['after_temperature_cross_fitted']['ece']:.3f}",
    )
    protected = decision.protected_class
    if protected is None:
        protected = protected_label(run)

    def score(rule: Decision) -> float:
        predictions = decide(outcome.after, rule)
        return metrics_module.score(
            labels, predictions, len(info["label_names"]), info["positive_labels"], metric
        )

    biases = decision.bias[protected] + np.linspace(-3, 3, 121)
    thresholds = np.linspace(0.02, 1, 99)
    unit = np.eye(len(decision.bias))[protected]
    of_bias = [
        score(dataclasses.replace(decision, bias=decision.bias + (bias - decision.bias[protected]) * unit))
        for bias in biases
    ]
    of_threshold = [
        score(dataclasses.replace(decision, protected_class=protected, threshold=threshold))
        for threshold in thresholds
    ]
    label = f"label {protected} {info['label_names'][protected]}"
    curves = [
        (f"Bias of {label} (δ, nats)", biases, np.array(of_bias), float(decision.bias[protected])),
        (f"Gate of {label} (τ, probability)", thresholds, np.array(of_threshold), decision.threshold),
    ]
    cross_fitted = metrics["cross_fitted"][metric], metrics["cross_fitted"]["interval"][metric]
    return [
        Picture(
            "reliability.png",
            reliability_diagram(outcome.before, outcome.scaled, labels, texts),
            "Above the diagonal the blend is too modest, below it too sure of itself. ECE, the expected calibration "
            "error: mean distance to the diagonal.",
        ),
        Picture(
            "search_curves.png",
            search_curves(curves, cross_fitted, SCORE_TITLES[metric]),
            "The blue line is in-sample: it scores the rows that the rule was fitted on, so its peaks promise too much. "
            "The dashed line and its band are what the rule scores when it is fitted on other dialogues.",
        ),
    ]


def make_page(
    name: str, metrics: Mapping[str, Any], tables: Mapping[str, Table], pictures: Sequence[Picture]
) -> str:
    """report.html."""
    metric = metrics["metric"]
    texts = {
        stage: interval_text(metrics[stage][metric], metrics[stage]["interval"][metric])
        for stage in ("argmax", "in_sample", "cross_fitted")
    }
    summary = (
        f"{SCORE_TITLES[metric]} on {metrics['rows']:,} out-of-fold rows of {metrics['dialogues']:,} "
        f"dialogues: {texts['cross_fitted']} with the decision rule ({metrics['method']}), cross-fitted; "
        f"{texts['argmax']} with argmax. In-sample, that is on the rows that it was tuned on, the rule shows "
        f"{texts['in_sample']}."
    )
    reading = (
        "In brackets: 95 % intervals, by bootstrap over dialogues. Cross-fitted: the rule, and the weights if they were "
        "searched, were fitted on other dialogues than those they are scored on; believe these figures. This is no "
        "diagnostic instrument: nothing here may decide about a person."
    )
    picture = {picture.name: picture for picture in pictures}

    def present(*parts: Table | Picture | None) -> list[Table | Picture]:
        return [part for part in parts if part is not None]

    sections = [
        ("", [summary[0].upper() + summary[1:], reading, *metrics["notes"]]),
        (
            "Scores",
            present(
                tables["scores"],
                tables.get("test"),
                tables["per class"],
                picture["per_class_f1.png"],
                picture["confusion.png"],
            ),
        ),
        ("Runs", present(tables["runs"], picture["agreement.png"])),
        ("Decision", present(tables.get("rule"), picture.get("search_curves.png"))),
        ("Probabilities", present(tables.get("probabilities"), picture.get("reliability.png"))),
    ]
    return report_page(f"Ensemble {name}", [section for section in sections if section[1]])
