"""Hub cards of runs and ensembles: label names, numbers and ids, never a word of dialogue."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rareturn.data.label_guide import parse_label_guide
from rareturn.data.readers import HUB_FILE, READERS
from rareturn.data.rendering import LABEL_CUE, render_instruction, render_turn
from rareturn.data.rows import Turn
from rareturn.files import read_json
from rareturn.reports import tables
from rareturn.reports.tables import Table, score_titles
from rareturn.runs.folder import adapter_dir, complete_folds, metrics_path
from rareturn.runs.reading import read_run
from rareturn.runs.schemas import metric_of

# Of loader.tuning; a probe's head is scikit-learn's.
LIBRARIES = {"lora": "peft", "full": "transformers", "prompted": "transformers"}
METRIC_TYPES = {
    "macro_f1_positive": "f1",
    "macro_precision_positive": "precision",
    "macro_recall_positive": "recall",
    "accuracy": "accuracy",
}
OTHER_TYPES = {"balanced_accuracy": "balanced_accuracy", "kappa": "cohen_kappa"}  # and f1
FOLD_SCORES = ("macro_f1_positive", "accuracy", "macro_f1")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EVAL_RESULTS = ".eval_results/test.yaml"  # where the Hub looks for scores of benchmarks


def run_results(run_dir: str | os.PathLike, info: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_card` shows of a run folder: the complete folds' metrics and, once all are, the scores of all rows."""
    complete = complete_folds(run_dir, info["num_folds"])
    results: dict[str, Any] = {"folds": {fold: read_json(metrics_path(run_dir, fold)) for fold in complete}}
    results["is_decoder"] = any(_has_score_head(adapter_dir(run_dir, fold)) for fold in complete)
    if len(complete) == info["num_folds"]:
        results |= tables.measure_run(read_run(run_dir))
    return results


def print_closing_table(run_dir: Path, info: Mapping[str, Any], fact: str | None = None) -> dict[str, Any]:
    """Print a line for each fold and one for all rows; the scores over all rows, and the `test` rows with labels.

    `fact` is a number of each fold's metrics to show beside its scores.
    """
    results = run_results(run_dir, info)
    folds = [(f"fold {fold}", metrics) for fold, metrics in sorted(results["folds"].items())]
    total, facts = sum(metrics["held_out_rows"] for _, metrics in folds), (fact,) if fact else ()
    scores = tuple(dict.fromkeys((results["metric"], "accuracy")))
    shown = [*folds, ("all folds", results["argmax"] | {"held_out_rows": total})]
    test = results.get("test")
    if test:
        shown.append(("test file", test["argmax"] | {"held_out_rows": test["rows"]}))
    rows = [
        [
            name,
            str(metrics["held_out_rows"]),
            *(f"{metrics[fact]:g}" if fact in metrics else "" for fact in facts),
            *(f"{metrics[score]:.4f}" for score in scores),
        ]
        for name, metrics in shown
    ]
    print(Table(f"{info['name']}: out-of-fold rows, argmax", ("", "rows", *facts, *scores), rows).text())
    return results["argmax"] | ({"test": test} if test else {})


def _has_score_head(folder: Path) -> bool:
    """Whether a saved model has the head that transformers puts on decoders; encoders have a `classifier`."""
    from safetensors import SafetensorError, safe_open

    try:
        files = [safe_open(path, "numpy") for path in folder.glob("*.safetensors")]
        return any("score" in name.split(".") for file in files for name in file.offset_keys())
    except SafetensorError:
        return False


def run_card(info: Mapping[str, Any], results: Mapping[str, Any], repo_id: str | None = None) -> str:
    """The README.md of one run's model repo; `results` is what `run_results` gives."""
    overall, shown = results.get("argmax"), []
    if overall:
        shown.append(
            tables.score_table({**results, **{key: info[key] for key in ("fold_groups", "num_folds")}})
        )
    if results["folds"]:
        names, titles = dict.fromkeys((metric_of(info), *FOLD_SCORES)), score_titles(metric_of(info))
        header = ("held-out fold", *(titles[name] for name in names))
        rows = [
            [f"fold {fold}", *(f"{scores[name]:.4f}" for name in names)]
            for fold, scores in sorted(results["folds"].items())
        ]
        shown.append(Table("Folds", header, rows))
    if overall:
        shown.append(tables.per_class_table(info["label_names"], results["rows_per_class"], results))
        shown += tables.tables_of_test(info["label_names"], results).values()
    scores = metric_of(info), overall, "out-of-fold, argmax"
    return _card(repo_id or info["name"], [info], scores, kind="run", tables=shown, results=results)


def ensemble_card(
    title: str,
    infos: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    shown: Sequence[Table],
    pictures: Iterable[str],
) -> str:
    """The README.md of an ensemble's repo, also written beside its files; `infos` are the runs' `run.json`."""
    scores = metrics["metric"], metrics["cross_fitted"], "out-of-fold, decision cross-fitted"
    return _card(title, infos, scores, kind="ensemble", tables=shown, pictures=pictures)


def eval_results(
    infos: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], title: str
) -> dict[str, bytes]:
    """The file `EVAL_RESULTS` of a repo: the score of the labelled test rows, as a share; empty without such rows.

    Also empty where their data set, that of the test file or else the label guide's, is not on the Hub. The format is
    that of https://huggingface.co/docs/hub/eval-results; `default` is the one task of a data set that names none.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    info, test = infos[0], metrics.get("test")
    dataset = _hub_dataset(info["recipe"].get("test_file")) or (info.get("label_guide") or {}).get("dataset")
    if not (test and dataset and HUB_ID.fullmatch(dataset)):
        return {}
    metric, stage = test["metric"], "decision" if "decision" in test else "argmax"
    rows = f"{test['rows']} labelled rows of {test['dialogues']} dialogues, which tuned and chose nothing"
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id="default",
        value=round(test[stage][metric], 4),
        source_url=f"https://huggingface.co/{title}/blob/main/README.md",
        source_name="model card",
        notes=f"{_metric_name(metric, test[stage], f'share, {stage}')}: {rows}",
    )
    content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return {EVAL_RESULTS: content.encode()}


def card_facts(infos: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What the headers of cards say of runs, in the Hub's words: licences and languages as the label guides state them."""
    guides = [info.get("label_guide") or {} for info in infos]
    stated = {key: _unique(guide.get(key) for guide in guides) for key in ("license", "language")}
    datasets = [name for name in _unique(map(dataset_of, infos)) if HUB_ID.fullmatch(name)]
    return {
        **stated,
        "datasets": datasets,
        "base_model": _unique(hub_model(info["base_model"]) for info in infos),
    }


def _card(
    title: str,
    infos: Sequence[Mapping[str, Any]],
    scores: tuple[str, Mapping[str, Any] | None, str],
    **parts: Any,
) -> str:
    """The template filled in, for one run or for an ensemble of several.

    `scores` go into the model index: the metric, which comes first there, all scores, and how they came about.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    metric, found, how = scores
    types = {metric: OTHER_TYPES.get(metric, "f1")} | METRIC_TYPES
    guides, facts = [info.get("label_guide") or {} for info in infos], card_facts(infos)
    libraries = {LIBRARIES.get(info.get("loader", {}).get("tuning"), "sklearn") for info in infos}
    datasets, on_hub = _unique(map(dataset_of, infos)), facts["datasets"]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=on_hub[0] if on_hub else "unpublished",
            dataset_name=datasets[0] if datasets else "unpublished dialogues",
            dataset_split="train",
            metric_type=metric_type,
            metric_name=_metric_name(name, found, how),
            metric_value=round(found[name], 4),
        )
        for name, metric_type in types.items()
        if found
    ]
    folds = parts.get("results", {}).get("folds", {}).values()
    spaces = _unique(scores.get("trackio_space_id") for scores in folds)
    curves = [f"https://huggingface.co/spaces/{space}" for space in spaces if HUB_ID.fullmatch(space)]
    data = ModelCardData(
        library_name=libraries.pop() if len(libraries) == 1 else "transformers",
        base_model=facts["base_model"] or None,
        pipeline_tag="text-classification",
        datasets=on_hub or None,
        tags=["rareturn", "dialogue", "long-tail", parts["kind"], *(f"trackio:{url}" for url in curves)],
        model_name=title,
        eval_results=results or None,
        **{
            key: facts[key][0] if len(facts[key]) == 1 else facts[key] or None
            for key in ("language", "license")
        },
    )
    folds = tables.fold_text(infos[0])
    if infos[0]["num_folds"] > 1:
        folds = f"{infos[0]['num_folds']} {folds}"
    parts |= {"title": title, "infos": infos, "datasets": datasets, "on_hub": on_hub, "fold_text": folds}
    parts |= {"cue": LABEL_CUE, "curves": curves}
    parts["guide"] = parse_label_guide(guides[0], "run.json: label_guide") if guides[0] else None
    functions = (hub_model, quoted, render_instruction, render_turn, Turn)
    parts |= {function.__name__: function for function in functions}
    text = tables.render("model_card.md.jinja", card_data=data.to_yaml(), licenses=facts["license"], **parts)
    return str(ModelCard(text)).rstrip() + "\n"


def quoted(content: Any) -> str:
    """A value as Python code has it; the templates use this."""
    return json.dumps(content, ensure_ascii=False)


def _unique(values: Iterable[str | None]) -> list[str]:
    """The values that are there, each once."""
    return list(dict.fromkeys(filter(None, values)))


def _metric_name(name: str, stage: Mapping[str, Any], how: str) -> str:
    interval = stage["interval"].get(name)
    bounds = f", 95 % interval {interval[0]:.4f} to {interval[1]:.4f} over dialogues" if interval else ""
    return f"{score_titles(name)[name]} ({how}{bounds})"


def dataset_of(info: Mapping[str, Any]) -> str | None:
    """The corpus of a run: its label guide's `dataset`, else the Hub dataset that it read; never a path on a disk."""
    if named := (info.get("label_guide") or {}).get("dataset"):
        return named
    return _hub_dataset(info["recipe"].get("train_file"))


def _hub_dataset(source: str | None) -> str | None:
    """The Hub dataset that a source names, if it is none on this disk."""
    source = str(source)
    match = HUB_FILE.fullmatch(source)
    local = Path(source).exists() or (match and match["path"] is None and Path(source).suffix in READERS)
    return match["repo"] if match and not local else None


def hub_model(name: str) -> str | None:
    """The base model's Hub id, or None where it is a folder."""
    return None if Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1 else name
