"""A run folder: `run.json`, `fold-<k>/`, `oof/fold-<k>.parquet`, `test/fold-<k>.parquet`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rareturn.data.folds import short
from rareturn.errors import InputError
from rareturn.files import read_json, write_json
from rareturn.runs.schemas import check_run_info

SHARED_KEYS = (
    "label_names",
    "positive_labels",
    "num_folds",
    "fold_seed",
    "fold_groups",
    "base_model",
    "data_fingerprint",
)


def check_same_run(run_dir: str | os.PathLike, info: dict[str, Any]) -> None:
    """Refuse a folder that holds another run; a folder without a run is fine.

    Raises:
        InputError: the folder holds a run with other labels, folds, base model or data.
    """
    path = Path(run_dir) / "run.json"
    if not path.exists():
        return
    present = check_run_info(read_json(path), str(path))
    for key in SHARED_KEYS:
        if present[key] != info[key]:
            raise InputError(
                f"{path}: {key}: the folder holds a run with {short(present[key])}, this one has {short(info[key])}; "
                "use another output_dir"
            )


def write_run_info(run_dir: str | os.PathLike, info: dict[str, Any]) -> None:
    """Write `run.json`, once: another fold of the same run finds it there and must be of one mind with it.

    Raises:
        InputError: see `check_same_run`.
    """
    path = Path(run_dir) / "run.json"
    check_run_info(info, str(path))
    write_json(path, info, overwrite=False)
    check_same_run(run_dir, info)


def adapter_dir(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/adapter`."""
    return Path(run_dir) / f"fold-{fold}" / "adapter"


def metrics_path(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/metrics.json`, the last file that a fold writes."""
    return Path(run_dir) / f"fold-{fold}" / "metrics.json"


def table_path(run_dir: str | os.PathLike, split: str, fold: int) -> Path:
    """`RUN/oof/fold-<k>.parquet` or `RUN/test/fold-<k>.parquet`."""
    return Path(run_dir) / split / f"fold-{fold}.parquet"


def complete_folds(run_dir: str | os.PathLike, num_folds: int, needs_test: bool = False) -> list[int]:
    """The folds of a run folder that are complete."""
    return [fold for fold in range(num_folds) if fold_is_complete(run_dir, fold, needs_test)]


def fold_is_complete(run_dir: str | os.PathLike, fold: int, needs_test: bool) -> bool:
    """Whether a fold's tables and metrics are there; being renamed into place, they are whole if they are."""
    return (
        metrics_path(run_dir, fold).is_file()
        and table_path(run_dir, "oof", fold).is_file()
        and (not needs_test or table_path(run_dir, "test", fold).is_file())
    )


def read_run_name(run_dir: Path) -> str:
    return check_run_info(read_json(run_dir / "run.json"), str(run_dir / "run.json"))["name"]
