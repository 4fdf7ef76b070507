"""Tables, the report page, the pictures and the cards."""

import ast
import html.parser
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import DatasetCard, ModelCard, parse_eval_result_entries
from matplotlib.image import imread
from running import words_of
from test_artifacts import ROOT, make_run
from tiny_models import make_tiny_decoder, make_tiny_encoder, store_in_4bit

from rareturn.decisions.probabilities import softmax
from rareturn.reports.cards import dataset_of, ensemble_card, eval_results, run_card, run_results
from rareturn.reports.ensemble import make_page
from rareturn.reports.figures import (
    agreement,
    confusion_matrix,
    per_class_f1,
    reliability_diagram,
    search_curves,
)
from rareturn.reports.tables import Table, score_table
from rareturn.runs.folder import adapter_dir, metrics_path
from rareturn.runs.publish import push_fold

NAMES = ["None", "Action", "Denial <b>"]
STAGE = {
    "accuracy": 0.75,
    "macro_f1_positive": 2 / 3,
    "macro_precision_positive": 0.75,
    "macro_recall_positive": 0.7,
    "macro_f1": 0.8,
    "weighted_f1": 0.76,
    "balanced_accuracy": 0.7,
    "kappa": 0.6,
    "f1_per_class": [1.0, 0.5, 0.25],
    "interval": {"macro_f1_positive": [0.5, 0.7], "f1_per_class": [[0.9, 1.0], [0.4, 0.6], [0.0, 0.5]]},
}
METRIC = {"metric": "macro_f1_positive"}
RESULTS = {**METRIC, "folds": {0: STAGE}, "argmax": STAGE, "rows_per_class": [30, 20, 5]}
GUIDE = {
    "task": "Say which.",
    "labels": [
        {"number": number, "name": name, "definition": f"It is {name}."} for number, name in enumerate(NAMES)
    ],
    "positive": [1, 2],
    "speakers": ["patient", "therapist"],
    "target_speaker": "patient",
}
METRICS = {**METRIC, "argmax": STAGE, "in_sample": STAGE, "cross_fitted": STAGE}
METRICS |= {"fold_groups": "dialogue", "num_folds": 5}


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
        "label_guide": GUIDE,
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


def test_table_cells_cannot_break_out_of_markdown() -> None:
    table = Table("T <i>", ("a|b", "c"), [["<script>|", "1"]], "A note.")
    card = ensemble_card("x", [run_info()], METRICS, [table], [])
    assert "### T <i>\n\n| a\\|b | c |\n|---|---:|\n| <script>\\| | 1 |\n\nA note.\n" in card


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
    metrics = METRICS | {"method": "prior <b>", "rows": 1234, "dialogues": 2}
    metrics["notes"] = ["Text & more."]
    hostile = Table("Scores <i>", ("x", "y"), [["<img src=http://example.org/x>", "1 [0.1, 0.2]"]])
    tables = dict.fromkeys(("scores", "per class", "runs", "rule", "probabilities"), hostile)
    names = ("per_class_f1", "confusion", "agreement", "search_curves", "reliability")
    pictures = {name: agreement(['a" & <b>'], np.eye(1)) for name in names}
    page = make_page("Report <x>", metrics, tables, pictures)
    parser = _Links()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.found) == 5 and all(link.startswith("data:image/png;base64,") for link in parser.found)
    assert "<h1>Ensemble Report &lt;x&gt;</h1>" in page and "Text &amp; more." in page
    assert "Scores &lt;i&gt;" in page and "&lt;img src=http" in page and "prior &lt;b&gt;" in page
    assert 'alt="Agreement of the labels that two systems choose (Cohen&#39;s kappa' in page
    assert "[0.1,\u00a00.2]" in page and "1,234 out-of-fold rows" in page
    assert 'name="viewport"' in page and "url(" not in page and "@import" not in page
    # A vote has no rule to show.
    shown = {key: tables[key] for key in ("scores", "per class", "runs")}
    vote = make_page("x", metrics, shown, {name: pictures[name] for name in names[:3]})
    assert "<h2>Decision</h2>" in page and "<h2>Decision</h2>" not in vote


def _pictures():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=40)
    before, after = generator.dirichlet(np.ones(3), size=(2, 40))
    intervals = {"f1_per_class": [(0.1, 0.4), (0.2, 0.6), (0.0, 0.0)]}
    stages = [{"f1_per_class": values, "interval": intervals} for values in ([0.3, 0.4, 0], [0.2, 0.5, 0])]
    cross_fitted = {"accuracy": 0.4, "interval": {"accuracy": (0.3, 0.5)}}
    x = np.linspace(-1, 1, 5)
    return {
        "per_class": lambda: per_class_f1(NAMES, [20, 15, 0], *stages, [1, 2]),
        "confusion": lambda: confusion_matrix(NAMES, np.array([[5, 1, 0], [2, 8, 0], [0, 0, 0]]), "Title"),
        "reliability": lambda: reliability_diagram(before, after, labels, ("before", "after")),
        "curves": lambda: search_curves(
            [("bias", x, x**2, 0.5), ("threshold", x, x, None)], cross_fitted, "accuracy", "macro_f1_positive"
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

A run of rareturn: 5 models, one per fold, .*

Labels: 0 None \(not positive\); 1 Action; 2 Denial <b>\.

## Intended use

.*
\*\*Must not be used\*\* as a diagnostic instrument, nor for decisions about individual people.*

## Training data

Data set: \[AIMH/PsyDefConv\]\(https://huggingface\.co/datasets/AIMH/PsyDefConv\)\. Licence: not stated\. .*
Folds: 5 folds of whole dialogues: .*

## Scores

Every row was scored by the model that had not seen its fold\. .*

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

## How to use

Needs `peft` and `transformers` and `bitsandbytes`\.

```python
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

repo, revision = "org/name-anchor", "main"
labels = \["None", "Action", "Denial <b>"\]
config = AutoConfig\.from_pretrained\("Qwen/Qwen3-8B", revision="a{40}", num_labels=len\(labels\)\)
if getattr\(.*
base = AutoModelForSequenceClassification\.from_pretrained\(
    "Qwen/Qwen3-8B",
    revision="a{40}",
    config=config,
    dtype="bfloat16",
    quantization_config=.*,
\)
model = PeftModel\.from_pretrained\(base, repo, subfolder="fold-0", revision=revision\)
.*
print\(dict\(zip\(labels, probabilities\.tolist\(\)\)\)\)
```

This prints the probability of every label for the last turn: `\{"None": …, "Action": …, …\}`\. .* A commit SHA in place of `main` .*

The scores hold for this loader only: quantization `nf4`, dtype `bfloat16`, tuning `lora`\. .*

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
    assert dataset_of(run_info(recipe={"train_file": train_file})) == dataset
    guide = GUIDE | {"dataset": "org/other"}
    assert dataset_of(run_info(recipe={"train_file": train_file}, label_guide=guide)) == "org/other"


def with_guide(**facts):
    return run_info(recipe={"train_file": "train.json"}, label_guide=GUIDE | facts)


def test_licence_language_and_data_set_come_from_the_label_guide():
    first = with_guide(license="cc-by-4.0", language="en", dataset="org/calls")
    second = with_guide(license="odbl", language="de", dataset="Letters of 1912")
    cards = [run_card(info, {"folds": {}}) for info in (first, second, with_guide())]
    data = [ModelCard(card).data for card in cards]
    assert [found.license for found in data] == ["cc-by-4.0", "odbl", None]
    assert [found.language for found in data] == ["en", "de", None]
    assert [found.datasets for found in data] == [["org/calls"], None, None]
    assert "Data set: [org/calls](https://huggingface.co/datasets/org/calls). Licence: cc-by-4.0." in cards[0]
    assert "Data set: Letters of 1912. Licence: odbl." in cards[1]
    assert "Data set: not stated. Licence: not stated." in cards[2] and "\nlicense:" not in cards[2]
    assert not any("cc-by-nc" in card or "PsyDefConv" in card for card in cards)
    both = ModelCard(ensemble_card("blend", [first, second], METRICS, [], [])).data
    assert (both.license, both.language) == (["cc-by-4.0", "odbl"], ["en", "de"])


def test_ensemble_card_shows_the_cross_fitted_figure():
    tuned = STAGE | {"macro_f1_positive": 0.9}
    metrics = METRICS | {"in_sample": tuned}
    card = ensemble_card(
        "org/name",
        [run_info(), run_info(name="seed-a", loader={"tuning": "full"})],
        metrics,
        [score_table(metrics)],
        ["confusion"],
    )
    data = ModelCard(card).data
    assert (data.library_name, data.model_name) == ("transformers", "org/name")
    assert data.eval_results[0].metric_value == 0.6667
    assert "decision cross-fitted" in data.eval_results[0].metric_name
    assert "A blend of 2 runs" in card
    assert (
        "given each label. The rule was fitted on other dialogues (first repeat of the cross-fitting).](figures/confusion.png)"
        in card
    )
    assert 'DialogueClassifier.from_pretrained("org/name")' in card
    # The in-sample figure, its cross-fitted one beside it.
    assert "| 0.667 [0.500, 0.700] | 0.900 [0.500, 0.700] |" in card


# ------------------------------------------------------------------------------------------- the code on the cards runs


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run_snippet(python: str, code: str, hub: HubServer, folder: Path) -> str:
    """What a card's code prints in an empty folder, in a process of its own."""
    env = {**hub.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "kind", ["lora", "lora stored", "lora encoder", "lora mean", "lora tokens", "full", "full mean"]
)
def test_the_code_on_a_run_card_gives_the_probabilities_of_our_own_loader(
    python, tmp_path, hub, hub_here, kind
):
    import torch

    from rareturn.data.label_guide import parse_label_guide
    from rareturn.data.rows import Row, Turn
    from rareturn.models.inference import predict_logits, segment_name
    from rareturn.models.loading import (
        BaseModel,
        add_lora,
        load_classifier,
        load_tokenizer,
        load_trained,
        save_trained,
    )
    from rareturn.models.training import RowBatches
    from rareturn.models.turns import make_renderer

    decoder = kind.split()[-1] in ("lora", "stored", "tokens", "full")
    pooling = "mean" if "mean" in kind else "native"
    make = make_tiny_decoder if decoder else make_tiny_encoder
    folder, how = Path(make(tmp_path / "base")), {"pooling": pooling}
    how["head"] = "label_tokens" if "tokens" in kind else "classifier"
    if kind == "lora stored":  # a base whose files are in 4 bits
        folder = Path(store_in_4bit(str(folder), tmp_path / "stored"))
        how |= {"quantization": "nf4", "dtype": "bfloat16"}
    hub.put("org/base", {path.name: path.read_bytes() for path in folder.iterdir()})
    base = BaseModel("org/base", hub.commits("org/base")[-1].oid, str(folder), **how)
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    model = load_classifier(base, NAMES, tokenizer.pad_token_id)
    if "lora" in kind:
        model = add_lora(model, 4, 8, 0.0, ["q_proj"] if decoder else ["query"])
    for name, parameter in model.named_parameters():
        if "lora" in name or "score" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    loader = base.loader | {"tuning": kind.split()[0], "bf16": False}
    facts = {"name": "anchor", "label_names": NAMES, "base_model": "org/base", "label_guide": GUIDE}
    run_dir = make_run(
        tmp_path / "anchor", adapters=False, **facts, base_revision=base.revision, loader=loader
    )
    for fold in range(3):
        save_trained(model, tokenizer, base, adapter_dir(run_dir, fold))
        metrics_path(run_dir, fold).write_text(json.dumps(STAGE))
        push_fold(run_dir, fold, "org", "demo")
    info = json.loads((run_dir / "run.json").read_text())
    card = run_card(info, run_results(run_dir, info), "org/demo-anchor")

    turns = (
        Turn("How has your week been?", "therapist"),
        Turn("Whatever. It's not like anyone noticed.", "patient"),
    )
    rows = [Row("a", "b", turns)]
    window = {"max_turns": 30, "max_seq_length": 1024, "window_stride": 10}
    rendered = make_renderer(base, tokenizer, parse_label_guide(GUIDE, "guide"), window).render(rows)
    batches = RowBatches(tokenizer.pad_token_id, 1, 1, 1, None if decoder else segment_name(base, tokenizer))
    ours = load_trained(base, adapter_dir(run_dir, 0), NAMES, tokenizer.pad_token_id).eval()
    logits = predict_logits(ours, batches, rows, rendered)
    printed = ast.literal_eval(run_snippet(python, snippet_of(card), hub, tmp_path))
    assert list(printed) == NAMES
    # In bf16 the card's head is rounded and ours is not.
    close = 2e-2 if kind == "lora stored" else 1e-5
    assert list(printed.values()) == pytest.approx(softmax(logits)[0].tolist(), abs=close)
    assert max(printed.values()) > 0.4  # not the even guess of a head that was left out


def test_what_a_probe_and_an_ensemble_push_says_how_to_use_it_and_what_it_scored(python, tmp_path, hub):
    """The code on their cards and on that of the tables runs; a labelled test file of the Hub goes to `.eval_results`."""
    folder = Path(make_tiny_encoder(tmp_path / "base"))
    hub.put("org/base", {path.name: path.read_bytes() for path in folder.iterdir()})
    rows = json.loads((ROOT / "data/demo/train.json").read_text(encoding="utf-8"))
    last = {row["dialogue_id"] for row in rows[-40:]}
    test = [row for row in rows if row["dialogue_id"] in last]
    hub.put("org/calls", {"test.json": json.dumps(test).encode()}, "dataset")
    (tmp_path / "train.json").write_text(json.dumps([row for row in rows if row not in test]))
    push = {
        "push_to_hub": True,
        "hub_namespace": "org",
        "hub_name": "demo",
        "test_file": "org/calls:test.json",
    }
    probe = {"model_name_or_path": "org/base", "C": 1, "train_file": tmp_path / "train.json", "num_folds": 2}
    blend = {"runs": tmp_path / "probe", "method": "prior", "repeats": 1}
    for script, flags in (("linear_probe.py", probe), ("ensemble.py", blend)):
        words = words_of(**flags, **push, output_dir=tmp_path / ("probe" if flags is probe else "blend"))
        done = subprocess.run([python, script, *words], cwd=ROOT, env=hub.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    cards = {name: hub.files(f"org/{name}")["README.md"].decode() for name in ("demo-probe", "demo")}
    printed = ast.literal_eval(run_snippet(python, snippet_of(cards["demo-probe"]), hub, tmp_path))
    assert sum(printed.values()) == pytest.approx(1, abs=1e-5) and len(printed) == 9
    name, probabilities = run_snippet(python, snippet_of(cards["demo"]), hub, tmp_path).strip().split(" {")
    assert name in printed and set(ast.literal_eval("{" + probabilities)) == set(printed)

    tables = hub.files("org/demo-oof", "dataset")["README.md"].decode()
    first = ast.literal_eval(run_snippet(python, snippet_of(tables), hub, tmp_path))
    assert set(first) == {"id", "dialogue_id", "fold", "label", "logits"}
    (command,) = re.findall(r"```bash\npython (\S+) (.*)\n```", tables)
    words = [python, ROOT / command[0], *command[1].split(), "--method", "prior"]  # in place of all
    assert subprocess.run(words, cwd=tmp_path, env=hub.env).returncode == 0
    assert (
        json.loads((tmp_path / "decision.json").read_text())["runs"][0]["reference"] == "org/demo-oof:probe"
    )
    of_tables, of_run = DatasetCard(tables).data, ModelCard(cards["demo-probe"]).data
    for key in ("license", "datasets", "base_model"):
        assert of_tables[key] == of_run[key], key
    assert of_tables.language == ["en"] and of_tables.source_datasets == ["AIMH/PsyDefConv"]
    assert of_tables.task_categories == [of_run.pipeline_tag] == ["text-classification"]

    metrics = json.loads((tmp_path / "blend/metrics.json").read_text())["test"]
    for repo, stage in (("org/demo-probe", "argmax"), ("org/demo", "decision")):
        (entry,) = parse_eval_result_entries(yaml.safe_load(hub.files(repo)[".eval_results/test.yaml"]))
        assert (entry.dataset_id, entry.task_id) == ("org/calls", "default")
        assert entry.value == round(metrics[stage]["macro_f1_positive"], 4)
        assert entry.source_url == f"https://huggingface.co/{repo}/blob/main/README.md"
        assert f"share, {stage}, 95 % interval" in entry.notes
        assert f"{len(test)} labelled rows of {len(last)} dialogues" in entry.notes


def test_only_labelled_test_rows_of_a_hub_data_set_are_eval_results():
    test = {"test": {**METRIC, "rows": 9, "dialogues": 3, "argmax": STAGE}}
    local = with_guide()
    assert eval_results([local], test, "org/x") == {}
    assert eval_results([with_guide(dataset="Letters of 1912")], test, "org/x") == {}
    assert eval_results([with_guide(dataset="org/calls")], {}, "org/x") == {}
    assert list(eval_results([with_guide(dataset="org/calls")], test, "org/x")) == [".eval_results/test.yaml"]


def test_a_card_of_a_run_without_a_label_guide_has_no_code_that_could_not_run():
    card = run_card(run_info(label_guide=None), {"folds": {}})
    assert "```python" not in card and "no label guide" in card


def test_the_card_of_a_run_on_turns_points_to_what_reads_it():
    info = run_info()
    info["loader"] = {**info["loader"], "pooling": "turns", "tuning": "full"}
    card = run_card(info, {"folds": {}})
    assert "```python" not in card and "single turns" in card
    assert f"ensemble.py --runs ORG/NAME-oof:{info['name']}" in card
