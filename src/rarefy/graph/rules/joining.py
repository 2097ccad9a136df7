"""Operators that join tensors and take them apart: labels are joined and cut like the entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled, zero_as_first
from rarefy.graph.labels import FIXED, Atoms, Labels
from rarefy.graph.program import Node, Spec
from rarefy.graph.rules.picking import cut


def _broadcast_tensors(flow: Flow, node: Node) -> Carried:
    assert isinstance(node.value, tuple)
    shape = next((part.shape for part in node.value if isinstance(part, Spec)), ())
    found = [
        flow.tie(node, *sides) if (sides := _meeting(flow, node.args[0], d, shape)) else None
        for d in range(len(shape))
    ]
    return tuple(tuple(found) for _ in node.value)


def _meeting(flow: Flow, operands: list[Any], d: int, shape: tuple[int, ...]) -> list[Atoms | None]:
    """Labels of all operands that are not broadcast along a dimension of the result."""
    sides = []
    for operand in operands:
        own = flow.shape(operand)
        e = d - len(shape) + len(own)
        if e >= 0 and own[e] == shape[d] > 1:
            sides.append(flow.of(operand)[e])
    return sides


def _meshgrid(flow: Flow, node: Node) -> Carried:
    lines = [flow.of(a)[0] if flow.of(a) else None for a in node.args[0]]
    if node.argument("indexing") == "xy" and len(lines) > 1:
        lines[:2] = lines[1::-1]
    assert isinstance(node.value, tuple)
    return tuple(tuple(lines) for _ in node.value)


def _along_cat(flow: Flow, node: Node) -> int | None:
    """The dimension along which the parts of a cat, hstack or vstack follow each other."""
    if node.kind in CAT_DIM:
        dim, parts = CAT_DIM[node.kind], [flow.shape(a) for a in node.args[0]]
        if dim == 1 and len(node.shape) == 1 and node.kind == "hstack":
            return 0
        return dim if all(len(shape) == len(node.shape) for shape in parts) else None
    dim = node.argument("dim")
    return dim % len(node.shape) if isinstance(dim, int) else None


CAT_DIM = {"hstack": 1, "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}
"""Relatives of cat -> the dimension along which they join tensors of its rank."""


def _cat(flow: Flow, node: Node) -> Carried:
    parts = [a for a in node.args[0] if flow.shape(a) != (0,)]
    dim = _along_cat(flow, node)
    if dim is None:
        freeze_all(flow, node, "is joined with tensors of another rank")
        return unlabeled(node.value)
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
    dim = node.argument("dim") % ndim
    parts = [flow.of(a) for a in node.args[0]]
    shape = flow.shape(node.args[0][0])
    tied = [
        flow.tie(node, *(part[d] for part in parts)) if shape[d] > 1 else None
        for d in range(ndim - 1)
    ]
    return (*tied[:dim], None, *tied[dim:])


SPLIT_DIM = {"hsplit": 1, "vsplit": 0, "dsplit": 2}
"""Relatives of split -> the dimension that they split."""


def _along_split(flow: Flow, node: Node) -> int:
    rank = len(flow.shape(node.args[0]))
    if node.kind in SPLIT_DIM:
        return min(SPLIT_DIM[node.kind], rank - 1)
    return int(node.argument("dim")) % rank


def _split(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = _along_split(flow, node)
    assert isinstance(node.value, tuple)
    sizes = [part.shape[dim] for part in node.value if isinstance(part, Spec)]
    if sum(sizes) != flow.shape(node.args[0])[dim]:
        freeze_all(flow, node, "is taken apart at places that overlap")
        return unlabeled(node.value)
    found: list[Labels] = []
    start = 0
    for part in node.value:
        assert isinstance(part, Spec)
        found.append(cut(labels, dim, slice(start, start + part.shape[dim])))
        start += part.shape[dim]
    return tuple(found)


def _glu(flow: Flow, node: Node) -> Carried:
    """The halves of one dimension go together: the first times the sigmoid of the second."""
    labels = flow.of(node.args[0])
    dim = node.argument("dim") % len(labels)
    half = node.shape[dim]
    if labels[dim] is None:
        return labels
    value = cut(labels, dim, slice(None, half))
    gate = cut(labels, dim, slice(half, None))
    flow.tie(node, value[dim], gate[dim])
    return value


def _unbind(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = node.argument("dim") % len(labels)
    flow.freeze(node, labels[dim], "is taken apart one by one")
    assert isinstance(node.value, tuple)
    rest = (*labels[:dim], *labels[dim + 1 :])
    return tuple(rest for _ in node.value)


def _getitem(flow: Flow, node: Node) -> Carried:
    source, index = node.args
    carried = flow.labels.get(source.name)
    return carried[index] if carried is not None else unlabeled(node.value)


def _apart(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "is taken apart at computed places")
    return unlabeled(node.value)


SPLITS = (
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk"
)


def _edit_parts(editor: Editor, node: Node) -> Node:
    """split, chunk: parts of the sizes that remain."""
    dim = _along_split(editor.flow, node)
    if editor.gone(node, 0, dim) is None:
        return node
    assert isinstance(node.value, tuple)
    sizes = [part.shape[dim] for part in node.value if isinstance(part, Spec)]
    return replace(
        node, op="aten.split_with_sizes.default", args=(node.args[0], sizes, dim), kwargs={}
    )


def _parts_zero(flow: Flow, node: Node) -> bool:
    """Every part is zero where masked, or cannot lose anything."""
    return all(
        flow.zero(part) or all(atoms is None for atoms in flow.of(part)) for part in node.args[0]
    )


ROWS: Mapping[str, Rule] = {
    "operator.getitem": _getitem,
    **rows(_broadcast_tensors, "broadcast_tensors"),
    **rows(_meshgrid, "meshgrid"),
    **rows(_cat, f"cat concat concatenate {' '.join(CAT_DIM)}"),
    **rows(_stack, "stack"),
    **rows(_split, f"{SPLITS} {' '.join(SPLIT_DIM)}"),
    "aten.tensor_split.tensor_indices_or_sections": _apart,
    **rows(_unbind, "unbind"),
    **rows(_glu, "glu"),
}
"""Operator -> rule."""

EDITS: Mapping[str, Edit] = {
    **dict.fromkeys((*SPLITS.split(), *SPLIT_DIM), _edit_parts),
}
"""Operator -> how the sizes in its arguments follow the labels."""

ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(("unbind", "glu", "getitem", *SPLITS.split(), *SPLIT_DIM), zero_as_first),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", *CAT_DIM), _parts_zero),
}
"""Operator, in place or not -> whether its value is zero at masked units."""
