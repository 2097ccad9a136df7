"""Means and variances of channels, put together part by part."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Of all examples that were shown, per channel.

    Args:
        dim: dimension of the channels.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._counts: list[int] = []
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Show one part; every part has the same channels."""
        others = [d for d in range(x.ndim) if d != self._dim % x.ndim]
        wide = x if x.dtype is torch.float64 else x.float()
        variance, mean = torch.var_mean(wide, others, correction=0)
        self._counts.append(x.numel() // max(x.shape[self._dim], 1))
        self._means.append(mean.double())
        self._variances.append(variance.double())

    @property
    def mean(self) -> Tensor:
        """Shape (channels,), double precision."""
        return self._averaged(torch.stack(self._means))

    @property
    def variance(self) -> Tensor:
        """Shape (channels,), double precision, not corrected."""
        apart = (torch.stack(self._means) - self.mean).square()
        return self._averaged(torch.stack(self._variances) + apart)

    def _averaged(self, parts: Tensor) -> Tensor:
        shares = parts.new_tensor(self._counts) / max(sum(self._counts), 1)
        return shares @ parts
