"""What a runtime sees of a layer: its kind, its widths, all else that its latency depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rarefy.graph.equations import EQUATIONS, equation, sizes
from rarefy.graph.program import Graph, Node, Ref

Shapes = Callable[[str], tuple[int, ...]]
"""Node name -> the shape of its value."""


@dataclass(frozen=True)
class Layer:
    """A convolution, a matrix product or an attention.

    Attributes:
        kind: ``"conv"``, ``"matmul"`` (the second factor is a parameter), ``"product"`` (both are
            computed) or ``"attention"``.
        inner: what is summed over: input channels of a convolution's group, inner size of a
            product, size of the queries of one head.
        outer: what is made: output channels, columns, size of the values of one head.
        groups: of a convolution.
        times: independent repetitions: the batch and the rows of a product, the batch and the heads
            of attention, the batch of a convolution.
        form: what pruning does not change: (extent, kernel, stride, padding before, padding after,
            dilation) of a convolution, (queries, keys) of attention.
    """

    kind: str
    inner: int
    outer: int
    groups: int = 1
    times: int = 1
    form: tuple[tuple[int, ...], ...] = ()


def layer(graph: Graph, node: Node, shape: Shapes) -> Layer | None:
    """The layer that a call is; None for other operators.

    Args:
        graph: the graph that the node is part of.
        node: the call.
        shape: shapes of the values, those of the capture or of a smaller network.
    """
    kind = node.kind.removesuffix("_")
    if kind in EQUATIONS:
        return _product(graph, node, shape)
    make = LAYERS.get(kind)
    return make(node, shape) if make else None


def _convolution(node: Node, shape: Shapes) -> Layer | None:
    x, weight = shape(node.args[0].name), shape(node.args[1].name)
    rank = len(weight) - 2
    if node.argument("transposed") or len(x) != rank + 2:
        return None
    kernel, (stride, dilation) = (
        weight[2:],
        (_each(node.argument(name), rank) for name in ("stride", "dilation")),
    )
    before, after = _padding(node.argument("padding"), kernel, dilation)
    form = (x[2:], kernel, stride, before, after, dilation)
    return Layer("conv", weight[1], weight[0], x[1] // max(weight[1], 1), x[0], form)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """A number for every dimension; one stands for all."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return tuple(map(int, given)) * (rank if len(given) == 1 else 1)


def _padding(
    value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows before and after each dimension."""
    if value == "valid":
        value = 0
    if value == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    both = _each(value, len(kernel))
    return both, both


def _product(graph: Graph, node: Node, shape: Shapes) -> Layer | None:
    """Two factors with one letter summed over; letters of both and of the result repeat it."""
    found = equation(node, lambda ref: len(shape(ref.name)))
    if found is None or len(found.operands) != 2:
        return None

    def of(ref: Ref) -> tuple[int, ...]:
        return shape(ref.name)

    size = sizes(found, of)
    (first, left), (second, right) = (
        (ref, {x for x, n in zip(letters, of(ref), strict=True) if n == size[x]})
        for ref, letters in found.operands
    )
    result = set(found.result)
    summed = (left & right) - result
    if not summed:
        return None
    is_weight = graph.by_name[second.name].op == "tensor"
    if graph.by_name[first.name].op == "tensor" and not is_weight:
        left, right, is_weight = right, left, True
    inner = prod(size[x] for x in summed)
    outer = prod(size[x] for x in (right & result) - left)
    rows = prod(size[x] for x in (left & result) - right)
    repeated = prod(size[x] for x in left & right & result)
    if is_weight and repeated == 1:
        return Layer("matmul", inner, outer, 1, rows)
    return Layer("product", inner, outer, 1, repeated, ((rows,),))


def _attention(node: Node, shape: Shapes) -> Layer:
    q, k, v = (shape(a.name) for a in node.args[:3])
    return Layer("attention", q[-1], v[-1], 1, prod(q[:-2]), ((q[-2], k[-2]),))


LAYERS: Mapping[str, Callable[[Node, Shapes], Layer | None]] = {
    **dict.fromkeys(
        "conv1d conv2d conv3d convolution _convolution _convolution_mode".split(), _convolution
    ),
    "scaled_dot_product_attention": _attention,
}
"""ATen operator -> the layer that a call of it is; matrix products have equations instead."""
