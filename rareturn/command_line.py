"""What every script does with its command line: read flags and a recipe, and answer a mistake in one line.

A recipe is a YAML mapping whose keys are the script's own flags (`TrainingArguments` names included). Flags given
on the command line win over the recipe, the recipe wins over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from rareturn.errors import InputError

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "scikit-learn",
    "numpy",
)


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        InputError: no such file, not YAML, or not a mapping of flag names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise InputError(f"{path}: a recipe is a mapping of flag names to values")
    return recipe


def parse_arguments(
    argument_classes: Sequence[type], description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Parse flags, on top of the recipe that `--config` names, into one instance of each dataclass.

    Args:
        argument_classes: dataclasses as `HfArgumentParser` takes them; a ValueError in `__post_init__` is a user error.
        description: the first paragraph of `--help`.
        argv: the arguments; `sys.argv[1:]` by default.

    Raises:
        InputError: an unreadable recipe, an unknown key in it, or values that a dataclass refuses.
    """
    # A second of imports, which reading a recipe should not cost.
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of flags; flags given beside it win.")
    flags = {action.dest: action for action in parser._actions}
    for name, action in flags.items():
        # Where neither is given the script decides; transformers gives such flags no bare form of their own.
        if action.type is string_to_bool and action.default is None:
            action.nargs, action.const = "?", True
            negative = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
            parser.add_argument(*negative, dest=name, action="store_false", default=argparse.SUPPRESS)
    recipe_path = _recipe_path(argv)
    if recipe_path is not None:
        recipe = read_recipe(recipe_path)
        for key, value in recipe.items():
            if key not in flags or key in ("config", "help"):
                near = difflib.get_close_matches(key, flags, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"{recipe_path}: unknown key {key!r}{hint}")
            parser.set_defaults(**{key: _as_flag_value(flags[key], value, f"{recipe_path}: {key}")})
            flags[key].required = False
    namespace = parser.parse_args(argv)
    instances = []
    for argument_class in argument_classes:
        names = {field.name for field in dataclasses.fields(argument_class) if field.init}
        values = {name: value for name, value in vars(namespace).items() if name in names}
        try:
            instances.append(argument_class(**values))
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from None
    return tuple(instances)


def _recipe_path(argv: list[str]) -> str | None:
    for position, argument in enumerate(argv):
        if argument == "--config":
            if position + 1 == len(argv):
                raise InputError("--config needs the path of a recipe")
            return argv[position + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _as_flag_value(action: Any, value: Any, where: str) -> Any:
    """A recipe's value as the flag would have parsed it: YAML reads 1e-4 as a string and 5 as an int."""
    if value is None and (action.required or action.default is not None):
        raise InputError(f"{where}: null is not a valid value; leave the key out for the default")
    if value is None or action.type is None:
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    many = isinstance(value, list)
    if many != (action.nargs in ("+", "*")):
        raise InputError(f"{where}: expected {'one value' if many else 'a list'}, not {value!r}")
    try:
        converted = [
            action.type(item if isinstance(item, bool) else str(item))
            for item in (value if many else [value])
        ]
    except (ValueError, TypeError):
        raise InputError(f"{where}: {value!r} is not a valid value") from None
    except Exception as error:  # argparse.ArgumentTypeError of transformers' own converters
        raise InputError(f"{where}: {error}") from None
    if action.choices is not None and any(item not in action.choices for item in converted):
        raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}")
    return converted if many else converted[0]


def provenance() -> dict[str, Any]:
    """How this process was started: `command` (without tokens), versions of `packages`, the project's `git_commit`."""
    words = list(sys.argv)
    for position, word in enumerate(words):
        if "token" in word.split("=")[0]:
            words[position] = word.split("=")[0]
            if "=" not in word and position + 1 < len(words):
                words[position + 1] = "***"
    words[0] = os.path.basename(words[0])
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {
        "command": shlex.join(words),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": commit.stdout.strip() or None if commit else None,
    }


def run(main: Callable[[], Any]) -> None:
    """Run a script's `main`; a user's mistake becomes `script: error: …` lines on stderr and exit status 2."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
    except InputError as error:
        for line in error.lines():
            print(f"{script}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        # A path that the user gave and that cannot be what it is to be; whoever met it first, a library or we.
        if error.filename is None:
            raise
        print(f"{script}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # An error that is nobody's mistake but expected all the same (a push that failed) brings its exit status along.
        if not hasattr(error, "exit_code"):
            raise
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
