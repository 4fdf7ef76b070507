"""What the methods of `rareturn.decisions` are worth: on real out-of-fold tables, on rows drawn from a known model, in seconds.

The reference task, tf-idf tables made on the spot beside two runs and blends of them, about half an hour of one core:
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --train_file AIMH/PsyDefConv:Splits/train.json \\
        --runs outputs/probe outputs/minilm --blends probe+minilm probe+word-balanced --output result.json
Coverage of the 95 % interval and optimism of the cross-fitted score, 100 draws from a known model:
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --simulate 100 --methods argmax expected exact auto
The same where argmax is hard to beat, with what the final choice between it and `auto` adds:
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --simulate 100 --methods argmax auto --prior 0.5
Seconds and memory of `exact` on a million rows:
    python benchmarks/decoding.py --scale 1000000

A table's figures: argmax, then for each method the score on the rows that it was fitted on and the cross-fitted one
(five times five folds of dialogues). Processor seconds, not the wall's, so that a shared machine favours no method.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this file's own folder has a decoding.py too

from rareturn import command_line  # noqa: E402
from rareturn.command_line import parse_arguments, provenance  # noqa: E402
from rareturn.data.folds import assign_folds  # noqa: E402
from rareturn.data.label_guide import load_label_guide  # noqa: E402
from rareturn.data.rows import load_rows  # noqa: E402
from rareturn.decisions.cross_fitting import (  # noqa: E402
    CrossFit,
    Recipe,
    choose,
    cross_fit,
    fit_rule,
    repeated_folds,
)
from rareturn.decisions.methods import METHODS, fit  # noqa: E402
from rareturn.decisions.metrics import Truth, scores  # noqa: E402
from rareturn.decisions.probabilities import softmax  # noqa: E402
from rareturn.decisions.rules import Decision, Rule, decide  # noqa: E402
from rareturn.errors import InputError  # noqa: E402
from rareturn.files import write_json  # noqa: E402
from rareturn.reports import tables as tables_module  # noqa: E402
from rareturn.runs.reading import read_run  # noqa: E402

METRIC = "macro_f1_positive"
# Class shares of the reference task, which the simulated rows follow.
SHARES = np.array([296, 108, 61, 99, 84, 48, 172, 968, 28]) / 1864
TEXT_TABLES = {
    "word-balanced": ({"ngram_range": (1, 2)}, {"class_weight": "balanced"}),
    "char-balanced": ({"analyzer": "char_wb", "ngram_range": (2, 5)}, {"class_weight": "balanced"}),
    "word-plain": ({"ngram_range": (1, 2)}, {"C": 3.0}),
}


@dataclass
class BenchmarkArguments:
    """Tables, methods and what to measure."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Labelled rows, for out-of-fold tables of tf-idf and logistic regression."},
    )
    runs: list[str] = field(
        default_factory=list, metadata={"help": "Runs, folders or on the Hub, each a table under its name."}
    )
    blends: list[str] = field(
        default_factory=list, metadata={"help": "Equal-weight blends of tables, as NAME+NAME."}
    )
    methods: list[str] = field(
        default_factory=lambda: [*METHODS, "auto"],
        metadata={"help": "Methods to compare. Default: all.", "choices": [*METHODS, "auto"]},
    )
    simulate: int = field(default=0, metadata={"help": "Draws of a simulated table. 0: no simulation."})
    scale: int = field(default=0, metadata={"help": "Rows of a table on which `exact` is timed. 0: none."})
    repeats: int = field(
        default=5, metadata={"help": "Partitions into folds a cross-fitted score is averaged over."}
    )
    num_vectors: int = field(
        default=22_000, metadata={"help": "Bias vectors of `random`; the paper's number."}
    )
    prior: float = field(
        default=1.0,
        metadata={
            "help": "Share of the log class prior in simulated logits. 1: honest probabilities, where a bias gains much; "
            "0.5, as class weights of 1/sqrt(n) leave it: argmax is hard to beat."
        },
    )
    jobs: int | None = field(
        default=1, metadata={"help": "Processes that cross-fit at the same time; 1, so that seconds compare."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of folds, searches and draws."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self) -> None:
        if not (self.train_file or self.runs or self.simulate or self.scale):
            raise ValueError("nothing to measure: give --train_file, --runs, --simulate or --scale")


@dataclass
class Table:
    """Out-of-fold logits [n, c] of one run, or of the runs of a blend."""

    logits: list[np.ndarray]
    labels: np.ndarray
    groups: list[str]
    ids: list[str]
    positive_labels: tuple[int, ...]
    protected: int | None

    def truth(self, seed: int) -> Truth:
        """What predictions of the rows are scored against."""
        return Truth(self.labels, self.groups, self.logits[0].shape[1], self.positive_labels, METRIC, seed)


# ---------------------------------------------------------------------------------------------------------------- tables


def text_tables(train_file: str) -> dict[str, Table]:
    """Out-of-fold tables of tf-idf features of the target utterance, on the folds that runs have by default."""
    guide = load_label_guide("label_guides/dmrs.yaml")
    rows = load_rows(train_file, guide)
    fold_of = assign_folds(rows, num_folds=5, fold_seed=42, fold_groups="dialogue")
    fold, labels = np.array([fold_of[row.id] for row in rows]), np.array([row.label for row in rows])
    texts = np.array([row.turns[-1].text for row in rows], dtype=object)
    tables = {}
    for name, (features, head) in TEXT_TABLES.items():
        logits = np.empty((len(rows), len(guide.numbers)))
        for number in tqdm(range(5), desc=name, unit="fold", leave=False):
            train = fold != number
            vectorizer = TfidfVectorizer(min_df=2, sublinear_tf=True, **features)
            model = LogisticRegression(max_iter=1000, **head)
            model.fit(vectorizer.fit_transform(texts[train]), labels[train])
            logits[~train] = model.decision_function(vectorizer.transform(texts[~train]))
        tables[name] = Table(
            [logits],
            labels,
            [row.dialogue_id for row in rows],
            [row.id for row in rows],
            tuple(guide.positive),
            guide.protected,
        )
    return tables


def run_table(reference: str) -> tuple[str, Table]:
    """A run's out-of-fold table under the run's name."""
    run = read_run(reference)
    protected = run.info.get("protected_label")
    return run.name, Table(
        [run.oof.logits],
        run.oof.label,
        run.oof.dialogue_id,
        run.oof.id,
        tuple(run.positive_labels),
        protected,
    )


def blend_table(name: str, tables: dict[str, Table]) -> Table:
    """The tables that a blend names, their rows in the first one's order."""
    parts = name.split("+")
    for part in parts:
        if part not in tables:
            raise InputError(f"--blends {name}: no table {part!r}; there are {', '.join(tables)}")
    first, logits = tables[parts[0]], []
    for part in parts:
        position = {row_id: number for number, row_id in enumerate(tables[part].ids)}
        if position.keys() != set(first.ids):
            raise InputError(f"--blends {name}: {part} has other rows than {parts[0]}")
        logits += [run[[position[row_id] for row_id in first.ids]] for run in tables[part].logits]
    return dataclasses.replace(first, logits=logits)


def make_recipe(arguments: BenchmarkArguments, table: Table, method: str) -> Recipe:
    """The recipe that `calibrate.py` has for the method: the gate is `auto`'s to choose, and the paper's always there."""
    protected = table.protected if method in ("auto", "random") else None
    return Recipe(method, protected_class=protected, num_vectors=arguments.num_vectors)


def measure_table(arguments: BenchmarkArguments, table: Table, method: str, bar: tqdm) -> dict[str, Any]:
    """In-sample and cross-fitted score of a method on a table, and the processor seconds of one fit."""
    recipe, truth = make_recipe(arguments, table, method), table.truth(arguments.seed)
    started = time.process_time()
    rule = fit_rule(recipe, table.logits, truth)
    seconds = time.process_time() - started
    folds = repeated_folds(truth, repeats=arguments.repeats)
    fitted = cross_fit(recipe, table.logits, truth, folds, progress=bar.update)
    in_sample = rule.predict([[run] for run in table.logits]).labels
    return {
        "in_sample": truth.scores(in_sample)[METRIC],
        "cross_fitted": fitted.metrics[METRIC],
        "interval": list(fitted.interval),
        "chosen": rule.method,
        "gate": rule.decision.threshold is not None,
        "seconds": seconds,
    }


def compare_methods(arguments: BenchmarkArguments, tables: dict[str, Table]) -> dict[str, Any]:
    """Every method on every table, printed as it goes along."""
    results: dict[str, dict[str, Any]] = {}
    total = len(tables) * len(arguments.methods) * arguments.repeats * 5
    with tqdm(total=total, desc="fits", unit="fit", leave=False) as bar:
        for name, table in tables.items():
            results[name] = {}
            for method in arguments.methods:
                bar.set_postfix_str(f"{name}, {method}")
                results[name][method] = measure_table(arguments, table, method, bar)
            if arguments.output:  # what is measured stays if the rest is interrupted
                write_json(arguments.output, {"tables": results})
    cells = []
    for method in arguments.methods:
        each = [results[name][method] for name in tables]
        cells.append(
            (
                method,
                f"{statistics.mean(found['in_sample'] for found in each):.4f}",
                f"{statistics.mean(found['cross_fitted'] for found in each):.4f}",
                f"{statistics.median(found['seconds'] for found in each):.2f}",
                *(f"{found['cross_fitted']:.3f}" for found in each),
            )
        )
    header = ("method", "in-sample", "cross-fitted", "s a fit", *tables)
    print(
        tables_module.Table(
            f"{METRIC}, mean over {len(tables)} tables; then each table's cross-fitted score", header, cells
        ).text()
    )
    choices = {name: results[name]["auto"] for name in tables if "auto" in arguments.methods}
    for name, found in choices.items():
        print(f"auto on {name}: {found['chosen']}{' + gate' if found['gate'] else ''}")
    return results


def time_search(arguments: BenchmarkArguments, table: Table) -> dict[str, float]:
    """Processor seconds of `random` and of `exact` on one table, without a gate, medians of three takes in turn."""
    probabilities = softmax(table.logits[0])
    seconds: dict[str, list[float]] = {"random": [], "exact": []}
    for _take in range(3):
        for method, taken in seconds.items():
            started = time.process_time()
            fit(method, probabilities, table.truth(arguments.seed), num_vectors=arguments.num_vectors)
            taken.append(time.process_time() - started)
    medians = {method: statistics.median(taken) for method, taken in seconds.items()}
    medians["ratio"] = medians["random"] / medians["exact"]
    print(
        f"\n{arguments.num_vectors} random vectors {medians['random']:.2f} s, exact {medians['exact']:.3f} s: "
        f"{medians['ratio']:.1f} times faster"
    )
    return medians


# ------------------------------------------------------------------------------------------------------------ simulation


def draw_rows(
    generator: np.random.Generator, num_dialogues: int, prior: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [n, 9], labels [n] and dialogue numbers [n] of a known model.

    A dialogue has 1 to 17 rows, its own leaning towards some labels (Dirichlet, 4 rows' worth) and its own shift of
    the logits (standard deviation 0.5). A row's logits are `prior` * log prior + 1.2 for its label + that shift + noise of 1.
    """
    sizes = generator.integers(1, 18, num_dialogues)
    numbers = np.repeat(np.arange(num_dialogues), sizes)
    leanings = generator.dirichlet(4 * SHARES, num_dialogues).cumsum(axis=1)
    labels = (generator.random((len(numbers), 1)) > leanings[numbers]).sum(axis=1)
    labels = np.minimum(labels, len(SHARES) - 1)
    shifts = 0.5 * generator.standard_normal((num_dialogues, len(SHARES)))
    logits = prior * np.log(SHARES) + shifts[numbers] + generator.standard_normal((len(numbers), len(SHARES)))
    logits[np.arange(len(numbers)), labels] += 1.2
    return logits, labels, numbers


def simulate(arguments: BenchmarkArguments) -> dict[str, Any]:
    """Coverage of the interval and optimism of the cross-fitted score against the fitted rule's score on fresh rows.

    Each draw is a table of 200 dialogues (about 1,800 rows); the fresh rows are 100,000 dialogues of the same model,
    enough that the truth is known to .001. "auto or argmax" is what `choose` keeps of the two. The truth is the score on
    them of the very rule that was fitted to the whole table.
    """
    generator = np.random.default_rng(arguments.seed)
    fresh_logits, fresh_labels, _ = draw_rows(generator, 100_000, arguments.prior)
    positive = tuple(range(1, len(SHARES)))
    found: dict[str, list[tuple[float, float, float, float, float]]] = {
        name: []
        for name in (*arguments.methods, *(["auto or argmax"] if "auto" in arguments.methods else []))
    }

    def add(name: str, rule: Rule, fitted: CrossFit) -> None:
        truth = scores(fresh_labels, rule.predict([[fresh_logits]]).labels, 9, positive)[METRIC]
        tuned = scores(labels, rule.predict([[logits]]).labels, 9, positive)[METRIC]
        found[name].append((tuned, fitted.metrics[METRIC], *fitted.interval, truth))

    for _draw in tqdm(range(arguments.simulate), desc="draws", unit="draw", leave=False):
        logits, labels, groups = draw_rows(generator, 200, arguments.prior)
        table = Table([logits], labels, groups.tolist(), [], positive, 7)
        data = ([logits], table.truth(arguments.seed))
        folds = repeated_folds(data[1], repeats=arguments.repeats)
        for method in arguments.methods:
            recipe = make_recipe(arguments, table, method)
            rule = fit_rule(recipe, *data)
            fitted = cross_fit(recipe, *data, folds, arguments.jobs)
            add(method, rule, fitted)
            if method == "auto":
                kept, fitted, _ = choose(recipe, rule, fitted, *data)
                add("auto or argmax", kept, fitted)
    results, cells = {}, []
    for method, values in found.items():
        tuned, crossed, low, high, truth = np.array(values).T
        optimism = crossed - truth
        results[method] = {
            "draws": arguments.simulate,
            "in_sample": float(tuned.mean()),
            "cross_fitted": float(crossed.mean()),
            "truth": float(truth.mean()),
            "optimism": float(optimism.mean()),
            "optimism_standard_error": float(optimism.std() / np.sqrt(len(optimism))),
            "coverage": float(((low <= truth) & (truth <= high)).mean()),
            "truth_below": float((truth < low).mean()),
            "truth_above": float((truth > high).mean()),
            "width": float((high - low).mean()),
        }
        names = (
            "in_sample",
            "cross_fitted",
            "truth",
            "optimism",
            "coverage",
            "truth_below",
            "truth_above",
            "width",
        )
        cells.append((method, *(f"{results[method][name]:.4f}" for name in names)))
    header = (
        "method",
        "in-sample",
        "cross-fitted",
        "truth",
        "optimism",
        "coverage",
        "below",
        "above",
        "width",
    )
    print(tables_module.Table(f"{METRIC}, {arguments.simulate} draws", header, cells).text())
    return results


def time_scale(arguments: BenchmarkArguments) -> dict[str, float]:
    """Wall seconds of `exact` on many simulated rows, and the process's peak memory in GiB, the rows included."""
    logits, labels, _ = draw_rows(np.random.default_rng(arguments.seed), arguments.scale // 8 + 20)
    logits, labels = logits[: arguments.scale], labels[: arguments.scale]
    probabilities = softmax(logits)
    del logits
    started = time.perf_counter()
    decision = fit("exact", probabilities, Truth(labels, range(len(labels)), 9, range(1, 9)))
    seconds = time.perf_counter() - started
    tuned, plain = (
        scores(labels, decide(probabilities, rule), 9, range(1, 9))[METRIC]
        for rule in (decision, Decision(np.zeros(9)))
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"exact on {len(labels)} rows x 9: {seconds:.1f} s, peak {peak:.2f} GiB, {METRIC} {plain:.4f} -> {tuned:.4f}"
    )
    return {"rows": len(labels), "seconds": seconds, "peak_gib": peak, "argmax": plain, "exact": tuned}


def main() -> None:
    """Run the benchmark; see the module's docstring."""
    (arguments,) = parse_arguments((BenchmarkArguments,), __doc__)
    results: dict[str, Any] = {"arguments": dataclasses.asdict(arguments), **provenance()}
    if arguments.scale:
        results["scale"] = time_scale(arguments)
    if arguments.simulate:
        results["simulation"] = simulate(arguments)
    if arguments.train_file or arguments.runs:
        tables = dict(run_table(reference) for reference in arguments.runs)
        if arguments.train_file:
            tables |= text_tables(arguments.train_file)
        tables |= {name: blend_table(name, tables) for name in arguments.blends}
        results["tables"] = compare_methods(arguments, tables)
        results["timing"] = time_search(arguments, next(iter(tables.values())))
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    command_line.run(main)
