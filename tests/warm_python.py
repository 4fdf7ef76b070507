"""A `python` whose processes are forked from one that has imported everything: each saves ten seconds of imports.

`python` (a fixture in `conftest.py`) is an executable. What it is told, it has the server do in a process of that
process's own: with its words, folder, environment and files; signals go there, the exit status comes back. Modules that
are imported know no variable of the new environment but those of the Hub and OMP_NUM_THREADS. SIGKILL ends the process
soon after the executable: a test that kills reads what it writes to the end. Workers of joblib and multiprocessing, which inherit
more than three files, are processes of the real interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = """
run_classification linear_probe predict ensemble zero_shot app torch.distributed.run peft bitsandbytes evaluate datasets
tensorboard sklearn.linear_model matplotlib.pyplot transformers.models.bert.modeling_bert
transformers.models.qwen3.modeling_qwen3 rareturn.classifier rareturn.models.probing rareturn.models.prompted
"""
CLIENT = """#!{executable} -IS
import json, os, signal, socket, sys
if any("multiprocessing" in word or "loky" in word for word in sys.argv):
    os.execv({executable!r}, [{executable!r}, *sys.argv[1:]])
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps([os.path.abspath(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [b"%9d" % len(request)], [0, 1, 2])
link.sendall(request)
answers = link.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(pid, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """The executable's path, in the folder; its server ends with the context."""
    address, executable = str(folder / "socket"), folder / "python"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(99)
        command = [sys.executable, __file__, str(listener.fileno())]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=ROOT, stdin=subprocess.PIPE)
    executable.write_text(CLIENT.format(executable=sys.executable, address=address))
    executable.chmod(0o755)
    try:
        yield str(executable)
    finally:
        server.kill()
        server.wait()


def serve(listener: socket.socket) -> None:
    """Fork for every client, tell it the number and the exit status, and let nothing outlive it."""
    sys.path.insert(0, str(ROOT))
    for name in PRELOAD.split():
        importlib.import_module(name)
    gc.freeze()
    clients: dict[socket.socket, int] = {}  # its process
    ends: dict[int, tuple[socket.socket, int]] = {}  # a process's descriptor: its client, its number
    while True:
        for ready in select.select([0, listener, *clients, *ends], [], [])[0]:
            if ready == 0:  # pytest is gone
                sys.exit()
            elif ready is listener:
                client, _ = listener.accept()
                size, files, *_ = socket.recv_fds(client, 9, 3)
                request = client.recv(int(size), socket.MSG_WAITALL) if size else b""
                if not size or len(request) < int(size):  # killed before it had said all
                    client.close()
                elif (pid := os.fork()) == 0:
                    be_python(files, *json.loads(request))
                else:
                    clients[client] = pid
                    ends[os.pidfd_open(pid)] = client, pid
                    tell(client, pid)
                for file in files:
                    os.close(file)
            elif ready in ends:
                client, pid = ends.pop(ready)
                os.close(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if clients.pop(client, None):
                    tell(client, status)
                    client.close()
            elif ready in clients:  # a client was killed
                os.kill(clients.pop(ready), signal.SIGKILL)
                ready.close()


def tell(client: socket.socket, number: int) -> None:
    """Unless it has been killed meanwhile."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"%d\n" % number)


def be_python(
    files: list[int], executable: str, words: list[str], folder: str, environment: dict[str, str]
) -> None:
    """In a process of its own: `executable words`, and never back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard, file in enumerate(files):
        os.dup2(file, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(folder)
    changed = {name for name, _ in os.environ.items() ^ environment.items()}
    os.environ.clear()
    os.environ.update(environment)
    sys.executable, sys.argv = executable, words
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if any(name.startswith("HF_") for name in changed):
        read_environment_of_the_hub()
    if "OMP_NUM_THREADS" in environment:
        importlib.import_module("torch").set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        status = exit_status(words)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def read_environment_of_the_hub() -> None:
    """What Hub libraries read when they are imported."""
    import datasets.config
    import huggingface_hub

    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    importlib.reload(datasets.config)


def exit_status(words: list[str]) -> int:
    """Do as `python words`; the status that it ends with."""
    while words[0] in ("-u", "-B"):
        del words[0]
    try:
        if words[0] in ("-c", "-"):
            code = words.pop(1) if words[0] == "-c" else sys.stdin.read()
            sys.path.insert(0, "")
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
        elif words[0] == "-m":
            sys.path.insert(0, os.getcwd())
            del words[0]
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
