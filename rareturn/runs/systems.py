"""Systems to compare: out-of-fold predictions of a run or an ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.folds import FOLD_GROUPS
from rareturn.data.label_guide import DEFAULT_METRIC, find_metric
from rareturn.errors import InputError
from rareturn.files import read_json
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
            and find_metric(str(content.get("metric", DEFAULT_METRIC)), names)
        )
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"{path}: not what ensemble.py writes")
    zeros = np.zeros(count, dtype=np.int64)
    table = LogitTable(content["id"], content["dialogue_id"], zeros, labels, np.zeros((count, 1), np.float32))
    return System(reference, content["what"], content, table, predictions)
