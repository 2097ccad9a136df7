"""Options of criteria."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import InputError
from rarefy.graph.groups import Member
from rarefy.pruning.scoring.aggregation import SCALE, Aggregated, Scaled, slices

SCORES = torch.tensor([1.0, 4.0, 2.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("share", [1, 4, 2, 5]),
        ("none", [1, 4, 2, 5]),
        ("sum", [1 / 12, 4 / 12, 2 / 12, 5 / 12]),
        ("mean", [1 / 3, 4 / 3, 2 / 3, 5 / 3]),
        ("max", [0.2, 0.8, 0.4, 1]),
        ("standardize", [-2 / 2.5**0.5, 1 / 2.5**0.5, -1 / 2.5**0.5, 2 / 2.5**0.5]),
        ("lamp", [1 / 12, 4 / 9, 2 / 11, 1]),
    ],
)
def test_scores_are_made_comparable(scale, expected) -> None:
    found = SCALE[scale](SCORES)
    np.testing.assert_allclose(found, expected)


@given(st.sampled_from(sorted(SCALE)), st.integers(1, 4), st.sampled_from([0.0, 1.0]))
def test_equal_scores_and_single_units_stay_finite(scale, units, value) -> None:
    assert torch.isfinite(SCALE[scale](torch.full((units,), value, dtype=torch.float64))).all()


@given(st.sampled_from(sorted(SCALE)))
def test_the_order_within_a_group_stays(scale) -> None:
    assert torch.equal(SCALE[scale](SCORES).argsort(), SCORES.argsort())


def test_what_goes_with_a_unit_is_summed() -> None:
    values = torch.arange(12, dtype=torch.float64).view(3, 4)
    member = Member("w", 1, np.array([[0, 2], [3, 3]]))
    assert slices(values, member, share=False).tolist() == [12 + 18, 21 + 21]
    assert slices(values, member, share=True).tolist() == [30 / 66, 42 / 66]


def test_a_group_without_parameters_has_zeros() -> None:
    assert Aggregated().combined([], 3).tolist() == [0, 0, 0]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"Aggregated\(over='median'\).*first"):
        Aggregated(over="median")
    for kind in (Scaled, Aggregated):
        with pytest.raises(InputError, match=r"scale='big'.*standardize"):
            kind(scale="big")
