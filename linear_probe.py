"""Frozen features and a logistic head: the cheapest run, all folds in one process.

The reference task, about a minute on two cores:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file AIMH/PsyDefConv:Splits/train.json --output_dir outputs/probe
The fictional corpus, seconds:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file data/demo/train.json --test_file data/demo/test.json --output_dir outputs/demo-probe

Complete folds are skipped. `fold-<k>/head.safetensors` holds all that `probing.LinearHead` needs, without pickle.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from rareturn.command_line import parse_arguments, provenance, run
from rareturn.data.folds import FoldDataArguments, read_run_data, write_folds
from rareturn.decisions.metrics import scores as all_scores
from rareturn.errors import InputError
from rareturn.files import read_json, write_json
from rareturn.models.inference import has_fast_bf16, peak_memory
from rareturn.models.loading import find_base_model
from rareturn.models.probing import FrozenFeatures, block_sizes, choose_C, fit_head
from rareturn.models.training import CLASS_WEIGHTS
from rareturn.reports.cards import run_card, run_results
from rareturn.reports.tables import Table
from rareturn.runs import publish
from rareturn.runs.folder import check_same_run, fold_is_complete, metrics_path, table_path, write_run_info
from rareturn.runs.publish import push_fold
from rareturn.runs.references import check_name, model_repo
from rareturn.runs.schemas import check_run_info
from rareturn.runs.tables import make_table, write_table

logger = logging.getLogger(__name__)

# What may differ between two launches of one run: the same rows from another place, and where results go.
FREE_FLAGS = ("train_file", "test_file")
NOT_IN_RECIPE = (
    "output_dir",
    "run_name",
    "push_to_hub",
    "push_only",
    "hub_namespace",
    "hub_name",
    "hub_private_repo",
)


@dataclass
class ProbeArguments(FoldDataArguments):
    """Rows, folds, the frozen model and the head."""

    model_name_or_path: str = field(metadata={"help": "Frozen model: a Hub id or a folder."}, kw_only=True)
    output_dir: str = field(metadata={"help": "The run's folder."}, kw_only=True)
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let a Hub model run its own Python code."}
    )
    quantization: str = field(
        default="none", metadata={"help": "nf4 loads the model in 4 bits.", "choices": ["none", "nf4"]}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the unquantized weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel. Default: sdpa where the model has it, else eager."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast. Default: where the processor or GPU computes in bf16 natively."},
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Turns in a forward pass of an encoder."}
    )
    layer: int | None = field(
        default=None,
        metadata={"help": "Layer whose output is taken, from 1. Default: two thirds up, best on PsyDefConv."},
    )
    class_weights: str = field(
        default="balanced",
        metadata={
            "help": "Of the head's loss, from the fold's training rows: 1/n, 1/sqrt(n) or none.",
            "choices": list(CLASS_WEIGHTS),
        },
    )
    C: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0],
        metadata={"help": "Inverse L2 penalties to choose from, by log loss on inner folds of dialogues."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of the inner folds that choose C."})
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run. Default: the output folder's name."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the run when its folds are complete."})
    hub_namespace: str | None = field(default=None, metadata={"help": "User or organisation to push to."})
    hub_name: str | None = field(
        default=None, metadata={"help": "System's name: repos NAME-RUN and NAME-oof."}
    )
    hub_private_repo: bool = field(default=True, metadata={"help": "Make new repos private."})
    push_only: bool = field(
        default=False, metadata={"help": "Push a run that is complete on disk; train nothing."}
    )

    def __post_init__(self) -> None:
        if not all(0 < C < float("inf") for C in self.C):
            raise ValueError(f"--C: every value must be a positive number, not {self.C}")
        for name in ("max_turns", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        if (self.push_to_hub or self.push_only) and not (self.hub_namespace and self.hub_name):
            raise ValueError("--push_to_hub needs --hub_namespace and --hub_name")
        self.C = sorted(set(self.C))
        if self.bf16 is None:
            self.bf16 = self.dtype == "float32" and has_fast_bf16()


def check_same_recipe(run_dir: Path, recipe: dict[str, Any]) -> None:
    """Refuse to mix folds of two recipes in one run.

    Raises:
        InputError: the folder holds a run with another value of a flag.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return
    present = check_run_info(read_json(path), str(path))["recipe"]
    for key, value in recipe.items():
        if key not in FREE_FLAGS and present.get(key) != value:
            raise InputError(
                f"{path}: {key}: {present.get(key)!r} there, {value!r} asked for; use another output_dir"
            )


def print_closing_table(run_dir: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Print a line a fold and one over all rows, and return the scores over all rows."""
    results = run_results(run_dir, info)

    def cells(name: str, of: dict[str, Any]) -> list[str]:
        return [
            name,
            str(of["held_out_rows"]),
            f"{of['C']:g}" if "C" in of else "",
            f"{of['macro_f1_positive']:.4f}",
            f"{of['accuracy']:.4f}",
        ]

    rows = [cells(f"fold {fold}", metrics) for fold, metrics in sorted(results["folds"].items())]
    total = sum(metrics["held_out_rows"] for metrics in results["folds"].values())
    rows.append(cells("all folds", results["argmax"] | {"held_out_rows": total}))
    header = ("", "rows", "C", "macro_f1_positive", "accuracy")
    print(Table(f"{info['name']}: out-of-fold rows, argmax", header, rows).text())
    return results["argmax"]


def push_run(run_dir: Path, arguments: ProbeArguments) -> None:
    """Push every fold, then what belongs to the whole run."""
    where = (arguments.hub_namespace, arguments.hub_name)
    private = arguments.hub_private_repo
    info = read_json(run_dir / "run.json")
    for fold in range(info["num_folds"]):
        push_fold(run_dir, fold, *where, private=private)
    repo = model_repo(*where, info["name"])
    card = run_card(info, run_results(run_dir, info), repo)
    for pushed, sha in publish.push_run(run_dir, *where, model_card=card, private=private).items():
        print(f"pushed {info['name']} to {pushed} at {sha}")


def main() -> None:
    # Arguments
    (arguments,) = parse_arguments((ProbeArguments,), __doc__)
    run_dir = Path(arguments.output_dir)
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    recipe = {key: value for key, value in dataclasses.asdict(arguments).items() if key not in NOT_IN_RECIPE}
    check_same_recipe(run_dir, recipe)
    missing = [
        fold
        for fold in range(arguments.num_folds)
        if not fold_is_complete(run_dir, fold, arguments.test_file is not None)
    ]

    # Logging
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    transformers.utils.logging.set_verbosity_error()
    if not missing:
        logger.info(f"{run_dir} is complete: nothing to train")
        print_closing_table(run_dir, read_json(run_dir / "run.json"))
    elif arguments.push_only:
        raise InputError(f"{run_dir}: fold {missing[0]} is not complete, so there is nothing to push")
    else:
        train_folds(arguments, run_dir, run_name, recipe, missing)

    # Push
    if arguments.push_to_hub or arguments.push_only:
        push_run(run_dir, arguments)


def train_folds(
    arguments: ProbeArguments, run_dir: Path, run_name: str, recipe: dict[str, Any], missing: Sequence[int]
) -> None:
    """Features once, then a head for every fold that is missing, with all the artifacts of a run."""
    # Seed
    transformers.set_seed(arguments.seed)
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    rows = data.originals + data.augmented

    # Model
    base = find_base_model(
        arguments.model_name_or_path,
        arguments.model_revision,
        quantization=arguments.quantization,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    frozen = FrozenFeatures(
        base,
        data.guide,
        layer=arguments.layer,
        window=arguments.window,
        batch_size=arguments.per_device_eval_batch_size,
        bf16=arguments.bf16,
    )
    run_info = {
        "name": run_name,
        **data.describe(),
        **arguments.split,
        "seed": arguments.seed,
        "base_model": base.name,
        "base_revision": base.revision,
        "loader": base.loader | {"bf16": arguments.bf16},
        "window": arguments.window,
        "features": {"layer": frozen.layer, "parts": list(frozen.parts)},
        "recipe": recipe,
        "prompt_fingerprint": frozen.renderer.fingerprint if frozen.renderer else None,
        **provenance(),
    }
    check_same_run(run_dir, run_info)  # before the features are computed
    features = frozen.extract(rows + data.test)
    feature_seconds = time.perf_counter() - started
    logger.info(f"{features.shape[1]} features of {len(features)} rows in {feature_seconds:.1f} s")

    # Train, evaluate, save
    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id for row in rows])
    is_variant = np.array([row.augmented_from is not None for row in rows])
    fold_of = np.array([data.folds[row.augmented_from or row.id] for row in rows])
    fitting = {
        "num_labels": len(data.guide.labels),
        "blocks": block_sizes(features.shape[1], frozen.is_encoder),
        "weights": arguments.class_weights,
    }
    for fold in missing:
        fold_started = time.perf_counter()
        train = np.flatnonzero((fold_of != fold) & np.isin(labels, data.scope))
        held_out = np.flatnonzero((fold_of == fold) & ~is_variant)
        part = (features[train], labels[train])
        C, inner_losses = choose_C(
            *part, groups[train], is_variant[train], arguments.C, seed=arguments.seed, **fitting
        )
        head = fit_head(*part, C=C, **fitting)
        if fold == missing[0]:  # the first thing written: a mistake in the input leaves no folder behind
            write_folds(run_dir, data.folds, **arguments.split)
            write_run_info(run_dir, run_info)
        head.save(metrics_path(run_dir, fold).with_name("head.safetensors"))
        oof = make_table([rows[index] for index in held_out], fold, head.logits(features[held_out]))
        write_table(table_path(run_dir, "oof", fold), oof)
        if data.test:
            table = make_table(data.test, fold, head.logits(features[len(rows) :]))
            write_table(table_path(run_dir, "test", fold), table)
        scores = all_scores(oof.label, oof.logits.argmax(axis=1), len(data.guide.labels), data.guide.positive)
        fold_metrics = {
            **scores,
            "fold": fold,
            "train_rows": len(train),
            "held_out_rows": len(held_out),
            "C": C,
            "inner_log_loss": {f"{value:g}": loss for value, loss in inner_losses.items()},
            "seconds": round(time.perf_counter() - fold_started, 1),
            "peak_memory_bytes": peak_memory(),
        }
        write_json(metrics_path(run_dir, fold), fold_metrics)
        print(
            f"fold {fold}: macro_f1_positive {scores['macro_f1_positive']:.4f}, accuracy {scores['accuracy']:.4f}, "
            f"C {C:g}, {fold_metrics['seconds']} s"
        )
    overall = print_closing_table(run_dir, run_info)
    costs = {
        "feature_seconds": round(feature_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak_memory(),
    }
    write_json(run_dir / "metrics.json", overall | costs)
    print(f"{costs['seconds']} s in all, peak memory {costs['peak_memory_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    run(main)
