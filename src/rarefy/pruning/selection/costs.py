"""Latencies of layers at several widths, and what follows for the widths in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rarefy.graph.layer import Layer


@dataclass(frozen=True)
class Surface:
    """Milliseconds of one layer by its widths.

    Attributes:
        inner: inner widths that were measured, ascending.
        outer: outer widths that were measured, ascending.
        ms: milliseconds, one row per inner width.
        times: repetitions that were measured.
    """

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    times: int

    def __call__(self, layer: Layer) -> float:
        """Milliseconds at the layer's widths, by interpolation; half of the least at no width.

        Time is in proportion to the repetitions.

        Example:
            >>> Surface((8, 16), (8, 16), ((1.0, 2.0), (2.0, 4.0)), 1)(Layer("matmul", 12, 16))
            3.0
        """
        inner, outer = (0, *self.inner), (0, *self.outer)
        table = np.zeros((len(inner), len(outer)))
        table[1:, 1:] = self.ms
        table[0] = table[1] / 2  # a call of no width takes time, too
        table[:, 0] = table[:, 1] / 2
        row = [float(np.interp(layer.outer, outer, line)) for line in table]
        return float(np.interp(layer.inner, inner, row)) * layer.times / max(self.times, 1)


@dataclass(frozen=True)
class Costs:
    """Latency of a network, layer by layer.

    Attributes:
        surfaces: of the calls that are layers, by the name of their node.
        rest: milliseconds of all else, in proportion to the values that it makes.
    """

    surfaces: Mapping[str, Surface]
    rest: float
