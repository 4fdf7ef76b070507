"""`scripts/write_examples.py`, through its command line and the real client, against a scripted server on loopback."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from llm_server import LlmServer, Reply
from running import run_script
from tiny_models import make_tiny_encoder

import linear_probe
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import load_rows
from rareturn.runs.reading import read_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import write_examples  # noqa: E402

GERMAN = ROOT / "data/german"
GUIDE = load_label_guide(GERMAN / "label_guide.yaml")


@pytest.fixture(autouse=True)
def of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answer(prompt: str) -> str:
    """As many pairs as are asked for, in prose and a code block; the third of each repeats the second."""
    number = int(re.search(r"Write (\d+) short", prompt)[1])
    label = next(label for label in GUIDE.labels if f"no other:\n{label.name}." in prompt)
    style = next(place for place, style in enumerate(write_examples.STYLES) if style in prompt)
    texts = [f"Antwort {label.number}/{style}/{place if place != 2 else 1}, [so]" for place in range(number)]
    pairs = [["Und dann?", text] for text in texts]
    return f"Gern [wie gewünscht]:\n```json\n{json.dumps(pairs, ensure_ascii=False, indent=1)}\n```"


def run(server: LlmServer, output: Path, **more: object) -> int:
    flags = {"label_guide": GERMAN / "label_guide.yaml", "llm": "gross-1", "base_url": server.url}
    return run_script(write_examples.main, **flags | {"output_file": output} | more)


def test_from_a_guide_to_rows_that_a_probe_is_trained_on(tmp_path: Path, capsys):
    output = tmp_path / "examples.csv"
    with LlmServer(answer) as server:
        assert run(server, output, number=24, about="Anrufe bei der Hausverwaltung") == 0
        labels = len(GUIDE.labels)
        assert len(server.requests) == 4 * labels
        for prompt in server.prompts():
            assert "Write 6 short exchanges in the language de" in prompt and GUIDE.task in prompt
            assert "The conversations are Anrufe bei der Hausverwaltung." in prompt
            assert all(f"- {label.name}. {label.definition}" in prompt for label in GUIDE.labels)
        table = capsys.readouterr().out
        assert re.search(rf"0 {GUIDE.names[0]} +20\n", table)
        # Again, for nothing; and more of them, in several answers to a prompt.
        made = output.read_bytes()
        assert run(server, output, number=24, about="Anrufe bei der Hausverwaltung", max_requests=0) == 0
        assert output.read_bytes() == made and len(server.requests) == 4 * labels
        assert run(server, output.with_suffix(".tsv"), number=80) == 0
        assert len(server.requests) == (4 + 8) * labels
    rows = load_rows(str(output), GUIDE)
    assert Counter(row.label for row in rows) == dict.fromkeys(GUIDE.numbers, 20)
    assert rows[0].turns[0].text == "Und dann?" and GUIDE.is_target(rows[0].turns[1].speaker)
    encoder = make_tiny_encoder(tmp_path / "encoder")
    flags = {"model_name_or_path": encoder, "label_guide": GERMAN / "label_guide.yaml", "num_folds": 3}
    flags |= {"train_file": GERMAN / "train.csv", "extra_train_file": output, "C": 1}
    assert run_script(linear_probe.main, **flags, output_dir=tmp_path / "probe") == 0
    oof = read_run(tmp_path / "probe").oof
    assert not {row.id for row in rows} & set(oof.id)
    metrics = json.loads((tmp_path / "probe/fold-0/metrics.json").read_text())
    assert metrics["train_rows"] == len(rows) + (oof.fold != 0).sum()


def test_an_answer_that_was_cut_off_and_one_without_pairs(tmp_path: Path, capsys):
    whole = json.dumps([["a", "b"], ["c", "d"], ["e", ""], ["f"], ["g", "h", "i"], ["k", "lang"]])
    assert write_examples.pairs_in(whole) == [("a", "b"), ("c", "d"), ("k", "lang")]
    assert write_examples.pairs_in(whole[:17]) == [("a", "b")]
    assert write_examples.pairs_in(f"<think>{whole}</think>Nun: {whole[:17]}") == [("a", "b")]
    with LlmServer(lambda prompt: Reply("Leider nein.")) as server:
        assert run(server, tmp_path / "none.csv") == 2
    assert capsys.readouterr().err.endswith(
        ": no pair of texts in the answers for beschwerde, frage, zusage\n"
    )
    assert not (tmp_path / "none.csv").exists()


def test_without_a_model_the_prompts_are_printed(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script(write_examples.main, label_guide=GERMAN / "label_guide.yaml") == 0
    printed = capsys.readouterr().out
    assert printed.count("You write training data") == 4 * len(GUIDE.labels)
    assert not Path("examples.csv").exists()
    for wrong, said in (
        ({"number": 0}, "--number must be 1 or more"),
        ({"output_file": "a.json"}, "must end with"),
    ):
        assert run_script(write_examples.main, **wrong) == 2
        assert said in capsys.readouterr().err
