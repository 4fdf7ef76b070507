"""Pushing while the Hub misbehaves: nothing is lost, nothing is done twice, and what cannot be done is said in a line."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hub_server import Faults, HubServer
from test_artifacts import ROOT, make_run

from rareturn.files import write_bytes, write_json
from rareturn.runs.folder import adapter_dir, metrics_path, table_path
from rareturn.runs.hub import PushError, push_files
from rareturn.runs.publish import push_fold, push_run
from rareturn.runs.reading import read_run

CARD = "---\ntags: [x]\n---\n# Card\n"
EVERYWHERE = ("429", "500", "502", "503", "drop_before", "drop_after", "slow")


def push(folder: Path) -> str:
    """Two files, one of them large, and a README that builds on what is there."""
    files = {
        "run.json": folder / "run.json",
        "data/a.parquet": folder / "a.parquet",
        "README.md": lambda present: (present or b"# Card\n").replace(b"Card", b"Table"),
    }
    return push_files("org/x-oof", files, repo_type="dataset", message="push", kept_in=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run.json").write_text('{"name": "anchor"}')
    (tmp_path / "outputs" / "a.parquet").write_bytes(os.urandom(100_000))
    return tmp_path / "outputs"


def assert_arrived(hub: HubServer, folder: Path) -> None:
    """Every byte is there, and it took one commit."""
    files = hub.files("org/x-oof", "dataset")
    assert files["data/a.parquet"] == (folder / "a.parquet").read_bytes()
    assert files["run.json"] == (folder / "run.json").read_bytes() and files["README.md"] == b"# Table\n"
    assert [commit.message for commit in hub.commits("org/x-oof", "dataset")] == ["initial commit", "push"]


@pytest.mark.parametrize("kind", ["409", "412", *EVERYWHERE])
def test_a_commit_meets_a_fault(hub_here: HubServer, folder: Path, kind: str) -> None:
    hub_here.faults = Faults(script=[("commit", kind)] * 3)
    sha = push(folder)
    assert hub_here.faults.script == [] or kind in ("drop_after", "slow")
    assert_arrived(hub_here, folder)
    assert sha == hub_here.commits("org/x-oof", "dataset")[-1].oid


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_every_other_request_of_a_push_meets_a_fault(hub_here: HubServer, folder: Path, kind: str) -> None:
    """Not the three that the client itself repeats, after a second each: those are in the test of five processes."""
    hub_here.faults = Faults(
        script=[(route, kind) for route in ("info", "create", "paths", "validate", "resolve")]
    )
    push(folder)
    assert hub_here.faults.script == []
    assert_arrived(hub_here, folder)


@pytest.mark.parametrize("kind", ["lose", "lose_silently"])
def test_an_upload_whose_bytes_do_not_arrive_is_repeated(
    hub_here: HubServer, folder: Path, kind: str
) -> None:
    hub_here.faults = Faults(script=[("upload", kind)] * 2)
    push(folder)
    assert hub_here.faults.met == {f"upload {kind}": 2}
    assert_arrived(hub_here, folder)


def test_a_commit_that_took_effect_is_not_repeated(hub_here: HubServer, folder: Path) -> None:
    hub_here.faults = Faults(script=[("commit", "drop_after")])
    push(folder)
    assert [note for _, route, note, _ in hub_here.requests if route == "commit"] == ["drop_after"]
    assert_arrived(hub_here, folder)


def test_a_card_that_another_team_changes_at_the_same_moment(hub_here: HubServer, folder: Path) -> None:
    """They commit between our look at the card and our commit: both changes must be in it."""
    hub_here.put("org/x-oof", {"README.md": b"# Card\n"}, "dataset")
    seen = []

    def add_ours(present: bytes) -> bytes:
        if not seen:
            hub_here.put("org/x-oof", {"README.md": present + b"theirs\n", "b.json": b"{}"}, "dataset")
        seen.append(present)
        return present if b"ours" in present else present + b"ours\n"

    push_files("org/x-oof", {"README.md": add_ours}, repo_type="dataset", message="push", kept_in=folder)
    files = hub_here.files("org/x-oof", "dataset")
    assert files["README.md"] == b"# Card\ntheirs\nours\n" and files["b.json"] == b"{}"
    assert seen[:2] == [b"# Card\n", b"# Card\ntheirs\n"]


def test_retry_after_is_honoured(hub_here: HubServer, folder: Path) -> None:
    hub_here.faults = Faults(script=[("commit", "429")], retry_after=1)
    push(folder)
    refused, done = [moment for _, route, _, moment in hub_here.requests if route == "commit"]
    assert done - refused >= 1.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(hub_here: HubServer, folder: Path) -> None:
    hub_here.faults = Faults(script=[("commit", "429")], retry_after=3600)
    with pytest.raises(PushError, match="HTTP 429"):
        push(folder)
    assert sum(route == "commit" for _, route, _, _ in hub_here.requests) == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_only_read(
    hub_here: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        hub_here.create("org/x-oof", "dataset")
    monkeypatch.setenv("HF_TOKEN", hub_here.reader)
    with pytest.raises(PushError) as caught:
        push(folder)
    line = str(caught.value)
    assert (
        line.startswith("org/x-oof: push failed: the token may not write there: HTTP 403")
        and "\n" not in line
    )
    assert hub_here.reader not in line and caught.value.exit_code == 3
    routes = Counter(route for _, route, _, _ in hub_here.requests)
    assert routes["create"] == (not exists) and routes["preupload"] == exists and not routes["commit"]


def test_an_organisation_of_others(hub_here: HubServer, folder: Path) -> None:
    with pytest.raises(PushError, match="strangers/x: push failed: the token may not write there"):
        push_files("strangers/x", {"a.json": b"{}"}, message="m", kept_in=folder)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(rate=1.0, kinds=("503",)), "HTTP 503"),
        (Faults(rate=1.0, kinds=("drop_before",)), "RemoteProtocolError"),
        (Faults(rate=1.0, kinds=("lose_silently",)), "data/a.parquet did not arrive"),
    ],
)
def test_an_outage_ends_in_one_line_and_a_later_push_completes_it(
    hub_here: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults, reason: str
) -> None:
    monkeypatch.setenv("RARETURN_PUSH_SECONDS", "0.5")
    hub_here.faults = faults
    with pytest.raises(PushError) as caught:
        push(folder)
    line = str(caught.value)
    assert reason in line and "\n" not in line
    assert line.endswith(f"everything stays on disk in {folder}; repeat with --push_only")
    hub_here.faults = Faults()
    monkeypatch.setenv("RARETURN_PUSH_SECONDS", "20")
    push(folder)
    assert_arrived(hub_here, folder)


def test_a_pull_meets_faults(hub_here: HubServer, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "anchor")
    push_fold(run_dir, 0, "org", "demo")
    for fold in (1, 2):
        push_fold(run_dir, fold, "org", "demo")
    push_run(run_dir, "org", "demo", model_card=CARD)
    hub_here.faults = Faults(
        script=[("info", "503"), ("tree", "drop_before"), ("resolve", "500"), ("resolve", "502")]
    )
    assert (read_run("org/demo-oof:anchor").oof.logits == read_run(run_dir).oof.logits).all()
    assert hub_here.faults.script == []


def test_a_collection_that_cannot_be_made_is_a_warning(
    hub_here: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run(tmp_path / "anchor")
    hub_here.faults = Faults(script=[("collection", "500"), ("collection_add", "drop_after")])
    push_run(run_dir, "org", "demo", model_card=CARD)
    (collection,) = hub_here.collections.values()
    assert [item["id"] for item in collection["items"]] == ["org/demo-anchor", "org/demo-oof"]
    monkeypatch.setenv("RARETURN_PUSH_SECONDS", "0.5")
    hub_here.collections.clear()
    hub_here.faults = Faults(script=[("collection", "503")] * 1000)
    push_run(run_dir, "org", "demo", model_card=CARD)
    assert "collection 'demo' of org: not updated: HTTP 503" in caplog.text


# ------------------------------------------------------------------------------------------------- several processes

WORKER = """
import sys
from rareturn.runs.publish import push_fold, push_run
shared, fold, own, card = sys.argv[1:]
push_fold(shared, int(fold), "org", "demo")
push_run(own, "org", "demo", model_card=card)
"""


def push_under_fire(python: str, hub: HubServer, run_dir: Path, folds: int) -> None:
    """One process a fold, all at once: each pushes its fold of a shared run, then the facts of a run of its own."""
    workers = []
    for fold in range(folds):
        own = make_run(
            run_dir.parent / f"own-{run_dir.name}-{fold}", name=f"own-{run_dir.name}-{fold}", adapters=False
        )
        command = [python, "-c", WORKER, run_dir, str(fold), own, CARD]
        workers.append(
            subprocess.Popen(
                command, cwd=ROOT, env=hub.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors[-2000:]


def make_shared_run(run_dir: Path, folds: int) -> Path:
    """A run of that many folds, with random bytes for adapters."""
    make_run(run_dir, name=run_dir.name, adapters=False, tests=False)
    for fold in range(folds):
        for split in ("oof", "test"):
            write_bytes(table_path(run_dir, split, fold), os.urandom(20_000))
        write_bytes(adapter_dir(run_dir, fold) / "adapter_model.safetensors", os.urandom(300_000))
        write_json(adapter_dir(run_dir, fold) / "adapter_config.json", {"fold": fold})
        write_json(metrics_path(run_dir, fold), {"fold": fold})
    return run_dir


def lost_files(hub: HubServer, run_dir: Path, folds: int) -> list[str]:
    """Files of a run folder whose SHA-256 on the Hub is not that on the disk."""
    model, tables = hub.files(f"org/demo-{run_dir.name}"), hub.files("org/demo-oof", "dataset")
    pairs = {}
    for fold in range(folds):
        inside = run_dir / f"fold-{fold}"
        pairs[inside / "metrics.json"] = model.get(f"fold-{fold}/metrics.json")
        for path in (inside / "adapter").iterdir():
            pairs[path] = model.get(f"fold-{fold}/{path.name}")
        for split in ("oof", "test"):
            place = f"data/{run_dir.name}/{split}-fold-{fold}.parquet"
            pairs[table_path(run_dir, split, fold)] = tables.get(place)
    return [
        str(path)
        for path, arrived in pairs.items()
        if arrived is None or hashlib.sha256(arrived).digest() != hashlib.sha256(path.read_bytes()).digest()
    ]


def undone_files(hub: HubServer) -> list[str]:
    """Files that a commit removed or changed, dataset cards aside: each push adds, none touches another's."""
    undone = []
    for repo in hub.repos.values():
        for before, after in zip(repo.commits, repo.commits[1:], strict=False):
            assert after.parent == before.oid
            undone += [
                f"{repo.id} {after.message}: {path}"
                for path, entry in before.files.items()
                if path != "README.md" and after.files.get(path) != entry
            ]
    return undone


def test_five_processes_push_at_once_under_fire(python: str, hub: HubServer, tmp_path: Path) -> None:
    run_dir = make_shared_run(tmp_path / "anchor", 5)
    hub.faults = Faults(rate=0.3, seed=1)
    push_under_fire(python, hub, run_dir, 5)
    assert sum(hub.faults.met.values()) > 50, hub.faults.met
    assert lost_files(hub, run_dir, 5) == [] and undone_files(hub) == []
    # Five commits of folds, whatever was lost or answered twice.
    assert sorted(commit.message for commit in hub.commits("org/demo-anchor")[1:]) == [
        f"anchor: fold {fold}" for fold in range(5)
    ]
    card = hub.files("org/demo-oof", "dataset")["README.md"].decode()
    configs = yaml.safe_load(card.split("---\n")[1])["configs"]
    assert {config["config_name"] for config in configs} == {f"own-anchor-{fold}" for fold in range(5)}


@pytest.mark.soak
def test_soak_a_hundred_pushes_under_fire(python: str, hub: HubServer, tmp_path: Path) -> None:
    """Twenty rounds of five processes at 30 % faults; prints the figures for docs/LOG.md (pytest -s)."""
    hub.faults = Faults(rate=0.3, seed=2)
    lost = []
    for turn in range(20):
        run_dir = make_shared_run(tmp_path / f"round-{turn}", 5)
        push_under_fire(python, hub, run_dir, 5)
        lost += lost_files(hub, run_dir, 5)
    kinds = Counter()
    for met, count in hub.faults.met.items():
        kinds[met.split()[1]] += count
    print(
        f"\npushes of folds: 100; requests: {len(hub.requests)}; faults: {sum(kinds.values())} {dict(kinds)}; "
        f"files lost: {len(lost)}; files undone: {len(undone_files(hub))}"
    )
    assert lost == [] and undone_files(hub) == []
