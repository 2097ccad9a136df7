"""Activation ranges of each call: linear layers whose inputs are quantized as they come, and LSTMs.

The quantizer is written out in operators of the graph, as ONNX defines DynamicQuantizeLinear: the
range of the tensor, widened to 0, on 256 levels. ``rarefy.export`` puts that operator, and a
product of integers, in its place.

Of LSTMs, the weights are rounded here; their inputs and hidden states, which onnxruntime rounds at
each call too, stay in float in the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from rarefy.graph.program import Graph, Node, Ref, Spec, derived
from rarefy.quantization.affine import SMALLEST_RANGE
from rarefy.quantization.insertion import QUANTIZED, Quantizers
from rarefy.quantization.placement import (
    CONVOLUTIONS,
    RECURRENT,
    Placement,
    layer_name,
    not_empty,
    place,
)

LEVELS = 255
LSTM = "aten.lstm.input"

UNSERVED_REASON = (
    "onnxruntime computes LSTMs without projections alone with integers; WeightOnly makes the file "
    "of this layer small"
)
QUANTIZER = "aten.fake_quantize_per_tensor_affine.tensor_qparams"


def dynamic_placement(graph: Graph, kept: Mapping[str, str]) -> Placement:
    """Linear layers, their weights and what they read; LSTMs and their weights.

    Args:
        graph: of a float network.
        kept: layer that stays in float by choice -> reason.
    """
    reason = "dynamic ranges are for linear layers and LSTMs"
    found = place(graph, None, kept)
    convolutions = {
        layer: reason
        for name, layer in found.layers.items()
        if graph.by_name[name].op in CONVOLUTIONS
    }
    found = place(graph, None, {**convolutions, **kept})
    sources = {graph.by_name[name].args[0].name for name in found.layers}
    recurrent = {
        node.name: layer_name(graph, node)
        for node in graph.calls
        if matrices(graph, node) and layer_name(graph, node) not in kept
    }
    weights = {name for node in recurrent for name in matrices(graph, graph.by_name[node])}
    left = {layer: why for layer, why in found.left.items() if layer not in recurrent.values()}
    for node in graph.calls:
        layer = layer_name(graph, node) if node.kind in RECURRENT else ""
        if layer and layer not in kept and node.name not in recurrent:
            left[layer] = UNSERVED_REASON
    return not_empty(
        Placement(
            {name: name for name in sorted(sources)},
            found.weights | weights,
            {**found.layers, **recurrent},
            left,
            found.tables,
        )
    )


def matrices(graph: Graph, node: Node) -> tuple[str, ...]:
    """Names of the weights of an LSTM that can be integers; none for other calls.

    LSTMs with projections have more weights than the operator on integers.
    """
    if node.op != LSTM:
        return ()
    tensors = [graph.by_name[ref.name] for ref in node.argument("params")]
    found = [tensor for tensor in tensors if len(tensor.shape) == 2]
    wanted = 2 * node.argument("num_layers") * (1 + bool(node.argument("bidirectional")))
    plain = all(
        t.op == "tensor" and isinstance(t.value, Spec) and t.value.dtype == torch.float32
        for t in found
    )
    return tuple(t.name for t in found) if plain and len(found) == wanted else ()


def dynamic_quantizers(graph: Graph, placement: Placement) -> Quantizers:
    """The calls that find each activation's range and quantize it."""
    return {name: list(_quantizer(graph.by_name[name])) for name in placement.activations}


def _quantizer(node: Node) -> Iterator[Node]:
    """Scale ``(max(x, 0) - min(x, 0)) / 255``, zero point ``-min(x, 0) / scale``, rounding."""
    scalar = Spec((), torch.float32)

    def made(suffix: str, op: str, *args: object) -> Node:
        return Node(derived(node.name, suffix), op, args, value=scalar, scope=node.scope)

    def ref(suffix: str) -> Ref:
        return Ref(derived(node.name, suffix))

    alone = made("detached", "aten.detach.default", Ref(node.name))
    yield replace(alone, value=node.value)
    yield made("min", "aten.min.default", ref("detached"))
    yield made("max", "aten.max.default", ref("detached"))
    yield made("low", "aten.clamp_max.default", ref("min"), 0.0)
    yield made("high", "aten.clamp_min.default", ref("max"), 0.0)
    yield made("range", "aten.sub.Tensor", ref("high"), ref("low"))
    yield made("width", "aten.clamp_min.default", ref("range"), SMALLEST_RANGE * LEVELS)
    yield made("step", "aten.div.Tensor", ref("width"), LEVELS)
    yield made("offset", "aten.div.Tensor", ref("low"), ref("step"))
    yield made("whole", "aten.round.default", ref("offset"))
    yield made("zero", "aten.neg.default", ref("whole"))
    zero = made("point", "aten.to.dtype", ref("zero"), torch.int32)
    yield replace(zero, value=Spec((), torch.int32))
    args = (Ref(node.name), ref("step"), ref("point"), 0, LEVELS)
    name = derived(node.name, QUANTIZED)
    yield Node(name, QUANTIZER, args, value=node.value, scope=node.scope)
