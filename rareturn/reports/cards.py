"""Hub cards of runs and ensembles: label names, numbers and ids, never a word of dialogue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rareturn.data.readers import HUB_FILE, READERS
from rareturn.decisions.metrics import score_predictions
from rareturn.files import read_json
from rareturn.reports.ensemble import Picture
from rareturn.reports.tables import FOLD_TEXTS, SCORE_TITLES, Table, per_class_table, score_table
from rareturn.runs.folder import complete_folds, metrics_path
from rareturn.runs.reading import read_run

TEMPLATES = Path(__file__).parent / "templates"


# The licence of PsyDefConv. A model is a work on its data: without word to the contrary it is no freer than they are.
DEFAULT_LICENSE = "cc-by-nc-4.0"


def hub_dataset(info: Mapping[str, Any]) -> str | None:
    """The Hub dataset that a run was trained on, or None: a path on somebody's disk is nothing to publish."""
    source = info["recipe"].get("train_file")
    match = HUB_FILE.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(source).exists() or (match["path"] is None and Path(source).suffix in READERS):
        return None
    return match["repo"]


def hub_model(name: str) -> str | None:
    """The base model's Hub id, or None where it is a folder."""
    return None if Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1 else name


def library_of(info: Mapping[str, Any]) -> str:
    """The Hub's `library_name` of what a run saved: an adapter, a whole model, or a head on frozen features."""
    tuning = info.get("loader", {}).get("tuning")
    return {"lora": "peft", "full": "transformers"}.get(tuning, "sklearn")


def _model_index(stage: Mapping[str, Any], how: str, dataset: str | None) -> list[Any]:
    from huggingface_hub import EvalResult

    kinds = {
        "macro_f1_positive": "f1",
        "macro_precision_positive": "precision",
        "macro_recall_positive": "recall",
        "accuracy": "accuracy",
    }
    results = []
    for name, kind in kinds.items():
        interval = stage["interval"].get(name)
        bounds = f", 95 % interval {interval[0]:.4f} to {interval[1]:.4f} over dialogues" if interval else ""
        results.append(
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset or "unpublished",
                dataset_name=dataset or "unpublished dialogues",
                dataset_split="train",
                metric_type=kind,
                metric_name=f"{SCORE_TITLES[name]} ({how}{bounds})",
                metric_value=round(stage[name], 4),
            )
        )
    return results


def _card(
    title: str, infos: Sequence[Mapping[str, Any]], library: str, results: list[Any], **parts: Any
) -> str:
    """The template filled in, for one run or for an ensemble of several."""
    from huggingface_hub import ModelCard, ModelCardData

    datasets = sorted({name for info in infos if (name := hub_dataset(info))})
    bases = list(dict.fromkeys(name for info in infos if (name := hub_model(info["base_model"]))))
    licenses = {info.get("license") or DEFAULT_LICENSE for info in infos}
    data = ModelCardData(
        library_name=library,
        base_model=bases or None,
        pipeline_tag="text-classification",
        datasets=datasets or None,
        license=licenses.pop() if len(licenses) == 1 else DEFAULT_LICENSE,
        tags=["rareturn", "dialogue", "long-tail", parts["kind"]],
        model_name=title,
        eval_results=results or None,
    )
    first = infos[0]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        title=title,
        labels=[
            f"{number} {name}" + ("" if number in first["positive_labels"] else " (not positive)")
            for number, name in enumerate(first["label_names"])
        ],
        data_names=datasets,
        fold_text=f"{first['num_folds']} {FOLD_TEXTS[first['fold_groups']]}",
        infos=infos,
        hub_model=hub_model,
        **parts,
    )
    return str(card).rstrip() + "\n"


def run_results(run_dir: str | os.PathLike, info: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_card` shows of a run folder: the complete folds' metrics and, once all are, the scores of all rows."""
    complete = complete_folds(run_dir, info["num_folds"])
    results: dict[str, Any] = {"folds": {fold: read_json(metrics_path(run_dir, fold)) for fold in complete}}
    if len(complete) == info["num_folds"]:
        oof = read_run(run_dir).oof
        results["rows_per_class"] = np.bincount(oof.label, minlength=len(info["label_names"])).tolist()
        results["argmax"] = score_predictions(
            oof.label,
            oof.logits.argmax(axis=1),
            oof.dialogue_id,
            num_labels=len(info["label_names"]),
            positive_labels=info["positive_labels"],
        )
    return results


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
        names = ("macro_f1_positive", "accuracy", "macro_f1")
        rows = [
            [f"fold {fold}", *(f"{folds[fold][name]:.4f}" for name in names)]
            for fold in sorted(folds, key=int)
        ]
        tables.append(Table("Folds", ("held-out fold", *(SCORE_TITLES[name] for name in names)), rows))
    if overall:
        tables.insert(0, score_table({"argmax": overall, "fold_groups": info["fold_groups"]}))
        tables.append(per_class_table(info["label_names"], metrics["rows_per_class"], metrics))
        text = (
            "Every row was scored by the model that had not seen its fold; nothing was tuned on these rows."
        )
    else:
        text = f"{len(folds)} of {info['num_folds']} folds are complete; the score over all rows follows the last one."
    library = library_of(info)
    return _card(
        repo_id or info["name"],
        [info],
        library,
        _model_index(overall, "out-of-fold, argmax", hub_dataset(info)) if overall else [],
        kind="run",
        scores_text=text,
        tables=[(table.title, table.markdown()) for table in tables],
        pictures=[],
        loader=info.get("loader", {}),
        how_to_load=_how_to_load(info, library, repo_id or info["name"]),
    )


def _how_to_load(info: Mapping[str, Any], library: str, repo_id: str) -> str:
    base, revision = hub_model(info["base_model"]) or "path/to/the/base", info["base_revision"]
    options = [f"num_labels={len(info['label_names'])}"]
    if revision and ":" not in revision:  # another scheme than a commit: a packaged model
        options.insert(0, f'revision="{revision}"')
    imports = "AutoModelForSequenceClassification"
    if info.get("loader", {}).get("quantization") == "nf4":
        imports += ", BitsAndBytesConfig"
        options.append(
            'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16")'
        )
    where = f'"{repo_id}", subfolder="fold-0", revision="main"'
    code = {
        "peft": [
            "from peft import PeftModel",
            f"from transformers import {imports}",
            "",
            "base = AutoModelForSequenceClassification.from_pretrained(",
            f'    "{base}",',
            *(f"    {option}," for option in options),
            ")",
            f"model = PeftModel.from_pretrained(base, {where})",
        ],
        "transformers": [
            "from transformers import AutoModelForSequenceClassification",
            "",
            f"model = AutoModelForSequenceClassification.from_pretrained({where})",
        ],
        "sklearn": [
            "from huggingface_hub import snapshot_download",
            "",
            f'folder = snapshot_download("{repo_id}", revision="main")  # the heads lie in fold-<k>/',
        ],
    }[library]
    after = "A commit SHA in place of `main` pins all folds at once."
    return "\n".join(["```python", *code, "```", "", after])


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
    name = repo_id or bundle["name"]
    dataset = next((found for info in infos if (found := hub_dataset(info))), None)
    libraries = {library_of(info) for info in infos}
    how = [
        "```python",
        "from rareturn import DialogueClassifier",
        "",
        f'classifier = DialogueClassifier.from_pretrained("{name}")',
        "```",
        "",
        "`ensemble.json` names every base model, adapter, weight and revision, and the decision rule.",
    ]
    text = (
        "The model index above holds the cross-fitted figures: rule and weights were fitted on other dialogues than they "
        "were scored on. The in-sample figures are optimistic, and are shown only to show by how much."
    )
    return _card(
        name,
        infos,
        libraries.pop() if len(libraries) == 1 else "transformers",
        _model_index(metrics["cross_fitted"], "out-of-fold, decision cross-fitted", dataset),
        kind="ensemble",
        scores_text=text,
        tables=[(table.title, table.markdown()) for table in tables],
        pictures=[(f"figures/{picture.name}", picture.caption) for picture in pictures],
        loader={},
        how_to_load="\n".join(how),
    )
