"""Variants keep what they must keep, and `augment.py` does what its command line says."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import augment
from rareturn import command_line
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import load_rows
from rareturn.data.variants import ATTITUDE_HEDGES, BELIEF_HEDGES, augment_text, made_by

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data" / "demo" / "train.json"
GUIDE = load_label_guide(ROOT / "label_guides" / "dmrs.yaml")
HEDGES = [hedge.rstrip(",").lower() for hedge in (*ATTITUDE_HEDGES, *BELIEF_HEDGES)]


def everything(text: str, pattern: int) -> set[str]:
    return {variant for seed in range(20) for variant in made_by(text, pattern, random.Random(seed))}


# ------------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "text", "variant"),
    [
        (0, "I do not know", "I don't know"),
        (0, "They don\u2019t call", "They do not call"),
        (0, "I cannot sleep", "I can't sleep"),
        (0, "I can't sleep", "I cannot sleep"),
        (0, "We will not go there", "We won't go there"),
        (0, "It is cold", "I think it's cold"),
        (0, "Yes, it is a mess", "Yes, I feel like it's a mess"),
        (0, "My brother moved to Oslo.", "To be honest, my brother moved to Oslo."),
        (1, "I am going to call her.", "I am gonna call her."),
        (1, "We stayed because it rained.", "You know, we stayed cuz it rained."),
        (1, "Things went wrong", "Well, things went wrong"),
        (1, "Do you smoke?", "So, do you smoke?"),
        (1, "She left in March.", "She left in March, you know."),
        (2, "Nora called.", "Um... Nora called."),
        (2, "I tried, but it broke", "I tried, um, but it broke"),
        (2, "He is just tired.", "He is, uh, just tired."),
        (2, "hi", "um, hi"),
        (2, "That hurt.", "That hurt..."),
    ],
)
def test_a_pattern_makes_this(pattern: int, text: str, variant: str) -> None:
    assert variant in everything(text, pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "never"),
    [
        (0, "That is how tired I am of this", "tired I'm"),
        (0, "She earns more than I am paid", "than I'm"),
        (0, "yes I am and you know it", "I'm and"),
        (0, "He is not only late", "isn't"),
        (0, "Why don't you call?", "do not"),
        (1, "I am going to the bank", "gonna"),
        (1, "I do not have to go", "gotta"),
        (1, "It is not very good", "really"),
        (1, "She stayed because of the rain", "cuz"),
        (2, "We talked to Dr. Brandt today", "Dr. um"),
        (2, "I want nothing but sleep", "um, but"),
    ],
)
def test_a_pattern_never_makes_this(pattern: int, text: str, never: str) -> None:
    made = everything(text, pattern)
    assert made or pattern == 0
    assert not any(never in variant for variant in made)


@pytest.mark.parametrize(
    "text",
    [
        "Do you like it there?",
        "how are you",
        "Hello!",
        "good morning",
        "Thank you so much",
        '"It is over," he wrote',
        "Can we talk? Where is everybody?",
    ],
)
def test_no_hedge_before_a_question_a_greeting_or_quoted_words(text: str) -> None:
    assert not any(hedge in variant.lower() for variant in everything(text, 0) for hedge in HEDGES)


@pytest.mark.parametrize(
    "quoted",
    [
        '"I do not know."',
        "“I am going to call”",
        "\u2018I don\u2019t know\u2019",
        "'it is cold'",
        "«we will not»",
    ],
)
def test_quoted_words_stay(quoted: str) -> None:
    variants = augment_text(f"She said {quoted} and left, because it is very late.", 0, 9, "key")
    assert len(variants) == 9 and all(quoted in variant for variant in variants)


def test_variants_take_the_patterns_in_turn() -> None:
    text = "I do not like it there because it is very loud, but my brother stays."
    patterns = [everything(text, pattern) for pattern in range(3)]
    for number in range(6):
        variants = augment_text(text, number, 7, "key")
        assert len(variants) == 7
        assert all(variant in patterns[(number + j) % 3] for j, variant in enumerate(variants))


def test_a_pattern_that_finds_nothing_hands_on_to_the_next() -> None:
    assert not everything("Hello", 0) and not everything("Hello", 1)
    variants = augment_text("Hello", 0, 3, "key")
    assert len(variants) == 3 and set(variants) <= everything("Hello", 2)
    assert augment_text("?!", 0, 3, "key") == []


def test_words_are_drawn_by_key() -> None:
    text = "I do not like it there because it is very loud, but my brother stays."
    assert augment_text(text, 0, 3, "a") == augment_text(text, 0, 3, "a")
    assert len({tuple(augment_text(text, 0, 3, key)) for key in "abcdefgh"}) > 4


# ---------------------------------------------------------------------------------------------------------- what survives


def negations(text: str) -> Counter[str]:
    plain = text.lower().replace("\u2019", "'").replace("cannot", "can not")
    found = re.findall(r"n't\b|\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|without)\b", plain)
    return Counter("not" if word == "n't" else word for word in found)


def names(text: str) -> Counter[str]:
    """Capitalised words that do not open a sentence; the speaker's own "I" aside."""
    found: Counter[str] = Counter()
    before = "."
    for word in text.split():
        core = word.strip("\"'“”\u2018\u2019.,;:!?…()")
        opens = before.rstrip("\"'”\u2019)")[-1:] in {".", "!", "?", "…"}
        if core[:1].isupper() and not opens and not re.fullmatch(r"I(['\u2019]\w+|m|ve)?", core):
            found[core] += 1
        before = word
    return found


def assert_kept(source: str, variants: list[str]) -> None:
    folded = [" ".join(text.split()).casefold() for text in (source, *variants)]
    assert len(set(folded)) == len(folded)
    for variant in variants:
        assert negations(variant) == negations(source)
        assert Counter(re.findall(r"\d", variant)) == Counter(re.findall(r"\d", source))
        assert names(variant) == names(source)
        assert variant.count("?") == source.count("?")
        for quoted in (r'"[^"]*"', "“[^”]*”"):
            assert Counter(re.findall(quoted, variant)) == Counter(re.findall(quoted, source))


def test_the_demo_corpus_survives() -> None:
    texts = [row["current_text"] for row in json.loads(DEMO.read_text())]
    made = [augment_text(text, number, 6, str(number)) for number, text in enumerate(texts)]
    for text, variants in zip(texts, made, strict=True):
        assert_kept(text, variants)
    assert sum(map(len, made)) > 5.5 * len(texts)


WORDS = """
I you she it we they that there am is are was do does did have will would can not cannot don't can't
isn't I'm it's they're he'll never nothing no nobody without yes well so and but because if how what why
Where Do very really going to want have call her home Nora Brandt Oslo covid 3 12 1.5 sad just a lot of
kind okay thank thanks sorry hello Dr. e.g. "It is over" “We do not know.” 'fine' (maybe) things Things
The My . , ! ? ?! ... … - :) @nora #tag
"""
SENTENCES = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=25).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(text=SENTENCES, number=st.integers(0, 2), key=st.text(max_size=3))
def test_generated_sentences_survive(text: str, number: int, key: str) -> None:
    assert_kept(text, augment_text(text, number, 5, key))


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="Ia'\u2019\"“”?!. \n…It iskn'tno3É", max_size=60)))
def test_any_text_gives_distinct_variants(text: str) -> None:
    variants = augment_text(text, 0, 4, "key")
    assert len({" ".join(variant.split()).casefold() for variant in (text, *variants)}) == 1 + len(variants)
    assert all(variant.count("?") == text.count("?") for variant in variants)


# ----------------------------------------------------------------------------------------------------------- command line


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["augment.py", *map(str, flags)])
    command_line.run(augment.main)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def small_corpus(path: Path, texts: list[tuple[str, int]], **names: str) -> Path:
    rows = [
        {
            "id": f"r{number}",
            "dialogue_id": f"d{number}",
            "dialogue": [{"text": "Hi.", "speaker": "supporter"}, {"text": text, "speaker": "seeker"}],
            "current_text": text,
            "label": label,
        }
        for number, (text, label) in enumerate(texts)
    ]
    rows = [{names.get(field, field): value for field, value in row.items()} for row in rows]
    path.write_text(json.dumps(rows))
    return path


TEXTS = [
    ("I do not like my job.", 2),
    ("It rained again.", 7),
    ("hm", 8),
    ("She left me because I am loud.", 2),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_output_holds_the_variants_alone(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"augmented{suffix}"
    run(monkeypatch, "--train_file", DEMO, "--labels", 5, 8, "--k", 2, "--output_file", output)
    originals = load_rows(str(DEMO), GUIDE)
    sources = {row.id: row for row in originals if row.label in (5, 8)}
    # The reader of training data checks ids, sources, labels, contexts and targets.
    variants = load_rows(str(output), GUIDE, sources_of_augmented=originals)
    assert Counter(row.augmented_from for row in variants) == dict.fromkeys(sources, 2)
    assert [row.id for row in variants[:2]] == [f"{variants[0].augmented_from}#aug{j}" for j in (0, 1)]
    for row in variants:
        assert row.turns[-1].text != sources[row.augmented_from].turns[-1].text
    printed = capsys.readouterr().out
    before = Counter(row.label for row in originals)
    for label, added in ((5, 2 * before[5]), (7, 0)):
        cells = rf"{label} {GUIDE.names[label]} +{before[label]} +{added} +{before[label] + added}"
        assert re.search(rf"^{cells}$", printed, re.MULTILINE)
    assert f"0 of {len(sources)} sources gave fewer than 2 variants" in printed


def test_same_seed_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(name: str, seed: int = 42) -> list[str]:
        data = ["--train_file", str(DEMO), "--labels", "2"]
        return [*data, "--seed", str(seed), "--output_file", str(tmp_path / name)]

    for name, seed in (("a.jsonl", 42), ("other.jsonl", 43), ("a.parquet", 42), ("b.parquet", 42)):
        run(monkeypatch, *flags(name, seed))
    # Another process has other string hashes.
    command = [sys.executable, str(ROOT / "augment.py"), *flags("b.jsonl")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "other.jsonl").read_bytes()
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_row_more_leaves_the_others_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, texts in (("a", TEXTS), ("b", [*TEXTS, ("We do not talk.", 2)])):
        corpus = small_corpus(tmp_path / f"{name}.json", texts)
        run(monkeypatch, "--train_file", corpus, "--labels", 2, "--output_file", tmp_path / f"{name}.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes().startswith((tmp_path / "a.jsonl").read_bytes())


def test_rare_labels_columns_and_a_short_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_corpus(tmp_path / "rows.json", TEXTS, id="key", current_text="utterance", label="level")
    columns = ("--id_column", "key", "--current_text_column", "utterance", "--label_column", "level")
    output = tmp_path / "out.parquet"
    run(monkeypatch, "--train_file", corpus, *columns, "--rare_below", 2, "--k", 9, "--output_file", output)
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert {row["augmented_from"] for row in rows} == {
        "r1",
        "r2",
    }  # labels 7 and 8 have one row, label 2 has two
    assert {row["level"] for row in rows} == {7, 8} and all(row["key"].startswith("r") for row in rows)
    short = Counter(row["augmented_from"] for row in rows)["r2"]
    assert 3 <= short < 9
    assert f"1 of 2 sources gave fewer than 9 variants: r2 ({short})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--labels", 9), "--labels: 9 is not in the label guide"),
        (("--labels", 3), "no row has label 3"),
        (("--labels", "rare", 2), "--labels takes label numbers, or the one word rare, not rare 2"),
        (("--labels", "rare", "--rare_below", 1), "no label has fewer than 1 rows"),
        (("--k", 0), "--k must be at least 1, not 0"),
        (("--output_file", "out.csv"), "--output_file must end with .jsonl or .parquet, not out.csv"),
        (("--push_to_hub", "--hub_name", "x"), "--push_to_hub needs --hub_namespace and --hub_name"),
        (("--train_file", "none.json"), "none.json: no such file"),
    ],
)
def test_mistakes(
    flags: tuple[object, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small_corpus(tmp_path / "rows.json", TEXTS)
    errors = refused(
        monkeypatch, capsys, "--train_file", "rows.json", "--output_file", "out.jsonl", "--labels", 2, *flags
    )
    assert errors.startswith("augment.py: error: ") and problem in errors and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_rows_that_are_variants_already_are_no_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_corpus(tmp_path / "rows.json", TEXTS)
    output = tmp_path / "out.jsonl"
    run(monkeypatch, "--train_file", corpus, "--labels", 2, "--output_file", output)
    variants = [json.loads(line) for line in output.read_text().splitlines()]
    both = tmp_path / "both.json"
    both.write_text(json.dumps(json.loads(corpus.read_text()) + variants))
    errors = refused(monkeypatch, capsys, "--train_file", both, "--labels", 2, "--output_file", output)
    assert "r0#aug0: the file has this variant already" in errors


def test_a_card_says_only_what_the_guide_says() -> None:
    """Every corpus was given English and a licence of its own making."""
    guide = GUIDE.model_copy(update={"license": None, "language": None, "dataset": None})
    card = augment.card(load_rows(str(DEMO), GUIDE)[:2], guide)
    assert "license:" not in card and "language:" not in card and "PsyDefConv" not in card


def test_a_corpus_in_another_language_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide, output = tmp_path / "guide.yaml", tmp_path / "out.jsonl"
    guide.write_text(json.dumps({**GUIDE.to_dict(), "language": "de"}))
    flags = ("--train_file", DEMO, "--labels", 2, "--output_file", output, "--label_guide", guide)
    errors = refused(monkeypatch, capsys, *flags)
    assert (
        errors
        == f"augment.py: error: {guide}: language: 'de', but the patterns of augment.py are English; --llm MODEL writes in any language\n"
    )
    assert not output.exists()


def test_push(
    tmp_path: Path, hub_here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_corpus(tmp_path / "rows.json", TEXTS)
    output, where = tmp_path / "out.jsonl", ("--hub_namespace", "org", "--hub_name", "demo")
    flags = ("--train_file", corpus, "--labels", 2, "--output_file", output)
    run(monkeypatch, *flags, "--push_to_hub", *where)
    files = hub_here.files("org/demo-augmented", "dataset")
    assert set(files) - {".gitattributes"} == {"augmented.parquet", "README.md"}
    assert hub_here.repos["dataset", "org/demo-augmented"].private
    originals = load_rows(str(corpus), GUIDE)
    local = load_rows(str(output), GUIDE, sources_of_augmented=originals)
    reference = "org/demo-augmented:augmented.parquet"
    assert load_rows(reference, GUIDE, sources_of_augmented=originals) == local
    assert "pushed 6 variants to org/demo-augmented at " in capsys.readouterr().out

    from huggingface_hub import DatasetCard

    readme = files["README.md"].decode()
    card = DatasetCard(readme).data
    assert (card.license, card.language, card.source_datasets) == ("cc-by-nc-4.0", "en", ["AIMH/PsyDefConv"])
    assert "6 lexical variants of 2 rows of AIMH/PsyDefConv" in readme

    run(monkeypatch, *flags, "--push_only", *where)  # nothing is new, so nothing is committed
    assert hub_here.files("org/demo-augmented", "dataset") == files
    output.write_bytes(corpus.read_bytes())
    output = output.rename(tmp_path / "out.json")
    corpus.rename(tmp_path / "out.jsonl")
    errors = refused(monkeypatch, capsys, *flags, "--push_only", *where)
    assert errors and hub_here.files("org/demo-augmented", "dataset") == files
