"""Range finders against numpy and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import DataError
from rarefy.quantization.affine import affine, fake_quantize
from rarefy.quantization.observers import (
    BINS,
    OBSERVERS,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    balanced,
    found,
    observer,
)
from rarefy.schemes import Int8

batches = st.lists(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), min_size=1, max_size=5
)


@given(batches)
@settings(deadline=None)
def test_every_range_lies_in_the_range_of_all_values(parts):
    values = np.concatenate([np.float32(part) for part in parts])
    for name in OBSERVERS:
        seen = observer(Int8(observer=name), "x")
        for part in parts:
            seen.update(torch.tensor(part))
        low, high = seen.range()
        assert low <= high
        assert min(float(values.min()), 0) <= low
        assert high <= max(float(values.max()), 0)


@given(batches)
@settings(deadline=None)
def test_histogram_keeps_every_value_whatever_the_order(parts):
    histogram = Histogram()
    for part in parts:
        histogram.update(torch.tensor(part))
    if histogram.reach:
        first = next(i for i, part in enumerate(parts) if any(part))
        assert float(histogram.counts.sum()) == sum(len(p) for p in parts[first:])
    assert len(histogram.counts) == BINS


def test_minmax_is_exact_over_batches():
    seen = MinMax()
    for values in ([3.0, 5.0], [4.0], [7.0, 3.5]):
        seen.update(torch.tensor(values))
    assert seen.range() == (3.0, 7.0)


@pytest.mark.parametrize("positive", [True, False])
def test_percentile_equals_numpys_within_a_bin(positive):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x = x.abs() if positive else x
    seen = Percentile(share=0.99)
    for part in x.split(30_000):
        seen.update(part)
    low, high = seen.range()
    share = 0.99 if positive else 0.995
    width = 2 * seen.reach / BINS
    assert high == pytest.approx(np.quantile(x.numpy(), share), abs=2 * width)
    assert positive or low == pytest.approx(np.quantile(x.numpy(), 1 - share), abs=2 * width)


@pytest.mark.parametrize("positive", [True, False])
def test_mse_range_beats_minmax_and_is_near_the_best_of_a_brute_force_search(positive):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    x = x.abs() if positive else x
    seen = MeanSquaredError()
    seen.update(x)

    def error(low, high):
        return float((fake_quantize(x, affine(low, high)) - x).square().mean())

    low, high = float(x.min()), float(x.max())
    ours = error(*seen.range())
    shares = np.linspace(0.05, 1, 40)
    best = min(error(low * a, high * b) for a in shares for b in (shares if not positive else [a]))
    assert ours < error(low, high)
    assert ours < best * 1.05


def test_moving_average_is_the_weighted_mean_of_the_extremes():
    made = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, generator=made) * (i + 1) for i in range(6)]
    seen = MovingAverage(decay=0.8)
    for part in parts:
        seen.update(part)
    weights = 0.8 ** np.arange(5, -1, -1.0)
    lows, highs = ([f(part.numpy()) for part in parts] for f in (np.min, np.max))
    low, high = (np.average(ends, weights=weights) for ends in (lows, highs))
    assert seen.range() == pytest.approx((low, high))
    assert seen.range()[1] < max(highs)


def divergence(values, edge, bins=2048, levels=256):
    """Kullback-Leibler divergence of a histogram over [0, max], clipped at ``edge``, by loops."""
    counts, edges = np.histogram(values, bins, (0, values.max()))
    kept = round(edge / edges[1])
    p = counts[:kept].astype(float)
    p[np.flatnonzero(p)[-1]] += counts[kept:].sum()
    centers, scale = (np.arange(kept) + 0.5) * edges[1], edge / (levels - 1)
    owner = np.minimum(np.rint(centers / scale), levels - 1)
    q = np.zeros(kept)
    for level in range(levels):
        mine = (owner == level) & (counts[:kept] > 0)
        if mine.any():
            q[mine] = counts[:kept][mine].sum() / mine.sum()
    p, q = p / p.sum(), q / q.sum()
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_entropy_keeps_the_range_that_a_plain_search_in_numpy_keeps(tail):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator).abs() ** tail
    seen = Entropy()
    seen.update(x)
    low, high = seen.range()
    values = x.double().numpy()
    edges = values.max() * np.arange(8, 65) / 64
    costs = [divergence(values, edge) for edge in edges]
    assert low == 0
    assert divergence(values, high) <= min(costs) * 1.05 + 1e-4
    assert (high < 0.8 * values.max()) == (tail > 1)


@pytest.mark.parametrize("name", OBSERVERS)
def test_symmetric_ranges_reach_as_far_below_zero_as_above(name):
    scheme = Int8(observer=name, symmetric=True)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    seen, positive = observer(scheme, "x"), observer(scheme, "y")
    seen.update(x)
    positive.update(x.abs())
    low, high = found(scheme, seen)
    assert -low == high > 0
    assert affine(low, high).zero_point == 128
    assert found(scheme, positive)[0] >= 0
    assert balanced(-3.0, 1.0) == (-3.0, 3.0)


def test_symmetric_mse_is_the_best_of_all_symmetric_ranges():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3 + 1
    seen = MeanSquaredError(symmetric=True)
    seen.update(x)

    def error(reach):
        return float((fake_quantize(x, affine(-reach, reach)) - x).square().mean())

    reach = float(x.abs().max())
    best = min(error(reach * share) for share in np.linspace(0.05, 1, 80))
    assert error(seen.range()[1]) < best * 1.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(DataError, match="layer3"):
        observer(Int8(), "layer3").update(torch.tensor([1.0, value]))


def test_nothing_seen_is_refused_and_zeros_have_an_empty_range():
    with pytest.raises(DataError):
        MinMax().range()
    for name in OBSERVERS:
        seen = observer(Int8(observer=name), "x")
        seen.update(torch.zeros(0))
        seen.update(torch.zeros(5))
        assert seen.range() == (0.0, 0.0)
