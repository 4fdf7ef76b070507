"""Names of runs and repositories, and where a run reference points."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rareturn.errors import InputError

# What the Hub takes as one part of a repo id, and what is safe as one part of a path.
NAME = re.compile(r"(?!.*(?:\.\.|--|\.git\Z))[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9_./-]*")
REFERENCE = re.compile(r"([^/:@]+)/([^/:@]+):([^/:@]+)(?:@(.+))?")


@dataclass(frozen=True)
class Reference:
    """Where a run lies: a folder, or a config of a dataset repo at a revision (None: the newest)."""

    folder: Path | None = None
    repo_id: str | None = None
    run: str | None = None
    revision: str | None = None


def check_name(name: str, what: str) -> str:
    """Return the name if it can be part of a path and of a repo id; an InputError says what can."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        kinds = "letters, digits, '_', '.', '-' only (96 at most, starting with a letter or a digit"
        raise InputError(f"{what} {name!r}: {kinds}; no '..', no '--', no '.', '-' or '.git' at the end)")
    return name


def check_revision(revision: str | None, where: str) -> str | None:
    """Return the revision if it can be a branch, a tag or a commit SHA (or is None); an InputError if not."""
    if revision is not None and not REVISION.fullmatch(revision):
        raise InputError(f"{where}: {revision!r} is not a revision: give a branch, a tag or a commit SHA")
    return revision


def parse_reference(reference: str | os.PathLike) -> Reference:
    """Read a run reference, a folder or `ORG/NAME-oof:RUN[@REVISION]`; a folder of that spelling wins."""
    if os.path.isdir(reference):
        return Reference(folder=Path(reference))
    if (match := REFERENCE.fullmatch(os.fspath(reference))) is None:
        form = "name an existing folder, or ORG/NAME-oof:RUN[@REVISION] on the Hub"
        raise InputError(f"{reference}: no such run; {form}")
    *names, revision = match.groups()
    parts = zip(names, ("organisation", "dataset", "run"), strict=True)
    organisation, dataset, run = (check_name(name, f"{reference}: {part}") for name, part in parts)
    return Reference(None, f"{organisation}/{dataset}", run, check_revision(revision, os.fspath(reference)))


def model_repo(namespace: str, name: str, run: str) -> str:
    """`ORG/NAME-RUN`, the model repo of a run; an InputError for a part that the Hub does not take."""
    return f"{check_name(namespace, '--hub_namespace')}/{check_name(f'{name}-{run}', 'repo NAME-RUN')}"


def table_repo(namespace: str, name: str) -> str:
    """`ORG/NAME-oof`, the dataset repo with the tables of all runs; an InputError as `model_repo`."""
    return f"{check_name(namespace, '--hub_namespace')}/{check_name(f'{name}-oof', 'repo NAME-oof')}"
