"""`ensemble.json`: everything that a later prediction needs to repeat an ensemble. Its fields are those of `Bundle`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rareturn.data.label_guide import LabelGuide
from rareturn.decisions.rules import Rule
from rareturn.errors import InputError
from rareturn.files import check_content, file_digest, read_json
from rareturn.runs.decision_file import Checked, Label, SavedRule, WeightedRun, rule_content
from rareturn.runs.hub import pull_files, resolve_revision
from rareturn.runs.publish import public_info, pull_adapters
from rareturn.runs.reading import Run
from rareturn.runs.references import check_revision, model_repo, parse_reference, table_repo

logger = logging.getLogger(__name__)

HUB_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
HUB_BUNDLE = re.compile(rf"(?P<repo>{HUB_REPO})(?:@(?P<revision>[^@\s]+))?")
HUB_BASE = re.compile(rf"{HUB_REPO}|[A-Za-z0-9][\w.-]*")
DECISION = ("bias", "protected_class", "threshold", "temperature")

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
WeightsFile = Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]


class Fold(Checked):
    """A fold's model: its place in the run folder (on the Hub without `/adapter`), the SHA-256 of its weights."""

    subfolder: str = Field(pattern=r"^fold-\d+(/adapter)?$")
    sha256: dict[WeightsFile, str] = Field(default_factory=dict)


class Models(Checked):
    """A run's models: in a folder relative to `ensemble.json`, in a repo at a commit, or in both."""

    folder: str | None = None
    repo_id: str | None = Field(default=None, pattern=f"^{HUB_REPO}$")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    folds: list[Fold] = Field(min_length=1)

    @model_validator(mode="after")
    def _somewhere(self) -> Models:
        if self.folder is None and (self.repo_id is None or self.revision is None):
            raise ValueError("a folder, or a repo_id and its revision, must be there")
        return self


class Loader(Checked):
    """How the base is loaded; values reach libraries, so each is one of a few."""

    head: Literal["classifier", "label_tokens"] = "classifier"
    pooling: Literal["native", "mean", "turns"] = "native"
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Attention | None = None
    trust_remote_code: bool = False
    gguf_file: Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")] | None = None
    bf16: bool = False


class Window(Checked):
    """The rendering's window (DESIGN 4), in turns, tokens and turns."""

    max_turns: Size
    max_seq_length: Size
    window_stride: Size


class Features(Checked):
    """What a linear probe reads: the output of one layer, counted from 1, or of several; and of what."""

    layer: int | list[int]
    parts: list[str]


class BundledRun(WeightedRun):
    """A run, and how its models are found and fed. `model` is null where only its tables were shared."""

    oof_sha256: str | None = None
    label_scope: list[Label] | None
    labels_named: bool | None = None
    base_model: str
    base_revision: str | None
    loader: Loader
    window: Window
    features: Features | None = None
    prompt_fingerprint: str | None
    model: Models | None


class Bundle(SavedRule):
    """The content of `ensemble.json`, where `bias` and what belongs to it stand under `decision`."""

    schema_version: Literal[1]
    name: str
    guide: LabelGuide = Field(alias="label_guide")
    runs: list[BundledRun] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, content: Any) -> Any:
        decision = content.get("decision") if isinstance(content, dict) else None
        return {**content, **decision} if isinstance(decision, dict) else content

    @model_validator(mode="after")
    def _same_labels(self) -> Bundle:
        if self.guide.names != self.label_names:
            raise ValueError(f"label_guide: labels {self.guide.names}, but label_names {self.label_names}")
        return self


def read_bundle(reference: str) -> tuple[Bundle, Path]:
    """What an `ensemble.json` holds, and the folder that it lies in: that of ensemble.py, or a copy from the Hub.

    An InputError has a line for each field that is missing or wrong. A bundle from the Hub (`ORG/NAME[@REVISION]`) may
    not name folders of this machine, neither for its models nor for their bases.
    """
    folder = Path(reference)
    if pulled := not folder.is_dir():
        if (match := HUB_BUNDLE.fullmatch(reference)) is None:
            raise InputError(f"{reference}: no such folder, nor a repo ORG/NAME[@REVISION] on the Hub")
        check_revision(match["revision"], reference)
        folder, _ = pull_files(match["repo"], ["ensemble.json"], revision=match["revision"])
    if not (folder / "ensemble.json").is_file():
        is_run = (folder / "run.json").is_file()
        advice = "; it is a run: make an ensemble of it, ensemble.py --runs" if is_run else ""
        raise InputError(f"{reference}: holds no ensemble.json{advice}")
    where, lines = f"{reference}: ensemble.json", []
    bundle = check_content(Bundle, read_json(folder / "ensemble.json"), where)
    for place, run in enumerate(bundle.runs):
        if run.model is None:
            lines.append(f"{run.name} came without its models: only its tables were shared")
        elif pulled and run.model.folder is not None:
            lines.append(f"runs.{place}.model.folder: a bundle from the Hub may not name a folder here")
        if pulled and is_local_base(run.base_model):
            problem = f"{run.base_model!r} is a path on this machine, not a Hub id"
            lines.append(f"runs.{place}.base_model: {problem}")
    if lines:
        raise InputError(*(f"{where}: {line}" for line in lines))
    return bundle, folder


def is_local_base(name: str) -> bool:
    """Whether a base model's name would be looked up on this disk."""
    return HUB_BASE.fullmatch(name) is None or os.path.isdir(name)


def model_folders(model: Models, folder: Path) -> list[Path]:
    """The folder of each fold's model: the run folder if its weights are the bundle's, else pulled from the Hub.

    `folder` is where the bundle lies. An InputError for a model that is nowhere to be had, or whose weights are not
    those that the bundle was made with.
    """
    if model.folder is not None:
        try:
            return _checked(model.folds, [folder / model.folder / fold.subfolder for fold in model.folds])
        except InputError:
            if model.repo_id is None:
                raise
    names = [fold.subfolder.removesuffix("/adapter") for fold in model.folds]
    root, _ = pull_adapters(model.repo_id, names, revision=model.revision)
    return _checked(model.folds, [root / name for name in names])


def _checked(folds: Sequence[Fold], places: list[Path]) -> list[Path]:
    for fold, place in zip(folds, places, strict=True):
        for name, digest in fold.sha256.items():
            if not (place / name).is_file():
                raise InputError(f"{place / name}: missing; the ensemble needs it")
            if file_digest(place / name) != digest:
                raise InputError(f"{place / name}: its SHA-256 is not that of the ensemble's weights")
    return places


def bundle_content(name: str, rule: Rule, runs: Sequence[Run], models: Sequence[Any]) -> dict[str, Any]:
    """The content of an `ensemble.json`; `models` is what `find_models` gives for each run."""
    content = {"schema_version": 1, "name": name, **rule_content(rule, runs)}
    decision = {key: content.pop(key) for key in DECISION}
    for part, run, model in zip(content["runs"], runs, models, strict=True):
        part |= {key: run.info.get(key) for key in BundledRun.model_fields if key not in part}
        part["model"] = model
    return {**content, "label_guide": runs[0].info.get("label_guide"), "decision": decision}


def find_models(run: Run, output_dir: Path) -> dict[str, Any] | None:
    """Where a run's models are, as `Models` reads it back; None with a warning if they cannot be found."""
    try:
        return _locate(run, output_dir)
    except InputError as error:
        logger.warning(f"{error}; ensemble.json lists the run without a model: predict.py cannot use it")
        return None


def trained_folders(run: Run) -> list[Path]:
    """The folder of each fold's model, pulled where the run is on the Hub; an InputError where they cannot be found."""
    here = Path()
    return model_folders(Models(**_locate(run, here)), here)


def _locate(run: Run, output_dir: Path) -> dict[str, Any]:
    where, folds = parse_reference(run.reference), []
    if where.folder is None:
        return _hub_models(f"{where.repo_id.removesuffix('-oof')}-{where.run}", run.info, run.reference)
    for fold in range(run.info["num_folds"]):
        name = f"fold-{fold}"
        name += "/adapter" if (where.folder / name / "adapter").is_dir() else ""
        weights = sorted((where.folder / name).glob("*.safetensors"))
        folds.append({"subfolder": name, "sha256": {path.name: file_digest(path) for path in weights}})
    if not all(fold["sha256"] for fold in folds):
        raise InputError(f"{run.reference}: holds no models of its folds")
    return {"folder": Path(os.path.relpath(where.folder, output_dir)).as_posix(), "folds": folds}


def _hub_models(repo_id: str, info: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """The run's model repo at its newest commit; an InputError if it is another run's or lacks a fold."""
    folder, sha = pull_files(repo_id, ["run.json", "fold-*/metrics.json"])
    if read_json(folder / "run.json") not in (info, public_info(info)):
        raise InputError(f"{repo_id}: run.json: not that of {reference}")
    names = [f"fold-{fold}" for fold in range(info["num_folds"])]
    if missing := [name for name in names if not (folder / name / "metrics.json").is_file()]:
        raise InputError(f"{repo_id}: {', '.join(missing)} is not there; push it first (--push_only)")
    return {"repo_id": repo_id, "revision": sha, "folds": [{"subfolder": name} for name in names]}


def refer_to_hub(part: Mapping[str, Any], namespace: str, name: str) -> dict[str, Any]:
    """A run of the bundle with its repos on the Hub; its folder stays, for predictions on this machine.

    An InputError for a run that others could not load, because it or its base is only on this disk.
    """
    where = f"{part['reference']}: others cannot load an ensemble of a run that is not on the Hub"
    if is_local_base(part["base_model"]):
        raise InputError(f"{where}: its base model is a folder, {part['base_model']}")
    if part["revision"] is not None:
        return dict(part)
    try:
        info, tables = read_json(Path(part["reference"]) / "run.json"), table_repo(namespace, name)
        found = _hub_models(model_repo(namespace, name, part["name"]), info, part["reference"])
        revision = resolve_revision(tables, repo_type="dataset")
        model = part["model"] and {**found, **part["model"], "revision": found["revision"]}
        return {**part, "model": model, "reference": f"{tables}:{part['name']}", "revision": revision}
    except InputError as error:
        raise InputError(
            f"{where}: {error}; if it was pushed under another name, give ORG/NAME-oof:RUN in --runs"
        ) from None
