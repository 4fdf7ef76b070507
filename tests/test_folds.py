"""folds.py: every row judged once, no dialogue and no variant on both sides, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import make_tokenizer

from rareturn.data.folds import (
    FoldDataArguments,
    RunData,
    assign_folds,
    check_folds,
    limit_rows,
    parse_label_scope,
    read_folds,
    read_run_data,
    write_folds,
)
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import Row, Turn, load_rows
from rareturn.errors import InputError

TRAIN = Path(__file__).parent.parent / "data/demo/train.json"
EXAMPLES = Path(__file__).parent.parent / "label_guides/dmrs_examples.csv"
GUIDE = load_label_guide("label_guides/dmrs.yaml")


@pytest.fixture(scope="module")
def demo() -> list[Row]:
    return load_rows(str(TRAIN), GUIDE)


def with_variants(rows: list[Row]) -> list[Row]:
    return [
        Row(f"{row.id}#aug{number}", row.dialogue_id, row.turns, row.label, row.id)
        for row in rows
        if row.label in (2, 5, 8)
        for number in range(2)
    ]


@pytest.mark.parametrize("fold_seed", [0, 42])
@pytest.mark.parametrize("fold_groups", ["dialogue", "none"])
def test_folds_cover_every_row_once_and_no_variant_crosses_one(demo, fold_groups, fold_seed):
    folds = assign_folds(demo, 5, fold_seed, fold_groups)
    assert folds == assign_folds(demo, 5, fold_seed, fold_groups)
    variants = with_variants(demo)
    extra = [Row(f"extra{label}", f"extra{label}", (Turn("x", "seeker"),), label) for label in range(9)]
    data = RunData(GUIDE, demo, variants, [], folds, list(range(9)), extra=extra)
    check_folds(demo, folds, 5, fold_groups)
    held_out = [row.id for fold in range(5) for row in data.held_out_part(fold)]
    assert Counter(held_out) == Counter(row.id for row in demo)
    trained_on = Counter()
    for fold in range(5):
        train, judged = data.training_part(fold), data.held_out_part(fold)
        judged_ids = {row.id for row in judged}
        assert not judged_ids & {row.augmented_from or row.id for row in train}
        assert train[-9:] == extra
        train = train[:-9]
        assert {row.label for row in train} == set(range(9))
        assert all(row.augmented_from is None for row in judged)
        if fold_groups == "dialogue":
            assert not {row.dialogue_id for row in train} & {row.dialogue_id for row in judged}
        trained_on.update(row.id for row in train)
        shares = sum(row.label == 7 for row in judged) / len(judged)
        assert abs(shares - 109 / 230) < 0.12  # stratified as far as whole dialogues allow
    assert set(trained_on.values()) == {4} and len(trained_on) == len(demo + variants)


def test_the_written_examples_cover_every_label():
    rows = load_rows(str(EXAMPLES), GUIDE)
    assert min(Counter(row.label for row in rows).values()) > 70 and {row.label for row in rows} == set(
        range(9)
    )
    assert len({row.turns for row in rows}) == len(rows) == len({row.dialogue_id for row in rows})
    assert all([turn.speaker for turn in row.turns] == ["supporter", "seeker"] for row in rows)


def test_another_fold_seed_gives_other_folds(demo):
    assert assign_folds(demo, 5, 42, "dialogue") != assign_folds(demo, 5, 43, "dialogue")


def test_few_dialogues_of_a_class_are_a_warning_with_the_count(caplog):
    rows = [
        Row(f"{number}", f"d{number}", (Turn("x", "seeker"),), 3 if number < 3 else 7) for number in range(20)
    ]
    folds = assign_folds(rows, 5, 42, "dialogue")
    assert caplog.messages == ["label 3 is in 3 dialogues only, fewer than 5 folds: some folds lack it"]
    check_folds(rows, folds, 5, "dialogue")


def test_folds_that_cannot_be_made():
    rows = [Row(f"{number}", "d1", (Turn("x", "seeker"),), number % 2) for number in range(8)]
    with pytest.raises(InputError, match=r"^5 folds cannot be made of 1 dialogues$"):
        assign_folds(rows, 5, 42, "dialogue")
    with pytest.raises(InputError, match=r"^--num_folds 1: 2 or more; for one model, .* --validation_file$"):
        assign_folds(rows, 1, 42, "none")
    assert set(assign_folds(rows, 4, 42, "none").values()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda folds: folds.pop("a"),
            "folds: row 'a' of the training file is in no fold; use another output_dir",
        ),
        (
            lambda folds: folds.update(zz=0),
            "folds: row 'zz' is not in the training file; use another output_dir",
        ),
        (
            lambda folds: folds.update({"a#aug0": 0}),
            "folds: row 'a#aug0' is not in the training file; use another output_dir",
        ),
        (lambda folds: folds.update(b=1), "folds: dialogue 'd1' is in two folds"),
        (lambda folds: folds.update(dict.fromkeys("cd", 0)), "folds: fold 1 is empty"),
    ],
)
def test_folds_of_a_file_are_checked(change, problem):
    turns = (Turn("x", "seeker"),)
    rows = [
        Row("a", "d1", turns, 0),
        Row("b", "d1", turns, 1),
        Row("c", "d2", turns, 0),
        Row("d", "d2", turns, 1),
    ]
    rows += [Row("e", "d3", turns, 0), Row("f", "d3", turns, 1)]
    folds = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "f": 2}
    check_folds(rows, folds, 3, "dialogue")
    change(folds)
    with pytest.raises(InputError) as caught:
        check_folds(rows, folds, 3, "dialogue")
    assert caught.value.lines()[0] == problem


def test_a_class_that_no_training_part_has():
    turns = (Turn("x", "seeker"),)
    rows = [Row("a", "d1", turns, 8), Row("b", "d2", turns, 1), Row("c", "d3", turns, 1)]
    with pytest.raises(InputError) as caught:
        check_folds(rows, {"a": 0, "b": 1, "c": 1}, 2, "dialogue")
    assert caught.value.lines() == [
        "folds: all rows of label 8 are in fold 0: nothing to train on",
        "folds: all rows of label 1 are in fold 1: nothing to train on",
    ]
    extra = [Row("x", "d9", turns, 8), Row("y", "d9", turns, 1)]
    check_folds(rows, {"a": 0, "b": 1, "c": 1}, 2, "dialogue", extra=extra)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"folds": {"a": 0, "b": 5, "c": -1}}, ["folds: row 'b': fold 5 is not one of 0..1", "folds: row 'c': fold -1 is not one of 0..1"]),
        ({"folds": {}}, ["folds: Dictionary should have at least 1 item after validation, not 0"]),
        ({"folds": {"a": True}}, ["folds.a: Input should be a valid integer"]),
        (
            {"num_folds": True, "fold_seed": "1", "fold_groups": "dialogues"},
            [
                "num_folds: Input should be a valid integer",
                "fold_seed: Input should be a valid integer",
                "fold_groups: Input should be 'dialogue' or 'none'",
            ],
        ),
    ],
)  # fmt: skip
def test_all_problems_of_a_folds_file_are_said_at_once(changes, problems, tmp_path):
    path = tmp_path / "folds.json"
    content = {"num_folds": 2, "fold_seed": 1, "fold_groups": "dialogue", "folds": {"a": 0, "b": 1}}
    path.write_text(json.dumps(content))
    assert read_folds(path) == content
    path.write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError) as caught:
        read_folds(path)
    assert caught.value.lines() == [f"{path}: {problem}" for problem in problems]


def test_few_turns_need_no_word_about_the_stride():
    """`--max_turns 5` alone was refused, because `window_stride` is 10."""
    window = FoldDataArguments(max_turns=5).window
    assert window["window_stride"] == 5
    Renderer(make_tokenizer(), GUIDE, is_encoder=False, **window)
    assert FoldDataArguments().window == {"max_turns": 30, "max_seq_length": 1024, "window_stride": 10}


def test_a_run_without_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^--train_file is missing"):
        read_run_data(FoldDataArguments(), tmp_path)


def test_a_folds_file_of_another_split_or_of_other_rows_is_refused_by_name(tmp_path):
    arguments = FoldDataArguments(train_file=str(TRAIN))
    data = read_run_data(arguments, tmp_path)
    write_folds(tmp_path, data.folds, **arguments.split)
    assert read_run_data(arguments, tmp_path).folds == data.folds
    path = tmp_path / "folds.json"
    with pytest.raises(InputError) as caught:
        read_run_data(FoldDataArguments(train_file=str(TRAIN), fold_seed=1, num_folds=4), tmp_path)
    assert caught.value.lines() == [
        f"{path}: num_folds: 5 there, 4 asked for",
        f"{path}: fold_seed: 42 there, 1 asked for",
    ]
    row_id = data.originals[0].id
    path.unlink()
    write_folds(
        tmp_path,
        {("zz" if key == row_id else key): fold for key, fold in data.folds.items()},
        **arguments.split,
    )
    with pytest.raises(InputError) as caught:
        read_run_data(arguments, tmp_path)
    assert caught.value.lines() == [
        f"{path}: row {row_id!r} of the training file is in no fold; use another output_dir",
        f"{path}: row 'zz' is not in the training file; use another output_dir",
    ]


def test_a_smoke_run_keeps_rare_labels_and_the_order(demo):
    few = limit_rows(demo, 27)
    assert Counter(row.label for row in few) == dict.fromkeys(range(9), 3)
    assert few == [row for row in demo if row in few]
    assert limit_rows(demo, None) == demo and limit_rows(demo, 10_000) == demo


def test_label_scope():
    assert parse_label_scope(None, GUIDE) == set(range(9))
    assert parse_label_scope(["1-3", "7"], GUIDE) == {1, 2, 3, 7}
    for words, problem in (
        (["1-9"], "9 is not in the label guide"),
        (["x"], "'x' is neither a label nor a range such as 1-8"),
        (["7"], "a classifier needs two labels at least"),
    ):
        with pytest.raises(InputError) as caught:
            parse_label_scope(words, GUIDE)
        assert caught.value.lines() == [f"--label_scope: {problem}"]
