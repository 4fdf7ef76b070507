"""A fold that is killed again and again: it ends with the tables of an undisturbed one, here and on the Hub.

Half of the kills are SIGTERM, as of a preempted node: in training, that is a checkpoint of the step and status 143.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_server import HubServer
from running import run_script, sigterm_in_step, words_of
from tiny_models import make_tiny_encoder

from rareturn.files import read_json, write_bytes
from rareturn.models.training import CheckpointSeal
from rareturn.runs.folder import adapter_dir, fold_is_complete, table_path
from rareturn.runs.tables import read_table

ROOT = Path(__file__).parent.parent
STAGES = ("start", "training", "prediction", "push")
WEIGHTS = (
    1,
    4,
    3,
    2,
    2,
)  # of the next kill's stage among those that are not over; the last: to let the fold end
NUM_FOLDS = 20


def start(python: str, words: list[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """The script, from its command line; `communicate` waits for its end, and of a killed one too."""
    command = [python, str(ROOT / "run_classification.py"), *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def kill_a_fold(python: str, hub: HubServer, tmp_path: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a fold at random moments until it has died `kills` times, then let it end; compare all that it left.

    A moment is drawn in two steps, a stage and then a time within it, because prediction and push are short beside the
    training and would hardly ever be hit. A fold that ends before the number is up is followed by the next one.

    Returns:
        How often the process died, by what it was last seen doing, and how many folds it took.
    """
    model = make_tiny_encoder(tmp_path / "encoder")

    def launch(run_dir: Path, fold: int) -> subprocess.Popen[str]:
        words = words_of(
            model_name_or_path=model,
            tuning="full",
            train_file=ROOT / "data/demo/train.json",
            test_file=ROOT / "data/demo/test.json",
            do_predict=True,
            output_dir=run_dir,
            fold=fold,
            num_folds=NUM_FOLDS,
            num_train_epochs=3,
            max_seq_length=48,
            save_strategy="steps",
            save_steps=3,
            bf16=False,
            learning_rate=1e-3,
            push_to_hub=True,
            hub_namespace="team",
            hub_name=f"{run_dir.parent.name}-{kills}",
        )
        return start(python, words, hub.env)

    def doing(run_dir: Path, fold: int) -> int:
        """The number of the stage that the files tell of."""
        if fold_is_complete(run_dir, fold) and table_path(run_dir, "test", fold).is_file():
            return 3
        if adapter_dir(run_dir, fold).exists():
            return 2
        return 1 if list(run_dir.glob(f"fold-{fold}/checkpoints/checkpoint-*")) else 0

    rng = random.Random(seed)
    undisturbed, disturbed = tmp_path / "calm" / "run", tmp_path / "killed" / "run"
    died = dict.fromkeys(STAGES, 0)
    fold, seconds = 0, [0.0] * len(STAGES)
    while True:
        process = launch(undisturbed, fold)
        spent, before = [0.0] * len(STAGES), time.monotonic()
        while process.poll() is None:
            time.sleep(0.005)
            now = time.monotonic()
            spent[doing(undisturbed, fold)] += now - before
            before = now
        assert process.returncode == 0, process.communicate()[0][-3000:]
        seconds = [min(filter(None, pair), default=0.0) for pair in zip(spent, seconds, strict=True)]
        stamps: dict[Path, int] = {}
        while sum(died.values()) < kills:
            reached = doing(disturbed, fold)
            (stage,) = rng.choices(range(reached, len(WEIGHTS)), WEIGHTS[reached:])
            process = launch(disturbed, fold)
            while process.poll() is None and doing(disturbed, fold) < stage:
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.0, 0.6) * seconds[doing(disturbed, fold)])
                break
            process.terminate() if rng.random() < 0.5 else process.kill()
            said, _ = process.communicate()
            if process.returncode == 0:  # it had just ended by itself
                break
            # The middle one: before the script's first line. The last goes through the script's hands.
            assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 143), said[-3000:]
            died[STAGES[doing(disturbed, fold)]] += 1
            # Whatever is there under its own name is whole.
            for table in disturbed.glob("*/fold-*.parquet"):
                read_table(table)
            for file in disturbed.rglob("*.json"):
                if "checkpoints" not in file.parts:
                    json.loads(file.read_text())
            weights = adapter_dir(disturbed, fold) / "model.safetensors"
            if weights.exists():
                stamp = weights.stat().st_mtime_ns
                assert stamps.setdefault(weights, stamp) == stamp, "a trained fold was trained again"
        process = launch(disturbed, fold)
        said, _ = process.communicate()
        assert process.returncode == 0, said[-3000:]
        for split in ("oof", "test"):
            one, other = (table_path(run, split, fold).read_bytes() for run in (undisturbed, disturbed))
            assert one == other, f"fold {fold}: {split}"
        assert not list((disturbed / f"fold-{fold}").glob("checkpoints")), "checkpoints of a complete fold"
        fold += 1
        if sum(died.values()) >= kills:
            break

    hub_files = hub.files(f"team/killed-{kills}-run") | {
        f"tables/{path}": content
        for path, content in hub.files(f"team/killed-{kills}-oof", "dataset").items()
    }
    for done in range(fold):
        folder = adapter_dir(disturbed, done)
        for path in folder.iterdir():
            assert sha256(hub_files[f"fold-{done}/{path.name}"]) == sha256(path.read_bytes()), path
        for split in ("oof", "test"):
            local = table_path(disturbed, split, done).read_bytes()
            assert sha256(hub_files[f"tables/data/run/{split}-fold-{done}.parquet"]) == sha256(local)
    return died | {"folds": fold}


def test_a_fold_killed_at_random_moments(python: str, hub: HubServer, tmp_path: Path):
    died = kill_a_fold(python, hub, tmp_path, kills=20, seed=7)
    assert sum(died[stage] for stage in STAGES) == 20
    assert min(died[stage] for stage in STAGES[1:]) > 0, died


@pytest.mark.soak
def test_soak_forty_kills(python: str, hub: HubServer, tmp_path: Path):
    died = kill_a_fold(python, hub, tmp_path, kills=40, seed=11)
    print(f"\n40 kills: {died}; rows lost: 0")


FOLD = {
    "tuning": "full",
    "train_file": ROOT / "data/demo/train.json",
    "num_folds": 3,
    "num_train_epochs": 1,
    "max_seq_length": 48,
    "max_train_samples": 96,
    "learning_rate": 1e-3,
}


def sealed_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that a next launch takes for whole."""
    sealed = run_dir.glob(f"fold-0/checkpoints/checkpoint-*/{CheckpointSeal.NAME}")
    return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in sealed)


def test_a_preempted_fold_saves_its_step_and_ends_in_equal_bytes(tmp_path: Path, monkeypatch, capsys):
    """In the middle of the only epoch, which is when the first checkpoint would be written; and one tracker more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import run_classification

    flags = FOLD | {"model_name_or_path": make_tiny_encoder(tmp_path / "encoder")}
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    assert run_script(run_classification.main, **flags, output_dir=calm) == 0
    watched = flags | {"output_dir": stopped, "report_to": "tensorboard", "logging_steps": 1}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(stopped / "fold-0/logs"))  # and is gone after the test
    with sigterm_in_step(5):
        assert run_script(run_classification.main, **watched) == 143
    assert sealed_steps(stopped) == [5] and not adapter_dir(stopped, 0).exists()
    assert "Traceback" not in capsys.readouterr().err
    # Trackers and how they log are no part of a run's identity: this launch continues that one.
    watched |= {"logging_steps": 2, "logging_first_step": True, "project": "other", "disable_tqdm": True}
    assert run_script(run_classification.main, **watched) == 0
    for file in ("oof/fold-0.parquet", "fold-0/adapter/model.safetensors"):
        assert sha256((calm / file).read_bytes()) == sha256((stopped / file).read_bytes()), file
    curves = EventAccumulator(str(stopped / "fold-0/logs")).Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    (score,) = curves.Scalars("eval/macro_f1_positive")
    found = read_json(stopped / "fold-0/metrics.json")["macro_f1_positive"]
    assert score.step == 12 and score.value == pytest.approx(found)


def test_sigterm_outside_of_training_leaves_nothing_half_written(tmp_path: Path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b"old")

    def main() -> None:
        write_bytes(tmp_path / "a.json", b"new")

    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert run_script(main) == 143
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"old")]


def test_of_two_processes_one_is_told_and_both_stop_after_the_same_step(python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    flags = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 50}
    flags |= {"model_name_or_path": make_tiny_encoder(tmp_path / "encoder"), "output_dir": run_dir}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]  # as torchrun starts them
    pair = [start(python, words_of(**FOLD | flags), env) for env in ranks]
    try:
        while not sealed_steps(run_dir):
            assert all(process.poll() is None for process in pair)
            time.sleep(0.01)
        pair[1].terminate()
        said = [process.communicate(timeout=120)[0][-3000:] for process in pair]
        assert [process.returncode for process in pair] == [143, 143], said
    finally:
        for process in pair:
            process.kill()
    newest = max(run_dir.glob("fold-0/checkpoints/checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert (newest / CheckpointSeal.NAME).exists() and int(newest.name[11:]) < 50 * 6


def test_a_full_disk_is_one_line_and_earlier_files_stay_readable(tmp_path: Path, python: str):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        words = words_of(
            model_name_or_path=make_tiny_encoder(tmp_path / "encoder"),
            tuning="full",
            train_file=ROOT / "data/demo/train.json",
            output_dir=disk / "run",
            num_train_epochs=1,
            max_seq_length=32,
            num_folds=3,
        )
        command = [python, str(ROOT / "run_classification.py"), *words]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
        assert "no space left on the disk" in ended.stderr
        assert json.loads((disk / "run/run.json").read_text())["name"] == "run"
        assert not list(disk.rglob("*.tmp")) and not adapter_dir(disk / "run", 0).exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.rmtree(disk, ignore_errors=True)
