"""Windows that slide along units: each unit is the middle of one, of its neighbors that remain.

Local response normalization divides a channel by what its neighbors amount to; efficient channel
attention weighs it by them. Which units are neighbors changes when some go: by the convention of
all normalizations, the window then slides over those that remain (``Flow.over_survivors``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rarefy.graph.labels import FIXED, Atoms
from rarefy.graph.program import Node


@dataclass(frozen=True)
class Window:
    """How a window slides along one dimension.

    Attributes:
        size: its entries.
        stride: how far it moves.
        dilation: how far its entries are apart.
        padding: entries that are added at each end.
    """

    size: int
    stride: int
    dilation: int
    padding: int

    def slid_over(self, atoms: Atoms) -> Atoms | None:
        """Labels of the result where every unit is the middle of a window, else None.

        A window makes ``size - 1`` entries fewer. Where these are padding, its own or fixed entries
        at both ends, each of the others keeps a place.

        Example:
            >>> Window(size=3, stride=1, dilation=1, padding=0).slid_over(np.array([0, 7, 8, 0]))
            array([7, 8])
        """
        lost = self.size - 1 - 2 * self.padding
        free = np.flatnonzero(atoms != FIXED)
        if self.stride != 1 or self.dilation != 1 or lost < 0 or not len(free):
            return None
        before, after = int(free[0]), len(atoms) - 1 - int(free[-1])
        least, most = max(lost - after, 0), min(lost, before)
        if least > most:
            return None
        first = min(max((lost + 1) // 2, least), most)
        return atoms[first : len(atoms) - (lost - first)]


def window(node: Node, place: int, size: Any = None) -> Window | None:
    """The window of a pooling or convolution along its ``place``-th spatial dimension.

    ``size`` is given where no argument states it. None where a number follows the batch, or where
    the padding is not the same at both ends.
    """
    if size is None:
        size = _stated(node, "kernel_size", place, 1)
    stride = _stated(node, "stride", place, size)
    dilation = _stated(node, "dilation", place, 1)
    padding = node.argument("padding")
    if padding == "same":
        padding = (size - 1) // 2 if size % 2 else None
    else:
        padding = 0 if padding == "valid" else _stated(node, "padding", place, 0)
    if any(not isinstance(n, int) for n in (size, stride, dilation, padding)):
        return None
    return Window(size, stride, dilation, padding)


def _stated(node: Node, name: str, place: int, default: Any) -> Any:
    """A number of an argument that has one for every spatial dimension, or one for all."""
    given = node.argument(name)
    if isinstance(given, list | tuple):
        given = given[min(place, len(given) - 1)] if given else None
    return default if given is None else given
