"""How each operator carries labels: a table from ATen names to small pure functions.

A rule receives the walk's :class:`Flow` and a node, and returns the labels of the node's value.
A new operator is one row and, at most, one function. An operator without a row freezes every
label that it touches, which is always safe, and is named in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from rarefy.graph.labels import FIXED, Atoms, Labels, Ledger
from rarefy.graph.program import (
    Graph,
    Node,
    Ref,
    Spec,
    Value,
    resolve,
    schema,
    shares_memory,
    writes,
)

EXTENT = "is the extent of a kernel"
"""Reason that is not worth telling: nobody expects a 3x3 kernel to become 3x2."""

Carried: TypeAlias = Any
"""Labels of a tensor, a tuple of these for several results, None for numbers."""
Rule: TypeAlias = "Callable[[Flow, Node], Carried]"


@dataclass
class Flow:
    """State of one walk over a graph.

    Attributes:
        graph: what is walked.
        ledger: atoms, ties, relations.
        labels: per node, the labels of its value.
        vanishing: nodes whose value is zero wherever a unit is masked.
        memory: node -> the first node of those whose values may share its memory.
        counts: (node, argument) -> atoms whose surviving number that argument states.
        unknown: operators without a rule, with how often they were met.
    """

    graph: Graph
    ledger: Ledger = field(default_factory=Ledger)
    labels: dict[str, Any] = field(default_factory=dict)
    vanishing: set[str] = field(default_factory=set)
    memory: dict[str, str] = field(default_factory=dict)
    counts: dict[tuple[str, str], Atoms] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def of(self, arg: Any) -> Labels:
        """Labels of a tensor argument; none for numbers."""
        return self.labels.get(arg.name) or () if isinstance(arg, Ref) else ()

    def shape(self, arg: Any) -> tuple[int, ...]:
        """Shape of a tensor argument; ``()`` for numbers."""
        value = self.graph.by_name[arg.name].value if isinstance(arg, Ref) else None
        return value.shape if isinstance(value, Spec) else ()

    def number(self, arg: Any) -> int:
        """A whole number, given or computed in the graph."""
        value = self.graph.by_name[arg.name].value if isinstance(arg, Ref) else arg
        assert isinstance(value, int)
        return value

    def zero(self, arg: Any) -> bool:
        """Whether the argument is zero wherever a unit is masked (numbers: whether it is 0)."""
        return arg.name in self.vanishing if isinstance(arg, Ref) else arg == 0

    def tie(self, node: Node, *sides: Atoms | None) -> Atoms | None:
        """Sides of one dimension go together; one that cannot change fixes the others."""
        known = [side for side in sides if side is not None]
        if len(known) < len(sides):
            for side in known:
                self.freeze(node, side, "meets a dimension whose size cannot change")
            return None
        for side in known[1:]:
            self.ledger.tie(known[0], side)
        return known[0] if known else None

    def freeze(self, node: Node, atoms: Atoms | None, reason: str) -> None:
        """These atoms cannot go, because of what ``node`` does."""
        if atoms is not None and not (len(atoms) and bool((atoms == FIXED).all())):
            self.ledger.fix(atoms, node.name, reason)

    def freeze_dims(self, node: Node, labels: Labels, dims: Sequence[int], reason: str) -> Labels:
        """Freeze these dimensions and return the labels of the others."""
        wrapped = {d % max(len(labels), 1) for d in dims}
        for d in wrapped & set(range(len(labels))):
            self.freeze(node, labels[d], reason)
        return tuple(None if d in wrapped else label for d, label in enumerate(labels))


def walk(graph: Graph, parameters: Mapping[str, int]) -> Flow:
    """Carry labels through a graph.

    Args:
        graph: the captured network.
        parameters: path -> storage identity of every parameter and buffer whose size may change;
            tensors that share storage share labels.
    """
    flow = Flow(graph)
    shared: dict[tuple[int, tuple[int, ...]], Labels] = {}
    for node in graph.nodes:
        if node.op == "input":
            flow.labels[node.name] = _none(node.value)
        elif node.op == "tensor":
            flow.labels[node.name] = _tensor(flow, node, parameters, shared)
            flow.vanishing.add(node.name)
        elif node.op == "output":
            _freeze_all(flow, node, "is an output of the network")
        else:
            flow.labels[node.name] = _call(flow, node)
            _note_zeros(flow, node)
    return flow


def _tensor(
    flow: Flow,
    node: Node,
    parameters: Mapping[str, int],
    shared: dict[tuple[int, tuple[int, ...]], Labels],
) -> Labels:
    shape = node.shape
    storage = parameters.get(node.path)
    if storage is None:
        return (None,) * len(shape)
    key = (storage, shape)
    if key not in shared:
        shared[key] = tuple(flow.ledger.fresh(n) if n > 1 else None for n in shape)
    return shared[key]


def _call(flow: Flow, node: Node) -> Carried:
    rule = find(node.op)
    return _fit(flow, node, node.value, rule(flow, node))


def _unknown(flow: Flow, node: Node) -> Carried:
    flow.unknown[node.op] = flow.unknown.get(node.op, 0) + 1
    _freeze_all(flow, node, "is read by an operator that rarefy does not know")
    return _none(node.value)


def _fit(flow: Flow, node: Node, value: Value, carried: Carried) -> Carried:
    """Drop labels of dimensions of size 1, which broadcast: their one entry must stay."""
    if isinstance(value, tuple) and isinstance(carried, tuple):
        pairs = zip(value, carried, strict=True)
        return tuple(_fit(flow, node, part, labels) for part, labels in pairs)
    if not isinstance(value, Spec) or carried is None:
        return carried
    assert len(carried) == len(value.shape)
    alone = [d for d, size in enumerate(value.shape) if size == 1]
    return flow.freeze_dims(node, carried, alone, "is alone in its dimension")


def find(op: str) -> Rule:
    """The rule of an operator: its own row, that of all its overloads, or pointwise by tag.

    Whatever has none freezes all labels that it reads.

    An operator that writes in place (``dropout_``) carries labels like the one that does not.
    """
    family = op.rpartition(".")[0]
    rule = RULES.get(op) or RULES.get(family) or RULES.get(family.removesuffix("_"))
    if rule is not None:
        return rule
    if op.startswith(("operator.", "torch.sym", "math.")):
        return _scalar
    if op.startswith("aten.") and op.split(".")[1] in _UNTAGGED:
        return _pointwise
    if op.startswith("aten.") and torch.Tag.pointwise in getattr(resolve(op), "tags", ()):
        return _pointwise
    return _unknown


_UNTAGGED = frozenset(
    "hardswish hardsigmoid hardtanh log_sigmoid softplus mish relu6 selu celu silu elu rrelu "
    "threshold".split()
)
"""Pointwise operators that PyTorch does not tag as such."""


def _none(value: Value) -> Carried:
    if isinstance(value, Spec):
        return (None,) * len(value.shape)
    if isinstance(value, tuple):
        return tuple(_none(v) for v in value)
    return None


def _freeze_all(flow: Flow, node: Node, reason: str) -> None:
    for name in dict.fromkeys(node.inputs):
        for atoms in _every(flow.labels.get(name)):
            flow.freeze(node, atoms, reason)


def _every(carried: Any) -> list[Atoms]:
    if isinstance(carried, np.ndarray):
        return [carried]
    if isinstance(carried, tuple):
        return [atoms for part in carried for atoms in _every(part)]
    return []


def argument(node: Node, name: str) -> Any:
    """An argument by its name in the operator's declaration, or its default; else None."""
    declared = schema(node.op)
    if name in node.options or declared is None:
        return node.options.get(name)
    for position, formal in enumerate(declared.arguments):
        if formal.name == name:
            given = position < len(node.args)
            return node.args[position] if given else formal.default_value
    return None


# --- zeros: where masked units give zero -------------------------------------------------------


def _note_zeros(flow: Flow, node: Node) -> None:
    """Note whether the node's value vanishes; a write that does not spoils all that share it."""
    if shares_memory(node.op) and node.inputs:
        flow.memory[node.name] = flow.memory.get(node.inputs[0], node.inputs[0])
    if vanishes(flow, node):
        flow.vanishing.add(node.name)
    elif writes(node.op):
        owner = flow.memory[node.name]
        flow.vanishing -= {n for n in flow.vanishing if flow.memory.get(n, n) == owner}


def vanishes(flow: Flow, node: Node) -> bool:
    """Whether the value is zero at masked units, given where its inputs are."""
    rule = ZEROS.get(node.op.split(".")[1].removesuffix("_"))
    return rule is not None and rule(flow, node)


def _always(flow: Flow, node: Node) -> bool:
    return True


def _first(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0])


def _second(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[1])


def _either(flow: Flow, node: Node) -> bool:
    return any(flow.zero(a) for a in node.args[:2])


def _both_zero(flow: Flow, node: Node) -> bool:
    return all(flow.zero(a) for a in node.args[:2])


def _parts_zero(flow: Flow, node: Node) -> bool:
    return all(flow.zero(a) for a in node.args[0])


def _layer_zero(flow: Flow, node: Node) -> bool:
    """Rows of the weight and bias give zero outputs; so do other masked entries without a bias."""
    weight, bias = node.args[1], argument(node, "bias")
    rows = flow.zero(weight) and (bias is None or flow.zero(bias))
    others = any(label is not None for label in flow.of(node.args[0])[:-1])
    if node.op.startswith("aten.linear") and others:
        return rows and bias is None and flow.zero(node.args[0])
    return rows


def _affine_zero(flow: Flow, node: Node) -> bool:
    scale, shift = node.args[1:3]
    return all(isinstance(a, Ref) and flow.zero(a) for a in (scale, shift))


def _padded_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0]) and not argument(node, "value")


_Zero: TypeAlias = "Callable[[Flow, Node], bool]"


def _zeros(rule: _Zero, names: str) -> dict[str, _Zero]:
    return dict.fromkeys(names.split(), rule)


ZEROS: Mapping[str, _Zero] = {
    **_zeros(_always, "zeros zeros_like new_zeros zero"),
    **_zeros(
        _first,
        "relu relu6 gelu silu tanh hardswish hardtanh leaky_relu elu selu celu mish softshrink "
        "hardshrink sin asin tan atan sinh sign neg abs sqrt square dropout alpha_dropout "
        "feature_dropout clone contiguous alias detach to type_as _to_copy view reshape flatten "
        "unflatten permute transpose t movedim mT swapaxes unsqueeze squeeze expand expand_as "
        "broadcast_to repeat slice select split split_with_sizes chunk unbind narrow roll flip "
        "prelu getitem max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean sum "
        "amax amin prod var std norm linalg_vector_norm pixel_shuffle pixel_unshuffle glu "
        "upsample_nearest1d upsample_nearest2d upsample_bilinear2d trunc round div "
        "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine embedding",
    ),
    **_zeros(_second, "copy"),
    **_zeros(_either, "mul"),
    **_zeros(_both_zero, "add sub maximum minimum matmul mm bmm"),
    **_zeros(_parts_zero, "cat stack"),
    **_zeros(
        _layer_zero,
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_zeros(_affine_zero, "batch_norm instance_norm"),
    **_zeros(_padded_zero, "pad constant_pad_nd"),
}
"""Operator, of all overloads and in place or not -> whether its value is zero at masked units."""


def _divisor(node: Node) -> Any:
    return node.args[1]


def _base(node: Node) -> Any:
    return node.args[0]


def _base_of_root(node: Node) -> Any:
    """The base of a power that is, or may be, negative."""
    exponent = node.args[1]
    return node.args[0] if isinstance(exponent, Ref) or exponent < 0 else None


POLES: Mapping[str, Callable[[Node], Any]] = {
    **dict.fromkeys("div divide true_divide floor_divide remainder fmod".split(), _divisor),
    **dict.fromkeys("reciprocal rsqrt log log2 log10 logit".split(), _base),
    "pow": _base_of_root,
}
"""Pointwise operator -> the operand at whose zeros it has no finite value."""


def _refuse_poles(flow: Flow, node: Node) -> None:
    """Masked units must not become infinite: ``inf * 0`` is not 0."""
    pole = POLES.get(node.op.split(".")[1].removesuffix("_"))
    operand = pole(node) if pole else None
    if isinstance(operand, Ref) and flow.zero(operand):
        for atoms in flow.of(operand):
            flow.freeze(node, atoms, "is infinite where masked units give zero")


# --- rules -------------------------------------------------------------------------------------


def _scalar(flow: Flow, node: Node) -> Carried:
    return _none(node.value)


def _same(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])


def _free(flow: Flow, node: Node) -> Carried:
    """A value that does not depend on the entries of its input (a shape, a new tensor)."""
    return _none(node.value)


def _pointwise(flow: Flow, node: Node) -> Carried:
    _refuse_poles(flow, node)
    out = node.shape
    operands = [a for a in (*node.args, *node.options.values()) if isinstance(a, Ref)]
    found: list[Atoms | None] = []
    for d, size in enumerate(out):
        sides: list[Atoms | None] = []
        for operand in operands:
            shape, labels = flow.shape(operand), flow.of(operand)
            e = d - len(out) + len(shape)
            if e >= 0 and shape[e] == size and size > 1:
                sides.append(labels[e])
        found.append(flow.tie(node, *sides) if sides else None)
    return tuple(found)


def _convolution(flow: Flow, node: Node) -> Carried:
    x, weight, bias, groups = _conv_args(flow, node)
    labels, kernel = flow.of(x), flow.of(weight)
    channel = len(labels) - len(kernel) + 1
    n = flow.shape(weight)[0]
    if groups == 1:
        _contract(flow, node, (x, channel), (weight, 1))
        out = kernel[0]
    elif flow.shape(weight)[1] == 1:
        out = _depthwise(flow, node, labels[channel], kernel[0], n)
    else:
        out = _grouped(flow, node, labels[channel], kernel, groups, flow.shape(weight))
    out = _with_bias(flow, node, out, bias)
    return _conv_result(flow, node, labels, channel, out)


def _conv_transpose(flow: Flow, node: Node) -> Carried:
    x, weight, bias, groups = _conv_args(flow, node)
    labels, kernel = flow.of(x), flow.of(weight)
    channel = len(labels) - len(kernel) + 1
    out: Atoms | None
    if groups == 1:
        _contract(flow, node, (x, channel), (weight, 0))
        out = kernel[1]
    else:
        for atoms in (labels[channel], kernel[0], kernel[1]):
            flow.freeze(node, atoms, "grouped transposed convolution")
        out = None
    return _conv_result(flow, node, labels, channel, _with_bias(flow, node, out, bias))


def _conv_args(flow: Flow, node: Node) -> tuple[Any, Any, Any, int]:
    """Input, weight, bias and groups: the latter is the seventh argument of all convolutions."""
    args, options = dict(enumerate(node.args)), node.options
    groups = options.get("groups", args.get(6, 1))
    return args[0], args[1], args.get(2, options.get("bias")), flow.number(groups)


def _both(
    first: Atoms | None, second: Atoms | None, size: int
) -> tuple[()] | tuple[Atoms | None, Atoms | None]:
    """The two sides of a contraction, or nothing where its dimension has size 1."""
    return () if size == 1 else (first, second)


def _contract(flow: Flow, node: Node, first: tuple[Any, int], second: tuple[Any, int]) -> None:
    """Both sides of a sum of products go together, if masked units add nothing to it."""
    sides = [flow.of(arg)[dim] for arg, dim in (first, second)]
    if not (flow.zero(first[0]) or flow.zero(second[0])):
        for atoms in sides:
            flow.freeze(node, atoms, "is summed over, and masked units do not give zero")
    flow.tie(node, *_both(sides[0], sides[1], flow.shape(first[0])[first[1]]))


def _with_bias(flow: Flow, node: Node, out: Atoms | None, bias: Any) -> Atoms | None:
    if not isinstance(bias, Ref):
        return out
    label = flow.of(bias)[0]
    return flow.tie(node, out, label) if out is not None or label is not None else None


def _depthwise(
    flow: Flow, node: Node, channels: Atoms | None, filters: Atoms | None, n: int
) -> Atoms | None:
    if channels is None or filters is None:
        return flow.tie(node, *_both(channels, filters, n))
    flow.counts[node.name, "groups"] = channels
    return flow.tie(node, filters, np.repeat(channels, n // len(channels)))


def _grouped(
    flow: Flow,
    node: Node,
    channels: Atoms | None,
    kernel: Labels,
    groups: int,
    shape: tuple[int, ...],
) -> Atoms | None:
    """A grouped convolution keeps groups of equal size: whole groups go, or a position in all."""
    per_group = shape[1]
    group_in, position_in = flow.ledger.split(channels, (groups, per_group))
    group_out, _ = flow.ledger.split(kernel[0], (groups, shape[0] // groups))
    if channels is None:
        flow.freeze(node, group_out, "grouped convolution of channels that cannot change")
        flow.freeze(node, kernel[1], "grouped convolution of channels that cannot change")
        return kernel[0]
    if group_in is None or (group_out is None and shape[0] > groups):
        flow.freeze(node, channels, "grouped convolution of coupled groups")
        flow.freeze(node, kernel[0], "grouped convolution of coupled groups")
        return None
    flow.tie(node, *_both(position_in, kernel[1], per_group))
    if group_out is None:  # one filter a group: the filters are the groups
        group_out = kernel[0]
    flow.counts[node.name, "groups"] = group_in
    flow.tie(node, group_in, group_out)
    return kernel[0]


def _conv_result(
    flow: Flow, node: Node, labels: Labels, channel: int, out: Atoms | None
) -> Carried:
    spatial = range(channel + 1, len(labels))
    kept = flow.freeze_dims(node, labels, list(spatial), "a convolution slides along it")
    for atoms in flow.of(node.args[1])[2:]:
        flow.freeze(node, atoms, EXTENT)
    return (*kept[:channel], out, *kept[channel + 1 :])


def _linear(flow: Flow, node: Node) -> Carried:
    x, weight, *rest = node.args
    labels, kernel = flow.of(x), flow.of(weight)
    _contract(flow, node, (x, -1), (weight, -1))
    if len(kernel) == 1:
        return labels[:-1]
    bias = rest[0] if rest else node.options.get("bias")
    return (*labels[:-1], _with_bias(flow, node, kernel[0], bias))


def _addmm(flow: Flow, node: Node) -> Carried:
    bias, x, weight = node.args[:3]
    rows, columns = flow.of(x), flow.of(weight)
    _contract(flow, node, (x, 1), (weight, 0))
    return (rows[0], _with_bias(flow, node, columns[1], bias))


def _matmul(flow: Flow, node: Node) -> Carried:
    first, second = node.args[:2]
    a, b = flow.of(first), flow.of(second)
    shapes = flow.shape(first), flow.shape(second)
    rows = len(b) - 2 if len(b) > 1 else 0
    _contract(flow, node, (first, -1), (second, rows))
    head_a, head_b = a[:-2], b[:-2]
    lead = []
    depth = max(len(head_a), len(head_b))
    for d in range(depth):
        sides = []
        for head, shape in ((head_a, shapes[0]), (head_b, shapes[1])):
            e = d - depth + len(head)
            if e >= 0 and shape[e] > 1:
                sides.append(head[e])
        lead.append(flow.tie(node, *sides) if sides else None)
    tail = (a[-2:-1] if len(a) > 1 else ()) + (b[-1:] if len(b) > 1 else ())
    return (*lead, *tail)


def _attention(flow: Flow, node: Node) -> Carried:
    """Scaled dot-product attention (B, ..., H, L, D): heads go together, values' D carries."""
    q, k, v = (flow.of(a) for a in node.args[:3])
    for labels in (q, k):
        flow.freeze(node, labels[-1], "attention scales by the size of its heads")
        flow.freeze(node, labels[-2], "attention normalizes over positions")
    flow.freeze(node, v[-2], "attention normalizes over positions")
    lead = []
    for d in range(len(q) - 2):
        size = node.shape[d]
        sides = [
            labels[d]
            for labels, arg in zip((q, k, v), node.args[:3], strict=True)
            if flow.shape(arg)[d] == size and size > 1
        ]
        if sides and len(sides) == 3:
            lead.append(flow.tie(node, *sides))
        else:  # grouped queries: heads of unequal number
            for labels in (q, k, v):
                flow.freeze(node, labels[d], "heads are shared between queries")
            lead.append(None)
    for extra in (*node.args[3:4], node.options.get("attn_mask")):
        for atoms in flow.of(extra):
            flow.freeze(node, atoms, "is an attention mask")
    return (*lead, None, v[-1])


def _embedding(flow: Flow, node: Node) -> Carried:
    table, index = flow.of(node.args[0]), flow.of(node.args[1])
    flow.freeze(node, table[0], "is looked up by index")
    return (*index, table[1])


def _batch_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    sides = [labels[1]] + [flow.of(a)[0] for a in node.args[1:5] if isinstance(a, Ref)]
    if flow.shape(node.args[0])[1] == 1:
        return labels
    tied = flow.tie(node, *sides)
    if tied is not None:
        flow.counts[node.name, "num_features"] = tied
    return (labels[0], tied, *labels[2:])


def _pool(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    spatial = len(node.args[1]) if isinstance(node.args[1], list | tuple) else 1
    spatial = max(spatial, _rank(node.op))
    found = flow.freeze_dims(
        node, labels, list(range(len(labels) - spatial, len(labels))), "is pooled over"
    )
    return found if isinstance(node.value, Spec) else tuple(found for _ in node.value)  # type: ignore[union-attr]


def _rank(op: str) -> int:
    """2 for ``aten.max_pool2d.default``; 1 where the name says nothing."""
    for rank in (1, 2, 3):
        if f"{rank}d" in op:
            return rank
    return 1


def _reshape(flow: Flow, node: Node) -> Carried:
    return flow.ledger.reshape(flow.of(node.args[0]), flow.shape(node.args[0]), node.shape)


def _permute(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return tuple(labels[d] for d in node.args[1])


def _transpose(flow: Flow, node: Node) -> Carried:
    labels = list(flow.of(node.args[0]))
    if len(labels) > 1:
        first, second = node.args[1:3] if len(node.args) > 2 else (0, 1)
        labels[first], labels[second] = labels[second], labels[first]
    return tuple(labels)


def _movedim(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    source, target = (
        [d % len(labels) for d in ([dims] if isinstance(dims, int) else dims)]
        for dims in node.args[1:3]
    )
    moved = dict(zip(target, source, strict=True))
    rest = (d for d in range(len(labels)) if d not in source)
    return tuple(labels[moved[d] if d in moved else next(rest)] for d in range(len(labels)))


def _last_two(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return (*labels[:-2], labels[-1], labels[-2])


def _glu(flow: Flow, node: Node) -> Carried:
    """The halves of one dimension go together: the first times the sigmoid of the second."""
    labels = flow.of(node.args[0])
    dim = argument(node, "dim") % len(labels)
    half = node.shape[dim]
    if labels[dim] is None:
        return labels
    value = _cut(labels, dim, slice(None, half))
    gate = _cut(labels, dim, slice(half, None))
    flow.tie(node, value[dim], gate[dim])
    return value


def _prelu(flow: Flow, node: Node) -> Carried:
    labels, slope = flow.of(node.args[0]), flow.of(node.args[1])
    if len(labels) < 2 or slope[0] is None:
        return labels
    return (labels[0], flow.tie(node, labels[1], slope[0]), *labels[2:])


def _squeeze(flow: Flow, node: Node) -> Carried:
    """Unsqueeze and squeeze: dimensions of size 1 come and go."""
    return flow.ledger.reshape(flow.of(node.args[0]), flow.shape(node.args[0]), node.shape)


def _expand(flow: Flow, node: Node) -> Carried:
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    pad = len(node.shape) - len(shape)
    return (
        *(None,) * pad,
        *(
            label if n == m else None
            for label, n, m in zip(labels, shape, node.shape[pad:], strict=True)
        ),
    )


def _repeat(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    times = [flow.number(t) for t in node.args[1]]
    pad = len(times) - len(labels)
    carried = (
        None if label is None else np.tile(label, t)
        for label, t in zip(labels, times[pad:], strict=True)
    )
    return (*(None,) * pad, *carried)


def _cat(flow: Flow, node: Node) -> Carried:
    parts = [a for a in node.args[0] if flow.shape(a) != (0,)]
    dim = argument(node, "dim") % len(node.shape)
    found: list[Atoms | None] = []
    for d in range(len(node.shape)):
        sides = [flow.of(a)[d] for a in parts]
        if d != dim:
            found.append(flow.tie(node, *sides) if node.shape[d] > 1 else None)
        elif all(side is None for side in sides):
            found.append(None)
        else:
            found.append(
                np.concatenate(
                    [
                        np.full(flow.shape(a)[d], FIXED) if side is None else side
                        for a, side in zip(parts, sides, strict=True)
                    ]
                )
            )
    return tuple(found)


def _stack(flow: Flow, node: Node) -> Carried:
    ndim = len(node.shape)
    dim = argument(node, "dim") % ndim
    parts = [flow.of(a) for a in node.args[0]]
    shape = flow.shape(node.args[0][0])
    tied = [
        flow.tie(node, *(part[d] for part in parts)) if shape[d] > 1 else None
        for d in range(ndim - 1)
    ]
    return (*tied[:dim], None, *tied[dim:])


def _split(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = argument(node, "dim") % len(labels)
    assert isinstance(node.value, tuple)
    found: list[Labels] = []
    start = 0
    for part in node.value:
        assert isinstance(part, Spec)
        found.append(_cut(labels, dim, slice(start, start + part.shape[dim])))
        start += part.shape[dim]
    return tuple(found)


def _cut(labels: Labels, dim: int, part: slice) -> Labels:
    label = labels[dim]
    cut = None if label is None else label[part]
    return (*labels[:dim], cut, *labels[dim + 1 :])


def _unbind(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = argument(node, "dim") % len(labels)
    flow.freeze(node, labels[dim], "is taken apart one by one")
    assert isinstance(node.value, tuple)
    rest = (*labels[:dim], *labels[dim + 1 :])
    return tuple(rest for _ in node.value)


def _getitem(flow: Flow, node: Node) -> Carried:
    source, index = node.args
    carried = flow.labels.get(source.name)
    return carried[index] if carried is not None else _none(node.value)


def slice_bounds(node: Node) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, stop and step of a slice, the defaults filled in."""
    given = list(node.args[1:])
    dim, start, stop, step = given + [0, None, None, 1][len(given) :]
    return dim, start, stop, step


def _slice(flow: Flow, node: Node) -> Carried:
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    dim, start, stop, step = slice_bounds(node)
    if node.shape == shape:
        return labels
    bounds = [None if b is None else flow.number(b) for b in (start, stop, step)]
    if bounds[2] != 1:
        return flow.freeze_dims(node, labels, [dim], "is sliced with a stride")
    return _cut(labels, dim % len(labels), slice(*bounds))


def _select(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = node.args[1] % len(labels)
    atoms = labels[dim]
    if atoms is not None:
        index = flow.number(node.args[2])
        flow.freeze(node, atoms[[index]], "is selected by its position")
    return (*labels[:dim], *labels[dim + 1 :])


def _pad(flow: Flow, node: Node) -> Carried:
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    amounts = [flow.number(a) for a in node.args[1]]
    constant = "constant" in node.op or (node.args[2:3] or ("constant",))[0] == "constant"
    found = list(labels)
    for i in range(len(amounts) // 2):
        d = len(labels) - 1 - i
        before, after = amounts[2 * i : 2 * i + 2]
        label = labels[d]
        if label is None or before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            flow.freeze(node, label, "is padded by its own values")
            found[d] = None
        else:
            fixed = (np.full(before, FIXED), label, np.full(after, FIXED))
            found[d] = np.concatenate(fixed)
    assert len(shape) == len(found)
    return tuple(found)


def _reduce(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if not isinstance(node.value, Spec):
        _freeze_all(flow, node, "is reduced over")
        return _none(node.value)
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = list(range(len(labels))) if not dims else [d % len(labels) for d in dims]
    if not (node.op.startswith("aten.sum") and flow.zero(node.args[0])):
        flow.freeze_dims(node, labels, dims, "is averaged or reduced over")
    if len(node.shape) == len(labels):
        return tuple(None if d in dims else label for d, label in enumerate(labels))
    return tuple(label for d, label in enumerate(labels) if d not in dims)


def _normalize_last(flow: Flow, node: Node) -> Carried:
    """Layer and RMS norm: normalized over the last dimensions."""
    labels = flow.of(node.args[0])
    count = len(node.args[1])
    dims = range(len(labels) - count, len(labels))
    for arg in node.args[2:4]:
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is normalized over")
    return flow.freeze_dims(node, labels, list(dims), "is normalized over")


def _group_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    for arg in node.args[2:4]:
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is normalized over in groups")
    return flow.freeze_dims(node, labels, range(1, len(labels)), "is normalized over in groups")


def _along_dim(flow: Flow, node: Node) -> Carried:
    """Softmax, cumulative sums: entries along one dimension meet."""
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, [argument(node, "dim")], "entries along it meet")


def _moved(flow: Flow, node: Node) -> Carried:
    """Roll and flip along dimensions that carry no label; others are frozen."""
    labels = flow.of(node.args[0])
    dims = argument(node, "dims") or range(len(labels))
    return flow.freeze_dims(node, labels, list(dims), "is moved along")


def _upsample(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, range(2, len(labels)), "is resampled")


def _pixel_shuffle(flow: Flow, node: Node) -> Carried:
    """(C r r, H, W) -> (C, H r, W r): the r r channels of a pixel go together."""
    labels = flow.of(node.args[0])
    block = int(node.args[1]) ** 2
    atoms = labels[-3]
    if atoms is None or block == 1:
        return labels
    channel, inner = flow.ledger.split(atoms, (len(atoms) // block, block))
    flow.freeze(node, inner, "is shuffled into pixels")
    lead = flow.freeze_dims(node, labels, [-2, -1], "is shuffled into pixels")
    return (*lead[:-3], channel, None, None)


def _pixel_unshuffle(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    block = int(node.args[1]) ** 2
    atoms = labels[-3]
    lead = flow.freeze_dims(node, labels, [-2, -1], "is shuffled into channels")
    return (*lead[:-3], None if atoms is None else np.repeat(atoms, block), None, None)


def _fake_quantize(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if "per_channel" not in node.op:
        return labels
    axis = node.args[3]
    sides = [labels[axis], *(flow.of(a)[0] for a in node.args[1:3])]
    tied = flow.tie(node, *sides) if flow.shape(node.args[0])[axis] > 1 else None
    return (*labels[:axis], tied, *labels[axis + 1 :])


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: Mapping[str, Rule] = {
    "operator.getitem": _getitem,
    **_rows(_convolution, "conv1d conv2d conv3d"),
    **_rows(_conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_rows(_linear, "linear"),
    **_rows(_addmm, "addmm"),
    **_rows(_matmul, "matmul mm bmm"),
    **_rows(_attention, "scaled_dot_product_attention"),
    **_rows(_embedding, "embedding"),
    **_rows(_batch_norm, "batch_norm instance_norm"),
    **_rows(_normalize_last, "layer_norm rms_norm"),
    **_rows(_group_norm, "group_norm"),
    **_rows(
        _pool,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d max_pool2d_with_indices",
    ),
    "aten.view.dtype": _unknown,
    **_rows(_reshape, "view reshape flatten unflatten _unsafe_view view_as reshape_as"),
    **_rows(_permute, "permute"),
    **_rows(_transpose, "transpose t swapaxes swapdims"),
    **_rows(_movedim, "movedim moveaxis"),
    **_rows(_last_two, "mT"),
    **_rows(_glu, "glu"),
    **_rows(_squeeze, "unsqueeze squeeze"),
    **_rows(_expand, "expand expand_as broadcast_to"),
    **_rows(_repeat, "repeat"),
    **_rows(_cat, "cat concat concatenate"),
    **_rows(_stack, "stack"),
    **_rows(_split, "split split_with_sizes chunk"),
    **_rows(_unbind, "unbind"),
    **_rows(_slice, "slice"),
    **_rows(_select, "select"),
    **_rows(_pad, "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d"),
    **_rows(_reduce, "mean sum amax amin prod var std any all norm linalg_vector_norm logsumexp"),
    **_rows(_along_dim, "softmax log_softmax cumsum"),
    **_rows(_moved, "roll flip"),
    **_rows(
        _upsample,
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d upsample_trilinear3d",
    ),
    **_rows(_prelu, "prelu"),
    **_rows(_pixel_shuffle, "pixel_shuffle"),
    **_rows(_pixel_unshuffle, "pixel_unshuffle"),
    **_rows(_fake_quantize, "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"),
    **_rows(
        _same,
        "dropout alpha_dropout feature_dropout feature_alpha_dropout clone contiguous alias detach "
        "to type_as _to_copy zeros_like ones_like full_like rand_like randn_like "
        "empty_like",
    ),
    **_rows(
        _free,
        "sym_size zeros ones full empty arange rand randn new_zeros new_ones new_full "
        "new_empty scalar_tensor eye linspace",
    ),
}
"""Operator (of one overload or all) -> rule. Pointwise operators need no row."""
