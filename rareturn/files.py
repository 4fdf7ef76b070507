"""Files that are whole or not there: atomic writes, and JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rareturn.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def write_bytes(path: str | os.PathLike, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file beside its place and rename it there: a killed process leaves the old file or the new one.

    Without `overwrite` a file stays that is there already, or that another process is first to put there. An InputError
    where the disk is full or the place cannot be written; what was there before is untouched.
    """
    path = Path(path)
    # The name is unique: the folds of a run are processes that write into one folder.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(beside, path)
        elif not path.exists():
            _link(beside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def check_writable(folder: Path) -> None:
    """An InputError where a folder could not be made or written into: said before anything is computed for it."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{folder}: cannot be written: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written: no permission to write in {nearest}")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk, each its own, into one line: an InputError."""
    try:
        yield
    except Exception as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, InputError) or not (full or shutil.disk_usage(folder).free < 1 << 16):
            raise
        problem = "no space left on the disk; make room and repeat, what is complete stays"
        raise InputError(f"{folder}: {problem}") from None


def _link(beside: Path, path: Path) -> None:
    """Give a file its name unless another process took it; network drives without hard links rename instead."""
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.replace(beside, path)


def write_json(path: str | os.PathLike, content: Any, *, overwrite: bool = True) -> None:
    """`write_bytes` of indented JSON; a NaN or an infinity in it is a ValueError, since other readers refuse them."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), overwrite=overwrite)


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; an InputError where it is missing, unreadable, cut short or no JSON."""
    try:
        return json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged(name: str | os.PathLike) -> Path:
    """A file or folder that is not code: an installed package has it inside, a checkout in its root."""
    inside, outside = (folder / name for folder in Path(__file__).parents[:2])
    return inside if inside.exists() else outside


def cache_dir(name: str) -> Path:
    """`rareturn/NAME` under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rareturn" / name


def check_content(model: type[Model], content: Any, where: str) -> Model:
    """What a file holds, as a pydantic model; an InputError has a line for each problem and its place in the file.

    A validator of the model that finds several problems raises a ValueError with a line for each.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            for said in problem["msg"].removeprefix("Value error, ").splitlines():
                lines.append(f"{where}: {place}: {said}" if place else f"{where}: {said}")
        raise InputError(*lines) from None
