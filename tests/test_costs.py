"""Latencies between the widths that were measured."""

import pytest

from rarefy.graph.layer import Layer
from rarefy.pruning.selection.costs import Surface

SURFACE = Surface((8, 16), (10, 20), ((1.0, 2.0), (3.0, 6.0)), 4)


@pytest.mark.parametrize(
    ("inner", "outer", "ms"),
    [
        (8, 10, 1.0),
        (16, 20, 6.0),
        (16, 15, 4.5),
        (12, 20, 4.0),
        (12, 15, 3.0),
        (32, 40, 6.0),  # wider than measured does not occur: the widest counts
        (8, 5, 0.75),
        (0, 0, 0.25),  # half of half: a call of no width takes time, too
    ],
)
def test_both_widths_are_interpolated(inner: int, outer: int, ms: float) -> None:
    assert SURFACE(Layer("matmul", inner, outer, times=4)) == pytest.approx(ms)


def test_time_is_in_proportion_to_the_repetitions() -> None:
    assert SURFACE(Layer("matmul", 8, 10, times=2)) == pytest.approx(0.5)
