"""What a rule is worth on dialogues that it was not fitted on, and the choice of a rule by that."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rareturn.decisions import metrics
from rareturn.decisions.methods import TIERS, UNGATED_METHODS, fit
from rareturn.decisions.metrics import SCORE_TOLERANCE, Truth
from rareturn.decisions.probabilities import blend, check_weights, fit_temperature, log_loss, softmax
from rareturn.decisions.rules import Decision, Rule, decide
from rareturn.errors import InputError

# What the better of two cross-fitted scores owes to chance where they are close (`benchmarks/decoding.py --simulate`).
MIN_GAIN = 0.002


def grouped_folds(truth: Truth, num_splits: int, seed: int) -> np.ndarray:
    """A fold for every row, int64 [n]: scikit-learn's StratifiedGroupKFold, at most one fold a dialogue.

    An InputError where there are fewer than two dialogues, or no label with two rows.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if truth.num_groups < 2:
        raise InputError("dialogue_id: one dialogue only, cross-fitting needs two or more")
    num_splits = min(num_splits, truth.num_groups, int(np.bincount(truth.labels).max()))
    if num_splits < 2:
        raise InputError("label: every label has one row at most, cross-fitting needs two of one of them")
    splitter = StratifiedGroupKFold(num_splits, shuffle=True, random_state=seed)
    folds = np.empty(len(truth.labels), dtype=np.int64)
    with warnings.catch_warnings():
        # A label with fewer rows than folds: the rule is fitted without it, which is what its score should show.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(truth.labels, truth.labels, truth.groups)):
            folds[held_out] = fold
    return folds


def repeated_folds(truth: Truth, num_splits: int = 5, repeats: int = 5) -> list[np.ndarray]:
    """`grouped_folds` of the seeds seed, seed + 1, …, one partition a repeat."""
    return [grouped_folds(truth, num_splits, truth.seed + repeat) for repeat in range(repeats)]


def run_tasks(function: Callable, tasks: Iterable[tuple], jobs: int | None) -> Iterator[Any]:
    """What a function returns for each tuple of arguments, in their order, by `jobs` processes (None: one a core)."""
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=jobs or -1, batch_size=1, return_as="generator")
    return parallel(delayed(function)(*task) for task in tasks)


@dataclass(frozen=True, eq=False)
class CrossFit:
    """What a way of fitting scores on dialogues that it was not fitted on.

    Attributes:
        predictions: int64 [repeats, n], each row's prediction by a rule that its dialogue had no part in.
        metrics: every metric of DESIGN 9, each over all rows, the mean over the repeats.
        interval: 95 % interval of the truth's metric, by bootstrap over dialogues.
    """

    predictions: np.ndarray
    metrics: dict[str, Any]
    interval: tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """How a rule comes about from runs' logits: what `fit_rule` does, and `cross_fit` repeats on other rows.

    Attributes:
        method: one of `METHODS`, or "auto": chosen by `select`.
        weights: blend weights, one a run; None for equal ones; "search" for `search_weights`.
        protected_class: label of the gate; None for no gate. With it a rule keeps its gate only if that scores better
            when cross-fitted; only `random`, which is the paper's, searches its gate without asking.
        num_vectors: as in `fit`.
        num_splits: folds of the inner cross-fitting by which "auto" and the gate are decided.
    """

    method: str = "auto"
    weights: tuple[float, ...] | str | None = None
    blend: str = "arithmetic"
    protected_class: int | None = None
    num_vectors: int = 22_000
    num_splits: int = 5

    def untuned_weights(self, num_runs: int) -> np.ndarray:
        """The given weights, or equal ones, scaled to sum 1."""
        return check_weights(None if self.weights == "search" else self.weights, num_runs)


def fit_rule(recipe: Recipe, logits: Sequence[np.ndarray], truth: Truth) -> Rule:
    """Fit weights, temperature, method, bias and gate to runs' out-of-fold logits [n, c], in this order."""
    weights = recipe.untuned_weights(len(logits))
    if recipe.weights == "search":
        untempered = [softmax(run) for run in logits]
        weights, _ = search_weights(untempered, truth.labels, recipe.blend, truth.seed)
    temperature = fit_temperature(logits, truth.labels, weights, recipe.blend)
    probabilities = blend([softmax(run, temperature) for run in logits], weights, recipe.blend)
    method, gate = recipe.method, recipe.protected_class
    if method == "auto" or (gate is not None and method not in ("random", *UNGATED_METHODS)):
        method, gate = select(recipe, probabilities, truth)
    decision = fit(method, probabilities, truth, gate, recipe.num_vectors)
    return Rule(replace(decision, temperature=temperature), weights, method, recipe.blend)


def cross_fit(
    recipe: Recipe,
    logits: Sequence[np.ndarray],
    truth: Truth,
    folds: Sequence[np.ndarray],
    jobs: int | None = 1,
    progress: Callable | None = None,
) -> CrossFit:
    """Repeated dialogue-grouped cross-fitting: everything that `fit_rule` fits is fitted inside the folds.

    `folds` are `repeated_folds` of the truth; `jobs` as in `run_tasks`; `progress` is called once a fit.
    """

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        rule = fit_rule(recipe, [run[train] for run in logits], truth.subset(train))
        return rule.predict([[run[held_out]] for run in logits]).labels

    parts = [(repeat, fold == number) for repeat, fold in enumerate(folds) for number in np.unique(fold)]
    tasks = [(np.flatnonzero(~held_out), np.flatnonzero(held_out)) for _, held_out in parts]
    predictions = np.empty((len(folds), len(truth.labels)), dtype=np.int64)
    for (repeat, held_out), found in zip(parts, run_tasks(fit_predict, tasks, jobs), strict=True):
        predictions[repeat, held_out] = found
        if progress is not None:
            progress()
    return CrossFit(predictions, truth.scores(predictions), metrics.bootstrap_interval(truth, predictions))


def choose(
    recipe: Recipe, rule: Rule, cross_fitted: CrossFit, logits: Sequence[np.ndarray], truth: Truth
) -> tuple[Rule, CrossFit, str]:
    """The rule that is applied in the end: the one that "auto" found, or argmax where that gains no more than `MIN_GAIN`.

    Argmax is that of the untempered blend at the given weights, or equal ones: nothing in it was fitted. A method that
    was asked for by name is kept either way, and the reason says what it gains or loses.

    `rule` is `fit_rule` of the recipe on all rows, and `cross_fitted` its `cross_fit`. Returned are what was kept, rule
    and cross-fitted score, and one sentence that says why.
    """
    zero, weights = np.zeros(truth.num_labels), recipe.untuned_weights(len(logits))
    plain = Rule(Decision(zero), weights, "argmax", recipe.blend)
    predictions = plain.predict([[run] for run in logits]).labels[None]
    interval = metrics.bootstrap_interval(truth, predictions)
    argmax = CrossFit(predictions, truth.scores(predictions), interval)
    fitted_score, argmax_score = (found.metrics[truth.metric] for found in (cross_fitted, argmax))
    gain = fitted_score - argmax_score
    low, high = metrics.difference_interval(truth, predictions, cross_fitted.predictions)
    figures = (
        f"cross-fitted {truth.metric} {fitted_score:.4f}, argmax {argmax_score:.4f}, "
        f"difference {gain:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
    )
    if recipe.method != "auto":
        return rule, cross_fitted, f"Used {rule.method}, as asked: {figures}."
    if rule.method == "argmax":
        return plain, argmax, f"Kept argmax, which auto chose on all rows: {figures}."
    found = f"auto ({rule.method} on all rows)"
    if gain > MIN_GAIN:
        doubt = "; the interval includes zero, so the gain may be chance" if low <= 0 else ""
        return rule, cross_fitted, f"Used the rule of {found}, which scores above argmax: {figures}{doubt}."
    return plain, argmax, f"Kept argmax, which {found} does not beat by more than {MIN_GAIN}: {figures}."


def select(recipe: Recipe, probabilities: np.ndarray, truth: Truth) -> tuple[str, int | None]:
    """Choose a method by cross-fitting on probabilities [n, c], then whether it has a gate: (method, label of the gate).

    One-standard-error rule (Breiman et al., 1984): the simplest tier of `TIERS` with a candidate whose cross-fitted
    score is within one standard error of the best one's, and the best candidate of that tier. The standard error is
    that of the paired difference between the two, by bootstrap over dialogues. A gate is less simple than none, so it
    is kept where it gains more than one standard error. With a method other than "auto" only the gate is decided on.
    """
    # Other folds than those of the outer cross-fitting, which begin at the seed itself.
    folds = grouped_folds(truth, recipe.num_splits, truth.seed + 1000)

    def cross_fitted(method: str, gate: int | None = None) -> tuple[float, np.ndarray]:
        """The candidate's score and 300 bootstrap samples of it, paired with those of other candidates."""
        predictions = np.empty(len(folds), dtype=np.int64)
        for fold in range(int(folds.max()) + 1):
            train = folds != fold
            decision = fit(method, probabilities[train], truth.subset(train), gate, recipe.num_vectors)
            predictions[~train] = decide(probabilities[~train], decision)
        return truth.score(predictions), metrics.bootstrap_scores(truth, predictions, 300)

    tiers = TIERS if recipe.method == "auto" else ((recipe.method,),)
    found = {method: cross_fitted(method) for tier in tiers for method in tier}
    method, gate = _simplest_within_one_error(found, tiers), recipe.protected_class
    if gate is None or method in UNGATED_METHODS:
        return method, None
    gates = {None: found[method], gate: cross_fitted(method, gate)}
    return method, _simplest_within_one_error(gates, ((None,), (gate,)))


def _simplest_within_one_error(
    found: Mapping[Hashable, tuple[float, np.ndarray]], tiers: Iterable[Iterable[Hashable]]
) -> Any:
    """The best of the first tier that has a candidate within one standard error of the difference to the best of all.

    `found` is the mean and the bootstrap samples of each candidate's score; of those that score alike the first wins.
    """
    best_mean, best_samples = max(found.values(), key=lambda value: value[0])

    def is_close(candidate: Hashable) -> bool:
        mean, samples = found[candidate]
        return best_mean - mean <= (best_samples - samples).std() + SCORE_TOLERANCE

    close = next(filter(None, (list(filter(is_close, tier)) for tier in tiers)))
    return max(close, key=lambda candidate: found[candidate][0])


def search_weights(
    probabilities: Sequence[np.ndarray], labels: np.ndarray, kind: str = "arithmetic", seed: int = 42
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Blend weights [runs] of least log loss, and what was tried: `weights`, `log_loss` and `kept` of every step.

    Log loss and not the metric: it uses every row's probabilities, so that its optimum moves little with the rows, and
    it knows nothing of the decision rule, which is fitted afterwards. For two or three runs it is a grid over the
    simplex in steps of 0.05. Beyond, greedy selection with replacement (Caruana et al., 2004) adds the run that helps
    most, one at a time, and keeps the best prefix of 50; among runs that help equally the seed decides.
    """
    count = len(probabilities)

    def attempt(weights: np.ndarray) -> dict[str, Any]:
        loss = log_loss(blend(probabilities, weights, kind), labels)
        return {"weights": weights.tolist(), "log_loss": loss, "kept": False}

    if count <= 3:
        twentieths = (parts for parts in itertools.product(range(21), repeat=count) if sum(parts) == 20)
        trajectory = [attempt(np.array(parts) / 20.0) for parts in twentieths]
    else:
        trajectory, chosen = [], np.zeros(count)
        order = np.random.default_rng(seed).permutation(count)
        for step in range(1, 51):
            tried = [attempt((chosen + np.eye(count)[run]) / step) | {"added": int(run)} for run in order]
            trajectory.append(min(tried, key=lambda one: one["log_loss"]))
            chosen[trajectory[-1]["added"]] += 1
    best = min(trajectory, key=lambda step: step["log_loss"])
    best["kept"] = True
    return np.array(best["weights"]), trajectory


def cross_fitted_scaling(
    logits: Sequence[np.ndarray], labels: np.ndarray, weights: np.ndarray, kind: str, folds: np.ndarray
) -> np.ndarray:
    """Blended probabilities [n, c], each row's at the temperature that the other folds' dialogues ask for."""
    scaled = np.empty(logits[0].shape)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        temperature = fit_temperature([run[train] for run in logits], labels[train], weights, kind)
        scaled[~train] = blend([softmax(run[~train], temperature) for run in logits], weights, kind)
    return scaled
