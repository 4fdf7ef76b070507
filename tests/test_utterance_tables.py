"""Tables of utterances, from reading to predictions; a small corpus in German goes through the whole pipeline."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from running import run_script
from tiny_models import make_tiny_encoder

import augment
import calibrate
import ensemble
import linear_probe
import predict

ROOT = Path(__file__).parent.parent
GERMAN = ROOT / "data/german"
GUIDE = GERMAN / "label_guide.yaml"


def table(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter=delimiter))


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a probe of the German table, its decision and its ensemble."""
    place = tmp_path_factory.mktemp("german")
    data = {"label_guide": GUIDE, "train_file": GERMAN / "train.csv", "test_file": GERMAN / "test.csv"}
    model = {"model_name_or_path": make_tiny_encoder(place / "encoder"), "num_folds": 3, "C": 1}
    assert run_script(linear_probe.main, **data, **model, output_dir=place / "probe") == 0
    decision = {"run": place / "probe", "output": place / "decision.json", "method": "prior", "repeats": 1}
    assert run_script(calibrate.main, **decision) == 0
    blend = {"runs": place / "probe", "decision": place / "decision.json", "test_file": GERMAN / "test.csv"}
    assert run_script(ensemble.main, **blend, repeats=1, output_dir=place / "ensemble") == 0
    return place


def test_an_ensemble_fills_in_the_label_column_of_the_test_table(german: Path):
    asked, predicted = table(GERMAN / "test.csv"), table(german / "ensemble/prediction.csv")
    assert [{**line, "art": None} for line in asked] == [{**line, "art": None} for line in predicted]
    for line in predicted:
        target = line["sprecher"] == "Mieterin"
        assert line["art"] in (("beschwerde", "frage", "zusage") if target else ("",))
    with zipfile.ZipFile(german / "ensemble/prediction.zip") as archive:
        assert archive.read("prediction.csv") == (german / "ensemble/prediction.csv").read_bytes()


def test_predict_adds_columns_to_a_table_and_says_what_the_ensemble_said(german: Path, tmp_path: Path):
    flags = {"ensemble": german / "ensemble", "input": GERMAN / "test.csv", "rows_per_chunk": 2}
    for name in ("out.csv", "out.tsv", "out.jsonl"):
        assert run_script(predict.main, **flags, output=tmp_path / name) == 0
    added, lines = table(tmp_path / "out.csv"), (tmp_path / "out.jsonl").read_text().splitlines()
    assert added == table(tmp_path / "out.tsv", "\t")
    assert [list(line.values())[:4] for line in added] == [
        list(line.values()) for line in table(GERMAN / "test.csv")
    ]
    assert [line["label"] for line in added] == [
        line["art"] for line in table(german / "ensemble/prediction.csv")
    ]
    said = [json.loads(line) for line in lines]
    assert [line["id"] for line in said[:2]] == ["muell-11/1", "muell-11/3"]
    for cells, line in zip((line for line in added if line["label"]), said, strict=True):
        first, second = sorted(line["probabilities"].values())[:0:-1]
        assert cells["label"] == line["label_name"]
        assert float(cells["probability"]) == line["probabilities"][line["label_name"]]
        overruled = line["decided_by"] == "bias"
        expected = first - second if not overruled else line["probabilities"][line["label_name"]] - first
        assert float(cells["margin"]) == pytest.approx(expected, abs=1e-6)
    last = tmp_path / "last.csv"
    assert run_script(predict.main, **flags, output=last, turns="last") == 0
    assert [line["nr"] for line in table(last) if line["label"]] == ["5", "5"]


def test_what_predict_refuses_to_write(german: Path, tmp_path: Path, capsys):
    for source, said in (
        (german / "ensemble/prediction.csv", None),
        (tmp_path / "labelled.csv", "label, margin: there already, and predict.py would write over it"),
        (ROOT / "data/demo/test.json", "is no table of utterances; name a .jsonl file"),
    ):
        output = tmp_path / "out.csv"
        (tmp_path / "labelled.csv").write_text(
            "gespraech,nr,sprecher,aeusserung,label,margin\na,1,Mieterin,Ja,x,y\n"
        )
        status = run_script(predict.main, ensemble=german / "ensemble", input=source, output=output)
        assert status == (2 if said else 0)
        assert (said or "") in capsys.readouterr().err
        assert output.exists() is not bool(said)
        output.unlink(missing_ok=True)
    assert run_script(predict.main, ensemble=german / "ensemble", input=GUIDE, output="out.txt") == 2
    assert "a .jsonl, .csv or .tsv file expected" in capsys.readouterr().err


def test_english_patterns_are_refused_for_german(tmp_path: Path, capsys):
    flags = {"train_file": GERMAN / "train.csv", "label_guide": GUIDE, "output_file": tmp_path / "out.jsonl"}
    assert run_script(augment.main, **flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"augment.py: error: {GUIDE}: language: 'de', but the patterns of augment.py are English"
    assert not (tmp_path / "out.jsonl").exists()
