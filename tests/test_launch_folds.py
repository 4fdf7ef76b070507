"""The launcher of folds, driven as a user does, with a small script of the test's own in place of a training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "scripts" / "launch_folds.sh"
SLURM = ROOT / "scripts" / "slurm_folds.sbatch"

# Takes the flags that the launcher gives; skips a complete fold, fails in FAIL, hangs (with a child) if HANG is set.
TRAINING = """
import json, os, subprocess, sys, time
flags = sys.argv[1:]
fold = flags[flags.index("--fold") + 1]
run = os.environ["RUN"]
folder = os.path.join(run, "fold-" + fold)
metrics = os.path.join(folder, "metrics.json")
if os.path.exists(metrics):
    print("complete")
    sys.exit()
os.makedirs(folder, exist_ok=True)
if os.environ.get("HANG"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(os.path.join(folder, "pids"), "w") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
began = time.time()
time.sleep(float(os.environ.get("NAP", "0")))
print("training with", flags)
if fold in os.environ.get("FAIL", "").split():
    print("the loss is not finite", file=sys.stderr)
    sys.exit(int(os.environ.get("STATUS_" + fold, "3")))
seen = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "threads": os.environ.get("OMP_NUM_THREADS"), "flags": flags}
with open(metrics, "w") as file:
    json.dump({"eval": {"macro_f1_positive": 0.25 + int(fold) / 100}, "began": began, "ended": time.time(), **seen}, file)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "training.py").write_text(TRAINING)
    (tmp_path / "recipe.yaml").write_text("num_folds: 3\noutput_dir: run\n")
    return tmp_path


def environment(place: Path, **variables: str) -> dict[str, str]:
    cleared = ("GPUS", "JOBS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if key not in cleared}
    return {**kept, "SCRIPT": str(place / "training.py"), "RUN": "run", "GPUS": "", **variables}


def launch(place: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCHER), "recipe.yaml", *flags]
    env = environment(place, **variables)
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120)


def metrics(place: Path, run: str = "run") -> list[dict]:
    files = sorted((place / run).glob("fold-*/metrics.json"))
    return [json.loads(file.read_text()) for file in files]


def table(output: str) -> dict[int, tuple[str, str]]:
    rows = re.findall(r"^ +(\d+)  (\w+) +\d+ +(\S+)$", output.split("macro_f1_positive\n")[-1], re.MULTILINE)
    return {int(fold): (status, score) for fold, status, score in rows}


def test_failed_folds_are_named_and_complete_ones_skipped(place: Path) -> None:
    ended = launch(place, "--seed", "7", "--run_name", "two words", FAIL="0 2")
    assert ended.returncode == 1
    assert table(ended.stdout) == {0: ("failed", "-"), 1: ("done", "0.2600"), 2: ("failed", "-")}
    assert ended.stderr.endswith("launch_folds.sh: error: failed folds: 0 2\n")
    assert ended.stderr.count("the loss is not finite") == 2
    assert "the loss is not finite" in (place / "run/logs/fold-2.log").read_text()
    (seen,) = metrics(place)
    assert seen["flags"] == [
        "--config",
        "recipe.yaml",
        "--fold",
        "1",
        "--seed",
        "7",
        "--run_name",
        "two words",
    ]
    assert seen["gpu"] == ""

    again = launch(place)
    assert again.returncode == 0
    assert table(again.stdout) == {0: ("done", "0.2500"), 1: ("skipped", "0.2600"), 2: ("done", "0.2700")}
    assert re.search(
        r"^fold 1 \(cpu\): skipped after \d+ s, macro_f1_positive 0\.2600$", again.stdout, re.MULTILINE
    )
    log = (place / "run/logs/fold-1.log").read_text()
    assert log.index("training with") < log.index("complete")


def test_one_fold_a_gpu_at_a_time_and_flags_over_the_recipe(place: Path) -> None:
    flags = ("--num_folds=4", "--output_dir", "an other run")
    ended = launch(place, *flags, GPUS="0 1", NAP="0.4", RUN="an other run")
    assert ended.returncode == 0 and len(table(ended.stdout)) == 4
    seen = metrics(place, "an other run")
    assert sorted({fold["gpu"] for fold in seen}) == ["0", "1"]
    for gpu in "01":
        spans = sorted((fold["began"], fold["ended"]) for fold in seen if fold["gpu"] == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert any(
        a["began"] < b["ended"] and b["began"] < a["ended"] for a in seen for b in seen if a["gpu"] < b["gpu"]
    )
    assert not (place / "run").exists()


def test_a_fold_that_the_recipe_names_is_launched_alone(place: Path) -> None:
    (place / "recipe.yaml").write_text("num_folds: 3\noutput_dir: run\nfold: 1\n")
    assert table(launch(place).stdout) == {1: ("done", "0.2600")}
    assert table(launch(place, "--fold=2").stdout) == {2: ("done", "0.2700")}


def test_folds_beside_each_other_share_the_cores(place: Path) -> None:
    assert launch(place, "--num_folds", "2", JOBS="2").returncode == 0
    assert {fold["threads"] for fold in metrics(place)} == {str(max(1, (os.cpu_count() or 1) // 2))}


def test_no_token_in_a_log(place: Path) -> None:
    assert (
        launch(place, "--hub_token", "hf_a", "--push_to_hub_token=hf_b", "--tokens_per_batch", "9").returncode
        == 0
    )
    for fold in range(3):
        first_line = (place / f"run/logs/fold-{fold}.log").read_text().splitlines()[0]
        assert "hf_" not in first_line
        assert first_line.endswith("--hub_token *** --push_to_hub_token=*** --tokens_per_batch 9")


def test_a_mistake_in_the_recipe_is_said_before_any_fold_starts(place: Path, python: str) -> None:
    (place / "recipe.yaml").write_text("model_name_or_path: nowhere\noutput_dir: run\nmax_seq_len: 9\n")
    env = {key: value for key, value in environment(place, PYTHON=python).items() if key != "SCRIPT"}
    done = subprocess.run([LAUNCHER, "recipe.yaml"], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not (place / "run").exists()
    (line,) = done.stderr.splitlines()
    assert (
        line
        == "run_classification.py: error: recipe.yaml: unknown key 'max_seq_len'; did you mean 'max_seq_length'?"
    )


def test_mistakes_in_the_flags_are_status_2_and_other_failures_1(place: Path) -> None:
    assert launch(place, FAIL="0 1", STATUS_0="2", STATUS_1="2").returncode == 2
    assert launch(place, FAIL="0 1", STATUS_0="3", STATUS_1="2").returncode == 1


def test_help(tmp_path: Path) -> None:
    for words in (["-h"], ["recipe.yaml", "--help"]):
        done = subprocess.run([LAUNCHER, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.startswith("All folds of a run") and "SCRIPT" in done.stdout.splitlines()[-1]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended, and waits for its parent to ask how, does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_no_orphan(place: Path, sent: signal.Signals, status: int) -> None:
    env = environment(place, GPUS="0,1", HANG="1")
    command = [str(LAUNCHER), "recipe.yaml"]
    process = subprocess.Popen(
        command,
        cwd=place,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background may have been told to ignore Ctrl-C, and a shell cannot trap what it ignores.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    files = [place / f"run/fold-{fold}/pids" for fold in (0, 1)]
    try:
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text().endswith("\n") for file in files):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        pids = [int(pid) for file in files for pid in file.read_text().split()]
        assert len(pids) == 4 and all(map(alive, pids))
        # As a terminal does for Ctrl-C: to the launcher's process group, which the folds are not in.
        os.killpg(process.pid, sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert "stopping folds 0 1" in errors
    assert not any(map(alive, pids))
    assert not (place / "run/fold-2").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "variables", "problem"),
    [
        ("recipe.yaml", ("--fold", "3"), {}, "fold must be one of 0 to 2, not '3'"),
        ("recipe.yaml", ("--num-folds", "many"), {}, "num_folds must be a number from 2 up, not 'many'"),
        ("empty.yaml", (), {}, "empty.yaml: output_dir is neither in the recipe nor among the flags"),
        ("recipe.yaml", (), {"JOBS": "two"}, "JOBS must be a positive number, not 'two'"),
        ("recipe.yaml", (), {"SCRIPT": "gone.py"}, "gone.py: no such script"),
    ],
)
def test_mistakes(
    place: Path, recipe: str, flags: tuple[str, ...], variables: dict[str, str], problem: str
) -> None:
    (place / "empty.yaml").write_text("seed: 1\n")
    env = environment(place, **variables)
    ended = subprocess.run(
        [str(LAUNCHER), recipe, *flags], cwd=place, env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"launch_folds.sh: error: {problem}") and ended.stderr.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["empty.yaml", "recipe.yaml", "training.py"]


def test_a_slurm_job_runs_its_fold(place: Path) -> None:
    env = environment(place, SLURM_ARRAY_TASK_ID="2", CUDA_VISIBLE_DEVICES="0")
    command = ["bash", str(SLURM), "recipe.yaml", "--seed", "7"]
    subprocess.run(command, cwd=place, env=env, check=True, timeout=60)
    (seen,) = metrics(place)
    assert seen["flags"] == ["--config", "recipe.yaml", "--fold", "2", "--seed", "7"]
    del env["SLURM_ARRAY_TASK_ID"]
    ended = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "usage: sbatch --array=0-4" in ended.stderr


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, "7_0\n"), (signal.SIGTERM, "")])
def test_a_slurm_job_saves_and_queues_itself_again(place: Path, sent: signal.Signals, requeued: str) -> None:
    """`--signal` sends USR1 to the batch shell alone; on TERM (preempted, cancelled) Slurm knows what follows."""
    saving = "import pathlib, signal, sys, time\ndef save(*_):\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n"
    saving += "    sys.exit(143)\nsignal.signal(signal.SIGTERM, save)\npathlib.Path('up').touch()\ntime.sleep(600)\n"
    (place / "training.py").write_text(saving)
    (place / "scontrol").write_text('#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >>queue\n')
    (place / "scontrol").chmod(0o755)
    path = f"{place}:{os.environ['PATH']}"
    env = environment(place, SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_JOB_ID="7", PATH=path)
    job = subprocess.Popen(["bash", str(SLURM), "recipe.yaml"], cwd=place, env=env)
    try:
        deadline = time.monotonic() + 60
        while not (place / "up").exists():
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        job.send_signal(sent)
        assert job.wait(60) == 143
    finally:
        job.kill()
    assert (place / "saved").exists()
    queue = place / "queue"
    assert (queue.read_text() if queue.exists() else "") == requeued
    assert "#SBATCH --signal=B:USR1@120\n" in SLURM.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    subprocess.run(["shellcheck", str(LAUNCHER), str(SLURM)], check=True)
