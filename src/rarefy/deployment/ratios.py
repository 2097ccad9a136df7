"""How much longer one of two series of calls takes, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rarefy.types import Ratio


@dataclass
class Series:
    """Nanoseconds of calls, one after the other.

    Attributes:
        wall: by the clock on the wall.
        busy: that the processor spent on this process, which other programs do not lengthen.
    """

    wall: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)

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


def paired(before: Sequence[int], after: Sequence[int]) -> Ratio:
    """The latency of a second series as a share of the first's, with a 95 % interval.

    The share is the median, over all rounds, of the ratio of two calls one right after the other,
    since other programs that slow the machine down for a while slow down both; or the ratio of the
    10th percentiles where that is larger, since they interrupt long calls more often than short
    ones: a gain that is there in one of the two alone is noise.

    The interval is that of a moving-block bootstrap (Künsch 1989,
    https://doi.org/10.1214/aos/1176347265), in blocks of :data:`LENGTH` rounds.

    Args:
        before: nanoseconds of the first's calls.
        after: nanoseconds of the second's, one after each of the first's.

    Example:
        >>> paired([10] * 20, [5] * 20)
        Ratio(value=0.5, low=0.5, high=0.5)
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    count = len(first)
    length = max(min(LENGTH, count // 8), 1)
    generator = np.random.default_rng(0)
    starts = generator.integers(0, count - length + 1, (DRAWS, -(-count // length)))
    rounds = (starts[..., None] + np.arange(length)).reshape(DRAWS, -1)[:, :count]
    low, high = np.percentile(_share(first[rounds], second[rounds]), [2.5, 97.5])
    value = float(_share(first, second))
    return Ratio(value, min(float(low), value), max(float(high), value))


def _share(before: Times, after: Times) -> Times:
    """The larger of the median ratio of neighbors and the ratio of the 10th percentiles."""
    neighbors = np.median(after / np.maximum(before, 1), axis=-1)
    quick = np.percentile(after, 10, axis=-1) / np.maximum(np.percentile(before, 10, axis=-1), 1)
    larger: Times = np.maximum(neighbors, quick)
    return larger
