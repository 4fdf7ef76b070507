"""Check a run's tables, your own or another team's, against the contract of docs/SHARING.md, and print their scores.

    python scripts/check_oof.py ORG/NAME-oof:anchor --label_guide label_guides/dmrs.yaml
    python scripts/check_oof.py outputs/minilm-demo

Checked: run.json and folds.json; every row of folds.json once in the out-of-fold tables, in its fold; no dialogue in two
folds where folds are made of dialogues; finite logits, one a label; labels within the label names; test tables of equal
rows. Exit status 2 and one line a problem where something is wrong. Nothing of a pulled repo is run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

# A script in a folder of its own finds the modules of the root, from wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn import command_line
from rareturn.data.label_guide import load_label_guide
from rareturn.decisions import metrics
from rareturn.decisions.metrics import METRIC_NAMES, bootstrap_interval
from rareturn.errors import InputError
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
    """What the tables hold, one line a fact."""
    info, sizes = run.info, np.bincount(run.oof.fold, minlength=run.info["num_folds"])
    folds_of: dict[str, set[int]] = {}
    for dialogue_id, fold in zip(run.oof.dialogue_id, run.oof.fold.tolist(), strict=True):
        folds_of.setdefault(dialogue_id, set()).add(fold)
    shared = sum(len(folds) > 1 for folds in folds_of.values())
    tests = f"{len(run.test)} of {len(run.test[0])} rows" if run.test else "none, or not of every fold"
    return [
        f"run        {run.name} ({info['base_model']}, seed {info['seed']})",
        *([f"commit     {run.revision}"] if run.revision else []),
        f"rows       {len(run.oof)}, each once, in {len(sizes)} folds of {sizes.min()} to {sizes.max()}",
        f"dialogues  {len(folds_of)}, {shared or 'none'} of them in more than one fold",
        f"folds      of {'dialogues' if info['fold_groups'] == 'dialogue' else 'rows'}, seed {info['fold_seed']}",
        f"logits     {run.num_labels} a row, all finite, from {run.oof.logits.min():.2f} to {run.oof.logits.max():.2f}",
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
    predictions = run.oof.logits.argmax(axis=1)
    facts = {"num_labels": run.num_labels, "positive_labels": run.positive_labels}
    scores = metrics.scores(run.oof.label, predictions, **facts)
    low, high = bootstrap_interval(run.oof.label, predictions, run.oof.dialogue_id, **facts)
    print("\n".join(describe(run)))
    print("\nArgmax on the out-of-fold rows (nothing is fitted to them; 95 % interval over dialogues)")
    for name in METRIC_NAMES:
        interval = f"  [{low:.4f}, {high:.4f}]" if name == "macro_f1_positive" else ""
        print(f"  {name:<24} {scores[name]:.4f}{interval}")
    print("\n  label                          rows  predicted      F1")
    for number, (name, f1) in enumerate(zip(run.label_names, scores["f1_per_class"], strict=True)):
        counts = f"{(run.oof.label == number).sum():>6} {(predictions == number).sum():>10}"
        print(f"  {f'{number} {name}':<28} {counts}  {f1:.4f}")


if __name__ == "__main__":
    command_line.run(main)
