"""`ensemble.json`: all that a later prediction needs to repeat an ensemble.

schema_version  1
name, label_names, positive_labels, label_guide
blend           "arithmetic" or "geometric"
method          how the decision was found; "vote" and "soft_vote" stand for a vote, described in `vote`
decision        bias, protected_class, threshold, temperature (DESIGN 8)
runs            one object a run: name, reference, revision (of its tables), weight, label_scope, base_model,
                base_revision, loader (quantization, dtype, …), window, features (a linear probe's), prompt_fingerprint, label_guide, and `model`:
                null (only tables were shared), or
                  {"folder": run folder, relative to ensemble.json, "folds": [{"subfolder", "sha256": {file: …}}]}
                  {"repo_id": …, "revision": commit SHA, "folds": [{"subfolder"}]}
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rareturn.data.label_guide import LabelGuide, parse_label_guide
from rareturn.decisions.rules import Decision
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError
from rareturn.files import read_json
from rareturn.models.loading import loading_problems
from rareturn.runs.folder import adapter_dir
from rareturn.runs.hub import pull_files, resolve_revision
from rareturn.runs.publish import public_info, pull_adapters
from rareturn.runs.reading import Run
from rareturn.runs.references import check_revision, model_repo, parse_reference, table_repo

logger = logging.getLogger(__name__)


SCHEMA_VERSION = 1


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local_model(folder: Path, num_folds: int, beside: Path) -> dict[str, Any] | None:
    folds = []
    for fold in range(num_folds):
        adapter = adapter_dir(folder, fold)
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
    folder, sha = pull_files(repo_id, patterns=["run.json", "fold-*/metrics.json"])
    if read_json(folder / "run.json") not in (run.info, public_info(run.info)):
        raise InputError(f"{repo_id}: run.json: it is not the run of {run.reference}")
    subfolders = [f"fold-{fold}" for fold in range(run.info["num_folds"])]
    missing = [name for name in subfolders if not (folder / name / "metrics.json").is_file()]
    if missing:
        raise InputError(f"{repo_id}: {', '.join(missing)} is not there; push it first (--push_only)")
    return {"repo_id": repo_id, "revision": sha, "folds": [{"subfolder": name} for name in subfolders]}


def describe_run(run: Run, output_dir: Path) -> dict[str, Any]:
    """A run's part of the bundle, its weight still open.

    A run whose models cannot be found is described without them, with a warning.
    """
    info, where = run.info, parse_reference(run.reference)
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
        "features": info.get("features"),
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
    tables = table_repo(namespace, name)
    try:
        model = part["model"] and _hub_model(model_repo(namespace, name, run.name), run)
        revision = resolve_revision(tables, repo_type="dataset")
    except InputError as error:
        raise InputError(
            f"{run.reference}: others cannot load an ensemble of a run that is not on the Hub: {error}"
        ) from None
    return {**part, "model": model, "reference": f"{tables}:{run.name}", "revision": revision}


HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


HUB_BUNDLE = re.compile(rf"(?P<repo>{HUB_REPO.pattern})(?:@(?P<revision>[^@\s]+))?")


COMMIT = re.compile(r"[0-9a-f]{40}")


def read_bundle(reference: str) -> tuple[dict[str, Any], Path]:
    """Read and check a bundle.

    Args:
        reference: the output folder of ensemble.py, or `ORG/NAME[@REVISION]` on the Hub.

    Returns:
        What `ensemble.json` holds, and the folder that it lies in.

    Raises:
        InputError: no bundle there, or one line a field that is missing or wrong. A bundle from the Hub may not name
            folders of this machine.
    """
    if os.path.isdir(reference):
        folder, pulled = Path(reference), False
    else:
        match = HUB_BUNDLE.fullmatch(reference)
        if match is None:
            raise InputError(f"{reference}: no such folder, nor a repo ORG/NAME[@REVISION] on the Hub")
        if match["revision"] is not None:
            check_revision(match["revision"], reference)
        folder, _ = pull_files(match["repo"], revision=match["revision"], patterns=["ensemble.json"])
        pulled = True
    where = f"{reference}: ensemble.json"
    if not (folder / "ensemble.json").is_file():
        raise InputError(f"{reference}: holds no ensemble.json")
    bundle = read_json(folder / "ensemble.json")
    if not isinstance(bundle, dict):
        raise InputError(f"{where}: a mapping expected")
    if bundle.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version: {bundle.get('schema_version')!r}, this program reads {SCHEMA_VERSION}"
        )
    problems = [f"{where}: {problem}" for problem in _bundle_problems(bundle, pulled)]
    if problems:
        raise InputError(*problems)
    guide = parse_label_guide(bundle["label_guide"], f"{where}: label_guide")
    Decision.from_dict(
        {
            **bundle["decision"],
            **{key: bundle[key] for key in ("label_names", "positive_labels", "blend", "runs")},
        },
        where,
    )
    if guide.names != bundle["label_names"]:
        problems.append(
            f"{where}: label_guide: labels {guide.names}, but label_names {bundle['label_names']}"
        )
    if "vote" in bundle:
        num_runs = len(bundle["runs"])
        problems += [f"{where}: {problem}" for problem in _vote_problems(bundle["vote"], num_runs, guide)]
    if problems:
        raise InputError(*problems)
    return bundle, folder


def _bundle_problems(bundle: Mapping[str, Any], pulled: bool) -> Iterator[str]:
    kinds: dict[str, type] = {
        "name": str,
        "label_names": list,
        "positive_labels": list,
        "label_guide": dict,
        "blend": str,
        "method": str,
        "decision": dict,
        "runs": list,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(bundle.get(key), kind)]
    for key in wrong:
        yield f"{key}: missing or not a {kinds[key].__name__}"
    if "runs" not in wrong:
        if not bundle["runs"]:
            yield "runs: empty"
        for number, run in enumerate(bundle["runs"]):
            yield from (f"runs[{number}]: {problem}" for problem in _run_problems(run, pulled))


def read_vote(bundle: Mapping[str, Any]) -> Voting | None:
    """The vote that a bundle describes; None where the decision rule decides."""
    vote = bundle.get("vote")
    if vote is None:
        return None
    scopes = tuple(None if scope is None else tuple(scope) for scope in vote["label_scopes"])
    return Voting(vote["gate_label"], vote["protected_class"], scopes, vote["soft"])


def _vote_problems(vote: Any, num_runs: int, guide: LabelGuide) -> Iterator[str]:
    def is_label(value: Any) -> bool:
        return type(value) is int and value in guide.numbers

    if not isinstance(vote, dict):
        yield "vote: not an object"
        return
    scopes = vote.get("label_scopes")
    if not isinstance(scopes, list) or len(scopes) != num_runs:
        yield "vote: label_scopes: one a run expected"
    elif not all(
        scope is None or (isinstance(scope, list) and scope and all(map(is_label, scope))) for scope in scopes
    ):
        yield "vote: label_scopes: lists of label numbers or null expected"
    if not is_label(vote.get("gate_label")):
        yield "vote: gate_label: a label number expected"
    if vote.get("protected_class") is not None and not is_label(vote["protected_class"]):
        yield "vote: protected_class: a label number or null expected"
    if not isinstance(vote.get("soft"), bool):
        yield "vote: soft: true or false expected"


def _run_problems(run: Any, pulled: bool) -> Iterator[str]:
    if not isinstance(run, Mapping):
        yield "a mapping expected"
        return
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,),
        "base_model": (str,),
        "base_revision": (str, type(None)),
        "loader": (dict,),
        "window": (dict,),
        "prompt_fingerprint": (str, type(None)),
        "label_scope": (list, type(None)),
        "model": (dict,),
    }
    wrong = [key for key, kind in kinds.items() if key not in run or not isinstance(run[key], kind)]
    for key in wrong:
        if key == "model" and run.get("model", 0) is None:
            yield f"{run.get('name')} came without its models: its tables were shared alone"
        else:
            yield f"{key}: missing or of a wrong type"
    if "loader" not in wrong:
        yield from (f"loader: {problem}" for problem in loading_problems(run["loader"]))
    if "window" not in wrong:
        for name in ("max_turns", "max_seq_length", "window_stride"):
            if type(run["window"].get(name)) is not int or not 1 <= run["window"][name] <= 1 << 20:
                yield f"window: {name}: a positive integer expected"
    if run.get("features") is not None and not (
        isinstance(run["features"], Mapping) and type(run["features"].get("layer")) is int
    ):
        yield "features: layer: an integer expected"
    if isinstance(run.get("label_scope"), list) and not all(
        type(label) is int and label >= 0 for label in run["label_scope"]
    ):
        yield "label_scope: label numbers expected"
    if "model" not in wrong:
        yield from (f"model: {problem}" for problem in _model_problems(run["model"], pulled))


def _model_problems(model: Mapping[str, Any], pulled: bool) -> Iterator[str]:
    folds = model.get("folds")
    if not isinstance(folds, list) or not folds or not all(isinstance(fold, Mapping) for fold in folds):
        yield "folds: a list of mappings expected"
        return
    for number, fold in enumerate(folds):
        subfolder, hashes = fold.get("subfolder"), fold.get("sha256", {})
        if not isinstance(subfolder, str) or not re.fullmatch(r"fold-\d+(/adapter)?", subfolder):
            yield f"folds[{number}]: subfolder: {subfolder!r} is not fold-<k> or fold-<k>/adapter"
        if not isinstance(hashes, Mapping) or not all(
            isinstance(digest, str) and PurePosixPath(name).name == name and name.endswith(".safetensors")
            for name, digest in hashes.items()
        ):
            yield f"folds[{number}]: sha256: file names and their hashes expected"
    if "repo_id" in model:
        if not isinstance(model["repo_id"], str) or not HUB_REPO.fullmatch(model["repo_id"]):
            yield f"repo_id: {model['repo_id']!r} is no repo"
        if not isinstance(model.get("revision"), str) or not COMMIT.fullmatch(model["revision"]):
            yield "revision: a commit SHA expected"
    elif pulled:
        yield "repo_id: missing; an ensemble from the Hub may not name a folder here"
    elif not isinstance(model.get("folder"), str):
        yield "folder: missing"


def model_folders(run: Mapping[str, Any], folder: Path) -> list[Path]:
    """The folder of each fold's model, fetched from the Hub if need be.

    Args:
        run: one of a bundle's `runs`.
        folder: where the bundle lies, as `read_bundle` gives it.

    Raises:
        InputError: a model that cannot be had, or whose weights are not those that the bundle was made with.
    """
    model = run["model"]
    subfolders = [fold["subfolder"] for fold in model["folds"]]
    if "repo_id" in model:
        numbers = [int(name.split("/")[0].removeprefix("fold-")) for name in subfolders]
        root, _ = pull_adapters(model["repo_id"], revision=model["revision"], folds=numbers)
    else:
        root = folder / model["folder"]
    for fold in model["folds"]:
        for name, digest in fold.get("sha256", {}).items():
            path = root / fold["subfolder"] / name
            if not path.is_file():
                raise InputError(f"{path}: missing; the ensemble needs it")
            if _sha256(path) != digest:
                raise InputError(f"{path}: its SHA-256 differs from the one that the ensemble was made with")
    return [root / name for name in subfolders]
