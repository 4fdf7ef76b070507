"""Fit a decision rule to a run's out-of-fold logits, and say what it is worth on dialogues it was not fitted on.

Every method, and the choice among them, on a run from the Hub:
    python calibrate.py --run ORG/NAME-oof:anchor --output decision.json
The paper's search alone, seconds on the fictional corpus (made by `make demo`):
    python calibrate.py --run outputs/demo-probe --output decision.json --method random --repeats 1

The table has one row a method: its score on the rows that it was fitted on, its cross-fitted score (fitted on some
dialogues, scored on the others) with a 95 % interval, what the first flatters (optimism), and the seconds of one fit.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from rareturn import command_line
from rareturn.command_line import parse_arguments
from rareturn.decisions.cross_fitting import CrossFit, Recipe, cross_fit, fit_rule, grouped_folds, rule_fitter
from rareturn.decisions.methods import METHODS
from rareturn.decisions.metrics import METRIC_NAMES, check_labels, score, score_predictions
from rareturn.decisions.probabilities import (
    check_logits,
    fit_temperature,
    probability_quality,
    softmax,
)
from rareturn.decisions.rules import Rule
from rareturn.errors import InputError
from rareturn.files import write_json
from rareturn.reports.tables import FOLD_TEXTS, SCORE_TITLES, Table, interval_text
from rareturn.runs.decision_file import saved_decision
from rareturn.runs.reading import Run, read_run

logger = logging.getLogger(__name__)


@dataclass
class CalibrationArguments:
    """A run in, a decision out."""

    run: str = field(metadata={"help": "A run: its folder, or ORG/NAME-oof:RUN[@REVISION] on the Hub."})
    output: str = field(metadata={"help": "The decision to write, a JSON file."})
    method: str = field(
        default="auto",
        metadata={
            "help": "How the rule is fitted. auto: the best of the simplest tier within one standard error of the best.",
            "choices": ["auto", *METHODS],
        },
    )
    metric: str = field(
        default="macro_f1_positive",
        metadata={
            "help": "Score to maximise. The shared task's by default.",
            "choices": list(METRIC_NAMES),
        },
    )
    protected_label: int | None = field(
        default=None,
        metadata={
            "help": "Label number of the gate. Default: the label guide's, else the most frequent one."
        },
    )
    gate: bool = field(
        default=True,
        metadata={
            "help": "Search a gate that keeps rows of the protected label; dropped where it does not help."
        },
    )
    num_vectors: int = field(
        default=22_000, metadata={"help": "Bias vectors of `random`; the paper's number."}
    )
    repeats: int = field(
        default=5, metadata={"help": "Partitions into folds that a cross-fitted score is averaged over."}
    )
    num_splits: int = field(
        default=5, metadata={"help": "Folds of dialogues a partition. 5, as the runs have."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of folds, searches and intervals."})

    def __post_init__(self) -> None:
        for name, least in (("num_vectors", 1), ("repeats", 1), ("num_splits", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: {getattr(self, name)} is below {least}")


@dataclass(frozen=True)
class Row:
    """One way of fitting: the rule fitted on all rows, what it predicts there, and what comes of it when cross-fitted.

    Attributes:
        in_sample: int64 [n].
        seconds: of the fit on all rows.
    """

    name: str
    rule: Rule
    in_sample: np.ndarray
    cross_fitted: CrossFit
    seconds: float

    def figures(self, run: Run, metric: str) -> dict[str, Any]:
        """The row's scores: `in_sample`, `cross_fitted` and the latter's 95 % `interval`."""
        return {
            "in_sample": score(run.oof.label, self.in_sample, run.num_labels, run.positive_labels, metric),
            "cross_fitted": self.cross_fitted.metrics[metric],
            "interval": list(self.cross_fitted.interval),
        }


def find_protected(arguments: CalibrationArguments, run: Run) -> int | None:
    """The gate's label: the flag's, the run's, the most frequent one; None without a gate."""
    if not arguments.gate:
        if arguments.protected_label is not None:
            raise InputError("--protected_label: given, but --no_gate leaves out the gate that it belongs to")
        return None
    label = arguments.protected_label
    if label is None:
        label = run.info.get("protected_label")
    if label is None:
        return int(np.bincount(run.oof.label).argmax())
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < run.num_labels:
        raise InputError(f"protected_label: {label!r} is not one of 0..{run.num_labels - 1}")
    return label


def table_recipes(arguments: CalibrationArguments, run: Run) -> dict[str, Recipe]:
    """What the table compares, the method asked for last: with `auto` every method, the gate left to `auto`."""
    asked = Recipe(
        tuple(run.positive_labels),
        metric=arguments.metric,
        method=arguments.method,
        protected_class=find_protected(arguments, run),
        num_vectors=arguments.num_vectors,
        num_splits=arguments.num_splits,
        seed=arguments.seed,
    )
    others = METHODS if arguments.method == "auto" else ("argmax",)
    recipes = {
        method: dataclasses.replace(
            asked, method=method, protected_class=asked.protected_class if method == "random" else None
        )
        for method in others
    }
    recipes.pop(arguments.method, None)
    return {**recipes, arguments.method: asked}


def fit_row(name: str, recipe: Recipe, run: Run, arguments: CalibrationArguments, bar: tqdm) -> Row:
    """Fit on all rows, score there, and cross-fit."""
    logits, labels, groups = [run.oof.logits], run.oof.label, run.oof.dialogue_id
    bar.set_postfix_str(name)
    started = time.perf_counter()
    rule = fit_rule(recipe, logits, labels, groups)
    seconds = time.perf_counter() - started
    bar.update()
    cross_fitted = cross_fit(
        rule_fitter(recipe, logits, labels, groups),
        labels,
        groups,
        num_labels=run.num_labels,
        positive_labels=run.positive_labels,
        metric=recipe.metric,
        num_splits=arguments.num_splits,
        repeats=arguments.repeats,
        seed=arguments.seed,
        progress=bar.update,
    )
    return Row(name, rule, rule.predict([logits]).labels, cross_fitted, seconds)


def temperature_quality(run: Run, arguments: CalibrationArguments) -> dict[str, dict[str, float]]:
    """Log loss, Brier score and ECE before a temperature, after it, and after one fitted on the other dialogues."""
    logits, labels = run.oof.logits, run.oof.label
    folds = grouped_folds(labels, run.oof.dialogue_id, run.num_labels, arguments.num_splits, arguments.seed)
    scaled = np.empty(logits.shape)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        scaled[~train] = softmax(logits[~train], fit_temperature([logits[train]], labels[train]))
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
    rows: Sequence[Row],
    quality: dict[str, dict[str, float]],
    run: Run,
    arguments: CalibrationArguments,
) -> None:
    """The methods' table and the one of the probabilities."""
    metric = arguments.metric
    cells = []
    for row in rows:
        figures = row.figures(run, metric)
        name = row.name if row.name != "auto" else f"auto ({row.rule.method})"
        cells.append(
            (
                name + (" + gate" if row.rule.decision.threshold is not None else ""),
                f"{figures['in_sample']:.4f}",
                interval_text(figures["cross_fitted"], figures["interval"]),
                f"{figures['in_sample'] - figures['cross_fitted']:+.4f}",
                f"{row.seconds:.2f}",
            )
        )
    note = (
        f"Rows {len(run.oof)}, dialogues {len(set(run.oof.dialogue_id))}; the run has "
        f"{FOLD_TEXTS[run.info['fold_groups']]}. Cross-fitted by dialogue, {arguments.repeats} times "
        f"{arguments.num_splits} folds; what a row chooses (method, gate, temperature) is chosen inside the folds."
    )
    header = ("method", "in-sample", "cross-fitted (95 %)", "optimism", "seconds")
    print(Table(f"{SCORE_TITLES[metric]}: {run.reference}", header, cells, note).text())
    stages = {
        "before": quality["before_temperature"],
        "after, in-sample": quality["after_temperature_in_sample"],
        "after, cross-fitted": quality["after_temperature_cross_fitted"],
    }
    numbers = [(name, *(f"{value:.4f}" for value in values.values())) for name, values in stages.items()]
    print()
    print(Table("Probabilities, temperature", ("", "log loss", "Brier", "ECE"), numbers).text())
    print()
    print(describe(rows[-1].rule, run.label_names))


def decision_content(
    rows: Sequence[Row],
    quality: dict[str, dict[str, float]],
    run: Run,
    arguments: CalibrationArguments,
) -> dict[str, Any]:
    """decision.json of DESIGN 8; nothing in it changes from one launch to the next."""
    chosen, argmax = rows[-1], run.oof.logits.argmax(axis=1)
    stages = {
        "argmax": argmax,
        "in_sample": chosen.in_sample,
        "cross_fitted": chosen.cross_fitted.predictions,
    }
    metrics = {
        stage: score_predictions(
            run.oof.label,
            predictions,
            run.oof.dialogue_id,
            num_labels=run.num_labels,
            positive_labels=run.positive_labels,
            seed=arguments.seed,
        )
        for stage, predictions in stages.items()
    }
    return {
        **saved_decision(chosen.rule, [run], metrics, metric=arguments.metric, seed=arguments.seed),
        "methods": {row.name: row.figures(run, arguments.metric) for row in rows},
        "probabilities": quality,
    }


def main() -> None:
    """Run the script; see the module's docstring."""
    (arguments,) = parse_arguments((CalibrationArguments,), __doc__)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )

    run = read_run(arguments.run)
    check_logits(run.oof.logits, run.reference)
    check_labels(run.oof.label, run.oof.dialogue_id, run.label_names, run.positive_labels, run.reference)
    recipes = table_recipes(arguments, run)

    num_fits = 1 + arguments.repeats * min(arguments.num_splits, len(set(run.oof.dialogue_id)))
    with tqdm(total=num_fits * len(recipes), desc="fits", unit="fit", leave=False) as bar:
        rows = [fit_row(name, recipe, run, arguments, bar) for name, recipe in recipes.items()]
    quality = temperature_quality(run, arguments)
    print_tables(rows, quality, run, arguments)

    write_json(arguments.output, decision_content(rows, quality, run, arguments))
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    command_line.run(main)
