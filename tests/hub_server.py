"""A small Hugging Face Hub on the loopback interface, for tests: what `huggingface_hub` 2.4 asks of it, and faults.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment(home))      # a script that pushes
        hub.files("org/name-oof", "dataset")                  # what has arrived

Repos (a Space's app is not run), branches (`main` only), private repos, tokens that may only read, regular and large files
(git-LFS), commits with parents, collections, Jobs (`hub_jobs.py`). Every commit keeps its whole tree. A `Faults` object makes it misbehave; see there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_jobs import FLAVORS, Jobs

LARGE = (".safetensors", ".parquet", ".bin", ".pt", ".pkl", ".png")
STATUS_FAULTS = ("409", "412", "429", "500", "502", "503")
UPLOAD_FAULTS = ("lose", "lose_silently")
FAULTS = (*STATUS_FAULTS, "drop_before", "drop_after", "slow", *UPLOAD_FAULTS)


@dataclass
class Faults:
    """When and how the server misbehaves.

    Kinds: a status that is answered with nothing done (`429` comes with Retry-After); `drop_before` and `drop_after`
    close the connection before anything is done, or after it was done and before the answer; `slow` waits; `lose`
    answers 200 to the upload of a large file and throws the bytes away (the commit of it is then refused, as the Hub
    does); `lose_silently` has the commit accepted too.

    Args:
        rate: share of requests that meet a fault, drawn with `seed`; 409 and 412 strike commits only, the losses
            uploads only.
        kinds: what is drawn from.
        script: faults met before any is drawn: (route, kind) pairs, each used once, by the first request of the route.
        retry_after: seconds named by a 429.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    script: list[tuple[str, str]] = field(default_factory=list)
    retry_after: int = 0
    slow_seconds: float = 0.2
    met: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def next(self, route: str) -> str | None:
        """The fault that a request of this route meets, if any."""
        with self._lock:
            kind = next((kind for of_route, kind in self.script if of_route == route), None)
            if kind is not None:
                self.script.remove((route, kind))
            elif self._random.random() < self.rate:
                kinds = [
                    kind
                    for kind in self.kinds
                    if (kind not in ("409", "412") or route == "commit")
                    and (kind not in UPLOAD_FAULTS or route == "upload")
                ]
                kind = self._random.choice(kinds) if kinds else None
            if kind is not None:
                self.met[f"{route} {kind}"] += 1
            return kind


@dataclass(frozen=True)
class Entry:
    """A file in a commit: its git hash, and for a large file the SHA-256 that names its bytes in the store."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, Entry]


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    commits: list[Commit]

    def at(self, revision: str) -> Commit | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class Refusal(Exception):
    """An answer that is an error: status, message, and the Hub's error code."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        self.status, self.code, self.content = status, code, {"error": message, **content}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server and its state, which tests may read and change.

    Attributes:
        url: of the server, once entered.
        writer, reader: tokens of the user `tester`, one of which may only read.
        strangers: organisations, or single repos, that the user may not write to.
        scopes: of the writing token where it is fine-grained: a namespace and what is permitted there.
        organisations: those of the user, each with the user's role in it.
        requests: (method, route, `ok` or the fault met, monotonic time) of every request.
        jobs: see `hub_jobs.Jobs`.
    """

    def __init__(self, faults: Faults | None = None):
        self.faults = faults or Faults()
        self.writer, self.reader = (
            "hf_writerwriterwriterwriterwriterwrite",
            "hf_readerreaderreaderreaderreaderread",
        )
        self.strangers = {"strangers"}
        self.scopes: dict[str, list[str]] | None = None
        self.organisations = {"org": "write", "team": "contributor", "lab": "admin", "club": "read"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.believed: set[str] = set()
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str, float]] = []
        self.lock = threading.RLock()
        self.jobs = Jobs(self)

    def __enter__(self) -> HubServer:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.close()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Environment of a process that takes this server for the Hub and keeps its caches in `home`."""
        proxies = {"http_proxy", "https_proxy", "all_proxy"}
        return {
            **{key: value for key, value in os.environ.items() if key.lower() not in proxies},
            "HF_ENDPOINT": self.url,
            "HF_HOME": os.fspath(home),
            "HF_TOKEN": self.writer if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "RARETURN_BACKOFF_SECONDS": "0.02",
            "RARETURN_PUSH_SECONDS": "120",
        }

    def files(
        self, repo_id: str, repo_type: str = "model", revision: str = "main"
    ) -> dict[str, bytes | None]:
        """Path to bytes (None: a large file whose bytes have not arrived) of a repo at a revision."""
        with self.lock:
            commit = self.repos[repo_type, repo_id].at(revision)
            return {path: self.bytes_of(entry) for path, entry in commit.files.items()}

    def commits(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """All commits of a repo, oldest first."""
        return list(self.repos[repo_type, repo_id].commits)

    def bytes_of(self, entry: Entry) -> bytes | None:
        return entry.data if entry.sha256 is None else self.store.get(entry.sha256)

    def create(self, repo_id: str, repo_type: str = "model", private: bool = True) -> Repo:
        """Make a repo, its first commit included."""
        files = {".gitattributes": b"".join(b"*%s filter=lfs\n" % end.encode() for end in LARGE)}
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, [])
        self.put(repo_id, files, repo_type, "initial commit")
        return repo

    def put(
        self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", message: str = "test"
    ) -> str:
        """Commit files from the server's side, as another user would; returns the commit's SHA."""
        with self.lock:
            repo = self.repos.get((repo_type, repo_id)) or self.create(repo_id, repo_type)
            entries = dict(repo.commits[-1].files) if repo.commits else {}
            for path, data in files.items():
                entries[path] = self.entry(path, data)
            return self.append(repo, entries, message)

    def entry(self, path: str, data: bytes) -> Entry:
        if not path.endswith(LARGE):
            return Entry(len(data), git_oid(data), data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.store[sha256] = data
        return large_entry(sha256, len(data))

    def append(self, repo: Repo, entries: dict[str, Entry], message: str) -> str:
        parent = repo.commits[-1].oid if repo.commits else None
        tree = json.dumps(
            [repo.type, repo.id, parent, sorted((path, entry.oid) for path, entry in entries.items())]
        )
        commit = Commit(hashlib.sha1(tree.encode()).hexdigest(), parent, message, entries)
        repo.commits.append(commit)
        return commit.oid


def large_entry(sha256: str, size: int) -> Entry:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_oid(pointer.encode()), None, sha256)


class QuietServer(ThreadingHTTPServer):
    """A client that was killed, or whose connection a fault has closed, is no news."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


REPO = r"(?P<type>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, str]] = [  # method, path, name of the route and of the handler's method
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/{REPO}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/api/collections", "collection"),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection_read"),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "collection_add"),
    ("POST", r"/api/buckets/(?P<bucket>[^/]+/[^/]+)", "bucket"),
    ("GET", r"/api/jobs/hardware", "hardware"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)", "jobs"),
    ("POST", r"/api/jobs/(?P<namespace>[^/]+)", "job_start"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job>[^/]+)", "job"),
    ("GET", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job>[^/]+)/logs", "job_logs"),
    ("POST", r"/api/jobs/(?P<namespace>[^/]+)/(?P<job>[^/]+)/cancel", "job_cancel"),
    ("POST", r"/(?:(?P<type>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("POST", r"/(?:(?P<type>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", "verify"),
    ("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})", "upload"),
    (
        "GET",
        r"/(?:(?P<type>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve",
    ),
]


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, draw its fault, check its token, answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's delayed acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.body = self.read_body()
        route, match = next(
            (
                (route, match)
                for of_method, pattern, route in ROUTES
                if of_method == method and (match := re.fullmatch(pattern, urlsplit(path).path))
            ),
            (None, None),
        )
        if route is None:
            return self.send_json(404, {"error": f"no route {method} {path}"}, {"X-Error-Code": "NoRoute"})
        groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
        self.fault = self.hub.faults.next(route)
        if self.fault == "drop_before":
            return self.drop(route)
        if self.fault in STATUS_FAULTS:
            self.note(route)
            return self.send_fault(int(self.fault))
        if self.fault == "slow":
            time.sleep(self.hub.faults.slow_seconds)
        try:
            with self.hub.lock:
                send = getattr(self, route)(**groups)
        except Refusal as refusal:
            status, content = refusal.status, refusal.content
            headers = (
                {"X-Error-Code": refusal.code, "X-Error-Message": content["error"]} if refusal.code else {}
            )

            def send() -> None:
                self.send_json(status, content, headers)

        if self.fault == "drop_after":
            return self.drop(route)
        self.note(route)
        if not callable(send):
            return self.send_json(200, send)
        return send()

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def note(self, route: str) -> None:
        self.hub.requests.append((self.command, route, self.fault or "ok", time.monotonic()))

    def drop(self, route: str) -> None:
        self.note(route)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def send_fault(self, status: int) -> None:
        """As a proxy does it: HTML for the gateway's own errors."""
        html = status in (502, 503)
        headers = {"Retry-After": str(self.hub.faults.retry_after)} if status == 429 else {}
        content = (
            b"<html>Bad Gateway</html>" if html else json.dumps({"error": "A fault of the test"}).encode()
        )
        self.send_bytes(
            status, content, {**headers, "Content-Type": "text/html" if html else "application/json"}
        )

    def send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(
            status, json.dumps(content).encode(), {**(headers or {}), "Content-Type": "application/json"}
        )

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except OSError:  # the client was killed, or closed a stream that it had seen enough of
            self.close_connection = True

    # ------------------------------------------------------------------------------------------------- permissions

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def known(self) -> bool:
        return self.token in (self.hub.writer, self.hub.reader)

    def need_writer(self, name: str) -> None:
        if not self.known():
            raise Refusal(401, "Invalid username or password.")
        if self.token != self.hub.writer or {name, name.split("/")[0]} & self.hub.strangers:
            raise Refusal(403, f"You don't have the rights to write to {name}")

    def need_repo(self, type: str | None, repo: str) -> Repo:
        found = self.hub.repos.get(((type or "models")[:-1], repo))
        if found is not None and (self.known() or not found.private):
            return found
        if not self.known():
            raise Refusal(401, "Repository not found", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def need_commit(self, type: str | None, repo: str, revision: str | None) -> tuple[Repo, Commit]:
        found = self.need_repo(type, repo)
        commit = found.at(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    # ------------------------------------------------------------------------------------------------------ routes

    def whoami(self) -> dict[str, Any]:
        if not self.known():
            raise Refusal(401, "Invalid username or password.")
        access: dict[str, Any] = {"role": "write" if self.token == self.hub.writer else "read"}
        if self.hub.scopes is not None and self.token == self.hub.writer:
            scoped = [{"entity": {"name": name}, "permissions": may} for name, may in self.hub.scopes.items()]
            access = {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
        orgs = [{"name": name, "roleInOrg": in_org} for name, in_org in self.hub.organisations.items()]
        return {"type": "user", "name": "tester", "orgs": orgs, "auth": {"accessToken": access}}

    def auth_check(self, type: str, repo: str, write: str | None) -> dict[str, Any]:
        self.need_repo(type, repo)
        if write:
            self.need_writer(repo)
        return {}

    def validate(self) -> dict[str, Any]:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---(\n|\Z)", text, re.DOTALL)
        try:
            if match:
                yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from None
        return {"errors": [], "warnings": []}

    def create(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        namespace, repo_type = wanted.get("organization") or "tester", wanted.get("type") or "model"
        repo_id = f"{namespace}/{wanted['name']}"
        self.need_writer(namespace)
        url = f"{self.hub.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        if repo_type == "space" and not wanted.get("sdk"):
            raise Refusal(400, "A Space needs an sdk")
        if (repo_type, repo_id) in self.hub.repos:
            raise Refusal(409, f"You already created this {repo_type} repo", url=url)
        self.hub.create(repo_id, repo_type, wanted.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    def info(self, type: str, repo: str, revision: str | None) -> dict[str, Any]:
        found, commit = self.need_commit(type, repo, revision)
        return {
            "_id": git_oid(repo.encode())[:24],
            "id": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "private": found.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def describe(self, path: str, entry: Entry) -> dict[str, Any]:
        described: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.sha256 is not None:
            described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
        return described

    def tree(self, type: str, repo: str, revision: str, path: str | None) -> list[dict[str, Any]]:
        _, commit = self.need_commit(type, repo, revision)
        prefix = f"{path}/" if path else ""
        inside = {name: entry for name, entry in commit.files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        listed, folders = [], set()
        for name, entry in sorted(inside.items()):
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                listed.append(self.describe(name, entry))
        return [self.describe_folder(folder) for folder in sorted(folders)] + listed

    def describe_folder(self, path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}

    def paths(self, type: str, repo: str, revision: str) -> list[dict[str, Any]]:
        _, commit = self.need_commit(type, repo, revision)
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        listed = []
        for path in wanted:
            if path in commit.files:
                listed.append(self.describe(path, commit.files[path]))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                listed.append(self.describe_folder(path))
        return listed

    def preupload(self, type: str, repo: str, revision: str) -> dict[str, Any]:
        _, commit = self.need_commit(type, repo, revision)
        self.need_writer(repo)
        answers = []
        for wanted in json.loads(self.body)["files"]:
            present = commit.files.get(wanted["path"])
            large = wanted["path"].endswith(LARGE) or wanted["size"] > 10_000_000
            answers.append(
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": present and (present.sha256 or present.oid),
                }
            )
        return {"files": answers}

    def batch(self, type: str | None, repo: str) -> dict[str, Any]:
        self.need_repo(type, repo)
        self.need_writer(repo)
        verify = f"{self.hub.url}/{f'{type}/' if type else ''}{repo}.git/info/lfs/verify"
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store:
                upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def upload(self, sha256: str) -> dict[str, Any]:
        if self.fault == "lose_silently":
            self.hub.believed.add(sha256)
        elif self.fault != "lose":
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise Refusal(400, "The bytes do not have this SHA-256")
            self.hub.store[sha256] = self.body
        return {}

    def verify(self, type: str | None, repo: str) -> dict[str, Any]:
        return {}

    def commit(self, type: str, repo: str, revision: str) -> dict[str, Any]:
        found, head = self.need_commit(type, repo, revision)
        self.need_writer(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        entries = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                entries[value["path"]] = Entry(len(data), git_oid(data), data)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.store and value["oid"] not in self.hub.believed:
                    raise Refusal(400, "LFS pointer pointed to a file that does not exist.")
                entries[value["path"]] = large_entry(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                entries.pop(value["path"], None)
        oid = self.hub.append(found, entries, header["summary"])
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}",
            "hookOutput": "",
        }

    def resolve(self, type: str | None, repo: str, revision: str, path: str) -> Callable[[], None]:
        _, commit = self.need_commit(type, repo, revision)
        entry = commit.files.get(path)
        data = entry and self.hub.bytes_of(entry)
        if entry is None or data is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {
            "ETag": f'"{entry.sha256 or entry.oid}"',
            "X-Repo-Commit": commit.oid,
            "Accept-Ranges": "bytes",
        }
        if entry.sha256 is not None:
            headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return lambda: self.send_bytes(200, data, headers)
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return lambda: self.send_bytes(206, data[first : last + 1], headers)

    # ------------------------------------------------------------------------------------------------- collections

    def collection(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        self.need_writer(wanted["namespace"])
        slug = f"{wanted['namespace']}/{wanted['title'].lower()}-{git_oid(wanted['title'].encode())[:24]}"
        if slug in self.hub.collections:
            raise Refusal(409, "This collection already exists", slug=slug)
        self.hub.collections[slug] = {
            "slug": slug,
            "title": wanted["title"],
            "owner": {"name": wanted["namespace"]},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": wanted["private"],
            "theme": "green",
            "upvotes": 0,
        }
        return self.hub.collections[slug]

    def collection_read(self, slug: str) -> dict[str, Any]:
        if slug not in self.hub.collections:
            raise Refusal(404, "No such collection")
        return self.hub.collections[slug]

    def collection_add(self, slug: str) -> dict[str, Any]:
        collection = self.collection_read(slug)
        self.need_writer(slug.split("/")[0])
        item = json.loads(self.body)["item"]
        if any(
            (item["id"], item["type"]) == (present["id"], present["type"]) for present in collection["items"]
        ):
            raise Refusal(409, "This item is in the collection")
        self.need_repo(f"{item['type']}s", item["id"])
        collection["items"].append(
            {**item, "_id": git_oid(item["id"].encode())[:24], "position": len(collection["items"])}
        )
        return collection

    # -------------------------------------------------------------------------------------------- jobs and buckets

    def bucket(self, bucket: str) -> dict[str, Any]:
        self.need_writer(bucket)
        place, url = self.hub.jobs.bucket(bucket), f"{self.hub.url}/buckets/{bucket}"
        if place.exists():
            raise Refusal(409, "You already created this bucket", url=url)
        place.mkdir(parents=True)
        return {"url": url}

    def hardware(self) -> list[dict[str, Any]]:
        gpu = {"type": "gpu", "model": "L4", "vram": "24 GB", "manufacturer": "Nvidia"}
        about = {"cpu": "8 vCPU", "ram": "30 GB", "unitLabel": "minute"}
        return [
            {
                **about,
                "name": name,
                "prettyName": name,
                "accelerator": {**gpu, "quantity": str(gpus)} if gpus else None,
                "unitCostUSD": price,
                "unitCostMicroUSD": round(price * 1e6),
            }
            for name, (price, gpus) in FLAVORS.items()
        ]

    def need_job(self, namespace: str, job: str) -> Any:
        found = self.hub.jobs.all.get(job)
        if not self.known() or found is None or found.namespace != namespace:
            raise Refusal(404, "Job not found")
        return found

    def jobs(self, namespace: str) -> list[dict[str, Any]]:
        labels = dict(label.split("=", 1) for label in self.query.get("label", []))
        return [
            job.describe()
            for job in self.hub.jobs.all.values()
            if job.namespace == namespace
            and job.stage in self.query.get("stage", [job.stage])
            and labels.items() <= job.spec.get("labels", {}).items()
        ]

    def job_start(self, namespace: str) -> dict[str, Any]:
        self.need_writer(namespace)
        spec = json.loads(self.body)
        if spec["flavor"] not in FLAVORS:
            raise Refusal(400, f"Unknown flavor {spec['flavor']}")
        return self.hub.jobs.start(namespace, spec).describe()

    def job(self, namespace: str, job: str) -> dict[str, Any]:
        return self.need_job(namespace, job).describe()

    def job_cancel(self, namespace: str, job: str) -> dict[str, Any]:
        self.need_writer(namespace)
        found = self.need_job(namespace, job)
        threading.Thread(target=self.hub.jobs.stop, args=(found,), daemon=True).start()
        return {}

    def job_logs(self, namespace: str, job: str) -> Callable[[], None]:
        """Server-sent events, until the job ends."""
        found = self.need_job(namespace, job)

        def send() -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            sent = 0
            with contextlib.suppress(OSError):
                while True:
                    ended = found.stage != "RUNNING"
                    for line in found.lines[sent:]:
                        event = {"data": line, "timestamp": "2026-01-01T00:00:00.000Z"}
                        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                        sent += 1
                    if ended:
                        return
                    time.sleep(0.05)

        return send
