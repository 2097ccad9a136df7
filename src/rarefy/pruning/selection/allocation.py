"""How many items of each lane go: pure arithmetic on importance and saved cost.

A lane holds items that go one after the other, the least important first: the units of a group, or
a single block that goes as a whole. An allocation turns the share of all that could go into a
number of items per lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rarefy.pruning.selection.limits import Range

Allocation = Callable[[float], list[int]]
"""Share to remove, 0 to 1 -> how many items of each lane go, bounds and steps not yet regarded."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lane:
    """Items that go one after the other.

    Attributes:
        values: importance of each item in ascending order, shape (items,).
        saved: share of the whole cost that the removal of one item saves.
        range: how many may go.
    """

    values: Floats
    saved: float
    range: Range


@dataclass(frozen=True)
class Choices:
    """What may go of one lane, as a few alternatives of which one is taken.

    Attributes:
        counts: how many items go, ascending from the fewest.
        losses: importance that goes with them, not descending.
        saved: cost that goes with them.
    """

    counts: tuple[int, ...]
    losses: tuple[float, ...]
    saved: tuple[float, ...]


def even(lanes: Sequence[Lane]) -> Allocation:
    """The same share of every lane."""
    return lambda share: [math.floor(share * len(lane.values) + 1e-9) for lane in lanes]


def ranked(lanes: Sequence[Lane]) -> Allocation:
    """The items with the least importance per saved cost, of all lanes together.

    That solves the knapsack problem up to one item where costs are sums over items.
    """
    owner = np.concatenate([np.full(len(lane.values), i) for i, lane in enumerate(lanes)])
    value = np.concatenate([lane.values / lane.saved for lane in lanes])
    order = owner[np.argsort(value, kind="stable")]

    def allocate(share: float) -> list[int]:
        first = order[: math.floor(share * len(order) + 1e-9)]
        counted: list[int] = np.bincount(first, minlength=len(lanes)).tolist()
        return counted

    return allocate


LEVELS = 1000
"""Steps that a cost, or an amount of removal, is divided into, at least."""

LEVELS_PER_LANE = 20
"""Steps for every lane, so that rounding them down costs at most a twentieth in all."""


def knapsack(choices: Sequence[Choices]) -> Allocation:
    """One alternative of each lane, so that their losses are least (multiple-choice knapsack).

    Solved by dynamic programming over saved costs in steps of the ``R``-th part of all that can be
    saved, rounded down (Shen et al. 2022, https://arxiv.org/abs/2110.10811, choose units under a
    latency budget in the same way). What is returned saves at least the share that is asked for,
    and loses no more than the best choice that saves ``(len(choices) + 1) / R`` more.
    """
    levels = max(LEVELS, LEVELS_PER_LANE * len(choices))
    total = sum(max(c.saved) for c in choices)
    taken, best = _table(choices, levels, total / levels if total > 0 else 1.0)
    reachable = int(np.flatnonzero(np.isfinite(best)).max())

    def allocate(share: float) -> list[int]:
        if share >= 1:  # rounding must not hide the last of what can be saved
            return [lane.counts[-1] for lane in choices]
        level = min(math.ceil(share * levels - 1e-9), reachable)
        counts = []
        for lane, row in zip(reversed(choices), reversed(taken), strict=True):
            option = int(row[level])
            counts.append(lane.counts[option])
            level = max(level - _steps(lane.saved[option], total / levels), 0)
        return counts[::-1]

    return allocate


def _steps(saved: float, size: float) -> int:
    """Whole steps that a saved cost fills."""
    return max(math.floor(saved / size + 1e-9), 0) if size > 0 else 0


def _table(
    choices: Sequence[Choices], levels: int, size: float
) -> tuple[list[NDArray[np.int64]], Floats]:
    """For each lane and each level to reach with the lanes so far, the option; and the losses."""
    best = np.full(levels + 1, np.inf)
    best[0] = 0.0
    taken = []
    need = np.arange(levels + 1)
    for lane in choices:
        steps = [_steps(saved, size) for saved in lane.saved]
        losses = np.stack(
            [
                best[np.maximum(need - step, 0)] + loss
                for step, loss in zip(steps, lane.losses, strict=True)
            ]
        )
        row = losses.argmin(0)
        taken.append(row)
        best = losses[row, need]
    return taken, best
