"""Blend runs, decide, and write the submission, the report and a bundle that others can load.

    python ensemble.py --runs outputs/anchor outputs/seed-a --weights 0.3 0.7 --decision decision.json \\
        --test_file test.json --output_dir outputs/ensemble
A minute on a laptop, rule and weights fitted here:
    python ensemble.py --runs outputs/demo-probe outputs/demo-a --weights search --method prior \\
        --test_file data/demo/test.json --output_dir outputs/demo-ensemble
Is B better than A (runs, or output folders of this script):
    python ensemble.py --compare outputs/anchor outputs/ensemble
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rareturn import command_line
from rareturn.command_line import parse_arguments
from rareturn.data.label_guide import load_label_guide, parse_label_guide
from rareturn.data.readers import read_records
from rareturn.data.rows import DataArguments, Row, load_rows
from rareturn.decisions import probabilities as probabilities_module
from rareturn.decisions.cross_fitting import (
    Recipe,
    cross_fit,
    cross_fitted_scaling,
    fit_rule,
    rule_fitter,
    search_weights,
)
from rareturn.decisions.methods import METHODS
from rareturn.decisions.metrics import METRIC_NAMES, check_labels
from rareturn.decisions.probabilities import BLENDS, check_weights, softmax, test_probabilities
from rareturn.decisions.rules import Decision, Rule, decide
from rareturn.errors import InputError
from rareturn.files import read_json, write_bytes, write_json
from rareturn.reports import comparison
from rareturn.reports.cards import ensemble_card
from rareturn.reports.comparison import PREDICTIONS_FILE, System, flip_table, read_system
from rareturn.reports.ensemble import Outcome, make_page, make_pictures, make_tables, measure, score_test
from rareturn.runs.alignment import align_runs, align_test, make_voting, protected_label
from rareturn.runs.bundle import SCHEMA_VERSION, describe_run, refer_to_hub
from rareturn.runs.hub import add_to_collection, push_files
from rareturn.runs.reading import Run, read_run
from rareturn.runs.references import check_name

logger = logging.getLogger(__name__)

VOTES = ("vote", "soft_vote")
NUM_SPLITS = 5


@dataclass
class EnsembleArguments(DataArguments):
    """Which runs, how they are blended, how the blend decides, and where everything goes."""

    label_guide: str | None = field(
        default=None,
        metadata={"help": "Label guide of the test file. Default: the one that the runs were made with."},
    )
    runs: list[str] | None = field(
        default=None, metadata={"help": "Runs: folders, or ORG/NAME-oof:RUN[@REVISION] on the Hub."}
    )
    weights: list[str] | None = field(
        default=None,
        metadata={"help": "One number a run, scaled to sum 1, or the word search. Default: equal weights."},
    )
    blend: str = field(
        default="arithmetic",
        metadata={"help": "Kind of weighted mean of the probabilities.", "choices": list(BLENDS)},
    )
    decision: str | None = field(
        default=None,
        metadata={"help": "decision.json of calibrate.py to apply. Default: fit one here by --method."},
    )
    method: str = field(
        default="auto",
        metadata={
            "help": "How the rule is fitted; auto chooses inside the cross-fitting. vote and soft_vote: gatekeepers "
            "decide one label, runs with a label_scope share the rest, in votes or in probabilities.",
            "choices": ["auto", *METHODS, *VOTES],
        },
    )
    metric: str = field(
        default="macro_f1_positive",
        metadata={"help": "Score that the rule is fitted for.", "choices": list(METRIC_NAMES)},
    )
    repeats: int = field(
        default=5,
        metadata={"help": "Times the cross-fitting is repeated on other folds. 5 steadies the figure."},
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Rows to predict; rows with labels are scored."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for everything that is written."})
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Two runs or output folders A B to compare; nothing is blended."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of folds, searches and bootstraps."})
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the bundle as NAMESPACE/NAME."})
    hub_namespace: str | None = field(default=None, metadata={"help": "User or organisation to push to."})
    hub_name: str | None = field(default=None, metadata={"help": "System's name, the repo of the bundle."})
    hub_private_repo: bool = field(default=True, metadata={"help": "Keep a repo that is made here private."})
    push_only: bool = field(
        default=False, metadata={"help": "Push what --output_dir holds; compute nothing."}
    )

    def __post_init__(self) -> None:
        if (self.push_to_hub or self.push_only) and not (self.hub_namespace and self.hub_name):
            raise ValueError("--push_to_hub needs --hub_namespace and --hub_name")
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError("--compare: name two, A and B")
        if self.compare is None and not self.output_dir:
            raise ValueError("--output_dir: missing")
        if self.compare is None and not self.push_only and not self.runs:
            raise ValueError("--runs: name one or more")
        if self.repeats < 1:
            raise ValueError("--repeats: one or more")
        if self.method in VOTES and (self.weights or self.decision):
            raise ValueError(
                f"--method {self.method} counts every run once and fits nothing: no --weights, no --decision"
            )


def parse_weights(given: Sequence[str] | None, num_runs: int) -> tuple[float, ...] | str | None:
    """What `--weights` says: numbers, "search", or None for equal ones.

    Raises:
        InputError: a word that is no number, or numbers that are no weights.
    """
    if not given or list(given) == ["search"]:
        return given[0] if given else None
    try:
        weights = tuple(map(float, given))
    except ValueError:
        raise InputError(f"--weights {' '.join(given)}: numbers, or the one word search") from None
    check_weights(weights, num_runs)
    return weights


def read_decision(path: str, runs: Sequence[Run]) -> tuple[Decision, dict[str, Any]]:
    """A decision for these runs' labels, and the file's whole content.

    Raises:
        InputError: an unreadable file, or one for other labels.
    """
    content = read_json(path)
    decision = Decision.from_dict(content, path)
    names = runs[0].label_names
    if content["label_names"] != names:
        raise InputError(f"{path}: label_names: {content['label_names']}, but {names} in {runs[0].reference}")
    return decision, content


def fit_system(
    arguments: EnsembleArguments, runs: Sequence[Run], logits: Sequence[np.ndarray], labels: np.ndarray
) -> Outcome:
    """Fit or apply the rule, and predict every out-of-fold row in the three ways that the report sets side by side."""
    info, groups, notes = runs[0].info, runs[0].oof.dialogue_id, []
    weights = parse_weights(arguments.weights, len(runs))
    protected = protected_label(runs[0])
    equal = (1.0,) * len(runs)
    untuned = check_weights(equal if weights in (None, "search") else weights, len(runs))
    before = probabilities_module.blend([softmax(run) for run in logits], untuned, arguments.blend)
    argmax = before.argmax(axis=1)
    if weights not in (None, "search") and abs(sum(weights) - 1) > 1e-9:
        notes.append("The weights were scaled to sum 1.")
    if weights == "search":
        notes.append("Argmax is that of equal weights: the searched ones were tuned on these rows.")
    if arguments.method in VOTES:
        voting = make_voting(runs, protected, soft=arguments.method == "soft_vote")
        predictions = voting.predict([softmax(run) for run in logits])
        rule = Rule(Decision(np.zeros(len(info["label_names"]))), untuned, arguments.method)
        notes.append("A vote has nothing to fit: its in-sample and cross-fitted figures are the same.")
        return Outcome(
            rule, untuned, voting, argmax, predictions, predictions[None], before, before, before, notes
        )
    recipe = Recipe(
        tuple(info["positive_labels"]),
        metric=arguments.metric,
        method=arguments.method,
        weights=weights,
        blend=arguments.blend,
        protected_class=protected,
        seed=arguments.seed,
    )
    if arguments.decision:
        decision, content = read_decision(arguments.decision, runs)
        method = content.get("method")
        if weights == "search":
            raise InputError("--weights search: a given --decision belongs to given weights")
        rule = Rule(decision, untuned, str(method))
        recipe = dataclasses.replace(
            recipe,
            method=method if method in METHODS else arguments.method,
            protected_class=protected if decision.protected_class is None else decision.protected_class,
        )
        notes.append(
            f"The decision was given and not fitted here. Its in-sample figure is optimistic as far as it was fitted on "
            f"these rows; the cross-fitted one is that of the method {recipe.method!r} fitted anew on other dialogues."
        )
    else:
        rule = fit_rule(recipe, logits, labels, groups)
        if arguments.method == "auto":
            notes.append(
                f"Method auto chose {rule.method} on all rows. The cross-fitted figure includes the choice: it was made "
                "anew in every fold, and may have been another."
            )
    num_fits = arguments.repeats * min(NUM_SPLITS, len(set(groups)))
    with tqdm(total=num_fits, desc="cross-fitting", unit="fit", leave=False) as bar:
        cross_fitted = cross_fit(
            rule_fitter(recipe, logits, labels, groups),
            labels,
            groups,
            num_labels=len(info["label_names"]),
            positive_labels=info["positive_labels"],
            metric=arguments.metric,
            num_splits=NUM_SPLITS,
            repeats=arguments.repeats,
            seed=arguments.seed,
            progress=bar.update,
        )
    after = probabilities_module.blend(
        [softmax(run, rule.decision.temperature) for run in logits], rule.weights, arguments.blend
    )
    in_sample = decide(after, rule.decision)
    scaled = cross_fitted_scaling(
        logits, labels, groups, untuned, arguments.blend, NUM_SPLITS, arguments.seed
    )
    return Outcome(
        rule, untuned, None, argmax, in_sample, cross_fitted.predictions, before, after, scaled, notes
    )


def predict_test(
    outcome: Outcome, folds: Sequence[Sequence[np.ndarray]], blend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] of the test rows by the decision and by argmax.

    Args:
        folds: logits [n, c] of every run's every fold.
    """
    plain = [test_probabilities(run, 1.0) for run in folds]
    argmax = probabilities_module.blend(plain, outcome.untuned_weights, blend).argmax(axis=1)
    if outcome.voting is not None:
        return outcome.voting.predict(plain), argmax
    scaled = [test_probabilities(run, outcome.rule.decision.temperature) for run in folds]
    return decide(
        probabilities_module.blend(scaled, outcome.rule.weights, blend), outcome.rule.decision
    ), argmax


def read_test(arguments: EnsembleArguments, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[Row]]:
    """The test file's records as they are, and the same as checked rows.

    Raises:
        InputError: a row that breaks a rule, or a label guide with other names than the runs'.
    """
    info = runs[0].info
    if arguments.label_guide is None and info.get("label_guide") is not None:
        guide = parse_label_guide(info["label_guide"], f"{runs[0].reference}: run.json: label_guide")
    else:
        guide = load_label_guide(arguments.label_guide or DataArguments.label_guide)
    if guide.names != runs[0].label_names:
        raise InputError(
            f"label guide: labels {guide.names}, but {runs[0].label_names} in {runs[0].reference}"
        )
    rows = load_rows(
        arguments.test_file, guide, columns=arguments.columns, require_labels=False, split="test"
    )
    return list(read_records(arguments.test_file, "test")[1]), rows


def submission(records: Sequence[dict[str, Any]], labels: np.ndarray, label_column: str) -> dict[str, bytes]:
    """`prediction.json`, rows and fields as in the test file and the label besides, and `prediction.zip` with it."""
    predicted = [{**record, label_column: int(label)} for record, label in zip(records, labels, strict=True)]
    content = (json.dumps(predicted, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    member = zipfile.ZipInfo(
        "prediction.json", date_time=(1980, 1, 1, 0, 0, 0)
    )  # no clock: equal input, equal bytes
    member.external_attr, member.create_system = 0o644 << 16, 3
    member.compress_type = zipfile.ZIP_DEFLATED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return {"prediction.json": content, "prediction.zip": buffer.getvalue()}


def decision_file(
    arguments: EnsembleArguments,
    described: Sequence[dict],
    outcome: Outcome,
    metrics: dict,
    info: dict,
) -> dict:
    """decision.json of DESIGN 8; calibrate.py writes the same for one run."""
    return {
        "label_names": info["label_names"],
        "positive_labels": info["positive_labels"],
        **outcome.rule.decision.to_dict(),
        "runs": [{key: run[key] for key in ("reference", "revision", "weight")} for run in described],
        "blend": arguments.blend,
        "method": outcome.rule.method,
        **({"vote": outcome.voting.to_dict()} if outcome.voting else {}),
        "metric": arguments.metric,
        "fold_groups": info["fold_groups"],
        "seed": arguments.seed,
        "metrics": {stage: metrics[stage] for stage in ("argmax", "in_sample", "cross_fitted")},
    }


def bundle_file(name: str, described: Sequence[dict], decision: dict, info: dict) -> dict:
    """ensemble.json; see bundles.py."""
    rule = ("bias", "protected_class", "threshold", "temperature")
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "label_names": info["label_names"],
        "positive_labels": info["positive_labels"],
        "label_guide": info.get("label_guide"),
        "blend": decision["blend"],
        "method": decision["method"],
        **({"vote": decision["vote"]} if "vote" in decision else {}),
        "decision": {key: decision[key] for key in rule},
        "runs": list(described),
    }


def compare_systems(arguments: EnsembleArguments) -> None:
    """Print, and with `--output_dir` save, how two systems differ on the same rows."""
    first, second = (read_system(reference) for reference in arguments.compare)
    found = comparison.compare(first, second, arguments.metric, arguments.seed)
    for letter, system, score in zip("AB", (first, second), found.scores, strict=True):
        print(f"{letter}: {system.reference} ({system.what}): {arguments.metric} {score:.4f}")
    low, high = found.interval
    print(
        f"B less A: {found.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired, over dialogues)\n"
    )
    print(flip_table(found, first.info["label_names"], len(first.table)).text())
    if arguments.output_dir:
        content = {
            "metric": arguments.metric,
            "a": {"reference": first.reference, "what": first.what, "score": found.scores[0]},
            "b": {"reference": second.reference, "what": second.what, "score": found.scores[1]},
            "difference": found.difference,
            "interval": list(found.interval),
            "flips": found.flips,
        }
        write_json(Path(arguments.output_dir) / "comparison.json", content)


def publish(arguments: EnsembleArguments, repo_id: str) -> None:
    """Push the bundle, its card and its figures; no row of any dialogue is among them.

    Raises:
        InputError: the folder is no ensemble, or one that names runs on this disk.
        PushError: see `hub.push_files`.
    """
    output_dir = Path(arguments.output_dir)
    names = ["ensemble.json", "decision.json", "metrics.json", "report.html", "README.md"]
    files = {name: output_dir / name for name in names}
    files |= {f"figures/{path.name}": path for path in sorted((output_dir / "figures").glob("*.png"))}
    bundle = read_json(files["ensemble.json"])
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise InputError(f"{output_dir}: {', '.join(missing)}: missing")
    try:
        local = [run["reference"] for run in bundle["runs"] if run["revision"] is None]
    except (KeyError, TypeError):
        raise InputError(f"{files['ensemble.json']}: not what ensemble.py writes") from None
    if local:
        raise InputError(
            f"{files['ensemble.json']}: names runs on this disk ({', '.join(local)}); use --push_to_hub"
        )
    private = arguments.hub_private_repo
    sha = push_files(repo_id, files, message="Ensemble", kept_in=output_dir, private=private)
    add_to_collection(arguments.hub_namespace, arguments.hub_name, [(repo_id, "model")], private=private)
    print(f"pushed {repo_id} at {sha}")


def main() -> None:
    # Arguments
    (arguments,) = parse_arguments((EnsembleArguments,), __doc__)

    # Logging
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)

    if arguments.compare:
        compare_systems(arguments)
        return
    output_dir, push = Path(arguments.output_dir), arguments.push_to_hub or arguments.push_only
    name = output_dir.resolve().name
    if push:
        name = arguments.hub_name
        repo_id = "/".join(
            (
                check_name(arguments.hub_namespace, "hub_namespace"),
                check_name(name, "hub_name"),
            )
        )
    if arguments.push_only:
        publish(arguments, repo_id)
        return
    if not arguments.test_file and (output_dir / "prediction.json").exists():
        raise InputError(
            f"{output_dir}: holds a prediction of another call; give --test_file or another --output_dir"
        )

    # Data
    runs = [read_run(reference, require_test=bool(arguments.test_file)) for reference in arguments.runs]
    logits = align_runs(runs)
    info, oof = runs[0].info, runs[0].oof
    check_labels(oof.label, oof.dialogue_id, info["label_names"], info["positive_labels"], runs[0].reference)
    if arguments.test_file:
        records, rows = read_test(arguments, runs)
        test_folds = align_test(runs, rows, arguments.test_file)
    described = [describe_run(run, output_dir) for run in runs]
    if push:
        where = arguments.hub_namespace, name
        described = [refer_to_hub(part, run, *where) for part, run in zip(described, runs, strict=True)]

    # Decide
    outcome = fit_system(arguments, runs, logits, oof.label)
    for part, weight in zip(described, outcome.rule.weights, strict=True):
        part["weight"] = float(weight)

    # Evaluate
    metrics = measure(runs, logits, outcome, metric=arguments.metric, seed=arguments.seed)
    files: dict[str, bytes] = {}
    if arguments.test_file:
        predicted, argmax = predict_test(outcome, test_folds, arguments.blend)
        files |= submission(records, predicted, arguments.label_column)
        metrics |= score_test(rows, predicted, argmax, info, arguments.seed)
    decision = decision_file(arguments, described, outcome, metrics, info)
    bundle = bundle_file(name, described, decision, info)
    tables = make_tables(runs, outcome, metrics)
    pictures = make_pictures(runs, outcome, metrics)
    print("\n\n".join(table.text() for table in tables.values()))
    for note in metrics["notes"]:
        print(f"\n{note}")

    if parse_weights(arguments.weights, len(runs)) == "search":
        probabilities = [softmax(run) for run in logits]
        search = search_weights(probabilities, oof.label, kind=arguments.blend, seed=arguments.seed)
        metrics["weight_search"] = search.trajectory

    # Save
    system = System(
        str(output_dir), f"decision ({outcome.rule.method}), cross-fitted", info, oof, outcome.cross_fitted
    )
    card = ensemble_card(
        bundle,
        [run.info for run in runs],
        metrics,
        list(tables.values()),
        pictures,
        repo_id if push else None,
    )
    page = make_page(name, metrics, tables, pictures)
    files |= {f"figures/{picture.name}": picture.png for picture in pictures}
    files |= {"report.html": page.encode(), "README.md": card.encode()}
    for file, content in files.items():
        write_bytes(output_dir / file, content)
    for file, content in (
        (PREDICTIONS_FILE, system.to_dict()),
        ("decision.json", decision),
        ("ensemble.json", bundle),
        ("metrics.json", metrics),
    ):
        write_json(output_dir / file, content)
    print(f"\nwrote {output_dir}: open {output_dir / 'report.html'}")

    # Push
    if push:
        publish(arguments, repo_id)


if __name__ == "__main__":
    command_line.run(main)
