"""app.py and its Space: reasons, dialogues, the error browser, the page in a real browser, what is pushed."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import HubServer
from running import run_script, words_of
from tiny_models import make_tiny_encoder, make_tokenizer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import leaderboard
import make_space

import app
import ensemble
import linear_probe
from rareturn import DialogueClassifier
from rareturn.data.label_guide import load_label_guide
from rareturn.data.rendering import Renderer
from rareturn.data.rows import load_rows
from rareturn.decisions.explaining import explain
from rareturn.decisions.probabilities import softmax
from rareturn.decisions.rules import Decision, Rule
from rareturn.decisions.voting import Voting
from rareturn.errors import InputError
from rareturn.runs.bundle import read_bundle

ROOT = Path(__file__).resolve().parent.parent
TRAIN, GUIDE = str(ROOT / "data/demo/train.json"), str(ROOT / "data/demo/label_guide.yaml")
NAMES = ["Calm", "Angry", "Sad"]
TURNS = [
    {"text": "Hello, how was the exam?", "speaker": "supporter"},
    {"text": "Fine: I passed. I don't want to talk about it.", "speaker": "seeker"},
    {"text": "All right.", "speaker": "supporter"},
    {"text": "Whatever, it's only an exam.", "speaker": "seeker"},
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an ensemble of two probes on a tiny encoder; its base is spelled as on the Hub."""
    place = tmp_path_factory.mktemp("system")
    make_tiny_encoder(place / "team/encoder")
    flags = {"model_name_or_path": "team/encoder", "label_guide": GUIDE, "train_file": TRAIN, "C": 1}
    with contextlib.chdir(place):
        for layer in (1, 2):
            assert run_script(linear_probe.main, **flags, layer=layer, output_dir=f"probe-{layer}") == 0
        blend = {"runs": ["probe-1", "probe-2"], "weights": [2, 1], "method": "prior", "repeats": 2}
        assert run_script(ensemble.main, **blend, output_dir="system") == 0
    return place / "system"


def read(system: Path, **flags: object) -> app.Errors:
    arguments = app.AppArguments(bundle=str(system), **{"rows": TRAIN} | flags)
    return app.read_errors(arguments, *read_bundle(str(system)))


# ------------------------------------------------------------------------------------------------------------- reasons


def logits_of(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities))


def test_reasons_of_bias_gate_and_argmax():
    rule = Rule(Decision(np.log([1.0, 2.0, 1.0]), 0, 0.6), np.array([1.0]), "exact")
    logits = logits_of([0.55, 0.35, 0.1], [0.6001, 0.3499, 0.05], [0.1, 0.2, 0.7], [0.1, 0.7, 0.2])
    bias, gate, sad, angry = explain(rule, NAMES, [[logits]])
    assert [one.label for one in (bias, gate, sad, angry)] == [1, 0, 2, 1]
    counts = "“Calm” is likelier, 55.0 % against 35.0 %, but the rule weighs “Angry” 2.00 times as much."
    assert bias.why == f"The bias decided: {counts}"
    assert bias.margin == pytest.approx(-0.2) and bias.runner_up == 0
    assert gate.why == "The gate decided: “Calm” has 60.0 %, and from 60.0 % on it wins outright."
    assert sad.why == angry.why == "The likeliest label won."
    assert sad.margin == pytest.approx(0.5) and sad.runner_up == 1 and sad.alone == [2]


@pytest.mark.parametrize("soft", [False, True])
def test_reasons_of_a_vote(soft: bool):
    voting = Voting(0, 0, (None, None, (1, 2)), soft)
    rule = Rule(Decision(np.zeros(3)), np.ones(3) / 3, "vote", voting=voting)
    runs = [
        logits_of([0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]),
        logits_of([0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]),
        logits_of([0.1, 0.7, 0.2], [0.1, 0.7, 0.2], [0.1, 0.8, 0.1], [0.1, 0.6, 0.3]),
    ]
    said = explain(rule, NAMES, [[run] for run in runs])
    np.testing.assert_array_equal([one.label for one in said], voting.predict([softmax(run) for run in runs]))
    if soft:
        best = 0.7 / 0.9 * 0.25  # of what the gatekeepers' mean of 0.75 leaves
        shares = f"“Angry” has the most, {100 * best:.1f} %."
        assert said[0].why == f"The gatekeepers give “Calm” 75.0 %. The specialists share the rest: {shares}"
        return
    assert [one.why for one in said] == [
        "2 of 2 gatekeepers voted for “Calm”, more than half.",
        "1 of 2 gatekeepers voted for “Calm”, not more than half. Votes for other labels: “Angry” 2.",
        "1 of 2 gatekeepers voted for “Calm”, not more than half. Votes for other labels: “Angry” 1, “Sad” 1. "
        "A tie goes to “Calm”.",
        "0 of 2 gatekeepers voted for “Calm”, not more than half. Votes for other labels: “Angry” 3.",
    ]
    assert said[1].alone == [1, 0, 1]


# ----------------------------------------------------------------------------------------------------------- dialogues


def as_table(delimiter: str, **more: str) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*more, "speaker", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**more, **turn} for turn in TURNS)
    return buffer.getvalue()


@pytest.mark.parametrize("uploaded", [None, "it.txt", "it.json", "it.csv", "it.jsonl"])
def test_a_dialogue_is_the_same_in_every_form(tmp_path: Path, uploaded: str | None):
    guide, row = load_label_guide(GUIDE), {"id": "a", "dialogue": TURNS}
    lines = "\n\n".join(f" {turn['speaker'].upper()} : {turn['text']}" for turn in TURNS)
    forms = {
        None: [lines, json.dumps(TURNS), json.dumps(row), json.dumps([{"dialogue": TURNS}]), as_table(",")],
        "it.txt": [lines],
        "it.json": [json.dumps(TURNS), json.dumps([row])],
        "it.csv": [as_table(","), as_table(",", dialogue_id="a")],
        "it.jsonl": ["\n".join(map(json.dumps, TURNS)), json.dumps(row)],
    }
    for form in [*forms[uploaded], *([as_table("\t")] if uploaded is None else [])]:
        path = str(tmp_path / uploaded) if uploaded else None
        if path:
            Path(path).write_text(form)
        (rows,) = app.read_dialogues("" if path else form, path, guide, {})
        assert [len(row.turns) for row in rows] == [2, 4], form
        assert [turn._asdict() for turn in rows[0].turns.dialogue] == TURNS


def test_a_table_of_several_dialogues(tmp_path: Path):
    rows = app.read_dialogues(
        as_table(",", dialogue_id="a") + "b,seeker,Hm.\n", None, load_label_guide(GUIDE), {}
    )
    assert [(of[0].dialogue_id, len(of)) for of in rows] == [("a", 2), ("b", 1)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seeker said nothing", "'seeker said nothing': every line must be SPEAKER: text"),
        ("boss: Hello", "dialogue: turn 1 has unknown speaker 'boss' (not seeker or supporter)"),
        ('[{"text": "Hi"', "not valid JSON: "),
        ("[1, 2]", "dialogue: dialogue 1: not an object with fields"),
        (json.dumps([TURNS[0], 2]), "dialogue: turn 2 must have a text and a speaker"),
        ("speaker,text\nseeker,\n", "dialogue: turn 1 is empty"),
    ],
)
def test_what_is_wrong_with_a_dialogue_is_said(text: str, problem: str):
    with pytest.raises(InputError) as error:
        app.read_dialogues(text, None, load_label_guide(GUIDE), {})
    assert error.value.lines()[0].startswith(problem)


@pytest.mark.parametrize("is_encoder", [False, True])
def test_the_context_that_a_model_saw(is_encoder: bool, system: Path):
    """Turns before the first one seen change nothing, and that one does."""
    guide, rows = load_label_guide(GUIDE), load_rows(TRAIN, load_label_guide(GUIDE))
    encoder = system.parent / "team/encoder"
    tokenizer = AutoTokenizer.from_pretrained(encoder) if is_encoder else make_tokenizer()
    limits = {"max_turns": 8, "max_seq_length": 90 if is_encoder else 420, "window_stride": 3}
    renderer = Renderer(tokenizer, guide, is_encoder=is_encoder, **limits)
    starts = {}
    for row in rows[::7]:
        start, whole = app.first_seen(renderer, row), renderer.render([row])[0].input_ids.tolist()
        starts[row.id] = start, len(row.turns)
        for later in (start, start + 1):
            fewer = app.replace(row, turns=row.turns[later:])
            if fewer.turns:
                assert (renderer.render([fewer])[0].input_ids.tolist() == whole) == (later == start), row.id
    assert any(start > length - 8 for start, length in starts.values()), "no row was cut by its tokens"
    assert any(start == 0 for start, _ in starts.values())


# ---------------------------------------------------------------------------------------------------- the error browser


def test_errors_are_those_of_the_ensemble_and_every_filter_counts(system: Path):
    errors = read(system)
    saved = json.loads((system / "oof_predictions.json").read_text())
    said = dict(zip(saved["id"], zip(saved["label"], saved["predictions"][0], strict=True), strict=True))
    fold_of = json.loads((system.parent / "probe-1/folds.json").read_text())["folds"]
    rows = {row.id: row for row in load_rows(TRAIN, load_label_guide(GUIDE))}
    assert errors.rows == [rows[row_id] for row_id in saved["id"]]
    confidence = {
        row.id: one.probabilities[said[row.id][1]]
        for row, one in zip(errors.rows, errors.explained, strict=True)
    }
    choices = itertools.product(
        ("wrong", "all"), (app.ANY, 3, 7), (app.ANY, 7), (app.ANY, 2), app.CONFIDENCES
    )
    for show, truth, predicted, fold, range_ in choices:
        low, high = app.CONFIDENCES[range_]
        expected = [
            row_id
            for row_id, (label, guess) in said.items()
            if (show == "all" or label != guess)
            and truth in (app.ANY, label)
            and predicted in (app.ANY, guess)
            and fold in (app.ANY, fold_of[row_id])
            and (low <= confidence[row_id] < high or range_ == "any")
        ]
        given = {"truth": truth, "predicted": predicted, "fold": fold, "confidence": (low, high)}
        found = errors.select(show, **given)
        assert [errors.rows[place].id for place in found] == expected
    groups = errors.by_dialogue(errors.select("all"))
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(errors.rows)))
    for group in groups:
        assert len({errors.rows[place].dialogue_id for place in group}) == 1
        lengths = [len(errors.rows[place].turns) for place in group]
        assert lengths == sorted(lengths)


def test_flips_are_those_of_the_leaderboard(system: Path, tmp_path: Path):
    run = str(system.parent / "probe-2")
    errors = read(system, compare=run)
    flags = {"method": "argmax", "output_dir": tmp_path}
    assert run_script(leaderboard.main, str(system), run, **flags) == 0
    flips = json.loads((tmp_path / "leaderboard.json").read_text())["flips"]
    ids = {show: {errors.rows[place].id for place in errors.select(show)} for show in ("flips", "a", "b")}
    assert ids["flips"] == {row_id for flip in flips for row_id in flip["ids"]} != set()
    # The leaderboard names the better one first.
    right = sorted(sum(flip[f"{one}_right"] for flip in flips) for one in "ab")
    assert sorted(len(ids[show]) for show in "ab") == right
    assert errors.what[0].endswith("decision (prior), cross-fitted") and errors.what[1].endswith("argmax")


def test_rows_and_systems_of_others_are_refused(system: Path, tmp_path: Path):
    fewer, other = tmp_path / "fewer.json", tmp_path / "other"
    fewer.write_text(json.dumps(json.loads(Path(TRAIN).read_text())[1:]))
    with pytest.raises(InputError, match=r"fewer.json: row 'demo-0001' of .*probe-1 is missing"):
        read(system, rows=str(fewer))
    shutil.copytree(system, other)
    saved = json.loads((other / "oof_predictions.json").read_text())
    saved["label_names"][0] = "Nothing"
    (other / "oof_predictions.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match='label 0: "Nothing", but "No Defense"'):
        read(system, compare=str(other))
    with pytest.raises(ValueError, match="--compare"):
        read(system, rows=None, compare=str(system))


# ---------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture
def served(python: str, system: Path, tmp_path: Path) -> Iterator[str]:
    """The address of app.py over the system, its errors and one of its runs."""
    pytest.importorskip("gradio", reason="the app's own packages are in requirements-app.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"bundle": "system", "rows": TRAIN, "compare": "probe-2", "server_port": port}
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w+") as log:
        command = [python, str(ROOT / "app.py"), *words_of(**flags)]
        place = {"cwd": system.parent, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **place)
        try:
            for _ in range(3000):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def page(served: str) -> Iterator[object]:
    """A page 400 px wide that has loaded the app; nothing may be said on its console, nor asked of another machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium (apt-get install chromium)")
    said, asked = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 400, "height": 860})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        yield page
        browser.close()
    assert not [line for line in said if line.startswith("error")]
    assert not [url for url in asked if not url.startswith((served, "data:", "blob:"))]


def test_the_page_at_400_px(page, system: Path, tmp_path: Path):
    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def choose(label: str, option: str) -> None:
        page.get_by_role("listbox", name=label, exact=True).or_(
            page.get_by_label(label, exact=True)
        ).first.click()
        page.get_by_role("option", name=option, exact=True).click()

    rows = json.loads(Path(TRAIN).read_text())
    longest = max(
        (row for row in rows if row["dialogue_id"] == "exam-01"), key=lambda row: len(row["dialogue"])
    )
    with contextlib.chdir(system.parent):
        expected = DialogueClassifier.from_pretrained("system")(longest["dialogue"])
    (tmp_path / "dialogue.json").write_text(json.dumps(longest["dialogue"]))
    page.set_input_files("input[type=file]", str(tmp_path / "dialogue.json"))
    page.wait_for_selector(".verdict")
    chips = page.locator(".verdict .labels .chip").all_inner_texts()
    assert chips == [f"{one.label_name} {100 * one.probabilities[one.label_name]:.0f} %" for one in expected]
    assert fits()

    page.get_by_label("Dialogue: a line").fill("seeker: <b id=bold>no</b>\nboss: Hello")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_text("unknown speaker 'boss'").wait_for()
    page.get_by_label("Dialogue: a line").fill("seeker: <b id=bold>no</b> " + "x" * 200)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_text("<b id=bold>no</b>").first.wait_for()
    assert page.locator("#bold").count() == 0 and fits()

    page.get_by_role("tab", name="Error browser").click()
    saved = json.loads((system / "oof_predictions.json").read_text())
    pairs = list(zip(saved["label"], saved["predictions"][0], strict=True))
    wrong = sum(label != guess for label, guess in pairs)
    page.get_by_text(f"{wrong} of {len(pairs)} rows").wait_for()
    choose("True label", "Neurotic")
    neurotic = sum(label == 5 != guess for label, guess in pairs)
    page.get_by_text(f"{neurotic} of {len(pairs)} rows").wait_for()
    assert page.locator(".verdict:visible .wrong").count() >= 1 and fits()
    page.get_by_text("Dialogue 1 of").wait_for()
    page.get_by_role("button", name="Next").click()
    page.get_by_text("Dialogue 2 of").wait_for()
    choose("True label", "any")
    choose("Show", "only B right")
    page.get_by_text("B says").first.wait_for()
    assert fits()


# ---------------------------------------------------------------------------------------------------------- the Space


def test_a_space_holds_all_that_the_app_needs(system: Path, hub_here: HubServer, tmp_path: Path, capsys):
    bundle = json.loads((system / "ensemble.json").read_text())
    for run in bundle["runs"]:
        run["model"] = {"repo_id": f"org/{run['name']}", "revision": "0" * 40, "folds": run["model"]["folds"]}
    revision = hub_here.put("org/system", {"ensemble.json": json.dumps(bundle).encode()})
    assert run_script(make_space.main, "org/system", space="org/system-app") == 0
    assert hub_here.repos["space", "org/system-app"].private
    assert "HF_TOKEN" in capsys.readouterr().out
    files = hub_here.files("org/system-app", "space")
    for path, content in files.items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    for path in ("app.py", "rareturn/classifier.py", "rareturn/reports/templates/app.css"):
        assert files[path] == (ROOT / path).read_bytes()
    assert yaml.safe_load(files["space.yaml"]) == {
        "bundle": f"org/system@{revision}",
        "server_name": "0.0.0.0",
    }
    header = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    pins = files["requirements.txt"].decode().splitlines()
    assert header["sdk"] == "gradio" and f"gradio=={header['sdk_version']}" in pins
    assert header["models"] == ["org/system"] and header["license"] == "cc0-1.0"
    assert "**Must not be used** as a diagnostic instrument" in files["README.md"].decode()
    tested = (ROOT / "requirements.txt").read_text().splitlines()
    assert {f"{name}==" for name in ("torch", "transformers", "huggingface_hub", "numpy")} <= {
        re.match(r"[\w-]+==", pin)[0] for pin in pins if pin in tested
    }
    assert not any(pin.startswith(("pytest", "ruff")) for pin in pins)

    # There, the app starts with the package beside it and reads its own settings.
    program = (
        "import runpy, sys; sys.argv = ['app.py']; import rareturn, rareturn.runs.bundle as bundle\n"
        "def read(reference): raise SystemExit(f'{rareturn.__file__} {reference}')\n"
        "bundle.read_bundle = read; sys.modules['gradio'] = sys\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "space", capture_output=True, text=True
    )
    assert done.stderr.strip() == f"{tmp_path}/space/rareturn/__init__.py org/system@{revision}"

    assert run_script(make_space.main, "org/system", space="org/system-app") == 0
    assert len(hub_here.commits("org/system-app", "space")) == 2, "nothing new: no commit"


def test_a_space_of_a_folder_is_refused(system: Path, capsys):
    assert run_script(make_space.main, str(system), space="org/app") == 2
    assert "push it first" in capsys.readouterr().err
