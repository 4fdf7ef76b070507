"""Tables, the report page, the pictures and the cards."""

import html.parser
import io
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from matplotlib.image import imread

from rareturn.reports.cards import ensemble_card, hub_dataset, run_card
from rareturn.reports.ensemble import Picture, report_page
from rareturn.reports.figures import (
    agreement,
    confusion_matrix,
    per_class_f1,
    reliability_diagram,
    search_curves,
)
from rareturn.reports.tables import Table, score_table

NAMES = ["None", "Action", "Denial <b>"]
STAGE = {
    "accuracy": 0.75,
    "macro_f1_positive": 2 / 3,
    "macro_precision_positive": 0.75,
    "macro_recall_positive": 0.7,
    "macro_f1": 0.8,
    "weighted_f1": 0.76,
    "f1_per_class": [1.0, 0.5, 0.25],
    "interval": {"macro_f1_positive": [0.5, 0.7], "f1_per_class": [[0.9, 1.0], [0.4, 0.6], [0.0, 0.5]]},
}
RESULTS = {"folds": {0: STAGE}, "argmax": STAGE, "rows_per_class": [30, 20, 5]}
METRICS = {"argmax": STAGE, "in_sample": STAGE, "cross_fitted": STAGE, "fold_groups": "dialogue"}


def run_info(**changes):
    info = {
        "name": "anchor",
        "label_names": NAMES,
        "positive_labels": [1, 2],
        "num_folds": 5,
        "fold_seed": 42,
        "fold_groups": "dialogue",
        "seed": 7,
        "base_model": "Qwen/Qwen3-8B",
        "base_revision": "a" * 40,
        "recipe": {"train_file": "AIMH/PsyDefConv:Splits/train.json"},
        "data_fingerprint": "d",
        "prompt_fingerprint": "p",
        "packages": {"torch": "2.13.0", "peft": "0.21.2"},
        "command": "run_classification.py --train_file /home/somebody/private.json",
        "git_commit": None,
        "loader": {"quantization": "nf4", "dtype": "bfloat16", "tuning": "lora"},
    }
    return info | changes


def test_text_table_is_aligned():
    table = Table("Title", ("label", "F1"), [["a", "0.5"], ["longer", "0.25"]], "A note.")
    assert table.text().splitlines() == [
        "Title",
        "label     F1",
        "------------",
        "a        0.5",
        "longer  0.25",
        "A note.",
    ]


def test_table_cells_cannot_break_out_of_markdown_or_html():
    table = Table("T <i>", ("a|b",), [["<script>|"]])
    assert table.markdown().splitlines() == ["| a\\|b |", "|---|", "| <script>\\| |"]
    assert "<script>" not in table.html() and "&lt;script&gt;" in table.html()


def test_tuned_figures_never_stand_alone():
    header = score_table(METRICS).header
    assert header[1:] == (
        "argmax, nothing tuned",
        "decision, cross-fitted",
        "decision, in-sample (tuned on these rows)",
    )
    row = score_table(METRICS).rows[0]
    assert row == ["macro F1, positive labels", *["0.667 [0.500, 0.700]"] * 3]


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_beside_itself():
    picture = Picture("f.png", agreement(["a"], np.eye(1)), 'Kappa of "a" & <b>')
    table = Table("Scores", ("x", "y"), [["<img src=http://example.org/x>", "1"]])
    page = report_page("Report <x>", [("", ["Text & more."]), ("Part", [table, picture])])
    parser = _Links()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.found) == 1 and parser.found[0].startswith("data:image/png;base64,")
    assert "Text &amp; more." in page and "<h2>Part</h2>" in page
    assert 'name="viewport"' in page and "url(" not in page and "@import" not in page


def _pictures():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=40)
    before, after = generator.dirichlet(np.ones(3), size=(2, 40))
    intervals = [(0.1, 0.4), (0.2, 0.6), (0.0, 0.0)]
    x = np.linspace(-1, 1, 5)
    return {
        "per_class": lambda: per_class_f1(
            NAMES, [20, 15, 0], ([0.3, 0.4, 0.0], intervals), ([0.2, 0.5, 0.0], intervals), [1, 2]
        ),
        "confusion": lambda: confusion_matrix(NAMES, [[5, 1, 0], [2, 8, 0], [0, 0, 0]], "Title"),
        "reliability": lambda: reliability_diagram(before, after, labels, ("before", "after")),
        "curves": lambda: search_curves(
            [("bias", x, x**2, 0.5), ("threshold", x, x, None)], (0.4, (0.3, 0.5)), "macro_f1_positive"
        ),
        "agreement": lambda: agreement(["a", "b"], np.array([[1, 0.2], [0.2, 1]])),
    }


@pytest.mark.parametrize("name", _pictures())
def test_pictures_are_drawn_and_repeat_byte_for_byte(name):
    png = _pictures()[name]()
    pixels = imread(io.BytesIO(png), format="png")
    assert 900 < pixels.shape[1] < 1100 and pixels.shape[0] > 400
    assert pixels[..., :3].std() > 0.02
    assert _pictures()[name]() == png


RUN_CARD = r"""---
base_model:
- Qwen/Qwen3-8B
datasets:
- AIMH/PsyDefConv
library_name: peft
license: cc-by-nc-4\.0
pipeline_tag: text-classification
tags:
- rareturn
- dialogue
- long-tail
- run
model-index:
- name: org/name-anchor
  results:
.*
---

# org/name-anchor

One run of rareturn: 5 models, one a fold, .*

Labels: 0 None \(not positive\); 1 Action; 2 Denial <b>\.

## Intended use

.*
\*\*Must not be used\*\* as a diagnostic instrument, nor for decisions about individual people.*

## Training data

\[AIMH/PsyDefConv\]\(https://huggingface\.co/datasets/AIMH/PsyDefConv\); its licence binds .*
Folds: 5 folds of whole dialogues: .*

## Scores

Every row was scored by the model that had not seen its fold; .*

### Scores on out-of-fold rows

\| score \| argmax, nothing tuned \|
\|---\|---:\|
\| macro F1, positive labels \| 0\.667 \[0\.500, 0\.700\] \|
.*
### Folds

\| held-out fold \| macro F1, positive labels \| accuracy \| macro F1, all labels \|
\|---\|---:\|---:\|---:\|
\| fold 0 \| 0\.6667 \| 0\.7500 \| 0\.8000 \|

### F1 of each label on out-of-fold rows

\| label \| rows \| argmax, nothing tuned \|
\|---\|---:\|---:\|
\| 0 None \| 30 \| 1\.000 \[0\.900, 1\.000\] \|
\| 1 Action \| 20 \| 0\.500 \[0\.400, 0\.600\] \|
\| 2 Denial <b> \| 5 \| 0\.250 \[0\.000, 0\.500\] \|

## How to load

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

base = AutoModelForSequenceClassification\.from_pretrained\(
    "Qwen/Qwen3-8B",
    revision="a{40}",
    num_labels=3,
    quantization_config=.*,
\)
model = PeftModel\.from_pretrained\(base, "org/name-anchor", subfolder="fold-0", revision="main"\)
```

A commit SHA in place of `main` pins all folds at once\.

The scores hold for this loader alone: quantization `nf4`, dtype `bfloat16`, tuning `lora`\. .*

## Versions

\| run \| base model \| base revision \| seed \| packages \|
\|---\|---\|---\|---\|---\|
\| anchor \| Qwen/Qwen3-8B \| a{40} \| 7 \| torch 2\.13\.0, peft 0\.21\.2 \|

## Citation

```bibtex
@software\{rareturn,
.*
\}
```

Cite .*
"""


def test_run_card_whole():
    card = run_card(run_info(), RESULTS, "org/name-anchor")
    assert re.fullmatch(RUN_CARD, card, flags=re.DOTALL), card
    assert "/home" not in card
    data = ModelCard(card).data
    (result, *others) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("f1", 0.6667, "AIMH/PsyDefConv")
    assert "out-of-fold, argmax, 95 % interval 0.5000 to 0.7000" in result.metric_name
    assert [other.metric_type for other in others] == ["precision", "recall", "accuracy"]


def test_card_of_a_local_probe_names_no_path(tmp_path):
    info = run_info(base_model=str(tmp_path), recipe={"train_file": str(tmp_path / "train.json")}, loader={})
    card = run_card(info, {"folds": {}})
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.datasets, data.eval_results) == (
        "sklearn",
        None,
        None,
        None,
    )
    assert str(tmp_path) not in card and "0 of 5 folds are complete" in card


@pytest.mark.parametrize(
    ("train_file", "dataset"),
    [
        ("AIMH/PsyDefConv", "AIMH/PsyDefConv"),
        ("AIMH/PsyDefConv:Splits/train.json@main", "AIMH/PsyDefConv"),
        ("data/train.json", None),
        ("/somewhere/train.json", None),
        (None, None),
    ],
)
def test_only_hub_datasets_are_named(train_file, dataset):
    assert hub_dataset(run_info(recipe={"train_file": train_file})) == dataset


def test_licence_of_the_run_wins_over_the_default():
    card = run_card(run_info(license="cc-by-4.0"), {"folds": {}})
    assert ModelCard(card).data.license == "cc-by-4.0"


def test_ensemble_card_shows_the_cross_fitted_figure():
    tuned = STAGE | {"macro_f1_positive": 0.9}
    metrics = METRICS | {"in_sample": tuned}
    card = ensemble_card(
        {"name": "blend"},
        [run_info(), run_info(name="seed-a", loader={"tuning": "full"})],
        metrics,
        [score_table(metrics)],
        [Picture("confusion.png", b"", "Where rows went")],
        "org/name",
    )
    data = ModelCard(card).data
    assert (data.library_name, data.model_name) == ("transformers", "org/name")
    assert data.eval_results[0].metric_value == 0.6667
    assert "decision cross-fitted" in data.eval_results[0].metric_name
    assert "A blend of 2 runs" in card
    assert "![Where rows went](figures/confusion.png)" in card
    assert 'DialogueClassifier.from_pretrained("org/name")' in card
    # The in-sample figure, its cross-fitted one beside it.
    assert "| 0.667 [0.500, 0.700] | 0.900 [0.500, 0.700] |" in card
