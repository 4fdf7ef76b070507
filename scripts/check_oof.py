# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Check a run's tables, your own or another team's, against the contract of docs/SHARING.md, and print their scores.

    python scripts/check_oof.py ORG/NAME-oof:anchor --label_guide label_guides/dmrs.yaml
    python scripts/check_oof.py outputs/demo-minilm

Checked: run.json and folds.json; that the out-of-fold tables hold every row of folds.json once, in its fold; that no
dialogue is in two folds if folds are made of dialogues; that logits are finite, one per label; that labels are within the
label names; that all test tables hold the same rows. If not, one line per problem and exit status 2. Pulled code never runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import run as run_script
from rareturn.data.label_guide import load_label_guide
from rareturn.errors import InputError
from rareturn.reports.tables import measure_run, score_titles
from rareturn.runs.reading import Run, read_run


def check_label_guide(run: Run, path: str) -> None:
    """Refuse a run whose labels are not those of a guide.

    Raises:
        InputError: other names, another order, or other positive labels.
    """
    guide = load_label_guide(path)
    problems = [
        f"{run.reference}: {key}: the run has {of_run}, {path} has {of_guide}"
        for key, of_run, of_guide in (
            ("label_names", run.label_names, list(guide.names)),
            ("positive_labels", run.positive_labels, list(guide.positive)),
        )
        if of_run != of_guide
    ]
    if problems:
        raise InputError(*problems)


def describe(run: Run) -> list[str]:
    """What the tables hold, one line per fact."""
    info, sizes = run.info, np.bincount(run.oof.fold, minlength=run.info["num_folds"])
    folds_of: dict[str, set[int]] = {}
    for dialogue_id, fold in zip(run.oof.dialogue_id, run.oof.fold.tolist(), strict=True):
        folds_of.setdefault(dialogue_id, set()).add(fold)
    shared = sum(len(folds) > 1 for folds in folds_of.values())
    parts = (
        f"{len(sizes)} folds of {sizes.min()} to {sizes.max()}" if len(sizes) > 1 else "one validation file"
    )
    tests = f"{len(run.test)} of {len(run.test[0])} rows" if run.test else "none, or not of every fold"
    return [
        f"run        {run.name} ({info['base_model']}, seed {info['seed']})",
        *([f"commit     {run.revision}"] if run.revision else []),
        f"rows       {len(run.oof)}, each once, in {parts}",
        f"dialogues  {len(folds_of)}, {shared or 'none'} of them in more than one fold",
        f"folds      of {'dialogues' if info['fold_groups'] == 'dialogue' else 'rows'}, seed {info['fold_seed']}",
        f"logits     {run.num_labels} per row, all finite, from {run.oof.logits.min():.2f} to {run.oof.logits.max():.2f}",
        f"test       {tests}",
    ]


def main() -> None:
    # Arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("reference", metavar="REF", help="A run's folder, or ORG/NAME-oof:RUN[@REVISION].")
    parser.add_argument(
        "--label_guide", metavar="FILE", help="The labels that the run must have. Not compared by default."
    )
    parser.add_argument(
        "--require_test",
        action="store_true",
        help="A fold without a test table is an error. Off by default: calibration needs none.",
    )
    arguments = parser.parse_args()

    # Data
    run = read_run(arguments.reference, require_test=arguments.require_test)
    if arguments.label_guide:
        check_label_guide(run, arguments.label_guide)

    # Evaluate
    predictions, results = run.oof.logits.argmax(axis=1), measure_run(run)
    scores = results["argmax"]
    print("\n".join(describe(run)))
    parts = {"out-of-fold rows": scores}
    if "test" in results:
        parts[f"{results['test']['rows']} labelled rows of the test tables"] = results["test"]["argmax"]
    for where, of_part in parts.items():
        print(f"\nArgmax on the {where} (nothing is fitted to them; 95 % intervals over dialogues)")
        for name in score_titles(results["metric"]):
            low, high = of_part["interval"].get(name, (np.nan, np.nan))
            print(f"  {name:<24} {of_part[name]:.4f}  [{low:.4f}, {high:.4f}]")
    print("\n  label                          rows  predicted      F1")
    for number, (name, f1) in enumerate(zip(run.label_names, scores["f1_per_class"], strict=True)):
        counts = f"{(run.oof.label == number).sum():>6} {(predictions == number).sum():>10}"
        print(f"  {f'{number} {name}':<28} {counts}  {f1:.4f}")


if __name__ == "__main__":
    run_script(main)
