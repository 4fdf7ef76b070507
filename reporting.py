"""What people read: the metric, text tables, the report page, the Hub cards.

A figure that was tuned on the rows it scores says so wherever it stands, and has its cross-fitted one beside it. No
dialogue text enters any of this, only ids, label names and numbers.
"""

from __future__ import annotations

import base64
import functools
import html
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import artifacts
import decoding
from dialogues import HUB_FILE, READERS

HERE = Path(__file__).parent
# The licence of PsyDefConv. A model is a work on its data: without word to the contrary it is no freer than they are.
DEFAULT_LICENSE = "cc-by-nc-4.0"
FOLD_TEXTS = {
    "dialogue": "folds of whole dialogues: the figures estimate rows of new dialogues",
    "none": "folds of rows: the figures estimate new rows of dialogues that the model has seen other rows of",
}
SCORE_TITLES = {
    "macro_f1_positive": "macro F1, positive labels",
    "macro_precision_positive": "macro precision, positive labels",
    "macro_recall_positive": "macro recall, positive labels",
    "accuracy": "accuracy",
    "macro_f1": "macro F1, all labels",
    "weighted_f1": "weighted F1",
}
STAGE_TITLES = {
    "argmax": "argmax, nothing tuned",
    "cross_fitted": "decision, cross-fitted",
    "in_sample": "decision, in-sample (tuned on these rows)",
    "decision": "decision",
}


@functools.cache
def load_metric() -> Any:
    """The `evaluate` module in `metrics/defense_f1`, from its path: no network.

    The values stay in memory, so that processes that score at the same moment share no file; evaluate copies the module
    into its cache under a lock.
    """
    import evaluate  # seconds of imports, which only a script that scores should pay

    return evaluate.load(str(HERE / "metrics" / "defense_f1"), keep_in_memory=True)


def score_predictions(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    seed: int = 42,
) -> dict[str, Any]:
    """Every score of DESIGN 9 and, under `interval`, its 95 % interval by bootstrap over dialogues.

    Rows of one dialogue say nothing of others: then `interval` is empty.

    Args:
        labels: int [n].
        predictions: int [n], or [repeats, n]: repeated cross-fitting; then each score is the mean over the repeats.
        groups: dialogue ids [n].
    """
    repeats = [
        load_metric().compute(
            predictions=row, references=labels, positive_labels=list(positive_labels), num_labels=num_labels
        )
        for row in np.atleast_2d(predictions)
    ]
    scores: dict[str, Any] = {
        name: float(np.mean([repeat[name] for repeat in repeats])) for name in decoding.METRIC_NAMES
    }
    scores["f1_per_class"] = np.mean([repeat["f1_per_class"] for repeat in repeats], axis=0).tolist()
    scores["interval"] = {}
    if len(set(groups)) < 2:
        return scores
    options = {"num_labels": num_labels, "positive_labels": positive_labels, "seed": seed}
    scores["interval"] = {
        name: list(decoding.bootstrap_interval(labels, predictions, groups, metric=name, **options))
        for name in decoding.METRIC_NAMES
    }
    options["metric"] = "macro_f1_positive"  # with one positive label it is that label's F1
    scores["interval"]["f1_per_class"] = [
        list(
            decoding.bootstrap_interval(labels, predictions, groups, **options | {"positive_labels": [label]})
        )
        for label in range(num_labels)
    ]
    return scores


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Text cells under a header: printed, and put into the card and the page.

    Attributes:
        note: what a reader must know to read the figures; may be empty.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """Aligned columns; the first to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *others = (
                cell.rjust(width) if position else cell.ljust(width)
                for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([first, *others]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        note = [self.note] if self.note else []
        return "\n".join([self.title, line(self.header), rule, *map(line, self.rows), *note])

    def markdown(self) -> str:
        """A GitHub-flavoured table, without the title."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        marks = "|" + "|".join(["---", *["---:"] * (len(self.header) - 1)]) + "|"
        note = ["", self.note] if self.note else []
        return "\n".join([line(self.header), marks, *map(line, self.rows), *note])

    def html(self) -> str:
        """A table that scrolls sideways where the screen is too narrow."""

        def line(cells: Sequence[str], tag: str) -> str:
            texts = (
                re.sub(r"(\[\S+) (\S+\])", r"\1&nbsp;\2", html.escape(cell)) for cell in cells
            )  # an interval stays on one line
            return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        body = "".join(line(row, "td") for row in self.rows)
        return (
            f'<h3>{html.escape(self.title)}</h3><div class="scroll"><table><thead>{line(self.header, "th")}</thead>'
            f"<tbody>{body}</tbody></table></div>{note}"
        )


def interval_text(value: float, interval: Sequence[float] | None) -> str:
    """`0.392 [0.351, 0.428]`, or the value alone."""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def score_table(metrics: Mapping[str, Any]) -> Table:
    """Argmax, in-sample and cross-fitted scores side by side.

    Args:
        metrics: `argmax`, `in_sample`, `cross_fitted`, each with the names of DESIGN 9 and `interval` (score's name to
            its bounds); `fold_groups`.
    """
    stages = [stage for stage in STAGE_TITLES if stage in metrics]
    rows = [
        [
            title,
            *(interval_text(metrics[stage][name], metrics[stage]["interval"].get(name)) for stage in stages),
        ]
        for name, title in SCORE_TITLES.items()
    ]
    note = f"[95 % interval, bootstrap over dialogues]; {FOLD_TEXTS[metrics['fold_groups']]}."
    return Table(
        "Scores on out-of-fold rows", ("score", *(STAGE_TITLES[stage] for stage in stages)), rows, note
    )


def per_class_table(
    label_names: Sequence[str], rows_per_class: Sequence[int], metrics: Mapping[str, Any]
) -> Table:
    """F1 of each label, the same three ways; `metrics` as `score_table` takes them."""
    stages = [stage for stage in STAGE_TITLES if stage in metrics]
    rows = [
        [
            f"{label} {name}",
            str(count),
            *(
                interval_text(
                    metrics[stage]["f1_per_class"][label], metrics[stage]["interval"]["f1_per_class"][label]
                )
                for stage in stages
            ),
        ]
        for label, (name, count) in enumerate(zip(label_names, rows_per_class, strict=True))
    ]
    header = ("label", "rows", *(STAGE_TITLES[stage] for stage in stages))
    return Table("F1 of each label on out-of-fold rows", header, rows)


# ----------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Picture:
    """A PNG file's name, its bytes, and the sentence under it."""

    name: str
    png: bytes
    caption: str

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 56rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }}
h3 {{ font-size: 1rem; margin-bottom: .5rem; }}
p {{ max-width: 42rem; overflow-wrap: anywhere; }}
.note, figcaption {{ font-size: .875rem; color: #444; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }}
@media (max-width: 40rem) {{ table {{ font-size: .75rem; }} th, td {{ padding: .25rem .3rem; }} }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ overflow-wrap: break-word; }}
figure {{ margin: 1rem 0; }}
img {{ width: 100%; max-width: 42rem; height: auto; display: block; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def report_page(title: str, sections: Sequence[tuple[str, Sequence[str | Table | Picture]]]) -> str:
    """One HTML file that holds everything it shows: no link, no script, no request.

    Args:
        sections: heading and what stands under it; a string is a paragraph. The first section's heading may be empty.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        if heading:
            body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in parts]
    return PAGE.format(title=html.escape(title), body="\n".join(body))


# ---------------------------------------------------------------------------------------------------------------- cards


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
        template_path=str(HERE / "model_card.md"),
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
    complete = artifacts.complete_folds(run_dir, info["num_folds"])
    results: dict[str, Any] = {
        "folds": {fold: artifacts.read_json(artifacts.metrics_path(run_dir, fold)) for fold in complete}
    }
    if len(complete) == info["num_folds"]:
        oof = artifacts.read_run(run_dir).oof
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
        "from classifier import DefenseClassifier  # of rareturn",
        "",
        f'classifier = DefenseClassifier.from_pretrained("{name}")',
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
