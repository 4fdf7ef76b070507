"""Files to and from Hub repositories: pushes that survive a bad network, pulls that take only safe kinds of files.

`huggingface_hub` does not retry the POST of a commit, and the folds of a run may finish at the same moment. So a push
is a loop: look at the newest commit, compare what it holds with what should be there (git and SHA-256 hashes), commit
what is missing on top of exactly that commit, and look again. This recognizes a commit whose answer was lost, repeats
one that another process overtook on the new parent, and returns only when the Hub itself shows every file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_url, snapshot_download
from huggingface_hub import resolve_revision as resolve_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from rareturn.errors import InputError

logger = logging.getLogger(__name__)

# Nothing else is pushed or pulled: pickles (.bin, .pt, .pkl) run code when they are loaded.
SUFFIXES = (".safetensors", ".json", ".parquet", ".md", ".model", ".jinja", ".png", ".html")
TEXT_FILES = ("merges.txt", "vocab.txt")
TRANSIENT_STATUS = (408, 409, 412, 425, 429, 500, 502, 503, 504)
PULL_SECONDS = 60.0  # nobody waits longer for a reference that may be a typo
TIMEOUT = httpx2.Timeout(120.0, connect=20.0)  # huggingface_hub never times out by default
FAILURES = (httpx2.HTTPError, RevisionResolutionError, OSError, RuntimeError, ValueError, KeyError)

Content = Path | bytes | Callable[[bytes | None], bytes]
Result = TypeVar("Result")


class PushError(Exception):
    """A push that failed, in one line. It is not the user's mistake: scripts exit with status `exit_code`."""

    exit_code = 3

    def __init__(self, problem: str):
        super().__init__(" ".join(problem.split()))


class _NotYet(RuntimeError):
    """The Hub contradicts itself (a repo that was just created is not found): ask again."""


def may_travel(name: str) -> bool:
    """Whether a file of this name is ever pushed or pulled."""
    return name.endswith(SUFFIXES) or PurePosixPath(name).name in TEXT_FILES


class _Persistence:
    """Repeats calls that fail for a passing reason: exponential backoff with jitter, until a deadline.

    RARETURN_BACKOFF_SECONDS (first wait) and RARETURN_PUSH_SECONDS (deadline) are for tests and slow lines.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.base = float(os.environ.get("RARETURN_BACKOFF_SECONDS", "1"))
        self.deadline = time.monotonic() + min(seconds, float(os.environ.get("RARETURN_PUSH_SECONDS", "900")))

    def call(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call the function, again after each error that may pass; raise any other."""
        for attempt in itertools.count():
            get_session().timeout = TIMEOUT
            try:
                return function(*arguments, **options)
            except Exception as error:
                self.wait(error, attempt)

    def wait(self, error: Exception, attempt: int) -> None:
        """Sleep before the next attempt; raise the error if it will not pass or the deadline comes first."""
        asked = _seconds_asked(error)
        if asked is None:
            raise error
        pause = max(asked, min(30 * self.base, self.base * 2**attempt) * random.uniform(0.5, 1.0))
        if time.monotonic() + pause > self.deadline:
            raise error
        logger.warning("Hub: %s; trying again in %.1f s", explain(error), pause)
        time.sleep(pause)


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    """The error and what caused it: an upload's HTTP error comes wrapped in a RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__


def _seconds_asked(error: Exception) -> float | None:
    """Seconds that the server asked us to wait (0 if it did not say), or None for an error that will not pass."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            lost_upload = status in (400, 404, 422) and "lfs" in str(cause.server_message).lower()
            if status not in TRANSIENT_STATUS and not lost_upload:
                return None
            asked = cause.response.headers.get("Retry-After", "")
            return float(asked) if asked.isdigit() else 0.0
        # A proxy's HTML page in place of JSON surfaces as a JSONDecodeError when the client validates a README.
        if isinstance(cause, (httpx2.TransportError, json.JSONDecodeError, _NotYet)):
            return None if isinstance(cause, httpx2.UnsupportedProtocol) else 0.0
    return None


def explain(error: BaseException) -> str:
    """A Hub error in a few words, without its URL (which may be signed)."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            said = " ".join((cause.server_message or "").split())[:160]
            return f"HTTP {cause.response.status_code}" + (f" ({said})" if said else "")
        if isinstance(cause, httpx2.TransportError):
            return f"{type(cause).__name__} ({cause})"
    return " ".join(str(error).split())[:200] or type(error).__name__


def push_files(
    repo_id: str,
    files: Mapping[str, Content],
    *,
    message: str,
    kept_in: str | os.PathLike,
    repo_type: str = "model",
    private: bool = True,
) -> str:
    """Put files into a repo in one commit, and return the SHA of a commit that was seen to hold every byte of them.

    Args:
        files: path in the repo to a local file, to bytes, or to a function from the bytes at that path in the parent
            commit (None: no such file) to the new ones.
        kept_in: the folder that still holds everything if the push fails; the error names it.
        private: of a repo that is created here; an existing one keeps its visibility.

    Raises:
        PushError: no permission, no such organisation, a README that the Hub refuses, or no success in time.
        InputError: a file of a kind that is never pushed, or one that contains the Hub token.
    """
    token = (get_token() or "").encode()
    for path, content in files.items():
        if not may_travel(path):
            raise InputError(f"{path} is not pushed: only {', '.join((*SUFFIXES, *TEXT_FILES))}")
        # A token given on a command line may end up in run.json, and one in a config in the model's folder.
        if token and not callable(content) and path.endswith((".json", ".md", ".html", ".jinja")):
            data = content if isinstance(content, bytes) else content.read_bytes()
            if token in data:
                raise InputError(f"{path}: has the Hub token in it; not pushed")
    try:
        return _push(_Repo(repo_id, repo_type), files, message, private)
    except FAILURES as error:
        status = {cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)}
        reason = "the token may not write there" if 403 in status else "gave up"
        if 401 in status:
            reason = "no valid token (hf auth login, or HF_TOKEN)"
        advice = f"everything stays on disk in {os.fspath(kept_in)}; repeat with --push_only"
        raise PushError(f"{repo_id}: push failed: {reason}: {explain(error)}; {advice}") from error


def _push(repo: _Repo, files: Mapping[str, Content], message: str, private: bool) -> str:
    persistence = _Persistence()
    fixed = {path: CommitOperationAdd(path, file) for path, file in files.items() if not callable(file)}
    attempt, committed = 0, None
    while True:
        # After a commit, check that very commit: a later one may hold another process's version of a file.
        parent = committed or persistence.call(repo.head, private)
        wanted = dict(fixed)
        for path, content in files.items():
            if callable(content):
                present = persistence.call(repo.read, path, parent)
                if (new := content(present)) != present:
                    wanted[path] = CommitOperationAdd(path, new)
        missing = persistence.call(repo.missing, wanted, parent)
        if not missing:
            return parent
        try:
            if committed:
                raise _NotYet(f"{missing[0]} did not arrive")
            operations = [_unused(wanted[path]) for path in missing]
            get_session().timeout = TIMEOUT
            committed = repo.api.create_commit(
                **repo.where, operations=operations, commit_message=message, parent_commit=parent
            ).oid
        except Exception as error:
            committed = None
            persistence.wait(error, attempt)
            attempt += 1


def _unused(operation: CommitOperationAdd) -> CommitOperationAdd:
    """A copy that was never uploaded, since `create_commit` skips what it believes to be there; the hash is kept."""
    copy = dataclasses.replace(operation)
    copy.upload_info = operation.upload_info
    return copy


@functools.cache
def _warn_of_public(repo_id: str) -> None:
    logger.warning("%s already exists and is public: everyone can read what is pushed there", repo_id)


class _Repo:
    """The few questions that a push asks of a repo."""

    def __init__(self, repo_id: str, repo_type: str):
        self.api = HfApi()
        self.where = {"repo_id": repo_id, "repo_type": repo_type}

    def head(self, private: bool) -> str:
        """The SHA of the newest commit; creates the repo if there is none."""
        try:
            info = self.api.repo_info(**self.where)
        except RepositoryNotFoundError:
            self.api.create_repo(**self.where, private=private, exist_ok=True)
            try:
                info = self.api.repo_info(**self.where)
            except RepositoryNotFoundError:
                raise _NotYet(f"{self.where['repo_id']} was created but is not found yet") from None
        if private and info.private is False:
            _warn_of_public(info.id)
        return info.sha

    def read(self, path: str, revision: str) -> bytes | None:
        """A small file's bytes at a commit, or None."""
        response = get_session().get(self._url(path, revision), headers=build_hf_headers())
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError:
            return None
        return response.content

    def missing(self, wanted: Mapping[str, CommitOperationAdd], revision: str) -> list[str]:
        """The paths at which a commit does not hold the wanted bytes."""
        found = self.api.get_paths_info(**self.where, paths=list(wanted), revision=revision) if wanted else []
        infos = {info.path: info for info in found if isinstance(info, RepoFile)}
        return [
            path
            for path, operation in wanted.items()
            if path not in infos or not self._holds(infos[path], operation, revision)
        ]

    def _holds(self, info: RepoFile, operation: CommitOperationAdd, revision: str) -> bool:
        if info.size != operation.upload_info.size:
            return False
        if info.lfs is None:
            with operation.as_file() as file:
                return info.blob_id == git_hash(file.read())
        if info.lfs.sha256 != operation.upload_info.sha256.hex():
            return False
        # A commit names a large file by its hash, which says nothing of its bytes: ask for the last one.
        headers = {**build_hf_headers(), "Range": f"bytes={info.size - 1}-{info.size - 1}"}
        with get_session().stream("GET", self._url(info.path, revision), headers=headers) as response:
            if response.status_code in TRANSIENT_STATUS:
                response.read()
                hf_raise_for_status(response)
            return response.status_code in (200, 206)

    def _url(self, path: str, revision: str) -> str:
        return hf_hub_url(**self.where, filename=path, revision=revision)


def add_to_collection(namespace: str, title: str, items: Iterable[tuple[str, str]], *, private: bool) -> None:
    """Put (repo id, `model` or `dataset`) items into a collection, made if needed; a failure is only a warning."""
    api, persistence = HfApi(), _Persistence()
    try:
        options = {"namespace": namespace, "private": private, "exists_ok": True}
        collection = persistence.call(api.create_collection, title, **options)
        for repo_id, repo_type in items:
            persistence.call(api.add_collection_item, collection.slug, repo_id, repo_type, exists_ok=True)
    except FAILURES as error:
        logger.warning("collection %r of %s: not updated: %s", title, namespace, explain(error))


def resolve_revision(repo_id: str, *, repo_type: str = "model", revision: str | None = None) -> str | None:
    """The commit SHA of a branch, a tag or the newest commit (None); returns None for a folder on disk.

    Raises:
        InputError: no such repo or revision, no permission, or the Hub cannot be reached.
    """
    if os.path.isdir(repo_id):
        return None
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    where = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    with _as_input_error(repo_id, revision):
        if constants.is_offline_mode():
            return resolve_from_cache(**where, local_files_only=True).resolved
        return _Persistence(PULL_SECONDS).call(HfApi().repo_info, **where).sha


def pull_files(
    repo_id: str, patterns: Sequence[str], *, repo_type: str = "model", revision: str | None = None
) -> tuple[Path, str]:
    """Download a repo's files at one commit into the cache; returns the folder and the commit's SHA.

    Args:
        patterns: paths in the repo (fnmatch, `*` crosses folders); other kinds than those in `SUFFIXES` are skipped.

    Raises:
        InputError: as `resolve_revision`, or a path in the repo that would leave the folder.
    """
    sha = resolve_revision(repo_id, repo_type=repo_type, revision=revision)
    if sha is None:
        raise InputError(f"{repo_id}: expected a repo id, not a folder")
    where = {"repo_id": repo_id, "repo_type": repo_type, "revision": sha}
    allowed = [one for one in patterns if may_travel(one)]
    allowed += [one + ending for one in patterns if one not in allowed for ending in (*SUFFIXES, *TEXT_FILES)]
    offline, persistence = constants.is_offline_mode(), _Persistence(PULL_SECONDS)
    with _as_input_error(repo_id, revision):
        if not offline:
            for path in persistence.call(HfApi().list_repo_files, **where):
                if {"", ".", ".."} & set(path.split("/")) or "\\" in path or ":" in path:
                    raise InputError(f"{repo_id}: the repo holds an unsafe path: {path!r}")
        options = {"allow_patterns": allowed, "local_files_only": offline}
        folder = persistence.call(snapshot_download, **where, **options)
    return Path(folder), sha


@contextlib.contextmanager
def _as_input_error(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub says about a reference into a line for the user who gave it."""
    try:
        yield
    except RevisionNotFoundError:
        raise InputError(f"{repo_id}: no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(f"{repo_id}: no such repo on the Hub, or the token may not read it") from None
    except FAILURES as error:
        raise InputError(f"{repo_id}: cannot be read from the Hub: {explain(error)}") from None
