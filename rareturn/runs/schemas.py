"""What `run.json` must hold."""

from __future__ import annotations

from typing import Any

from rareturn.data.folds import FOLD_GROUPS
from rareturn.errors import InputError
from rareturn.runs.references import check_name

RUN_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "label_names": (list,),
    "positive_labels": (list,),
    "num_folds": (int,),
    "fold_seed": (int,),
    "fold_groups": (str,),
    "seed": (int,),
    "base_model": (str,),
    "base_revision": (str, type(None)),
    "recipe": (dict,),
    "data_fingerprint": (str,),
    "prompt_fingerprint": (str, type(None)),
    "packages": (dict,),
    "command": (str,),
    "git_commit": (str, type(None)),
}


def check_run_info(info: Any, where: str) -> dict[str, Any]:
    """The content of a `run.json`, if every key is there and of its type; further keys are left alone.

    Raises:
        InputError: one line a key that is missing or wrong.
    """
    if not isinstance(info, dict):
        raise InputError(f"{where}: a mapping expected")
    problems = []
    for key, kinds in RUN_KEYS.items():
        if key not in info:
            problems.append(f"{where}: {key}: missing")
        elif not isinstance(info[key], kinds) or isinstance(info[key], bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            problems.append(f"{where}: {key}: {wanted} expected, not {type(info[key]).__name__}")
    if problems:
        raise InputError(*problems)
    check_name(info["name"], f"{where}: name:")
    names = info["label_names"]
    if (
        len(names) < 2
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        problems.append(f"{where}: label_names: two or more different names expected")
    positive = info["positive_labels"]
    if (
        not positive
        or len({str(label) for label in positive}) != len(positive)
        or not all(type(label) is int and 0 <= label < len(names) for label in positive)
    ):
        problems.append(f"{where}: positive_labels: different numbers of 0..{len(names) - 1} expected")
    if info["num_folds"] < 2:
        problems.append(f"{where}: num_folds: 2 or more expected, not {info['num_folds']}")
    if info["fold_groups"] not in FOLD_GROUPS:
        problems.append(f"{where}: fold_groups: one of {', '.join(FOLD_GROUPS)} expected")
    if problems:
        raise InputError(*problems)
    return info
