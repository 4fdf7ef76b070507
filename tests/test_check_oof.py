"""`scripts/check_oof.py`, through its command line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from sklearn.metrics import accuracy_score, f1_score
from test_artifacts import LABELS, ROOT, make_run, push_all

from rareturn.runs.folder import table_path
from rareturn.runs.reading import read_run


def check(
    python: str, *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    command = [python, ROOT / "scripts" / "check_oof.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=env or dict(os.environ), capture_output=True, text=True)


def test_scores_and_facts_of_a_local_and_of_a_hub_run(
    python: str, tmp_path: Path, hub_here: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "anchor")
    sha = push_all(run_dir)["org/demo-oof"]
    local = check(python, "anchor", "--require_test", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    oof = read_run(run_dir).oof
    predictions = oof.logits.argmax(1)
    for name, value in (
        ("accuracy", accuracy_score(oof.label, predictions)),
        ("macro_f1_positive", f1_score(oof.label, predictions, labels=[1, 2], average="macro")),
    ):
        assert f"{value:.4f}" == re.search(rf"{name} +([\d.]+)", local.stdout)[1]
    assert "24, each once, in 3 folds of 8 to 8" in local.stdout
    assert "12, none of them in more than one fold" in local.stdout and "3 of 5 rows" in local.stdout

    pulled = check(python, "org/demo-oof:anchor", cwd=tmp_path, env=hub_here.env)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.replace(f"commit     {sha}\n", "") == local.stdout


@pytest.mark.parametrize("case", ["fold missing", "other guide"])
def test_what_breaks_the_contract_is_one_line_and_status_2(python: str, tmp_path: Path, case: str) -> None:
    run_dir = make_run(tmp_path / "anchor")
    arguments: list[str | Path] = [run_dir]
    if case == "fold missing":
        table_path(run_dir, "oof", 2).unlink()
        message = "the oof table of fold 2 is missing"
    else:
        labels = [{"number": number, "name": name, "definition": "d"} for number, name in enumerate(LABELS)]
        guide = {"task": "t", "speakers": ["x"], "positive": [1], "labels": labels}
        (tmp_path / "guide.yaml").write_text(yaml.safe_dump(guide))
        arguments += ["--label_guide", tmp_path / "guide.yaml"]
        message = "positive_labels: the run has [1, 2]"
    done = check(python, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
