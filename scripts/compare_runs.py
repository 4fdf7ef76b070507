# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Is system B better than system A: their out-of-fold predictions, side by side.

A system is a run (its argmax) or an output folder of ensemble.py (its decision, cross-fitted):
    python scripts/compare_runs.py outputs/anchor outputs/ensemble
    python scripts/compare_runs.py outputs/demo-probe outputs/demo --output_file comparison.json
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# A script in a folder of its own finds the package in the root, from wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn import command_line
from rareturn.data.label_guide import METRICS_HELP
from rareturn.decisions.metrics import Truth, difference_interval
from rareturn.files import write_json
from rareturn.reports.tables import Table
from rareturn.runs.alignment import check_shared, row_positions
from rareturn.runs.schemas import metric_of
from rareturn.runs.systems import System, read_system


@dataclass
class Comparison:
    """Two systems on the same rows.

    Attributes:
        scores: of A and of B, the mean over their repeats.
        difference: B minus A.
        interval: 95 % interval of the difference, by bootstrap over dialogues, both systems on the same samples.
        flips: one dict a pair of different labels: `a`, `b`, `rows`, `a_right`, `b_right`, `ids`; most rows first. Of
            repeated predictions the first repeat counts.
    """

    scores: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    flips: list[dict[str, Any]]


def compare(first: System, second: System, metric: str, seed: int) -> Comparison:
    """Compare B with A.

    Raises:
        InputError: the systems disagree in labels, fold groups or rows.
    """
    check_shared(second.reference, second.info, first.reference, first.info)
    positions = row_positions(second.reference, second.table, first.reference, first.table)
    labels, groups = first.table.label, first.table.dialogue_id
    both = first.predictions, second.predictions[:, positions]
    num_labels, positive = len(first.info["label_names"]), first.info["positive_labels"]
    truth = Truth(labels, groups, num_labels, positive, metric, seed)
    scores = tuple(truth.scores(rows)[metric] for rows in both)
    interval = difference_interval(truth, *both)
    a, b = both[0][0], both[1][0]
    pairs = Counter(zip(a[a != b].tolist(), b[a != b].tolist(), strict=True))
    flips = []
    for (of_a, of_b), rows in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        here = np.flatnonzero((a == of_a) & (b == of_b))
        flips.append(
            {
                "a": of_a,
                "b": of_b,
                "rows": rows,
                "a_right": int((labels[here] == of_a).sum()),
                "b_right": int((labels[here] == of_b).sum()),
                "ids": [first.table.id[row] for row in here],
            }
        )
    return Comparison(scores, scores[1] - scores[0], interval, flips)


def flip_table(found: Comparison, label_names: Sequence[str], num_rows: int) -> Table:
    """The rows on which two systems differ, by pair of labels, with the first ids of each."""
    rows = [
        [
            f"{flip['a']} {label_names[flip['a']]} -> {flip['b']} {label_names[flip['b']]}",
            str(flip["rows"]),
            str(flip["a_right"]),
            str(flip["b_right"]),
            ", ".join(flip["ids"][:3]) + (", ..." if flip["rows"] > 3 else ""),
        ]
        for flip in found.flips
    ]
    total = sum(flip["rows"] for flip in found.flips)
    return Table(
        f"Rows that flip: {total} of {num_rows}", ("A -> B", "rows", "A right", "B right", "ids"), rows
    )


def main() -> None:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("systems", nargs=2, metavar="SYSTEM", help="Runs, or output folders of ensemble.py.")
    parser.add_argument(
        "--metric", help=f"Score to compare: {METRICS_HELP}. Default: that of the first system."
    )
    parser.add_argument("--seed", type=int, default=42, help="Seed of the bootstrap. Default: 42.")
    parser.add_argument("--output_file", help="JSON file for the figures and the ids of all rows that flip.")
    arguments = parser.parse_args()

    first, second = (read_system(reference) for reference in arguments.systems)
    metric, other = metric_of(first.info, arguments.metric), metric_of(second.info)
    found = compare(first, second, metric, arguments.seed)
    sides = list(zip("AB", (first, second), found.scores, strict=True))
    for letter, system, score in sides:
        print(f"{letter}: {system.reference} ({system.what}): {metric} {score:.4f}")
    if arguments.metric is None and other != metric:
        print(f"B was made for {other}; both are compared by {metric}, for which A was made")
    low, high = found.interval
    print(
        f"B minus A: {found.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired, over dialogues)\n"
    )
    print(flip_table(found, first.info["label_names"], len(first.table)).text())
    if arguments.output_file:
        content = {
            "metric": metric,
            **{
                letter.lower(): {"reference": system.reference, "what": system.what, "score": score}
                for letter, system, score in sides
            },
            "difference": found.difference,
            "interval": list(found.interval),
            "flips": found.flips,
        }
        write_json(arguments.output_file, content)


if __name__ == "__main__":
    command_line.run(main)
