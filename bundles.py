"""`ensemble.json`: all that a later prediction needs to repeat an ensemble.

schema_version  1
name, label_names, positive_labels, label_guide
blend           "arithmetic" or "geometric"
method          how the decision was found; "vote" and "soft_vote" stand for a vote, described in `vote`
decision        bias, protected_class, threshold, temperature (DESIGN 8)
runs            one object a run: name, reference, revision (of its tables), weight, label_scope, base_model,
                base_revision, loader (quantization, dtype, …), window, prompt_fingerprint, label_guide, and `model`:
                null (only tables were shared), or
                  {"folder": run folder, relative to ensemble.json, "folds": [{"subfolder", "sha256": {file: …}}]}
                  {"repo_id": …, "revision": commit SHA, "folds": [{"subfolder"}]}
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import artifacts
import decoding
import hub
from artifacts import Run
from command_line import InputError
from dialogues import LabelGuide, parse_label_guide

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local_model(folder: Path, num_folds: int, beside: Path) -> dict[str, Any] | None:
    folds = []
    for fold in range(num_folds):
        adapter = artifacts.adapter_dir(folder, fold)
        place = adapter if adapter.is_dir() else adapter.parent
        weights = sorted(place.glob("*.safetensors"))
        if not weights:
            return None
        folds.append(
            {
                "subfolder": place.relative_to(folder).as_posix(),
                "sha256": {path.name: _sha256(path) for path in weights},
            }
        )
    return {"folder": Path(os.path.relpath(folder, beside)).as_posix(), "folds": folds}


def _hub_model(repo_id: str, run: Run) -> dict[str, Any]:
    """The run's model repo at its newest commit.

    Raises:
        InputError: no such repo, one of another run, or a fold is missing there.
    """
    folder, sha = hub.pull_files(repo_id, patterns=["run.json", "fold-*/metrics.json"])
    if artifacts.read_json(folder / "run.json") != run.info:
        raise InputError(f"{repo_id}: run.json: it is not the run of {run.reference}")
    subfolders = [f"fold-{fold}" for fold in range(run.info["num_folds"])]
    missing = [name for name in subfolders if not (folder / name / "metrics.json").is_file()]
    if missing:
        raise InputError(f"{repo_id}: {', '.join(missing)} is not there; push it first (--push_only)")
    return {"repo_id": repo_id, "revision": sha, "folds": [{"subfolder": name} for name in subfolders]}


def describe_run(run: Run, output_dir: Path) -> dict[str, Any]:
    """A run's part of the bundle, its weight still open. A run whose models cannot be found is described without them, with a warning."""
    info, where = run.info, artifacts.parse_reference(run.reference)
    if where.folder is not None:
        model = _local_model(where.folder, info["num_folds"], output_dir)
        problem = f"{run.reference}: holds no models of its folds"
    else:
        model, problem = None, ""
        try:
            model = _hub_model(f"{where.repo_id.removesuffix('-oof')}-{where.run}", run)
        except InputError as error:
            problem = str(error)
    if model is None:
        logger.warning(f"{problem}; ensemble.json lists the run without a model: predict.py cannot use it")
    return {
        "name": run.name,
        "reference": run.reference,
        "revision": run.revision,
        "weight": None,
        "label_scope": info.get("label_scope"),
        "base_model": info["base_model"],
        "base_revision": info["base_revision"],
        "loader": info.get("loader"),
        "window": info.get("window"),
        "prompt_fingerprint": info["prompt_fingerprint"],
        "label_guide": info.get("label_guide"),
        "model": model,
    }


def refer_to_hub(part: dict[str, Any], run: Run, namespace: str, name: str) -> dict[str, Any]:
    """A run's part of the bundle with the Hub's repos in place of folders, which nobody else has.

    Args:
        namespace, name: of the system; its run RUN was pushed to `NAMESPACE/NAME-RUN` and `NAMESPACE/NAME-oof`.

    Raises:
        InputError: a run that is only on this disk.
    """
    if run.revision is not None:
        return part
    tables = artifacts.table_repo(namespace, name)
    try:
        model = part["model"] and _hub_model(artifacts.model_repo(namespace, name, run.name), run)
        revision = hub.resolve_revision(tables, repo_type="dataset")
    except InputError as error:
        raise InputError(
            f"{run.reference}: others cannot load an ensemble of a run that is not on the Hub: {error}"
        ) from None
    return {**part, "model": model, "reference": f"{tables}:{run.name}", "revision": revision}
