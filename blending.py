"""Several runs as one system: lining up their rows, and comparing what two systems predict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import artifacts
import decoding
from artifacts import LogitTable, Run
from command_line import InputError
from dialogues import NO_LABEL, Row

SHARED_KEYS = ("label_names", "positive_labels", "fold_groups")
PREDICTIONS_FILE = "oof_predictions.json"


# --------------------------------------------------------------------------------------------------------- lining up rows


def _check_shared(where: str, info: Mapping[str, Any], first_where: str, first: Mapping[str, Any]) -> None:
    for key in SHARED_KEYS:
        if info[key] == first[key]:
            continue
        if key == "label_names" and len(info[key]) == len(first[key]):
            label = next(
                number
                for number, names in enumerate(zip(info[key], first[key], strict=True))
                if names[0] != names[1]
            )
            raise InputError(
                f"{where}: label_names: label {label} is {info[key][label]!r}, but {first[key][label]!r} in {first_where}"
            )
        raise InputError(
            f"{where}: {key}: {json.dumps(info[key])}, but {json.dumps(first[key])} in {first_where}"
        )


def _positions(where: str, table: LogitTable, first_where: str, first: LogitTable) -> np.ndarray:
    """Where each row of `first` stands in `table`, after labels and dialogues have been compared.

    Raises:
        InputError: the first row that is in one only, or of which they say different things.
    """
    position = {row_id: number for number, row_id in enumerate(table.id)}
    for number, row_id in enumerate(first.id):
        if row_id not in position:
            raise InputError(f"{where}: row {row_id!r} of {first_where} is missing")
        here = position[row_id]
        for name, mine, other in (
            ("label", int(table.label[here]), int(first.label[number])),
            ("dialogue_id", table.dialogue_id[here], first.dialogue_id[number]),
        ):
            if mine != other:
                raise InputError(f"{where}: row {row_id!r}: {name}: {mine!r}, but {other!r} in {first_where}")
    if len(table) > len(first):
        known = set(first.id)
        extra = next(row_id for row_id in table.id if row_id not in known)
        raise InputError(f"{where}: row {extra!r} is not in {first_where}")
    return np.array([position[row_id] for row_id in first.id])


def align_runs(runs: Sequence[Run]) -> list[np.ndarray]:
    """Out-of-fold logits [n, c] of every run, in the row order of the first.

    Raises:
        InputError: the first disagreement in label names, positive labels, fold groups, rows, labels or dialogues; or
            logits that `decoding.check_logits` refuses.
    """
    first = runs[0]
    aligned = []
    for run in runs:
        _check_shared(run.reference, run.info, first.reference, first.info)
        aligned.append(run.oof.logits[_positions(run.reference, run.oof, first.reference, first.oof)])
        decoding.check_logits(aligned[-1], run.reference)
    return aligned


def align_test(runs: Sequence[Run], rows: Sequence[Row], test_file: str) -> list[list[np.ndarray]]:
    """Test logits of every run's every fold, [n, c] each, in the row order of the test file.

    Raises:
        InputError: a run without test tables, or the first row on which a table and the file disagree.
    """
    asked = LogitTable(
        [row.id for row in rows],
        [row.dialogue_id for row in rows],
        np.zeros(len(rows), dtype=np.int64),
        np.array([row.label for row in rows]),
        np.zeros((len(rows), 1), dtype=np.float32),
    )
    aligned = []
    for run in runs:
        if not run.test:
            raise InputError(f"{run.reference}: has no test tables (was it run with a test file?)")
        where = f"{run.reference}: test table"
        table = run.test[0]
        if (asked.label == NO_LABEL).any() or (table.label == NO_LABEL).any():
            table = LogitTable(table.id, table.dialogue_id, table.fold, asked.label[:0], table.logits)
            table.label = _labels_of(table.id, asked)
        positions = _positions(where, table, test_file, asked)
        aligned.append([fold.logits[positions] for fold in run.test])
        for fold in aligned[-1]:
            decoding.check_logits(fold, where)
    return aligned


def _labels_of(ids: Sequence[str], table: LogitTable) -> np.ndarray:
    label = dict(zip(table.id, table.label, strict=True))
    return np.array([label.get(row_id, NO_LABEL) for row_id in ids])


def display_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their references where two runs of different teams share a name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.reference for run in runs]


def test_probabilities(folds: Sequence[np.ndarray], temperature: float) -> np.ndarray:
    """One run's probabilities [n, c] of test rows: the mean over its folds' models (DESIGN 8)."""
    return np.mean([decoding.softmax(logits, temperature) for logits in folds], axis=0)


def cohens_kappa(first: np.ndarray, second: np.ndarray, num_labels: int) -> float:
    """Agreement of two label sequences [n] beyond what their label frequencies give by chance (Cohen, 1960).

    1 where both are the same label throughout, for which the formula has no value.
    """
    observed = float(np.mean(first == second))
    shares = [np.bincount(labels, minlength=num_labels) / len(labels) for labels in (first, second)]
    chance = float(shares[0] @ shares[1])
    return 1.0 if chance == 1.0 else (observed - chance) / (1 - chance)


# ----------------------------------------------------------------------------------------------------------------- voting


@dataclass(frozen=True)
class Voting:
    """A vote over runs, and all that it takes to repeat it.

    Attributes:
        gate_label: the label that the gatekeepers decide: runs trained on every label.
        protected_class: where ties go; None for the lowest label.
        label_scopes: of each run, the labels it was trained on (a specialist), or None (a gatekeeper).
        soft: probabilities in place of votes (`decoding.vote_probabilities`).
    """

    gate_label: int
    protected_class: int | None
    label_scopes: tuple[tuple[int, ...] | None, ...]
    soft: bool = False

    def predict(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """Labels int64 [n] of the runs' probabilities [n, c].

        Raises:
            InputError: a kind of voter is missing, or a label that no specialist knows.
        """
        paired = list(zip(probabilities, self.label_scopes, strict=True))
        gatekeepers = [run for run, scope in paired if scope is None]
        specialists = [run for run, scope in paired if scope is not None]
        options = {
            "gate_label": self.gate_label,
            "specialist_scopes": [scope for scope in self.label_scopes if scope is not None],
        }
        if self.soft:
            return decoding.vote_probabilities(gatekeepers, specialists, **options).argmax(axis=1)
        return decoding.vote(gatekeepers, specialists, protected_class=self.protected_class, **options)

    def to_dict(self) -> dict[str, Any]:
        """For decision.json, under `vote`."""
        return asdict(self)


def make_voting(runs: Sequence[Run], protected_class: int | None, soft: bool) -> Voting:
    """The vote of these runs: the gate is the label that every specialist lacks, else the one label that is not positive.

    Raises:
        InputError: a scope that is no list of labels, or no single label for the gate.
    """
    info = runs[0].info
    every = set(range(len(info["label_names"])))
    scopes = []
    for run in runs:
        scope = run.info.get("label_scope")
        if scope is not None and not (
            isinstance(scope, list) and scope and set(map(str, scope)) <= set(map(str, every))
        ):
            raise InputError(
                f"{run.reference}: label_scope: {scope!r} is no list of labels 0 to {max(every)}"
            )
        scopes.append(None if scope is None or set(scope) == every else tuple(scope))
    lacking = every.intersection(*(every - set(scope) for scope in scopes if scope is not None))
    gates = lacking if lacking != every else every - set(info["positive_labels"])
    if len(gates) != 1:
        raise InputError(
            f"vote: the gatekeepers need one label to decide, there are {len(gates)}: specialists lack one label alike, "
            "or all labels but one are positive"
        )
    return Voting(gates.pop(), protected_class, tuple(scopes), soft)


@dataclass
class Outcome:
    """What the blended runs came to.

    Attributes:
        rule: of a vote, argmax on equal weights stands here.
        untuned_weights: the given weights, or equal ones: what argmax is blended with.
        voting: None where the rule decides.
        argmax, in_sample: labels [n] of the out-of-fold rows; cross_fitted: [repeats, n].
        before, after: blended probabilities [n, c], at temperature 1 and at the rule's.
    """

    rule: decoding.Rule
    untuned_weights: np.ndarray
    voting: Voting | None
    argmax: np.ndarray
    in_sample: np.ndarray
    cross_fitted: np.ndarray
    before: np.ndarray
    after: np.ndarray
    notes: list[str]


# ------------------------------------------------------------------------------------------------------------- comparison


@dataclass
class System:
    """Out-of-fold predictions of a run or an ensemble.

    Attributes:
        what: how the predictions came about.
        predictions: int64 [repeats, n]; one repeat where nothing was fitted.
        table: ids, dialogues and labels; its logits are not used.
    """

    reference: str
    what: str
    info: dict[str, Any]
    table: LogitTable
    predictions: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """For `oof_predictions.json` in an ensemble's folder; `read_system` reads it back."""
        return {
            "what": self.what,
            **{key: self.info[key] for key in SHARED_KEYS},
            "id": self.table.id,
            "dialogue_id": self.table.dialogue_id,
            "label": self.table.label.tolist(),
            "predictions": self.predictions.tolist(),
        }


def read_system(reference: str) -> System:
    """What a run (argmax) or an ensemble's output folder (its cross-fitted decision) predicted out of fold.

    Raises:
        InputError: neither, or not readable.
    """
    path = Path(reference) / PREDICTIONS_FILE
    if not path.is_file():
        run = artifacts.read_run(reference)
        return System(reference, "argmax", run.info, run.oof, run.oof.logits.argmax(axis=1)[None])
    content = artifacts.read_json(path)
    try:
        labels, predictions = np.array(content["label"]), np.array(content["predictions"])
        names, count = content["label_names"], len(content["id"])
        whole = all(isinstance(text, str) for key in ("id", "dialogue_id") for text in content[key])
        fits = (
            whole
            and len(content["dialogue_id"]) == count == len(set(content["id"]))
            and labels.shape == (count,)
            and predictions.shape[1:] == (count,)
            and count > 0
            and all(
                array.dtype.kind == "i" and array.min() >= 0 and array.max() < len(names)
                for array in (labels, predictions)
            )
            and set(content["positive_labels"]) <= set(range(len(names)))
            and isinstance(content["what"], str)
            and content["fold_groups"] in artifacts.FOLD_GROUPS
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path}: not what ensemble.py writes")
    zeros = np.zeros(count, dtype=np.int64)
    table = LogitTable(content["id"], content["dialogue_id"], zeros, labels, np.zeros((count, 1), np.float32))
    return System(reference, content["what"], content, table, predictions)


@dataclass
class Comparison:
    """Two systems on the same rows.

    Attributes:
        scores: of A and of B, the mean over their repeats.
        difference: B less A.
        interval: 95 % interval of the difference, by bootstrap over dialogues, both systems on the same samples.
        flips: one dict a pair of different labels: `a`, `b`, `rows`, `a_right`, `b_right`, `ids`; most rows first. Of
            repeated predictions the first repeat counts.
    """

    scores: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    flips: list[dict[str, Any]]


def compare(first: System, second: System, metric: str, seed: int) -> Comparison:
    """Compare B with A.

    Raises:
        InputError: the systems disagree in labels, fold groups or rows.
    """
    _check_shared(second.reference, second.info, first.reference, first.info)
    positions = _positions(second.reference, second.table, first.reference, first.table)
    labels, groups = first.table.label, first.table.dialogue_id
    both = first.predictions, second.predictions[:, positions]
    num_labels, positive = len(first.info["label_names"]), first.info["positive_labels"]
    scores = tuple(decoding.mean_scores(labels, rows, num_labels, positive)[metric] for rows in both)
    samples = [
        decoding.bootstrap_scores(
            labels, rows, groups, num_labels=num_labels, positive_labels=positive, metric=metric, seed=seed
        )
        for rows in both
    ]
    low, high = np.quantile(samples[1] - samples[0], [0.025, 0.975])
    a, b = both[0][0], both[1][0]
    pairs = Counter(zip(a[a != b].tolist(), b[a != b].tolist(), strict=True))
    flips = []
    for (of_a, of_b), rows in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        here = np.flatnonzero((a == of_a) & (b == of_b))
        flips.append(
            {
                "a": of_a,
                "b": of_b,
                "rows": rows,
                "a_right": int((labels[here] == of_a).sum()),
                "b_right": int((labels[here] == of_b).sum()),
                "ids": [first.table.id[row] for row in here],
            }
        )
    return Comparison(scores, scores[1] - scores[0], (float(low), float(high)), flips)
