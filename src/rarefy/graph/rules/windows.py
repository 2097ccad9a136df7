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


def window(node: Node, place: int, size: int | None = None) -> Window | None:
    """The window of a pooling or convolution along its ``place``-th spatial dimension.

    ``size`` is given where no argument states it. None where a number follows the batch.
    """
    size = _stated(node, "kernel_size", place, 1) if size is None else size
    padding = node.argument("padding")
    if isinstance(padding, str):
        assert isinstance(size, int)
        padded: Any = {"same": (size - 1) / 2, "valid": 0}.get(padding)
    else:
        padded = _stated(node, "padding", place, 0)
    stride = _stated(node, "stride", place, size)
    numbers = (size, stride, _stated(node, "dilation", place, 1), padded)
    if any(n != int(n) if isinstance(n, int | float) else True for n in numbers):
        return None
    return Window(*map(int, numbers))


def _stated(node: Node, name: str, place: int, default: Any) -> Any:
    """A number of an argument that has one for every spatial dimension, or one for all."""
    given = node.argument(name)
    if isinstance(given, list | tuple):
        given = given[min(place, len(given) - 1)] if given else None
    return default if given is None else given
