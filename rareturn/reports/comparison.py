"""Is system B better than system A: their out-of-fold predictions, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.folds import FOLD_GROUPS
from rareturn.decisions.metrics import difference_interval
from rareturn.decisions.metrics import scores as all_scores
from rareturn.errors import InputError
from rareturn.files import read_json
from rareturn.reports.tables import Table
from rareturn.runs.alignment import SHARED_KEYS, check_shared, row_positions
from rareturn.runs.reading import read_run
from rareturn.runs.tables import LogitTable

PREDICTIONS_FILE = "oof_predictions.json"


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
        run = read_run(reference)
        return System(reference, "argmax", run.info, run.oof, run.oof.logits.argmax(axis=1)[None])
    content = read_json(path)
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
            and content["fold_groups"] in FOLD_GROUPS
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
    check_shared(second.reference, second.info, first.reference, first.info)
    positions = row_positions(second.reference, second.table, first.reference, first.table)
    labels, groups = first.table.label, first.table.dialogue_id
    both = first.predictions, second.predictions[:, positions]
    num_labels, positive = len(first.info["label_names"]), first.info["positive_labels"]
    scores = tuple(all_scores(labels, rows, num_labels, positive)[metric] for rows in both)
    interval = difference_interval(
        labels, *both, groups, num_labels=num_labels, positive_labels=positive, metric=metric, seed=seed
    )
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
    return Comparison(scores, scores[1] - scores[0], interval, flips)


def flip_table(found: Comparison, label_names: Sequence[str], num_rows: int) -> Table:
    """The rows on which two systems differ, by pair of labels, with the first ids of each."""
    rows = [
        [
            f"{flip['a']} {label_names[flip['a']]} -> {flip['b']} {label_names[flip['b']]}",
            str(flip["rows"]),
            str(flip["a_right"]),
            str(flip["b_right"]),
            ", ".join(flip["ids"][:3]) + (", ..." if flip["rows"] > 3 else ""),
        ]
        for flip in found.flips
    ]
    total = sum(flip["rows"] for flip in found.flips)
    return Table(
        f"Rows that flip: {total} of {num_rows}", ("A -> B", "rows", "A right", "B right", "ids"), rows
    )
