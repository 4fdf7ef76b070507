"""What a rule is worth on dialogues that it was not fitted on, and the choice of a rule by that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from rareturn.decisions import metrics as metrics_module
from rareturn.decisions import probabilities as probabilities_module
from rareturn.decisions.methods import METHODS, TIERS, UNGATED_METHODS, fit
from rareturn.decisions.metrics import (
    SCORE_TOLERANCE,
    bootstrap_interval,
    bootstrap_scores,
    mean_scores,
    score,
)
from rareturn.decisions.probabilities import check_weights, fit_temperature, log_loss, softmax
from rareturn.decisions.rules import Decision, Rule, decide
from rareturn.errors import InputError


def grouped_folds(
    labels: np.ndarray, groups: Sequence[Hashable], num_labels: int, num_splits: int, seed: int
) -> np.ndarray:
    """A fold for every row, int64 [n], dialogues kept whole and labels spread evenly.

    Dialogues in an order of descending spread of their label counts, ties shuffled by the seed, each go to the fold
    that leaves the label counts most even over the folds (the greedy rule of scikit-learn's StratifiedGroupKFold).

    Raises:
        InputError: fewer dialogues than two.
    """
    labels = np.asarray(labels)
    group_indices, num_groups = metrics_module.index_groups(groups)
    if num_groups < 2:
        raise InputError("dialogue_id: one dialogue only, cross-fitting needs two or more")
    num_splits = min(num_splits, num_groups)
    counts = np.bincount(group_indices * num_labels + labels, minlength=num_groups * num_labels)
    counts = counts.reshape(num_groups, num_labels).astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(num_groups)
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    filled = np.zeros((num_splits, num_labels))
    sizes = np.zeros(num_splits)
    squares = np.zeros(num_splits)
    fold_of_group = np.empty(num_groups, dtype=np.int64)
    for group in order:
        # Adding the dialogue to fold f changes that fold's sum of squared shares alone; the sums being fixed, less
        # squares means more even.
        growth = ((filled + shares[group]) ** 2).sum(axis=1) - squares
        fold = int(np.lexsort((sizes, np.round(growth, 12)))[0])
        filled[fold] += shares[group]
        squares[fold] = (filled[fold] ** 2).sum()
        sizes[fold] += counts[group].sum()
        fold_of_group[group] = fold
    return fold_of_group[group_indices]


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


def cross_fitted_predictions(
    fit_predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    groups: Sequence[Hashable],
    num_labels: int,
    num_splits: int,
    repeats: int,
    seed: int,
    progress: Callable[[], Any] | None = None,
) -> np.ndarray:
    """The predictions of `cross_fit`, int64 [repeats, n]."""
    predictions = np.empty((repeats, len(labels)), dtype=np.int64)
    for repeat in range(repeats):
        folds = grouped_folds(labels, groups, num_labels, num_splits, seed + repeat)
        for fold in range(int(folds.max()) + 1):
            held_out = np.flatnonzero(folds == fold)
            predictions[repeat, held_out] = fit_predict(np.flatnonzero(folds != fold), held_out)
            if progress is not None:
                progress()
    return predictions


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
    num_samples: int = 2000,
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
        num_samples: bootstrap samples of the interval.
        progress: called once a fit.

    Raises:
        InputError: fewer than two dialogues.
    """
    labels = np.asarray(labels, dtype=np.int64)
    predictions = cross_fitted_predictions(
        fit_predict, labels, groups, num_labels, num_splits, repeats, seed, progress
    )
    return CrossFit(
        predictions,
        mean_scores(labels, predictions, num_labels, positive_labels),
        bootstrap_interval(
            labels,
            predictions,
            groups,
            num_labels=num_labels,
            positive_labels=positive_labels,
            metric=metric,
            num_samples=num_samples,
            seed=seed,
        ),
    )


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
            finds it; `bagged` because `smooth` restrains the search in the same way, in half the time.
        num_vectors, num_bags: as in `fit`.
        num_splits: folds of the inner cross-fitting by which "auto" and the gate are decided.
        inner_repeats: repeats of it.
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
    num_bags: int = 10
    num_splits: int = 5
    inner_repeats: int = 1
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
    weights = _resolve_weights(recipe, logits, labels)
    temperature = fit_temperature(logits, labels, weights, recipe.blend)
    probabilities = probabilities_module.blend(
        [softmax(run, temperature) for run in logits], weights, recipe.blend
    )
    method, gated = recipe.method, recipe.protected_class is not None and recipe.method not in UNGATED_METHODS
    if method == "auto" or (gated and method != "random"):
        found = select(recipe, probabilities, labels, groups)
        method, gated = found.method, found.gated
    decision = _fit_candidate(recipe, (method, gated), probabilities, labels, groups)
    return Rule(dataclasses.replace(decision, temperature=temperature), weights, method, recipe.blend)


def _resolve_weights(recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    if recipe.weights == "search":
        probabilities = [softmax(run) for run in logits]
        return search_weights(probabilities, labels, kind=recipe.blend, seed=recipe.seed).weights
    given = [1.0] * len(logits) if recipe.weights is None else recipe.weights
    return check_weights(given, len(logits))


def _fit_candidate(
    recipe: Recipe,
    candidate: tuple[str, bool],
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
) -> Decision:
    method, gated = candidate
    return fit(
        method,
        probabilities,
        labels,
        groups,
        positive_labels=recipe.positive_labels,
        metric=recipe.metric,
        protected_class=recipe.protected_class if gated else None,
        num_vectors=recipe.num_vectors,
        num_bags=recipe.num_bags,
        seed=recipe.seed,
    )


def rule_fitter(
    recipe: Recipe, logits: Sequence[np.ndarray], labels: np.ndarray, groups: Sequence[Hashable]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`fit_rule` and its prediction in the form that `cross_fit` takes: everything fitted is fitted inside the folds."""
    labels, group_indices = np.asarray(labels), metrics_module.index_groups(groups)[0]

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        rule = fit_rule(recipe, [run[train] for run in logits], labels[train], group_indices[train].tolist())
        return rule.predict([[run[held_out]] for run in logits]).labels

    return fit_predict


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """What `select` chose, and the cross-fitted score of every candidate that it looked at, by (method, gated)."""

    method: str
    gated: bool
    cross_fitted: dict[tuple[str, bool], float]


def select(
    recipe: Recipe, probabilities: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]
) -> Selection:
    """Choose a method by repeated cross-fitting, then whether it has a gate.

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
    methods = recipe.candidates if recipe.method == "auto" else (recipe.method,)
    found = {
        (method, False): _cross_fit_candidate(recipe, (method, False), probabilities, labels, groups)
        for method in sorted(methods, key=METHODS.index)
    }
    tiers = [[(method, False) for method in tier if method in methods] for tier in TIERS]
    method = _simplest_within_one_error(found, tiers)[0]
    gated = False
    if recipe.protected_class is not None and method not in UNGATED_METHODS:
        pair = [(method, False), (method, True)]
        found[pair[1]] = _cross_fit_candidate(recipe, pair[1], probabilities, labels, groups)
        gated = _simplest_within_one_error(found, [[candidate] for candidate in pair])[1]
    return Selection(method, gated, {candidate: mean for candidate, (mean, _) in found.items()})


def _cross_fit_candidate(
    recipe: Recipe,
    candidate: tuple[str, bool],
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
) -> tuple[float, np.ndarray]:
    """The candidate's cross-fitted score and 300 bootstrap samples of it, paired with those of other candidates."""
    group_indices, labels = metrics_module.index_groups(groups)[0], np.asarray(labels, dtype=np.int64)

    def fit_predict(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        decision = _fit_candidate(
            recipe, candidate, probabilities[train], labels[train], group_indices[train].tolist()
        )
        return decide(probabilities[held_out], decision)

    counting = {
        "num_labels": probabilities.shape[1],
        "positive_labels": recipe.positive_labels,
        "metric": recipe.metric,
    }
    # Other folds than those of the outer cross-fitting, which begin at the seed itself.
    predictions = cross_fitted_predictions(
        fit_predict,
        labels,
        groups,
        probabilities.shape[1],
        recipe.num_splits,
        recipe.inner_repeats,
        recipe.seed + 1000,
    )
    mean = np.mean([score(labels, row, **counting) for row in predictions])
    return float(mean), bootstrap_scores(
        labels, predictions, groups, **counting, num_samples=300, seed=recipe.seed
    )


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
        loss = log_loss(probabilities_module.blend(probabilities, weights, kind), labels)
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
        del trajectory[-count:]
        chosen[added] += 1
        trajectory.append(
            {
                "weights": (chosen / step).tolist(),
                "log_loss": losses[added],
                "added": int(added),
                "kept": False,
            }
        )
    best = min(trajectory, key=lambda step: step["log_loss"])
    best["kept"] = True
    return WeightSearch(np.array(best["weights"]), trajectory)


def cross_fitted_scaling(
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: Sequence[str],
    weights: np.ndarray,
    blend: str,
    num_splits: int,
    seed: int,
) -> np.ndarray:
    """Blended probabilities [n, c], each row's at the temperature that the other folds' dialogues ask for."""
    folds = grouped_folds(labels, groups, logits[0].shape[1], num_splits, seed)
    scaled = np.empty(logits[0].shape)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        temperature = fit_temperature([run[train] for run in logits], labels[train], weights, blend)
        scaled[~train] = probabilities_module.blend(
            [softmax(run[~train], temperature) for run in logits], weights, blend
        )
    return scaled
