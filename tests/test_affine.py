"""The scale and zero-point arithmetic: laws, and PyTorch's own as an independent reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import InputError
from rarefy.quantization.affine import (
    affine,
    along,
    channel_scales,
    dequantize,
    fake_quantize,
    quantize,
    quantize_weight,
    sqnr,
)

numbers = st.floats(-1e4, 1e4, width=32)
ranges = st.tuples(numbers, numbers).filter(lambda r: abs(r[0] - r[1]) > 1e-3).map(sorted)


@given(ranges, st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_rounding_error_is_at_most_half_a_step_inside_of_the_grid(span, shares):
    grid = affine(*span)
    x = torch.tensor([grid.low + (grid.high - grid.low) * s for s in shares], dtype=torch.float64)
    error = (x - fake_quantize(x, grid)).abs().max()
    assert error <= grid.scale * (0.5 + 1e-4)


@given(ranges, st.lists(numbers, min_size=1, max_size=20))
@settings(deadline=None)
def test_fake_quantization_is_idempotent_and_equals_pytorch(span, values):
    grid = affine(*span)
    x = torch.tensor(values)
    once = fake_quantize(x, grid)
    assert torch.equal(fake_quantize(once, grid), once)
    theirs = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, 255)
    assert (once - theirs).abs().max() <= grid.scale * 1.001  # ties, after another division


@given(ranges)
@settings(deadline=None)
def test_grid_covers_the_range_and_holds_zero_exactly(span):
    grid = affine(*span)
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    assert grid.low <= low + grid.scale * 0.51
    assert grid.high >= high - grid.scale * 0.51
    assert float(fake_quantize(torch.zeros(1), grid)) == 0
    if span[0] >= 0:
        assert (grid.zero_point, grid.low) == (0, 0.0)
        assert grid.high <= high


def test_scale_is_a_single_precision_number_that_keeps_a_clip_inside_of_its_bounds():
    grid = affine(0.0, 6.0)
    assert float(np.float32(grid.scale)) == grid.scale
    assert float(np.float32(255) * np.float32(grid.scale)) <= 6


@pytest.mark.parametrize("span", [(0.0, 0.0), (math.nan, 1.0), (1.0, 0.0), (0.0, math.inf)])
def test_empty_or_broken_range_is_refused(span):
    with pytest.raises(InputError):
        affine(*span)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_equal_pytorchs_per_channel_quantization(axis):
    weight = torch.randn(8, 6, 3, 3)
    scales = channel_scales(weight, axis)
    q = quantize_weight(weight, scales, axis)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, axis, -128, 127)
    torch.testing.assert_close(dequantize(q, along(scales, axis, 4), 0), theirs)
    assert q.dtype == torch.int8
    assert int(q.abs().max()) == 127


def test_zero_channels_have_scale_one():
    weight = torch.randn(3, 4)
    weight[1] = 0
    assert float(channel_scales(weight)[1]) == 1
    assert torch.equal(quantize_weight(weight, channel_scales(weight))[1], torch.zeros(4).char())


def test_integers_are_clamped():
    q = quantize(torch.tensor([-9.0, 0.5, 1.5, 900.0]), 1.0, 3, 0, 255)
    assert q.tolist() == [0, 3, 5, 255]
    assert dequantize(q, 1.0, 3).tolist() == [-3.0, 0.0, 2.0, 252.0]


def test_sqnr_in_decibel():
    assert sqnr(torch.ones(4), torch.ones(4)) == math.inf
    assert sqnr(torch.zeros(4), torch.ones(4)) == -math.inf
    assert sqnr(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20)


def test_sqnr_of_an_approximation_that_overflows_is_minus_infinity():
    assert sqnr(torch.ones(2), torch.tensor([1.0, math.inf])) == -math.inf
    assert math.isnan(sqnr(torch.ones(2), torch.tensor([1.0, math.nan])))
