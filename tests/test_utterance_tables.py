"""Tables of utterances, from reading to predictions; a small corpus in German goes through the whole pipeline."""

from __future__ import annotations

import csv
import io
import json
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from running import run_script
from tiny_models import make_tiny_encoder

import augment
import calibrate
import ensemble
import linear_probe
import predict
from rareturn.classifier import target_rows
from rareturn.data.dialogues import Dialogue, Row, Turn, Turns
from rareturn.data.label_guide import LabelGuide, load_label_guide, parse_label_guide
from rareturn.data.rendering import render_instruction
from rareturn.data.rows import data_fingerprint, load_rows, load_source
from rareturn.data.utterances import table_bytes
from rareturn.errors import InputError
from rareturn.runs.hub import push_files
from rareturn.runs.tables import rows_digest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import make_label_guide  # noqa: E402

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
        (tmp_path / "twice.csv", "twice.csv: row 2: nr: 1 is there twice in dialogue 'a'"),
        (ROOT / "data/demo/test.json", "is no table of utterances; name a .jsonl file"),
    ):
        output = tmp_path / "out.csv"
        (tmp_path / "labelled.csv").write_text(
            "gespraech,nr,sprecher,aeusserung,label,margin\na,1,Mieterin,Ja,x,y\n"
        )
        (tmp_path / "twice.csv").write_text("gespraech,nr,sprecher,aeusserung\n" + "a,1,Mieterin,Ja\n" * 2)
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
    but = "but the patterns of augment.py are English; --llm MODEL writes in any language"
    assert line == f"augment.py: error: {GUIDE}: language: 'de', {but}"
    assert not (tmp_path / "out.jsonl").exists()


# -------------------------------------------------------------------------------------------------------------- reading

LINES = [
    "dialogue_id,turn,speaker,text,label",
    "a,1,seeker,Hello.,0",
    "a,2,supporter,How are you?,",
    "a,3,seeker,I did it.,7",
    "b,1,seeker,Good morning.,0",
]
DMRS = load_label_guide("label_guides/dmrs.yaml")


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def guide_with(**changes: object) -> LabelGuide:
    return parse_label_guide(DMRS.to_dict() | changes, "guide")


def refusal(source: str, guide: LabelGuide = DMRS, **how: object) -> str:
    """The one line that a user sees, without the file's name."""
    with pytest.raises(InputError) as caught:
        load_source(source, guide, **how)
    (line,) = caught.value.lines()
    return line.removeprefix(f"{source}: ")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "saved", "folder"])
def test_every_kind_of_table_gives_the_rows_of_the_nested_form(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    nested, lines, ids = json.loads((ROOT / "data/demo/train.json").read_text()), [], {}
    longest = {
        row["dialogue_id"]: row["dialogue"] for row in sorted(nested, key=lambda row: len(row["dialogue"]))
    }
    labels = {(row["dialogue_id"], len(row["dialogue"])): row["label"] for row in nested}
    for dialogue_id, dialogue in longest.items():
        for number, turn in enumerate(dialogue, 1):
            lines.append(
                {
                    "dialogue_id": dialogue_id,
                    "turn": number,
                    **turn,
                    "label": labels.get((dialogue_id, number)),
                }
            )
    path = tmp_path / f"table.{kind}"
    if kind in ("csv", "tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + table_bytes(lines, f".{kind}"))  # as Excel begins it
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(line) for line in lines))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    else:
        dataset = datasets.Dataset.from_list(lines)
        if kind == "folder":
            path.mkdir()
        dataset.save_to_disk(path) if kind == "saved" else dataset.to_csv(path / "train.csv")
    read = load_source(str(path), DMRS)
    for row in load_rows(str(ROOT / "data/demo/train.json"), DMRS):
        ids[row.dialogue_id, len(row.turns)] = row
    assert read.columns["text"] == "text" and read.named is False
    assert len(read.rows) == len(ids) == len(nested)
    for row in read.rows:
        other = ids[row.dialogue_id, len(row.turns)]
        assert row.id == f"{row.dialogue_id}/{len(row.turns)}"
        assert row.turns == other.turns and other.turns == row.turns and row.label == other.label
        assert lines[row.place]["text"] == row.turns[-1].text


def test_a_view_of_a_dialogue_is_its_tuple_in_all_that_is_asked_of_it():
    dialogue = Dialogue(Turn(f"text {number}", "me") for number in range(7))
    for count in range(1, 8):
        view, plain = Turns(dialogue, count), tuple(dialogue[:count])
        assert view == plain and plain == view and hash(view) == hash(plain) and len(view) == count
        assert list(view) == list(plain) and list(reversed(view)) == list(reversed(plain))
        for place in (
            slice(-3, None),
            slice(None, -1),
            slice(2, None),
            slice(None, None, -1),
            slice(0, 9, 2),
            -1,
            0,
        ):
            assert view[place] == plain[place]
        with pytest.raises(IndexError):
            view[count]
    assert Turns(dialogue, 2) != Turns(dialogue, 3)


def test_labels_are_numbers_or_names_and_lines_without_one_are_context(tmp_path: Path):
    numbers = load_source(write(tmp_path / "a.csv", LINES), DMRS)
    assert [(row.id, row.label, row.place) for row in numbers.rows] == [
        ("a/1", 0, 0),
        ("a/3", 7, 2),
        ("b/1", 0, 3),
    ]
    named = [line.replace(",7", ",High-Adaptive").replace(",0", ",No Defense") for line in LINES]
    named[4] = "b,1,seeker,Good morning.,n/a"
    read = load_source(write(tmp_path / "b.csv", named), guide_with(no_label=["n/a "]))
    assert read.named and [(row.id, row.label) for row in read.rows] == [("a/1", 0), ("a/3", 7)]
    floats = [
        line.replace(",7", ",7.0").replace(",0", ",0.0") for line in LINES
    ]  # as pandas writes numbers with gaps
    assert load_source(write(tmp_path / "c.csv", floats), DMRS).rows == numbers.rows


def test_labels_that_count_from_one_are_names(tmp_path: Path):
    labels = [{"number": number, "name": str(number + 1), "definition": ""} for number in range(5)]
    guide = guide_with(labels=labels, positive=[0, 1], protected=None)
    lines = [line.replace(",7", ",5").replace(",0", ",1") for line in LINES]
    assert [row.label for row in load_rows(write(tmp_path / "a.csv", lines), guide)] == [0, 4, 0]
    assert "'0' is no name or number" in refusal(write(tmp_path / "a.csv", [LINES[0], LINES[1]]), guide)


def test_in_a_file_without_labels_every_turn_of_a_target_speaker_is_a_row(tmp_path: Path):
    lines = [line.rpartition(",")[0] for line in LINES]
    source = write(tmp_path / "a.csv", lines)
    for target, ids in (
        ("seeker", ["a/1", "a/3", "b/1"]),
        (["supporter"], ["a/2"]),
        (["supporter", "seeker"], ["a/1", "a/2", "a/3", "b/1"]),
        ("any", ["a/1", "a/2", "a/3", "b/1"]),
    ):
        read = load_source(source, guide_with(target_speaker=target), require_labels=False)
        assert [row.id for row in read.rows] == ids and read.named is None


def test_labels_of_others_than_the_target_are_counted_and_left(tmp_path: Path, caplog):
    source = write(tmp_path / "a.csv", [line.replace("you?,", "you?,7") for line in LINES])
    assert [row.id for row in load_rows(source, DMRS)] == ["a/1", "a/3", "b/1"]
    (said,) = caplog.messages
    assert said == f"{source}: 1 labelled lines are by speakers other than the target (seeker): context only"


def test_flags_win_over_the_guide_and_the_order_is_the_turns(tmp_path: Path):
    lines = [
        "who,what,turn,dialogue_id,key,y",
        "seeker,Third.,3,d,k3,7",
        "supporter,Second.,2,d,k2,",
        "seeker,First.,1,d,k1,0",
    ]
    guide = guide_with(columns={"speaker": "who", "text": "nothing", "label": "y"})
    read = load_source(write(tmp_path / "a.csv", lines), guide, columns={"text": "what", "id": "key"})
    assert [(row.id, row.turns[-1].text, len(row.turns)) for row in read.rows] == [
        ("k1", "First.", 1),
        ("k3", "Third.", 3),
    ]
    unnumbered = [line.replace("turn", "step") for line in lines]
    read = load_source(write(tmp_path / "b.csv", unnumbered), guide, columns={"text": "what"})
    assert [row.id for row in read.rows] == ["d/0", "d/2"]


def test_a_column_called_dialogue_may_be_that_of_the_ids(tmp_path: Path):
    source = write(tmp_path / "a.csv", [LINES[0].replace("dialogue_id", "dialogue"), *LINES[1:]])
    guide = guide_with(columns={"dialogue_id": "dialogue"})
    rows = load_rows(source, guide)
    assert [row.id for row in rows] == ["a/1", "a/3", "b/1"]
    # Its variants hold their turns in a column of that name.
    variants = write_variants(tmp_path / "variants.jsonl", rows)
    assert [row.augmented_from for row in load_rows(variants, guide, sources_of_augmented=rows)] == [
        "a/1",
        "a/3",
        "b/1",
    ]


def write_variants(path: Path, rows: list[Row]) -> str:
    """A variant of each row, as augment.py writes it."""
    variants = []
    for number, source in enumerate(rows):
        texts = augment.augment_text(source.turns[-1].text, number, 1, f"42/{source.id}")
        variants += augment.variants_of(source, texts)
    path.write_bytes(augment.file_bytes(variants, {}, ".jsonl"))
    return str(path)


@pytest.mark.parametrize("target", ["any", ["Ross", "Rachel"]])
def test_a_table_is_augmented_and_its_variants_fit_their_sources(target: object, tmp_path: Path):
    said = [
        (f"d{n % 3}", n, ["Ross", "Rachel", "Joey"][n % 3 - n % 2], f"I do not like song {n}.", n % 9)
        for n in range(18)
    ]
    source = write(tmp_path / "a.csv", [LINES[0], *(",".join(map(str, cells)) for cells in said)])
    guide = guide_with(speakers="any", target_speaker=target)
    rows, path = load_rows(source, guide), tmp_path / "guide.yaml"
    path.write_text(json.dumps(guide.to_dict()))
    output = tmp_path / "out.jsonl"
    flags = {"label_guide": path, "train_file": source, "labels": [1, 2], "k": 2, "output_file": output}
    assert run_script(augment.main, **flags) == 0
    variants = load_rows(str(output), guide, sources_of_augmented=rows)
    sources = {row.id: row for row in rows}
    assert len(variants) == 2 * sum(row.label in (1, 2) for row in rows) > 0
    for row in variants:
        assert (
            row.turns[:-1] == sources[row.augmented_from].turns[:-1]
            and row.turns != sources[row.augmented_from].turns
        )


def test_speakers_of_an_open_guide_are_letters_in_the_order_of_their_dialogue(tmp_path: Path):
    lines = [LINES[0], *(f"d,{n},{who},Hm {n}.,0" for n, who in enumerate(["Ross", "Bot", "Rachel", "Ross"]))]
    lines += ["e,1,Rachel,Hm.,0"]
    source = write(tmp_path / "a.csv", lines)

    def speakers(**changes: object) -> list[str]:
        last = load_rows(source, guide_with(speakers="any", **changes))
        return [turn.speaker for row in last[-2:] for turn in row.turns]

    assert speakers(target_speaker="any") == ["A", "B", "C", "A", "A"]
    assert speakers(target_speaker="any", speaker_names="as_is") == [
        "Ross",
        "Bot",
        "Rachel",
        "Ross",
        "Rachel",
    ]
    assert speakers(target_speaker=["Ross", "Rachel"]) == ["Ross", "A", "Rachel", "Ross", "Rachel"]
    # What has letters keeps them, and a letter that is a target's name is nobody else's.
    guide = guide_with(speakers="any", target_speaker="any")
    names = [f"person {number}" for number in range(60)]
    letters = list(guide.names_in_prompt(names).values())
    assert letters[:3] + letters[25:28] + letters[52:54] == ["A", "B", "C", "Z", "A2", "B2", "A3", "B3"]
    assert guide.names_in_prompt(letters) == dict(zip(letters, letters, strict=True))
    assert guide_with(speakers="any", target_speaker="A").names_in_prompt(["x", "A"]) == {"x": "B", "A": "A"}


def test_a_dialogue_of_an_open_guide_has_letters_in_prediction_too():
    guide = guide_with(speakers="any", target_speaker=["Ann", "Ben"])
    said = [{"speaker": name, "text": "Hm."} for name in ("Zoe", "Ben", "Yan", "Ann")]
    rows = target_rows(said, guide, "all", "dialogue", "d")
    assert [(row.id, [turn.speaker for turn in row.turns]) for row in rows] == [
        ("d#1", ["A", "Ben"]),
        ("d#3", ["A", "Ben", "B", "Ann"]),
    ]
    assert guide.example_speakers == ("A", "Ann")
    assert guide_with(speakers="any", target_speaker="any").example_speakers == ("A", "B")
    assert DMRS.example_speakers == ("supporter", "seeker")


def test_digests_of_a_table_see_what_its_rows_are(tmp_path: Path):
    plain = load_rows(write(tmp_path / "a.csv", LINES), DMRS)
    digests = {data_fingerprint(plain)}
    for number, old, new in (
        (1, "Hello", "Hallo"),
        (2, "supporter", "seeker"),
        (3, ",7", ",6"),
        (4, "b,1", "c,1"),
    ):
        changed = [*LINES[:number], LINES[number].replace(old, new), *LINES[number + 1 :]]
        digests.add(data_fingerprint(load_rows(write(tmp_path / "b.csv", changed), DMRS)))
    assert len(digests) == 5
    assert data_fingerprint(plain[::-1]) in digests
    assert (
        rows_digest(plain)
        == rows_digest(load_rows(write(tmp_path / "b.csv", LINES), DMRS))
        != rows_digest(plain[::-1])
    )


def test_nested_rows_keep_the_digests_that_they_had():
    rows = load_rows(str(ROOT / "data/demo/train.json"), load_label_guide("data/demo/label_guide.yaml"))
    assert data_fingerprint(rows) == "958c297bc2423b109acc8eebeb64b74c810b044c1c64375aade9c50776849f5c"
    assert rows_digest(rows) == "a5019465b03227d9f71b068474d435130fffe7066ab6a839fec431e813669c1c"


def test_memory_is_in_proportion_to_the_utterances(tmp_path: Path):
    """One dialogue of 20,000 turns: rows that held their turns would take 200 million of them."""
    lines = [LINES[0], *(f"d,{number},seeker,Utterance number {number}.,0" for number in range(20_000))]
    source = write(tmp_path / "a.csv", lines)
    tracemalloc.start()
    rows = load_rows(source, DMRS)
    data_fingerprint(rows), rows_digest(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20_000 and len(rows[-1].turns) == 20_000
    assert peak < 30 * Path(source).stat().st_size


# ----------------------------------------------------------------------------------------------------------- bad tables


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [line.replace("speaker", "who").replace("text", "what") for line in lines],
         "no column 'speaker', 'text'; there are: dialogue_id, turn, who, what, label. Name them by --speaker_column, --text_column, or in the guide"),
        (lambda lines: [line.rpartition(",")[0] for line in lines],
         "no column 'label'; there are: dialogue_id, turn, speaker, text. Name them by --label_column, or in the guide"),
        (lambda lines: [line.replace(",", ";") for line in lines],
         "no column 'dialogue_id', 'speaker', 'text', 'label'; there are: dialogue_id;turn;speaker;text;label. Name them by --dialogue_id_column, --speaker_column, --text_column, --label_column, or in the guide"),
        (lambda lines: [*lines, "a,3,seeker,Again.,7"], "row 5: turn: 3 is there twice in dialogue 'a'"),
        (lambda lines: [*lines, "a,3.0,seeker,Again.,7"], "row 5: turn: 3 is there twice in dialogue 'a'"),
        (lambda lines: [*lines, "a,later,seeker,Again.,7"], "row 5: turn: must be a number (the order of the turns), not 'later'"),
        (lambda lines: [*lines, "a,nan,seeker,Again.,7"], "row 5: turn: must be a number (the order of the turns), not 'nan'"),
        (lambda lines: [*lines, "a,,seeker,Again.,7"], "row 5: turn: empty"),
        (lambda lines: [*lines, "a,4,seeker,Again.,Joyful", "a,5,seeker,Again.,Joyful"],
         "row 5: label: 'Joyful' is no name or number of the label guide (and 1 more rows)"),
        (lambda lines: [*lines, "a,4,seeker,Again.,9"], "row 5: label: '9' is no name or number of the label guide"),
        (lambda lines: [*lines, " ,4,seeker,Again.,7"], "row 5: dialogue_id: empty"),
        (lambda lines: [*lines, "a,4,seeker,  ,7"], "row 5: text: empty"),
        (lambda lines: [*lines, "a,4,seeker"], "row 5: text: missing"),
        (lambda lines: [*lines, "a,4,,Again.,7"], "row 5: speaker: empty"),
        (lambda lines: [*lines, "a,4,Seeker,Again.,7"], "row 5: speaker: unknown speaker 'Seeker' (not seeker or supporter)"),
        (lambda lines: [*lines, "a,4,seeker,Well, again.,7"], "row 5: cells: more cells than columns"),
        (lambda lines: [*lines, "a,4,seeker,Again.,No Defense"], "row 5: label: a name, but numbers in the rows before"),
        (lambda lines: [*lines, "a,4,seeker,Again.,2|3"], "row 5: label: 2|3: several labels for one line (multi-label) cannot be learnt here"),
        (lambda lines: [*lines, 'a,4,seeker,Again.,"[\'Neurotic\', \'Disavowal\']"'],
         "row 5: label: ['Neurotic', 'Disavowal']: several labels for one line (multi-label) cannot be learnt here"),
        (lambda lines: [line.rstrip("07") for line in lines], "holds no rows: no turn of a target speaker that has a label"),
        (lambda lines: [line.replace("seeker", "supporter") for line in lines], "holds no rows: no turn of a target speaker that has a label"),
        (lambda lines: [lines[0].replace("label", "id"), "a,1,seeker,Hm.,7", "a,2,seeker,Hm.,7"],
         "no column 'label'; there are: dialogue_id, turn, speaker, text, id. Name them by --label_column, or in the guide"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said_in_one_line(change, said: str, tmp_path: Path):
    assert refusal(write(tmp_path / "table.csv", change(list(LINES)))) == said


def test_more_that_is_wrong_with_a_table(tmp_path: Path):
    lines = ["dialogue_id,speaker,text,label,id", "a,seeker,One.,0,x", "a,seeker,Two.,0,x"]
    assert refusal(write(tmp_path / "id.csv", lines)) == "row 2: id: duplicate id 'x'"
    columns = {"turn": "step"}
    assert refusal(write(tmp_path / "step.csv", LINES), columns=columns).startswith(
        "no column 'step'; there are: "
    )
    listed = {"dialogue_id": 1, "speaker": "seeker", "text": "Hm.", "label": [2]}
    source = write(tmp_path / "list.jsonl", [json.dumps(listed)])
    assert (
        refusal(source)
        == "row 1: label: [2]: several labels for one line (multi-label) cannot be learnt here"
    )
    source = write(tmp_path / "kinds.jsonl", [json.dumps(listed | {"label": 2}), "[]"])
    assert refusal(source) == "row 2: cells: not an object with fields"
    source = write(tmp_path / "half.jsonl", [json.dumps(listed | {"label": 2, "text": "so \ud83d"})])
    assert refusal(source) == "row 1: text: holds half a character (a lone surrogate)"
    source = write(tmp_path / "text.jsonl", [json.dumps(listed | {"label": 2, "text": ["so"]})])
    assert refusal(source) == "row 1: text: must be a text, not a list"
    source = write(tmp_path / "variants.csv", LINES)
    said = refusal(source, sources_of_augmented=load_rows(source, DMRS))
    assert said == "a table of utterances, but variants are rows that hold their turns"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_file_of_two_encodings_is_refused_with_the_line_where_the_second_begins(
    suffix: str, tmp_path: Path
):
    path = tmp_path / f"table{suffix}"
    whole = (
        LINES
        if suffix != ".jsonl"
        else [json.dumps(dict.fromkeys(["dialogue_id", "speaker", "text", "label"], "1"))]
    )
    text = "\n".join(line.replace(",", "\t" if suffix == ".tsv" else ",") for line in whole)
    path.write_bytes(text.encode() + b"\n" + "a,4,seeker,Zo\u00eb,7\n".encode("latin-1"))
    said = refusal(str(path), guide_with(speakers="any", target_speaker="any"))
    assert said.startswith(f"line {len(whole) + 1}: not a UTF-8 text: byte 0xeb")


def test_bad_tables_end_a_script_with_one_line_and_nothing_written(tmp_path: Path, capsys):
    """Among them: numbers in one file and names in the other, which only the script that reads both can see."""
    numbers = write(tmp_path / "numbers.csv", LINES)
    names = write(
        tmp_path / "names.csv", [line.replace(",7", ",Neurotic").replace(",0", ",Unclear") for line in LINES]
    )
    twice = write(tmp_path / "twice.csv", [*LINES, LINES[-1]])
    model = {"model_name_or_path": tmp_path / "no-model", "output_dir": tmp_path / "run"}
    for train, test, said in (
        (numbers, names, f"{names}: label: names, but numbers in {numbers}"),
        (names, numbers, f"{numbers}: label: numbers, but names in {names}"),
        (numbers, twice, f"{twice}: row 5: turn: 1 is there twice in dialogue 'b'"),
    ):
        assert run_script(linear_probe.main, **model, train_file=train, test_file=test) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"linear_probe.py: error: {said}" and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------- guides


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_speaker": ["seeker", "bot"]}, "target_speaker: 'bot' is not among the speakers (seeker or supporter)"),
        ({"target_speaker": []}, "target_speaker: Tuple should have at least 1 item after validation, not 0"),
        ({"speakers": "any", "target_speaker": None}, "target_speaker: missing; write whose turns are classified (any), such as 'target_speaker: any'"),
        ({"speakers": "seeker"}, "speakers: Input should be a valid tuple"),
        ({"speaker_names": "initials"}, "speaker_names: Input should be 'letters' or 'as_is'"),
        ({"columns": {"speaker": ""}}, "columns.speaker: empty"),
        ({"no_label": "n/a"}, "no_label: Input should be a valid tuple"),
    ],
)  # fmt: skip
def test_a_guide_that_breaks_a_rule_of_tables(changes: dict, problem: str):
    with pytest.raises(InputError) as caught:
        guide_with(**changes)
    assert caught.value.lines() == [f"guide: {problem}"]


@pytest.mark.parametrize("name", ["annomi", "meld"])
def test_the_guides_of_this_project_travel_and_older_guides_keep_their_form(name: str):
    guide = load_label_guide(f"label_guides/{name}.yaml")
    assert parse_label_guide(json.loads(json.dumps(guide.to_dict())), "run.json") == guide
    assert guide.columns["text"] and all(label.definition for label in guide.labels)
    assert not {"columns", "no_label", "speaker_names"} & set(DMRS.to_dict())


def test_a_guide_without_definitions_shows_names_and_says_so_once(tmp_path: Path, caplog):
    content = DMRS.to_dict()
    content["labels"][0]["definition"], content["labels"][1]["definition"] = None, ""
    path = tmp_path / "guide.yaml"
    path.write_text(json.dumps(content))
    guide = load_label_guide(path)
    assert "\n0: No Defense\n1: Action Defenses\n2: Major Image-Distorting - " in render_instruction(guide)
    assert caplog.messages == [f"{path}: 2 of 9 labels have no definition: the prompt shows the names only"]


def test_a_guide_is_made_from_a_table_and_reads_it(tmp_path: Path, monkeypatch, capsys):
    names = {
        "dialogue_id": "gespraech",
        "turn": "nr",
        "speaker": "sprecher",
        "text": "aeusserung",
        "label": "art",
    }
    flags, path = {f"{name}_column": column for name, column in names.items()}, tmp_path / "guide.yaml"
    assert run_script(make_label_guide.main, GERMAN / "train.csv", **flags, output=path) == 0
    text, made, own = path.read_text(), load_label_guide(path), load_label_guide(GUIDE)
    counts = Counter(line["art"] for line in table(GERMAN / "train.csv") if line["art"])
    assert made.names == [name for name, _ in counts.most_common()] and made.columns == own.columns
    assert (made.speakers, made.target_speaker) == (own.speakers, own.target_speaker)
    assert made.protected == 0 and made.positive == (0, 1, 2)
    assert f'name: "frage"  # {counts["frage"]} lines in 10 dialogues' in text
    rows = load_rows(str(GERMAN / "train.csv"), made)
    assert Counter(made.names[row.label] for row in rows) == counts
    # A second time it is not written over.
    path.write_text("mine")
    assert run_script(make_label_guide.main, GERMAN / "train.csv", **flags, output=path) == 2
    assert path.read_text() == "mine" and "there already" in capsys.readouterr().err


def test_a_made_guide_of_numbers_and_of_many_speakers(tmp_path: Path, capsys):
    lines = [
        "Dialogue_ID,Speaker,Utterance,Stars",
        *(f"d,p{n},Hm.,{n % 5 + 1 if n % 2 else 'n/a'}" for n in range(30)),
    ]
    source, path = write(tmp_path / "t.csv", lines), tmp_path / "guide.yaml"
    how = {"label_column": "Stars", "no_label": ["n/a"], "output": path}
    assert run_script(make_label_guide.main, source, **how) == 0
    guide = load_label_guide(path)
    assert guide.names == ["1", "2", "3", "4", "5"] and guide.speakers == "any" and guide.no_label == ("n/a",)
    assert (
        guide.target_speaker == tuple(f"p{n}" for n in range(1, 30, 2))
        and "Do not rename these" in path.read_text()
    )
    assert [row.label for row in load_rows(source, guide)] == [n % 5 for n in range(30) if n % 2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"label_column": "emotion"}, "--label_column: no column 'emotion'; there are: dialogue_id, turn, speaker, text, label"),
        ({"label_column": "speaker"}, None),
        ({"label_column": "text"}, "text: 101 different values: is this the label?"),
        ({"label_column": "dialogue_id"}, "dialogue_id: 1 labels, but a task needs two"),
        ({}, "label: 1|2: several labels for one line (multi-label)"),
    ],
)  # fmt: skip
def test_what_the_guide_maker_refuses(flags: dict, said: str | None, tmp_path: Path, capsys):
    lines = [
        f"a,{n},{'seeker' if n % 2 else 'supporter'},Hm {n}.,{n % 3 if n else '1|2'}" for n in range(101)
    ]
    source, path = write(tmp_path / "t.csv", [LINES[0], *lines]), tmp_path / "guide.yaml"
    assert run_script(make_label_guide.main, source, **flags, output=path) == (2 if said else 0)
    if said:
        assert (
            capsys.readouterr().err == f"make_label_guide.py: error: {source}: {said}\n" and not path.exists()
        )


def test_a_prediction_of_another_kind_is_not_left_beside(german: Path, tmp_path: Path, capsys):
    (tmp_path / "prediction.json").write_text("[]")
    flags = {"runs": german / "probe", "decision": german / "decision.json", "output_dir": tmp_path}
    assert run_script(ensemble.main, **flags, test_file=GERMAN / "test.csv") == 2
    assert "holds a prediction of another call" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prediction.json"]


def test_a_table_on_the_hub(hub_here, tmp_path: Path):
    source, path = write(tmp_path / "table.csv", LINES), tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table(Path(source))), path)
    push_files("org/talks", {path.name: path}, repo_type="dataset", message="Table", kept_in=tmp_path)
    assert load_rows("org/talks:train.parquet", DMRS) == load_rows(source, DMRS)
