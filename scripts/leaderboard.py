# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Rank runs and ensembles by their out-of-fold rows, with intervals and paired differences to the best.

    python scripts/leaderboard.py outputs/anchor outputs/seed-a team-b/psydefdetect-oof:anchor --output_dir outputs/board
    python scripts/leaderboard.py outputs/demo-probe outputs/demo --labels GOLD.json

A run is decided by a rule that is fitted here and cross-fitted, an output folder of ensemble.py by its own decision, cross-fitted.
Of two systems the rows are shown on which they differ. Test rows are scored if --labels has their labels: by the mean of the
folds, and the rule that is fitted on all out-of-fold rows. They rank nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A script in a folder of its own finds the package in the root, from wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn import command_line
from rareturn.data.label_guide import METRICS_HELP
from rareturn.decisions.methods import METHODS
from rareturn.decisions.metrics import difference_interval
from rareturn.errors import InputError
from rareturn.files import write_json
from rareturn.reports import tables
from rareturn.reports.tables import Table
from rareturn.runs.alignment import check_shared, row_positions
from rareturn.runs.schemas import metric_of
from rareturn.runs.systems import read_gold, read_system


def find_flips(labels: np.ndarray, first: np.ndarray, second: np.ndarray, ids: Sequence[str]) -> list[dict]:
    """Each pair of different labels [n] that two systems give the same rows, most rows first."""
    flips = []
    for (a, b), count in Counter(zip(first.tolist(), second.tolist(), strict=True)).items():
        here = np.flatnonzero((first == a) & (second == b))
        right = {name: int((labels[here] == label).sum()) for name, label in (("a_right", a), ("b_right", b))}
        if a != b:
            flips.append({"a": a, "b": b, "rows": count, **right, "ids": [ids[row] for row in here]})
    return sorted(flips, key=lambda flip: (-flip["rows"], flip["a"], flip["b"]))


def flip_table(flips: Sequence[dict[str, Any]], names: Sequence[str], labels: Sequence[str]) -> Table:
    """The rows on which two systems differ, by pair of labels, with the first ids of each."""
    rows = []
    for flip in flips:
        pair = " → ".join(f"{label} {labels[label]}" for label in (flip["a"], flip["b"]))
        ids = ", ".join(flip["ids"][:3]) + (", ..." if flip["rows"] > 3 else "")
        rows.append([pair, str(flip["rows"]), str(flip["a_right"]), str(flip["b_right"]), ids])
    header = (" → ".join(names), "rows", "first right", "second right", "ids")
    return Table(f"Rows that flip: {sum(flip['rows'] for flip in flips)}", header, rows)


def main() -> None:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known = "Runs: folders, or ORG/NAME-oof:RUN[@REVISION] on the Hub; or output folders of ensemble.py."
    parser.add_argument("systems", nargs="+", metavar="SYSTEM", help=known)
    parser.add_argument("--labels", help="The test file with its labels: the test tables are scored, too.")
    parser.add_argument(
        "--method",
        default="expected",
        choices=["auto", *METHODS],
        help="How a run's rule is fitted. Default: expected, the best single one in docs/BENCHMARKS.md and seconds; "
        "argmax fits none.",
    )
    parser.add_argument("--metric", help=f"Score to rank by: {METRICS_HELP}. Default: the first system's.")
    parser.add_argument("--seed", type=int, default=42, help="Of folds and bootstraps. Default: 42.")
    parser.add_argument("--output_dir", help="Folder for leaderboard.md, .html, .csv, .png and .json.")
    arguments = parser.parse_args()
    if twice := [name for name, count in Counter(arguments.systems).items() if count > 1]:
        raise InputError(f"{twice[0]}: named twice")

    # Data
    metric, systems, places = arguments.metric, [], []
    for reference in arguments.systems:
        systems.append(system := read_system(reference, arguments.method, metric, arguments.seed))
        first, metric = systems[0], metric or metric_of(system.info)
        check_shared(reference, system.info, first.reference, first.info)
        places.append(row_positions(reference, system.table, first.reference, first.table))
    metric = metric_of(first.info, metric)
    test = read_gold(arguments.labels, systems) if arguments.labels else []

    # Evaluate
    truth, predictions, figures = first.truth(metric, arguments.seed), {}, {}
    for system, place in zip(systems, places, strict=True):
        own = system.truth(metric, arguments.seed)
        figures[system.reference] = tables.system_figures(system, own, test, arguments.labels)
        predictions[system.reference] = system.predictions[:, place]
    order = sorted(figures, key=lambda name: -figures[name]["cross_fitted"][0])
    best, figures = order[0], {name: figures[name] for name in order}
    for name in order[1:]:
        difference = figures[name]["cross_fitted"][0] - figures[best]["cross_fitted"][0]
        interval = difference_interval(truth, predictions[best], predictions[name])
        figures[name]["difference"] = [difference, *interval]
    size = f"{len(truth.labels):,} rows of {truth.num_groups:,} dialogues"
    note = f"Ranked by the rule; differences are paired; {tables.fold_text(first.info)}."
    made = {system.reference: metric_of(system.info) for system in systems}
    if arguments.metric is None and len(set(made.values())) > 1:
        named = ", ".join(f"{name} for {own}" for name, own in made.items())
        note += f" Made for several metrics ({named}); this is by {metric}, the first one's."
    shown = [
        tables.systems_table(
            f"{tables.score_titles(metric)[metric]}, {size}", figures, arguments.method, note
        )
    ]
    content: dict[str, Any] = {"metric": metric, "systems": figures}
    if len(order) == 2:
        both = (predictions[name][0] for name in order)  # of repeated predictions the first
        content["flips"] = find_flips(truth.labels, *both, first.table.id)
        shown.append(flip_table(content["flips"], order, first.info["label_names"]))
    print("\n\n".join(table.text() for table in shown))

    # Save
    if arguments.output_dir:
        stem = Path(arguments.output_dir) / "leaderboard"
        tables.write_systems(stem, "Leaderboard", shown, figures, metric)
        write_json(stem.with_suffix(".json"), content)
        print(f"\nwrote {stem}.html")


if __name__ == "__main__":
    command_line.run(main)
