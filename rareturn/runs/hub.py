"""Files to and from Hub repositories: pushes that survive a bad network, pulls that take only safe kinds of files.

`huggingface_hub` does not retry the POST of a commit, and the folds of a run may finish at the same moment. So a push
is a loop: look at the newest commit, compare what it holds with what should be there (git and SHA-256 hashes), commit
what is missing on top of exactly that commit, and look again. This recognizes a commit whose answer was lost, repeats
one that another process overtook on the new parent, and returns only when the Hub itself shows every file.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, get_token, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from rareturn.errors import InputError

logger = logging.getLogger(__name__)

# Nothing else is pushed or pulled: pickles (.bin, .pt, .pkl) run code when they are loaded.
SUFFIXES = (".safetensors", ".json", ".parquet", ".md", ".yaml", ".model", ".jinja", ".png", ".html")
TEXT_FILES = ("merges.txt", "vocab.txt")
TRANSIENT_STATUS = (408, 409, 412, 425, 429, 500, 502, 503, 504)
ASK_SECONDS = 60.0  # nobody waits longer for a reference that may be a typo
TIMEOUT = httpx2.Timeout(120.0, connect=20.0)  # huggingface_hub never times out by default
FAILURES = (httpx2.HTTPError, errors.RevisionResolutionError, OSError, RuntimeError, ValueError, KeyError)

Content = Path | bytes | Callable[[bytes | None], bytes]


class PushError(Exception):
    """A push that failed, in one line. It is not the user's mistake: scripts exit with status `exit_code`."""

    exit_code = 3


class _NotYet(RuntimeError):
    """The Hub contradicts itself (a repo that was just created is not found): ask again."""


def may_travel(name: str) -> bool:
    """Whether a file of this name is ever pushed or pulled."""
    return name.endswith(SUFFIXES) or PurePosixPath(name).name in TEXT_FILES


class Persistence:
    """Repeats calls that fail for a passing reason: exponential backoff with jitter, until a deadline.

    RARETURN_BACKOFF_SECONDS (first wait) and RARETURN_PUSH_SECONDS (deadline) are for tests and slow lines.
    """

    def __init__(self, seconds: float = float("inf")) -> None:
        self.base = float(os.environ.get("RARETURN_BACKOFF_SECONDS", "1"))
        self.deadline = time.monotonic() + min(seconds, float(os.environ.get("RARETURN_PUSH_SECONDS", "900")))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the function, again after each error that may pass; raise one that will not, or the last in time."""
        for attempt in itertools.count():
            get_session().timeout = TIMEOUT
            try:
                return function(*arguments, **options)
            except Exception as error:
                asked = _seconds_asked(error)
                if asked is None:
                    raise
                pause = max(asked, min(30 * self.base, self.base * 2**attempt) * random.uniform(0.5, 1.0))
                if time.monotonic() + pause > self.deadline:
                    raise
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
            asked = cause.response.headers.get("Retry-After", "")
            passing = status in TRANSIENT_STATUS or lost_upload
            return (float(asked) if asked.isdigit() else 0.0) if passing else None
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
    code: bool = False,
) -> str:
    """Put files into a repo in one commit, and return the SHA of a commit that was seen to hold every byte of them.

    A PushError where the token may not write, the Hub refuses a README, or there is no success in time; an InputError
    for a file of a kind that is never pushed, or one that contains the Hub token.

    Args:
        files: path in the repo to a local file, to bytes, or to a function from the bytes at that path in the parent
            commit (None: no such file) to the new ones.
        kept_in: the folder that still holds everything if the push fails; the error names it.
        private: of a repo that is created here; an existing one keeps its visibility.
        code: any kind of file may go there; always so in a Space.
    """
    token = (get_token() or "").encode()
    for path, content in files.items():
        if not (code or repo_type == "space" or may_travel(path)):
            raise InputError(f"{path} is not pushed: only {', '.join((*SUFFIXES, *TEXT_FILES))}")
        # A token given on a command line may end up in run.json, and one in a config in the model's folder.
        is_text = not callable(content) and path.endswith((".json", ".md", ".yaml", ".html", ".jinja", ".py"))
        if is_text and token and token in (content if isinstance(content, bytes) else content.read_bytes()):
            raise InputError(f"{path}: has the Hub token in it; not pushed")
    try:
        fixed = {path: CommitOperationAdd(path, file) for path, file in files.items() if not callable(file)}
        changing = {path: content for path, content in files.items() if callable(content)}
        repo = _Repo(repo_id, repo_type, private)
        return repo.call(repo.push, fixed, changing, message)
    except FAILURES as error:
        again = "" if repo_type == "space" else " with --push_only"
        advice = f"everything stays on disk in {os.fspath(kept_in)}; repeat{again}"
        raise PushError(f"{repo_id}: push failed: {_reason(error)}: {explain(error)}; {advice}") from error


def check_may_push(repo_id: str, repo_type: str = "model") -> None:
    """Ask the Hub whether `push_files` could write to a repo, before hours of work; an InputError where it could not.

    A repo that is missing is not made for this, so that a typo leaves nothing behind: the token's role and the roles of
    its user say whether the push may make it. While the Hub does not answer, this is only a warning.
    """
    try:
        repo = _Repo(repo_id, repo_type, seconds=ASK_SECONDS)
        repo.call(repo.check_may_write)
    except FAILURES as error:
        if _seconds_asked(error) is None:
            raise InputError(f"{repo_id}: cannot push: {_reason(error)}: {explain(error)}") from None
        logger.warning("%s: whether it can be pushed to is not known: %s", repo_id, explain(error))


def _reason(error: Exception) -> str:
    """Why a push failed, or would fail."""
    status = {cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)}
    if 401 in status or isinstance(error, errors.LocalTokenNotFoundError):
        return "no valid token (hf auth login, or HF_TOKEN)"
    refused = 403 in status or isinstance(error, PermissionError)
    return "the token may not write there" if refused else "gave up"


@functools.cache
def _warn_of_public(repo_id: str) -> None:
    logger.warning("%s already exists and is public: everyone can read what is pushed there", repo_id)


@functools.cache
def _user_of(token: str | None) -> dict[str, Any]:
    """Whose the token is and what it may, asked once: the Hub lets nobody ask that often."""
    return HfApi().whoami(token=token)


class _Repo(Persistence):
    """The few questions that a push asks of a repo, and the commit."""

    def __init__(self, repo_id: str, repo_type: str, private: bool = True, seconds: float = float("inf")):
        super().__init__(seconds)
        self.api, self.private = HfApi(), private
        self.where = {"repo_id": repo_id, "repo_type": repo_type}

    def push(self, fixed: Mapping[str, CommitOperationAdd], changing: Mapping[str, Any], message: str) -> str:
        """Commit what is missing in the newest commit; the SHA of a commit that holds everything."""
        parent, wanted = self.call(self.head), dict(fixed)
        for path, make in changing.items():
            present = self.call(self.read, path, parent)
            if (new := make(present)) != present:
                wanted[path] = CommitOperationAdd(path, new)
        missing = self.call(self.missing, wanted, parent)
        if not missing:
            return parent
        # Copies, since `create_commit` notes in an operation that its file is there, and then skips it.
        options = {"operations": [copy.copy(wanted[path]) for path in missing], "commit_message": message}
        sha = self.api.create_commit(**self.where, **options, parent_commit=parent).oid
        # That very commit: a later one may hold another process's version of a file.
        if lost := self.call(self.missing, wanted, sha):
            raise _NotYet(f"{lost[0]} did not arrive")
        return sha

    def check_may_write(self) -> None:
        """Raise what a push would meet; a PermissionError where it could not make the repo."""
        try:
            return self.api.auth_check(**self.where, write=True)
        except errors.RepositoryNotFoundError:
            user = _user_of(get_token())
        namespace, token = self.where["repo_id"].split("/")[0], user.get("auth", {}).get("accessToken", {})
        roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
        if roles.get(namespace, "read") == "read":
            raise PermissionError(f"{user['name']} may not create repos of {namespace}")
        scopes = token.get("fineGrained", {}).get("scoped", [])
        granted = [scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]]
        if token.get("role") == "read" or (token.get("role") == "fineGrained" and namespace not in granted):
            raise PermissionError(f"its role does not let it create repos of {namespace}")

    def head(self) -> str:
        """The SHA of the newest commit; creates the repo if there is none."""
        try:
            info = self.api.repo_info(**self.where)
        except errors.RepositoryNotFoundError:
            sdk = {"space_sdk": "gradio"} if self.where["repo_type"] == "space" else {}
            self.api.create_repo(**self.where, **sdk, private=self.private, exist_ok=True)
            try:
                info = self.api.repo_info(**self.where)
            except errors.RepositoryNotFoundError:
                raise _NotYet(f"{self.where['repo_id']} was created but is not found yet") from None
        if self.private and info.private is False:
            _warn_of_public(info.id)
        return info.sha

    def read(self, path: str, revision: str) -> bytes | None:
        """A small file's bytes at a commit, or None."""
        try:
            return self._get(path, revision).content
        except errors.EntryNotFoundError:
            return None

    def missing(self, wanted: Mapping[str, CommitOperationAdd], revision: str) -> list[str]:
        """The paths at which a commit does not hold the wanted bytes."""
        found = self.api.get_paths_info(**self.where, paths=list(wanted), revision=revision) if wanted else []
        held = {info.path for info in found if self._holds(info, wanted[info.path], revision)}
        return [path for path in wanted if path not in held]

    def _holds(self, info: Any, operation: CommitOperationAdd, revision: str) -> bool:
        if not isinstance(info, RepoFile) or info.size != operation.upload_info.size:
            return False
        if info.lfs is None:
            with operation.as_file() as file:
                return info.blob_id == git_hash(file.read())
        if info.lfs.sha256 != operation.upload_info.sha256.hex():
            return False
        try:  # A commit names a large file by its hash, which says nothing of its bytes: ask for the last one.
            self._get(info.path, revision, Range=f"bytes={info.size - 1}-{info.size - 1}")
        except HfHubHTTPError as error:
            if error.response.status_code in TRANSIENT_STATUS:
                raise
            return False
        return True

    def _get(self, path: str, revision: str, **headers: str) -> httpx2.Response:
        url = hf_hub_url(**self.where, filename=path, revision=revision)
        response = get_session().get(url, headers={**build_hf_headers(), **headers})
        hf_raise_for_status(response)
        return response


def add_to_collection(namespace: str, title: str, items: Iterable[tuple[str, str]], *, private: bool) -> None:
    """Put (repo id, `model` or `dataset`) items into a collection, made if needed; a failure is only a warning."""
    api, persistence = HfApi(), Persistence()
    try:
        options = {"namespace": namespace, "private": private, "exists_ok": True}
        collection = persistence.call(api.create_collection, title, **options)
        for repo_id, repo_type in items:
            persistence.call(api.add_collection_item, collection.slug, repo_id, repo_type, exists_ok=True)
    except FAILURES as error:
        logger.warning("collection %r of %s: not updated: %s", title, namespace, explain(error))


def resolve_revision(repo_id: str, *, repo_type: str = "model", revision: str | None = None) -> str:
    """The commit SHA of a branch, a tag or the newest commit (None); an InputError where it cannot be had."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    where = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    if constants.is_offline_mode():
        return _ask(HfApi().resolve_revision, where, local_files_only=True).resolved
    return _ask(HfApi().repo_info, where).sha


def pull_files(
    repo_id: str, patterns: Sequence[str], *, repo_type: str = "model", revision: str | None = None
) -> tuple[Path, str]:
    """Download a repo's files at one commit into the cache; returns the folder and the commit's SHA.

    `patterns` are paths in the repo (fnmatch, `*` crosses folders); other kinds of files than those in `SUFFIXES` are
    skipped. An InputError where they cannot be had, or where a path in the repo would leave the folder.
    """
    sha = resolve_revision(repo_id, repo_type=repo_type, revision=revision)
    offline = constants.is_offline_mode()
    where = {"repo_id": repo_id, "repo_type": repo_type, "revision": sha}
    for path in [] if offline else _ask(HfApi().list_repo_files, where):
        if {"", ".", ".."} & set(path.split("/")) or "\\" in path or ":" in path:
            raise InputError(f"{repo_id}: the repo holds an unsafe path: {path!r}")
    kinds = (*SUFFIXES, *TEXT_FILES)
    allowed = [one + kind for one in patterns for kind in ([""] if may_travel(one) else kinds)]
    folder = _ask(snapshot_download, where, allow_patterns=allowed, local_files_only=offline)
    return Path(folder), sha


def _ask(function: Callable[..., Any], where: Mapping[str, Any], **options: Any) -> Any:
    """What the Hub says of a reference; where it says no, a line for the user who gave it."""
    repo_id = where["repo_id"]
    try:
        return Persistence(ASK_SECONDS).call(function, **where, **options)
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id}: no revision {where['revision']!r}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{repo_id}: no such repo on the Hub, or the token may not read it") from None
    except FAILURES as error:
        raise InputError(f"{repo_id}: cannot be read from the Hub: {explain(error)}") from None
