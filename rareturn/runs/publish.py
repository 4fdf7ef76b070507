"""Pushing and pulling runs: the models lie in `ORG/NAME-RUN`, the tables of all runs in the dataset `ORG/NAME-oof`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from rareturn.data.folds import read_folds
from rareturn.errors import InputError
from rareturn.files import disk_errors, packaged, write_bytes
from rareturn.runs.folder import (
    adapter_dir,
    check_same_run,
    fold_is_complete,
    metrics_path,
    read_run_info,
    table_path,
)
from rareturn.runs.hub import Content, add_to_collection, may_travel, pull_files, push_files
from rareturn.runs.references import Reference, model_repo, table_repo


def push_fold(
    run_dir: str | os.PathLike, fold: int, namespace: str, name: str, *, private: bool = True
) -> dict[str, str]:
    """Push a complete fold: one commit to each repo, of paths that no other fold writes; again changes nothing.

    The model's files are those in `RUN/fold-<k>/adapter/` and directly in `RUN/fold-<k>/` (metrics, a linear head).
    Returns repo id to the SHA of a commit that holds the files; fails as `push_files` does.
    """
    run_dir = Path(run_dir)
    run = read_run_info(run_dir)["name"]
    if not fold_is_complete(run_dir, fold):
        raise InputError(f"{run_dir}: fold {fold} is not complete: nothing to push")
    adapter = adapter_dir(run_dir, fold)
    sources = [(path, path.name) for path in sorted(adapter.parent.iterdir())]
    sources += [(path, path.relative_to(adapter).as_posix()) for path in sorted(adapter.rglob("*"))]
    model_files: dict[str, Content] = {
        f"fold-{fold}/{place}": path
        for path, place in sources
        # PEFT writes an empty card template beside each adapter; the run's own card is at the root.
        if path.is_file() and may_travel(place) and path.name != "README.md" and path.name[0] != "."
    }
    paths = {split: table_path(run_dir, split, fold) for split in ("oof", "test")}
    tables: dict[str, Content] = {
        f"data/{run}/{split}-fold-{fold}.parquet": path for split, path in paths.items() if path.is_file()
    }
    options = {"message": f"{run}: fold {fold}", "kept_in": run_dir, "private": private}
    repos = model_repo(namespace, name, run), table_repo(namespace, name)
    return {
        repos[0]: push_files(repos[0], model_files, **options),
        repos[1]: push_files(repos[1], tables, repo_type="dataset", **options),
    }


def push_run(
    run_dir: str | os.PathLike,
    namespace: str,
    name: str,
    *,
    model_card: str,
    facts: Mapping[str, Sequence[str]] | None = None,
    files: Mapping[str, bytes] | None = None,
    private: bool = True,
) -> dict[str, str]:
    """Push what belongs to the whole run: `run.json`, `folds.json`, the card, and the run's config in the dataset card.

    Other configs and all prose of an existing dataset card are kept, even if another process changes it at the same
    moment. `facts` (`license`, `datasets`, …) are added to its header; `files` go beside the model card. The collection
    `NAME` ties the repos together. Returns and fails as `push_fold`.
    """
    run_dir = Path(run_dir)
    info = public_info(read_run_info(run_dir))
    run = info["name"]
    repos = model_repo(namespace, name, run), table_repo(namespace, name)
    has_test = any((run_dir / "test").glob("fold-*.parquet"))
    read_folds(run_dir / "folds.json")
    of_run: dict[str, Content] = {
        "run.json": (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode(),
        "folds.json": run_dir / "folds.json",
    }
    tables: dict[str, Content] = {f"data/{run}/{file}": content for file, content in of_run.items()}
    tables["README.md"] = lambda present: dataset_card(present, repos[1], run, has_test, facts or {})
    options = {"message": f"{run}: run and card", "kept_in": run_dir, "private": private}
    shas = {
        repos[0]: push_files(
            repos[0], {**of_run, "README.md": model_card.encode(), **(files or {})}, **options
        ),
        repos[1]: push_files(repos[1], tables, repo_type="dataset", **options),
    }
    add_to_collection(namespace, name, [(repos[0], "model"), (repos[1], "dataset")], private=private)
    return shas


def public_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """`run.json` as it is pushed: in `command` and `recipe`, absolute paths are reduced to file names.

    Doing it twice changes nothing, so a pushed run.json and the one on disk are compared by it.
    """

    def reduced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: reduced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [reduced(item) for item in value]
        if isinstance(value, str):
            flag, given, path = value.rpartition("=")
            for kind in (PurePosixPath, PureWindowsPath):
                if kind(path).is_absolute():
                    return flag + given + kind(path).name
        return value

    try:
        words = shlex.split(info["command"])
    except ValueError:  # another tool's idea of a command line
        words = info["command"].split()
    return {**info, "recipe": reduced(info["recipe"]), "command": shlex.join(reduced(words))}


def dataset_card(
    present: bytes | None, repo_id: str, run: str, has_test: bool, facts: Mapping[str, Sequence[str]]
) -> bytes:
    """The dataset repo's README.md (None: there is none yet) with a run's config and facts; everything else in it stays.

    A ValueError where the YAML header cannot be read, so that it cannot be kept.
    """
    splits = ("oof", "test") if has_test else ("oof",)
    files = [{"split": split, "path": f"data/{run}/{split}-fold-*.parquet"} for split in splits]
    config = {"config_name": run, "data_files": files}
    if present is None:
        name = repo_id.split("/")[1].removesuffix("-oof")
        template = packaged("reports/templates/dataset_card.md.jinja")
        data = DatasetCardData(tags=["rareturn"])
        card = DatasetCard.from_template(data, str(template), name=name, repo_id=repo_id, run=run)
    else:
        try:
            card = DatasetCard(present.decode())
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"the YAML header of its README.md cannot be read: {error}") from None
    configs, before = card.data.get("configs", []), card.data.to_dict()
    if not isinstance(configs, list) or not all(isinstance(other, dict) for other in configs):
        raise ValueError("the configs in the YAML header of its README.md are not a list of mappings")
    if config not in configs:
        others = [other for other in configs if other.get("config_name") != run]
        card.data["configs"] = [*others, config]
    stated = {
        **facts,
        "source_datasets": facts.get("datasets", ()),
        "task_categories": ["text-classification"],
    }
    for key, names in stated.items():
        known = card.data.get(key) or []
        known = known if isinstance(known, list) else [known]
        if new := [name for name in names if name not in known]:
            card.data[key] = new[0] if key == "license" and not known and len(new) == 1 else [*known, *new]
    return present if present is not None and card.data.to_dict() == before else str(card).encode()


def pull_run(reference: str | os.PathLike, where: Reference) -> tuple[Path, str]:
    """Fetch a run's tables from the Hub into the cache; returns the folder with `run.json` and the commit's SHA."""
    options = {"repo_type": "dataset", "revision": where.revision}
    root, sha = pull_files(where.repo_id, [f"data/{where.run}/*"], **options)
    folder = root / "data" / where.run
    if not folder.is_dir():
        raise InputError(f"{reference}: {where.repo_id} has no run {where.run!r}")
    return folder, sha


def pull_adapters(repo_id: str, folds: Sequence[str], *, revision: str | None = None) -> tuple[Path, str]:
    """Fetch models from a run's repo into the cache; returns the folder of the `fold-<k>` and the commit's SHA."""
    folder, sha = pull_files(repo_id, [f"{fold}/*" for fold in folds], revision=revision)
    for fold in folds:
        if not any((folder / fold).glob("*.safetensors")):
            raise InputError(f"{repo_id}: {fold} holds no safetensors at {sha}")
    return folder, sha


def fetch_folds(run_dir: Path, folds: Sequence[int], namespace: str, name: str, run: str) -> None:
    """Lay out complete folds that were trained elsewhere as if they had been trained here: `push_fold` backwards.

    Of folds that are complete here, only their test tables are fetched. An InputError where the folder holds another run,
    the Hub lacks a part, or the disk is full.
    """
    repo_id, models = table_repo(namespace, name), model_repo(namespace, name, run)
    tables, _ = pull_run(f"{repo_id}:{run}", Reference(None, repo_id, run))
    check_same_run(run_dir, read_run_info(tables))
    if missing := [fold for fold in folds if not fold_is_complete(run_dir, fold)]:
        pushed, _ = pull_adapters(models, [f"fold-{fold}" for fold in missing])
        paths = [pushed / f"fold-{fold}/metrics.json" for fold in missing]
        paths += [tables / f"oof-fold-{fold}.parquet" for fold in missing] + [tables / "folds.json"]
        if gone := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{models}: {gone[0]} of its run is not on the Hub; push the run again")
    with disk_errors(run_dir):
        for file in ("run.json", "folds.json"):
            write_bytes(run_dir / file, (tables / file).read_bytes(), overwrite=False)
        for fold in folds:
            if (table := tables / f"test-fold-{fold}.parquet").is_file():
                write_bytes(table_path(run_dir, "test", fold), table.read_bytes())
        for fold in missing:
            adapter, source = adapter_dir(run_dir, fold), pushed / f"fold-{fold}"
            beside = adapter.with_name(".adapter")  # a part of a model would pass for a whole one
            for path in (beside, adapter):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(source, beside, ignore=shutil.ignore_patterns("metrics.json"))
            beside.rename(adapter)
            write_bytes(table_path(run_dir, "oof", fold), (tables / f"oof-fold-{fold}.parquet").read_bytes())
            write_bytes(metrics_path(run_dir, fold), (source / "metrics.json").read_bytes())  # last: complete
