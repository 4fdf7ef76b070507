# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""All folds of a run as Jobs on the Hub's GPUs, one a fold; `launch_folds.sh RECIPE --jobs FLAVOR` hands over to it.

    scripts/launch_folds.sh recipes/qwen3-8b/anchor.yaml --jobs l4x1 --timeout 12h --hub_namespace ORG --hub_name NAME

A job mounts two volumes, both private. ORG/NAME-RUN, the run's model repo, holds the code: this checkout's package as a
wheel, run_classification.py, the recipe. The bucket of the same name is the run's folder, shared by its folds, so that
checkpoints outlive a job. The same command follows the jobs that run and starts those that are missing: a fold that is
complete on the Hub is left alone, one that was killed resumes. Each fold pushes its own result; when all have ended, they
are fetched, so that OUTPUT_DIR is as if the folds had been trained here. Training data and models must be on the Hub
already: no row leaves this machine.

Logs: OUTPUT_DIR/logs/fold-K.log. Ctrl-C leaves the jobs running. Exit status: 0, 1 (a job failed), 2 (a mistake, or the Hub
refuses), 130.

Sources: https://huggingface.co/docs/hub/jobs; `HfApi.run_job`, `list_jobs`, `list_jobs_hardware`, `fetch_job_logs` and `Volume`
of huggingface_hub 2.4; https://github.com/huggingface/hf-mount for what a mounted bucket keeps, and when.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, JobInfo, Volume, errors, get_token

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import provenance, read_recipe, start_logging, without_secrets
from rareturn.command_line import run as run_script
from rareturn.data.folds import FoldDataArguments
from rareturn.data.label_guide import load_label_guide
from rareturn.data.readers import HUB_FILE, check_on_hub
from rareturn.errors import InputError
from rareturn.files import packaged
from rareturn.runs.folder import check_same_run, fold_is_complete, read_run_info
from rareturn.runs.hub import ASK_SECONDS, Persistence, check_may_push, explain, push_files, resolve_revision
from rareturn.runs.publish import fetch_folds, pull_run
from rareturn.runs.references import check_name, model_repo, parse_reference, table_repo

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "python:3.11"  # torch's wheels bring CUDA
CODE, OUTPUTS = "/job", "/outputs"  # where the volumes are mounted
ROWS = ("train_file", "augmented_file", "extra_train_file", "validation_file", "test_file")
NEEDED = ("hub_namespace", "hub_name", "model_name_or_path")
SPLIT = ("num_folds", "fold_seed", "fold_groups")
READ = (*NEEDED, *ROWS, *SPLIT, "run_name", "label_guide", "model_revision", "do_predict")
HOURS = {"s": 1 / 3600, "m": 1 / 60, "h": 1, "d": 24}  # of --timeout, as `run_job` reads it
PER_HOUR = {"second": 3600, "minute": 60, "hour": 1}  # of a price's unit
RUNNING = ("SCHEDULING", "RUNNING")
FAILURES = (errors.HfHubHTTPError, httpx2.TransportError)
POLL_SECONDS = 10.0


def read_settings(recipe: str, flags: list[str]) -> dict[str, Any]:
    """What the recipe and the flags say of rows, model and Hub; the flags win. An InputError for what no job could read."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in READ:
        reader.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true")
    settings = {**read_recipe(recipe), **vars(reader.parse_known_args(flags)[0])}
    words = [*flags, *(f"--{key}=" for key in settings)]
    if without_secrets(words) != words:
        raise InputError("a token among the flags would be seen in the job: use HF_TOKEN or hf auth login")
    for name in NEEDED:
        if not settings.get(name):
            raise InputError(f"--{name} is missing: a job loads from the Hub and pushes there")
    for name in ROWS:
        if settings.get(name):
            check_on_hub(name, settings[name])
    if Path(model := settings["model_name_or_path"]).exists():
        raise InputError(f"--model_name_or_path {model}: on this machine: a job loads from the Hub")
    return settings


def make_code(recipe: str, guide: str | None, folder: Path) -> tuple[str, dict[str, Path]]:
    """The files that a job needs, by name, and where in the repo they lie: other bytes elsewhere, so that a job's stay.

    The package is a wheel, the same bytes for the same sources. A label guide goes along unless it is the package's.
    """
    source, wheels = folder / "source", folder / "wheels"
    for name in ("rareturn", "label_guides", "metrics"):  # a copy: setuptools leaves its own files behind
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    env = {**os.environ, "SOURCE_DATE_EPOCH": "315532800"}  # 1980, where the time of a zip file begins
    how = {"cwd": source, "env": env, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-c", build, str(wheels)], **how)
    if done.returncode:
        raise InputError(f"{ROOT}: cannot be made a wheel: {done.stderr.strip().splitlines()[-1]}")
    paths = [*wheels.iterdir(), ROOT / "run_classification.py", ROOT / "requirements.txt"]
    files = {"recipe.yaml": Path(recipe)} | {path.name: path for path in paths}
    if guide and not guide.startswith("label_guides/"):
        files["label_guide.yaml"] = Path(guide) if Path(guide).exists() else packaged(guide)
    content = b"".join(name.encode() + path.read_bytes() for name, path in files.items())
    return f"jobs/{hashlib.sha256(content).hexdigest()[:12]}", files


def fold_job(
    fold: int, repo: str, run: str, place: str, names: list[str], flags: list[str]
) -> dict[str, Any]:
    """A fold's job as `HfApi.run_job` takes it, without machine, time and secret; `names` are its code's, in `place`."""
    (wheel,) = (name for name in names if name.endswith(".whl"))
    install = ["python", "-m", "pip", "install", "--quiet", "--constraint", f"{CODE}/requirements.txt"]
    train = ["python", f"{CODE}/run_classification.py", "--config", f"{CODE}/recipe.yaml", *flags]
    train += ["--label_guide", f"{CODE}/label_guide.yaml"] if "label_guide.yaml" in names else []
    train += ["--fold", str(fold), "--output_dir", f"{OUTPUTS}/{run}", "--run_name", run, "--push_to_hub"]
    # `exec`: a job that is stopped sends its SIGTERM to the training, which then saves a checkpoint.
    script = f"{shlex.join([*install, f'{CODE}/{wheel}[gguf,tracking]'])} && exec {shlex.join(train)}"
    return {
        "image": IMAGE,
        "command": ["bash", "-c", script],
        "env": {"PYTHONUNBUFFERED": "1", "RARETURN_COMMIT": provenance()["git_commit"] or ""},
        "labels": {"name": f"{label_of(repo)}-fold-{fold}", "run": label_of(repo), "fold": str(fold)},
        "volumes": [
            Volume(type="model", source=repo, path=place, mount_path=CODE),
            Volume(type="bucket", source=repo, mount_path=f"{OUTPUTS}/{run}"),
        ],
        "namespace": repo.split("/")[0],
    }


def label_of(repo: str) -> str:
    """The label of a run's jobs; the Hub takes no other characters in one."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", repo.split("/")[1])


def as_command(job: dict[str, Any]) -> str:
    """The job as a command of `hf`, which sends the same and takes the token from where this script does."""
    words = ["hf", "jobs", "run", "--detach", "--secrets", "HF_TOKEN"]
    for name in ("namespace", "flavor", "timeout"):
        words += [f"--{name}", job[name]]
    for name, values in (("label", job["labels"]), ("env", job["env"])):
        words += [word for key, value in values.items() for word in (f"--{name}", f"{key}={value}")]
    words += [word for volume in job["volumes"] for word in ("--volume", volume.to_uri())]
    return shlex.join([*words, job["image"], *job["command"]])


def find_price(flavor: str) -> float:
    """Dollars an hour of a machine, as the Hub lists it; an InputError for one that a fold cannot use."""
    kinds = {kind.name: kind for kind in Persistence(ASK_SECONDS).call(HfApi().list_jobs_hardware)}
    if flavor not in kinds:
        raise InputError(f"--jobs {flavor}: not one of the Hub's machines: {', '.join(kinds)}")
    kind = kinds[flavor]
    if kind.accelerator and int(kind.accelerator.quantity) > 1:
        raise InputError(f"--jobs {flavor}: {kind.accelerator.quantity} GPUs, but a fold takes one")
    return kind.unit_cost_usd * PER_HOUR[kind.unit_label]


def files_on_hub(repos: dict[str, str]) -> set[str]:
    """The files of all these repos (type to id); none of one that is missing."""
    there: set[str] = set()
    for repo_type, repo in repos.items():
        with contextlib.suppress(errors.RepositoryNotFoundError):
            there |= {*Persistence().call(HfApi().list_repo_files, repo, repo_type=repo_type)}
    return there


def complete_on_hub(there: set[str], run: str, folds: range, splits: list[str]) -> list[int]:
    """The folds whose model, tables and run are among the Hub's files (`publish.push_fold`, `push_run`)."""
    if not {"run.json", f"data/{run}/run.json"} <= there:
        return []
    paths = ["fold-{0}/metrics.json", *(f"data/{run}/{split}-fold-{{0}}.parquet" for split in splits)]
    return [fold for fold in folds if {path.format(fold) for path in paths} <= there]


def check_same(
    settings: dict[str, Any], output_dir: Path, own: list[int], trained: list[int], reference: str
) -> None:
    """Refuse, before anything is paid for, a run on the Hub or in `output_dir` that is not the one asked for.

    `own` are the folds that are complete in the folder, `trained` those on the Hub, test tables aside.
    """
    is_here, info = (output_dir / "run.json").exists(), None
    if trained:  # jobs of other folds would end at once
        info = read_run_info(pull_run(reference, parse_reference(reference))[0])
        asked = {name: settings.get(name, getattr(FoldDataArguments, name)) for name in SPLIT}
        asked |= {"num_folds": 1} if settings.get("validation_file") else {}
        for name, value in asked.items():
            if str(value) != str(info[name]):
                there = f"--{name}: {info[name]} there, {value} asked for"
                raise InputError(f"{reference}: {there}; use another --run_name")
    if is_here and (unshared := [str(fold) for fold in own if fold not in trained]):
        what = f"fold {', '.join(unshared)} is complete here and not on the Hub"
        raise InputError(f"{output_dir}: {what}: push it (--push_only)")
    if is_here and not info:
        raise InputError(f"{output_dir}: holds a run that is not on the Hub; name another --output_dir")
    if is_here:
        check_same_run(output_dir, info)


def keep_log(job: JobInfo, path: Path) -> None:
    """Write a job's log to a file as it grows, until the job ends."""
    with open(path, "w", encoding="utf-8") as file, contextlib.suppress(*FAILURES):
        for line in HfApi().fetch_job_logs(job_id=job.id, namespace=job.owner.name, follow=True):
            file.write(f"{line}\n")
            file.flush()


def follow(jobs: dict[int, JobInfo], logs: Path) -> list[int]:
    """Show each change of a job's state as a line of a table, and take away who has ended; the folds that failed."""
    failed: list[int] = []
    stages: dict[int, str] = {}
    threads: dict[int, threading.Thread] = {}
    logs.mkdir(parents=True, exist_ok=True)
    print(f"\nfold  {'job':<24}  {'state':<10}  seconds")
    while jobs:
        for fold, job in [*jobs.items()]:
            now = Persistence().call(HfApi().inspect_job, job_id=job.id, namespace=job.owner.name)
            stage = now.status.stage
            if stage != "SCHEDULING" and fold not in threads:
                log = job, logs / f"fold-{fold}.log"
                threads[fold] = threading.Thread(target=keep_log, args=log, daemon=True)
                threads[fold].start()
            if stage != stages.get(fold):
                seconds = (now.durations and now.durations.running_secs) or 0
                print(f"{fold:>4}  {job.id:<24}  {stage:<10}  {seconds:>7}", flush=True)
            stages[fold] = stage
            if stage not in RUNNING:
                del jobs[fold]
                failed += [fold] * (stage != "COMPLETED")
        time.sleep(POLL_SECONDS if jobs else 0)
    for thread in threads.values():
        thread.join(timeout=30)
    return failed


def launch(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Check what can be checked for nothing, start the folds that are missing, and follow all to their end."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", arguments.timeout)):
        raise InputError(f"--timeout {arguments.timeout}: a number and s, m, h or d, such as 6h")
    settings = read_settings(arguments.recipe, flags)
    where, guide = (settings["hub_namespace"], settings["hub_name"]), settings.get("label_guide")
    run = check_name(settings.get("run_name") or Path(arguments.output_dir).resolve().name, "--run_name")
    repos = {"model": model_repo(*where, run), "dataset": table_repo(*where)}
    price = find_price(arguments.jobs)  # first: where the Hub does not answer, this ends it
    for repo_type, repo in repos.items():
        check_may_push(repo, repo_type)
    if guide:
        load_label_guide(guide)
    for found in [HUB_FILE.fullmatch(settings[name]) for name in ROWS if settings.get(name)]:
        resolve_revision(found["repo"], repo_type="dataset", revision=found["revision"])
    resolve_revision(settings["model_name_or_path"], revision=settings.get("model_revision"))

    # Folds
    folds, repo = range(arguments.first_fold, arguments.end_fold), repos["model"]
    splits = ["oof", "test"] if str(settings.get("do_predict")).lower() == "true" else ["oof"]
    listed = HfApi().list_jobs(labels={"run": label_of(repo)}, status=list(RUNNING), namespace=where[0])
    jobs = {int(job.labels["fold"]): job for job in listed if int(job.labels["fold"]) in folds}
    there = files_on_hub(repos)
    complete = [fold for fold in complete_on_hub(there, run, folds, splits) if fold not in jobs]
    missing = [fold for fold in folds if fold not in (*jobs, *complete)]
    for what, which in (("complete on the Hub", complete), ("running", [*jobs]), ("to start", missing)):
        if which:
            print(f"fold {', '.join(map(str, which))} of {repo}: {what}")
    output_dir = Path(arguments.output_dir)
    own = [fold for fold in folds if fold_is_complete(output_dir, fold)]
    trained = complete_on_hub(there, run, folds, ["oof"])
    check_same(settings, output_dir, own, trained, f"{repos['dataset']}:{run}")
    if not (jobs or missing):
        return None if arguments.dry_run else fetch_folds(output_dir, folds, *where, run)
    hours = len(missing) * float(match[1]) * HOURS[match[2]]
    most = f"at most {len(missing)} x {arguments.timeout}: ${hours * price:.2f}"
    print(f"{arguments.jobs}: ${price:.2f}/h, {most}, paid by {where[0]}")

    # Start
    try:
        with tempfile.TemporaryDirectory() as folder:
            place, files = make_code(arguments.recipe, guide, Path(folder))
            machine = {"flavor": arguments.jobs, "timeout": arguments.timeout}
            wanted = {fold: fold_job(fold, repo, run, place, [*files], flags) | machine for fold in missing}
            code = {f"{place}/{name}": path for name, path in files.items()}
            if arguments.dry_run:
                print(f"\nto push to {repo}: {', '.join(code)}\nto make unless it is there: bucket {repo}\n")
                return print(*map(as_command, wanted.values()), sep="\n")
            if missing:
                push_files(repo, code, message=f"{run}: code of its jobs", kept_in=ROOT, code=True)
                Persistence().call(HfApi().create_bucket, repo, private=True, exist_ok=True)
        for fold, job in wanted.items():  # not repeated: a lost answer would be paid twice
            jobs[fold] = HfApi().run_job(**job, secrets={"HF_TOKEN": get_token()})
        failed = follow(jobs, logs := output_dir / "logs")
    except KeyboardInterrupt:
        cancel = [f"hf jobs cancel {job.owner.name}/{job.id}" for job in jobs.values()]
        print("\nThe same command follows the jobs. To stop them:", *cancel, sep="\n  ", file=sys.stderr)
        raise
    if done := [fold for fold in folds if fold not in failed]:
        fetch_folds(output_dir, done, *where, run)
    if failed:
        names = ", ".join(map(str, failed))
        print(f"launch_jobs.py: error: failed folds: {names}; see {logs}", file=sys.stderr)
        sys.exit(1)
    print(f"pushed to {repos['dataset']}:{run}, and fetched into {output_dir}")


def main() -> None:
    """Run the script; see the module's docstring."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    for name in ("recipe", "first_fold", "end_fold", "output_dir"):  # launch_folds.sh has read them
        parser.add_argument(name, type=int if name.endswith("fold") else str)
    parser.add_argument("--jobs", required=True, metavar="FLAVOR", help="Kind of machine: hf jobs hardware.")
    parser.add_argument("--timeout", default="12h", help="Of a job: s, m, h or d. 12h, as on Slurm.")
    parser.add_argument("--dry_run", action="store_true", help="Print what would be sent, and the cost.")
    arguments, flags = parser.parse_known_args()
    start_logging()
    try:
        launch(arguments, flags)
    except FAILURES as error:
        raise InputError(f"the Hub: {explain(error)}; jobs that were started go on") from None


if __name__ == "__main__":
    run_script(main)
