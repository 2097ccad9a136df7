"""Allocations are held against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.pruning.selection import allocation
from rarefy.pruning.selection.allocation import Choices, Lane, even, knapsack, ranked
from rarefy.pruning.selection.limits import Range

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def lane(values: list[float], saved: float = 1.0) -> Lane:
    return Lane(np.sort(np.array(values)), saved, Range(len(values), 0, len(values) - 1))


@st.composite
def choices(draw) -> Choices:
    """A lane with rising, otherwise arbitrary losses and savings, from nothing on."""
    number = draw(st.integers(1, 4))
    steps = st.lists(st.integers(0, 999), min_size=number, max_size=number)
    losses, saved = (np.cumsum([0, *draw(steps)]) / 7 for _ in range(2))
    return Choices(tuple(range(number + 1)), tuple(losses), tuple(saved))


def least_loss(lanes: list[Choices], wanted: float) -> float:
    """The least loss of all combinations that save enough, tried one by one."""
    found = [
        sum(c.losses[k] for c, k in zip(lanes, counts, strict=True))
        for counts in itertools.product(*(c.counts for c in lanes))
        if sum(c.saved[k] for c, k in zip(lanes, counts, strict=True)) >= wanted - 1e-9
    ]
    return min(found, default=np.inf)


@QUICK
@given(st.lists(choices(), min_size=1, max_size=4), st.floats(0, 0.999))
def test_the_knapsack_is_as_good_as_brute_force_within_its_bound(lanes, share) -> None:
    total = sum(c.saved[-1] for c in lanes)
    counts = knapsack(lanes)(share)
    saved = sum(c.saved[k] for c, k in zip(lanes, counts, strict=True))
    loss = sum(c.losses[k] for c, k in zip(lanes, counts, strict=True))
    bound = (len(lanes) + 1) / allocation.LEVELS
    if share + bound <= 1:  # the rounding can make the very last of it unreachable
        assert saved >= share * total * (1 - 1e-9) - 1e-9
    assert loss <= least_loss(lanes, min(share + bound, 1) * total) + 1e-9


def test_the_knapsack_is_exact_where_costs_are_whole_steps() -> None:
    lanes = [
        Choices((0, 1, 2), (0.0, 1.0, 5.0), (0.0, 250.0, 500.0)),
        Choices((0, 1), (0.0, 2.0), (0.0, 500.0)),
    ]
    allocate = knapsack(lanes)
    assert [allocate(share) for share in (0, 0.25, 0.26, 0.5, 0.75, 0.76, 1)] == [
        [0, 0], [1, 0], [0, 1], [0, 1], [1, 1], [2, 1], [2, 1],
    ]  # fmt: skip


def test_a_knapsack_of_lanes_that_save_nothing_takes_nothing_unless_all_is_asked_for() -> None:
    allocate = knapsack([Choices((0, 3), (0.0, 1.0), (0.0, 0.0))])
    assert (allocate(0.7), allocate(1.0)) == ([0], [3])


def test_a_block_is_a_lane_of_one_item_that_saves_its_whole_cost() -> None:
    block = Lane(np.array([0.5]), 0.4, Range(1, 0, 1))
    units = lane([1.0, 2.0, 3.0], 0.1)
    assert ranked([block, units])(0.25) == [1, 0]
    assert ranked([block, units])(0.5) == [1, 1]
    assert block.range.nearest(1) == 1


@QUICK
@given(
    st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_ranking_takes_the_least_importance_per_saved_cost(values, share) -> None:
    lanes = [lane(v, saved=i + 1.0) for i, v in enumerate(values)]
    counts = ranked(lanes)(share)
    assert sum(counts) == int(share * sum(map(len, values)) + 1e-9)
    price = [lane.values / lane.saved for lane in lanes]
    gone = [p[:n] for p, n in zip(price, counts, strict=True)]
    kept = [p[n:] for p, n in zip(price, counts, strict=True)]
    assert np.concatenate(gone).max(initial=-1) <= np.concatenate(kept).min(initial=99)


@pytest.mark.parametrize(("share", "counts"), [(0, [0, 0]), (0.5, [2, 1]), (1, [4, 3])])
def test_an_even_share_of_every_lane(share, counts) -> None:
    assert even([lane([1] * 4), lane([1] * 3)])(share) == counts
