"""A run folder: `run.json` with the run's identity, `fold-<k>/`, `oof/fold-<k>.parquet`, `test/fold-<k>.parquet`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rareturn.command_line import SECRET, provenance
from rareturn.data.folds import FoldDataArguments, RunData
from rareturn.decisions.metrics import scores
from rareturn.errors import InputError
from rareturn.files import check_content, read_json, write_json
from rareturn.runs.schemas import RunInfo, metric_of
from rareturn.runs.tables import read_rows_digest, read_table, rows_digest

if TYPE_CHECKING:
    from rareturn.models.loading import BaseModel

# What may differ between two launches of one run: where it runs, how loudly, and where results go.
FREE_PREFIXES = ("_", "do_", "hub_", "log_", "logging_", "push_", "trackio_")
FREE_FLAGS = """
    fold output_dir run_name use_cpu local_rank ddp_backend ddp_timeout debug project report_to disable_tqdm
    include_for_metrics include_num_input_tokens_seen skip_memory_metrics accelerator_config remove_unused_columns
    keep_checkpoints trunk_cache_gb save_strategy save_steps save_total_limit save_on_each_node resume_from_checkpoint
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
"""
# What these name is compared by its content, so that a file may move.
BY_CONTENT = """
    train_file augmented_file extra_train_file validation_file test_file label_guide label_scope model_name_or_path
    model_revision adapter prompt
"""
PARTS = {
    "label_guide": "--label_guide",
    "rows": "the rows of --train_file, or of --validation_file",
    "folds": "the fold of each row",
    "augmented": "the rows of --augmented_file",
    "extra": "the rows of --extra_train_file",
    "label_scope": "--label_scope",
    "base_model": "--model_name_or_path",
    "base_revision": "--model_revision",
    "weights": "the weights of --model_name_or_path",
    "adapter": "the models of --adapter",
    "prompt": "the prompt",
    "processes": "the number of processes",
}


def run_recipe(*argument_sets: Any) -> dict[str, Any]:
    """The flags to run a run again: those that have no default or another value, without free and secret ones."""
    recipe: dict[str, Any] = {}
    for item, value in _flags(argument_sets):
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"--{item.name}: {value} is not a number")
        if item.name == "train_file" or value != _default(item):
            recipe[item.name] = getattr(value, "value", value)
    return json.loads(json.dumps(recipe, default=str))


def _flags(argument_sets: Iterable[Any]) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Each field that counts, with its value."""
    for arguments in argument_sets:
        for item in dataclasses.fields(arguments):
            free = item.name in FREE_FLAGS.split() or item.name.startswith(FREE_PREFIXES)
            if item.init and not free and not SECRET.fullmatch(f"--{item.name}"):
                yield item, getattr(arguments, item.name)


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def describe_run(
    name: str, data: RunData, base: BaseModel, *argument_sets: Any, processes: int = 1, **facts: Any
) -> dict[str, Any]:
    """The content of `run.json`.

    Its `identity` is what decides training: the flags, the content of the files that they name, and a digest of all
    that. Folds of one run, their checkpoints and their saved models share it.

    Args:
        argument_sets: the script's flags, a `FoldDataArguments` first.
        facts: `seed`; `loader` (`base.loader` and what else decides how the model computes); `prompt_fingerprint` (see
            `Renderer.fingerprint`; None for a model that sees no prompt); `adapter`, where a run's models give the features;
            and further keys of `run.json`.
    """
    arguments: FoldDataArguments = argument_sets[0]
    recipe = run_recipe(*argument_sets)
    flags = {**recipe, **arguments.split, **arguments.window, **facts["loader"], "seed": facts["seed"]}
    for key in [key for key in flags if key in BY_CONTENT.split() or key.endswith("_column")]:
        del flags[key]
    guide = data.guide.to_dict()
    if recipe.get("loss") == "distance":
        guide["distances"] = data.guide.distances
    weights = base.weights_digest
    parts = {
        "flags": json.loads(json.dumps(flags, default=str)),
        "label_guide": _digest(guide),
        "rows": rows_digest(data.originals + data.validation),
        "folds": _digest(data.folds),
        "augmented": rows_digest(data.augmented) if data.augmented else None,
        "label_scope": list(data.scope),
        "base_model": None if weights else base.name,
        "base_revision": base.revision,
        "weights": weights,
        "prompt": facts["prompt_fingerprint"],
        "processes": processes,
    }
    parts |= {"extra": rows_digest(data.extra)} if data.extra else {}
    parts |= {"adapter": facts["adapter"]} if "adapter" in facts else {}
    return {
        "name": name,
        **data.describe(),
        "label_guide": guide,
        **arguments.split,
        "base_model": base.name,
        "base_revision": base.revision,
        "window": arguments.window,
        **facts,
        "recipe": recipe,
        "identity": {"digest": _digest(parts), **parts},
        **provenance(),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_same_run(run_dir: str | os.PathLike, info: dict[str, Any], *argument_sets: Any) -> None:
    """Refuse a folder that holds another run: a line for each flag, with both values. An empty folder is fine.

    A recipe leaves defaults out: `argument_sets`, of the run that asks, name them.
    """
    path, other = Path(run_dir) / "run.json", "use another --output_dir"
    if not path.exists():
        if models := [*path.parent.glob("fold-*/adapter"), *path.parent.glob("fold-*/head.safetensors")]:
            raise InputError(f"{path}: missing, so nothing says how {models[0]} was made; {other}")
        return
    present = read_run_info(path.parent)
    there, here = present.get("identity"), info.get("identity")
    if present == info or (there and here and there.get("digest") == here["digest"]):
        return
    if not (there and here):
        raise InputError(f"{path}: no identity, so its folds cannot be continued; {other}")
    before, now = there.get("flags", {}), here["flags"]
    defaults = {item.name: _default(item) for item, _ in _flags(argument_sets)}
    defaults = json.loads(json.dumps(defaults, default=lambda value: None))
    differing = {
        f"--{key}": (before.get(key, defaults.get(key)), now.get(key, defaults.get(key)))
        for key in sorted({*before, *now})
        if before.get(key, ...) != now.get(key, ...)
    }
    if not differing:
        part = next(part for part in (*PARTS, "digest") if there.get(part) != here.get(part))
        differing = {PARTS.get(part, "identity"): (there.get(part), here.get(part))}
    text = {name: [json.dumps(value, ensure_ascii=False) for value in differing[name]] for name in differing}
    lines = [f"{name}: {a:.60} there, {b:.60} asked for" for name, (a, b) in text.items()]
    raise InputError(*(f"{path}: {line}; {other}" for line in lines))


def write_run_info(run_dir: str | os.PathLike, info: dict[str, Any], *argument_sets: Any) -> None:
    """Write `run.json`, once: the run's other folds find it there, and must agree with it (`check_same_run`)."""
    path = Path(run_dir) / "run.json"
    check_content(RunInfo, info, str(path))
    write_json(path, info, overwrite=False)
    check_same_run(run_dir, info, *argument_sets)


def write_fold_metrics(run_dir: Path, info: Mapping[str, Any], fold: int, **facts: Any) -> dict[str, Any]:
    """Score a fold's out-of-fold table, write its `metrics.json`, which makes the fold complete, and print a line.

    Returns what it has written. `facts` is what else is known of the fold; `seconds` at least.
    """
    from rareturn.models.inference import peak_memory

    table = read_table(table_path(run_dir, "oof", fold))
    predicted = table.logits.argmax(axis=1)
    metric = metric_of(info)
    result = scores(table.label, predicted, len(info["label_names"]), info["positive_labels"], metric)
    facts = {"fold": fold, "held_out_rows": len(table), "peak_memory_bytes": peak_memory(), **facts}
    write_json(metrics_path(run_dir, fold), {"metric": metric, **result, **facts})
    shown = [f"{name} {result[name]:.4f}" for name in dict.fromkeys((metric, "accuracy"))]
    shown += [f"C {facts['C']:g}"] if "C" in facts else []
    print(f"fold {fold}: {', '.join(shown)}, {facts['seconds']} s")
    return result | facts


def adapter_dir(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/adapter`."""
    return Path(run_dir) / f"fold-{fold}" / "adapter"


def metrics_path(run_dir: str | os.PathLike, fold: int) -> Path:
    """`RUN/fold-<k>/metrics.json`, the last file that a fold writes."""
    return Path(run_dir) / f"fold-{fold}" / "metrics.json"


def table_path(run_dir: str | os.PathLike, split: str, fold: int) -> Path:
    """`RUN/oof/fold-<k>.parquet` or `RUN/test/fold-<k>.parquet`."""
    return Path(run_dir) / split / f"fold-{fold}.parquet"


def complete_folds(run_dir: str | os.PathLike, num_folds: int) -> list[int]:
    """The folds of a run folder that are complete."""
    return [fold for fold in range(num_folds) if fold_is_complete(run_dir, fold)]


def fold_is_complete(run_dir: str | os.PathLike, fold: int) -> bool:
    """Whether a fold's table and metrics are there; being renamed into place, they are whole if they are."""
    return metrics_path(run_dir, fold).is_file() and table_path(run_dir, "oof", fold).is_file()


def test_table_is_current(run_dir: str | os.PathLike, fold: int, rows_of_test: str) -> bool:
    """Whether a fold's test table is there and was made for the rows with this digest."""
    return read_rows_digest(table_path(run_dir, "test", fold)) == rows_of_test


def read_run_info(run_dir: Path, where: str | None = None) -> dict[str, Any]:
    """A folder's `run.json`, as it is; an InputError has a line for each key that is missing or wrong."""
    info = read_json(run_dir / "run.json")
    check_content(RunInfo, info, where or str(run_dir / "run.json"))
    return info
