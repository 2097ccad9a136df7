"""Where masked units give zero along one dimension, though not along all others.

``Flow.vanishing`` speaks of a whole value: zero at every masked entry, whichever dimension it is
masked along. Less is enough to sum over one dimension: in ``(x[:, None] - centers) ** 2`` masked
features give zero, masked centers do not. This follows a value back through a few pointwise
operators and views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from rarefy.graph.flow import Flow
from rarefy.graph.program import Node, Ref

Along: TypeAlias = Callable[[Flow, Node, int, int], bool]
"""(flow, node, dimension of its value, steps that may be followed) -> whether it is zero there."""

STEPS = 5
"""How far a value is followed: loops over time make chains as long as the time."""


def zero_along(flow: Flow, arg: Any, dim: int, steps: int = STEPS) -> bool:
    """Whether the argument is zero at the entries that are masked along one dimension.

    A value that is broadcast along the dimension has no entry to be masked there.
    """
    if not isinstance(arg, Ref):
        return bool(arg == 0)
    labels = flow.of(arg)
    if not -len(labels) <= dim < len(labels) or labels[dim] is None:
        return False
    if flow.zero(arg):
        return True
    node = flow.graph.by_name[arg.name]
    rule = ALONG.get(node.kind)
    if rule is None or not steps or flow.in_place:
        return False  # what is written in place may not be what it was computed to be
    return rule(flow, node, dim % len(labels), steps - 1)


def _sides(flow: Flow, node: Node, dim: int, steps: int) -> Iterator[bool]:
    """Whether each of two operands, aligned from the last dimension, is zero there."""
    for arg in node.args[:2]:
        at = dim - len(flow.of(Ref(node.name))) + len(flow.of(arg))
        yield at >= 0 and zero_along(flow, arg, at, steps) if isinstance(arg, Ref) else arg == 0


def _sum(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    return all(_sides(flow, node, dim, steps))


def _product(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    return any(_sides(flow, node, dim, steps))


def _first(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    return next(_sides(flow, node, dim, steps))


def _power(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    exponent = node.args[1]
    positive = not isinstance(exponent, Ref) and exponent > 0
    return positive and _first(flow, node, dim, steps)


def _with_new_dim(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    new = node.args[1] % len(node.shape)
    return zero_along(flow, node.args[0], dim - (dim > new), steps)


def _without_dim(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    lost = node.args[1] % (len(node.shape) + 1)
    return zero_along(flow, node.args[0], dim + (dim >= lost), steps)


def _swapped(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    a, b = (d % len(node.shape) for d in node.args[1:3])
    return zero_along(flow, node.args[0], {a: b, b: a}.get(dim, dim), steps)


def _permuted(flow: Flow, node: Node, dim: int, steps: int) -> bool:
    return zero_along(flow, node.args[0], node.args[1][dim], steps)


ALONG: Mapping[str, Along] = {
    **dict.fromkeys("add sub subtract rsub maximum minimum".split(), _sum),
    **dict.fromkeys("mul multiply".split(), _product),
    **dict.fromkeys(
        "div divide true_divide abs absolute neg negative relu gelu silu tanh sin square sqrt "
        "clone contiguous to dropout slice expand".split(),
        _first,
    ),
    "pow": _power,
    "unsqueeze": _with_new_dim,
    "select": _without_dim,
    "transpose": _swapped,
    "permute": _permuted,
}
"""Operator -> whether its value is zero along a dimension, given where its inputs are."""
