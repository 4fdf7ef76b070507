"""What every script does with its command line: flags and a recipe in, one line out where something is wrong.

A recipe is a YAML mapping whose keys are the script's own flags (`TrainingArguments` names included). Its values are
put in front of the words that the user typed, so a flag on the command line wins over the recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

from rareturn.errors import InputError
from rareturn.files import check_writable

REQUIRED = MISSING
TRAINING_GROUP = "transformers' TrainingArguments"
PACKAGES = "torch transformers peft bitsandbytes accelerate datasets scikit-learn numpy"
SECRET = re.compile(r"--(?:\w+[_-])?token")


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a flag of the command line; `REQUIRED` stands for no default.

    `help` says what it is, its unit, and why the default is what it is; `options` are argparse's, such as `choices`.
    """
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, **options}, **how)


@dataclass
class HubArguments:
    """Where results are pushed; the same flags in every script that makes something to share."""

    _argument_group_name = "Hub"

    push_to_hub: bool = flag(False, "Push what this script makes.")
    hub_namespace: str | None = flag(None, "User or organisation to push to.")
    hub_name: str | None = flag(None, "Name of the system; repositories are called after it.")
    hub_private_repo: bool = flag(True, "Make new repositories private. An existing one stays as it is.")
    push_only: bool = flag(False, "Push what is complete on disk and compute nothing.")

    def __post_init__(self) -> None:
        if self.wanted and not (self.hub_namespace and self.hub_name):
            asked = "--push_only" if self.push_only else "--push_to_hub"
            raise ValueError(f"{asked} needs --hub_namespace and --hub_name")

    @property
    def wanted(self) -> bool:
        """Whether anything is pushed."""
        return self.push_to_hub or self.push_only


@dataclass
class LoaderArguments:
    """How a base model is loaded: the same flags in every script that loads one."""

    model_revision: str | None = flag(None, "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = flag(False, "Let a Hub model run its own Python code.")
    gguf_file: str | None = flag(None, "GGUF file in that repo or folder to read weights and tokenizer from.")
    quantization: str = flag("none", "nf4 loads the model in 4 bits.", choices=["none", "nf4"])
    dtype: str = flag("float32", "Type of unquantized weights.", choices=["float32", "bfloat16", "float16"])
    attn_implementation: str | None = flag(None, "Attention kernel: sdpa, eager, … Default: the fastest.")


@dataclass
class TrunkCacheArguments:
    """The disk for what frozen layers give."""

    trunk_cache_gb: float = flag(
        20, "Disk for the frozen layers' output of all data sets, in GB; 0 computes it in every pass."
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it was written, one spelling a flag, and a default where it says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        if action.nargs in (0, "?"):
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.nargs == 0 or str(action.default) in ("None", "False", argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


def parse_arguments(
    own: Sequence[type], doc: str, argv: list[str] | None = None, training_arguments: Callable | None = None
) -> tuple[Any, ...]:
    """Parse the recipe that `--config` names and the flags into one instance of each dataclass.

    Args:
        own: the script's own dataclasses; a ValueError in `__post_init__` is a user error.
        training_arguments: gives one more class, the last, whose 120 flags `--help` leaves to `--help_all`. It is called
            only when it is needed, because importing transformers' `TrainingArguments` takes seconds. Where it has a
            flag that `own` have too, theirs stands.
    """
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise InputError(message)

    argv = sys.argv[1:] if argv is None else list(argv)
    classes = list(own)
    if training_arguments is not None and not {"-h", "--help"} & set(argv):
        classes.append(training_arguments())
        classes[-1]._argument_group_name = TRAINING_GROUP
    parser = Parser(
        usage="%(prog)s [--config RECIPE] [flags]",
        description=doc,
        allow_abbrev=False,
        conflict_handler="resolve",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of flags; flags given beside it win.")
    if training_arguments is not None:
        parser.add_argument("--help_all", action="help", help=f"Show the flags of {TRAINING_GROUP} too.")
    # Of two flags of one name the later one stands, so the script's own are added last; in the help they come first.
    for argument_class in (*classes[len(own) :], *own):
        parser._add_dataclass_arguments(argument_class)
    parser._action_groups.sort(key=lambda group: group.title == TRAINING_GROUP)
    for action in list(parser._actions):
        opposite = {"action": "store_false", "dest": action.dest, "help": f"The opposite of --{action.dest}."}
        if action.option_strings[0].startswith("--no_"):
            action.help = opposite["help"]
        elif action.type is string_to_bool and action.default is None:
            # Where neither is given the script decides; transformers gives such a flag no bare form of its own.
            action.nargs, action.const = "?", True
            spelt = (f"--no_{action.dest}", f"--no-{action.dest.replace('_', '-')}")
            parser.add_argument(*spelt, default=argparse.SUPPRESS, **opposite)
    given = vars(parser.parse_args(_recipe_words(parser, argv) + argv))
    names = {one: [field.name for field in dataclasses.fields(one) if field.init] for one in classes}
    for name in ("output_dir", "output", "output_file"):
        if given.get(name) and not given.get("push_only"):
            check_writable(Path(given[name]) if name == "output_dir" else Path(given[name]).parent)
    try:
        return tuple(one(**{name: given[name] for name in names[one]}) for one in classes)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping of flag names to values in a YAML file."""
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


def _recipe_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The recipe as words of a command line; they are parsed alone first, so that an error names the recipe."""
    finder = type(parser)(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return []
    words = []
    flags = {action.dest for action in parser._actions} - {"config", "help", "help_all"}
    for key, value in read_recipe(path).items():
        if key not in flags:
            near = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(key, flags, n=1))
            raise InputError(f"{path}: unknown key {key!r}{near}")
        if value is None:
            raise InputError(f"{path}: {key}: null is not a value; leave the key out for the default")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
            words.append(f"--{key}={text}")
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    try:
        parser.parse_args(words)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for action in required:
        action.required = True
    return words


def start_logging(level: int = logging.INFO) -> None:
    """Log lines to stderr, with the time; the HTTP clients speak up only when something is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("httpx", "httpx2", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, the value of each `--…_token` replaced by `***`."""
    shown = [re.sub(rf"(?s)^({SECRET.pattern})=.*", r"\1=***", word) for word in words]
    follows = [SECRET.fullmatch(before) is not None for before in ("", *words[:-1])]
    return ["***" if hide else word for hide, word in zip(follows, shown, strict=False)]


def provenance() -> dict[str, Any]:
    """How this process was started: `command` (without tokens), versions of `packages`, the project's `git_commit`."""
    words = [os.path.basename(sys.argv[0]), *without_secrets(sys.argv[1:])]
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    # Installed, the package lies in no checkout, or in that of another project.
    has_commit = (root / ".git").exists() and shutil.which("git")
    commit = subprocess.run(git, capture_output=True, text=True, check=False) if has_commit else None
    return {
        "command": shlex.join(words),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES.split()},
        # A Hub job has no checkout: scripts/launch_jobs.py tells it.
        "git_commit": (commit and commit.stdout.strip()) or os.environ.get("RARETURN_COMMIT") or None,
    }


def run(main: Callable[[], Any]) -> None:
    """Run a script's `main`; a user's mistake becomes `script: error: …` lines on stderr and exit status 2.

    SIGTERM is exit status 143, by an exception: temporary files go, and it works where the process is a container's first.
    """
    script = os.path.basename(sys.argv[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # A path that the user gave and that is not what it should be; whoever met it first, a library or we.
        of_path = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
        if isinstance(error, InputError):
            lines = error.lines()
        elif isinstance(error, of_path) and error.filename is not None:
            lines = [f"{error.filename}: {error.strerror}"]
        elif hasattr(error, "exit_code"):  # nobody's mistake, such as a push that did not arrive
            lines = [str(error)]
        else:
            raise
        for line in lines:
            print(f"{script}: error: {line}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
