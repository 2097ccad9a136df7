"""BatchNorm folded into the convolution or linear layer before it.

In eval mode ``bn(conv(x))`` is a convolution with the weight ``W * g`` and the bias
``(b - mean) * g + beta``, where ``g = gamma / sqrt(var + eps)`` per output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.graph.constants import FOLDABLE
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, derived, substitute
from rarefy.graph.rules.normalization import STATISTICS

BATCH_NORM = "aten.batch_norm.default"


@dataclass(frozen=True)
class Pair:
    """A layer and the BatchNorm that alone reads it.

    Attributes:
        layer: the convolution or linear call.
        norm: the BatchNorm call.
        weight: path of the layer's weight.
        bias: path of the layer's bias, existing or to be made.
    """

    layer: Node
    norm: Node
    weight: str
    bias: str


def pairs(graph: Graph) -> tuple[Pair, ...]:
    """All BatchNorms that can be folded.

    A pair is left alone where the layer's value has other readers, where the norm has no running
    statistics, and where the layer's tensors are also read by something that is not the same pair.
    """
    found = [pair for node in graph.calls if (pair := _pair(graph, node))]
    return tuple(pair for pair in found if _exclusive(graph, pair, found))


def fold_batch_norms(model: GraphModel) -> GraphModel:
    """A network without the BatchNorms that fold, with tensors of its own.

    Args:
        model: left as it is.

    Returns:
        A network that computes the same in eval mode up to rounding; the folded weights are under
        the layers' paths, the BatchNorms' tensors are gone.
    """
    parameters = {k: v.detach().clone() for k, v in named(model.named_parameters)}
    buffers = {k: v.detach().clone() for k, v in named(model.named_buffers)}
    found = pairs(model.graph)
    for pair in {pair.weight: pair for pair in found}.values():
        values = arguments(model, pair)
        parameters[pair.weight], parameters[pair.bias] = folded(*values)
        for path in (pair.weight, pair.bias):
            buffers.pop(path, None)
    graph = _without(model.graph, {pair.norm.name: pair for pair in found})
    paths = graph.tensor_paths
    trainable = {k: v.requires_grad for k, v in named(model.named_parameters)}
    return GraphModel(
        graph,
        {
            k: nn.Parameter(v, requires_grad=trainable.get(k, True))
            for k, v in parameters.items()
            if k in paths
        },
        {k: v for k, v in buffers.items() if k in paths},
    )


def named(listing: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of ``named_parameters`` or ``named_buffers``, tied ones under each path."""
    yield from listing(remove_duplicate=False)


def folded(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes layer and norm at once, in double precision.

    Args:
        weight: shape (out, ...); bias, gamma, beta, mean, var: shape (out,) or None.
        eps: of the norm.

    Returns:
        Weight and bias with the weight's dtype.
    """
    gain = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        gain = gain * gamma.double()
    shift = ((0 if bias is None else bias.double()) - mean.double()) * gain
    if beta is not None:
        shift = shift + beta.double()
    spread = gain.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight.double() * spread).to(weight.dtype), shift.to(weight.dtype)


def sibling(graph: Graph, path: str, leaf: str) -> str:
    """A path for a new tensor next to ``path``; a free one."""
    parent, _, own = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    for name in (f"{prefix}{leaf}", f"{prefix}{own}_{leaf}"):
        if name not in graph.tensor_paths:
            return name
    return f"{prefix}{own}_{leaf}_{len(graph.nodes)}"


def _pair(graph: Graph, norm: Node) -> Pair | None:
    if norm.op != BATCH_NORM:
        return None
    layer = graph.by_name[norm.args[0].name]
    if layer.op not in FOLDABLE:
        return None
    weight, bias = layer.args[1], layer.argument("bias")
    if None in (*_paths(graph, norm)[2:], _path(graph, weight)):
        return None
    if len(graph.users[layer.name]) > 1 or _is_computed(graph, (*_statistics(norm), bias)):
        return None
    if layer.op == "aten.linear.default" and len(layer.shape) != 2:
        return None
    path = _path(graph, weight)
    assert path is not None
    return Pair(layer, norm, path, _path(graph, bias) or sibling(graph, path, "bias"))


def _exclusive(graph: Graph, pair: Pair, found: list[Pair]) -> bool:
    """Whether all that read the layer's weight and bias are layers folded with the same norm."""
    same = {
        other.layer.name
        for other in found
        if (other.weight, other.bias) == (pair.weight, pair.bias)
        and _paths(graph, other.norm) == _paths(graph, pair.norm)
    }
    tensors = (pair.layer.args[1], pair.layer.argument("bias"))
    refs = [arg for arg in tensors if isinstance(arg, Ref)]
    return all(user.name in same for ref in refs for user in graph.users[ref.name])


def _statistics(norm: Node) -> tuple[Any, ...]:
    return tuple(norm.argument(name) for name in STATISTICS)


def _paths(graph: Graph, norm: Node) -> tuple[str | None, ...]:
    return tuple(_path(graph, arg) for arg in _statistics(norm))


def _path(graph: Graph, arg: Any) -> str | None:
    node = graph.by_name[arg.name] if isinstance(arg, Ref) else None
    return node.path if node is not None and node.op == "tensor" else None


def _is_computed(graph: Graph, args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, Ref) and _path(graph, arg) is None for arg in args)


def arguments(model: GraphModel, pair: Pair) -> tuple[Any, ...]:
    """What :func:`folded` needs of a pair."""

    def tensor(arg: Any) -> Tensor | None:
        path = _path(model.graph, arg)
        return None if path is None else model.tensor(path).detach()

    layer, norm = pair.layer, pair.norm
    tensors = (layer.args[1], layer.argument("bias"), *_statistics(norm))
    return (*map(tensor, tensors), norm.argument("eps"))


def _without(graph: Graph, norms: Mapping[str, Pair]) -> Graph:
    """The graph with folded layers in place of layer and norm, and their biases."""
    layers = {pair.layer.name: pair for pair in norms.values()}
    nodes: list[Node] = []
    biases: dict[str, str] = {node.path: node.name for node in graph.nodes if node.op == "tensor"}

    def follow(ref: Ref) -> Ref:
        return Ref(norms[ref.name].layer.name) if ref.name in norms else ref

    for node in graph.nodes:
        if node.name in norms:
            continue
        node = replace(
            node, args=substitute(node.args, follow), kwargs=substitute(node.options, follow)
        )
        if node.name in layers:
            pair = layers[node.name]
            if pair.bias not in biases:
                biases[pair.bias] = derived(node.name, "bias")
                mean = graph.by_name[pair.norm.argument("running_mean").name]
                name, scope = biases[pair.bias], node.scope
                nodes.append(Node(name, "tensor", (pair.bias,), value=mean.value, scope=scope))
            node = replace(node, args=(*node.args[:2], Ref(biases[pair.bias]), *node.args[3:]))
        nodes.append(node)
    read = {name for node in nodes for name in node.inputs}
    return graph.with_nodes([n for n in nodes if n.op != "tensor" or n.name in read])
