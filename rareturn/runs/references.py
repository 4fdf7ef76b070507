"""Names of runs and repositories, and where a run reference points."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rareturn.errors import InputError

REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<run>[^@/:]+)(?:@(?P<revision>[^@\s]+))?"
)


NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*")


def check_name(name: str, what: str) -> str:
    """The name, if it can be a part of a path and of a repo id: letters, digits, `_`, `.`, `-`.

    Raises:
        InputError: empty, too long, another character, `..` or `--` in it, a dot or dash at an end, or `.git` there.
    """
    if (
        not isinstance(name, str)
        or not NAME.fullmatch(name)
        or ".." in name
        or "--" in name
        or name.endswith(".git")
        or len(name) > 96
    ):
        raise InputError(
            f"{what} {name!r}: letters, digits, '_', '.', '-' only (no '..' or '--'; starts with a letter or a digit)"
        )
    return name


@dataclass(frozen=True)
class Reference:
    """Where a run lies: a folder, or a config of a dataset repo at a revision (None: the newest)."""

    folder: Path | None = None
    repo_id: str | None = None
    run: str | None = None
    revision: str | None = None


def parse_reference(reference: str | os.PathLike) -> Reference:
    """Read a run reference; a folder that exists wins over a Hub reference of the same spelling.

    Raises:
        InputError: neither a folder nor of the form `ORG/NAME-oof:RUN[@REVISION]`.
    """
    if os.path.isdir(reference):
        return Reference(folder=Path(reference))
    match = REFERENCE.fullmatch(os.fspath(reference))
    if match is None:
        raise InputError(
            f"{reference}: no such run: a run is a folder that exists, or ORG/NAME-oof:RUN[@REVISION] on the Hub"
        )
    organisation, repo = match["repo"].split("/")
    check_name(organisation, f"{reference}: organisation")
    check_name(repo, f"{reference}: dataset")
    check_name(match["run"], f"{reference}: run")
    if match["revision"] is not None:
        check_revision(match["revision"], os.fspath(reference))
    return Reference(repo_id=match["repo"], run=match["run"], revision=match["revision"])


def check_revision(revision: str, where: str) -> str:
    """The revision, if it can be a branch, a tag or a SHA.

    Raises:
        InputError: another character, or `..` in it.
    """
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise InputError(f"{where}: {revision!r} is no revision: a branch, a tag or a commit SHA")
    return revision


def model_repo(namespace: str, name: str, run: str) -> str:
    """`ORG/NAME-RUN`, the model repo of a run.

    Raises:
        InputError: a part that cannot be one of a repo id.
    """
    check_name(namespace, "hub_namespace")
    return f"{namespace}/{check_name(f'{name}-{run}', 'hub_name and run_name: repo')}"


def table_repo(namespace: str, name: str) -> str:
    """`ORG/NAME-oof`, the dataset repo with the tables of all runs.

    Raises:
        InputError: a part that cannot be one of a repo id.
    """
    check_name(namespace, "hub_namespace")
    return f"{namespace}/{check_name(f'{name}-oof', 'hub_name: repo')}"
