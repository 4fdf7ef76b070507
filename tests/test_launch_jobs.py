"""Folds as Jobs of the Hub: sent by the real client, and run by the loopback Hub in empty folders, from the wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hub_jobs import Job
from hub_server import HubServer
from running import run_script
from tiny_models import make_tiny_encoder

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import launch_jobs  # noqa: E402

RECIPE = {
    "model_name_or_path": "org/tiny",
    "tuning": "full",
    "label_guide": str(ROOT / "data/demo/label_guide.yaml"),
    "train_file": "org/demo:train.json",
    "extra_train_file": "org/demo:dmrs_examples.csv",
    "test_file": "org/demo:test.json",
    "do_predict": True,
    "output_dir": "outputs/small",
    "num_folds": 2,
    "num_train_epochs": 4,
    "max_seq_length": 32,
    "max_train_samples": 64,
    "logging_steps": 1,
    "hub_namespace": "org",
    "hub_name": "sys",
}


@pytest.fixture
def place(hub_here: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe; its rows are on the Hub."""
    demo = {name: (ROOT / "data/demo" / name).read_bytes() for name in ("train.json", "test.json")}
    demo["dmrs_examples.csv"] = (ROOT / "label_guides/dmrs_examples.csv").read_bytes()
    hub_here.put("org/demo", demo, "dataset")
    hub_here.put("org/tiny", {"config.json": b"{}"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_jobs, "POLL_SECONDS", 0.1)
    return tmp_path


def launch(*flags: str, first: int = 0, end: int = 2) -> int:
    words = ("recipe.yaml", first, end, "outputs/small", "--jobs", "l4x1", "--timeout", "90m", *flags)
    return run_script(launch_jobs.main, *words)


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def epochs(job: Job) -> list[float]:
    """The epochs in a training's log lines."""
    return [float(epoch) for line in job.lines for epoch in re.findall(r"'loss'.*'epoch': '?([\d.]+)", line)]


def test_jobs_from_the_first_to_a_complete_run(hub_here: HubServer, place: Path, capfd) -> None:
    model = Path(make_tiny_encoder(place / "encoder"))
    hub_here.put("org/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
    jobs, before = hub_here.jobs, set(hub_here.repos)

    # What would be sent, and nothing sent
    assert launch("--dry_run") == 0
    said = capfd.readouterr().out
    assert "l4x1: $0.80/h, at most 2 x 90m: $2.39, paid by org" in said
    commands = [line for line in said.splitlines() if line.startswith("hf jobs run")]
    assert len(commands) == 2 and set(hub_here.repos) == before and not jobs.all
    assert {method for method, *_ in hub_here.requests} == {"GET"}

    # A machine that goes away after a checkpoint
    bucket = jobs.bucket("org/sys-small")

    def lose_machine() -> None:
        wait_until(lambda: [*bucket.glob("fold-0/checkpoints/*/sealed.json")])
        jobs.stop(next(iter(jobs.all.values())), signal.SIGKILL, "ERROR")

    threading.Thread(target=lose_machine).start()
    assert launch(end=1) == 1
    said = capfd.readouterr()
    (lost,) = jobs.all.values()
    assert re.search(rf"^   0  {lost.id}  ERROR  +\d+$", said.out, re.MULTILINE)
    assert "launch_jobs.py: error: failed folds: 0; see outputs/small/logs" in said.err
    assert Path("outputs/small/logs/fold-0.log").read_text().splitlines() == lost.lines

    # The same job by hand
    env = hub_here.env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(shlex.split(commands[0]), env=env, check=True, capture_output=True)
    assert [*jobs.all.values()][1].spec == lost.spec

    # Ctrl-C
    command = [ROOT / "scripts/launch_folds.sh", "recipe.yaml", "--jobs", "l4x1", "--timeout=90m"]
    # With SCRIPT the launcher does not read the script's help, which takes seconds.
    settings = {"PYTHON": sys.executable, "SCRIPT": str(ROOT / "run_classification.py")}
    how = {"env": hub_here.env | settings, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    asked = len(hub_here.requests)
    launcher = subprocess.Popen(command, text=True, start_new_session=True, **how, **default)
    try:
        # It has started the other fold, and follows both.
        wait_until(lambda: "job" in [route for _, route, *_ in hub_here.requests[asked:]])
        os.killpg(launcher.pid, signal.SIGINT)
        _, errors = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    resumed, other = [*jobs.all.values()][1:]
    assert launcher.returncode == 130, errors
    assert f"  hf jobs cancel org/{other.id}\n" in errors and other.stage == "RUNNING"

    # To the end
    assert launch() == 0
    assert "pushed to org/sys-oof:small, and fetched into outputs/small" in capfd.readouterr().out
    assert [job.stage for job in jobs.all.values()] == ["ERROR", "COMPLETED", "COMPLETED"]
    assert epochs(lost)[0] < 1 <= epochs(resumed)[0] and epochs(other)[0] < 1
    assert other.spec["command"] == [word.replace("--fold 0", "--fold 1") for word in lost.spec["command"]]
    tables, models = hub_here.files("org/sys-oof", "dataset"), hub_here.files("org/sys-small")
    folds = {f"{split}-fold-{fold}.parquet" for split in ("oof", "test") for fold in (0, 1)}
    assert {f"data/small/{name}" for name in folds} <= set(tables) and "fold-1/metrics.json" in models
    info = json.loads(models["run.json"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert info["git_commit"] == (head.stdout.strip() or None)
    folder = jobs.root / other.id
    assert (folder / "site/rareturn").is_dir() and not [*(folder / "work").iterdir()]

    # The folds are here as if they had been trained here
    here = Path("outputs/small")
    for name in folds:
        split, _, file = name.partition("-")
        assert (here / split / file).read_bytes() == tables[f"data/small/{name}"]
    pushed = {path for path in models if path.startswith("fold-1/")}
    laid = {path.relative_to(here).as_posix(): path for path in here.glob("fold-1/**/*") if path.is_file()}
    assert {path.replace("/adapter", "") for path in laid} == pushed and len(pushed) > 3
    assert all(path.read_bytes() == models[name.replace("/adapter", "")] for name, path in laid.items())

    # Nothing is left to do
    asked = len(hub_here.requests)
    assert launch() == 0 and len(jobs.all) == 3
    assert capfd.readouterr().out == "fold 0, 1 of org/sys-small: complete on the Hub\n"
    assert {method for method, *_ in hub_here.requests[asked:]} == {"GET"}

    # What is missing here is fetched; a folder that holds another run is refused before anything is paid for
    (here / "test/fold-1.parquet").unlink()
    shutil.rmtree(here / "fold-0")
    assert launch() == 0 and len(jobs.all) == 3
    assert (here / "test/fold-1.parquet").read_bytes() == tables["data/small/test-fold-1.parquet"]
    assert (here / "fold-0/metrics.json").read_bytes() == models["fold-0/metrics.json"]
    ours = (here / "run.json").read_bytes()
    theirs = json.loads(ours)
    theirs["identity"] |= {"digest": "0", "flags": theirs["identity"]["flags"] | {"num_train_epochs": 9}}
    (here / "run.json").write_text(json.dumps(theirs))
    capfd.readouterr()
    assert launch() == 2 and "--num_train_epochs: 9 there, 4" in capfd.readouterr().err
    (here / "run.json").write_bytes(ours)

    assert launch("--num_folds", "3", end=3) == 2 and len(jobs.all) == 3
    assert (
        "org/sys-oof:small: --num_folds: 2 there, 3 asked for; use another --run_name"
        in capfd.readouterr().err
    )

    # A fold whose test table is still to be made is not taken for one of this machine alone
    newest = hub_here.repos["dataset", "org/sys-oof"].commits[-1].files
    made = newest.pop("data/small/test-fold-0.parquet")
    assert launch("--dry_run") == 0 and "fold 0 of org/sys-small: to start" in capfd.readouterr().out
    newest["data/small/test-fold-0.parquet"] = made

    # A system whose run was trained there: it is fetched, and the rest is done here
    system = {"output": "outputs/all", "runs": {"small": {"config": str(place / "recipe.yaml")}}}
    system["data"] = {"label_guide": RECIPE["label_guide"], "test_file": RECIPE["test_file"]}
    system["ensemble"] = {"method": "prior", "repeats": 1}
    system["runs"]["small"] |= {"run_name": "small"}
    Path("system.yaml").write_text(yaml.safe_dump(system))
    words = ("system.yaml", "--jobs", "l4x1", "--hub_namespace", "org", "--hub_name", "sys")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/system.py", *words],
        env=hub_here.env | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(jobs.all) == 3 and "fold 0, 1 of org/sys-small: complete on the Hub" in done.stdout
    bundle = json.loads(hub_here.files("org/sys")["ensemble.json"])
    assert (
        bundle["runs"][0]["model"]["repo_id"] == "org/sys-small" and Path("outputs/all/report.html").is_file()
    )

    # The token is a secret
    secret = hub_here.writer.encode()
    assert lost.spec["secrets"] == {"HF_TOKEN": hub_here.writer}
    assert hub_here.writer not in json.dumps({**lost.spec, "secrets": None}) + "".join(commands) + errors
    files = [path for folder in (place, jobs.root) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if secret in path.read_bytes()]
    assert not [path for path, content in {**tables, **models}.items() if secret in (content or b"")]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--jobs", "h900"), "--jobs h900: not one of the Hub's machines: cpu-basic, l4x1, l4x4"),
        (("--jobs", "l4x4"), "--jobs l4x4: 4 GPUs, but a fold takes one"),
        (("--timeout", "soon"), "--timeout soon: a number and s, m, h or d, such as 6h"),
        (("--hub_name=",), "--hub_name is missing: a job loads from the Hub and pushes there"),
        (("--hub_token", "hf_a"), "a token among the flags would be seen in the job"),
        (
            ("--train-file", "recipe.yaml"),
            "--train_file recipe.yaml: on this machine: a job reads from the Hub only",
        ),
        (("--augmented_file", "more.jsonl"), "--augmented_file more.jsonl: on this machine"),
        (("--extra_train_file", "more.csv"), "--extra_train_file more.csv: on this machine"),
        (("--test_file", "org/gone:test.json"), "org/gone: no such repo on the Hub"),
        (("--model_name_or_path", "."), "--model_name_or_path .: on this machine"),
        (("--label_guide", "gone.yaml"), "gone.yaml: cannot read the label guide"),
        (("--hub_namespace", "strangers"), "strangers/sys-small: cannot push: the token may not write there"),
    ],
)
def test_mistakes_are_one_line_and_send_nothing(
    hub_here: HubServer, place: Path, capsys, flags: tuple[str, ...], problem: str
) -> None:
    assert launch(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"launch_jobs.py: error: {problem}")
    assert not hub_here.jobs.all and {method for method, *_ in hub_here.requests} <= {"GET"}


def test_a_run_of_this_machine_is_not_paid_for_again(hub_here: HubServer, place: Path, capsys) -> None:
    here = Path("outputs/small")
    for name in ("run.json", "oof/fold-1.parquet", "fold-1/metrics.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    assert launch() == 2 and not hub_here.jobs.all
    problem = "outputs/small: fold 1 is complete here and not on the Hub: push it (--push_only)"
    assert problem in capsys.readouterr().err
    (here / "fold-1/metrics.json").unlink()
    assert launch() == 2 and not hub_here.jobs.all
    assert "outputs/small: holds a run that is not on the Hub" in capsys.readouterr().err


def test_a_token_that_may_only_read_and_a_hub_that_refuses(
    hub_here: HubServer, place: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_here, "strangers", set())
    monkeypatch.setenv("HF_TOKEN", hub_here.reader)
    assert launch() == 2 and not hub_here.jobs.all
    assert "org/sys-small: cannot push: the token may not write there" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub_here.writer)
    hub_here.faults.script.append(("job_start", "503"))
    assert launch() == 2 and not hub_here.jobs.all
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "launch_jobs.py: error: the Hub: HTTP 503; jobs that were started go on"
