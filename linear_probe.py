# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Frozen features and a logistic head: the cheapest run, all folds in one process.

The reference task, about a minute on two cores:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --train_file AIMH/PsyDefConv:Splits/train.json --output_dir outputs/probe
The fictional corpus, seconds:
    python linear_probe.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --label_guide data/demo/label_guide.yaml --train_file data/demo/train.json \\
        --test_file data/demo/test.json --output_dir outputs/demo-probe

Complete folds are skipped. `fold-<k>/head.safetensors` holds all that `LinearHead` needs, without pickle.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, run, start_logging
from rareturn.data.folds import FoldDataArguments, read_run_data, write_folds
from rareturn.files import write_json
from rareturn.reports.cards import print_closing_table
from rareturn.reports.push import push_folds
from rareturn.runs import folder
from rareturn.runs.references import check_name
from rareturn.runs.tables import make_table, rows_digest, write_table

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ProbeArguments(FoldDataArguments):
    """Rows, folds, the frozen model and the head."""

    _argument_group_name = "Probe"

    model_name_or_path: str = flag(REQUIRED, "Frozen model: a Hub id or a folder.")
    output_dir: str = flag(REQUIRED, "The run's folder.")
    run_name: str | None = flag(None, "Name of the run. Default: the output folder's name.")
    model_revision: str | None = flag(None, "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = flag(False, "Let a Hub model run its own Python code.")
    gguf_file: str | None = flag(None, "GGUF file in that repo or folder to read weights and tokenizer from.")
    quantization: str = flag("none", "nf4 loads the model in 4 bits.", choices=["none", "nf4"])
    dtype: str = flag("float32", "Type of unquantized weights.", choices=["float32", "bfloat16", "float16"])
    attn_implementation: str | None = flag(None, "Attention kernel. Default: sdpa if there, else eager.")
    bf16: bool | None = flag(None, "bf16 autocast. Default: on a GPU, never on a CPU.")
    per_device_eval_batch_size: int = flag(32, "Turns in a forward pass of an encoder.")
    layer: int | None = flag(None, "Layer whose output is taken, from 1. Default: two thirds up.")
    class_weights: Literal["none", "inverse_sqrt", "balanced"] = flag(
        "balanced", "In the loss, from the fold's training rows: 1/n (best for a probe), 1/sqrt(n) or none."
    )
    C: list[float] = flag([0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0], "Inverse L2 penalties to choose from.")
    seed: int = flag(42, "Seed of the inner folds that choose C.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < C < math.inf for C in self.C):
            raise ValueError(f"--C: every value must be a positive number, not {self.C}")
        for name in ("max_turns", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        self.C = sorted(set(self.C))


def main() -> None:
    # Arguments
    arguments, hub = parse_arguments((ProbeArguments, HubArguments), __doc__)
    run_dir = Path(arguments.output_dir)
    run_name = check_name(arguments.run_name or run_dir.resolve().name, "--run_name")
    if hub.push_only:
        return push_folds(run_dir, hub)

    # Logging
    import torch
    import transformers

    from rareturn.models import loading, probing
    from rareturn.models.inference import peak_memory

    start_logging()
    transformers.utils.logging.set_verbosity_error()
    if arguments.bf16 is None:
        arguments.bf16 = arguments.dtype == "float32" and torch.cuda.is_available()

    # Seed
    transformers.set_seed(arguments.seed)
    started = time.perf_counter()

    # Data
    data = read_run_data(arguments, run_dir)
    rows, fold_of = zip(*data.placed(), strict=True)

    # Model
    flags = {name: getattr(arguments, name) for name in loading.LOADING if hasattr(arguments, name)}
    base = loading.find_base_model(arguments.model_name_or_path, arguments.model_revision, **flags)
    taken = {"layer": arguments.layer, "window": arguments.window, "bf16": arguments.bf16}
    taken["batch_size"] = arguments.per_device_eval_batch_size
    frozen = probing.FrozenFeatures(base, data.guide, **taken)
    facts = {"seed": arguments.seed, "loader": base.loader | {"bf16": arguments.bf16}}
    facts["prompt_fingerprint"] = frozen.renderer.fingerprint
    facts["features"] = {"layer": frozen.layer, "parts": list(frozen.parts)}
    info = folder.describe_run(run_name, data, base, arguments, **facts)
    folder.check_same_run(run_dir, info, arguments)  # before the model is loaded
    folds, digest = range(arguments.num_folds), rows_digest(data.test)
    untrained = [fold for fold in folds if not folder.fold_is_complete(run_dir, fold)]
    stale = [fold for fold in folds if not folder.test_table_is_current(run_dir, fold, digest)]
    untested = stale if data.test else []
    if not untrained + untested:
        logger.info(f"{run_dir} is complete: nothing to train")
        print_closing_table(run_dir, info, "C")
        return push_folds(run_dir, hub) if hub.push_to_hub else None
    model = frozen.load()
    # Apart, so that the features of one part do not depend on what else is asked for.
    features = frozen.extract(rows, model) if untrained else None
    test_features = frozen.extract(data.test, model) if untested else None
    feature_seconds = round(time.perf_counter() - started, 1)
    logger.info(f"features after {feature_seconds} s")

    # Train, evaluate, save
    labels = np.array([row.label for row in rows])
    groups = np.array([row.dialogue_id for row in rows])
    is_variant = np.array([row.augmented_from is not None for row in rows])
    fitting = {"num_labels": len(data.guide.labels), "weights": arguments.class_weights}
    if untrained:
        # Within an encoder's vectors directions keep their proportions. A decoder's coordinates are scaled one by one,
        # because a few of them are orders of magnitude larger than the rest.
        fitting["block_size"] = features.shape[1] // len(frozen.parts) if frozen.is_encoder else 1
    fold_of = np.array(fold_of)
    for fold in sorted({*untrained, *untested}):
        head_path = folder.metrics_path(run_dir, fold).with_name("head.safetensors")
        if fold in untrained:
            fold_started = time.perf_counter()
            train = np.flatnonzero((fold_of != fold) & np.isin(labels, data.scope))
            part = (features[train], labels[train])
            splits = probing.inner_folds(labels[train], groups[train], is_variant[train], arguments.seed)
            C, losses = probing.choose_C(*part, splits, arguments.C, **fitting)
            head = probing.fit_head(*part, C=C, **fitting)
            # The first thing written, so that a mistake in the input leaves no folder behind.
            write_folds(run_dir, data.folds, **arguments.split)
            folder.write_run_info(run_dir, info, arguments)
            head.save(head_path)
        else:
            head = probing.LinearHead.load(head_path)
        if fold in untested:
            table = make_table(data.test, fold, head.logits(test_features))
            write_table(folder.table_path(run_dir, "test", fold), table)
        if fold in untrained:
            held_out = np.flatnonzero((fold_of == fold) & ~is_variant)
            table = make_table([rows[index] for index in held_out], fold, head.logits(features[held_out]))
            write_table(folder.table_path(run_dir, "oof", fold), table)
            inner = {f"{value:g}": loss for value, loss in losses.items()}
            costs = {"C": C, "inner_log_loss": inner, "seconds": round(time.perf_counter() - fold_started, 1)}
            folder.write_fold_metrics(run_dir, info, fold, train_rows=len(train), **costs)
    overall = print_closing_table(run_dir, info, "C")
    if untrained:
        seconds, memory = round(time.perf_counter() - started, 1), peak_memory()
        costs = {"feature_seconds": feature_seconds, "seconds": seconds, "peak_memory_bytes": memory}
        write_json(run_dir / "metrics.json", overall | costs)
        print(f"{seconds} s in all, peak memory {memory / 2**20:.0f} MiB")

    # Push
    if hub.push_to_hub:
        push_folds(run_dir, hub)


if __name__ == "__main__":
    run(main)
