"""Which rows share an optimizer step, and how a step is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Step = list[list[int]]  # a step's micro-batches, each a list of indices into the data set

MEGABATCH_STEPS = 16


def plan_rows(
    lengths: Sequence[int], rows_per_step: int, micro_batches: int, seed: int, epoch: int
) -> list[Step]:
    """One epoch of unpacked rows: shuffled, then bucketed by length so that little is padding.

    Rows are shuffled, cut into megabatches of 16 steps, sorted by length within each, and dealt to steps; the steps
    are shuffled again. Which rows share a step depends on `rows_per_step` alone, not on how it is cut: 16x1, 4x4 and
    two processes of 8 take the same steps. Steps differ by at most one row in size, so none is a small remainder.

    Args:
        lengths: tokens of each row.
        rows_per_step: batch size x gradient accumulation x processes.
        micro_batches: gradient accumulation x processes; every step has exactly so many, none empty.

    Raises:
        ValueError: fewer rows than micro-batches in a step.
    """
    if len(lengths) < micro_batches:
        raise ValueError(f"{len(lengths)} training rows cannot fill {micro_batches} micro-batches")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    num_steps = max(1, min(-(-len(lengths) // rows_per_step), len(lengths) // micro_batches))
    lengths = np.asarray(lengths)
    steps: list[Step] = []
    bounds = np.linspace(0, len(order), num_steps + 1).astype(int)
    for first in range(0, num_steps, MEGABATCH_STEPS):
        last = min(first + MEGABATCH_STEPS, num_steps)
        megabatch = order[bounds[first] : bounds[last]]
        megabatch = megabatch[np.argsort(lengths[megabatch], kind="stable")]
        for step in range(first, last):
            rows = megabatch[bounds[step] - bounds[first] : bounds[step + 1] - bounds[first]]
            steps.append([part.tolist() for part in np.array_split(rows, micro_batches)])
    return [steps[index] for index in rng.permutation(num_steps)]


class StepBatchSampler:
    """A `DataLoader`'s batch sampler that follows a plan of optimizer steps and gives a process its share.

    Args:
        plan: epoch -> steps; the same number of steps, each of the same number of micro-batches, in every epoch.
        rank, world_size: of this process; micro-batches go round the processes.
    """

    def __init__(self, plan: Callable[[int], list[Step]], rank: int = 0, world_size: int = 1):
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = 0
        self._length = sum(len(step[rank::world_size]) for step in plan(0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.plan(self.epoch):
            yield from step[self.rank :: self.world_size]


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for prediction: longest first, so that memory runs out at once or never. Ties keep their order."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
