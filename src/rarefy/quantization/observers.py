"""Streaming range finders: tensors go by, a range ``(low, high)`` comes out, memory is bounded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rarefy.errors import DataError
from rarefy.schemes import Int8

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


class MovingAverage(MinMax):
    """The mean of the batches' extremes, where each batch counts ``1 / decay`` of the one before.

    Unlike an average that starts at the first batch, it is one of all batches seen however few
    there are: the weights are divided by their sum (as in Kingma and Ba 2015, section 3).

    Args:
        where: what the tensor is called in errors.
        decay: weight of a batch relative to the one after it, in (0, 1).
    """

    def __init__(self, where: str = "observer", decay: float = 0.9) -> None:
        super().__init__(where)
        self.decay = decay
        self.weight = 0.0
        self.sums = (0.0, 0.0)

    def update(self, x: Tensor) -> None:
        """See one tensor of any shape.

        Raises:
            DataError: a value is NaN or infinite.
        """
        if not x.numel():
            return
        own = MinMax(self.where)
        own.update(x)
        super().update(x)
        self.weight = self.decay * self.weight + 1
        low, high = (self.decay * a + b for a, b in zip(self.sums, own.range(), strict=True))
        self.sums = (low, high)

    def range(self) -> tuple[float, float]:
        """The averages, inside of the whole range.

        Raises:
            DataError: nothing was seen.
        """
        low, high = super().range()
        first, last = (total / max(self.weight, 1.0) for total in self.sums)
        return min(max(low, first), high), max(min(high, last), low)


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


class Searched(Histogram):
    """The range of least cost on the histogram, searched one end after the other.

    Args:
        where: what the tensor is called in errors.
        levels: steps of the grid that will be used.
        symmetric: whether only ranges that reach as far below 0 as above are tried, where the
            values go below 0.
    """

    def __init__(
        self, where: str = "observer", levels: int = 255, *, symmetric: bool = False
    ) -> None:
        super().__init__(where)
        self.levels = levels
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        """The best range found, inside of the whole one.

        Raises:
            DataError: nothing was seen.
        """
        low, high = super().range()
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            low, high = balanced(low, high)
        if self.reach == 0:
            return low, high
        whole = low, high
        shares = torch.linspace(1 / SHRINKAGES, 1, SHRINKAGES, dtype=torch.float64)
        low, high = self._best(low * shares, high * shares)
        if low < 0 < high and not self.symmetric:
            low, high = self._best(whole[0] * shares, torch.full_like(shares, high))
            low, high = self._best(torch.full_like(shares, low), whole[1] * shares)
        return low, high

    def _best(self, lows: Tensor, highs: Tensor) -> tuple[float, float]:
        costs = self._costs(lows, highs)
        best = len(costs) - 1 - int(costs.flip(0).argmin())
        return float(lows[best]), float(highs[best])

    @abstractmethod
    def _costs(self, lows: Tensor, highs: Tensor) -> Tensor:
        """Cost of each candidate, shape (candidates,)."""

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Middles and counts of the bins that are not empty."""
        seen = self.counts > 0
        return self.centers[seen], self.counts[seen]

    def _grids(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each candidate, shape (candidates, 1)."""
        scales = ((highs - lows) / self.levels)[:, None]
        return scales, torch.round(-lows[:, None] / scales)


class MeanSquaredError(Searched):
    """The range whose 8-bit grid has the least squared error on the values seen.

    Sung et al. 2015, "Resiliency of Deep Neural Networks under Quantization".
    """

    def _costs(self, lows: Tensor, highs: Tensor) -> Tensor:
        values, counts = self._seen()
        scales, zero_points = self._grids(lows, highs)
        q = (torch.round(values / scales) + zero_points).clamp(0, self.levels)
        return (((q - zero_points) * scales - values).square() * counts).sum(1)


class Entropy(Searched):
    """The range whose 8-bit grid keeps most of the distribution of the values seen.

    The cost is the Kullback-Leibler divergence from the histogram, with what is outside of the
    range counted at its ends, to the one in which the values of each integer are spread evenly over
    the bins that they came from. Ranges of fewer bins than integers say nothing and are not tried.
    Migacz 2017, "8-bit Inference with TensorRT".
    """

    def _costs(self, lows: Tensor, highs: Tensor) -> Tensor:
        values, counts = self._seen()
        scales, zero_points = self._grids(lows, highs)
        integers = (torch.round(values / scales) + zero_points).clamp(0, self.levels).long()
        half = self.reach / len(self.counts)
        found = torch.full_like(lows, float("inf"))
        for i, (low, high) in enumerate(zip(lows.tolist(), highs.tolist(), strict=True)):
            inside = (values + half > low) & (values - half < high)
            if high - low >= 2 * half * self.levels and inside.any():
                found[i] = _divergence(counts, integers[i], inside, self.levels + 1)
        return found


def _divergence(counts: Tensor, integers: Tensor, inside: Tensor, levels: int) -> Tensor:
    """Kullback-Leibler divergence of a histogram from its quantized self.

    Args:
        counts: of the bins, all above 0, shape (bins,).
        integers: which integer each bin becomes.
        inside: whether a bin is in the range.
        levels: number of integers.
    """
    first, last = (int(end) for end in inside.nonzero().flatten()[[0, -1]])
    kept, q = counts[first : last + 1], integers[first : last + 1]
    p = kept.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    held = torch.zeros(levels, dtype=kept.dtype).index_add(0, q, kept)
    bins = torch.zeros(levels, dtype=kept.dtype).index_add(0, q, torch.ones_like(kept))
    spread = (held / bins.clamp_min(1))[q]
    p, spread = p / p.sum(), spread / spread.sum()
    return (p * (p / spread).log()).sum()


def balanced(low: float, high: float) -> tuple[float, float]:
    """The range that reaches as far below 0 as above; one that does not go below 0 as it is.

    Example:
        >>> balanced(-1.0, 3.0), balanced(0.0, 3.0)
        ((-3.0, 3.0), (0.0, 3.0))
    """
    return (-max(-low, high), max(-low, high)) if low < 0 else (low, high)


OBSERVERS: Mapping[str, Callable[[Int8, str], Observer]] = {
    "minmax": lambda scheme, where: MinMax(where),
    "average": lambda scheme, where: MovingAverage(where),
    "percentile": lambda scheme, where: Percentile(where, scheme.percentile),
    "mse": lambda scheme, where: MeanSquaredError(where, symmetric=scheme.symmetric),
    "entropy": lambda scheme, where: Entropy(where, symmetric=scheme.symmetric),
}
"""Name of a range finder -> a fresh one, from the scheme and the tensor's name."""


def observer(scheme: Int8, where: str) -> Observer:
    """A fresh range finder of the kind that the scheme names."""
    return OBSERVERS[scheme.observer](scheme, where)


def found(scheme: Int8, seen: Observer) -> tuple[float, float]:
    """The range that a finder found, as the scheme wants it.

    Raises:
        DataError: nothing was seen.
    """
    low, high = seen.range()
    return balanced(low, high) if scheme.symmetric else (low, high)
