"""Ranges of weights, against a search that is written another way."""

import numpy as np
import pytest
import torch

from rarefy.quantization.rounding import SHRINKAGES, grid_for, limits
from rarefy.schemes import WeightOnly


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 5])
def test_ranges_are_the_best_of_all_that_are_tried(symmetric, bits, group) -> None:
    scheme = WeightOnly(bits=bits, group=group, method="rtn", symmetric=symmetric, observer="mse")
    values, counted = weight(3, 4, 3), weight(3, 12, seed=1).square()
    grid = grid_for(values, 0, scheme, counted)
    low, high = limits(scheme)
    errors = (values - grid.nearest(values)).square().reshape(3, 12).double().numpy()
    size = group or 12
    for channel in range(3):
        for block, start in enumerate(range(0, 12, size)):
            part = slice(start, start + size)
            w = values.reshape(3, 12)[channel, part].double().numpy()
            h = counted[channel, part].double().numpy()
            own = float((errors[channel, part] * h).sum())
            best = np.inf
            for share in SHRINKAGES.tolist():
                if symmetric:
                    scale, zero = float(np.float16(np.abs(w).max() * share / high)), 0
                else:
                    bottom, top = min(w.min(), 0) * share, max(w.max(), 0) * share
                    scale = float(np.float16((top - bottom) / (high - low)))
                    zero = int(np.clip(np.rint(low - bottom / scale), low, high))
                q = np.clip(np.rint(w / scale) + zero, low, high)
                best = min(best, float((h * (w - (q - zero) * scale) ** 2).sum()))
            assert own == pytest.approx(best, rel=1e-3, abs=1e-9), (channel, block)


def test_the_whole_range_is_kept_with_minmax() -> None:
    values = weight(4, 30)
    grid = grid_for(values, 0, WeightOnly(bits=4, method="rtn", observer="minmax"))
    torch.testing.assert_close(grid.scale, values.abs().amax(1) / 7, rtol=1e-3, atol=0)
    assert torch.equal(grid.scale.half().float(), grid.scale)


def test_importance_moves_the_range_to_where_it_counts() -> None:
    values = torch.cat([torch.full((1, 10), 0.1), torch.ones(1, 1)], 1)
    few = torch.cat([torch.ones(1, 10), torch.full((1, 1), 1e-6)], 1)
    scheme = WeightOnly(bits=2, method="awq")
    plain, aware = grid_for(values, 0, scheme), grid_for(values, 0, scheme, few)
    small = values[:, :10]
    assert (aware.nearest(values)[:, :10] - small).abs().max() < 0.11
    assert float(aware.scale) < float(plain.scale)


def test_outputs_may_be_along_the_second_dimension() -> None:
    values = weight(6, 4)
    scheme = WeightOnly(bits=4, group=3, method="rtn")
    turned, plain = grid_for(values, 1, scheme), grid_for(values.T, 0, scheme)
    assert turned.axis == 1
    assert torch.equal(turned.nearest(values), plain.nearest(values.T).T)


@pytest.mark.parametrize("factor", [1e-9, 1e8])
def test_scales_beyond_half_precision_stay_single(factor: float) -> None:
    values = weight(2, 20) * factor
    grid = grid_for(values, 0, WeightOnly(bits=8, method="rtn"))
    assert (grid.nearest(values) - values).norm() < 0.01 * values.norm()


def test_channels_of_zeros_have_a_scale() -> None:
    grid = grid_for(torch.zeros(2, 3), 0, WeightOnly(method="rtn", symmetric=False))
    assert grid.scale.tolist() == [1.0, 1.0]
    assert not grid.nearest(torch.zeros(2, 3)).any()
