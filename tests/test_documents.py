"""The documents keep their word: the README's commands and code run, and the tests that docs/TRAPS.md names are there."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hub_server import HubServer
from llm_server import LlmServer
from running import run_script
from test_augment_llm import good
from tiny_models import make_tiny_decoder, make_tiny_encoder

import ensemble
import linear_probe
import run_classification
from rareturn import DialogueClassifier
from rareturn.data.label_guide import load_label_guide
from rareturn.models import loading

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Not run here: a download of minutes, a training of hours, or what other tests run by itself.
EXCLUDED = (
    "make ",  # set-up, the demo of ten minutes, the tests themselves
    "pip install ",
    "for run in ",  # the 8B system; test_launch_folds.py runs launch_folds.sh, test_training.py parses the recipes
    "scripts/launch_folds.sh ",
    "done",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_commands(block: str) -> None:
    """The commands of a block as a shell would split them, in this process, where the imports are paid once."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip().startswith(EXCLUDED):
            continue
        python, script, *words = shlex.split(line, comments=True)
        assert python == "python", line
        if script == "ensemble.py":  # the default tries every method: half a minute
            words += ["--method", "prior", "--repeats", "1"]
        assert run_script(importlib.import_module(Path(script).stem).main, *words) == 0, line


def as_table(source: Path, path: Path, keep: tuple[str, ...] = ("label",)) -> None:
    """The German table under the column names that are found without a flag."""
    names = {
        "gespraech": "dialogue_id",
        "nr": "turn",
        "sprecher": "speaker",
        "aeusserung": "text",
        "art": "label",
    }
    with source.open(encoding="utf-8") as file:
        rows = [{names[key]: value for key, value in row.items()} for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def newcomer(tmp_path: Path, hub_here: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who has the code, tables of their own, two runs, and the data and models of the README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    for name in ("data", "label_guides", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("train", "test", "new"):
        as_table(ROOT / "data/german" / f"{name.replace('new', 'test')}.csv", tmp_path / f"{name}.csv")
    monkeypatch.setattr(loading, "PACKAGED_MODELS", {})
    encoder = Path(make_tiny_encoder(tmp_path / "encoder"))
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    hub_here.put("sentence-transformers/all-MiniLM-L6-v2", files)
    rows = {
        f"Splits/{name}.json": (ROOT / f"data/demo/{name}.json").read_bytes() for name in ("train", "test")
    }
    hub_here.put("AIMH/PsyDefConv", rows, "dataset")
    probe = {f"{name}_file": f"AIMH/PsyDefConv:Splits/{name}.json" for name in ("train", "test")}
    for run in ("anchor", "seed-a"):
        flags = {**probe, "output_dir": f"outputs/{run}", "C": 1, "num_folds": 2}
        assert run_script(linear_probe.main, model_name_or_path=encoder, **flags) == 0
    return tmp_path


def test_the_commands_and_the_code_of_the_readme_run(newcomer: Path, monkeypatch, capsys):
    with LlmServer(good) as llm:
        for block in blocks(README, "bash"):
            run_commands(block.replace("http://localhost:8000/v1", llm.url))
    assert all((newcomer / path).is_file() for path in ("labelled.csv", "outputs/system/report.html"))
    assert (newcomer / "augmented.jsonl").read_text(encoding="utf-8") and llm.requests
    (newcomer / "outputs/demo").symlink_to("submission")  # both are ensembles on the levels of defense
    (code,) = blocks(README, "python")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    label, probability, decided_by = capsys.readouterr().out.rsplit(maxsplit=2)
    assert label and 0 <= float(probability) <= 1 and decided_by


def script_of(page: str, name: str) -> str:
    (code,) = [
        code for code in blocks((ROOT / page).read_text(encoding="utf-8"), "python") if name in code[:40]
    ]
    return code


class StandIn(BaseHTTPRequestHandler):
    """What vLLM's `/classify` answers, by the adapter under PEFT; `answer` gives a text's probabilities."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["model"]) == ("/classify", "fold-0")
        found = [
            {"index": place, "probs": self.server.answer(ids)} for place, ids in enumerate(asked["input"])
        ]
        body = json.dumps({"data": found[::-1]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: object) -> None:
        pass


def test_the_checker_of_a_server_compares_it_with_the_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base, train = make_tiny_decoder(tmp_path / "base"), str(ROOT / "data/demo/train.json")
    flags = {
        "model_name_or_path": base,
        "train_file": train,
        "output_dir": "run",
        "num_folds": 6,
        "max_turns": 4,
    }
    small = {
        "max_train_samples": 16,
        "num_train_epochs": 1,
        "lora_r": 4,
        "learning_rate": 0.01,
        "max_seq_length": 512,
    }
    assert run_script(run_classification.main, **flags, **small) == 0
    names, loaded = load_label_guide("label_guides/dmrs.yaml").names, loading.find_base_model(base)
    model = loading.load_trained(loaded, Path("run/fold-0/adapter"), names, 0).eval()

    @torch.inference_mode()
    def answer(ids: list[int]) -> list[float]:
        return model(torch.tensor([ids])).logits.softmax(-1)[0].tolist()

    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for changed, line in (
            (answer, r"difference 0\.000\d, same label on 100\.0%"),
            (lambda ids: [1 / 9] * 9, r"0\.[1-9]"),
        ):
            server.answer = changed
            monkeypatch.setattr(
                sys, "argv", ["check", "run", train, f"http://127.0.0.1:{server.server_port}", "fold-0"]
            )
            capsys.readouterr()
            exec(compile(script_of("docs/SERVING.md", "check_served.py"), "check_served.py", "exec"), {})
            assert re.search(line, capsys.readouterr().out)
        server.shutdown()


def test_an_ensemble_behind_fastapi(newcomer: Path, monkeypatch):
    pytest.importorskip("fastapi", reason="fastapi is not installed; it comes with the app's packages")
    from fastapi.testclient import TestClient

    runs = {"runs": ["outputs/anchor", "outputs/seed-a"], "method": "prior", "repeats": 1}
    assert run_script(ensemble.main, **runs, output_dir="outputs/demo") == 0
    served = ModuleType("serve")
    monkeypatch.setitem(sys.modules, "serve", served)  # where FastAPI looks up the names of annotations
    exec(compile(script_of("docs/SERVING.md", "serve.py"), "serve.py", "exec"), served.__dict__)
    page = (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")
    asked = json.loads(re.search(r"-d '(.*?)'\n", page, re.DOTALL)[1])
    client = TestClient(served.app)
    answer = client.post("/classify", json=asked)
    (found,), (shown,) = answer.json(), json.loads(blocks(page, "json")[0])
    assert answer.status_code == 200 and found.keys() == shown.keys()
    assert found == asdict(DialogueClassifier.from_pretrained("outputs/demo")(asked["dialogue"], "last")[0])
    assert len(client.post("/classify", json=asked | {"turns": "all"}).json()) == 1
    wrong = client.post("/classify", json={"dialogue": [{"speaker": "bot", "text": "Hello"}]})
    assert wrong.status_code == 422 and "turn 1 has unknown speaker 'bot'" in wrong.json()["detail"][0]


def test_every_test_that_the_page_of_traps_names_exists():
    page = (ROOT / "docs/TRAPS.md").read_text(encoding="utf-8")
    traps = [line for line in page.splitlines() if line.startswith("| **")]
    there = {
        name
        for path in ROOT.glob("tests/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = [re.findall(r"`(test_\w+)`", trap) for trap in traps]
    assert len(traps) == 7 and all(named) and {name for names in named for name in names} <= there
