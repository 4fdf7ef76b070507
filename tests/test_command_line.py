"""command_line.py: recipes and flags are read as a user means them, and a path that cannot be used is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "data/demo/train.json"


def augment(train_file: Path, output_file: Path) -> subprocess.CompletedProcess:
    words = ["--labels", "8", "--train_file", str(train_file), "--output_file", str(output_file)]
    return subprocess.run(
        [sys.executable, "augment.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_path_through_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    ended = augment(TRAIN, tmp_path / "file" / "variants.jsonl")
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert line.startswith("augment.py: error: ") and str(tmp_path / "file") in line
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path):
    source = tmp_path / "rows.json"
    source.write_bytes(TRAIN.read_bytes())
    source.chmod(0)
    ended = augment(source, tmp_path / "variants.jsonl")
    assert ended.returncode == 2
    assert f"augment.py: error: {source}: Permission denied" in ended.stderr.splitlines()
    assert not (tmp_path / "variants.jsonl").exists()
