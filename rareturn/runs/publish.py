"""Pushing and pulling runs: the models lie in `ORG/NAME-RUN`, the tables of all runs in the dataset `ORG/NAME-oof`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from rareturn.data.folds import read_folds
from rareturn.errors import InputError
from rareturn.runs.folder import adapter_dir, fold_is_complete, read_run_name, table_path
from rareturn.runs.hub import Content, add_to_collection, may_travel, pull_files, push_files
from rareturn.runs.references import model_repo, parse_reference, table_repo

DATASET_CARD = """
# {name}: logits

Out-of-fold (`oof`) and test (`test`) logits of the runs of `{name}`, one config a run, made with rareturn. A row has
`id`, `dialogue_id`, `fold` (of the model that made the logits), `label` (-1: none) and `logits` (float32, one a label);
`data/<run>/run.json` names the labels, `data/<run>/folds.json` holds the folds. There is no word of any dialogue here.

```python
from datasets import load_dataset

oof = load_dataset("{repo_id}", "{run}", split="oof")
```

In a script of rareturn: `calibrate.py --run {repo_id}:{run}`.
"""


def push_fold(
    run_dir: str | os.PathLike, fold: int, namespace: str, name: str, *, private: bool = True
) -> dict[str, str]:
    """Push a complete fold: one commit to the model repo, one to the dataset repo, of paths that no other fold writes.

    The model's files are those of `RUN/fold-<k>/adapter/` and the files that lie in `RUN/fold-<k>/` itself (metrics, a
    linear head). Pushing it again changes nothing.

    Returns:
        Repo id to the SHA of a commit that holds the files.

    Raises:
        InputError: the fold is not complete, or a name cannot be one.
        PushError: see `hub.push_files`.
    """
    run_dir = Path(run_dir)
    run = read_run_name(run_dir)
    if not fold_is_complete(run_dir, fold, needs_test=False):
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
    tables: dict[str, Content] = {
        f"data/{run}/{split}-fold-{fold}.parquet": table_path(run_dir, split, fold)
        for split in ("oof", "test")
        if table_path(run_dir, split, fold).is_file()
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
    private: bool = True,
    collection: bool = True,
) -> dict[str, str]:
    """Push what belongs to the whole run: `run.json`, `folds.json`, the card, and the run's config in the dataset's card.

    Other configs and all prose of a dataset card that is there are kept, also against another process that changes it
    at the same moment. The repos are tied together by a collection of the name `NAME`.

    Args:
        model_card: text of the model repo's README.md, YAML header included.

    Returns:
        Repo id to the SHA of a commit that holds the files.

    Raises:
        InputError, PushError: as `push_fold`.
    """
    run_dir = Path(run_dir)
    run = read_run_name(run_dir)
    repos = model_repo(namespace, name, run), table_repo(namespace, name)
    has_test = any((run_dir / "test").glob("fold-*.parquet"))
    facts = {file: run_dir / file for file in ("run.json", "folds.json")}
    read_folds(facts["folds.json"])
    options = {"message": f"{run}: run and card", "kept_in": run_dir, "private": private}
    shas = {
        repos[0]: push_files(repos[0], {**facts, "README.md": model_card.encode()}, **options),
        repos[1]: push_files(
            repos[1],
            {
                **{f"data/{run}/{file}": path for file, path in facts.items()},
                "README.md": lambda present: dataset_card(present, repos[1], run, has_test),
            },
            repo_type="dataset",
            **options,
        ),
    }
    if collection:
        add_to_collection(namespace, name, [(repos[0], "model"), (repos[1], "dataset")], private=private)
    return shas


def dataset_card(present: bytes | None, repo_id: str, run: str, has_test: bool) -> bytes:
    """The dataset repo's README.md with the config of one run in it; everything else in it stays.

    Args:
        present: the README as it is; None if there is none.

    Raises:
        ValueError: the README's YAML header cannot be read, so nothing can be kept of it.
    """
    splits = ("oof", "test") if has_test else ("oof",)
    config = {
        "config_name": run,
        "data_files": [{"split": split, "path": f"data/{run}/{split}-fold-*.parquet"} for split in splits],
    }
    name = repo_id.split("/")[1].removesuffix("-oof")
    if present is None:
        header, prose = {"tags": ["rareturn"]}, DATASET_CARD.format(name=name, repo_id=repo_id, run=run)
    else:
        text = present.decode()
        match = re.match(r"---[ \t]*\r?\n(.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
        prose = text[match.end() :] if match else text
        try:
            header = (yaml.safe_load(match[1] or "") if match else None) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"the YAML header of its README.md cannot be read: {error}") from None
    configs = (header.get("configs") or []) if isinstance(header, dict) else None
    if not isinstance(configs, list) or not all(isinstance(other, dict) for other in configs):
        raise ValueError("the configs in the YAML header of its README.md are no list of mappings")
    if present is not None and config in configs:
        return present
    names = [other.get("config_name") for other in configs]
    if run in names:
        configs[names.index(run)] = config
    else:
        configs = [*configs, config]
    header = yaml.safe_dump({**header, "configs": configs}, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{header}---\n{prose}".encode()


def pull_run(reference: str | os.PathLike) -> tuple[Path, str]:
    """Fetch a run's tables from the Hub into the cache: the folder with `run.json`, and the commit's SHA.

    Raises:
        InputError: not a Hub reference, no such repo, revision or run, or the Hub cannot be reached.
    """
    where = parse_reference(reference)
    if where.repo_id is None or where.run is None:
        raise InputError(f"{reference}: a folder, not a run on the Hub")
    folder, sha = pull_files(
        where.repo_id, repo_type="dataset", revision=where.revision, patterns=[f"data/{where.run}/*"]
    )
    if not (folder / "data" / where.run).is_dir():
        raise InputError(f"{reference}: {where.repo_id} has no run {where.run!r}")
    return folder / "data" / where.run, sha


def pull_adapters(repo_id: str, *, revision: str | None = None, folds: Iterable[int]) -> tuple[Path, str]:
    """Fetch a run's adapters from its model repo into the cache: the folder with `fold-<k>/`, and the commit's SHA.

    Raises:
        InputError: as `hub.pull_files`, or a fold without safetensors.
    """
    folds = list(folds)
    folder, sha = pull_files(repo_id, revision=revision, patterns=[f"fold-{fold}/*" for fold in folds])
    for fold in folds:
        if not any((folder / f"fold-{fold}").glob("*.safetensors")):
            raise InputError(f"{repo_id}: fold-{fold} holds no safetensors at {sha}")
    return folder, sha
