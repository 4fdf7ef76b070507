"""What a rule is worth on dialogues that it was not fitted on, and the choice of a rule by that."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rareturn.decisions.methods import METHODS, TIERS, UNGATED_METHODS, fit
from rareturn.decisions.metrics import (
    SCORE_TOLERANCE,
    bootstrap_interval,
    bootstrap_scores,
    difference_interval,
    index_groups,
    scores,
)
from rareturn.decisions.probabilities import blend, check_weights, fit_temperature, log_loss, softmax
from rareturn.decisions.rules import Decision, Rule, decide
from rareturn.errors import InputError


def grouped_folds(labels: np.ndarray, groups: Sequence[Hashable], num_splits: int, seed: int) -> np.ndarray:
    """A fold for every row, int64 [n]: scikit-learn's StratifiedGroupKFold, at most one fold a dialogue.

    Raises:
        InputError: fewer than two dialogues, or no label with two rows.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    labels = np.asarray(labels)
    group_indices, num_groups = index_groups(groups)
    if num_groups < 2:
        raise InputError("dialogue_id: one dialogue only, cross-fitting needs two or more")
    num_splits = min(num_splits, num_groups, int(np.bincount(labels).max()))
    if num_splits < 2:
        raise InputError("label: every label has one row at most, cross-fitting needs two of one of them")
    splitter = StratifiedGroupKFold(num_splits, shuffle=True, random_state=seed)
    folds = np.empty(len(labels), dtype=np.int64)
    with warnings.catch_warnings():
        # A label with fewer rows than folds: the rule is fitted without it, which is what its score should show.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(labels, labels, group_indices)):
            folds[held_out] = fold
    return folds


def repeated_folds(
    labels: np.ndarray, groups: Sequence[Hashable], num_splits: int, repeats: int, seed: int
) -> list[np.ndarray]:
    """`grouped_folds` of the seeds seed, seed + 1, …, one partition a repeat."""
    return [grouped_folds(labels, groups, num_splits, seed + repeat) for repeat in range(repeats)]


def run_tasks(
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    jobs: int | None = 1,
    progress: Callable[[], Any] | None = None,
) -> list[Any]:
    """What a function returns for each tuple of arguments, in their order, whatever the number of processes.

    Args:
        jobs: processes; None for one a core.
        progress: called once a task.
    """
    from joblib import Parallel, cpu_count, delayed

    parallel = Parallel(n_jobs=jobs or cpu_count(), batch_size=1, return_as="generator")
    results = []
    for result in parallel(delayed(function)(*task) for task in tasks):
        results.append(result)
        if progress is not None:
            progress()
    return results


@dataclasses.dataclass(frozen=True, eq=False)
class CrossFit:
    """What a way of fitting scores on dialogues that it was not fitted on.

    Attributes:
        predictions: int64 [repeats, n], each row's prediction by a rule that its dialogue had no part in.
        metrics: every metric of DESIGN 9, each over all rows, the mean over the repeats.
        interval: 95 % interval of the metric asked for, by bootstrap over dialogues.
    """

    predictions: np.ndarray
    metrics: dict[str, Any]
    interval: tuple[float, float]


def cross_fit(
    fit_predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str = "macro_f1_positive",
    num_splits: int = 5,
    repeats: int = 5,
    seed: int = 42,
    folds: Sequence[np.ndarray] | None = None,
    jobs: int | None = 1,
    progress: Callable[[], Any] | None = None,
) -> CrossFit:
    """Repeated dialogue-grouped cross-fitting of anything that is fitted to rows and predicts others.

    Args:
        fit_predict: takes the positions of the rows to fit on and of the rows to predict, and returns the predictions
            of the latter; `rule_fitter` makes one.
        labels: int [n].
        groups: dialogue ids [n].
        num_splits: folds a repeat; no more than there are dialogues.
        repeats: partitions into folds, of seeds seed, seed + 1, …
        folds: the partitions themselves, `repeated_folds` of these arguments, where several calls share them.
        jobs: processes that fit at the same time, None for one a core; the result is the same.
        progress: called once a fit.

    Raises:
        InputError: fewer than two dialogues.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if folds is None:
        folds = repeated_folds(labels, groups, num_splits, repeats, seed)
    parts = [(repeat, fold == number) for repeat, fold in enumerate(folds) for number in np.unique(fold)]
    tasks = [(np.flatnonzero(~held_out), np.flatnonzero(held_out)) for _, held_out in parts]
    predictions = np.empty((len(folds), len(labels)), dtype=np.int64)
    for (repeat, held_out), found in zip(parts, run_tasks(fit_predict, tasks, jobs, progress), strict=True):
        predictions[repeat, held_out] = found
    return _score_cross_fit(labels, predictions, groups, num_labels, positive_labels, metric, seed)


def _score_cross_fit(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: Sequence[Hashable],
    num_labels: int,
    positive_labels: Sequence[int],
    metric: str,
    seed: int,
) -> CrossFit:
    facts = {"num_labels": num_labels, "positive_labels": positive_labels}
    interval = bootstrap_interval(labels, predictions, groups, **facts, metric=metric, seed=seed)
    return CrossFit(predictions, scores(labels, predictions, **facts), interval)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a rule comes about from runs' logits: what `fit_rule` does, and `cross_fit` repeats on other rows.

    Args:
        positive_labels, metric: what is maximised, as in `score`.
        method: one of `METHODS`, or "auto": chosen by `select` among `candidates`.
        weights: blend weights, one a run; None for equal ones; "search" for `search_weights`.
        blend: "arithmetic" or "geometric".
        protected_class: label of the gate; None for no gate. With it a rule keeps its gate only if that scores better
            when cross-fitted; only `random`, which is the paper's, searches its gate without asking.
        candidates: what "auto" chooses among. `random` is left out because `exact` searches for the same thing, and
            finds it.
        num_vectors: as in `fit`.
        num_splits: folds of the inner cross-fitting by which "auto" and the gate are decided.
        seed: of everything random.
    """

    positive_labels: tuple[int, ...]
    metric: str = "macro_f1_positive"
    method: str = "auto"
    weights: tuple[float, ...] | str | None = None
    blend: str = "arithmetic"
    protected_class: int | None = None
    candidates: tuple[str, ...] = ("argmax", "vector", "expected", "prior", "smooth", "exact")
    num_vectors: int = 22_000
    num_splits: int = 5
    seed: int = 42


def fit_rule(
    recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[Hashable]
) -> Rule:
    """Fit weights, temperature, method, bias and gate to runs' out-of-fold logits, in this order.

    Args:
        recipe: how.
        logits: one array [n, c] a run, the same rows in the same order.
        labels: int [n].
        groups: dialogue ids [n].

    Raises:
        InputError: unusable weights; one dialogue only, where something is decided by cross-fitting.
    """
    labels = np.asarray(labels, dtype=np.int64)
    weights = _untuned_weights(recipe, len(logits))
    if recipe.weights == "search":
        untempered = [softmax(run) for run in logits]
        weights = search_weights(untempered, labels, kind=recipe.blend, seed=recipe.seed).weights
    temperature = fit_temperature(logits, labels, weights, recipe.blend)
    probabilities = blend([softmax(run, temperature) for run in logits], weights, recipe.blend)
    method, gated = recipe.method, recipe.protected_class is not None and recipe.method not in UNGATED_METHODS
    if method == "auto" or (gated and method != "random"):
        method, gated = select(recipe, probabilities, labels, groups)
    decision = _fit_candidate(recipe, (method, gated), probabilities, labels)
    return Rule(dataclasses.replace(decision, temperature=temperature), weights, method, recipe.blend)


def _untuned_weights(recipe: Recipe, num_runs: int) -> np.ndarray:
    """The given weights, or equal ones, scaled to sum 1."""
    given = recipe.weights if isinstance(recipe.weights, tuple) else (1.0,) * num_runs
    return check_weights(given, num_runs)


def _fit_candidate(
    recipe: Recipe, candidate: tuple[str, bool], probabilities: np.ndarray, labels: np.ndarray
) -> Decision:
    method, gated = candidate
    return fit(
        method,
        probabilities,
        labels,
        positive_labels=recipe.positive_labels,
        metric=recipe.metric,
        protected_class=recipe.protected_class if gated else None,
        num_vectors=recipe.num_vectors,
        seed=recipe.seed,
    )


def rule_fitter(
    recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[Hashable]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`fit_rule` and its prediction in the form that `cross_fit` takes: everything fitted is fitted inside the folds."""
    labels, group_indices = np.asarray(labels), index_groups(groups)[0]

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        rule = fit_rule(recipe, [run[train] for run in logits], labels[train], group_indices[train].tolist())
        return rule.predict([[run[held_out]] for run in logits]).labels

    return fit_predict


def choose(
    recipe: Recipe,
    rule: Rule,
    cross_fitted: CrossFit,
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[Hashable],
) -> tuple[Rule, CrossFit, str]:
    """The rule that is applied in the end: the one that "auto" found, or argmax where that is not worse cross-fitted.

    Argmax is that of the untempered blend at the given weights, or equal ones: nothing in it was fitted. A method that
    was asked for by name is kept either way, and the reason says what it gains or loses. The better of two scores is a
    little too good on average: by about .002 where the two are close (`benchmarks/decoding.py --simulate` measures it).

    Args:
        recipe: by which the rule was made.
        rule: `fit_rule` of the recipe on all rows.
        cross_fitted: `cross_fit` of the recipe.
        logits, labels, groups: as `fit_rule` took them.

    Returns:
        The rule, its cross-fitted score, and one sentence that says what was kept and why.
    """
    labels = np.asarray(labels, dtype=np.int64)
    num_labels = logits[0].shape[1]
    plain = Rule(
        Decision(np.zeros(num_labels)), _untuned_weights(recipe, len(logits)), "argmax", recipe.blend
    )
    predictions = plain.predict([[run] for run in logits]).labels[None]
    argmax = _score_cross_fit(
        labels, predictions, groups, num_labels, recipe.positive_labels, recipe.metric, recipe.seed
    )
    gain = cross_fitted.metrics[recipe.metric] - argmax.metrics[recipe.metric]
    low, high = difference_interval(
        labels,
        predictions,
        cross_fitted.predictions,
        groups,
        num_labels=num_labels,
        positive_labels=recipe.positive_labels,
        metric=recipe.metric,
        seed=recipe.seed,
    )
    found = rule.method if recipe.method != "auto" else f"auto ({rule.method} on all rows)"
    figures = (
        f"cross-fitted {recipe.metric} {cross_fitted.metrics[recipe.metric]:.4f}, argmax "
        f"{argmax.metrics[recipe.metric]:.4f}, difference {gain:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
    )
    if recipe.method != "auto":
        return rule, cross_fitted, f"Kept {found}, as asked: {figures}."
    if gain > SCORE_TOLERANCE:
        doubt = ", which includes no gain" if low <= 0 else ""
        return rule, cross_fitted, f"Kept the rule of {found}, which beats argmax: {figures}{doubt}."
    return plain, argmax, f"Kept argmax, which {found} does not beat: {figures}."


def select(
    recipe: Recipe, probabilities: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> tuple[str, bool]:
    """Choose a method by cross-fitting, then whether it has a gate: (method, gated).

    One-standard-error rule (Breiman et al., 1984): the simplest tier of `TIERS` with a candidate whose cross-fitted
    score is within one standard error of the best one's, and the best candidate of that tier. The standard error is
    that of the paired difference between the two, by bootstrap over dialogues. A gate is less simple than none, so it
    is kept where it gains more than one standard error. With `recipe.method` other than "auto" only the gate is
    decided on.

    Args:
        recipe: the candidates, the metric, the folds.
        probabilities: [n, c].
        labels: int [n].
        groups: dialogue ids [n].

    Raises:
        InputError: fewer than two dialogues.
    """
    labels = np.asarray(labels, dtype=np.int64)
    # Other folds than those of the outer cross-fitting, which begin at the seed itself.
    folds = grouped_folds(labels, groups, recipe.num_splits, recipe.seed + 1000)

    def cross_fitted(candidate: tuple[str, bool]) -> tuple[float, np.ndarray]:
        """The candidate's score and 300 bootstrap samples of it, paired with those of other candidates."""
        predictions = np.empty(len(labels), dtype=np.int64)
        for fold in range(int(folds.max()) + 1):
            train = folds != fold
            decision = _fit_candidate(recipe, candidate, probabilities[train], labels[train])
            predictions[~train] = decide(probabilities[~train], decision)
        facts = {"num_labels": probabilities.shape[1], "positive_labels": recipe.positive_labels}
        options = {"metric": recipe.metric, "num_samples": 300, "seed": recipe.seed}
        samples = bootstrap_scores(labels, predictions, groups, **facts, **options)
        return scores(labels, predictions, **facts)[recipe.metric], samples

    methods = recipe.candidates if recipe.method == "auto" else (recipe.method,)
    found = {(method, False): cross_fitted((method, False)) for method in sorted(methods, key=METHODS.index)}
    tiers = [[(method, False) for method in tier if method in methods] for tier in TIERS]
    method = _simplest_within_one_error(found, tiers)[0]
    if recipe.protected_class is None or method in UNGATED_METHODS:
        return method, False
    found[method, True] = cross_fitted((method, True))
    return _simplest_within_one_error(found, [[(method, False)], [(method, True)]])


def _simplest_within_one_error(
    found: Mapping[tuple[str, bool], tuple[float, np.ndarray]], tiers: Sequence[Sequence[tuple[str, bool]]]
) -> tuple[str, bool]:
    """The best candidate of the first tier that has one within one standard error of the difference to the best of all.

    Args:
        found: mean and bootstrap samples of each candidate's score.
        tiers: candidates, from the simplest tier on; of those that score alike, the first of a tier wins.
    """
    best_mean, best_samples = max(
        (found[name] for tier in tiers for name in tier), key=lambda value: value[0]
    )

    def is_close(candidate: tuple[str, bool]) -> bool:
        mean, samples = found[candidate]
        return best_mean - mean <= (best_samples - samples).std() + SCORE_TOLERANCE

    close = next(filter(None, ([name for name in tier if is_close(name)] for tier in tiers)))
    return max(close, key=lambda candidate: found[candidate][0])


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSearch:
    """Weights [runs] that sum to 1, and what was tried: one dict a step with `weights`, `log_loss`, `kept`."""

    weights: np.ndarray
    trajectory: list[dict[str, Any]]


def search_weights(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    kind: str = "arithmetic",
    max_steps: int = 50,
    seed: int = 42,
) -> WeightSearch:
    """Blend weights of least log loss: a grid over the simplex for two or three runs, greedy selection beyond.

    Log loss and not the metric: it uses every row's probabilities, so that its optimum moves little with the rows, and
    it knows nothing of the decision rule, which is fitted afterwards. The grid's step is 0.05. Greedy selection with
    replacement (Caruana et al., 2004) adds the run that helps most, one at a time, and keeps the best prefix; among
    runs that help equally the seed decides.

    Args:
        probabilities: one array [n, c] a run.
        labels: int [n].
        kind: as in `blend`.
        max_steps: greedy steps.
        seed: of the order in which runs are tried.
    """
    count, labels = len(probabilities), np.asarray(labels)
    trajectory: list[dict[str, Any]] = []

    def attempt(weights: np.ndarray) -> float:
        loss = log_loss(blend(probabilities, weights, kind), labels)
        trajectory.append({"weights": [float(weight) for weight in weights], "log_loss": loss, "kept": False})
        return loss

    if count <= 3:
        for first in range(21):
            for second in range(21 - first):
                weights = np.array([first, second, 20 - first - second])[:count] / 20.0
                if abs(weights.sum() - 1) < 1e-9:
                    attempt(weights)
        best = min(trajectory, key=lambda step: step["log_loss"])
        best["kept"] = True
        return WeightSearch(np.array(best["weights"]), trajectory)

    order = np.random.default_rng(seed).permutation(count)
    chosen = np.zeros(count)
    for step in range(1, max_steps + 1):
        losses = {run: attempt((chosen + np.eye(count)[run]) / step) for run in order}
        added = min(losses, key=losses.__getitem__)
        tried = trajectory[-count:]
        del trajectory[-count:]
        chosen[added] += 1
        trajectory.append(tried[list(order).index(added)] | {"added": int(added)})
    best = min(trajectory, key=lambda step: step["log_loss"])
    best["kept"] = True
    return WeightSearch(np.array(best["weights"]), trajectory)


def cross_fitted_scaling(
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str],
    weights: np.ndarray,
    kind: str,
    num_splits: int,
    seed: int,
) -> np.ndarray:
    """Blended probabilities [n, c], each row's at the temperature that the other folds' dialogues ask for."""
    folds = grouped_folds(labels, groups, num_splits, seed)
    scaled = np.empty(logits[0].shape)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        temperature = fit_temperature([run[train] for run in logits], labels[train], weights, kind)
        scaled[~train] = blend([softmax(run[~train], temperature) for run in logits], weights, kind)
    return scaled
