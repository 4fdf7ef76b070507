"""The Jobs of the loopback Hub (`hub_server.py`): each is really run, in a process and an empty folder of its own.

There is no container. A volume that a job mounts at `/x` lies at `FOLDER/x`, and the words of its command are changed
accordingly; packages are taken from this interpreter's environment, so `pip install` installs what it is given and nothing
that it needs, into the job's folder. A bucket is a folder that outlives the job; its files are seen at once.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# As `GET /api/jobs/hardware` lists them: name to dollars a minute and GPUs.
FLAVORS = {"cpu-basic": (0.000167, 0), "l4x1": (0.0133, 1), "l4x4": (0.0633, 4)}


@dataclass
class Job:
    """What was asked for (the request's body), and how it goes."""

    id: str
    namespace: str
    spec: dict[str, Any]
    stage: str = "SCHEDULING"
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    stopped: str | None = None
    began: float = field(default_factory=time.monotonic)

    def describe(self) -> dict[str, Any]:
        """As the Hub shows a job: of the secrets, the names."""
        spec = {
            key: self.spec.get(key) for key in ("dockerImage", "command", "environment", "flavor", "labels")
        }
        seconds = int(time.monotonic() - self.began)
        return {
            **spec,
            "id": self.id,
            "secrets": dict.fromkeys(self.spec.get("secrets", {}), ""),
            "volumes": self.spec.get("volumes"),
            "status": {"stage": self.stage, "message": None},
            "durations": {"schedulingSecs": 0, "runningSecs": seconds, "totalSecs": seconds},
            "owner": {"id": "1", "name": self.namespace, "type": "org"},
        }


class Jobs:
    """All jobs of a server, and its buckets.

    Attributes:
        all: the jobs by id, in the order in which they came.
        root: a folder per job, and `buckets/ORG/NAME`.
    """

    def __init__(self, hub: Any):
        self.hub, self.all = hub, {}
        self._temporary = tempfile.TemporaryDirectory(prefix="hub-jobs-", ignore_cleanup_errors=True)
        self.root = Path(self._temporary.name)

    def close(self) -> None:
        for job in self.all.values():
            self.stop(job, signal.SIGKILL)
        self._temporary.cleanup()

    def bucket(self, name: str) -> Path:
        return self.root / "buckets" / name

    def start(self, namespace: str, spec: dict[str, Any]) -> Job:
        job = Job(f"{len(self.all):024x}", namespace, spec)
        self.all[job.id] = job
        folder = self.root / job.id
        places = {volume["mountPath"]: self.mount(volume, folder) for volume in spec.get("volumes", [])}

        def placed(word: str) -> str:
            for path, place in places.items():
                word = re.sub(rf"(?<![\w/.]){path}(?![\w-])", str(place), word)
            return word

        (folder / "work").mkdir(parents=True)
        site = str(folder / "site")
        pip = {"PIP_TARGET": site, "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_COMPILE": "1"}
        ours = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_", "RARETURN_")
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": site,
            **pip,
            **{
                key: value
                for key, value in self.hub.environment(folder / "hf").items()
                if key.startswith(ours)
            },
            **spec["environment"],
            **spec.get("secrets", {}),
        }
        job.process = subprocess.Popen(
            [placed(word) for word in spec["command"]],
            cwd=folder / "work",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        job.stage = "RUNNING"
        threading.Thread(target=self.watch, args=(job,), daemon=True).start()
        return job

    def mount(self, volume: dict[str, Any], folder: Path) -> Path:
        """Where a volume lies: a bucket's folder itself, a copy of a repo's files."""
        if volume["type"] == "bucket":
            place = self.bucket(volume["source"])
            assert place.is_dir(), "no such bucket"
            return place
        place, inside = folder / volume["mountPath"].lstrip("/"), f"{volume['path']}/"
        files = self.hub.files(volume["source"], volume["type"], volume.get("revision") or "main")
        for path, content in files.items():
            if path.startswith(inside):
                file = place / path.removeprefix(inside)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        return place

    def watch(self, job: Job) -> None:
        """Keep what a job says, until it ends."""
        for line in job.process.stdout:
            job.lines.append(line.rstrip("\n"))
        ended = "ERROR" if job.process.wait() else "COMPLETED"
        job.stage = job.stopped or ended

    def stop(self, job: Job, sent: signal.Signals = signal.SIGTERM, stage: str = "CANCELED") -> None:
        """End a job from outside: by hand, or as a machine that goes away does."""
        if job.process.poll() is None:
            job.stopped = stage
            os.killpg(job.process.pid, sent)
            job.process.wait()
