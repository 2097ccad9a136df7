"""Operators that multiply and sum: both sides of the summed dimension go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import EXTENT, Carried, Flow, Rule, rows
from rarefy.graph.labels import Atoms, Labels
from rarefy.graph.program import Node, Ref


def _convolution(flow: Flow, node: Node) -> Carried:
    x, weight = node.args[:2]
    groups = flow.number(node.argument("groups"))
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
    out = _with_bias(flow, node, out, node.argument("bias"))
    return _conv_result(flow, node, labels, channel, out)


def _conv_transpose(flow: Flow, node: Node) -> Carried:
    x, weight = node.args[:2]
    groups = flow.number(node.argument("groups"))
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
    out = _with_bias(flow, node, out, node.argument("bias"))
    return _conv_result(flow, node, labels, channel, out)


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
    x, weight = node.args[:2]
    labels, kernel = flow.of(x), flow.of(weight)
    _contract(flow, node, (x, -1), (weight, -1))
    if len(kernel) == 1:
        return labels[:-1]
    return (*labels[:-1], _with_bias(flow, node, kernel[0], node.argument("bias")))


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
    for atoms in flow.of(node.argument("attn_mask")):
        flow.freeze(node, atoms, "is an attention mask")
    return (*lead, None, v[-1])


def _embedding(flow: Flow, node: Node) -> Carried:
    table, index = flow.of(node.args[0]), flow.of(node.args[1])
    flow.freeze(node, table[0], "is looked up by index")
    return (*index, table[1])


ROWS: Mapping[str, Rule] = {
    **rows(_convolution, "conv1d conv2d conv3d"),
    **rows(_conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **rows(_linear, "linear"),
    **rows(_addmm, "addmm"),
    **rows(_matmul, "matmul mm bmm"),
    **rows(_attention, "scaled_dot_product_attention"),
    **rows(_embedding, "embedding"),
}
"""Operator -> rule."""


def _edit_groups(editor: Editor, node: Node) -> Node:
    atoms = editor.flow.counts.get((node.name, "groups"))
    if atoms is None:
        return node
    groups = editor.left(0, atoms)
    return replace(node, args=(*node.args[:6], groups, *node.args[7:]))


EDITS: Mapping[str, Edit] = dict.fromkeys(("conv1d", "conv2d", "conv3d"), _edit_groups)
"""Operator -> how the sizes in its arguments follow the labels."""
