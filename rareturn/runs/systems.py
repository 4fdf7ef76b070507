"""A run or an ensemble as labels of its rows, so that any two of them can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rareturn.data.folds import FoldGroups
from rareturn.data.label_guide import DEFAULT_METRIC, find_metric, load_label_guide, parse_label_guide
from rareturn.data.rows import DataArguments, Row, load_source
from rareturn.decisions.cross_fitting import Recipe, cross_fit, fit_rule, repeated_folds
from rareturn.decisions.metrics import Truth
from rareturn.decisions.probabilities import softmax
from rareturn.errors import InputError
from rareturn.files import check_content, read_json
from rareturn.runs.alignment import align_test
from rareturn.runs.folder import metrics_path, read_run_info
from rareturn.runs.reading import Run, read_run
from rareturn.runs.tables import LogitTable

PREDICTIONS_FILE = "oof_predictions.json"


class OofPredictions(BaseModel):
    """What ensemble.py writes of its out-of-fold rows; `predictions` has a list a repeat."""

    model_config = ConfigDict(strict=True)

    what: str  # how the predictions came about
    label_names: Annotated[list[str], Field(min_length=2)]
    positive_labels: list[int]
    fold_groups: FoldGroups
    metric: str = DEFAULT_METRIC
    id: Annotated[list[str], Field(min_length=1)]
    dialogue_id: list[str]
    label: list[int]
    predictions: Annotated[list[list[int]], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> OofPredictions:
        find_metric(self.metric, self.label_names)
        columns = self.id, self.dialogue_id, self.label, *self.predictions
        if {len(column) for column in columns} != {len(set(self.id))}:
            raise ValueError("not one entry a row")
        labels = {*self.positive_labels, *self.label}.union(*self.predictions)
        if not labels <= {*range(len(self.label_names))}:
            raise ValueError("a label that has no name")
        return self


@dataclass(eq=False)
class System:
    """What a run or an ensemble says of its out-of-fold rows; an ensemble has neither logits, `rule` nor `run`."""

    reference: str
    # `run.json`; of an ensemble what `OofPredictions` has, its guide, number of folds and scores of `argmax`
    info: dict[str, Any]
    table: LogitTable
    predictions: np.ndarray  # int64 [repeats, n], by rules that were fitted on other dialogues
    rule: Recipe | None = None
    run: Run | None = None

    def truth(self, metric: str, seed: int = 42) -> Truth:
        """What the predictions are scored against."""
        names, positive = self.info["label_names"], self.info["positive_labels"]
        return Truth(self.table.label, self.table.dialogue_id, len(names), positive, metric, seed)

    def label_test(self, rows: Sequence[Row], where: str, truth: Truth) -> dict[str, np.ndarray]:
        """Labels [n] of test rows: by `argmax` (of a run) and by `rule`; empty where there are no predictions.

        An InputError where they were made for other rows than these, which are read from `where`. `truth` is what a run's
        rule is fitted to.
        """
        if self.run is not None:
            if not self.run.test:
                return {}
            (folds,) = align_test([self.run], rows, where)
            rule = fit_rule(self.rule, [self.table.logits], truth)
            argmax = np.mean([softmax(fold) for fold in folds], axis=0).argmax(axis=1)
            return {"argmax": argmax, "rule": rule.predict([folds]).labels}
        found = [path for path in Path(self.reference).glob("prediction.*") if path.suffix != ".zip"]
        if not found:
            return {}
        guide = parse_label_guide(self.info["label_guide"], f"{self.reference}: ensemble.json: label_guide")
        labels = {row.id: row.label for row in load_source(str(found[0]), guide).rows}
        if missing := [row.id for row in rows if row.id not in labels]:
            raise InputError(f"{found[0]}: row {missing[0]!r} of {where} is missing")
        return {"rule": np.array([labels[row.id] for row in rows])}


def read_gold(path: str, systems: Sequence[System]) -> list[Row]:
    """The rows of a labelled test file, in the labels of these systems' guide."""
    known = next((system.info["label_guide"] for system in systems if system.info.get("label_guide")), None)
    guide = parse_label_guide(known, path) if known else load_label_guide(DataArguments.label_guide)
    return load_source(path, guide).rows


def read_system(
    reference: str, method: str, metric: str | None = None, seed: int = 42, folds: Sequence[int] | None = None
) -> System:
    """A run, decided by a rule of this method that is cross-fitted here, or what ensemble.py has decided.

    `folds` are those of a run that has no others. An InputError where it is neither, or not readable.
    """
    if (Path(reference) / PREDICTIONS_FILE).is_file():
        return _read_ensemble(reference)
    run = read_run(reference, folds=folds)
    rule, truth = Recipe(method), run.truth(metric, seed)
    found = cross_fit(rule, [run.oof.logits], truth, repeated_folds(truth))
    return System(reference, run.info, run.oof, found.predictions, rule, run)


def _read_ensemble(reference: str) -> System:
    path = Path(reference) / PREDICTIONS_FILE
    info = read_json(path)
    check_content(OofPredictions, info, str(path))
    for file, keys in (("ensemble.json", ["label_guide"]), ("metrics.json", ["argmax", "num_folds"])):
        beside = path.with_name(file)
        content = read_json(beside) if beside.is_file() else {}
        info |= {key: content.get(key) for key in keys}
    labels, none = np.array(info["label"]), np.zeros((len(info["id"]), 1), np.float32)
    table = LogitTable(info["id"], info["dialogue_id"], np.zeros(len(labels), np.int64), labels, none)
    return System(reference, info, table, np.array(info["predictions"]))


def run_costs(run_dirs: Sequence[Path], folds: Sequence[int] | None = None) -> dict[str, Any]:
    """What runs took: `seconds` of all folds, and the most of `trainable_parameters` and `peak_memory_bytes` of any."""
    seconds, found = 0.0, []
    for run_dir in run_dirs:
        whole = run_dir / "metrics.json"  # a probe's; its folds share their features
        seconds += read_json(whole).get("feature_seconds", 0) if whole.exists() else 0
        numbers = folds or range(read_run_info(run_dir)["num_folds"])
        found += [read_json(metrics_path(run_dir, fold)) for fold in numbers]
    costs = {"seconds": seconds + sum(of_fold["seconds"] for of_fold in found)}
    for key in ("trainable_parameters", "peak_memory_bytes"):
        if known := [of_fold[key] for of_fold in found if key in of_fold]:
            costs[key] = max(known)
    return costs
