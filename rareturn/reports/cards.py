"""Hub cards of runs and ensembles: label names, numbers and ids, never a word of dialogue."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rareturn.data.label_guide import parse_label_guide
from rareturn.data.readers import HUB_FILE, READERS
from rareturn.data.rendering import render_instruction, render_turn
from rareturn.data.rows import Turn
from rareturn.files import read_json
from rareturn.reports.ensemble import Picture
from rareturn.reports.tables import (
    FOLD_TEXTS,
    SCORE_TITLES,
    TEMPLATES,
    Table,
    measure_run,
    per_class_table,
    score_table,
)
from rareturn.runs.folder import adapter_dir, complete_folds, metrics_path
from rareturn.runs.reading import read_run

LIBRARIES = {"lora": "peft", "full": "transformers"}  # of loader.tuning; a probe's head is scikit-learn's
METRIC_TYPES = {
    "macro_f1_positive": "f1",
    "macro_precision_positive": "precision",
    "macro_recall_positive": "recall",
    "accuracy": "accuracy",
}
FOLD_SCORES = ("macro_f1_positive", "accuracy", "macro_f1")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EXAMPLE = ("How has your week been?", "Whatever. It's not like anyone noticed.")  # made up


def run_results(run_dir: str | os.PathLike, info: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_card` shows of a run folder: the complete folds' metrics and, once all are, the scores of all rows."""
    complete = complete_folds(run_dir, info["num_folds"])
    results: dict[str, Any] = {"folds": {fold: read_json(metrics_path(run_dir, fold)) for fold in complete}}
    results["is_decoder"] = any(_has_score_head(adapter_dir(run_dir, fold)) for fold in complete)
    if len(complete) == info["num_folds"]:
        results |= measure_run(read_run(run_dir))
    return results


def _has_score_head(folder: Path) -> bool:
    """Whether a saved model has the head that transformers puts on decoders; encoders have a `classifier`."""
    from safetensors import SafetensorError, safe_open

    try:
        keys = [
            key for path in folder.glob("*.safetensors") for key in safe_open(path, "numpy").offset_keys()
        ]
    except SafetensorError:
        return False
    return any("score" in key.split(".") for key in keys)


def run_card(info: Mapping[str, Any], metrics: Mapping[str, Any], repo_id: str | None = None) -> str:
    """The README.md of one run's model repo.

    Args:
        info: `run.json`.
        metrics: what `run_results` gives.
        repo_id: where the card goes.
    """
    folds, overall = metrics.get("folds", {}), metrics.get("argmax")
    tables = []
    if folds:
        rows = [
            [f"fold {fold}", *(f"{folds[fold][name]:.4f}" for name in FOLD_SCORES)]
            for fold in sorted(folds, key=int)
        ]
        tables.append(Table("Folds", ("held-out fold", *(SCORE_TITLES[name] for name in FOLD_SCORES)), rows))
    if overall:
        tables.insert(0, score_table({"argmax": overall, "fold_groups": info["fold_groups"]}))
        tables.append(per_class_table(info["label_names"], metrics["rows_per_class"], metrics))
    return _card(
        repo_id or info["name"],
        [info],
        "run",
        (overall, "out-of-fold, argmax") if overall else None,
        tables=tables,
        complete=len(folds),
        scored=bool(overall),
        loader=info.get("loader", {}),
        is_decoder=metrics.get("is_decoder", False),
        **_example(info),
    )


def ensemble_card(
    bundle: Mapping[str, Any],
    infos: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    repo_id: str | None = None,
) -> str:
    """The README.md of an ensemble's repo, which is also written beside its files.

    Args:
        bundle: `ensemble.json`.
        infos: `run.json` of each run.
        metrics: as `score_table` takes them.
        tables, pictures: what the report shows.
    """
    return _card(
        repo_id or bundle["name"],
        infos,
        "ensemble",
        (metrics["cross_fitted"], "out-of-fold, decision cross-fitted"),
        tables=tables,
        pictures=pictures,
        **_example(infos[0]),
    )


def _card(
    title: str,
    infos: Sequence[Mapping[str, Any]],
    kind: str,
    scores: tuple[Mapping[str, Any], str] | None,
    **parts: Any,
) -> str:
    """The template filled in, for one run or for an ensemble of several; `scores` go into the model index."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    libraries = {LIBRARIES.get(info.get("loader", {}).get("tuning"), "sklearn") for info in infos}
    datasets = list(dict.fromkeys(name for info in infos if (name := dataset_of(info))))
    on_hub = [name for name in datasets if HUB_ID.fullmatch(name)]
    licenses = _of_guides(infos, "license")
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=on_hub[0] if on_hub else "unpublished",
            dataset_name=datasets[0] if datasets else "unpublished dialogues",
            dataset_split="train",
            metric_type=metric_type,
            metric_name=_metric_name(name, *scores),
            metric_value=round(scores[0][name], 4),
        )
        for name, metric_type in METRIC_TYPES.items()
        if scores
    ]
    data = ModelCardData(
        library_name=libraries.pop() if len(libraries) == 1 else "transformers",
        base_model=list(dict.fromkeys(name for info in infos if (name := hub_model(info["base_model"]))))
        or None,
        pipeline_tag="text-classification",
        datasets=on_hub or None,
        language=_one_or_list(_of_guides(infos, "language")),
        license=_one_or_list(licenses),
        tags=["rareturn", "dialogue", "long-tail", kind],
        model_name=title,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md.jinja"),
        title=title,
        kind=kind,
        infos=infos,
        info=infos[0],
        data_names=datasets,
        on_hub=on_hub,
        license_names=licenses,
        fold_text=FOLD_TEXTS[infos[0]["fold_groups"]],
        hub_model=hub_model,
        quoted=lambda text: json.dumps(text, ensure_ascii=False),
        **parts,
    )
    return str(card).rstrip() + "\n"


def _metric_name(name: str, stage: Mapping[str, Any], how: str) -> str:
    interval = stage["interval"].get(name)
    bounds = f", 95 % interval {interval[0]:.4f} to {interval[1]:.4f} over dialogues" if interval else ""
    return f"{SCORE_TITLES[name]} ({how}{bounds})"


def _of_guides(infos: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """What the runs' label guides say under a key, each value once."""
    found: list[str] = []
    for info in infos:
        value = (info.get("label_guide") or {}).get(key) or []
        found += [value] if isinstance(value, str) else value
    return list(dict.fromkeys(found))


def _one_or_list(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None


def dataset_of(info: Mapping[str, Any]) -> str | None:
    """The corpus of a run: the label guide's `dataset`, else the Hub dataset that the run read; None if neither is known.

    A path on somebody's disk is not published.
    """
    named = _of_guides([info], "dataset")
    if named:
        return named[0]
    source = info["recipe"].get("train_file")
    match = HUB_FILE.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(source).exists() or (match["path"] is None and Path(source).suffix in READERS):
        return None
    return match["repo"]


def hub_model(name: str) -> str | None:
    """The base model's Hub id, or None where it is a folder."""
    return None if Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1 else name


def _example(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's code is shown on: a dialogue of two turns, and the instruction of a decoder's prompt."""
    if not info.get("label_guide"):
        return {"turns": []}
    guide = parse_label_guide(info["label_guide"], "run.json: label_guide")
    target = guide.target_speaker or guide.speakers[0]
    other = next((name for name in guide.speakers if name != target), target)
    turns = [Turn(EXAMPLE[0], other), Turn(EXAMPLE[1], target)]
    return {
        "turns": turns,
        "rendered_turns": [render_turn(turn) for turn in turns],
        "instruction": render_instruction(guide).splitlines(keepends=True),
    }
