"""Operators that move, cut and join entries: labels move with them, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, rows, unlabeled
from rarefy.graph.labels import FIXED, Atoms, Labels
from rarefy.graph.program import Node, Ref, Spec


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
    dim = node.argument("dim") % len(node.shape)
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


def _split(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim = node.argument("dim") % len(labels)
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


def _glu(flow: Flow, node: Node) -> Carried:
    """The halves of one dimension go together: the first times the sigmoid of the second."""
    labels = flow.of(node.args[0])
    dim = node.argument("dim") % len(labels)
    half = node.shape[dim]
    if labels[dim] is None:
        return labels
    value = _cut(labels, dim, slice(None, half))
    gate = _cut(labels, dim, slice(half, None))
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


def slice_bounds(node: Node) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, stop and step of a slice, the defaults filled in."""
    dim, start, stop, step = (node.argument(name) for name in ("dim", "start", "end", "step"))
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
    constant = node.kind == "constant_pad_nd" or node.argument("mode") == "constant"
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


def _moved(flow: Flow, node: Node) -> Carried:
    """Roll and flip along dimensions that carry no label; others are frozen."""
    labels = flow.of(node.args[0])
    dims = node.argument("dims") or range(len(labels))
    return flow.freeze_dims(node, labels, list(dims), "is moved along")


ROWS: Mapping[str, Rule] = {
    "operator.getitem": _getitem,
    **rows(
        _reshape,
        "view reshape flatten unflatten _unsafe_view view_as reshape_as unsqueeze squeeze",
    ),
    **rows(_permute, "permute"),
    **rows(_transpose, "transpose t swapaxes swapdims"),
    **rows(_movedim, "movedim moveaxis"),
    **rows(_last_two, "mT"),
    **rows(_expand, "expand expand_as broadcast_to"),
    **rows(_repeat, "repeat"),
    **rows(_cat, "cat concat concatenate"),
    **rows(_stack, "stack"),
    **rows(_split, "split split_with_sizes chunk"),
    **rows(_unbind, "unbind"),
    **rows(_glu, "glu"),
    **rows(_slice, "slice"),
    **rows(_select, "select"),
    **rows(_pad, "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d"),
    **rows(_moved, "roll flip"),
    **rows(_pixel_shuffle, "pixel_shuffle"),
    **rows(_pixel_unshuffle, "pixel_unshuffle"),
}
"""Operator -> rule."""


def _edit_sizes(editor: Editor, node: Node) -> Node:
    """view, reshape, expand: the sizes asked for are those of the result.

    A size that depends on the batch is left to be inferred.
    """
    labels = editor.flow.labels[node.name]
    asked = list(node.args[1])
    for d, atoms in enumerate(labels):
        if atoms is not None and editor.missing[atoms].any() and asked[d] != -1:
            asked[d] = -1 if isinstance(asked[d], Ref) else node.shape[d]
    return replace(node, args=(node.args[0], asked, *node.args[2:]))


def _edit_unflatten(editor: Editor, node: Node) -> Node:
    x, dim, asked = node.args
    dim %= len(editor.flow.of(x))
    return replace(node, args=(x, dim, list(node.shape[dim : dim + len(asked)])))


def _edit_parts(editor: Editor, node: Node) -> Node:
    """split, chunk: parts of the sizes that remain."""
    dim = node.argument("dim")
    if editor.gone(node, 0, dim) is None:
        return node
    assert isinstance(node.value, tuple)
    sizes = [part.shape[dim] for part in node.value if isinstance(part, Spec)]
    return replace(
        node, op="aten.split_with_sizes.default", args=(node.args[0], sizes, dim), kwargs={}
    )


def _edit_slice(editor: Editor, node: Node) -> Node:
    dim, start, stop, step = slice_bounds(node)
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    before = ~gone[: slice(start, stop, step).indices(len(gone))[0]]
    first = int(before.sum())
    size = node.shape[dim]
    return replace(node, args=(node.args[0], dim, first, first + size, 1))


def _edit_select(editor: Editor, node: Node) -> Node:
    x, dim, index = node.args
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    return replace(node, args=(x, dim, int((~gone[: index % len(gone)]).sum())))


EDITS: Mapping[str, Edit] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _edit_sizes),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _edit_parts),
    "unflatten": _edit_unflatten,
    "slice": _edit_slice,
    "select": _edit_select,
}
"""Operator -> how the sizes in its arguments follow the labels."""
