"""Weights of few distinct values: a codebook for each tensor, found by k-means.

Han et al. 2016, "Deep Compression", https://arxiv.org/abs/1510.00149, section 3: centroids start
evenly spaced over the range, and zeros of pruning are no part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 200
"""Most rounds of Lloyd's algorithm."""


def palette(weight: Tensor, size: int) -> Tensor:
    """A weight with at most ``size`` distinct values, near its own in the squared error.

    Zeros stay zero, and are one of the values where there are any.

    Args:
        weight: any shape, finite.
        size: number of values.

    Returns:
        Shape and dtype of ``weight``.

    Example:
        >>> palette(torch.tensor([0.0, 0.9, 1.1, -2.0]), 3).tolist()
        [0.0, 1.0, 1.0, -2.0]
    """
    flat = weight.detach().reshape(-1).cpu()
    present = flat != 0
    number = size - int(not bool(present.all()))
    found = torch.zeros_like(flat)
    if bool(present.any()) and number:
        values = flat[present]
        centroids = kmeans(values.double(), number).to(weight.dtype)
        found[present] = centroids[_nearest(values.double(), centroids.double())]
    return found.reshape(weight.shape).to(weight.device)


def kmeans(values: Tensor, number: int) -> Tensor:
    """Centroids of numbers, sorted, shape (at most ``number``,): Lloyd's algorithm.

    On sorted numbers a cluster is an interval, so that a round takes differences of prefix sums.

    Args:
        values: shape (n,), double precision.
        number: of centroids.
    """
    ordered = values.sort().values
    distinct: Tensor = ordered.unique_consecutive()  # type: ignore[no-untyped-call]
    if len(distinct) <= number:
        return distinct
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), number, dtype=values.dtype)
    for _ in range(STEPS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        inner = torch.searchsorted(ordered, middles)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])
        counts = ends.diff()
        means = sums[ends].diff() / counts.clamp_min(1)
        moved = torch.where(counts > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid nearest to each value."""
    return torch.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)
