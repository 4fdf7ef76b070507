"""Votes of several runs: gatekeepers decide one label, specialists share the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rareturn.decisions.probabilities import SMALLEST_PROBABILITY
from rareturn.errors import InputError

Scope = Sequence[int] | None


def scoped(probabilities: np.ndarray, scope: Scope) -> np.ndarray:
    """Probabilities [n, c] with labels outside `scope` at 0, each row scaled to sum 1; unchanged if scope is None."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if scope is None:
        return probabilities
    inside = np.zeros(probabilities.shape[1])
    inside[list(scope)] = 1.0
    kept = np.maximum(probabilities, SMALLEST_PROBABILITY) * inside
    return kept / kept.sum(axis=1, keepdims=True)


def vote(
    gatekeepers: Sequence[np.ndarray],
    specialists: Sequence[np.ndarray],
    *,
    gate_label: int,
    protected_class: int | None,
    specialist_scopes: Sequence[Scope] | None = None,
) -> np.ndarray:
    """Vote as the shared task's winner did (DESIGN 10): gatekeepers decide one label, all voters the others.

    Every voter votes for its most likely label. A row gets `gate_label` if more than half of the gatekeepers vote for
    it. Otherwise the votes for the other labels are counted, specialists' and gatekeepers' alike, and most votes win.
    A tie, or a row without such a vote, goes to the protected class (without one: to the lowest label of the tie).

    Args:
        gatekeepers: one array [n, c] a run, trained on all labels.
        specialists: one array [n, c] a run, trained on some of the labels.
        gate_label: the label that the gatekeepers decide.
        protected_class: where ties go.
        specialist_scopes: labels each specialist was trained on; None for all but `gate_label`.

    Returns:
        int64 [n].

    Raises:
        InputError: no gatekeeper.
    """
    if not gatekeepers:
        raise InputError("vote: no gatekeeper among the runs")
    gate_votes = np.stack([np.asarray(run).argmax(axis=1) for run in gatekeepers])
    num_labels = np.shape(gatekeepers[0])[1]
    scopes = _scopes(specialists, specialist_scopes, gate_label, num_labels)
    own = [scoped(run, scope).argmax(axis=1) for run, scope in zip(specialists, scopes, strict=True)]
    votes = np.concatenate([gate_votes, np.stack(own)]) if own else gate_votes
    tally = (votes[:, :, None] == np.arange(num_labels)).sum(axis=0)
    tally[:, gate_label] = -1
    predictions = tally.argmax(axis=1)
    if protected_class is not None:
        most = tally.max(axis=1, keepdims=True)
        predictions[((tally == most).sum(axis=1) > 1) | (most[:, 0] == 0)] = protected_class
    predictions[(gate_votes == gate_label).sum(axis=0) * 2 > len(gate_votes)] = gate_label
    return predictions


def vote_probabilities(
    gatekeepers: Sequence[np.ndarray],
    specialists: Sequence[np.ndarray],
    *,
    gate_label: int,
    specialist_scopes: Sequence[Scope] | None = None,
) -> np.ndarray:
    """The vote in probabilities: the gatekeepers' mean for `gate_label`; the specialists share out what remains.

    A label's share is the mean over the specialists whose scope has it; the shares are scaled to sum 1.

    Args:
        gatekeepers, specialists, gate_label, specialist_scopes: as in `vote`.

    Returns:
        float64 [n, c].

    Raises:
        InputError: no gatekeeper, no specialist, or a label in no specialist's scope.
    """
    if not gatekeepers or not specialists:
        raise InputError("vote: needs one or more gatekeepers and one or more specialists")
    num_labels = np.shape(gatekeepers[0])[1]
    scopes = _scopes(specialists, specialist_scopes, gate_label, num_labels)
    covered = np.bincount(np.concatenate(scopes), minlength=num_labels)
    missing = [label for label in range(num_labels) if label != gate_label and not covered[label]]
    if missing:
        raise InputError(f"vote: label(s) {', '.join(map(str, missing))} are in no specialist's scope")
    shares = sum(scoped(run, scope) for run, scope in zip(specialists, scopes, strict=True))
    shares = shares / np.maximum(covered, 1)
    shares /= shares.sum(axis=1, keepdims=True)
    gate = np.mean([np.asarray(run, dtype=np.float64)[:, gate_label] for run in gatekeepers], axis=0)
    result = (1 - gate)[:, None] * shares
    result[:, gate_label] = gate
    return result


def _scopes(
    specialists: Sequence[np.ndarray], scopes: Sequence[Scope] | None, gate_label: int, num_labels: int
) -> list[list[int]]:
    given = [None] * len(specialists) if scopes is None else scopes
    return [
        [label for label in (range(num_labels) if scope is None else scope) if label != gate_label]
        for scope in given
    ]


@dataclass(frozen=True)
class Voting:
    """A vote over runs, and all that it takes to repeat it.

    Attributes:
        gate_label: the label that the gatekeepers decide: runs trained on every label.
        protected_class: where ties go; None for the lowest label.
        label_scopes: of each run, the labels it was trained on (a specialist), or None (a gatekeeper).
        soft: probabilities in place of votes (`vote_probabilities`).
    """

    __pydantic_config__ = {"strict": False}  # noqa: RUF012 (in a file the tuples are lists)

    gate_label: int
    protected_class: int | None
    label_scopes: tuple[tuple[int, ...] | None, ...]
    soft: bool

    def predict(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """Labels int64 [n] of the runs' probabilities [n, c].

        Raises:
            InputError: a kind of voter is missing, or a label that no specialist knows.
        """
        paired = list(zip(probabilities, self.label_scopes, strict=True))
        voters = [[run for run, scope in paired if (scope is None) == full] for full in (True, False)]
        scopes = [scope for scope in self.label_scopes if scope is not None]
        options = {"gate_label": self.gate_label, "specialist_scopes": scopes}
        if self.soft:
            return vote_probabilities(*voters, **options).argmax(axis=1)
        return vote(*voters, protected_class=self.protected_class, **options)
