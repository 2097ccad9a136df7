"""What a forward needs of the sizes of its tensors: equations, as plain data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Number:
    """A number written in the code, or one whose origin was lost."""

    value: int


@dataclass(frozen=True)
class Attribute:
    """A whole number, ``index``-th of a tuple or list, that a module holds at ``path``."""

    path: str
    name: str
    index: int | None
    value: int


@dataclass(frozen=True)
class Extent:
    """The size of a tensor along a dimension: the ``part``-th result of a node of the graph.

    With the name of an argument in place of a dimension, what that argument of the node counts
    (the groups of a convolution).
    """

    node: str
    part: int | None
    dim: int | str


@dataclass(frozen=True)
class Apply:
    """An operation of whole-number arithmetic."""

    op: str
    left: Expression
    right: Expression


Expression: TypeAlias = "Number | Attribute | Extent | Apply"


@dataclass(frozen=True)
class Equation:
    """Two expressions that the forward needs to be equal.

    Attributes:
        left, right: the two.
        source: the line of code that needs it, where known.
        yields: whether it is better to leave units in place than to break it: nothing would fail,
            but the network would compute something else (a softmax scaled by another number).
    """

    left: Expression
    right: Expression
    source: str = ""
    yields: bool = False

    @property
    def literal(self) -> bool:
        """Whether one side is written in the code as a plain number."""
        return any(all(isinstance(x, Number) for x in leaves(s)) for s in (self.left, self.right))


OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    name: getattr(operator, name) for name in "add sub mul floordiv mod".split()
} | {"ceildiv": lambda a, b: -(-a // b)}
"""Whole-number arithmetic that is followed."""

TESTS: Mapping[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in "eq lt le gt ge".split()
}
"""Comparisons, which decide what a forward does: they have to come out as they did."""


def leaves(expression: Expression) -> Iterator[Number | Attribute | Extent]:
    """What an expression is computed from."""
    if isinstance(expression, Apply):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    else:
        yield expression
