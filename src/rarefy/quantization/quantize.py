"""Static int8 quantization of a captured network, calibrated on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import batches, call, evaluating, take
from rarefy.errors import InputError
from rarefy.graph.program import Graph, GraphModel, Node, Ref, substitute
from rarefy.graph.stubs import plain_graph
from rarefy.quantization.affine import (
    SMALLEST_RANGE,
    Affine,
    affine,
    along,
    channel_scales,
    dequantize,
    quantize_weight,
    sqnr,
)
from rarefy.quantization.fold import fold_batch_norms, named, sibling
from rarefy.quantization.observers import observer
from rarefy.quantization.placement import Placement, carrier, place
from rarefy.quantization.summary import QuantizationSummary as QuantizationSummary
from rarefy.quantization.weight_only import half, weight_only
from rarefy.types import Data, Half, Inputs, Int8, WeightOnly

PER_TENSOR = "aten.fake_quantize_per_tensor_affine.default"
PER_CHANNEL = "aten.fake_quantize_per_channel_affine.default"

BIAS_LIMIT = 2**30
"""Biases are stored as int32 in units of input scale times weight scale; half of it is room."""

COMPARED = 8
"""Examples on which the layers' outputs are compared with the float network's."""


@overload
def quantize(model: nn.Module, calibration: Data, scheme: Int8 | None = None) -> GraphModel: ...


@overload
def quantize(
    model: nn.Module, calibration: Data | None, scheme: WeightOnly | Half
) -> nn.Module: ...


def quantize(
    model: nn.Module, calibration: Data | None, scheme: Int8 | WeightOnly | Half | None = None
) -> nn.Module:
    """Quantize a network to static int8, with quantizers where runtimes fuse them, or its weights.

    ``WeightOnly`` and ``Half`` return an instance of the network's own class whose weights alone
    take fewer values: :func:`rarefy.save` stores them in as few bits, and nothing is faster.

    With ``Int8``, activations become unsigned 8-bit with one range per tensor, found on the
    calibration data; weights of convolutions and linear layers become signed 8-bit with a scale
    per output channel. BatchNorms are folded. The forward of the result *is* the quantized
    network, computed in float with rounded values; ``rarefy.export`` turns it into integers.
    Gradients pass the rounding straight through, so that the result can be trained.

    Args:
        model: any module that can be captured, in float; left as it is.
        calibration: batches as in the data convention; targets are not used. A few hundred
            typical examples suffice. ``WeightOnly(method="rtn")``, ``"palette"`` and ``Half`` need
            none.
        scheme: what is quantized and how; ``Int8()`` if None.

    Returns:
        The quantized network, in eval mode, with the attribute ``quantization``, a
        :class:`QuantizationSummary`.

    Raises:
        CaptureError: the network cannot be captured.
        DataError: there are no calibration data, or a tensor is not finite on them.
        InputError: no layer can be quantized, or the model is quantized already.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(quantize(net, [torch.randn(16, 4)]).quantization.layers)
        ['0', '2']

    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342.
    """
    if isinstance(scheme, WeightOnly):
        return weight_only(model, calibration, scheme)
    if isinstance(scheme, Half):
        return half(model, scheme)
    scheme = scheme or Int8()
    if calibration is None:
        raise InputError(
            "quantize(calibration=None)", "int8 needs calibration data", "Give some batches"
        )
    first, _ = next(batches(calibration, "quantize(calibration)"))
    net = fold_batch_norms(_captured(model, first))
    placement, ranges = _calibrated(net, calibration, scheme)
    grids = {name: affine(*ranges[source]) for name, source in placement.activations.items()}
    quantized = _inserted(net, placement, grids)
    with evaluating(net, quantized):
        noise = _noise(net, quantized, placement, take(first, COMPARED))
    quantized.quantization = QuantizationSummary(noise, placement.left)  # type: ignore[assignment]
    if hasattr(model, "sparsified"):  # its zeros are zeros here, and are to stay so
        quantized.sparsified = model.sparsified
    return quantized


def _captured(model: nn.Module, example: Inputs) -> GraphModel:
    net = plain_graph(model, example)
    if any(node.op in (PER_TENSOR, PER_CHANNEL) for node in net.graph.nodes):
        raise InputError(
            "quantize(model)", "the model is quantized already", "Give the float model"
        )
    return net


# --- calibration -------------------------------------------------------------------------------


class Watched(GraphModel):
    """A network that shows the values of some nodes to a function as it runs.

    Args:
        model: shares its tensors.
        names: nodes to show.
        show: called with a node and its value.
    """

    def __init__(
        self, model: GraphModel, names: frozenset[str], show: Callable[[Node, Tensor], None]
    ) -> None:
        super().__init__(
            model.graph, dict(named(model.named_parameters)), dict(named(model.named_buffers))
        )
        self._names = names
        self._show = show
        self._inputs = [node for node in model.graph.nodes if node.op == "input"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's forward."""
        for node, value in zip(self._inputs, pytree.tree_leaves((args, kwargs)), strict=False):
            if node.name in self._names:
                self._show(node, value)
        return super().forward(*args, **kwargs)

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """As the network's step."""
        result = super().step(node, function, values)
        if node.name in self._names:
            self._show(node, result)
        return result


def _calibrated(
    net: GraphModel, data: Data, scheme: Int8
) -> tuple[Placement, dict[str, tuple[float, float]]]:
    """A placement of which every range is known and not empty."""
    ranges: dict[str, tuple[float, float]] = {}
    barred: dict[str, str] = {}
    while True:
        placement = place(net.graph, barred)
        if not placement.layers:
            raise InputError(
                "quantize(model)",
                f"no layer can be quantized: {dict(placement.left) or 'there is none'}",
                "Give a float32 network with convolutions or linear layers",
            )
        unknown = placement.observed - ranges.keys()
        if unknown:
            ranges |= _ranges(net, unknown, data, scheme)
        empty = {n for n in placement.observed if _width(ranges[n]) <= SMALLEST_RANGE}
        if not empty:
            return placement, ranges
        for name, source in placement.activations.items():
            if source in empty:
                barred[name] = "its input or output is 0 on all calibration data"


def _width(span: tuple[float, float]) -> float:
    return max(span[1], 0.0) - min(span[0], 0.0)


def _ranges(
    net: GraphModel, names: frozenset[str], data: Data, scheme: Int8
) -> dict[str, tuple[float, float]]:
    observers = {name: observer(scheme, _title(net.graph.by_name[name])) for name in names}

    def show(node: Node, value: Tensor) -> None:
        observers[node.name].update(value)

    watched = Watched(net, names, show)
    with evaluating(watched):
        for inputs, _ in batches(data, "quantize(calibration)"):
            call(watched, inputs)
    return {name: found.range() for name, found in observers.items()}


def _title(node: Node) -> str:
    scope = f" of module {node.scope!r}" if node.scope else ""
    return f"quantize(calibration): tensor {node.name!r}{scope}"


def _noise(
    net: GraphModel, quantized: GraphModel, placement: Placement, inputs: Inputs
) -> dict[str, float]:
    """SQNR of every layer's output, the worst call of a layer that is called several times."""
    carriers = {
        carrier(net.graph, net.graph.by_name[call]).name: layer
        for call, layer in placement.layers.items()
    }
    exact: dict[str, Tensor] = {}
    found: dict[str, float] = {}

    def remember(node: Node, value: Tensor) -> None:
        exact[node.name] = value

    def compare(node: Node, value: Tensor) -> None:
        name = node.name.removesuffix("_fq")
        reference, layer = exact.pop(name), carriers[name]
        if (
            node.op == PER_TENSOR and node.argument("zero_point") == 0
        ):  # it does the work of a relu further on
            reference = reference.clamp_min(0)
        found[layer] = min(sqnr(reference, value), found.get(layer, float("inf")))

    present = quantized.graph.by_name.keys()
    shown = frozenset(f"{n}_fq" if f"{n}_fq" in present else n for n in carriers)
    call(Watched(net, frozenset(carriers), remember), inputs)
    call(Watched(quantized, shown, compare), inputs)
    return {layer: found[layer] for layer in dict.fromkeys(placement.layers.values())}


# --- building the quantized network -------------------------------------------------------------


def _inserted(net: GraphModel, placement: Placement, grids: Mapping[str, Affine]) -> GraphModel:
    """The network with its quantizers, its weights on their grids."""
    graph = net.graph
    parameters = dict(named(net.named_parameters))
    buffers = dict(named(net.named_buffers))
    nodes: dict[str, list[Node]] = {node.name: [node] for node in graph.nodes}
    for name, grid in grids.items():
        nodes[name].append(_activation_quantizer(graph.by_name[name], grid))
    for name in sorted(placement.weights):
        weight = graph.by_name[name]
        scales = _weight_scales(net, placement, grids, weight)
        paths = [sibling(graph, weight.path, f"{_leaf(weight.path)}_{s}") for s in _SUFFIXES]
        buffers[paths[0]], buffers[paths[1]] = scales, torch.zeros_like(scales, dtype=torch.int32)
        nodes[name] += _weight_quantizer(weight, paths)
        if all(user.name in placement.layers for user in graph.users[name]):
            held = parameters if weight.path in parameters else buffers
            held[weight.path] = _on_grid(held[weight.path], scales)
    rewired = graph.with_nodes(list(_rewired(graph, nodes, placement)))
    return GraphModel(rewired, parameters, buffers)


_SUFFIXES = ("scale", "zero_point")


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _activation_quantizer(node: Node, grid: Affine) -> Node:
    args = (Ref(node.name), grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    return Node(f"{node.name}_fq", PER_TENSOR, args, value=node.value, scope=node.scope)


def _weight_quantizer(weight: Node, paths: list[str]) -> Iterator[Node]:
    sources = [f"{weight.name}_{suffix}" for suffix in _SUFFIXES]
    for name, path in zip(sources, paths, strict=True):
        yield Node(name, "tensor", (path,), scope=weight.scope)
    args = (Ref(weight.name), *(Ref(name) for name in sources), 0, -128, 127)
    yield Node(f"{weight.name}_fq", PER_CHANNEL, args, value=weight.value, scope=weight.scope)


def _rewired(graph: Graph, nodes: Mapping[str, list[Node]], placement: Placement) -> Iterator[Node]:
    """All nodes in order; readers of a quantized value read the quantizer's result.

    A weight's quantizer is read by the quantized layers alone.
    """

    def follow(reader: Node, ref: Ref) -> Ref:
        is_weight = ref.name in placement.weights
        quantized = reader.name in placement.layers if is_weight else True
        return Ref(nodes[ref.name][-1].name) if quantized else ref

    for original in graph.nodes:
        lookup = _bound(follow, original)
        args, kwargs = substitute(original.args, lookup), substitute(original.options, lookup)
        yield replace(original, args=args, kwargs=kwargs)
        yield from nodes[original.name][1:]


def _bound(follow: Callable[[Node, Ref], Ref], reader: Node) -> Callable[[Ref], Ref]:
    return lambda ref: follow(reader, ref)


def _weight_scales(
    net: GraphModel, placement: Placement, grids: Mapping[str, Affine], weight: Node
) -> Tensor:
    """Scales of one weight, wide enough that the biases of its layers fit in 32 bits."""
    scales = channel_scales(net.tensor(weight.path))
    for user in net.graph.users[weight.name]:
        bias = user.argument("bias") if user.name in placement.layers else None
        node = net.graph.by_name[bias.name] if isinstance(bias, Ref) else None
        if node is not None and node.op == "tensor":
            unit = grids[user.args[0].name].scale * BIAS_LIMIT
            scales = torch.maximum(scales, net.tensor(node.path).detach().abs() / unit)
    return scales


def _on_grid(weight: Tensor, scales: Tensor) -> Tensor:
    q = quantize_weight(weight.detach(), scales)
    values = dequantize(q, along(scales, 0, weight.ndim), 0)
    if isinstance(weight, nn.Parameter):
        return nn.Parameter(values, requires_grad=weight.requires_grad)
    return values
