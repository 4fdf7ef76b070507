"""Fixtures of all tests. The Hub is always the server in `hub_server.py`; caches and tokens are never the user's own."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# huggingface_hub reads these when it is imported, so they come before any test module.
_home = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ |= {
    "HF_HOME": _home.name,
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there: a test without the `hub` fixture reaches nothing
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "XDG_CACHE_HOME": f"{_home.name}/cache",
    "RARETURN_BACKOFF_SECONDS": "0.02",
    "RARETURN_PUSH_SECONDS": "20",
    "OMP_NUM_THREADS": "1",  # tiny models, and a process with one thread may be forked
}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
for variable in (*OFFLINE, *TOKENS, *CACHES, *PROXIES, *map(str.upper, PROXIES)):
    os.environ.pop(variable, None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
from hub_server import HubServer  # noqa: E402
from warm_python import warm_python  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> None:
    """Every training collects garbage several times: half of its time, were it to look through all modules each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """A script that ran in this process had SIGTERM for itself; pytest is to end by it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An executable that does what `python` does, without its imports."""
    with warm_python(tmp_path_factory.mktemp("python")) as executable:
        yield executable


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of the test's own, for scripts in other processes: pass them `hub.env`."""
    with HubServer() as server:
        server.env = server.environment(tmp_path / "hf-home")
        yield server


@pytest.fixture
def hub_here(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The same Hub for this process too: its address, token and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for request in (_http.http_backoff, _http.http_stream_backoff.__wrapped__):
        monkeypatch.setitem(request.__kwdefaults__, "base_wait_time", 0.01)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-home" / "hub"))
    monkeypatch.setenv("HF_TOKEN", hub.writer)
    return hub
