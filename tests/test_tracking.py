"""A run in trackio: a fold that was stopped and goes on is one curve, its scores and those of decisions beside it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import run_script, sigterm_in_step
from test_artifacts import make_run
from tiny_models import make_tiny_encoder

import calibrate
import ensemble
import run_classification
from rareturn.files import read_json, write_json
from rareturn.reports.cards import run_card, run_results
from rareturn.runs.folder import metrics_path, read_run_info, write_fold_metrics

ROOT = Path(__file__).parent.parent
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Ask]:
    """Trackio's own dashboard, started as `trackio show` does; asks it what its page asks."""
    trackio = pytest.importorskip("trackio", reason="trackio is not installed (requirements-tracking.txt)")
    server, url, *_ = trackio.show(open_browser=False, block_thread=False)

    def ask(name: str, **what: str) -> list[dict[str, Any]]:
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()  # as a script's end does, which here is not that of a process
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url.rstrip('/')}/api/{name}", json.dumps(what).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    yield ask
    server.close()


def test_a_stopped_fold_is_one_curve_in_the_project_of_its_system(
    dashboard: Ask, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))  # the script sets it: gone after the test
    flags = {
        "model_name_or_path": make_tiny_encoder(tmp_path / "encoder"),
        "tuning": "full",
        "train_file": ROOT / "data/demo/train.json",
        "output_dir": tmp_path / "anchor",
        "fold": 1,
        "num_folds": 3,
        "max_train_samples": 48,
        "max_seq_length": 48,
        "num_train_epochs": 1,
        "report_to": "trackio",
        "logging_steps": 1,
        "hub_name": "a-system",
    }
    with sigterm_in_step(3):
        assert run_script(run_classification.main, **flags) == 143
    assert run_script(run_classification.main, **flags) == 0
    (run,) = dashboard("get_runs_for_project", project="a-system")
    assert run["name"] == "anchor-fold-1"
    points = dashboard("get_logs", project="a-system", run="anchor-fold-1")
    curve = [point["train/global_step"] for point in points if "train/loss" in point]
    assert curve == [1, 2, 3, 4, 5, 6] and [point["step"] for point in points] == list(range(len(points)))
    scores = [point for point in points if "eval/macro_f1_positive" in point]
    found = read_json(metrics_path(tmp_path / "anchor", 1))["macro_f1_positive"]
    assert [point["eval/macro_f1_positive"] for point in scores] == [pytest.approx(found)]


def test_decisions_are_logged_cross_fitted(dashboard: Ask, tmp_path: Path):
    run, decision = make_run(tmp_path / "anchor"), tmp_path / "rule.json"
    flags = {"report_to": "trackio", "project": "rules"}
    assert run_script(calibrate.main, run=run, output=decision, method="argmax", repeats=1, **flags) == 0
    quick = {"method": "argmax", "repeats": 1, "output_dir": tmp_path / "blend"}
    assert run_script(ensemble.main, runs=run, **quick, **flags) == 0
    names = sorted(run["name"] for run in dashboard("get_runs_for_project", project="rules"))
    assert names == ["anchor-rule", "blend"]
    for name, file in (("anchor-rule", decision), ("blend", tmp_path / "blend/metrics.json")):
        (point,) = dashboard("get_logs", project="rules", run=name)
        content = read_json(file)
        metrics = content if name == "blend" else content["metrics"]
        for stage in ("argmax", "in_sample", "cross_fitted"):
            assert point[f"{stage}/accuracy"] == pytest.approx(metrics[stage]["accuracy"])


def test_a_tracker_that_is_missing_is_one_line(tmp_path: Path, capsys):
    flags = {"model_name_or_path": "nowhere", "train_file": "nowhere", "output_dir": tmp_path / "run"}
    assert run_script(run_classification.main, **flags, report_to="tracky") == 2
    said = "--report_to tracky: no such tracker, or its package is not installed"
    assert capsys.readouterr().err.splitlines() == [f"run_classification.py: error: {said}"]


def test_the_card_links_the_space_that_has_the_curves(tmp_path: Path):
    run_dir = make_run(tmp_path / "anchor")
    info, url = read_run_info(run_dir), "https://huggingface.co/spaces/org/curves"
    for fold in range(3):
        write_fold_metrics(run_dir, info, fold, seconds=1.0)
    assert "trackio" not in run_card(info, run_results(run_dir, info))
    for fold in (0, 2):
        write_json(
            metrics_path(run_dir, fold),
            read_json(metrics_path(run_dir, fold)) | {"trackio_space_id": "org/curves"},
        )
    card = run_card(info, run_results(run_dir, info))
    assert card.count(f"- trackio:{url}\n") == 1 and f"Training curves: {url}." in card
