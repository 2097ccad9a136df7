"""Seeds that depend on where they are used, and on nothing else: no order, no process, no state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def seeds(*coordinates: int | Iterable[int] | npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """64 bits for every combination of coordinates, which broadcast like arrays.

    Every coordinate is folded in by one step of SplitMix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators").

    Example:
        >>> seeds(0, 1, range(3)).shape
        (3,)
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for coordinate in coordinates:
            part = np.asarray(coordinate).astype(np.int64).astype(np.uint64)
            state = (state ^ part) + _GAMMA
            for shift, factor in zip((30, 27), _FACTORS, strict=True):
                state = (state ^ (state >> np.uint64(shift))) * factor
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniforms(*coordinates: int | Iterable[int] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers in [0, 1) for every combination of coordinates."""
    return (seeds(*coordinates) >> np.uint64(11)) * 2.0**-53
