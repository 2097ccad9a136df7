"""Schedules against their equations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import InputError
from rarefy.schedules import Constant, Cosine, Cubic, Iterative, Linear, Product, Warmup

SHARES = st.floats(0, 1)
SPARSITIES = st.floats(0, 1, exclude_max=True)
STEPS = st.integers(1, 1000)


def test_constant() -> None:
    assert [Constant(0.3)(s) for s in (0, 1, 10**9)] == [0.3] * 3


@given(SHARES, SHARES, STEPS)
def test_linear_meets_its_ends_and_stays_there(start: float, end: float, steps: int) -> None:
    schedule = Linear(start, end, steps)
    assert schedule(0) == start
    assert schedule(steps) == schedule(steps + 7) == end
    assert schedule(steps / 2) == pytest.approx((start + end) / 2)


@given(SHARES, STEPS, st.integers(0, 2000))
def test_cosine_follows_its_equation(peak: float, steps: int, step: int) -> None:
    end = peak / 10
    wanted = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
    assert Cosine(peak, steps, end)(step) == pytest.approx(wanted)


def test_cosine_falls_and_ends() -> None:
    values = [Cosine(0.1, 50)(s) for s in range(60)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.1
    assert values[50:] == pytest.approx([0.0] * 10)


def test_warmup_rises_from_above_zero_and_hands_over() -> None:
    schedule = Warmup(Cosine(1.0, 10), steps=4)
    assert [schedule(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(9) == Cosine(1.0, 10)(5)
    assert Warmup(Constant(2.0), steps=0)(0) == 2.0


@given(SPARSITIES, SPARSITIES, STEPS, st.integers(0, 50), st.integers(0, 2000))
def test_cubic_follows_zhu_and_gupta(
    initial: float, final: float, steps: int, begin: int, step: int
) -> None:
    t = min(max(step, begin), begin + steps)
    wanted = final + (initial - final) * (1 - (t - begin) / steps) ** 3
    found = Cubic(final, steps, begin, initial)(step)
    assert found == pytest.approx(wanted)
    assert min(initial, final) - 1e-12 <= found <= max(initial, final) + 1e-12


def test_cubic_changes_every_so_many_steps_and_still_ends() -> None:
    values = [Cubic(0.9, steps=10, every=4)(s) for s in range(13)]
    assert len(set(values[0:4])) == len(set(values[4:8])) == 1
    assert values[0] == 0
    assert values[10:] == [0.9] * 3


@given(st.floats(0, 0.99), st.integers(1, 8), st.integers(1, 5), st.integers(0, 5))
def test_rounds_remove_equal_shares_of_what_is_left(final, rounds, every, begin) -> None:
    schedule, left = Iterative(final, rounds, every, begin), 1.0
    assert begin == 0 or schedule(begin - 1) == 0
    for number in range(rounds):
        left *= (1 - final) ** (1 / rounds)
        for step in (begin + number * every, begin + (number + 1) * every - 1):
            assert schedule(step) == pytest.approx(1 - left)
    assert schedule(begin + 1000) == pytest.approx(final)


def test_schedules_are_values() -> None:
    assert Cosine(0.1, 10) == Cosine(0.1, 10)
    assert len({Warmup(Constant(1), 2), Warmup(Constant(1), 2)}) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(math.nan),
        lambda: Linear(0.0, math.inf, 10),
        lambda: Linear(0.0, 1.0, 0),
        lambda: Cosine(0.1, 0),
        lambda: Warmup(Constant(1), -1),
        lambda: Cubic(1.0, 10),
        lambda: Cubic(0.5, 10, initial=-0.1),
        lambda: Cubic(0.5, 0),
        lambda: Cubic(0.5, 10, every=0),
        lambda: Cubic(0.5, 10, begin=-1),
        lambda: Iterative(1.0, 3),
        lambda: Iterative(0.5, 0),
        lambda: Iterative(0.5, 3, every=0),
        lambda: Iterative(0.5, 3, begin=-1),
    ],
)
def test_values_out_of_range(make) -> None:
    with pytest.raises(InputError, match=r"\(.*=.*\): .*\. Write"):
        make()


def test_a_product_of_schedules_and_numbers() -> None:
    found = Product((2.0, Linear(0, 1, 10), Cosine(3.0, 10)))
    assert [found(step) for step in (0, 10, 5)] == pytest.approx([0, 0, 2 * 0.5 * 1.5])
    with pytest.raises(InputError, match="no factor"):
        Product(())
    with pytest.raises(InputError, match="finite"):
        Product((math.nan, Constant(1.0)))
