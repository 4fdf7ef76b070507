"""rareturn.data: what is read, what is refused and in which words, how rows become tokens."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import random
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tiny_models import make_tiny_encoder, make_tokenizer

from rareturn.data import readers
from rareturn.data.label_guide import load_label_guide, parse_label_guide
from rareturn.data.readers import read_records
from rareturn.data.rendering import Renderer, render_instruction, window_start
from rareturn.data.rows import Row, Turn, data_fingerprint, load_rows
from rareturn.errors import InputError

ROOT = Path(__file__).parent.parent
TRAIN, TEST = ROOT / "data/demo/train.json", ROOT / "data/demo/test.json"
GUIDE = load_label_guide("label_guides/dmrs.yaml")


@pytest.fixture(scope="module")
def demo() -> list[Row]:
    return load_rows(str(TRAIN), GUIDE)


@pytest.fixture(scope="module")
def encoder_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_encoder(tmp_path_factory.mktemp("encoder")))


def record(row_id: str, dialogue_id: str = "d1", label: int = 7, text: str = "I did it.", **changes) -> dict:
    dialogue = [{"text": "How was it?", "speaker": "supporter"}, {"text": text, "speaker": "seeker"}]
    return {
        "id": row_id,
        "dialogue_id": dialogue_id,
        "dialogue": dialogue,
        "current_text": text,
        "label": label,
        **changes,
    }


def problems_of(tmp_path: Path, records: object, **options) -> list[str]:
    """The lines that a user sees, without the file's name, which must open each."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records))
    with pytest.raises(InputError) as caught:
        load_rows(str(path), GUIDE, **options)
    lines = caught.value.lines()
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


# -------------------------------------------------------------------------------------------------------------- sources


def write_source(kind: str, records: list[dict], folder: Path) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in records]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=50)
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows({**row, "dialogue": json.dumps(row["dialogue"])} for row in records)
    else:
        import datasets

        path = folder / kind
        dataset = datasets.Dataset.from_list(records)
        if kind == "saved":
            dataset.save_to_disk(path)
        elif kind == "saved_splits":
            datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
        else:
            path.mkdir()
            dataset.to_parquet(path / "train.parquet")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv", "saved", "saved_splits", "folder"])
def test_every_kind_of_source_gives_equal_rows(kind, tmp_path, demo, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = json.loads(TRAIN.read_text(encoding="utf-8"))
    path = write_source(kind, records, tmp_path)
    rows = load_rows(str(path), GUIDE)
    assert rows == demo
    assert data_fingerprint(rows) == data_fingerprint(demo)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_json_array_is_read_the_same_however_it_is_cut(chunk, tmp_path, monkeypatch):
    records = [
        record("1", text='He said: "no]", {twice}.'),
        record("2", text="Zoë \\ \U0001f600\n…"),
        record("3"),
    ]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(records, ensure_ascii=chunk < 5, indent=chunk % 2 or None) + "\n ")
    real_open = open

    def open_in_pieces(*arguments, **options):
        file = real_open(*arguments, **options)
        read = file.read
        file.read = lambda size: read(min(size, chunk))
        return file

    monkeypatch.setattr(readers, "open", open_in_pieces, raising=False)
    assert list(read_records(str(path))) == records


def test_numbers_and_repeated_keys_of_a_json_array_are_those_of_the_json_module(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1, "a": 2, "b": 7.0, "c": 1e2, "d": 9223372036854775807, "e": -0}]')
    (read,) = read_records(str(path))
    (expected,) = json.loads(path.read_text())
    assert read == expected and list(map(type, read.values())) == list(map(type, expected.values()))


def test_a_big_json_array_needs_the_memory_of_one_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": str(number), "text": "word " * 2000} for number in range(400)]))
    tracemalloc.start()
    assert sum(1 for _ in read_records(str(path))) == 400
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 4_000_000 and peak < 1_000_000


def test_turns_are_shared_between_rows(demo):
    by_value = defaultdict(set)
    for row in demo:
        for turn in row.turns:
            by_value[turn].add(id(turn))
    assert max(map(len, by_value.values())) == 1


def test_column_names_are_flags(tmp_path):
    names = {
        "id": "uid",
        "dialogue_id": "conversation",
        "dialogue": "turns",
        "current_text": "utterance",
        "label": "y",
    }
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{names[key]: value for key, value in record("1").items()}]))
    assert load_rows(str(path), GUIDE, columns=names) == [
        Row("1", "d1", (Turn("How was it?", "supporter"), Turn("I did it.", "seeker")), 7)
    ]
    lines = problems_of(tmp_path, [{"uid": "1", "turns": None}], columns=names)
    assert [line.split(": ")[1] for line in lines] == ["conversation", "utterance", "turns", "y"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "{path}: no such file"),
        ("absent.csv", "{path}: no such file"),
        ("no folder", "{path}: no such file or folder, nor a Hub dataset ORG/NAME[:path][@revision]"),
    ],
)
def test_a_source_that_is_not_there(name, message, tmp_path):
    path = tmp_path / name
    with pytest.raises(InputError) as caught:
        load_rows(str(path), GUIDE)
    assert caught.value.lines() == [message.format(path=path)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '[{"id": "1", "dialogue_id": "d", "dia', "not valid JSON at row 1: parse error: premature EOF"),
        ("rows.json", '[{"dialogue": "1"}', "not valid JSON at row 2: parse error: premature EOF"),
        ("rows.json", '[{"dialogue": "1"} {"id": "2"}]', "not valid JSON at row 2: parse error: after array element, I expect ',' or ']'"),
        ("rows.json", '[{"dialogue": "1"},]', "not valid JSON at row 2: parse error: unallowed token at this point in JSON text"),
        ("rows.json", "[]]", "not valid JSON at row 1: parse error: trailing garbage"),
        ("rows.json", "", "not valid JSON at row 1: parse error: premature EOF"),
        ("rows.json", '{"id": "1"}', "a JSON file must hold an array of rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.json", '[{"id": NaN}]', "not valid JSON at row 1: lexical error: invalid char in json text."),
        ("rows.json", "[" * 100_000, "not valid JSON: nested too deeply"),
        ("rows.jsonl", '{"id": "1"\n', "line 1: not valid JSON: Expecting ',' delimiter: line 2 column 1 (char 11)"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.parquet", "PAR1", "not a Parquet file: "),
        ("rows.txt", "1", "unknown kind of file; one of .json, .jsonl, .parquet, .csv, .tsv is expected"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_rows(str(path), GUIDE)
    (line,) = caught.value.lines()
    assert line == f"{path}: {message}" if message[-1] != " " else line.startswith(f"{path}: {message}")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_file_in_another_encoding(name, tmp_path):
    path = tmp_path / name
    path.write_bytes('[{"id": "Zoë"}]'.encode("latin-1"))
    with pytest.raises(InputError, match=r"UTF-8|UTF8"):
        load_rows(str(path), GUIDE)


# ----------------------------------------------------------------------------------------------------------- validation

TURN = {"text": "I did it.", "speaker": "seeker"}


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"id": None}, ["row 2: id: missing"]),
        ({"id": 5}, ["row 2: id: must be a text, not a number"]),
        ({"id": " "}, ["row 2: id: empty"]),
        ({"id": "a"}, ["a: id: duplicate id"]),
        ({"dialogue_id": None}, ["b: dialogue_id: missing"]),
        ({"dialogue_id": ""}, ["b: dialogue_id: empty"]),
        ({"dialogue_id": ["d1"]}, ["b: dialogue_id: must be a text, not a list"]),
        ({"current_text": None}, ["b: current_text: missing"]),
        ({"current_text": "\n"}, ["b: current_text: empty"]),
        ({"current_text": "Something else"}, ["b: current_text: is not the last turn's text"]),
        ({"dialogue": [TURN, {"text": "And?", "speaker": "supporter"}]}, [
            "b: dialogue: the last turn is by 'supporter', not by the label guide's target_speaker 'seeker'",
            "b: current_text: is not the last turn's text",
        ]),
        ({"dialogue": None}, ["b: dialogue: missing"]),
        ({"dialogue": []}, ["b: dialogue: empty"]),
        ({"dialogue": "seeker: I did it."}, ["b: dialogue: must be a list of turns, not a text"]),
        ({"dialogue": {"text": "x"}}, ["b: dialogue: must be a list of turns, not an object"]),
        ({"dialogue": [{"text": "x"}, TURN]}, ["b: dialogue: turn 1 must have a text and a speaker"]),
        ({"dialogue": ["I did it."]}, ["b: dialogue: turn 1 must have a text and a speaker"]),
        ({"dialogue": [{"text": 3, "speaker": "seeker"}, TURN]}, ["b: dialogue: turn 1 must have a text and a speaker"]),
        ({"dialogue": [{"text": " ", "speaker": "seeker"}, TURN]}, ["b: dialogue: turn 1 is empty"]),
        (
            {"dialogue": [{"text": "x", "speaker": "Bot"}, TURN]},
            ["b: dialogue: turn 1 has unknown speaker 'Bot' (not seeker or supporter)"],
        ),
        ({"label": None}, ["b: label: missing"]),
        ({"label": "seven"}, ["b: label: 'seven' is no name or number of the label guide"]),
        ({"label": [2, 3]}, ["b: label: [2, 3]: several labels for one row (multi-label) cannot be learnt here"]),
        ({"label": "2;3"}, ["b: label: 2;3: several labels for one row (multi-label) cannot be learnt here"]),
        ({"label": 7.0}, ["b: label: must be an integer, not a number"]),
        ({"label": True}, ["b: label: must be an integer, not true/false"]),
        ({"label": 9}, ["b: label: 9 is not in the label guide (0 to 8)"]),
        ({"label": -1}, ["b: label: -1 is not in the label guide (0 to 8)"]),
        ({"augmented_from": 4}, ["b: augmented_from: must be a text, not a number"]),
        ({"augmented_from": "zz"}, ["b: augmented_from: no original row 'zz'"]),
        ({"augmented_from": "a", "dialogue_id": "d2"}, ["b: augmented_from: 'a' is in dialogue 'd1', not 'd2'"]),
        ({"augmented_from": "a", "label": 3}, ["b: label: 3, but its source has 7"]),
        (
            {"augmented_from": "a", "dialogue": [{"text": "Other", "speaker": "supporter"}, TURN]},
            ["b: dialogue: its context is not its source's"],
        ),
        ({"dialogue_id": None, "label": 12}, ["b: dialogue_id: missing", "b: label: 12 is not in the label guide (0 to 8)"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said_in_one_line(changes, problems, tmp_path):
    assert problems_of(tmp_path, [record("a"), {**record("b"), **changes}]) == problems


def test_a_missing_field_is_as_bad_as_an_empty_one(tmp_path):
    for field in ("id", "dialogue_id", "dialogue", "current_text", "label"):
        bad = record("b")
        del bad[field]
        name = "row 2" if field == "id" else "b"
        assert problems_of(tmp_path, [record("a"), bad]) == [f"{name}: {field}: missing"]
    assert problems_of(tmp_path, [record("a"), ["b"]]) == ["row 2: not an object with fields"]


@pytest.mark.parametrize("require_labels", [True, False])
def test_a_row_is_a_turn_of_the_target_speaker_in_training_too(require_labels, tmp_path):
    dialogue = [{"text": "I did it.", "speaker": "seeker"}, {"text": "How was it?", "speaker": "supporter"}]
    bad = record("b", text="How was it?", dialogue=dialogue)
    assert problems_of(tmp_path, [record("a"), bad], require_labels=require_labels) == [
        "b: dialogue: the last turn is by 'supporter', not by the label guide's target_speaker 'seeker'"
    ]


def test_of_many_speakers_a_line_names_a_few_and_the_count(tmp_path):
    names = [f"speaker {number}" for number in range(260)]
    guide = parse_label_guide({**GUIDE.to_dict(), "speakers": names, "target_speaker": names[0]}, "guide")
    (tmp_path / "rows.json").write_text(json.dumps([record("a")]))
    with pytest.raises(InputError) as caught:
        load_rows(str(tmp_path / "rows.json"), guide)
    assert caught.value.lines()[0].endswith(
        "a: dialogue: turn 1 has unknown speaker 'supporter' "
        "(not speaker 0, speaker 1, speaker 2, speaker 3, speaker 4 or one of 255 more)"
    )


def test_half_a_character_is_refused_here_and_not_by_the_tokenizer(tmp_path):
    """A lone surrogate, as a cut emoji leaves it in JSON, is no text that can be encoded."""
    bad = record("b", text="ok \ud83d")
    assert problems_of(tmp_path, [record("a"), bad]) == [
        "b: current_text: holds half a character (a lone surrogate)",
        "b: dialogue: turn 2 holds half a character (a lone surrogate)",
    ]
    # An escape may lie across any of the pieces in which a file is read; whole characters and backslashes stay.
    for length in range(65_300, 65_600, 7):
        good = record("a", text="x" * length + '\\ud83d \\"\U0001f600' * 3)
        bad = record("b", text="x" * length + "\U0001f600\ud83d")
        assert len(problems_of(tmp_path, [good, bad])) == 2
    assert problems_of(tmp_path, [record("\ud83d")]) == [
        "row 1: id: holds half a character (a lone surrogate)"
    ]


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path):
    lines = problems_of(tmp_path, [record(str(number), label=9) for number in range(20)])
    assert len(lines) == 20 and lines[-1] == "19: label: 9 is not in the label guide (0 to 8)"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([record(str(number), label=9) for number in range(53)]))
    with pytest.raises(InputError) as caught:
        load_rows(str(path), GUIDE)
    assert len(caught.value.lines()) == 21
    assert caught.value.lines()[-1] == "... and 33 more like these"


def test_a_test_file_needs_no_labels_but_a_label_that_is_there_is_checked(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([record("a", label=None), record("b", label=3)]))
    assert [row.label for row in load_rows(str(path), GUIDE, require_labels=False)] == [-1, 3]
    lines = problems_of(tmp_path, [record("a", label=11)], require_labels=False)
    assert lines == ["a: label: 11 is not in the label guide (0 to 8)"]


def test_augmented_rows_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record("a"), record("c", dialogue_id="d2")]))
    originals = load_rows(str(path), GUIDE)
    good = record("a#aug0", text="Well, I did it.", augmented_from="a")
    (tmp_path / "rows.json").write_text(json.dumps([good]))
    variants = load_rows(str(tmp_path / "rows.json"), GUIDE, sources_of_augmented=originals)
    assert [row.augmented_from for row in variants] == ["a"]
    bad = [
        record("x"),
        record("a#aug1", augmented_from="b"),
        record("a#aug2", augmented_from="c"),
        record("a#aug3", augmented_from="a#aug1"),
    ]
    assert problems_of(tmp_path, bad, sources_of_augmented=originals) == [
        "x: augmented_from: missing in a file of augmented rows",
        "a#aug1: augmented_from: no original row 'b'",
        "a#aug2: augmented_from: 'c' is in dialogue 'd2', not 'd1'",
        "a#aug3: augmented_from: no original row 'a#aug1'",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda guide: guide.pop("task"), "task: Field required"),
        (lambda guide: guide.update(labels=guide["labels"][:1]), "labels: Tuple should have at least 2 items after validation, not 1"),
        (lambda guide: guide["labels"][2].update(number=3), "labels: entry 2 must have number 2, not 3"),
        (lambda guide: guide["labels"][2].pop("definition"), "labels.2.definition: Field required"),
        (lambda guide: guide["labels"][1].update(name=guide["labels"][0]["name"]), "labels: two labels have the same name"),
        (lambda guide: guide.update(positive=[9]), "positive: 9 is not a label"),
        (lambda guide: guide.update(positive=[1, 1]), "positive: a label is listed twice"),
        (lambda guide: guide.update(protected=True), "protected: Input should be a valid integer"),
        (lambda guide: guide.update(target_speaker="bot"), "target_speaker: 'bot' is not among the speakers (seeker or supporter)"),
        (lambda guide: guide.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda guide: guide.update(task=" "), "task: empty"),
        (lambda guide: guide.update(protected=9), "protected: 9 is not a label"),
        (lambda guide: guide.update(license=4), "license: Input should be a valid string"),
        (
            lambda guide: guide.pop("target_speaker"),
            "target_speaker: missing; write whose turns are classified (seeker or supporter), such as 'target_speaker: seeker'",
        ),
    ],
)  # fmt: skip
def test_a_label_guide_that_breaks_a_rule(change, problem):
    content = copy.deepcopy(GUIDE.to_dict())
    change(content)
    with pytest.raises(InputError) as caught:
        parse_label_guide(content, "guide.yaml")
    assert caught.value.lines() == [f"guide.yaml: {problem}"]


def test_all_problems_of_a_label_guide_are_said_at_once():
    content = {**GUIDE.to_dict(), "task": 3, "positive": [9], "colour": "red"}
    content["labels"][1]["name"] = ""
    del content["target_speaker"]
    with pytest.raises(InputError) as caught:
        parse_label_guide(content, "guide.yaml")
    places = [line.split(": ")[1] for line in caught.value.lines()]
    assert places == ["task", "target_speaker", "labels.1.name", "colour"]


def test_a_guide_of_one_speaker_needs_no_target_and_hub_keys_travel():
    content = {**GUIDE.to_dict(), "speakers": ["me"], "target_speaker": None}
    guide = parse_label_guide(content, "guide")
    assert guide.target_speaker == "me"
    assert (guide.license, guide.language, guide.dataset) == ("cc-by-nc-4.0", "en", "AIMH/PsyDefConv")
    for key in ("license", "language", "dataset"):
        assert guide.to_dict()[key] == content.pop(key)
    assert not {"license", "language", "dataset"} & set(parse_label_guide(content, "guide").to_dict())


def test_a_label_guide_survives_a_round_trip(tmp_path):
    path = tmp_path / "guide.yaml"
    path.write_text(yaml.safe_dump(GUIDE.to_dict()))
    assert load_label_guide(path) == GUIDE.model_copy(update={"distances": None})
    assert list(GUIDE.numbers) == list(range(9)) and GUIDE.positive == tuple(range(1, 9))
    path.write_text("labels: [")
    with pytest.raises(InputError, match="not a YAML file"):
        load_label_guide(path)
    with pytest.raises(InputError, match=r"absent\.yaml: cannot read the label guide"):
        load_label_guide(tmp_path / "absent.yaml")


# ------------------------------------------------------------------------------------------------------------ rendering


def test_the_prompt_reads_as_designed():
    tokenizer = make_tokenizer()
    turns = (Turn("  Hi\n there ", "supporter"), Turn("Not\tgood.", "seeker"))
    (rendered,) = Renderer(tokenizer, GUIDE, is_encoder=False).render([Row("1", "d", turns, 7)])
    instruction = render_instruction(GUIDE)
    assert tokenizer.decode(rendered.input_ids) == f"{instruction}SUPPORTER: Hi there\nSEEKER: Not good.\n"
    assert instruction.startswith(GUIDE.task)
    for label in GUIDE.labels:
        assert f"\n{label.number}: {label.name} - {label.definition}\n" in instruction


@pytest.mark.parametrize(
    ("max_turns", "max_seq_length", "window_stride"), [(30, 1024, 10), (12, 460, 4), (9, 420, 1)]
)
def test_earlier_rows_are_token_prefixes_of_later_ones(demo, max_turns, max_seq_length, window_stride):
    window = {"max_turns": max_turns, "max_seq_length": max_seq_length, "window_stride": window_stride}
    renderer = Renderer(make_tokenizer(), GUIDE, is_encoder=False, **window)
    together = defaultdict(list)
    for row, rendered in zip(demo, renderer.render(demo), strict=True):
        assert len(rendered) <= max_seq_length
        assert len(row.turns) - rendered.start <= max_turns
        assert not rendered.cut
        together[row.dialogue_id, rendered.start].append(rendered.input_ids)
    pairs = 0
    for sequences in together.values():
        for shorter, longer in itertools.pairwise(sorted(sequences, key=len)):
            np.testing.assert_array_equal(shorter, longer[: len(shorter)])
            pairs += 1
    assert pairs > 10


def test_turns_are_tokenized_apart(demo):
    """A row's tokens are its turns' tokens, whatever stands beside them; so no boundary ever merges."""
    tokenizer = make_tokenizer()
    for row, rendered in zip(demo, Renderer(tokenizer, GUIDE, is_encoder=False).render(demo), strict=True):
        pieces = [render_instruction(GUIDE)]
        pieces += [
            f"{turn.speaker.upper()}: {' '.join(turn.text.split())}\n" for turn in row.turns[rendered.start :]
        ]
        expected = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
        assert rendered.input_ids.tolist() == expected


def window_by_brute_force(lengths: list[int], room: int, max_turns: int, stride: int) -> int:
    """The first start, in the order in which a window may move, from which the row fits."""
    last = len(lengths) - 1
    starts = [start for start in range(0, last + 1, stride) if start <= last]
    starts += range(starts[-1] + 1, last + 1)
    for start in starts:
        few_enough = len(lengths) - start <= max_turns or start == last
        if few_enough and (sum(lengths[start:]) <= room or start == last):
            return start
    raise AssertionError


def test_window_against_brute_force():
    rng = random.Random(0)
    for _ in range(3000):
        max_turns = rng.randint(1, 12)
        stride = rng.randint(1, max_turns)
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 40))]
        room = rng.choice([5, 15, 40, 1000])
        start = window_start(lengths, room, max_turns, stride)
        assert start == window_by_brute_force(lengths, room, max_turns, stride), (
            lengths,
            room,
            max_turns,
            stride,
        )


@pytest.mark.parametrize("turns", range(1, 62))
def test_a_long_dialogue_keeps_its_last_21_to_30_turns(turns):
    start = window_start([1] * turns, 10_000, 30, 10)
    assert start % 10 == 0
    assert start == 0 if turns <= 30 else 21 <= turns - start <= 30
    assert window_start([1] * turns, 10_000, 30, 1) == max(0, turns - 30)


def test_an_overlong_target_loses_its_beginning_and_is_counted(caplog):
    tokenizer = make_tokenizer()
    words = " ".join(f"word{number}" for number in range(400))
    long = Row("1", "d", (Turn("Yes?", "supporter"), Turn(words, "seeker")), 7)
    short = Row("2", "d", (Turn("Yes?", "supporter"), Turn("Nothing.", "seeker")), 7)
    renderer = Renderer(tokenizer, GUIDE, is_encoder=False, max_seq_length=420)
    cut, whole = renderer.render([long, short])
    assert cut.cut and not whole.cut and cut.start == 1
    assert len(cut) == 420
    prefix = tokenizer(render_instruction(GUIDE))["input_ids"]
    assert cut.input_ids[: len(prefix)].tolist() == prefix
    assert tokenizer.decode(cut.input_ids[len(prefix) :]).endswith("word398 word399\n")
    assert caplog.messages == [
        f"1 of 2 targets are longer than {420 - len(prefix)} tokens and lost their beginning"
    ]


def test_a_window_that_holds_nothing_is_refused():
    with pytest.raises(InputError, match=r"max_seq_length 200 leaves -?[0-9]+ tokens for the dialogue"):
        Renderer(make_tokenizer(), GUIDE, is_encoder=False, max_seq_length=200)
    with pytest.raises(InputError, match=r"window_stride must be between 1 and max_turns \(5\), not 6"):
        Renderer(make_tokenizer(), GUIDE, is_encoder=False, max_turns=5, window_stride=6)


def test_rendering_is_a_function_of_the_row_alone(demo):
    renderer = Renderer(make_tokenizer(), GUIDE, is_encoder=False, max_seq_length=500)
    together = renderer.render(demo)
    again = Renderer(make_tokenizer(), GUIDE, is_encoder=False, max_seq_length=500)
    for index in (0, 40, 100, len(demo) - 1):
        np.testing.assert_array_equal(again.render([demo[index]])[0].input_ids, together[index].input_ids)


def test_an_encoder_gets_the_pair_of_target_and_context(demo, encoder_tokenizer, caplog):
    renderer = Renderer(encoder_tokenizer, GUIDE, is_encoder=True, max_seq_length=64)
    for row, rendered in zip(demo, renderer.render(demo), strict=True):
        target = encoder_tokenizer(" ".join(row.turns[-1].text.split()), add_special_tokens=False)[
            "input_ids"
        ]
        context = [
            token
            for turn in row.turns[-30:-1]
            for token in encoder_tokenizer(
                f"{turn.speaker.upper()}: {' '.join(turn.text.split())}", add_special_tokens=False
            )["input_ids"]
        ]
        target = target[-61:]
        room = 61 - len(target)
        context = context[-room:] if room else []
        cls, sep = encoder_tokenizer.cls_token_id, encoder_tokenizer.sep_token_id
        assert rendered.input_ids.tolist() == [cls, *target, sep, *context, sep]
        assert rendered.segment_ids.tolist() == [0] * (len(target) + 2) + [1] * (len(context) + 1)


def test_the_fingerprint_sees_every_field_and_not_the_order(demo):
    fingerprint = data_fingerprint(demo)
    assert data_fingerprint(demo[::-1]) == fingerprint
    first = demo[0]
    for changed in (
        Row("other", first.dialogue_id, first.turns, first.label),
        Row(first.id, "other", first.turns, first.label),
        Row(first.id, first.dialogue_id, (*first.turns[:-1], Turn("other", "seeker")), first.label),
        Row(first.id, first.dialogue_id, first.turns, (first.label + 1) % 9),
    ):
        assert data_fingerprint([changed, *demo[1:]]) != fingerprint
    assert data_fingerprint(demo[1:]) != fingerprint


# ----------------------------------------------------------------------------------------------------------------- size


def synthetic_rows(path: Path, num_rows: int, seed: int = 0) -> None:
    """Dialogues of 24 turns whose every second turn is a row, a line each, as a large corpus would have them."""
    rng = random.Random(seed)
    words = [
        f"{first}{last}"
        for first in ("mor", "tal", "ven", "sic")
        for last in ("ning", "ked", "ture", "ly", "e")
    ]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for dialogue in itertools.count():
            turns = [
                {"text": " ".join(rng.choices(words, k=12)), "speaker": ("seeker", "supporter")[number % 2]}
                for number in range(24)
            ]
            for end in range(1, 25, 2):
                row = {
                    "id": f"{dialogue}-{end}",
                    "dialogue_id": str(dialogue),
                    "dialogue": turns[:end],
                    "current_text": turns[end - 1]["text"],
                    "label": rng.randrange(9),
                }
                file.write(json.dumps(row) + "\n")
                written += 1
                if written == num_rows:
                    return


def test_memory_is_in_proportion_to_the_distinct_turns_and_not_to_the_file(tmp_path):
    """A dialogue's rows repeat each other's turns: 12 rows of 1 to 23 turns hold 144 turns, 23 of them distinct."""
    path = tmp_path / "rows.jsonl"
    synthetic_rows(path, 1_200)
    tracemalloc.start()
    rows = load_rows(str(path), GUIDE)
    rendered = Renderer(make_tokenizer(), GUIDE, is_encoder=False).render(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == len(rendered) == 1_200
    distinct = {id(turn) for row in rows for turn in row.turns}
    assert len(distinct) == 1_200 // 12 * 23
    arrays = {id(piece) for item in rendered for piece in item.pieces}
    assert len(arrays) <= len(distinct) + 1
    assert peak < 4 * path.stat().st_size


@pytest.mark.soak
def test_a_hundred_thousand_rows_validate_and_render(tmp_path):
    path = tmp_path / "rows.jsonl"
    synthetic_rows(path, 100_000)
    rows = load_rows(str(path), GUIDE)
    rendered = Renderer(make_tokenizer(), GUIDE, is_encoder=False).render(rows)
    assert len(rows) == len(rendered) == 100_000
    assert max(map(len, rendered)) <= 1024
