# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Fit a decision rule to a run's out-of-fold logits, and say what it is worth on dialogues it was not fitted on.

Every method, and the choice among them, on a run from the Hub:
    python calibrate.py --run ORG/NAME-oof:anchor --output decision.json
The paper's search alone, seconds on the fictional corpus (made by `make demo`):
    python calibrate.py --run outputs/demo-probe --output decision.json --method random --repeats 1

The table has one row a method: its score on the rows that it was fitted on, its cross-fitted score (fitted on some
dialogues, scored on the others) with a 95 % interval, by how much the first flatters (optimism), and the seconds of
one fit. Argmax is kept where `auto` gains no more than .002.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rareturn import command_line
from rareturn.command_line import REQUIRED, flag, parse_arguments, start_logging
from rareturn.data.label_guide import METRICS_HELP
from rareturn.decisions import cross_fitting
from rareturn.decisions.cross_fitting import CrossFit, Recipe
from rareturn.decisions.methods import METHODS
from rareturn.decisions.metrics import Truth, check_labels, score_predictions
from rareturn.decisions.probabilities import check_logits, fit_temperature, probability_quality, softmax
from rareturn.decisions.rules import Rule
from rareturn.errors import InputError
from rareturn.files import write_json
from rareturn.reports.tables import Table, fold_text, interval_text, score_titles
from rareturn.reports.tracking import TrackingArguments, log_scores
from rareturn.runs.alignment import protected_label
from rareturn.runs.decision_file import saved_decision
from rareturn.runs.reading import Run, read_run

logger = logging.getLogger(__name__)

Data = tuple[list[np.ndarray], Truth]  # logits [n, c] of each run (here one), and their truth
Quality = dict[str, dict[str, float]]  # stage, name of the figure


@dataclass
class CalibrationArguments:
    """A run in, a decision out."""

    _argument_group_name = "Calibration"

    run: str = flag(REQUIRED, "A run: its folder, or ORG/NAME-oof:RUN[@REVISION] on the Hub.")
    output: str = flag(REQUIRED, "The decision to write, a JSON file.")
    method: str = flag(
        "auto",
        "How the rule is fitted. auto: the best of the simplest tier within one standard error of the best method, "
        "and argmax where that gains no more than .002. argmax: no bias. vector: vector scaling. expected: the score "
        "that the probabilities expect. prior: one strength times the log prior. smooth: half way from expected to the score "
        "itself. exact: the score itself, by coordinate ascent. random: the best of --num_vectors, as in the paper.",
        choices=["auto", *METHODS],
    )
    metric: str | None = flag(None, f"Score to maximise: {METRICS_HELP}. Default: the run's.")
    protected_label: int | None = flag(None, "Label of the gate. Default: the guide's, or the most frequent.")
    gate: bool = flag(
        True, "Search a gate that keeps the protected label's rows; dropped if it does not help."
    )
    num_vectors: int = flag(22_000, "Bias vectors of `random`; the paper's number.")
    repeats: int = flag(5, "Partitions a cross-fitted score is averaged over; 5 steady the figure.")
    num_splits: int = flag(5, "Folds of dialogues per partition. 5, as the runs have.")
    jobs: int | None = flag(
        None, "Processes that fit at once; the result is the same. Default: one per core."
    )
    seed: int = flag(42, "Seed of folds, searches and intervals.")

    def __post_init__(self) -> None:
        least = {"num_vectors": 1, "repeats": 1, "num_splits": 2, "seed": 0, "jobs": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name}: {value} is below {bound}")
        if self.protected_label is not None and not self.gate:
            raise ValueError("--protected_label: given, but --no_gate leaves out the gate that it belongs to")


@dataclass(frozen=True)
class Row:
    """A way of fitting: the rule fitted on all rows, what it predicts there (int64 [n]), and its cross-fitted score.

    `seconds` are those of the fit on all rows.
    """

    recipe: Recipe
    rule: Rule
    in_sample: np.ndarray
    cross_fitted: CrossFit
    seconds: float

    def figures(self, truth: Truth) -> dict[str, Any]:
        """The row's scores: `in_sample`, `cross_fitted` and the latter's 95 % `interval`."""
        crossed = self.cross_fitted
        figures = {"in_sample": truth.score(self.in_sample), "cross_fitted": crossed.metrics[truth.metric]}
        return figures | {"interval": list(crossed.interval)}


def table_recipes(arguments: CalibrationArguments, run: Run) -> list[Recipe]:
    """What the table compares, the method asked for last: with `auto` every method, the gate left to `auto`."""
    protected, asked = arguments.protected_label, arguments.method
    if protected is not None and not 0 <= protected < run.num_labels:
        raise InputError(f"--protected_label: {protected} is not one of 0..{run.num_labels - 1}")
    if arguments.gate and protected is None:
        protected = protected_label(run)
    methods = [*METHODS, "auto"] if asked == "auto" else list(dict.fromkeys(("argmax", asked)))
    gates = {method: protected if method in ("random", asked) else None for method in methods}
    options = {"num_vectors": arguments.num_vectors, "num_splits": arguments.num_splits}
    return [Recipe(method, protected_class=gate, **options) for method, gate in gates.items()]


def timed_fit(recipe: Recipe, logits: list[np.ndarray], truth: Truth) -> tuple[Rule, float]:
    """The rule fitted on all rows, and the seconds that took."""
    started = time.perf_counter()
    rule = cross_fitting.fit_rule(recipe, logits, truth)
    return rule, time.perf_counter() - started


def fit_rows(recipes: list[Recipe], data: Data, folds: list[np.ndarray], jobs: int | None) -> list[Row]:
    """Fit every recipe on all rows, score it there, and cross-fit it."""
    fitted, rows = [], []
    num_fits = 1 + sum(len(np.unique(partition)) for partition in folds)
    with tqdm(total=num_fits * len(recipes), desc="fits", unit="fit", leave=False) as bar:
        for found in cross_fitting.run_tasks(timed_fit, [(recipe, *data) for recipe in recipes], jobs):
            fitted.append(found)
            bar.update()
        for recipe, (rule, seconds) in zip(recipes, fitted, strict=True):
            bar.set_postfix_str(recipe.method)
            cross_fitted = cross_fitting.cross_fit(recipe, *data, folds, jobs, bar.update)
            rows.append(Row(recipe, rule, rule.predict([data[0]]).labels, cross_fitted, seconds))
    return rows


def temperature_quality(run: Run, folds: np.ndarray) -> Quality:
    """Log loss, Brier score and ECE before a temperature, after it, and after one fitted on the other dialogues."""
    logits, labels = run.oof.logits, run.oof.label
    scaled = cross_fitting.cross_fitted_scaling([logits], labels, np.ones(1), "arithmetic", folds)
    temperature = fit_temperature([logits], labels)
    return {
        "before_temperature": probability_quality(softmax(logits), labels),
        "after_temperature_in_sample": probability_quality(softmax(logits, temperature), labels),
        "after_temperature_cross_fitted": probability_quality(scaled, labels),
    }


def describe(rule: Rule, label_names: Sequence[str]) -> str:
    """The rule in words."""
    decision = rule.decision
    bias = ", ".join(f"{name} {value:+.2f}" for name, value in zip(label_names, decision.bias, strict=True))
    gate = "no gate"
    if decision.threshold is not None:
        gate = f"{label_names[decision.protected_class]} from p {decision.threshold:.3f} on"
    return f"Method {rule.method}; temperature {decision.temperature:.3f}; {gate}; bias in nats: {bias}."


def print_tables(
    rows: Sequence[Row], quality: Quality, run: Run, truth: Truth, arguments: CalibrationArguments
) -> None:
    """The methods' table and the one of the probabilities."""
    cells = []
    for row in rows:
        in_sample, crossed, interval = row.figures(truth).values()
        name = row.recipe.method if row.recipe.method != "auto" else f"auto ({row.rule.method})"
        name += " + gate" if row.rule.decision.threshold is not None else ""
        score = interval_text(crossed, interval)
        cells.append((name, f"{in_sample:.4f}", score, f"{in_sample - crossed:+.4f}", f"{row.seconds:.2f}"))
    note = (
        f"Rows {len(run.oof)}, dialogues {truth.num_groups}; the run has {fold_text(run.info)}. "
        f"Cross-fitted by dialogue, {arguments.repeats} times {arguments.num_splits} folds; what a row chooses "
        "(method, gate, temperature) is chosen inside the folds."
    )
    header = ("method", "in-sample", "cross-fitted (95 %)", "optimism", "seconds")
    print(Table(f"{score_titles(truth.metric)[truth.metric]}: {run.reference}", header, cells, note).text())
    stages = zip(("before", "after, in-sample", "after, cross-fitted"), quality.values(), strict=True)
    numbers = [(name, *(f"{value:.4f}" for value in values.values())) for name, values in stages]
    print()
    print(Table("Probabilities, temperature", ("", "log loss", "Brier", "ECE"), numbers).text())


def main() -> None:
    # Arguments
    arguments, tracking = parse_arguments((CalibrationArguments, TrackingArguments), __doc__)

    # Logging
    start_logging()

    # Data
    run = read_run(arguments.run)
    check_logits(run.oof.logits, run.reference)
    truth = run.truth(arguments.metric, arguments.seed)
    check_labels(truth, run.label_names, run.reference)
    data = ([run.oof.logits], truth)

    # Decide
    recipes = table_recipes(arguments, run)
    folds = cross_fitting.repeated_folds(truth, arguments.num_splits, arguments.repeats)
    rows = fit_rows(recipes, data, folds, arguments.jobs)
    asked = rows[-1]
    rule, cross_fitted, reason = cross_fitting.choose(asked.recipe, asked.rule, asked.cross_fitted, *data)

    # Evaluate
    predictions = {
        "argmax": run.oof.logits.argmax(axis=1),
        "in_sample": rule.predict([data[0]]).labels,
        "cross_fitted": cross_fitted.predictions,
    }
    metrics = {stage: score_predictions(truth, of_stage) for stage, of_stage in predictions.items()}
    quality = temperature_quality(run, folds[0])
    print_tables(rows, quality, run, truth, arguments)
    print(f"\n{reason}\n{describe(rule, run.label_names)}")

    # Save: decision.json of DESIGN 8; nothing in it changes from one launch to the next
    content = {
        **saved_decision(rule, [run], metrics, metric=truth.metric, seed=truth.seed),
        "reason": reason,
        "methods": {row.recipe.method: row.figures(truth) for row in rows},
        "probabilities": quality,
    }
    write_json(arguments.output, content)
    logger.info("wrote %s", arguments.output)
    name = run.info["name"]
    log_scores(tracking, name, f"{name}-{Path(arguments.output).stem}", metrics)


if __name__ == "__main__":
    command_line.run(main)
