"""zero_shot.py as a user runs it: tiny local models against brute force, and scripted servers behind the real client."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import HubServer
from llm_server import LlmServer, Reply
from running import run_script
from tiny_models import make_tiny_decoder, make_tiny_encoder, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import ensemble
import predict
import zero_shot
from rareturn.data.folds import read_run_data
from rareturn.data.label_guide import Label
from rareturn.decisions.probabilities import log_softmax, softmax
from rareturn.files import read_json
from rareturn.models.loading import find_base_model
from rareturn.models.prompted import PromptedModel
from rareturn.runs.reading import read_run

KEY = "sk-secret-0123456789"
TOPICS = ["harbour", "garden", "violin", "engine", "bakery", "winter", "museum", "stable"]
CHAT = (
    "{% for message in messages %}<eos>{{ message.role }}\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)


def make_corpus(folder: Path, labels: int) -> dict[str, object]:
    """Flags of a table of eight dialogues, each of its own topic, in which anyone may speak; a guide of so many labels."""
    columns = ("dialogue_id", "speaker", "text", "label")
    guide = {
        "task": "Label the last turn.",
        "speakers": "any",
        "target_speaker": "any",
        "labels": [
            {"number": n, "name": f"Kind {n}", "definition": f"It is of kind {n}."} for n in range(labels)
        ],
    }
    (folder / "guide.yaml").write_text(yaml.safe_dump(guide))
    for name, topics in (("train", TOPICS), ("test", ["harbour", "castle"])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            lines = [
                (
                    f"{name}-{topic}",
                    "Ann" if turn % 2 else "Bo",
                    f"The {topic} {name} says {turn}.",
                    turn % labels,
                )
                for topic in topics
                for turn in range(max(labels, 4) if name == "train" else 3)
            ]
            csv.writer(file).writerows([columns, *lines])
    given = {f"{name}_file": folder / f"{name}.csv" for name in ("train", "test")}
    return {**given, "label_guide": folder / "guide.yaml", "num_folds": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return make_corpus(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = make_tiny_decoder(tmp_path_factory.mktemp("chat"), "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no key, and the client's waits cut short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def arguments_of(flags: dict[str, object], **more: object) -> zero_shot.ZeroShotArguments:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in (flags | more).items()}
    return zero_shot.ZeroShotArguments(**{"output_dir": "unused", "model": "m"} | given)


def error_of(capsys, output: Path, **flags: object) -> str:
    """The one line of a launch that must fail, and write nothing."""
    assert run_script(zero_shot.main, output_dir=output, **flags) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and not output.exists()
    assert KEY not in shown.err + shown.out
    (line,) = [line for line in shown.err.splitlines() if "error:" in line]
    return line.removeprefix("zero_shot.py: error: ")


# ---------------------------------------------------------------------------------------------------------- local models


def brute_force(model: str, text: str, labels: int, end: str) -> np.ndarray:
    """Log-probabilities, normalised over the labels, by a forward pass of each label's whole text on its own."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for label in range(labels):
        ids = tokenizer(f"{text}{label}{end}", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            log_p = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
    return log_softmax(np.array([found]))[0]


def test_log_probabilities_are_those_of_each_label_on_its_own(chat_model: str, tmp_path: Path):
    flags = make_corpus(tmp_path, 12)  # 10 and 11 begin with 1, and are two tokens
    settings = {"shots": 3, "max_turns": 5, "window_stride": 2}
    model = {"model_name_or_path": chat_model, "output_dir": tmp_path / "run"}
    assert run_script(zero_shot.main, **flags, **settings, **model) == 0
    run = read_run(tmp_path / "run", require_test=True)
    arguments = arguments_of(flags, **settings)
    data = read_run_data(arguments, tmp_path / "run")
    tables = [
        (fold, data.held_out_part(fold), run.oof.take(np.flatnonzero(run.oof.fold == fold)))
        for fold in (0, 1)
    ]
    tables += [(fold, data.test, run.test[fold]) for fold in (0, 1)]
    for fold, rows, table in tables:
        prompts = dict(
            zip((row.id for row in rows), zero_shot.make_prompts(arguments, data, fold, rows), strict=True)
        )
        for place in range(0, len(table), 11):
            prompt = prompts[table.id[place]]
            text = f"<eos>user\n{prompt}<eos>\n<eos>assistant\n"
            expected = brute_force(chat_model, text, 12, "<eos>")
            np.testing.assert_allclose(table.logits[place], expected, atol=1e-4)
    assert np.ptp(run.oof.logits, axis=0).min() > 1e-3 and run.info["loader"]["tuning"] == "prompted"
    # The folds' shots differ, and with them what the folds say of the test rows.
    assert abs(run.test[0].logits - run.test[1].logits).max() > 1e-3


def test_a_model_without_a_chat_template_and_a_scope(corpus, tmp_path: Path):
    base = make_tiny_decoder(tmp_path / "base", "qwen3")
    flags = corpus | {"test_file": None, "label_scope": "1-3"}
    assert run_script(zero_shot.main, **flags, model_name_or_path=base, output_dir=tmp_path / "run") == 0
    table = read_run(tmp_path / "run").oof
    data = read_run_data(arguments_of(corpus, label_scope=["1-3"], test_file=None), tmp_path / "run")
    (row,) = [row for row in data.originals if row.id == table.id[7]]
    (prompt,) = zero_shot.make_prompts(arguments_of(corpus), data, 0, [row])
    assert "0: Kind 0" not in prompt and "3: Kind 3 - It is of kind 3.\n" in prompt
    expected = brute_force(base, f"{prompt}\nLabel:\n", 4, "")[1:]
    np.testing.assert_allclose(
        log_softmax(table.logits[7:8, 1:])[0], log_softmax(expected[None])[0], atol=1e-4
    )
    assert (table.logits[:, 0] == -1e4).all()


def test_a_rationale_is_written_first_and_never_pushed(
    chat_model, corpus, tmp_path: Path, hub_here: HubServer, capsys
):
    run = tmp_path / "run"
    where = {"push_to_hub": True, "hub_namespace": "org", "hub_name": "sys"}
    flags = {**corpus, "model_name_or_path": chat_model, "max_new_tokens": 5, "temperature": 1.0, "cot": True}
    assert run_script(zero_shot.main, **flags, **where, output_dir=run) == 0
    assert run_script(zero_shot.main, **flags, output_dir=tmp_path / "again") == 0
    files = ["oof/fold-0", "oof/fold-1", "test/fold-0", "test/fold-1"]
    for name in files:
        for suffix in (".parquet", ".rationales.jsonl"):
            assert (run / f"{name}{suffix}").read_bytes() == (
                tmp_path / "again" / f"{name}{suffix}"
            ).read_bytes()
    said = [json.loads(line) for line in (run / "oof/fold-0.rationales.jsonl").read_text().splitlines()]
    assert len({line["text"] for line in said}) > 5

    data = read_run_data(arguments_of(corpus), run)
    rows = {row.id: row for row in data.originals}
    asked = PromptedModel(find_base_model(chat_model), range(4), False)
    table = read_run(run).oof
    for line in said[:3]:
        (prompt,) = zero_shot.make_prompts(arguments_of(corpus, cot=True), data, 0, [rows[line["id"]]])
        expected = brute_force(chat_model, asked.text(prompt, line["text"]), 4, "")
        np.testing.assert_allclose(table.logits[table.id.index(line["id"])], expected, atol=1e-4)

    pushed = {repo: hub_here.files(*repo) for repo in (("org/sys-run", "model"), ("org/sys-oof", "dataset"))}
    names = [name for files in pushed.values() for name in files]
    assert "data/run/oof-fold-0.parquet" in names and "fold-0/metrics.json" in names
    assert not [name for name in names if "rationale" in name]
    card = pushed["org/sys-run", "model"]["README.md"].decode()
    assert "nothing was trained" in card and "LinearHead" not in card

    # An ensemble takes the tables; there is no model to predict with.
    assert run_script(ensemble.main, runs=run, method="argmax", output_dir=tmp_path / "ens") == 0
    capsys.readouterr()
    flags = {"ensemble": tmp_path / "ens", "input": corpus["test_file"], "output": tmp_path / "out.jsonl"}
    assert run_script(predict.main, **flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "run came without its models: only its tables were shared" in line


def test_local_models_that_cannot_be_asked(chat_model, corpus, tmp_path: Path, capsys):
    base, encoder = make_tiny_decoder(tmp_path / "base"), make_tiny_encoder(tmp_path / "encoder")
    refused = [
        ({"model_name_or_path": base, "cot": True}, "has no chat template"),
        ({"model_name_or_path": encoder}, "an encoder writes nothing"),
        (
            {"model_name_or_path": base, "model": "m"},
            "give --model_name_or_path for a local model, or --model",
        ),
        ({"model_name_or_path": base, "samples": 2}, "--samples: a local model gives log-probabilities"),
        ({"model_name_or_path": base, "shots": -1}, "--shots must be 0 or more, not -1"),
        ({"model_name_or_path": base, "augmented_file": "a.jsonl"}, "nothing is trained"),
        ({"model_name_or_path": base, "extra_train_file": "a.csv"}, "--extra_train_file: nothing is trained"),
        (
            {"model_name_or_path": base, "prompt": tmp_path / "no.jinja"},
            "no.jinja: cannot be read as a prompt",
        ),
        (
            {"model_name_or_path": chat_model, "cot": True, "max_new_tokens": 4096},
            "reads 4096 tokens, but a prompt",
        ),
    ]
    (tmp_path / "bad.jinja").write_text("{{ nobody }}")
    refused.append(({"model_name_or_path": base, "prompt": tmp_path / "bad.jinja"}, "'nobody' is undefined"))
    # A tokenizer that knows no digits sees the same in all numbers.
    text = (Path(base) / "tokenizer.json").read_text()
    blind = json.loads(text)
    replace = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "#"}
    blind["normalizer"] = {"type": "Sequence", "normalizers": [blind["normalizer"], replace]}
    (Path(base) / "tokenizer.json").write_text(json.dumps(blind))
    refused.append(({"model_name_or_path": base}, "the tokens of 0 begin those of 1"))
    for flags, said in refused:
        assert said in error_of(capsys, tmp_path / "run", **corpus, **flags)


# ------------------------------------------------------------------------------------------------------------- the shots


@pytest.mark.parametrize("groups", ["dialogue", "none"])
@pytest.mark.parametrize("selection", ["balanced", "similar"])
def test_shots_are_of_other_folds_and_other_dialogues(selection: str, groups: str, corpus, tmp_path: Path):
    arguments = arguments_of(corpus, shots=4, shot_selection=selection, fold_groups=groups)
    data = read_run_data(arguments, tmp_path)
    by_text = {row.turns[-1].text: row for row in data.originals}
    for fold in (0, 1):
        rows = data.held_out_part(fold) + data.test
        prompts, chosen = zero_shot.make_prompts(arguments, data, fold, rows), []
        for row, prompt in zip(rows, prompts, strict=True):
            assert prompt.count(row.turns[-1].text) == 1
            examples = prompt.split("Example:\n")[1:]
            examples[-1] = examples[-1].partition("\n\nDialogue:\n")[0]
            found = []
            for example in examples:
                *turns, cue, label = example.strip().splitlines()
                shot = by_text[turns[-1].partition(": ")[2]]
                assert cue == "Label:" and int(label) == shot.label and len(turns) <= 6
                assert data.folds[shot.id] != fold and shot.dialogue_id != row.dialogue_id
                found.append(shot)
            chosen.append(found)
            if selection == "balanced":
                assert Counter(shot.label for shot in found) == dict.fromkeys(range(4), 1)
            else:
                assert len({shot.dialogue_id for shot in found}) == 4
        if selection == "balanced":
            most = Counter(tuple(shot.id for shot in found) for found in chosen).most_common(1)[0][1]
            assert most == len(rows) if groups == "dialogue" else most > len(rows) / 3
        else:  # the test dialogue about the harbour is like the training dialogue about it, wherever that may be used
            nearest = {row.id: found[-1].dialogue_id for row, found in zip(rows, chosen, strict=True)}
            known = {row.dialogue_id for row in data.training_part(fold)}
            assert ("train-harbour" in known) == (nearest["test-harbour/2"] == "train-harbour")


# ------------------------------------------------------------------------------------------------------------- endpoints


def flags_of(server: LlmServer | str, corpus: dict[str, object], **more: object) -> dict[str, object]:
    url = server if isinstance(server, str) else server.url
    return {**corpus, "model": "large-1", "base_url": url, "concurrency": 1} | more


ROWS = {"oof": 32, "test": 6}
ALL = sum(ROWS.values())


def target(prompt: str) -> str:
    return prompt.partition("\n\nWhich label")[0].splitlines()[-1].partition(": ")[2]


def right(prompt: str) -> str:
    """The label of a row, which its text gives away."""
    return json.dumps({"label": int(target(prompt).split()[-1].strip("."))})


def test_log_probabilities_of_the_label_s_token(corpus, tmp_path: Path, capsys):
    likely = {"2": math.log(0.7), " 2": math.log(0.1), "0": math.log(0.15), "x": math.log(0.05)}
    tokens = [('{"label":', {'{"label":': 0.0}), ("2", likely), ("}", {"}": 0.0})]
    with LlmServer(lambda prompt: Reply('{"label":2}', tokens=tokens), key=KEY) as server:
        os.environ["OPENAI_API_KEY"] = KEY  # `of_this_test` takes it away again
        more = {"samples": 5, "price_in": 2.0, "price_out": 8.0}
        flags = flags_of(server, corpus, output_dir=tmp_path / "run", **more)
        assert run_script(zero_shot.main, **flags) == 0
        assert len(server.requests) == ALL  # one will do, and the folds share the test rows' prompts
        printed = capsys.readouterr().out
        assert f"at most {5 * ALL} requests (0 answers are in the cache)" in printed and " USD\n" in printed
        assert "s in all; no label in: no answer\n" in printed
        flags |= {"output_dir": tmp_path / "again", "max_requests": 0}
        assert run_script(zero_shot.main, **flags) == 0 and len(server.requests) == ALL
    request = server.requests[0]
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"label": {"type": "integer", "enum": [0, 1, 2, 3]}}
    assert request["max_completion_tokens"] == 1024 and request["logprobs"] and "n" not in request
    run = read_run(tmp_path / "run", require_test=True)
    # Labels 1 and 3 are as likely as the last alternative, which is no label.
    expected = np.array([0.15, 0.05, 0.8, 0.05]) / 1.05
    np.testing.assert_allclose(softmax(run.oof.logits), np.tile(expected, (ROWS["oof"], 1)), rtol=1e-5)
    assert run.info["base_model"] == "large-1" and "base_url" not in run.info["recipe"]
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data for data in kept)


@pytest.mark.parametrize("names_them", [True, False])
def test_votes_of_a_server_that_takes_nothing_else(names_them: bool, corpus, tmp_path: Path, capsys):
    said = iter(["2", "Label: 2.", "Kind 1"] * 99)
    refuses = ("response_format", "logprobs", "n") + (
        ("temperature", "max_completion_tokens") if names_them else ()
    )
    flags = corpus | {"test_file": None, "samples": 3, "output_dir": tmp_path / "run"}
    with LlmServer(lambda prompt: next(said), refuses=refuses, names_them=names_them) as server:
        assert run_script(zero_shot.main, **flags_of(server, flags)) == 0
        taken = [one for one in server.requests if not set(refuses) & one.keys()]
        assert len(taken) == 3 * ROWS["oof"] and len(server.requests) - len(taken) <= 2
    assert [one["seed"] for one in taken[:4]] == [42, 43, 44, 42]
    assert {one.get("temperature") for one in taken} == {None if names_them else 1.0}
    assert all(one["max_tokens" if names_them else "max_completion_tokens"] == 1024 for one in taken)
    # Two votes for 2 and one for 1, and a fourth spread over the four labels.
    votes = softmax(read_run(tmp_path / "run").oof.logits)
    np.testing.assert_allclose(votes, np.tile([0.0625, 0.3125, 0.5625, 0.0625], (ROWS["oof"], 1)), rtol=1e-5)


def test_a_busy_server_and_answers_that_are_none(corpus, tmp_path: Path, capsys):
    odd = {
        "The harbour train says 0.": Reply("I can't.", refusal="I can't."),
        "The garden train says 0.": Reply('{"label":', finish="length"),
        "The violin train says 0.": "It is 1 or 2.",
        "The engine train says 0.": Reply(body={"choices": []}),
        "The bakery train says 0.": Reply(
            status=400, body={"error": {"message": "no", "code": "content_filter"}}
        ),
        "The winter train says 0.": Reply(["3", "3", "3", "1"]),  # more than were asked for
    }
    busy = Reply(status=429, body={"error": {"message": "slow down"}}, headers={"Retry-After": "1"})
    faults = [busy, Reply(status=500, body={"error": {"message": "oh"}}), Reply("1", cut=True)]
    flags = corpus | {"test_file": None, "output_dir": tmp_path / "run"}
    with LlmServer(lambda prompt: odd.get(target(prompt)) or right(prompt), faults) as server:
        assert run_script(zero_shot.main, **flags_of(server, flags)) == 0
    first, second = (request["time"] for request in server.requests[:2])
    assert second - first >= 1 and len(server.requests) == ROWS["oof"] + 3
    assert "logprobs" not in server.requests[-1]  # once it was seen that none come
    answers = {"oof_cut_off": 1, "oof_refused": 3, "oof_rows_without_answer": 5, "oof_unparsable": 1}
    assert read_json(tmp_path / "run/metrics.json")["answers"] == answers
    closing = "no label in: 1 oof_cut_off, 3 oof_refused, 5 oof_rows_without_answer, 1 oof_unparsable\n"
    assert closing in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    found = dict(zip(run.oof.id, softmax(run.oof.logits), strict=True))
    for topic in ("harbour", "garden", "violin", "engine", "bakery"):
        np.testing.assert_allclose(found[f"train-{topic}/0"], [0.25] * 4, rtol=1e-6)
    np.testing.assert_allclose(found["train-winter/0"], [0.125, 0.125, 0.125, 0.625], rtol=1e-6)
    assert (run.oof.logits.argmax(1) == run.oof.label).sum() >= ROWS["oof"] - 6


def test_an_interrupted_run_asks_nothing_again(corpus, tmp_path: Path, capsys):
    """The server breaks among the first rows, where nothing is written, and then in the middle of the second fold."""
    flags = corpus | {"cot": True, "output_dir": tmp_path / "run"}
    with LlmServer(right) as server:
        broken = Reply(body=b'{"choices": [')
        server.answer = lambda prompt: right(prompt) if len(server.answered) < 3 else broken
        line = error_of(
            capsys,
            tmp_path / "run",
            **{k: v for k, v in flags_of(server, flags).items() if k != "output_dir"},
        )
        assert "no answer: " in line and "the answers so far are kept" in line
        server.answer = lambda prompt: right(prompt) if len(server.answered) < 30 else broken
        assert run_script(zero_shot.main, **flags_of(server, flags)) == 2
        server.answer, before = right, (tmp_path / "run/oof/fold-0.parquet").read_bytes()
        assert run_script(zero_shot.main, **flags_of(server, flags)) == 0
        assert len(server.answered) == len(set(server.answered)) == ALL
        assert (tmp_path / "run/oof/fold-0.parquet").read_bytes() == before
        assert "rationale" in server.requests[0]["response_format"]["json_schema"]["schema"]["required"]
    assert len((tmp_path / "run/oof/fold-1.rationales.jsonl").read_text().splitlines()) == 16
    run = read_run(tmp_path / "run", require_test=True)
    assert (run.oof.logits.argmax(1) == run.oof.label).all()
    # Another prompt is another run; where the server is, is not.
    assert (
        run_script(zero_shot.main, **flags_of("http://127.0.0.1:9/v1", flags | {"prompt": "zero_shot_rules"}))
        == 2
    )
    assert "run.json: " in capsys.readouterr().err


def test_endpoints_that_do_not_serve(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def line(server: LlmServer | str, **more: object) -> str:
        return error_of(capsys, tmp_path / "run", **flags_of(server, corpus, **more))

    assert line("http://127.0.0.1:9/v1").startswith("127.0.0.1:9: no answer: ")
    assert line("http://me:secret@localhost/v1") == "--base_url must be like http://localhost:8000/v1"
    with LlmServer(right, key=KEY) as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY[:-1])
        assert line(server).endswith("the key in OPENAI_API_KEY is missing or refused (401)")
        before = len(server.requests)
        assert line(server, max_requests=ALL - 1) == f"--max_requests: {ALL - 1}, but up to {ALL} are needed"
        assert line(server, samples=0) == "--samples must be 1 or more, not 0"
        assert len(server.requests) == before and not (tmp_path / "cache").exists()


LABELS = [
    Label(number=n, name=name, definition="") for n, name in enumerate(("No", "Level 2", "Level 2 Plus", "7"))
]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("3", 3),
        ("**2**", 2),
        ("No.", 0),
        ("level 2 plus", 2),
        ("2: Level 2 Plus", 2),
        ("1: Level 2 Plus", None),
        ('{"rationale": "Not 1, as 2 fits", "label": 0}', 0),
        ('{"label": "Level 2"}', 1),
        ("It is not 1 but rather 2.\n\n**Label:** 2\n\nTell me if 3 is better.", 2),
        ("<think>Label: 1? Label: 2?</think>\nLabel: 3", 3),
        ("I am 0.9 sure: 3", 3),
        ("Label: 1 or 2", None),
        ("Label: 8", None),
        ("Label:", None),
        ("12", None),
        ("-1", None),
        ("I would say it is hard to tell.", None),
        ('{"label": ' + "[" * 9000, None),
    ],
)
def test_an_answer_names_one_label_or_none(text: str, label: int | None):
    assert zero_shot.find_label(text, LABELS) == label


needed = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(needed), reason=f"transformers serve needs {', '.join(needed)}")
def test_a_real_server(python: str, chat_model: str, corpus, tmp_path: Path):
    """`transformers serve`, which at 5.23 knows neither log-probabilities nor several samples nor a schema."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python,
        "-m",
        "transformers.cli.transformers",
        "serve",
        chat_model,
        "--port",
        str(port),
    ]
    log = open(tmp_path / "serve.log", "wb")  # noqa: SIM115
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--device", "cpu"], stdout=log, stderr=log)
    try:
        for _ in range(3000):
            assert server.poll() is None, (tmp_path / "serve.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        more = {"model": chat_model, "max_new_tokens": 8, "samples": 2, "test_file": None}
        flags = flags_of(f"http://127.0.0.1:{port}/v1", corpus, **more)
        assert run_script(zero_shot.main, **flags, output_dir=tmp_path / "run") == 0
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    run, answers = read_run(tmp_path / "run"), read_json(tmp_path / "run/metrics.json")["answers"]
    assert len(run.oof) == ROWS["oof"] and answers["oof_rows_without_answer"] > 0  # it writes nonsense
    uniform = np.ptp(run.oof.logits, axis=1) < 1e-6
    assert uniform.sum() == answers["oof_rows_without_answer"]
