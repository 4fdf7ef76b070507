"""`augment.py --llm`, through its command line and the real client, against a scripted server on loopback."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from llm_server import LlmServer, Reply
from pyarrow.parquet import read_table
from running import run_script, words_of
from tiny_models import make_tiny_encoder

import augment
import linear_probe
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rows import load_rows

ROOT = Path(__file__).parent.parent
GERMAN = ROOT / "data/german"
GUIDE = load_label_guide(GERMAN / "label_guide.yaml")
SOURCES = [row for row in load_rows(str(GERMAN / "train.csv"), GUIDE) if row.label == 2]
ALL = len(SOURCES) * 3  # a request to write and two to judge
KEY = "sk-geheim-0123456789"


def between(prompt: str, tag: str) -> str:
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)[1]


def good(prompt: str) -> str:
    """Two variants, or a yes."""
    text = between(prompt, "turn")
    return (
        "yes" if "<variant>" in prompt else json.dumps([f"Also, {text}", f"{text} Ja."], ensure_ascii=False)
    )


@pytest.fixture(autouse=True)
def of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no key, and the client's waits cut short; those that a server asks for stay as they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def flags(server: LlmServer | str, output: Path, **more: object) -> dict[str, object]:
    url = server if isinstance(server, str) else server.url
    data = {"train_file": GERMAN / "train.csv", "label_guide": GERMAN / "label_guide.yaml", "labels": 2}
    return {**data, "llm": "gross-1", "base_url": url, "k": 2, "output_file": output, **more}


def written(path: Path) -> dict[str, list[str]]:
    """The variants' texts by source; the reader of training data checks ids, sources, labels and contexts."""
    originals = load_rows(str(GERMAN / "train.csv"), GUIDE)
    found: dict[str, list[str]] = {}
    for row in load_rows(str(path), GUIDE, sources_of_augmented=originals):
        assert row.id == f"{row.augmented_from}#aug{len(found.get(row.augmented_from, []))}"
        found.setdefault(row.augmented_from, []).append(row.turns[-1].text)
    return found


def answers_kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.json"))


def test_variants_in_german(tmp_path: Path, capsys):
    output = tmp_path / "out.jsonl"
    with LlmServer(good) as server:
        assert run_script(augment.main, **flags(server, output)) == 0
    said = {row.id: row.turns[-1].text for row in SOURCES}
    assert written(output) == {name: [f"Also, {text}", f"{text} Ja."] for name, text in said.items()}
    printed = capsys.readouterr().out
    assert f"at most {ALL} requests (0 answers are in the cache), about " in printed
    assert "\ndropped: nothing\n" in printed and f"0 of {len(SOURCES)} sources gave fewer than 2" in printed
    assert len(server.requests) == ALL
    assert {(one["model"], one["seed"], one["key"]) for one in server.requests} == {("gross-1", 42, "no-key")}

    source = next(row for row in SOURCES if len(row.turns) > 2)
    writing, judging = (
        [one for one in server.prompts() if ("<variant>" in one) == judge] for judge in (0, 1)
    )
    for prompts, count in ((writing, 1), (judging, 2)):
        about = [prompt for prompt in prompts if between(prompt, "turn") == source.turns[-1].text]
        assert len(about) == count
        for prompt in about:
            assert GUIDE.task in prompt and "Sie sagt, was sie selbst tun wird." in prompt
            assert f"{source.turns[-2].speaker.upper()}: {source.turns[-2].text}\n" in prompt
    assert all("the language de," in prompt for prompt in writing)
    assert all("beschwerde" in prompt for prompt in judging)


def test_the_same_again_costs_nothing(tmp_path: Path, capsys):
    with LlmServer(good) as server:
        for name, more in (("a.jsonl", {}), ("b.jsonl", {"max_requests": 0, "concurrency": 1})):
            assert run_script(augment.main, **flags(server, tmp_path / name, **more)) == 0
        assert len(server.requests) == ALL
        assert f"at most 0 requests ({ALL} answers are in the cache), about 0 tokens there and 0 back" in (
            capsys.readouterr().out
        )
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        # What decides an answer is asked anew: the model, the seed.
        for more in ({"llm": "gross-2"}, {"seed": 1}):
            before = len(server.requests)
            assert run_script(augment.main, **flags(server, tmp_path / "c.parquet", **more)) == 0
            assert len(server.requests) == before + ALL
    assert written(tmp_path / "c.parquet") == written(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("around", "kept"),
    [
        ("Gern:\n```json\n{}\n```\nReicht das?", 2),
        ('<think>Vielleicht ["so"]?</think>{}', 2),
        ('{{"texts": {}}}', 2),
        ("[[{}", 2),
        ("Gern \ud800 {}", 2),  # half a character
        ("1. Also gut. 2. Ja.", 0),
        ('["Also gut", "Ja', 0),
        ("[1, 2]", 0),
        ('["Also gut", ' + "[" * 9000, 0),
        ('["Also gut", 2]', 0),
        ("", 0),
        (None, 0),  # a refusal
        (Reply(status=400, body={"error": {"message": "filtered", "code": "content_filter"}}), 0),
    ],
)
def test_text_around_the_list_and_answers_without_one(around, kept: int, tmp_path: Path, capsys):
    first = SOURCES[0].turns[-1].text

    def answer(prompt: str) -> str | Reply | None:
        if "<variant>" in prompt or between(prompt, "turn") != first:
            return good(prompt)
        return around.format(good(prompt)) if isinstance(around, str) else around

    output = tmp_path / "out.jsonl"
    for _ in range(2):  # from the cache, too
        with LlmServer(answer) as server:
            assert run_script(augment.main, **flags(server, output)) == 0
        found = written(output)
        assert len(found.get(SOURCES[0].id, [])) == kept
        assert all(len(found[row.id]) == 2 for row in SOURCES[1:])
        without = "nothing" if kept else "1 answers without a list of texts"
        assert f"\ndropped: {without}\n" in capsys.readouterr().out


def test_what_is_dropped_is_counted(tmp_path: Path, capsys):
    def answer(prompt: str) -> str:
        text = between(prompt, "turn")
        if "<variant>" not in prompt:
            bad = [text.upper(), " ", "\ud800", "Ja, gern.", "ja,  GERN.", "Ja " * len(text), "Nein."]
            return json.dumps([*bad, "Doch.", "Zu viel."])
        verdicts = {
            "Nein.": "No: yes would be wrong.",
            "Doch.": "<think>yes?</think>\nNein",
            "Ja, gern.": "**Yes**.",
        }
        return verdicts[between(prompt, "variant")]

    with LlmServer(answer) as server:
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl", k=8)) == 0
    assert written(tmp_path / "out.jsonl") == {row.id: ["Ja, gern."] for row in SOURCES}
    n = len(SOURCES)
    reasons = (
        f"{2 * n} repeated, {2 * n} empty, {n} far longer than their source, {2 * n} refused by the judge"
    )
    printed = capsys.readouterr().out
    assert (
        f"\ndropped: {reasons}\n" in printed and f"{n} of {n} sources gave fewer than 8 variants" in printed
    )


def test_nothing_is_written_where_the_judge_refuses_all(tmp_path: Path, capsys):
    with LlmServer(lambda prompt: "no" if "<variant>" in prompt else good(prompt)) as server:
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"train.csv: no variant of {len(SOURCES)} rows could be made")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_busy_server_is_waited_for(tmp_path: Path):
    busy = Reply(status=429, body={"error": {"message": "slow down"}}, headers={"Retry-After": "1"})
    faults = [busy, Reply(status=500, body={"error": {"message": "oh"}})]
    with LlmServer(good, faults) as server:
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl", concurrency=1)) == 0
    assert len(server.requests) == ALL + 2 and len(server.answered) == ALL
    first, second = (request["time"] for request in server.requests[:2])
    assert second - first >= 1  # at least what Retry-After said
    assert len(set(server.prompts()[:3])) == 1


def error_of(server: LlmServer | str, tmp_path: Path, capsys, **more: object) -> str:
    """The one line of a launch that must fail, and write nothing."""
    assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl", **more)) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "error:" in line]
    assert "Traceback" not in shown.err and not (tmp_path / "out.jsonl").exists()
    assert KEY not in shown.err + shown.out
    return line.removeprefix("augment.py: error: ")


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    with LlmServer(good, key=KEY) as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        assert (
            error_of(server, tmp_path, capsys)
            == f"{host}: the key in OPENAI_API_KEY is missing or refused (401)"
        )
        monkeypatch.setenv("OPENAI_API_KEY", KEY[:-1])
        assert (
            error_of(server, tmp_path, capsys)
            == f"{host}: the key in OPENAI_API_KEY is missing or refused (401)"
        )
        assert not answers_kept(tmp_path)
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        said = {"error": {"message": f"{KEY} has no money left"}}
        server.faults = [Reply(status=403, body=said)] * 99
        assert "*** has no money left" in error_of(server, tmp_path, capsys)
        server.faults = []
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl")) == 0
    shown = capsys.readouterr()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == ALL + 1 and not any(KEY.encode() in data for data in files)
    assert KEY not in shown.out + shown.err


def test_endpoints_that_do_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    line = error_of("http://127.0.0.1:9/v1", tmp_path, capsys)
    assert line.startswith("127.0.0.1:9: no answer: ") and "refused" in line
    line = error_of("localhost:8000/v1", tmp_path, capsys)
    assert line == "--base_url must be like http://localhost:8000/v1"
    line = error_of("http://localhost/v1", tmp_path, capsys, concurrency=0)
    assert line == "--concurrency must be at least 1, not 0"
    with LlmServer(good) as server:
        line = error_of(server.url.replace("/v1", "/v2"), tmp_path, capsys)
        assert line.endswith(": no model 'gross-1' there, or --base_url is wrong (404)")
        for reply in (
            Reply(body=b"<html>hello", headers={"Content-Type": "text/html"}),
            Reply(body={"error": "no"}),
        ):
            server.faults = [reply] * 99
            line = error_of(server, tmp_path, capsys)
            assert line.endswith("the answer is no chat completion; most servers' --base_url ends with /v1")
        server.faults = [Reply(body=b'{"choices": [')] * 99
        assert "no answer: " in error_of(server, tmp_path, capsys)
        server.faults = [Reply(status=400, body={"error": {"message": "context too long"}})] * 99
        assert "context too long" in error_of(server, tmp_path, capsys)
        assert not answers_kept(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert error_of(server, tmp_path, capsys) == "the package openai is missing: pip install 'rareturn[llm]'"


def test_a_budget_that_is_too_small_sends_nothing(tmp_path: Path, capsys):
    with LlmServer(good) as server:
        line = error_of(server, tmp_path, capsys, max_requests=ALL - 1)
        assert line == f"--max_requests: {ALL - 1}, but up to {ALL} are needed"
        assert not server.requests
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl", max_requests=ALL)) == 0
        assert len(server.requests) == ALL


def test_what_a_failed_run_was_told_is_not_asked_again(tmp_path: Path, capsys):
    """The server breaks after four answers, among the judgements of the second time."""
    output = tmp_path / "out.jsonl"
    with LlmServer(good) as server:

        def until(count: int):
            broken = Reply(status=400, body={"error": {"message": "out of order"}})
            return lambda prompt: good(prompt) if len(server.answered) < count else broken

        for count in (4, len(SOURCES) + 3):
            server.answer = until(count)
            assert "out of order" in error_of(server, tmp_path, capsys, concurrency=1)
            assert len(answers_kept(tmp_path)) == len(server.answered) == count
        server.answer, answered = good, len(server.answered)
        assert run_script(augment.main, **flags(server, output)) == 0
        assert (
            f"at most {ALL - answered} requests ({answered} answers are in the cache)"
            in capsys.readouterr().out
        )
    assert len(server.answered) == len(set(server.answered)) == ALL


def test_a_killed_run_goes_on_from_its_cache(tmp_path: Path):
    held, go_on = threading.Event(), threading.Event()

    def answer(prompt: str) -> str:
        if len(server.answered) >= 5 and not go_on.is_set():
            held.set()
            go_on.wait(60)
            return Reply(status=500, body={"error": {"message": "too late"}})
        return good(prompt)

    with LlmServer(answer) as server:
        words = words_of(**flags(server, tmp_path / "out.jsonl", concurrency=1))
        started = subprocess.Popen([sys.executable, str(ROOT / "augment.py"), *words], env=os.environ)
        assert held.wait(120)
        started.kill()
        started.wait()
        go_on.set()
        assert len(answers_kept(tmp_path)) == 5 and not (tmp_path / "out.jsonl").exists()
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl")) == 0
    assert Counter(server.answered).most_common(1)[0][1] == 1 and len(server.answered) == ALL


def test_rows_that_say_the_same_share_an_answer(tmp_path: Path):
    lines = [(name, 1, "Mieterin", "Ich rufe morgen an.", "zusage") for name in "ab"]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("gespraech", "nr", "sprecher", "aeusserung", "art"), *lines])
    with LlmServer(good) as server:
        given = flags(server, tmp_path / "out.jsonl", train_file=tmp_path / "rows.csv")
        assert run_script(augment.main, **given) == 0
    assert len(server.requests) == 3
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


def test_a_run_trains_on_them_and_scores_the_table_alone(tmp_path: Path):
    with LlmServer(good) as server:
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl")) == 0
    data = {"label_guide": GERMAN / "label_guide.yaml", "train_file": GERMAN / "train.csv"}
    model = {"model_name_or_path": make_tiny_encoder(tmp_path / "encoder"), "num_folds": 3, "C": 1}
    more = {"augmented_file": tmp_path / "out.jsonl", "output_dir": tmp_path / "probe"}
    assert run_script(linear_probe.main, **data, **model, **more) == 0
    scored = [
        name for fold in range(3) for name in read_table(tmp_path / f"probe/oof/fold-{fold}.parquet")["id"]
    ]
    assert sorted(map(str, scored)) == sorted(row.id for row in load_rows(str(data["train_file"]), GUIDE))


def test_the_card_names_the_model(tmp_path: Path, hub_here, capsys):
    where = {"push_to_hub": True, "hub_namespace": "org", "hub_name": "haus"}
    with LlmServer(good) as server:
        assert run_script(augment.main, **flags(server, tmp_path / "out.jsonl", **where)) == 0
    readme = hub_here.files("org/haus-augmented", "dataset")["README.md"].decode()
    n = len(SOURCES)
    assert f"{2 * n} variants of {n} rows, written and judged by gross-1, by rareturn" in readme
