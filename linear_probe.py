# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Frozen or adapted features and a logistic head: the cheapest run, all folds in one process.

The reference task, about a minute on two cores:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file AIMH/PsyDefConv:Splits/train.json --output_dir outputs/probe
The fictional corpus, seconds:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --label_guide data/demo/label_guide.yaml --train_file data/demo/train.json \\
        --test_file data/demo/test.json --output_dir outputs/demo-probe
On the models that run_classification.py trained, fold by fold:
    python linear_probe.py --adapter outputs/demo-smollm2 --label_guide data/demo/label_guide.yaml \\
        --train_file data/demo/train.json --output_dir outputs/demo-adapted

Complete folds are skipped. `fold-<k>/head.safetensors` holds all that `LinearHead` needs, without pickle.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rareturn.command_line import (
    REQUIRED,
    HubArguments,
    LoaderArguments,
    TrunkCacheArguments,
    flag,
    parse_arguments,
    run,
    start_logging,
)
from rareturn.data.folds import FoldDataArguments, RunData, read_run_data, write_folds
from rareturn.errors import InputError
from rareturn.files import check_content, file_digest, write_json
from rareturn.reports.cards import print_closing_table
from rareturn.reports.push import check_push, push_folds
from rareturn.runs import folder
from rareturn.runs.bundle import Loader, Window, trained_folders
from rareturn.runs.reading import Run, read_run
from rareturn.runs.references import check_name
from rareturn.runs.tables import make_table, rows_digest, write_table

if TYPE_CHECKING:
    from rareturn.models.probing import FrozenFeatures, LinearHead

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ProbeArguments(LoaderArguments, TrunkCacheArguments, FoldDataArguments):
    """Rows, folds, the frozen model and the head."""

    _argument_group_name = "Probe"

    model_name_or_path: str | None = flag(None, "Frozen model: a Hub id or a folder; or give --adapter.")
    adapter: str | None = flag(
        None,
        "Run of run_classification.py, a folder or ORG/NAME-oof:RUN, with the same rows and folds: each fold's features "
        "come from its own trained model. Base, dtype, quantization and window are that run's.",
    )
    output_dir: str = flag(REQUIRED, "The run's folder.")
    run_name: str | None = flag(None, "Name of the run. Default: the output folder's name.")
    bf16: bool | None = flag(None, "bf16 autocast. Default: on a GPU, never on a CPU.")
    per_device_eval_batch_size: int = flag(32, "Turns in a forward pass of an encoder.")
    layer: list[int] | None = flag(
        None,
        "Layer whose output is taken, from 1; of several the head sees all. Default: two thirds up; with --adapter the "
        "last.",
    )
    pairs: bool = flag(
        False,
        "Let an encoder read target and context together, --max_seq_length tokens, in place of turn by turn.",
    )
    class_weights: Literal["none", "inverse_sqrt", "balanced"] = flag(
        "balanced",
        "In the loss, from the fold's training rows. balanced: 1/n, the best for a probe; inverse_sqrt: 1/sqrt(n).",
    )
    C: list[float] = flag([0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0], "Inverse L2 penalties to choose from.")
    seed: int = flag(42, "Seed of the inner folds that choose C.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.model_name_or_path or self.adapter):
            raise ValueError("--model_name_or_path is missing, and --adapter, whose base could be taken")
        if not all(0 < C < math.inf for C in self.C):
            raise ValueError(f"--C: every value must be a positive number, not {self.C}")
        for name in ("max_turns", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        self.C = sorted(set(self.C))
        if self.layer:  # one is a number, as run.json had it before there were several
            self.layer = self.layer[0] if len(set(self.layer)) == 1 else sorted(set(self.layer))


def take_from_run(arguments: ProbeArguments) -> tuple[Run, list[Path], dict[str, Any]]:
    """The run that --adapter names, its folds' models, and what finds their base beside the flags, which are set."""
    run = read_run(arguments.adapter)
    where, info = f"--adapter {run.reference}", run.info
    if info["loader"].get("tuning") not in ("lora", "full"):
        raise InputError(f"{where}: not a run of run_classification.py")
    loader = check_content(Loader, info["loader"], f"{where}: run.json: loader").model_dump()
    if loader.pop("trust_remote_code") and not arguments.trust_remote_code:
        advice = "allow it by --trust_remote_code"
        raise InputError(f"{where}: {info['base_model']} runs code of its own; {advice}")
    packaged = ":" in (info["base_revision"] or "")
    taken = check_content(Window, info["window"], where).model_dump()
    taken["model_name_or_path"] = info["base_model"]
    taken["model_revision"] = None if packaged else info["base_revision"]
    how = {name: loader.pop(name) for name in ("head", "pooling")}
    defaults = {item.name: item.default for item in fields(arguments)}
    for name, value in (taken | loader).items():
        if getattr(arguments, name) not in (value, defaults[name]):
            raise InputError(f"--{name}: {value} in the run of --adapter; leave the flag out")
        setattr(arguments, name, value)
    return run, trained_folders(run), how


def find_features(arguments: ProbeArguments, data: RunData, how: dict[str, Any]) -> FrozenFeatures:
    """What makes features of the rows, as the flags say; `how` comes from `take_from_run`."""
    import torch

    from rareturn.models import loading, probing

    if arguments.bf16 is None:
        arguments.bf16 = arguments.dtype == "float32" and torch.cuda.is_available()
    how |= {name: getattr(arguments, name) for name in loading.LOADING if hasattr(arguments, name)}
    base = loading.find_base_model(arguments.model_name_or_path, arguments.model_revision, **how)
    taken = {name: getattr(arguments, name) for name in ("layer", "window", "bf16", "pairs")}
    taken |= {"batch_size": arguments.per_device_eval_batch_size, "adapted": bool(arguments.adapter)}
    return probing.FrozenFeatures(base, data.guide, **taken)


def check_same_rows(run: Run, data: RunData, frozen: FrozenFeatures) -> None:
    """Refuse a run with other rows, folds or prompts: its models may have seen what they are to be judged on."""
    identity = run.info.get("identity") or {}
    rows, extra = identity.get("rows"), identity.get("extra")
    prompt = None if frozen.is_encoder else frozen.renderer.fingerprint
    for what, there, here in (
        ("label_names", run.label_names, data.guide.names),
        ("folds", run.folds, data.folds),
        ("rows", rows, rows and rows_digest(data.originals + data.validation)),
        ("--extra_train_file", extra, rows_digest(data.extra) if data.extra else None),
        ("prompt", prompt and run.info["prompt_fingerprint"], prompt),
    ):
        if there != here:
            raise InputError(f"--adapter {run.reference}: {what}: not those of these flags")


def extract_rows(
    frozen: FrozenFeatures, data: RunData, place: Path | None, limit_gb: float, trained: bool, tested: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Features of the rows that are `placed` and of test rows, where they are needed, by the base or the model in `place`.

    The cache has files of their own for each part, so that a corpus with other extra rows is not computed again.
    """
    parts = [part * trained for part in (data.originals + data.augmented, data.validation, data.extra)]
    parts.append(data.test * tested)
    *found, test = frozen.extract_cached(parts, data, place, limit_gb)
    found = [features for features in found if features is not None]
    return np.concatenate(found) if len(found) > 1 else next(iter(found), None), test


def fit_fold(
    arguments: ProbeArguments,
    frozen: FrozenFeatures,
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    judged: np.ndarray,
) -> tuple[LinearHead, dict[float, float]]:
    """The head of a fold's training rows, and the log losses among which its C was the least."""
    from rareturn.models import probing

    # Within an encoder's vectors directions keep their proportions. A decoder's coordinates are scaled one by one,
    # because a few of them are orders of magnitude larger than the rest.
    fitting = {"num_labels": len(frozen.guide.labels), "weights": arguments.class_weights}
    fitting["block_size"] = frozen.hidden_size if frozen.is_encoder else 1
    splits = probing.inner_folds(labels, groups, judged, arguments.seed)
    C, losses = probing.choose_C(features, labels, splits, arguments.C, **fitting)
    return probing.fit_head(features, labels, C=C, **fitting), losses


def main() -> None:
    # Arguments
    arguments, hub = parse_arguments((ProbeArguments, HubArguments), __doc__)
    run_dir = Path(arguments.output_dir)
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    if hub.push_only:
        return push_folds(run_dir, hub)
    check_push(hub, run_name)

    # Logging
    import transformers

    from rareturn.models import probing
    from rareturn.models.inference import peak_memory

    start_logging()
    transformers.utils.logging.set_verbosity_error()

    # Seed
    transformers.set_seed(arguments.seed)
    started = time.perf_counter()

    # Data
    trained, places, how = take_from_run(arguments) if arguments.adapter else (None, [], {})
    data = read_run_data(arguments, run_dir)
    rows, fold_of, judged = zip(*data.placed(), strict=True)

    # Model
    frozen = find_features(arguments, data, how)
    facts = {"seed": arguments.seed, "loader": frozen.base.loader | {"bf16": arguments.bf16}}
    facts["prompt_fingerprint"] = frozen.renderer.fingerprint
    facts["features"] = {"layer": frozen.layer, "parts": list(frozen.parts)}
    if trained:
        check_same_rows(trained, data, frozen)
        weights = [path for place in places for path in sorted(place.glob("*.safetensors"))]
        facts["adapter"] = [file_digest(path) for path in weights]
    info = folder.describe_run(run_name, data, frozen.base, arguments, **facts)
    folder.check_same_run(run_dir, info, arguments)  # before the model is loaded
    folds, digest = range(arguments.num_folds), rows_digest(data.test)
    untrained = [fold for fold in folds if not folder.fold_is_complete(run_dir, fold)]
    stale = [fold for fold in folds if not folder.test_table_is_current(run_dir, fold, digest)]
    untested = stale if data.test else []
    if not untrained + untested:
        logger.info(f"{run_dir} is complete: nothing to train")
        print_closing_table(run_dir, info, "C")
        return push_folds(run_dir, hub) if hub.push_to_hub else None
    limit = arguments.trunk_cache_gb
    if not trained:
        features, test_features = extract_rows(frozen, data, None, limit, bool(untrained), bool(untested))
        feature_seconds = round(time.perf_counter() - started, 1)
        logger.info(f"features after {feature_seconds} s")

    # Train, evaluate, save
    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id for row in rows])
    fold_of, judged = np.array(fold_of), np.array(judged)
    for fold in sorted({*untrained, *untested}):
        head_path = folder.metrics_path(run_dir, fold).with_name("head.safetensors")
        fold_started = time.perf_counter()
        if trained:
            needed = fold in untrained, fold in untested
            features, test_features = extract_rows(frozen, data, places[fold], limit, *needed)
        if fold in untrained:
            train = np.flatnonzero((fold_of != fold) & np.isin(labels, data.scope))
            part = [values[train] for values in (features, labels, groups, judged)]
            head, losses = fit_fold(arguments, frozen, *part)
            # The first thing written, so that a mistake in the input leaves no folder behind.
            write_folds(run_dir, data.folds, **arguments.split)
            folder.write_run_info(run_dir, info, arguments)
            if trained:  # the head's features need the model, here and on the Hub
                unlike = shutil.ignore_patterns("metrics.json", "README.md")
                shutil.copytree(places[fold], head_path.parent, ignore=unlike, dirs_exist_ok=True)
            head.save(head_path)
        else:
            head = probing.LinearHead.load(head_path)
        if fold in untested:
            table = make_table(data.test, fold, head.logits(test_features))
            write_table(folder.table_path(run_dir, "test", fold), table)
        if fold in untrained:
            held_out = np.flatnonzero((fold_of == fold) & judged)
            table = make_table([rows[index] for index in held_out], fold, head.logits(features[held_out]))
            write_table(folder.table_path(run_dir, "oof", fold), table)
            inner = {f"{value:g}": loss for value, loss in losses.items()}
            costs = {"C": head.C, "inner_log_loss": inner, "train_rows": len(train)}
            costs["seconds"] = round(time.perf_counter() - fold_started, 1)
            folder.write_fold_metrics(run_dir, info, fold, **costs)
    overall = print_closing_table(run_dir, info, "C")
    if untrained:
        seconds, memory = round(time.perf_counter() - started, 1), peak_memory()
        costs = {"seconds": seconds, "peak_memory_bytes": memory}
        costs |= {} if trained else {"feature_seconds": feature_seconds}
        write_json(run_dir / "metrics.json", overall | costs)
        print(f"{seconds} s in all, peak memory {memory / 2**20:.0f} MiB")

    # Push
    if hub.push_to_hub:
        push_folds(run_dir, hub)


if __name__ == "__main__":
    run(main)
