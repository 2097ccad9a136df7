"""Changes of a network, of which the first so many are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rarefy.graph.model import GraphModel
from rarefy.pruning.running.products import Entries
from rarefy.pruning.running.solvable import picked, put


class Changes:
    """What was changed in a network, layer by layer, and what stood there before.

    Args:
        changed: the network after all changes; its tensors are changed by :meth:`keep`.
        plain: the same network before.
        made: the entries that each change wrote, in order.
    """

    def __init__(
        self, changed: GraphModel, plain: GraphModel, made: Sequence[Sequence[Entries]]
    ) -> None:
        self._model, self._made = changed, made
        self._before = [[_values(plain, own) for own in entries] for entries in made]
        self._after = [[_values(changed, own) for own in entries] for entries in made]

    def keep(self, count: int) -> None:
        """Write the first so many, and what stood in the place of the others before."""
        values = [*self._after[:count], *self._before[count:]]
        for entries, own in zip(self._made, values, strict=True):
            for entry, value in zip(entries, own, strict=True):
                put(self._model.tensor(entry.path), entry.index, value)


def _values(model: GraphModel, own: Entries) -> Tensor:
    return picked(model.tensor(own.path), own.index)


def first_that_hold(count: int, holds: Callable[[int], bool]) -> int:
    """How many of ``count`` may be kept, where all of them may not and none of them may.

    The search goes back from the last in steps that double, then closes in between: about
    ``2 log2(count)`` trials.

    Args:
        count: how many there are.
        holds: whether so many may be kept.

    Returns:
        A number that holds and whose successor does not, or 0.

    Example:
        >>> first_that_hold(100, lambda kept: kept <= 37)
        37
    """
    most, step, least = count, 1, 0
    while most - step > 0:
        if holds(most - step):
            least = most - step
            break
        most, step = most - step, 2 * step
    while most - least > 1:
        middle = (most + least) // 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return least
