"""A network with the quantizers that a placement says, its weights on their grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, Spec, derived, substitute
from rarefy.quantization.affine import (
    Affine,
    along,
    channel_scales,
    dequantize,
    quantize_weight,
)
from rarefy.quantization.fold import named, sibling
from rarefy.quantization.placement import Placement

PER_TENSOR = "aten.fake_quantize_per_tensor_affine.default"
PER_CHANNEL = "aten.fake_quantize_per_channel_affine.default"

BIAS_LIMIT = 2**30
"""Biases are stored as int32 in units of input scale times weight scale; half of it is room."""

Quantizers = Mapping[str, Sequence[Node]]
"""Name of a node -> the calls that quantize its value; the last gives the quantized value."""

QUANTIZED = "quantized"
"""Suffix of the names of these last calls."""


def is_quantized(model: nn.Module) -> bool:
    """Whether a network holds quantizers of activations or weights."""
    return isinstance(model, GraphModel) and model.is_quantized


def check_unquantized(model: nn.Module) -> None:
    """Pass where a network holds no quantizers yet.

    Raises:
        InputError: it does.
    """
    if is_quantized(model):
        raise InputError(
            "quantize(model)", "the model is quantized already", "Give the float model"
        )


def check_finite(path: str, tensor: Tensor) -> None:
    """Pass where all of a weight are numbers.

    Raises:
        InputError: some are not; it names the weight.
    """
    known = tensor.layout is torch.strided and tensor.device.type != "meta"
    if known and not bool(tensor.isfinite().all()):
        raise InputError(
            f"quantize(model), tensor {path!r}",
            "it is NaN or infinite somewhere",
            "Load a sound checkpoint, or look for where its training diverged",
        )


def inserted(
    net: GraphModel,
    placement: Placement,
    quantizers: Quantizers,
    steps: Mapping[str, float] | None = None,
) -> GraphModel:
    """The network with its quantizers, its weights on their grids.

    Args:
        net: the float network; its tensors are shared but for the weights.
        placement: which layers and weights.
        quantizers: of the activations.
        steps: name of an activation -> its scale, where that is known: weights then get scales that
            leave room for the biases, and all that read the activation read the quantized one.
            None: only quantized layers do.
    """
    graph = net.graph
    parameters = dict(named(net.named_parameters))
    buffers = dict(named(net.named_buffers))
    behind: dict[str, list[Node]] = {node.name: [node] for node in graph.nodes}
    for name, calls in quantizers.items():
        behind[name] += calls
    for name in sorted(placement.weights):
        weight = graph.by_name[name]
        scales = _weight_scales(net, placement, steps or {}, weight)
        paths = [sibling(graph, weight.path, f"{_leaf(weight.path)}_{s}") for s in _SUFFIXES]
        buffers[paths[0]], buffers[paths[1]] = scales, torch.zeros_like(scales, dtype=torch.int32)
        behind[name] += _weight_quantizer(weight, paths)
        if all(user.name in placement.readers for user in graph.users[name]):
            held = parameters if weight.path in parameters else buffers
            held[weight.path] = _on_grid(held[weight.path], scales)
    exclusive = placement.weights | (quantizers.keys() if steps is None else frozenset())
    rewired = graph.with_nodes(list(_rewired(graph, behind, placement, exclusive)))
    return GraphModel(rewired, parameters, buffers)


def static_quantizers(graph: Graph, grids: Mapping[str, Affine]) -> Quantizers:
    """One call with known scale and zero point for each activation."""
    return {name: [_activation_quantizer(graph.by_name[name], g)] for name, g in grids.items()}


_SUFFIXES = ("scale", "zero_point")


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _activation_quantizer(node: Node, grid: Affine) -> Node:
    args = (Ref(node.name), grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    return Node(derived(node.name, QUANTIZED), PER_TENSOR, args, value=node.value, scope=node.scope)


def _weight_quantizer(weight: Node, paths: list[str]) -> Iterator[Node]:
    sources = [derived(weight.name, suffix) for suffix in _SUFFIXES]
    dtypes = (torch.float32, torch.int32)
    for name, path, dtype in zip(sources, paths, dtypes, strict=True):
        value = Spec(weight.shape[:1], dtype)
        yield Node(name, "tensor", (path,), value=value, scope=weight.scope)
    args = (Ref(weight.name), *(Ref(name) for name in sources), 0, -128, 127)
    name = derived(weight.name, QUANTIZED)
    yield Node(name, PER_CHANNEL, args, value=weight.value, scope=weight.scope)


def _rewired(
    graph: Graph,
    behind: Mapping[str, list[Node]],
    placement: Placement,
    exclusive: frozenset[str],
) -> Iterator[Node]:
    """All nodes in order; readers of a quantized value read the quantizer's result.

    A quantizer that is ``exclusive`` is read by the quantized layers alone.
    """

    def follow(reader: Node, ref: Ref) -> Ref:
        quantized = ref.name not in exclusive or reader.name in placement.readers
        return Ref(behind[ref.name][-1].name) if quantized else ref

    for original in graph.nodes:
        lookup = _bound(follow, original)
        args, kwargs = substitute(original.args, lookup), substitute(original.options, lookup)
        yield replace(original, args=args, kwargs=kwargs)
        yield from behind[original.name][1:]


def _bound(follow: Callable[[Node, Ref], Ref], reader: Node) -> Callable[[Ref], Ref]:
    return lambda ref: follow(reader, ref)


def _weight_scales(
    net: GraphModel, placement: Placement, steps: Mapping[str, float], weight: Node
) -> Tensor:
    """Scales of one weight, wide enough that the biases of its layers fit in 32 bits."""
    scales = channel_scales(net.tensor(weight.path))
    for user in net.graph.users[weight.name]:
        if user.name not in placement.layers:
            continue
        bias, step = user.argument("bias"), steps.get(user.args[0].name)
        node = net.graph.by_name[bias.name] if isinstance(bias, Ref) else None
        if node is not None and node.op == "tensor" and step is not None:
            values = net.tensor(node.path).detach().abs()
            scales = torch.maximum(scales, values / (step * BIAS_LIMIT))
    return scales


def _on_grid(weight: Tensor, scales: Tensor) -> Tensor:
    q = quantize_weight(weight.detach(), scales)
    values = dequantize(q, along(scales, 0, weight.ndim), 0)
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(values, requires_grad=weight.requires_grad)
    return values
