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
        files = [safe_open(path, "numpy") for path in folder.glob("*.safetensors")]
        return any("score" in name.split(".") for file in files for name in file.offset_keys())
    except SafetensorError:
        return False


def run_card(info: Mapping[str, Any], metrics: Mapping[str, Any], repo_id: str | None = None) -> str:
    """The README.md of one run's model repo; `metrics` is what `run_results` gives."""
    folds, overall = metrics["folds"], metrics.get("argmax")
    tables = [score_table({"argmax": overall, "fold_groups": info["fold_groups"]})] if overall else []
    if folds:
        header = ("held-out fold", *(SCORE_TITLES[name] for name in FOLD_SCORES))
        rows = [
            [f"fold {fold}", *(f"{folds[fold][name]:.4f}" for name in FOLD_SCORES)]
            for fold in sorted(folds, key=int)
        ]
        tables.append(Table("Folds", header, rows))
    if overall:
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
    )


def ensemble_card(
    bundle: Mapping[str, Any],
    infos: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    repo_id: str | None = None,
) -> str:
    """The README.md of an ensemble's repo, also written beside its files; `infos` are the runs' `run.json`."""
    scores = metrics["cross_fitted"], "out-of-fold, decision cross-fitted"
    return _card(repo_id or bundle["name"], infos, "ensemble", scores, tables=tables, pictures=pictures)


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
    datasets = list(dict.fromkeys(filter(None, map(dataset_of, infos))))
    on_hub = [name for name in datasets if HUB_ID.fullmatch(name)]
    licenses, models = _of_guides(infos, "license"), [hub_model(info["base_model"]) for info in infos]
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
        base_model=list(dict.fromkeys(filter(None, models))) or None,
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
        **_example(infos[0]),
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
    """The corpus of a run: its label guide's `dataset`, else the Hub dataset that it read; never a path on a disk."""
    named = _of_guides([info], "dataset")
    if named:
        return named[0]
    source = str(info["recipe"].get("train_file"))
    match = HUB_FILE.fullmatch(source)
    local = Path(source).exists() or (match and match["path"] is None and Path(source).suffix in READERS)
    return match["repo"] if match and not local else None


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
