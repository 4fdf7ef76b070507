# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn"]
# ///
"""Blend runs, decide, and write the submission, the report and a bundle that others can load.

    python ensemble.py --runs outputs/anchor outputs/seed-a --weights 0.3 0.7 \\
        --decision decision.json --decision_from_other_runs --test_file test.json --output_dir outputs/ensemble
A minute on a laptop, rule and weights fitted here:
    python ensemble.py --runs outputs/demo-probe outputs/demo-minilm --weights search --method prior \\
        --test_file data/demo/test.json --output_dir outputs/demo-ensemble
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rareturn import command_line
from rareturn.command_line import REQUIRED, HubArguments, flag, parse_arguments, start_logging
from rareturn.data.label_guide import METRICS_HELP, load_label_guide, parse_label_guide
from rareturn.data.readers import read_records
from rareturn.data.rows import DataArguments, load_source, row_columns
from rareturn.data.utterances import Source, table_bytes
from rareturn.decisions import cross_fitting as fitting
from rareturn.decisions.methods import METHODS
from rareturn.decisions.metrics import Truth, check_labels
from rareturn.decisions.probabilities import BLENDS, check_weights, softmax
from rareturn.decisions.rules import Decision, Outcome, Rule
from rareturn.errors import InputError
from rareturn.files import check_content, read_json, write_bytes, write_json
from rareturn.reports.cards import EVAL_RESULTS, ensemble_card, eval_results
from rareturn.reports.ensemble import make_page, make_pictures, make_tables, measure
from rareturn.reports.tables import score_test
from rareturn.reports.tracking import TrackingArguments, log_scores
from rareturn.runs.alignment import (
    SHARED_KEYS,
    align_runs,
    align_test,
    display_names,
    make_voting,
    protected_label,
)
from rareturn.runs.bundle import Bundle, bundle_content, find_models, refer_to_hub
from rareturn.runs.decision_file import OVERRIDE, read_decision, saved_decision
from rareturn.runs.hub import add_to_collection, check_may_push, push_files
from rareturn.runs.reading import Run, read_run
from rareturn.runs.references import check_name
from rareturn.runs.schemas import metric_of

VOTES = ("vote", "soft_vote")
NUM_SPLITS = 5


@dataclass(kw_only=True)
class EnsembleArguments(DataArguments):
    """Which runs, how they are blended, how the blend decides, and where everything goes."""

    _argument_group_name = "Ensemble"

    output_dir: str = flag(REQUIRED, "Folder for everything that is written.")
    label_guide: str | None = flag(None, "Label guide of the test file. Default: the one in the first run.")
    runs: list[str] | None = flag(None, "Runs: folders, or ORG/NAME-oof:RUN[@REVISION] on the Hub.")
    weights: list[str] | None = flag(None, "Numbers, or search. Default: --decision's, or equal ones.")
    blend: str | None = flag(
        None, "Weighted mean of probabilities. Default: --decision's, or arithmetic.", choices=list(BLENDS)
    )
    decision: str | None = flag(None, "decision.json to apply to its runs. Default: fit a rule by --method.")
    decision_from_other_runs: bool = flag(False, "Apply --decision to what it was not fitted for.")
    method: str = flag(
        "auto",
        "How the rule is fitted; auto chooses inside the cross-fitting. vote and soft_vote: gatekeepers decide one "
        "label, runs with a label_scope share the rest, in votes or in probabilities.",
        choices=["auto", *METHODS, *VOTES],
    )
    metric: str | None = flag(None, f"Score to maximise: {METRICS_HELP}. Default: the first run's.")
    repeats: int = flag(5, "Times the cross-fitting is repeated on other folds. 5 steadies the figure.")
    test_file: str | None = flag(None, "Rows to predict; those with labels are scored, never learnt from.")
    seed: int = flag(42, "Seed of folds, searches and bootstraps.")

    def __post_init__(self) -> None:
        if self.weights and self.weights != ["search"]:
            try:
                self.weights = list(map(float, self.weights))
            except ValueError:
                given = " ".join(self.weights)
                raise ValueError(f"--weights {given}: numbers, or the one word search") from None
        if self.repeats < 1:
            raise ValueError("--repeats: one or more")
        if self.method in VOTES and (self.weights or self.decision):
            raise ValueError(f"--method {self.method} counts every run once: no --weights, no --decision")
        if self.decision and self.weights == ["search"]:
            raise ValueError("--weights search: a given --decision belongs to given weights")
        if self.decision_from_other_runs and not self.decision:
            raise ValueError("--decision_from_other_runs: needs a --decision")


def given_rule(arguments: EnsembleArguments, runs: Sequence[Run]) -> Rule:
    """The rule in `--decision`, at the weights and with the blend that it was made for, or that the flags name.

    An InputError says what the file and the command disagree about.
    """
    path, weights = arguments.decision, arguments.weights
    saved = read_decision(path)
    for key in ("label_names", "positive_labels"):
        mine, theirs = getattr(saved, key), getattr(runs[0], key)
        if mine != theirs:
            raise InputError(f"{path}: {key}: {mine}, but {theirs} in {runs[0].reference}")
    if arguments.decision_from_other_runs:
        if saved.vote:
            raise InputError(f"{path}: a vote counts the runs that it names and cannot be applied to others")
        weights = check_weights(weights, len(runs))
        return dataclasses.replace(saved.rule(), weights=weights, blend=arguments.blend or BLENDS[0])
    rule = saved.rule_for(runs, path)
    if weights and not np.allclose(check_weights(weights, len(runs)), rule.weights):
        fitted, asked = (" ".join(f"{weight:g}" for weight in some) for some in (rule.weights, weights))
        problem = f"weights {fitted}, --weights says {asked}"
    elif arguments.blend not in (None, rule.blend):
        problem = f"blend {rule.blend}, --blend says {arguments.blend}"
    else:
        return rule
    raise InputError(f"{path}: the decision belongs to {problem}; {OVERRIDE}")


def fit_system(
    arguments: EnsembleArguments, runs: Sequence[Run], logits: Sequence[np.ndarray], truth: Truth
) -> Outcome:
    """Fit or apply the rule, and predict every out-of-fold row in the ways that the report compares."""
    search, protected, notes = arguments.weights == ["search"], protected_label(runs[0]), []
    known = None if search or not arguments.weights else tuple(arguments.weights)
    given = given_rule(arguments, runs) if arguments.decision else None
    blend = given.blend if given else arguments.blend or BLENDS[0]
    untuned_weights = given.weights if given else check_weights(known, len(runs))
    untuned = Rule(Decision(np.zeros(truth.num_labels)), untuned_weights, "argmax", blend)
    metrics = [metric_of(run.info) for run in runs]
    if arguments.metric is None and len(set(metrics)) > 1:
        named = zip(display_names(runs), metrics, strict=True)
        made = ", ".join(f"{name} for {metric}" for name, metric in named)
        notes.append(
            f"The runs were made for several metrics ({made}); this is for {truth.metric}, the first run's."
        )
    if known and abs(sum(known) - 1) > 1e-9:
        notes.append("The weights were scaled to sum 1.")
    if search:
        notes.append("Argmax is that of equal weights: the searched ones were tuned on these rows.")
    if arguments.method in VOTES:
        voting = make_voting(runs, protected, soft=arguments.method == "soft_vote")
        given = dataclasses.replace(untuned, method=arguments.method, voting=voting)
    of_rows, folds = [[run] for run in logits], fitting.repeated_folds(truth, NUM_SPLITS, arguments.repeats)
    if given and given.voting:
        rule, cross_fitted = given, given.predict(of_rows).labels[None]
        notes.append("A vote has nothing to fit: its in-sample and cross-fitted figures are the same.")
    else:
        method = given.method if given and given.method in METHODS else arguments.method
        weights = tuple(given.weights) if given else "search" if search else known
        gate = given.decision.protected_class if given and given.decision.threshold else protected
        recipe = fitting.Recipe(method, weights, blend, gate)
        rule = given or fitting.fit_rule(recipe, logits, truth)
        num_fits = arguments.repeats * min(NUM_SPLITS, truth.num_groups)
        with tqdm(total=num_fits, desc="cross-fitting", unit="fit", leave=False) as bar:
            found = fitting.cross_fit(recipe, logits, truth, folds, None, bar.update)
        if given is None:
            rule, found, reason = fitting.choose(recipe, rule, found, logits, truth)
        else:
            reason = (
                "The decision was given and not fitted here. Its in-sample figure is optimistic as far as it was "
                "fitted on these rows; the cross-fitted one is that of the method "
                f"{method!r} fitted anew on other dialogues."
            )
        cross_fitted = found.predictions
        notes.append(reason)
    if arguments.decision_from_other_runs:
        notes.append(
            "The decision was made for other runs, weights or another blend, and applied on request."
        )
    before, after = untuned.predict(of_rows), rule.predict(of_rows)
    scaled = fitting.cross_fitted_scaling(logits, truth.labels, untuned.weights, blend, folds[0])
    predicted = before.labels, after.labels, cross_fitted
    return Outcome(rule, untuned, *predicted, before.probabilities, after.probabilities, scaled, notes)


def read_test(arguments: EnsembleArguments, first: Run) -> Source:
    """The test file's rows, in the labels of the first run."""
    own, names = first.info.get("label_guide"), first.label_names
    if arguments.label_guide is None and own is not None:
        guide = parse_label_guide(own, f"{first.reference}: run.json: label_guide")
    else:
        guide = load_label_guide(arguments.label_guide or DataArguments.label_guide)
    if guide.names != names:
        raise InputError(f"label guide: labels {guide.names}, but {names} in {first.reference}")
    return load_source(arguments.test_file, guide, columns=arguments.columns, require_labels=False)


def predicted_records(
    arguments: EnsembleArguments, test: Source, labels: np.ndarray, first: Run
) -> list[dict[str, Any]]:
    """The test file's records, the label of each row filled in: as its number or, in a table whose labels (or those of the
    training table) are names, by name."""
    named = first.info.get("labels_named") if test.named is None else test.named
    written = [first.label_names[label] for label in labels] if test.columns and named else labels.tolist()
    column = (test.columns or row_columns(arguments.columns))["label"]
    records = list(read_records(arguments.test_file, "test"))
    for row, label in zip(test.rows, written, strict=True):
        records[row.place] |= {column: label}
    return records


def submission(records: Sequence[dict[str, Any]], suffix: str) -> dict[str, bytes]:
    """`prediction.json` or, of a table, `prediction.csv` or `.tsv`, and `prediction.zip` with it."""
    if suffix == ".json":
        content = (json.dumps(records, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    else:
        content = table_bytes(records, suffix)
    name = f"prediction{suffix}"
    buffer, member = io.BytesIO(), zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16  # its date stays that of 1980: equal input gives equal bytes
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return {name: content, "prediction.zip": buffer.getvalue()}


def publish(output_dir: Path, hub: HubArguments, repo_id: str) -> None:
    """Push the bundle, its card and its figures; no row of any dialogue is among them.

    Runs and models are referred to by their repos from then on; only the bundle on this disk names their folders too.
    An InputError where the folder holds no whole ensemble, or one of a run that is not on the Hub.
    """
    names = ["ensemble.json", "decision.json", "metrics.json", "report.html", "README.md"]
    files: dict[str, Any] = {name: output_dir / name for name in names}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise InputError(f"{output_dir}: {', '.join(missing)}: missing")
    bundle, decision = read_json(files["ensemble.json"]), read_json(files["decision.json"])
    check_content(Bundle, bundle, str(files["ensemble.json"]))
    where, private = (hub.hub_namespace, hub.hub_name), hub.hub_private_repo
    local_name, bundle["name"] = bundle["name"], hub.hub_name
    bundle["runs"] = [refer_to_hub(part, *where) for part in bundle["runs"]]
    for run, part in zip(decision["runs"], bundle["runs"], strict=True):
        run |= {key: part[key] for key in ("reference", "revision")}
    files |= {path: output_dir / path for path in [EVAL_RESULTS] if (output_dir / path).is_file()}
    for path in files.keys() & {"README.md", EVAL_RESULTS}:
        text = files[path].read_text(encoding="utf-8")
        for spelling in ('("{}")', "\n# {}\n", "name: {}\n", ".co/{}/blob/"):
            text = text.replace(spelling.format(local_name), spelling.format(repo_id))
        write_bytes(files[path], text.encode())
    write_json(files["ensemble.json"], bundle)
    write_json(files["decision.json"], decision)
    for part in bundle["runs"]:
        if part["model"]:
            part["model"].pop("folder", None)
    files["ensemble.json"] = (json.dumps(bundle, indent=2, ensure_ascii=False) + "\n").encode()
    files |= {f"figures/{path.name}": path for path in sorted((output_dir / "figures").glob("*.png"))}
    sha = push_files(repo_id, files, message="Ensemble", kept_in=output_dir, private=private)
    add_to_collection(*where, [(repo_id, "model")], private=private)
    print(f"pushed {repo_id} at {sha}")


def main() -> None:
    # Arguments
    arguments, hub, tracking = parse_arguments((EnsembleArguments, HubArguments, TrackingArguments), __doc__)
    output_dir, repo_id = Path(arguments.output_dir), None
    name = output_dir.resolve().name
    if hub.wanted:
        name = check_name(hub.hub_name, "hub_name")
        repo_id = f"{check_name(hub.hub_namespace, 'hub_namespace')}/{name}"

    # Logging
    start_logging()

    if hub.push_only:
        publish(output_dir, hub, repo_id)
        return
    if hub.wanted:
        check_may_push(repo_id)
    if not arguments.runs:
        raise InputError("--runs: name one or more")

    # Data
    runs = [read_run(reference, require_test=bool(arguments.test_file)) for reference in arguments.runs]
    logits, first = align_runs(runs), runs[0]
    truth = first.truth(arguments.metric, arguments.seed)
    check_labels(truth, first.label_names, first.reference)
    if arguments.test_file:
        test = read_test(arguments, first)
        suffix = (".tsv" if arguments.test_file.endswith(".tsv") else ".csv") if test.columns else ".json"
        test_folds = align_test(runs, test.rows, arguments.test_file)
    written = (".zip", suffix) if arguments.test_file else ()
    if any(path.suffix not in written for path in output_dir.glob("prediction.*")):
        problem = "holds a prediction of another call; give its kind of --test_file, or another --output_dir"
        raise InputError(f"{output_dir}: {problem}")
    models = [find_models(run, output_dir) for run in runs]
    if hub.wanted:
        for run, model in zip(runs, models, strict=True):  # refused before the minutes of fitting
            part = {key: getattr(run, key) for key in ("name", "reference", "revision")}
            part |= {"base_model": run.info["base_model"], "model": model}
            refer_to_hub(part, hub.hub_namespace, name)

    # Decide
    outcome = fit_system(arguments, runs, logits, truth)
    bundle = bundle_content(name, outcome.rule, runs, models)

    # Evaluate
    metrics = measure(runs, logits, outcome, truth)
    files: dict[str, bytes] = {}
    if arguments.test_file:
        predicted, argmax = (rule.predict(test_folds).labels for rule in (outcome.rule, outcome.untuned))
        files |= submission(predicted_records(arguments, test, predicted, first), suffix)
        known = [row.label for row in test.rows], [row.dialogue_id for row in test.rows]
        metrics |= score_test(*known, {"argmax": argmax, "decision": predicted}, truth)
    decision = saved_decision(outcome.rule, runs, metrics, metric=truth.metric, seed=truth.seed)
    tables, pictures = make_tables(runs, outcome, metrics), make_pictures(runs, outcome, metrics)
    print("\n\n".join(table.text() for table in tables.values()))
    for note in metrics["notes"]:
        print(f"\n{note}")
    if arguments.weights == ["search"]:
        probabilities = [softmax(run) for run in logits]
        found = fitting.search_weights(probabilities, truth.labels, outcome.rule.blend, truth.seed)
        metrics["weight_search"] = found[1]

    # Save
    infos = [run.info for run in runs]
    card = ensemble_card(repo_id or name, infos, metrics, list(tables.values()), pictures)
    files |= {f"figures/{picture}.png": png for picture, png in pictures.items()}
    files |= eval_results(infos, metrics, repo_id or name)
    (output_dir / EVAL_RESULTS).unlink(missing_ok=True)
    files |= {"report.html": make_page(name, metrics, tables, pictures).encode(), "README.md": card.encode()}
    for file, content in files.items():
        write_bytes(output_dir / file, content)
    of_rows = {"id": first.oof.id, "dialogue_id": first.oof.dialogue_id, "label": truth.labels.tolist()}
    of_rows["predictions"] = outcome.cross_fitted.tolist()
    what = {"what": f"decision ({outcome.rule.method}), cross-fitted", "metric": truth.metric}
    shared = {key: first.info[key] for key in SHARED_KEYS}
    write_json(output_dir / "oof_predictions.json", what | shared | of_rows)
    write_json(output_dir / "decision.json", decision)
    write_json(output_dir / "ensemble.json", bundle)
    write_json(output_dir / "metrics.json", metrics)
    print(f"\nwrote {output_dir}: open {output_dir / 'report.html'}")
    log_scores(tracking, hub.hub_name or first.info["name"], name, metrics)

    # Push
    if hub.push_to_hub:
        publish(output_dir, hub, repo_id)


if __name__ == "__main__":
    command_line.run(main)
