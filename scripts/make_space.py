# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Push a private Space that runs app.py over a published ensemble.

    python scripts/make_space.py ORG/NAME --space ORG/NAME-app

It holds app.py, the package of this checkout, the versions that its tests ran with, a card, and the ensemble's name at its
newest commit (or at the one given, ORG/NAME@REVISION). The same command again brings both up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

import yaml

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import provenance, start_logging
from rareturn.command_line import run as run_script
from rareturn.errors import InputError
from rareturn.reports.tables import render
from rareturn.runs.bundle import HUB_BUNDLE, read_bundle
from rareturn.runs.hub import push_files, resolve_revision
from rareturn.runs.references import check_name

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"[\w.-]+")


def pinned(root: Path) -> dict[str, str]:
    """What the package and the app need, by name: as requirements.txt pins it, else as pyproject.toml asks for it."""
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = {NAME.match(line)[0].lower(): line for line in needed}
    for file in ("requirements.txt", "requirements-app.txt"):
        for line in (root / file).read_text().splitlines():
            name = NAME.match(line)[0].lower()
            if name in lines or file == "requirements-app.txt":
                lines[name] = line
    return lines


def main() -> None:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="The ensemble, ORG/NAME[@REVISION] on the Hub.")
    parser.add_argument("--space", required=True, metavar="ORG/NAME", help="The Space to make or to update.")
    arguments = parser.parse_args()
    start_logging()

    if (match := HUB_BUNDLE.fullmatch(arguments.bundle)) is None or Path(arguments.bundle).is_dir():
        advice = "a Space loads its ensemble from the Hub; push it first (ensemble.py --push_to_hub)"
        raise InputError(f"{arguments.bundle}: not ORG/NAME[@REVISION]: {advice}")
    namespace, _, name = arguments.space.partition("/")
    check_name(namespace, "--space: organisation"), check_name(name, "--space: name")
    repo_id = match["repo"]
    revision = resolve_revision(repo_id, revision=match["revision"])
    bundle, _ = read_bundle(f"{repo_id}@{revision}")
    requirements = pinned(ROOT)

    header = {
        "title": name,
        "sdk": "gradio",
        "sdk_version": requirements["gradio"].partition("==")[2],
        "python_version": "3.11",
        "app_file": "app.py",
        "models": [repo_id],
        "tags": ["rareturn"],
        **({"license": bundle.guide.license} if bundle.guide.license else {}),
    }
    facts = {"name": name, "repo_id": repo_id, "revision": revision, "commit": provenance()["git_commit"]}
    card = render("space_card.md.jinja", card_data=yaml.safe_dump(header, sort_keys=False).strip(), **facts)
    settings = {"bundle": f"{repo_id}@{revision}", "server_name": "0.0.0.0"}  # a Space is a container
    files = {
        "README.md": card.encode(),
        "requirements.txt": "\n".join([*requirements.values(), ""]).encode(),
        "space.yaml": yaml.safe_dump(settings).encode(),
        "app.py": ROOT / "app.py",
    }
    package = [path for path in sorted((ROOT / "rareturn").rglob("*")) if path.is_file()]
    files |= {path.relative_to(ROOT).as_posix(): path for path in package if "__pycache__" not in path.parts}
    sha = push_files(arguments.space, files, message="App", kept_in=ROOT, repo_type="space")
    print(f"pushed {arguments.space} at {sha}")
    print(
        f"If {repo_id} or what it names is private, put a token that may read it into the Space's secrets: HF_TOKEN"
    )


if __name__ == "__main__":
    run_script(main)
