"""Votes of several runs: gatekeepers decide one label, specialists share the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rareturn.decisions.probabilities import SMALLEST_PROBABILITY
from rareturn.errors import InputError


def scoped(probabilities: np.ndarray, scope: Sequence[int]) -> np.ndarray:
    """Probabilities [n, c] with labels outside `scope` at 0, each row scaled to sum 1."""
    inside = np.isin(np.arange(probabilities.shape[1]), scope)
    kept = np.maximum(probabilities, SMALLEST_PROBABILITY) * inside
    return kept / kept.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Voting:
    """A vote over runs, and all that it takes to repeat it.

    `label_scopes` are, of each run, the labels it was trained on (a specialist), or None for all (a gatekeeper). The
    gatekeepers decide `gate_label`. Ties go to `protected_class`; without one, to the lowest label. `soft`: shares of
    probability in place of votes.
    """

    __pydantic_config__ = {"strict": False}  # noqa: RUF012 (in a file the tuples are lists)

    gate_label: int
    protected_class: int | None
    label_scopes: tuple[tuple[int, ...] | None, ...]
    soft: bool

    def _voters(self, probabilities: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Gatekeepers and specialists, of the latter only the labels of their scopes, never the gate's."""
        paired = list(zip(probabilities, self.label_scopes, strict=True))
        gatekeepers = [run for run, scope in paired if scope is None]
        if not gatekeepers:
            raise InputError("vote: no gatekeeper among the runs")
        specialists = [(run, set(scope) - {self.gate_label}) for run, scope in paired if scope is not None]
        return gatekeepers, [scoped(run, sorted(scope)) for run, scope in specialists]

    def predict(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """Labels int64 [n] of the runs' probabilities [n, c], by votes as the shared task's winner did (DESIGN 10).

        Every voter votes for its most likely label. A row gets `gate_label` if more than half of the gatekeepers vote
        for it. Otherwise the votes for the other labels are counted, specialists' and gatekeepers' alike, and most
        votes win. A tie, or a row without such a vote, goes to the protected class. See `soft_vote` for the soft form.
        An InputError where a kind of voter is missing, or no specialist knows a label.
        """
        if self.soft:
            return self.soft_vote(probabilities).argmax(axis=1)
        for_gate, tally = self.tally(probabilities)
        predictions = tally.argmax(axis=1)
        if self.protected_class is not None:
            most = tally.max(axis=1, keepdims=True)
            predictions[((tally == most).sum(axis=1) > 1) | (most[:, 0] == 0)] = self.protected_class
        predictions[for_gate * 2 > self.label_scopes.count(None)] = self.gate_label
        return predictions

    def tally(self, probabilities: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The gatekeepers' votes for the gate's label [n], and all votes for each other label [n, c] (-1 for the gate's)."""
        gatekeepers, specialists = self._voters(probabilities)
        votes = np.stack([run.argmax(axis=1) for run in [*gatekeepers, *specialists]])
        tally = (votes[:, :, None] == np.arange(gatekeepers[0].shape[1])).sum(axis=0)
        tally[:, self.gate_label] = -1
        return (votes[: len(gatekeepers)] == self.gate_label).sum(axis=0), tally

    def soft_vote(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """The vote in probabilities [n, c]: the gatekeepers' mean for the gate's label; specialists share what remains.

        A label's share is the mean over the specialists whose scope has it; the shares are scaled to sum 1.
        """
        gatekeepers, specialists = self._voters(probabilities)
        known = [label for scope in self.label_scopes for label in set(scope or ())]
        covered = np.bincount(known, minlength=gatekeepers[0].shape[1])
        missing = [str(label) for label in np.flatnonzero(covered == 0) if label != self.gate_label]
        if missing:
            raise InputError(f"vote: label(s) {', '.join(missing)} are in no specialist's scope")
        shares = sum(specialists) / np.maximum(covered, 1)
        shares /= shares.sum(axis=1, keepdims=True)
        gate = np.mean([run[:, self.gate_label] for run in gatekeepers], axis=0)
        result = (1 - gate)[:, None] * shares
        result[:, self.gate_label] = gate
        return result
