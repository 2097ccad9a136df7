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

    def add(self, x: Tensor, counted: Tensor | None = None) -> None:
        """Show one part; every part has the same channels.

        Args:
            x: the values.
            counted: which of the rows, flattened over all other dimensions, count; all by default.
        """
        wide = (x if x.dtype is torch.float64 else x.float()).movedim(self._dim, -1).flatten(0, -2)
        if counted is not None:
            wide = wide[counted.to(wide.device)]
        variance, mean = wide.double().new_zeros(2, wide.shape[1])
        if len(wide):
            variance, mean = torch.var_mean(wide, 0, correction=0)
        self._counts.append(len(wide))
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
