"""Several runs as one system: lining up their rows, blending, voting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import decoding
from artifacts import LogitTable, Run
from command_line import InputError
from dialogues import NO_LABEL, Row

SHARED_KEYS = ("label_names", "positive_labels", "fold_groups")


# --------------------------------------------------------------------------------------------------------- lining up rows


def check_shared(where: str, info: Mapping[str, Any], first_where: str, first: Mapping[str, Any]) -> None:
    """Refuse a run or system that was made for other labels or other folds than the first.

    Raises:
        InputError: the first disagreement in `SHARED_KEYS`.
    """
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


def row_positions(where: str, table: LogitTable, first_where: str, first: LogitTable) -> np.ndarray:
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
        check_shared(run.reference, run.info, first.reference, first.info)
        aligned.append(run.oof.logits[row_positions(run.reference, run.oof, first.reference, first.oof)])
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
        positions = row_positions(where, table, test_file, asked)
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


def cross_fitted_scaling(
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str],
    weights: np.ndarray,
    blend: str,
    num_splits: int,
    seed: int,
) -> np.ndarray:
    """Blended probabilities [n, c], each row's at the temperature that the other folds' dialogues ask for."""
    folds = decoding.grouped_folds(labels, groups, logits[0].shape[1], num_splits, seed)
    scaled = np.empty(logits[0].shape)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        temperature = decoding.fit_temperature([run[train] for run in logits], labels[train], weights, blend)
        scaled[~train] = decoding.blend(
            [decoding.softmax(run[~train], temperature) for run in logits], weights, blend
        )
    return scaled


def protected_label(run: Run) -> int:
    """The label that a gate protects and to which a vote's ties go: the run's, or the most frequent one.

    Raises:
        InputError: the run names one that is no label.
    """
    label = run.info.get("protected_label")
    if label is None:
        return int(np.bincount(run.oof.label).argmax())
    if type(label) is not int or not 0 <= label < run.num_labels:
        raise InputError(f"{run.reference}: protected_label: {label!r} is not one of 0..{run.num_labels - 1}")
    return label


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
        scaled: the same at a temperature that was fitted on other dialogues.
    """

    rule: decoding.Rule
    untuned_weights: np.ndarray
    voting: Voting | None
    argmax: np.ndarray
    in_sample: np.ndarray
    cross_fitted: np.ndarray
    before: np.ndarray
    after: np.ndarray
    scaled: np.ndarray
    notes: list[str]
