"""Codebooks, against sums of squares over all ways to cut a sorted list."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.quantization.palette import kmeans, palette


def cost(values: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((values[:, None] - centroids).square().amin(1).sum())


def best(values: torch.Tensor, number: int) -> float:
    """The least cost of all cuts into intervals."""
    ordered = values.sort().values
    found = float("inf")
    for cuts in itertools.combinations(range(1, len(ordered)), number - 1):
        parts = torch.tensor_split(ordered, list(cuts))
        found = min(found, sum(float((p - p.mean()).square().sum()) for p in parts))
    return found


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_no_step_of_lloyds_improves_it_and_the_best_is_near(seed: int, number: int) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centroids = kmeans(values, number)
    own = (values[:, None] - centroids).abs().argmin(1)
    for index in own.unique().tolist():
        assert float(centroids[index]) == pytest.approx(float(values[own == index].mean()))
    even = torch.linspace(float(values.min()), float(values.max()), number, dtype=values.dtype)
    found = cost(values, centroids)
    assert best(values, number) - 1e-9 <= found <= cost(values, even) + 1e-9


def test_separate_clusters_are_found_exactly() -> None:
    values = torch.tensor([0.0, 0.1, 5.0, 5.2, 9.0], dtype=torch.float64)
    assert kmeans(values, 3).tolist() == pytest.approx([0.05, 5.1, 9.0])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zeros_stay_and_no_other_weight_joins_them(size: int) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = palette(weight.masked_fill(gone, 0.0), size)
    assert torch.equal(found == 0, gone)
    assert len(found.unique()) <= size


def test_few_values_stay_as_they_are() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
    assert torch.equal(palette(weight, 4), weight)
    assert torch.equal(palette(torch.zeros(3), 2), torch.zeros(3))
