"""command_line.py: recipes and flags are read as a user means them, and a path that cannot be used is one line."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, without_secrets
from rareturn.errors import InputError

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "data/demo/train.json"


def augment(train_file: Path, output_file: Path) -> subprocess.CompletedProcess:
    words = ["--labels", "8", "--train_file", str(train_file), "--output_file", str(output_file)]
    return subprocess.run(
        [sys.executable, "augment.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_path_through_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    ended = augment(TRAIN, tmp_path / "file" / "variants.jsonl")
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert line.startswith("augment.py: error: ") and str(tmp_path / "file") in line
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_a_package_in_another_project_does_not_take_its_commit(tmp_path: Path):
    """Installed below a checkout of something else, as in its virtual environment."""
    shutil.copytree(ROOT / "rareturn", tmp_path / "venv/rareturn")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    code = "from rareturn.command_line import provenance; print(provenance()['git_commit'])"
    env = {name: value for name, value in os.environ.items() if name != "RARETURN_COMMIT"}
    how = {"cwd": tmp_path / "venv", "env": env, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **how).stdout == "None\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path):
    source = tmp_path / "rows.json"
    source.write_bytes(TRAIN.read_bytes())
    source.chmod(0)
    ended = augment(source, tmp_path / "variants.jsonl")
    assert ended.returncode == 2
    assert f"augment.py: error: {source}: Permission denied" in ended.stderr.splitlines()
    assert not (tmp_path / "variants.jsonl").exists()


@dataclass
class Own:
    _argument_group_name = "Own"
    path: str = flag(REQUIRED, "A file.")
    rate: float = flag(1e-4, "A number.")
    gate: bool = flag(True, "A switch that is on.")
    bf16: bool | None = flag(None, "A switch that the script sets where nobody did.")
    labels: list[int] = flag([1, 2], "Numbers.")
    push_to_hub: bool = flag(False, "Ours.")

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError("--rate must be above 0")


@dataclass
class Theirs:
    """Stands for TrainingArguments, which takes seconds to import."""

    seed: int = 42
    push_to_hub: bool = field(default=False, metadata={"help": "Theirs."})


def parse(tmp_path: Path, recipe: str | None, *words: str) -> tuple:
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
        words = ("--config", str(tmp_path / "recipe.yaml"), *words)
    return parse_arguments((Own,), "What it does.", words, training_arguments=lambda: Theirs)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path):
    recipe = "path: a\nrate: 2e-4\ngate: false\nlabels: [3, 4, 5]\nseed: 7\n"
    own, theirs = parse(tmp_path, recipe)
    assert (own.path, own.rate, own.gate, own.bf16, own.labels, theirs.seed) == (
        "a",
        2e-4,
        False,
        None,
        [3, 4, 5],
        7,
    )
    own, theirs = parse(tmp_path, recipe, "--labels", "6", "--gate", "--bf16", "--path=b", "--seed", "8")
    assert (own.path, own.gate, own.bf16, own.labels, theirs.seed) == ("b", True, True, [6], 8)
    own, theirs = parse(tmp_path, "path: -a\npush_to_hub: true\n", "--no_gate", "--no_bf16")
    assert (own.path, own.gate, own.bf16) == ("-a", False, False)
    assert own.push_to_hub and theirs.push_to_hub  # one flag, ours, that both classes are told of


@pytest.mark.parametrize(
    ("recipe", "words", "line"),
    [
        ("path: a\ngate: [1, 2]\n", [], "recipe.yaml: unrecognized arguments: 2"),
        ("path: a\nrate: fast\n", [], "recipe.yaml: argument --rate: invalid float value: 'fast'"),
        ("path: a\nseed: 1.5\n", [], "recipe.yaml: argument --seed: invalid int value: '1.5'"),
        ("path: a\nlabel: [1]\n", [], "recipe.yaml: unknown key 'label'; did you mean 'labels'?"),
        ("path: a\nconfig: b\n", [], "recipe.yaml: unknown key 'config'"),
        ("path: a\nrate:\n", [], "recipe.yaml: rate: null is not a value; leave the key out for the default"),
        ("- path\n", [], "recipe.yaml: a recipe is a mapping of flag names to values"),
        ("path: {", [], "recipe.yaml: not a YAML file"),
        ("path: a\n", ["--rate", "0"], "--rate must be above 0"),
        ("path: a\n", ["--lab", "3"], "unrecognized arguments: --lab 3"),
        ("rate: 1\n", [], "the following arguments are required: --path"),
        (None, ["--path", "a", "--config"], "argument --config: expected one argument"),
        (None, ["--path", "a", "--config", "nowhere.yaml"], "nowhere.yaml: cannot read the recipe"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_it_stands(tmp_path: Path, recipe, words, line):
    with pytest.raises(InputError) as refused:
        parse(tmp_path, recipe, *words)
    (shown,) = refused.value.problems
    assert line in shown


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    for script, words in (
        ("ensemble", ["--output_dir", "file", "--runs", "nowhere"]),
        ("ensemble", ["--output_dir", "file/deeper/still", "--runs", "nowhere"]),
        ("calibrate", ["--output", "file/decision.json", "--run", "nowhere"]),
        ("augment", ["--output_file", "file/x.jsonl", "--train_file", "nowhere.json"]),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        with pytest.raises(InputError, match=r"cannot be written: .*file is not a folder"):
            importlib.import_module(script).main()


def test_help_shows_our_flags_and_help_all_theirs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shown = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse(tmp_path, None, word)
        assert not stop.value.code
        shown[word] = capsys.readouterr().out
    assert shown["--help"].startswith("usage: ") and "\nWhat it does.\n" in shown["--help"]
    assert "--seed" not in shown["--help"] and "--seed" in shown["--help_all"]
    for text in shown.values():
        assert "Ours." in text and "Theirs." not in text
        assert "The opposite of --gate." in text and "--no-gate" not in text
    assert shown["--help_all"].index("--labels") < shown["--help_all"].index("--seed")


def test_secrets_are_hidden_and_nothing_else():
    words = [
        "--hub_token",
        "hf_a",
        "--hub-token=hf_b",
        "--token",
        "hf_c",
        "--tokens_per_batch",
        "512",
        "--max_tokens=9",
        "--push",
    ]
    hidden = [
        "--hub_token",
        "***",
        "--hub-token=***",
        "--token",
        "***",
        "--tokens_per_batch",
        "512",
        "--max_tokens=9",
        "--push",
    ]
    assert without_secrets(words) == hidden


def test_pushing_needs_a_place():
    with pytest.raises(InputError, match="--push_only needs --hub_namespace and --hub_name"):
        parse_arguments((HubArguments,), "", ["--push_only", "--hub_name", "demo"])
