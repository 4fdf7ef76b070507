"""rareturn.files: a file is whole or not there, whatever happens to the process that writes it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from rareturn.errors import InputError
from rareturn.files import check_content, packaged

ROOT = Path(__file__).parent.parent

# The kernel kills a process that writes beyond this limit: in the middle of a write, at the same byte every time.
KILLED_AFTER_1000_BYTES = """
import resource, signal, sys
from rareturn.files import write_bytes

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
write_bytes(sys.argv[1], b"new" * 100_000)
"""


@pytest.mark.parametrize("present", [b"old" * 1000, None], ids=["replaced", "new"])
def test_a_process_that_dies_in_the_middle_of_a_write_leaves_what_was_there(
    present: bytes | None, tmp_path: Path
):
    path = tmp_path / "table.parquet"
    if present is not None:
        path.write_bytes(present)
    died = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_1000_BYTES, path], cwd=ROOT, capture_output=True
    )
    assert died.returncode == -signal.SIGXFSZ, died.stderr.decode()
    assert (path.read_bytes() if path.exists() else None) == present
    half = [other for other in tmp_path.iterdir() if other != path]
    assert [other.stat().st_size for other in half] == [
        1000
    ]  # it did die in the middle, and beside the place
    assert all(other.name.startswith(".") for other in half)


class Example(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    seed: int
    parts: list[int]


def test_all_problems_of_a_file_are_named_at_once():
    assert check_content(Example, {"name": "a", "seed": 1, "parts": [1]}, "run.json").parts == [1]
    with pytest.raises(InputError) as refused:
        check_content(Example, {"seed": "1", "parts": [1, None]}, "run.json")
    assert refused.value.problems == [
        "run.json: name: Field required",
        "run.json: seed: Input should be a valid integer",
        "run.json: parts.1: Input should be a valid integer",
    ]
    with pytest.raises(InputError, match=r"^run\.json: Input should be a valid dictionary"):
        check_content(Example, [], "run.json")


def test_what_is_not_code_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert packaged("label_guides/dmrs.yaml").is_file() and packaged("metrics").is_dir()
