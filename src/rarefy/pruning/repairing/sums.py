"""Layers whose results are added to something else: what they could make up for there.

In ``x + s * layer(...)`` a layer can make up for an error of ``x`` too, as far as its inputs know
of it: its target is its own result of the original, plus what ``x`` lacks over ``s``. He et al.
2017 (https://arxiv.org/abs/1707.06168) do so for residual networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.graph.program import Graph, Node, Ref

FAINT = 1e-2
"""Outputs scaled by less than this share of the largest scale make up for nothing."""


_KEEPING = frozenset("dropout dropout_ contiguous fake_quantize_per_tensor_affine".split())
"""Operators that hand on what they are given, or nearly so."""


@dataclass(frozen=True)
class Sum:
    """Where a layer's result is added.

    Attributes:
        other: name of what it is added to.
        scales: calls on the way there, all of which scale and shift single channels.
    """

    other: str
    scales: tuple[Node, ...]


def summed(graph: Graph, layer: Node) -> Sum | None:
    """Where a layer's result is added, if that is all that becomes of it."""
    node, scales = layer, list[Node]()
    while len(graph.users[node.name]) == 1:
        (user,) = graph.users[node.name]
        if user.kind.removesuffix("_") == "add":
            others = [arg for arg in user.args[:2] if not _is(arg, node)]
            plain = user.argument("alpha") in (None, 1) and len(others) == 1
            return Sum(others[0].name, tuple(scales)) if plain and _is_ref(others[0]) else None
        if user.kind in ("batch_norm", "mul"):
            scales.append(user)
        elif user.kind not in _KEEPING:
            return None
        node = user
    return None


def _is_ref(arg: Any) -> bool:
    return isinstance(arg, Ref)


def _is(arg: Any, node: Node) -> bool:
    return isinstance(arg, Ref) and arg.name == node.name


def scale(
    graph: Graph, found: Sum, size: int, dim: int, values: Mapping[str, Any]
) -> Tensor | None:
    """By what each channel is scaled on its way, shape (size,); None where that is not known.

    Args:
        graph: the graph.
        found: the way.
        size: number of channels.
        dim: their dimension, counted from the end where negative.
        values: tensors of the graph by name.
    """
    total = torch.ones(size, dtype=torch.float64)
    for node in found.scales:
        own = _of(graph, node, dim, values)
        if own is None or own.numel() not in (1, size):
            return None
        total = total * own.detach().cpu().double().flatten()
    return total


def _of(graph: Graph, node: Node, dim: int, values: Mapping[str, Any]) -> Tensor | None:
    if node.kind == "batch_norm":
        variance, weight = node.argument("running_var"), node.argument("weight")
        if not isinstance(variance, Ref):
            return None
        deviation: Tensor = (values[variance.name] + node.argument("eps")).sqrt()
        return (values[weight.name] if isinstance(weight, Ref) else 1.0) / deviation
    factors = [
        a for a in node.args[:2] if isinstance(a, Ref) and graph.by_name[a.name].op == "tensor"
    ]
    if len(factors) != 1:
        return None
    factor: Tensor = values[factors[0].name]
    along = [d - factor.ndim for d, n in enumerate(factor.shape) if n > 1]
    rank = len(node.shape)
    return factor if along in ([], [dim if dim < 0 else dim - rank]) else None


def owed(
    graphs: tuple[Graph, Graph],
    layers: tuple[Node, Node],
    values: tuple[Mapping[str, Any], Mapping[str, Any]],
    survivors: Tensor,
    dim: int,
) -> Tensor | None:
    """What a layer of the second network should add to its result to make up for its sum.

    Args:
        graphs: of the original and of the smaller network.
        layers: the same layer in both.
        values: what both have computed so far.
        survivors: outputs of the original's layer that the smaller one has.
        dim: dimension of the outputs.

    Returns:
        A tensor of the shape of the smaller layer's result; None where there is nothing to make up
        for, or where it is not computed yet.
    """
    one, two = (summed(graph, layer) for graph, layer in zip(graphs, layers, strict=True))
    if one is None or two is None or one.other not in values[0] or two.other not in values[1]:
        return None
    old, new = values[0][one.other], values[1][two.other]
    if not isinstance(old, Tensor) or old.shape != values[0][layers[0].name].shape:
        return None
    if old.shape[dim] != len(survivors):
        old = old.index_select(dim, survivors)
    if not isinstance(new, Tensor) or old.shape != new.shape or torch.equal(old, new):
        return None
    scales = scale(graphs[1], two, len(survivors), dim, values[1])
    if scales is None or not bool(scales.any()):
        return None
    faint = scales.abs() < FAINT * scales.abs().max()
    shape = [1] * new.ndim
    shape[dim] = -1
    inverse = torch.where(faint, 0.0, 1 / scales).view(shape).to(new.device, new.dtype)
    return (old - new) * inverse
