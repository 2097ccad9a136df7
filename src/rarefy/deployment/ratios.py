"""How much longer one of two series of calls takes, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from rarefy.types import Ratio


@dataclass
class Series:
    """Nanoseconds of calls, one after the other.

    Attributes:
        wall: by the clock on the wall.
        busy: that the processor spent on this process, which other programs do not lengthen.
        starts: the first call of each replicate: a session of its own, opened anew.
    """

    wall: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, replicate: Series) -> None:
        """Append the calls of a further replicate."""
        self.starts.append(len(self.wall))
        self.wall += replicate.wall
        self.busy += replicate.busy

    def undisturbed(self, threads: int) -> list[int]:
        """What the calls take where nothing else runs.

        With one thread that is the processor's time, unless the system knows it only roughly.
        With several it is not: they work at the same time.
        """
        return self.busy if threads == 1 and FINE else self.wall


FINE = time.get_clock_info("process_time").resolution <= 1e-6
"""Whether the system tells the processor's time by the microsecond."""

LENGTH = 10
"""Neighboring rounds that are drawn together: what disturbs one call disturbs the next."""

DRAWS = 200
"""Resampled series."""

Times = NDArray[np.float64]


def paired(
    before: Sequence[int], after: Sequence[int], starts: Sequence[int] = (0,), orders: int = 1
) -> Ratio:
    """The latency of a second series as a share of the first's, with a 95 % interval.

    The share is the median, over the rounds of a replicate, of the ratio of two calls one right
    after the other, since other programs that slow the machine down for a while slow down both; or
    the ratio of the 10th percentiles where that is larger, since they interrupt long calls more
    often than short ones: a gain that is there in one of the two alone is noise. Of several
    replicates either is the geometric mean.

    Two sessions of one file differ by where they are in memory, and which is opened and called
    first, by more than their rounds do (Mytkowicz et al. 2009,
    https://doi.org/10.1145/1508244.1508275). So the interval is Student's of the replicates'
    logarithms (Kalibera and Jones 2013, https://doi.org/10.1145/2464157.2464160), each order a
    stratum. A single replicate knows nothing of that: its interval is a moving-block bootstrap of
    its rounds (Künsch 1989, https://doi.org/10.1214/aos/1176347265), in blocks of :data:`LENGTH`.

    Args:
        before: nanoseconds of the first's calls.
        after: nanoseconds of the second's, one after each of the first's.
        starts: the first round of each replicate.
        orders: orders of opening and calling that the replicates take in turn.

    Example:
        >>> paired([10] * 20, [5] * 20)
        Ratio(value=0.5, low=0.5, high=0.5)
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if len(starts) < 2:
        return _of_rounds(first, second)
    parts = [np.split(times, starts[1:]) for times in (first, second)]
    logs = np.log([_shares(*both) for both in zip(*parts, strict=True)])
    if len(logs) <= orders:
        orders = 1
    strata = [logs[order::orders] for order in range(orders)]
    middle = np.mean([stratum.mean(0) for stratum in strata], 0)
    squares = sum(((stratum - stratum.mean(0)) ** 2).sum(0) for stratum in strata)
    freedom = len(logs) - orders
    weight = sum(1 / len(stratum) for stratum in strata) / orders**2
    half = stdtrit(freedom, 0.975) * np.sqrt(squares / freedom * weight)
    low, value, high = (float(np.exp(end).max()) for end in (middle - half, middle, middle + half))
    return Ratio(value, low, high)


def _of_rounds(first: Times, second: Times) -> Ratio:
    """The share of a single replicate."""
    count = len(first)
    length = max(min(LENGTH, count // 8), 1)
    generator = np.random.default_rng(0)
    starts = generator.integers(0, count - length + 1, (DRAWS, -(-count // length)))
    rounds = (starts[..., None] + np.arange(length)).reshape(DRAWS, -1)[:, :count]
    drawn = _shares(first[rounds], second[rounds]).max(0)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = float(_shares(first, second).max())
    return Ratio(value, min(float(low), value), max(float(high), value))


def _shares(before: Times, after: Times) -> Times:
    """The median ratio of neighbors, and the ratio of the 10th percentiles; shape (2, ...)."""
    before, after = np.maximum(before, 1), np.maximum(after, 1)
    neighbors = np.median(after / before, axis=-1)
    quick = np.percentile(after, 10, axis=-1) / np.percentile(before, 10, axis=-1)
    return np.stack([neighbors, quick])
