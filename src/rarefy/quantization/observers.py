"""Streaming range finders: tensors go by, a range ``(low, high)`` comes out, memory is bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rarefy.errors import DataError
from rarefy.types import Int8

BINS = 4096
"""Bins of a histogram over [-reach, reach]: 8 to 16 of them per step of an 8-bit grid."""

SHRINKAGES = 64
"""How many shorter ranges the error search tries per end and round."""


class Observer(Protocol):
    """Sees tensors, then tells the range that a quantizer should cover."""

    def update(self, x: Tensor) -> None:
        """See one tensor of any shape."""

    def range(self) -> tuple[float, float]:
        """``(low, high)`` of what was seen."""


class MinMax:
    """The whole range of the values seen.

    Args:
        where: what the tensor is called in errors.
    """

    def __init__(self, where: str = "observer") -> None:
        self.where = where
        self.low: float | None = None
        self.high: float | None = None

    def update(self, x: Tensor) -> None:
        """See one tensor of any shape.

        Raises:
            DataError: a value is NaN or infinite.
        """
        if not x.numel():
            return
        low, high = (float(v) for v in x.detach().aminmax())
        if not abs(low) + abs(high) < float("inf"):
            raise DataError(
                self.where,
                "its values on the calibration data are not finite",
                "Check the inputs and the network's weights for NaN and overflow",
            )
        self.low = low if self.low is None else min(low, self.low)
        self.high = high if self.high is None else max(high, self.high)

    def range(self) -> tuple[float, float]:
        """Smallest and largest value seen.

        Raises:
            DataError: nothing was seen.
        """
        if self.low is None or self.high is None:
            raise DataError(self.where, "no value was seen", "Give calibration data")
        return self.low, self.high


class Histogram(MinMax):
    """Counts of the values seen, in bins over a range that doubles when it must.

    Doubling merges neighboring bins exactly, so memory is constant and no count is ever moved to
    a wrong place.

    Args:
        where: what the tensor is called in errors.
        bins: number of bins, a multiple of 4.
    """

    def __init__(self, where: str = "observer", bins: int = BINS) -> None:
        super().__init__(where)
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.reach = 0.0

    def update(self, x: Tensor) -> None:
        """See one tensor of any shape.

        Raises:
            DataError: a value is NaN or infinite.
        """
        super().update(x)
        low, high = self.low or 0.0, self.high or 0.0
        needed = max(-low, high)
        if needed <= 0:
            return
        if self.reach == 0:
            self.reach = needed
        while self.reach < needed:
            self._double()
        values = x.detach().flatten().float().cpu()
        found = torch.histc(values, len(self.counts), -self.reach, self.reach)
        self.counts += found.double()

    def _double(self) -> None:
        bins = len(self.counts)
        merged = self.counts.reshape(bins // 2, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[bins // 4 : bins // 4 * 3] = merged
        self.reach *= 2

    @property
    def centers(self) -> Tensor:
        """Middle of each bin."""
        bins = len(self.counts)
        return (torch.arange(bins, dtype=torch.float64) + 0.5) * (
            2 * self.reach / bins
        ) - self.reach


class Percentile(Histogram):
    """The range that keeps a share of the values; what is cut is split between the two ends.

    A range that does not go below 0 is cut at its upper end only.

    Args:
        where: what the tensor is called in errors.
        share: of the values to keep, in (0.5, 1].
    """

    def __init__(self, where: str = "observer", share: float = 0.9999) -> None:
        super().__init__(where)
        self.share = share

    def range(self) -> tuple[float, float]:
        """The range within one bin.

        Raises:
            DataError: nothing was seen.
        """
        low, high = super().range()
        total = float(self.counts.sum())
        if total == 0 or self.share == 1:
            return low, high
        cut = (1 - self.share) * total / (2 if low < 0 < high else 1)
        width = 2 * self.reach / len(self.counts)
        if low < 0:
            first = int((self.counts.cumsum(0) <= cut).sum())
            low = min(max(low, float(self.centers[first]) - width / 2), 0.0)
        if high > 0:
            last = len(self.counts) - 1 - int((self.counts.flip(0).cumsum(0) <= cut).sum())
            high = max(min(high, float(self.centers[last]) + width / 2), 0.0)
        return low, high


class MeanSquaredError(Histogram):
    """The range whose 8-bit grid has the least squared error on the values seen.

    Sung et al. 2015, "Resiliency of Deep Neural Networks under Quantization"; searched on the
    histogram, one end after the other.

    Args:
        where: what the tensor is called in errors.
        levels: steps of the grid that will be used.
    """

    def __init__(self, where: str = "observer", levels: int = 255) -> None:
        super().__init__(where)
        self.levels = levels

    def range(self) -> tuple[float, float]:
        """The best range found, inside of the whole one.

        Raises:
            DataError: nothing was seen.
        """
        low, high = super().range()
        low, high = min(low, 0.0), max(high, 0.0)
        if self.reach == 0:
            return low, high
        shares = torch.linspace(1 / SHRINKAGES, 1, SHRINKAGES, dtype=torch.float64)
        low, high = self._best(low * shares, high * shares)
        if low < 0 < high:
            whole = MinMax.range(self)
            low, high = self._best(whole[0] * shares, torch.full_like(shares, high))
            low, high = self._best(torch.full_like(shares, low), whole[1] * shares)
        return low, high

    def _best(self, lows: Tensor, highs: Tensor) -> tuple[float, float]:
        errors = self._errors(lows, highs)
        best = len(errors) - 1 - int(errors.flip(0).argmin())
        return float(lows[best]), float(highs[best])

    def _errors(self, lows: Tensor, highs: Tensor) -> Tensor:
        """Squared error of each candidate, shape (candidates,)."""
        seen = self.counts > 0
        values, counts = self.centers[seen], self.counts[seen]
        scales = ((highs - lows) / self.levels)[:, None]
        zero_points = torch.round(-lows[:, None] / scales)
        q = (torch.round(values / scales) + zero_points).clamp(0, self.levels)
        return (((q - zero_points) * scales - values).square() * counts).sum(1)


OBSERVERS: Mapping[str, Callable[[Int8, str], Observer]] = {
    "minmax": lambda scheme, where: MinMax(where),
    "percentile": lambda scheme, where: Percentile(where, scheme.percentile),
    "mse": lambda scheme, where: MeanSquaredError(where),
}
"""Name of a range finder -> a fresh one, from the scheme and the tensor's name."""


def observer(scheme: Int8, where: str) -> Observer:
    """A fresh range finder of the kind that the scheme names."""
    return OBSERVERS[scheme.observer](scheme, where)
