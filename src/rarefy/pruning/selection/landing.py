"""The plan that comes nearest to a budget from below."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.allocation import Allocation, Lane

CLOSE = 0.02
"""How far below its budget a plan may end where a nearer one can be had."""

PORTION = 0.25
"""Share of what is still free that is given back to one lane at once."""

MOST_STEPS = 8
"""Steps of one lane that a swap takes at most."""

MOST_TRIALS = 1000
"""Plans that are tried at most to come closer."""


@dataclass(frozen=True)
class Landed:
    """A plan, how many items of each lane it takes, and the share of the cost that it leaves."""

    plan: Plan
    counts: tuple[int, ...]
    share: float


Try = Callable[[Sequence[int]], Landed]
"""How many items of each lane should go -> what that makes."""


def least_removal(allocate: Allocation, attempt: Try, limit: float, levels: int) -> Landed | None:
    """The least removal that leaves at most ``limit``, by bisection; None where none does."""
    return _bisected(allocate, attempt, limit, levels)[0]


def _bisected(
    allocate: Allocation, attempt: Try, limit: float, levels: int
) -> tuple[Landed | None, int]:
    """The least removal, and how many levels of it there are."""
    best = attempt(allocate(1.0))
    if best.share > limit:
        return None, levels
    low, high = 0, levels
    while low < high:
        middle = (low + high) // 2
        found = attempt(allocate(middle / levels))
        if found.share <= limit:
            best, high = found, middle
        else:
            low = middle + 1
    return best, low


def landed(
    allocate: Allocation,
    lanes: Sequence[Lane],
    attempt: Try,
    limit: float,
    levels: int,
    *,
    even: bool = False,
) -> Landed | None:
    """The nearest to the limit from below of the plans that are tried; None where none fits.

    The least removal is brought closer; if it is to stay ``even`` over the lanes, only where it is
    not close already. Where that stays far below the limit, since widths that
    have to agree go in steps that leap over it, the lanes that would leap keep what they have, and
    the others go on.
    """
    best: Landed | None = None
    caps: dict[int, int] = {}

    def held(share: float) -> list[int]:
        return [min(n, caps.get(i, n)) for i, n in enumerate(allocate(share))]

    while True:
        below, level = _bisected(held, attempt, limit, levels)
        if below is None:
            return best
        if even and best is None and limit - below.share <= CLOSE:
            return below
        found = closer(below, lanes, attempt, limit)
        best = found if best is None or found.share > best.share else best
        if limit - best.share <= CLOSE or level == 0:
            return best
        pair = held((level - 1) / levels), held(level / levels)
        caps |= {i: few for i, (few, more) in enumerate(zip(*pair, strict=True)) if few < more}


def closer(found: Landed, lanes: Sequence[Lane], attempt: Try, limit: float) -> Landed:
    """A plan that gives back what still fits; where that does not come close, one with a swap.

    Items are given back lane by lane, the most important first. A swap takes one step more of a
    lane and gives back of others.
    """
    budget = iter(range(MOST_TRIALS))
    found = given_back(found, lanes, attempt, limit, budget)
    while limit - found.share > CLOSE:
        swapped = _swapped(found, lanes, attempt, limit, budget)
        if swapped is None:
            break
        found = swapped
    return found


def given_back(
    found: Landed,
    lanes: Sequence[Lane],
    attempt: Try,
    limit: float,
    budget: Iterator[int] | None = None,
    closed: Collection[int] = (),
) -> Landed:
    """A plan that gives back what still fits, lane by lane, the most important first.

    Args:
        found: a plan within the limit.
        lanes: what it chooses from.
        attempt: makes a plan.
        limit: the share of the cost that may remain.
        budget: trials that are left.
        closed: numbers of lanes that give nothing back.
    """
    budget = iter(range(MOST_TRIALS)) if budget is None else budget
    open_lanes = set(range(len(lanes))).difference(closed)

    def value(i: int) -> float:
        taken = found.counts[i]
        return float(lanes[i].values[lanes[i].range.fewer(taken) : taken].sum())

    while open_lanes:
        i = max(sorted(open_lanes), key=value)
        many = int((limit - found.share) * PORTION / lanes[i].saved)
        for by in dict.fromkeys((max(many, 1), 1)):
            fewer = lanes[i].range.fewer(found.counts[i], by)
            trial = _changed(found, i, fewer, attempt, budget)
            if trial is not None and found.share < trial.share <= limit:
                found = trial
                break
        else:
            open_lanes.remove(i)
    return found


def _swapped(
    found: Landed, lanes: Sequence[Lane], attempt: Try, limit: float, budget: Iterator[int]
) -> Landed | None:
    """The first swap that comes nearer to the limit: small ones of all lanes before large ones."""
    taken = list(found.counts)
    for _ in range(MOST_STEPS):
        for i, lane in enumerate(lanes):
            taken[i] = lane.range.more(taken[i])
            trial = _changed(found, i, taken[i], attempt, budget)
            if trial is None or trial.share > limit:
                continue
            trial = given_back(trial, lanes, attempt, limit, budget, {i})
            if trial.share > found.share:
                return trial
    return None


def _changed(
    found: Landed, lane: int, count: int, attempt: Try, budget: Iterator[int]
) -> Landed | None:
    """With another number of items of one lane; None where that is what there is."""
    if count == found.counts[lane] or next(budget, None) is None:
        return None
    counts = list(found.counts)
    counts[lane] = count
    return attempt(counts)
