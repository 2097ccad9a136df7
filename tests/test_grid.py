"""Grids of weights: laws of rounding, with scales in all their forms."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.grid import Grid, as_matrix, as_weight, check_float, columns, grids, put_grids


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Grid]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    axis = draw(st.integers(0, 1))
    group = draw(st.sampled_from([None, 2, 3, 100]))
    low, high = draw(st.sampled_from([(-7, 7), (0, 15), (-127, 127), (0, 255), (-1, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = shape[axis : axis + 1]
    if group is not None:
        scales = (*scales, -(-columns(shape, axis) // group))
    scale = torch.rand(scales, generator=generator) + 0.05
    zero = (
        torch.randint(low, high + 1, scales, generator=generator) if low == 0 else torch.tensor(0)
    )
    tensor = 5 * torch.randn(shape, generator=generator)
    return tensor, Grid(scale, zero, axis, low, high, group)


def entry(tensor: Tensor, grid: Grid, place: tuple[int, ...]) -> float:
    """The nearest value of one entry, from its own numbers alone."""
    channel = place[grid.axis]
    others = [
        (s, p) for d, (s, p) in enumerate(zip(tensor.shape, place, strict=True)) if d != grid.axis
    ]
    column = 0
    for size, index in others:
        column = column * size + index
    where = (channel,) if grid.group is None else (channel, column // grid.group)
    scale = float(grid.scale[where])
    zero = int(grid.zero_point[where]) if grid.zero_point.ndim else int(grid.zero_point)
    values = [(q - zero) * scale for q in range(grid.low, grid.high + 1)]
    return min(values, key=lambda value: abs(value - float(tensor[place])))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_entry_becomes_the_nearest_value_of_its_own_range(case: tuple[Tensor, Grid]) -> None:
    tensor, grid = case
    assert grid.fits(tuple(tensor.shape))
    found = grid.nearest(tensor)
    for place in torch.cartesian_prod(*(torch.arange(s) for s in tensor.shape))[:40].tolist():
        expected = entry(tensor, grid, tuple(place))
        assert float(found[tuple(place)]) == pytest.approx(expected, abs=1e-5)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_rounding_twice_is_rounding_once_and_zeros_stay(case: tuple[Tensor, Grid]) -> None:
    tensor, grid = case
    tensor[..., ::2] = -0.0
    found = grid.nearest(tensor)
    assert not found[..., ::2].any()
    assert torch.equal(grid.nearest(found), found)
    assert grid.holds(found)
    assert not grid.holds(found + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_held_too(dtype: torch.dtype) -> None:
    grid = Grid(torch.tensor([0.013, 0.21]), torch.tensor(0), 0, -127, 127)
    found = grid.nearest(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert found.dtype == dtype
    assert grid.holds(found)


def test_what_does_not_fit_or_is_not_exact_is_not_held() -> None:
    grid = Grid(torch.tensor([0.5, 1.0]), torch.tensor(0), 0, -7, 7)
    ones = torch.ones(2, 3)
    assert grid.holds(ones)
    assert not grid.holds(torch.ones(3, 2))
    assert not grid.holds(torch.tensor([[torch.nan], [1.0]]))
    assert not grid.holds(torch.tensor([[8.0], [8.0]]))
    assert not grid.holds(torch.tensor([[-0.0], [1.0]]))
    assert not Grid(torch.ones(2, 2), torch.tensor(0), 0, -7, 7, 3).holds(ones)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_matrices_turn_back_into_weights(axis: int) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4)
    matrix = as_matrix(tensor, axis)
    assert matrix.shape == (tensor.shape[axis], columns((2, 3, 4), axis))
    assert torch.equal(as_weight(matrix, (2, 3, 4), axis), tensor)


def test_grids_are_noted_on_a_network_and_go_with_its_copy() -> None:
    net = nn.Linear(3, 2)
    assert not grids(net)
    check_float(net, "here")
    put_grids(net, {"weight": Grid(torch.ones(2), torch.tensor(0), 0, -7, 7)})
    assert torch.equal(grids(copy.deepcopy(net))["weight"].scale, torch.ones(2))
    with pytest.raises(InputError, match="quantized already"):
        check_float(net, "here")
    put_grids(net, {})
    assert vars(net).keys() == vars(nn.Linear(3, 2)).keys()
