"""Every script that pushes asks first whether it may: a token that cannot is one line, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import Faults, HubServer
from running import run_script

import augment
import ensemble
import linear_probe
import run_classification
from rareturn.errors import InputError
from rareturn.runs.hub import check_may_push

ROOT = Path(__file__).parent.parent
ROWS = {"train_file": ROOT / "data/demo/train.json"}
# Neither is there: whoever came as far as the model, or as the runs, would say that.
MODEL, RUNS = ROWS | {"model_name_or_path": "./nowhere"}, {"runs": "./nowhere"}


@pytest.mark.parametrize(
    ("main", "flags", "output", "asked"),
    [
        (run_classification.main, MODEL, {"output_dir": "run"}, ["org/sys-run", "org/sys-oof"]),
        (linear_probe.main, MODEL, {"output_dir": "run"}, ["org/sys-run", "org/sys-oof"]),
        (augment.main, ROWS, {"output_file": "run.jsonl"}, ["org/sys-augmented"]),
        (ensemble.main, RUNS, {"output_dir": "run"}, ["org/sys"]),
    ],
    ids=["run_classification", "linear_probe", "augment", "ensemble"],
)
def test_every_repo_of_every_script(
    hub_here: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, main, flags, output, asked
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = flags | output | {"push_to_hub": True, "hub_namespace": "org", "hub_name": "sys"}

    def refused(repo: str) -> str:
        assert run_script(main, **flags) == 2
        (said,) = capsys.readouterr().err.splitlines()
        line = f"{main.__module__}.py: error: {repo}: cannot push: the token may not write there: "
        assert said.startswith(line) and not list(tmp_path.glob("run*"))
        return said.removeprefix(line)

    for repo in asked:  # the others pass: they are missing and could be made
        hub_here.create(repo, "dataset" if repo.endswith(("-oof", "-augmented")) else "model")
        hub_here.strangers = {repo}
        assert refused(repo).startswith("HTTP 403")
    hub_here.repos.clear()
    monkeypatch.setenv("HF_TOKEN", hub_here.reader)
    assert refused(asked[0]) == "its role does not let it create repos of org"
    assert not hub_here.repos


@pytest.mark.parametrize(
    ("repo_id", "reason"),
    [
        ("tester/new", None),
        ("team/new", None),
        ("club/new", "tester may not create repos of club"),
        ("nobody/new", "tester may not create repos of nobody"),
        ("strangers/there", "HTTP 403"),
    ],
)
def test_a_repo_that_is_missing_is_not_made(hub_here: HubServer, repo_id: str, reason: str | None) -> None:
    hub_here.create("strangers/there", "dataset")
    if reason is None:
        check_may_push(repo_id, "dataset")
    else:
        with pytest.raises(
            InputError, match=f"{repo_id}: cannot push: the token may not write there: {reason}"
        ):
            check_may_push(repo_id, "dataset")
    assert list(hub_here.repos) == [("dataset", "strangers/there")]


def test_a_fine_grained_token(hub_here: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_here.writer, hub_here.scopes = "hf_fine", {"team": ["repo.write"], "org": ["repo.content.read"]}
    monkeypatch.setenv("HF_TOKEN", hub_here.writer)
    check_may_push("team/new")
    for namespace in ("org", "tester"):
        with pytest.raises(InputError, match="its role does not let it create repos of"):
            check_may_push(f"{namespace}/new")


@pytest.mark.parametrize("token", [None, "hf_expired"])
@pytest.mark.parametrize("exists", [False, True])
def test_no_valid_token(
    hub_here: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, exists: bool
) -> None:
    if exists:
        hub_here.create("org/x", private=False)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        InputError, match=r"org/x: cannot push: no valid token \(hf auth login, or HF_TOKEN\)"
    ):
        check_may_push("org/x")


def test_a_hub_that_is_down_is_no_reason_not_to_train(
    hub_here: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub_here.faults = Faults(script=[("auth_check", "503")])
    check_may_push("tester/new")
    assert "HTTP 503; trying again" in caplog.text and "is not known" not in caplog.text
    monkeypatch.setenv("RARETURN_PUSH_SECONDS", "0.3")
    hub_here.faults = Faults(rate=1.0, kinds=("503",))
    check_may_push("tester/new")
    assert "tester/new: whether it can be pushed to is not known: HTTP 503" in caplog.text
