"""Which tensors of a graph carry a quantizer: decided on the graph alone, as runtimes fuse it.

Integer kernels exist only where a runtime finds its pattern: quantizers on the input, the weight
and the output of a convolution (behind a relu, which then disappears), on both inputs and the
output of a residual addition, and with one scale on both sides of an operator that only moves
values. The same network with quantizers elsewhere runs several times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rarefy.errors import InputError
from rarefy.graph.memory import Memory
from rarefy.graph.program import Graph, Node, Ref, Spec

CONVOLUTIONS = frozenset(
    f"aten.conv{d}d.{overload}" for d in (1, 2) for overload in ("default", "padding")
)
LAYERS = CONVOLUTIONS | {"aten.linear.default"}
"""Layers that run in int8; arguments (input, weight, bias, ...), output channels first."""

TABLE = "aten.embedding.default"
"""Look-ups, arguments (weight, indices, ...): rows are stored in int8, nothing else is rounded."""

ADDITIONS = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})
"""Operators on two tensors that have an integer kernel."""

UNARY = frozenset(
    f"aten.{name}.default"
    for name in (
        *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("sigmoid", "leaky_relu"),
    )
)
"""Operators with an integer kernel whose output has a scale of its own; also a mean over all
positions, see :func:`averages`."""

FUSABLE = frozenset(
    f"aten.{name}.default"
    for name in ("silu", "hardswish", "gelu", "mish", "elu", "hardsigmoid", "softplus", "tanh")
)
"""Functions that a runtime may compute in float as a part of the convolution before them."""

_MOVES = frozenset(
    {
        *("max_pool1d", "max_pool2d", "flatten", "view", "_unsafe_view", "view_as", "reshape"),
        *("permute", "transpose", "t", "numpy_T", "slice", "squeeze", "unsqueeze"),
        *("dropout", "clone", "contiguous", "alias", "detach"),
    }
)

RECURRENT = frozenset(
    "gru rnn_tanh rnn_relu lstm lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split()
)
"""Kinds of recurrent layers, and of single steps of them."""

LEFT: Mapping[str, str] = {
    **{
        f"aten.conv_transpose{d}d.{overload}": "runtimes have no int8 transposed convolution"
        for d, overload in ((1, "default"), (2, "input"), (3, "input"))
    },
    "aten.conv3d.default": "runtimes have no fast int8 kernel for 3-d convolutions",
    "aten.batch_norm.default": "no convolution right before it to fold it into",
    **{
        f"aten.{kind}.{'default' if kind.endswith('_cell') else 'input'}": (
            "recurrent layers run in float"
        )
        for kind in sorted(RECURRENT)
    },
    **{
        f"aten.embedding_bag.{overload}": "runtimes have no int8 sums of rows"
        for overload in ("default", "padding_idx")
    },
    "aten.matmul.default": "a product of two computed tensors runs in float",
    "aten.bmm.default": "a product of two computed tensors runs in float",
    "aten.scaled_dot_product_attention.default": "attention between activations runs in float",
}
"""Operators with weights or products that are left in float, and why."""


@dataclass(frozen=True)
class Placement:
    """Where the quantizers of a graph go.

    Attributes:
        activations: node whose value is quantized -> node whose observed range it uses; a node
            that differs shares the scale of the tensor that it moves or joins.
        weights: nodes of the weights that are quantized, along their first dimension.
        layers: quantized layer calls -> name of the layer.
        left: layer left in float -> reason.
        tables: look-ups in tables that are quantized -> name of the layer.
    """

    activations: Mapping[str, str]
    weights: frozenset[str]
    layers: Mapping[str, str]
    left: Mapping[str, str]
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def readers(self) -> Mapping[str, str]:
        """Calls that read quantized weights -> name of the layer."""
        return {**self.layers, **self.tables}

    @property
    def observed(self) -> frozenset[str]:
        """Nodes whose range must be known."""
        return frozenset(self.activations.values())


def place(
    graph: Graph,
    barred: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
    fused: bool = False,
) -> Placement:
    """Decide which tensors of a graph carry a quantizer.

    Args:
        graph: with BatchNorms folded.
        barred: nodes that cannot carry one -> reason, e.g. since they are always 0.
        kept: layer that stays in float by choice -> reason.
        fused: whether the output of a convolution goes to a function of :data:`FUSABLE` as it is.

    Returns:
        The placement; every layer is among its ``layers``, its ``tables`` or its ``left``.
    """
    in_place = "its input or output is written in place"
    barred = {**dict.fromkeys(Memory(graph).written, in_place), **(barred or {})}
    left = {**_left_by_operator(graph), **(kept or {})}
    plain = _before_functions(graph) if fused else frozenset()
    layers: dict[str, str] = {}
    for node in (n for n in graph.calls if n.op in LAYERS):
        layer = layer_name(graph, node)
        reason = (kept or {}).get(layer) or _obstacle(graph, node, barred, plain)
        if reason is None:
            layers[node.name] = layer
        else:
            left[layer] = reason
    tables: dict[str, str] = {}
    for node in (n for n in graph.calls if n.op == TABLE):
        layer = layer_name(graph, node)
        reason = (kept or {}).get(layer) or _table_obstacle(graph, node, barred, layers)
        if reason is None:
            tables[node.name] = layer
        else:
            left[layer] = reason
    quantized = _useful(graph, layers, _candidates(graph, layers, barred, plain), plain)
    return Placement(
        _ranges(graph, quantized),
        frozenset(weight_of(graph.by_name[name]).name for name in (*layers, *tables)),
        layers,
        left,
        tables,
    )


def not_empty(placement: Placement) -> Placement:
    """The placement, if it has any layer.

    Raises:
        InputError: it has none; the message says why.
    """
    if not placement.readers:
        raise InputError(
            "quantize(model)",
            f"no layer can be quantized: {dict(placement.left) or 'there is none'}",
            "Give a float32 network with convolutions, linear layers or embeddings",
        )
    return placement


def weight_of(node: Node) -> Any:
    """The weight of a layer's call."""
    return node.args[0 if node.op == TABLE else 1]


def layer_name(graph: Graph, node: Node) -> str:
    """Path of the module that owns the node's first parameter, else the module that called it."""
    for name in node.inputs:
        tensor = graph.by_name[name]
        if tensor.op == "tensor":
            return tensor.path.rpartition(".")[0] or tensor.path
    return node.scope or node.name


def carrier(graph: Graph, node: Node) -> Node:
    """The node that carries the quantizer of a fused operator's output: its relu, or itself."""
    if moves(node) or clips_at_zero(node):
        return node
    users = graph.users[node.name]
    return users[0] if len(users) == 1 and clips_at_zero(users[0]) else node


def clips_at_zero(node: Node) -> bool:
    """Whether a node is a relu, or a clip from 0 up: the quantizer behind it does its work."""
    lower = _CLIPS.get(node.op)
    return lower is not None and lower(node) == 0


_CLIPS: Mapping[str, Callable[[Node], Any]] = {
    "aten.relu.default": lambda node: 0,
    "aten.relu6.default": lambda node: 0,
    "aten.hardtanh.default": lambda node: node.argument("min_val"),
    "aten.clamp.default": lambda node: node.argument("min"),
    "aten.clamp_min.default": lambda node: node.argument("min"),
}
"""Clipping operators -> their lower bound."""


def moves(node: Node) -> bool:
    """Whether a node only moves, drops or repeats values of its first input, or adds zeros."""
    if node.kind in ("pad", "constant_pad_nd"):
        mode = node.argument("mode") if node.kind == "pad" else "constant"
        return mode == "constant" and not node.argument("value")
    return node.kind in _MOVES and isinstance(node.value, Spec)


def averages(graph: Graph, node: Node) -> bool:
    """Whether a node is a mean over all positions, ``x.mean((2, 3))``: a global average pooling."""
    dims = node.argument("dim")
    if node.op != "aten.mean.dim" or not isinstance(dims, list | tuple):
        return False
    rank = len(graph.by_name[node.args[0].name].shape)
    return rank > 2 and sorted(d % rank for d in dims) == list(range(2, rank))


def _left_by_operator(graph: Graph) -> dict[str, str]:
    return {layer_name(graph, n): LEFT[n.op] for n in graph.calls if n.op in LEFT}


def _before_functions(graph: Graph) -> frozenset[str]:
    """Convolutions that nothing but one function reads."""
    found = set()
    for node in graph.calls:
        users = graph.users[node.name]
        if node.op in CONVOLUTIONS and len(users) == 1 and users[0].op in FUSABLE:
            found.add(node.name)
    return frozenset(found)


def _obstacle(
    graph: Graph, node: Node, barred: Mapping[str, str], plain: frozenset[str]
) -> str | None:
    """Why a layer cannot run in int8, or None."""
    weight, source = graph.by_name[node.args[1].name], graph.by_name[node.args[0].name]
    ends = [source.name]
    if node.op in CONVOLUTIONS and node.name not in plain:
        ends.append(carrier(graph, node).name)
    for name in ends:
        if name in barred:
            return barred[name]
    if weight.op != "tensor":
        return "its weight is computed in forward"
    if source.op == "tensor":
        return "its input is a constant"
    if not _is_float(source) or not _is_float(weight):
        return "it does not compute in single precision"
    return None


def _table_obstacle(
    graph: Graph, node: Node, barred: Mapping[str, str], layers: Mapping[str, str]
) -> str | None:
    """Why a table cannot be stored in int8, or None."""
    weight = graph.by_name[weight_of(node).name]
    if weight.op != "tensor":
        return "its weight is computed in forward"
    if weight.name in barred:
        return barred[weight.name]
    if not _is_float(weight):
        return "it does not compute in single precision"
    if any(user.op != TABLE and user.name not in layers for user in graph.users[weight.name]):
        return "its weight is read in float elsewhere"
    return None


def _is_float(node: Node) -> bool:
    return isinstance(node.value, Spec) and node.value.dtype == torch.float32


def _activations(graph: Graph, args: Iterable[Any]) -> list[str] | None:
    """Names of arguments if all are computed single-precision tensors, else None."""
    nodes = [graph.by_name[arg.name] if isinstance(arg, Ref) else None for arg in args]
    if any(node is None or node.op == "tensor" or not _is_float(node) for node in nodes):
        return None
    return [node.name for node in nodes if node is not None]


def operands(graph: Graph, node: Node) -> list[str] | None:
    """Inputs that need a quantizer for the node to run in int8; None where it never does."""
    if not _is_float(node):
        return None
    if node.op in ADDITIONS:
        plain = not node.options and len(node.args) == 2
        return _activations(graph, node.args) if plain else None
    if node.op == "aten.cat.default":
        return _activations(graph, node.args[0])
    if node.op in UNARY or averages(graph, node) or moves(node) or clips_at_zero(node):
        return _activations(graph, node.args[:1])
    return None


def _candidates(
    graph: Graph, layers: Mapping[str, str], barred: Mapping[str, str], plain: frozenset[str]
) -> dict[str, list[str]]:
    """Operators that could run in int8 since one of their inputs is quantized -> their inputs."""
    quantized: set[str] = set()
    for name in layers:
        node = graph.by_name[name]
        quantized.add(node.args[0].name)
        if node.op in CONVOLUTIONS and name not in plain:
            quantized.add(carrier(graph, node).name)
    found: dict[str, list[str]] = {}
    for node in graph.calls:
        inputs = operands(graph, node)
        if inputs is None or not quantized.intersection(inputs):
            continue
        if clips_at_zero(node) and _chain(graph, node) is None:
            continue
        if barred.keys() & {*inputs, carrier(graph, node).name}:
            continue
        found[node.name] = inputs
        quantized |= {*inputs, carrier(graph, node).name}
    return found


def _useful(
    graph: Graph,
    layers: Mapping[str, str],
    candidates: Mapping[str, list[str]],
    plain: frozenset[str],
) -> dict[str, Node]:
    """Nodes with a quantizer -> the operator behind it, in the order of the graph.

    A candidate runs in int8 only where an int8 operator reads its result; otherwise its quantizer
    would be rounding without a gain.
    """
    carriers: dict[str, Node] = {}
    for node in reversed(list(graph.calls)):
        if node.name in layers:
            inputs = [node.args[0].name]
            needed = node.op in CONVOLUTIONS and node.name not in plain
        elif node.name in candidates and carrier(graph, node).name in carriers:
            inputs, needed = candidates[node.name], True
        else:
            continue
        if needed:
            carriers[carrier(graph, node).name] = node
        for name in inputs:
            carriers.setdefault(name, graph.by_name[name])
    return {n.name: carriers[n.name] for n in graph.nodes if n.name in carriers}


def _chain(graph: Graph, node: Node) -> str | None:
    """The tensor that reaches ``node`` through moving operators only, each read by nobody else.

    Rectifying that tensor, or giving it another range, then concerns nobody else.
    """
    if not node.args or not isinstance(node.args[0], Ref):
        return None
    name = node.args[0].name
    while len(graph.users[name]) == 1:
        source = graph.by_name[name]
        if not moves(source):
            return name
        name = source.args[0].name
    return None


def _ranges(graph: Graph, quantized: Mapping[str, Node]) -> dict[str, str]:
    """Each quantized node -> the node whose range it uses."""
    source = {name: name for name in quantized}
    for name, behind in quantized.items():
        if behind.name == name and moves(behind) and behind.args[0].name in quantized:
            source[name] = behind.args[0].name
    for name, behind in quantized.items():
        if behind.op == "aten.cat.default":
            _redirect(graph, source, (ref.name for ref in behind.args[0]), behind, name)
        elif behind.name == name and clips_at_zero(behind) and behind.args[0].name in quantized:
            _redirect(graph, source, (behind.args[0].name,), behind, name)

    def last(name: str) -> str:
        while source[name] != name:
            name = source[name]
        return name

    return {name: last(name) for name in quantized}


def _redirect(
    graph: Graph, source: dict[str, str], inputs: Iterable[str], reader: Node, target: str
) -> None:
    """Let the tensors behind ``inputs`` use the range of ``target``, where only it reads them."""
    for name in inputs:
        while len(graph.users[name]) == 1 and source.get(name, name) != name != target:
            name = source[name]
        if len(graph.users[name]) == 1 and source.get(name) == name != target:
            source[name] = target
