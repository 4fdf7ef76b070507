"""The documents keep their word: the README's commands and code run, and the tests that docs/TRAPS.md names are there."""

from __future__ import annotations

import csv
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from llm_server import LlmServer
from running import run_script
from test_augment_llm import good
from tiny_models import make_tiny_encoder

import linear_probe
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
