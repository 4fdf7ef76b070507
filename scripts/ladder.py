# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Run any list of recipes and systems, one after the other, and put what came of them into one table.

    python scripts/ladder.py recipes/ladder/*.yaml
    python scripts/ladder.py recipes/minilm/demo.yaml systems/demo.yaml --table outputs/demo-ladder
    python scripts/ladder.py recipes/ladder/*.yaml --output_dir outputs/small --set \\
        model_name_or_path="$(python scripts/packaged_model.py smollm2-135m)" quantization=none num_train_epochs=3

A recipe goes to scripts/launch_folds.sh, a file with `runs` to scripts/system.py. They skip what is complete and resume what is
not, so the same command goes on where it stopped. A rung that fails is left out of the table and does not stop the others.
Environment: that of scripts/launch_folds.sh (GPUS, JOBS, PYTHON).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script in a folder of its own finds the package in the root, from wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import read_recipe, run
from rareturn.errors import InputError
from rareturn.reports.tables import score_titles, system_figures, systems_table, write_systems
from rareturn.runs.schemas import metric_of
from rareturn.runs.systems import read_gold, read_system, run_costs

ROOT = Path(__file__).resolve().parent.parent
METHOD = "expected"  # for runs; the best single one in docs/BENCHMARKS.md, and seconds


@dataclass
class Rung:
    """A recipe or a system."""

    name: str
    command: list[str]
    systems: dict[Path, list[Path]]  # what the table shows, and the run folders that each is made of
    fold: Any = None  # of a run that trains no others


def read_rung(path: str, output_dir: Path, settings: dict[str, str]) -> Rung:
    """The command of a recipe or system; its outputs keep their names and are put into `output_dir`."""
    name, content = f"{Path(path).absolute().parent.name}/{Path(path).stem}", read_recipe(path)
    output = output_dir / Path(str(content.get("output_dir", content.get("output", name)))).name
    flags = [f"--{key}={value}" for key, value in settings.items()]
    if isinstance(runs := content.get("runs"), dict):
        folders = [Path(f"{output}-{run}") for run in runs]
        systems = {output: folders} if "ensemble" in content else {folder: [folder] for folder in folders}
        python = os.environ.get("PYTHON") or sys.executable
        command = [python, str(ROOT / "scripts/system.py"), path, "--output", str(output), *flags]
        return Rung(name, command, systems)
    command = [str(ROOT / "scripts/launch_folds.sh"), path, *flags, "--output_dir", str(output)]
    return Rung(name, command, {output: [output]}, settings.get("fold", content.get("fold")))


def shown(command: list[str]) -> str:
    """The command as one would type it in the project's folder."""
    words = ("python" if word == sys.executable else word.removeprefix(f"{ROOT}/") for word in command)
    return shlex.join(words)


def main() -> None:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("rungs", nargs="+", metavar="FILE", help="Recipes and systems, from the bottom up.")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Flags for every run, in place of the recipes'. fold=0 trains that fold alone.",
    )
    parser.add_argument("--output_dir", default="outputs", help="Folder of all runs. Default: outputs.")
    parser.add_argument("--table", help="The table, without its ending. Default: OUTPUT_DIR/ladder.")
    parser.add_argument("--labels", help="The test file with its labels: the test tables are scored, too.")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands and run none.")
    arguments = parser.parse_args()
    if wrong := [word for word in arguments.set if not word.partition("=")[2]]:
        raise InputError(f"--set {wrong[0]}: KEY=VALUE expected")
    settings = dict(word.split("=", 1) for word in arguments.set)
    output_dir = Path(arguments.output_dir)
    rungs = [read_rung(path, output_dir, settings) for path in arguments.rungs]
    if arguments.dry_run:
        print("\n".join(shown(rung.command) for rung in rungs))
        return

    # Train
    failed = []
    for rung in rungs:
        print(f"\n== {rung.name}: {shown(rung.command)}", flush=True)
        failed += [rung.name] * (subprocess.run(rung.command, check=False).returncode != 0)

    # Evaluate
    metric, figures = None, {}
    for rung in rungs:
        folds = None if rung.fold is None else [int(rung.fold)]
        for folder, runs in rung.systems.items() if rung.name not in failed else ():
            system = read_system(str(folder), METHOD, metric, folds=folds)
            metric = metric or metric_of(system.info)
            test = read_gold(arguments.labels, [system]) if arguments.labels else []
            found = system_figures(system, system.truth(metric), test, arguments.labels)
            name = rung.name if len(rung.systems) == 1 else folder.name
            figures[name] = found | run_costs(runs, folds)

    # Save
    if figures:
        note = "Seconds: all folds; parameters and memory: the largest model's."
        table = systems_table(score_titles(metric)[metric], figures, METHOD, note)
        stem = Path(arguments.table or output_dir / "ladder")
        write_systems(stem, "Ladder", [table], figures, metric)
        print(f"\n{table.text()}\n\nwrote {stem}.md, .html, .csv and .png")
    if failed:
        print(f"ladder.py: failed, and not in the table: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
