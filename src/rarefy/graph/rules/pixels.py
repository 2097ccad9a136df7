"""Operators on pixels: padding, patches, sampling by a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled, zero_as_first
from rarefy.graph.labels import FIXED
from rarefy.graph.program import Node, Ref


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
        if not constant or any(isinstance(a, Ref) for a in node.args[1]):
            flow.freeze(node, label, "is padded by its own values")
            found[d] = None
            continue
        inner = label[max(-before, 0) : len(label) + min(after, 0)]
        fixed = (np.full(max(before, 0), FIXED), inner, np.full(max(after, 0), FIXED))
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


def _im2col(flow: Flow, node: Node) -> Carried:
    """(C, H, W) -> (C kh kw, positions)."""
    labels = flow.of(node.args[0])
    lead = flow.freeze_dims(node, labels, [-2, -1], "is unfolded into windows")
    atoms = labels[-3]
    block = node.shape[-2] // flow.shape(node.args[0])[-3]
    return (*lead[:-3], None if atoms is None else np.repeat(atoms, block), None)


def _col2im(flow: Flow, node: Node) -> Carried:
    """(C kh kw, positions) -> (C, H, W): the entries of a window go together."""
    labels = flow.of(node.args[0])
    lead = flow.freeze_dims(node, labels, [-1], "is folded into an image")
    sizes = (node.shape[-3], flow.shape(node.args[0])[-2] // node.shape[-3])
    channel, inner = flow.ledger.split(labels[-2], sizes)
    flow.freeze(node, inner, "is folded into an image")
    return (*lead[:-2], channel, None, None)


def _unfold(flow: Flow, node: Node) -> Carried:
    """Windows along one dimension, each in a new last one."""
    labels = flow.of(node.args[0])
    if not labels:
        return (None,)
    return (*flow.freeze_dims(node, labels, [node.args[1]], "is cut into windows"), None)


def _affine_grid(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "is a matrix of an affine map")
    return unlabeled(node.value)


def _grid_sample(flow: Flow, node: Node) -> Carried:
    """Images (B, C, ...) read at positions (B, ..., 2): channels carry."""
    labels, grid = flow.of(node.args[0]), flow.of(node.args[1])
    for atoms in (*labels[2:], *grid[1:]):
        flow.freeze(node, atoms, "is sampled at positions")
    batch = flow.tie(node, labels[0], grid[0]) if node.shape[0] > 1 else None
    return (batch, labels[1], *(None,) * (len(labels) - 2))


def _max_unpool(flow: Flow, node: Node) -> Carried:
    """Values (..., C, spatial) put at positions that have the same leading dimensions."""
    labels, places = flow.of(node.args[0]), flow.of(node.args[1])
    lead = len(labels) - int(node.kind[-2])
    for atoms in (*labels[lead:], *places[lead:]):
        flow.freeze(node, atoms, "is unpooled")
    tied = [
        flow.tie(node, *sides) if n > 1 else None
        for n, *sides in zip(node.shape[:lead], labels, places, strict=False)
    ]
    return (*tied, *(None,) * (len(labels) - lead))


def _edit_pad(editor: Editor, node: Node) -> Node:
    """Where entries are cut off, as many as are left of them."""
    labels = editor.flow.of(node.args[0])
    amounts = list(node.args[1])
    for i in range(len(amounts) // 2):
        gone = editor.hit(labels[len(labels) - 1 - i])
        if gone is None:
            continue
        before, after = amounts[2 * i : 2 * i + 2]
        if before < 0:
            amounts[2 * i] = -int((~gone[:-before]).sum())
        if after < 0:
            amounts[2 * i + 1] = -int((~gone[after:]).sum())
    return replace(node, args=(node.args[0], amounts, *node.args[2:]))


def _padded_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0]) and not node.argument("value")


PADS = "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d"

ROWS: Mapping[str, Rule] = {
    **rows(_pad, PADS),
    **rows(_im2col, "im2col"),
    **rows(_col2im, "col2im"),
    **rows(_unfold, "unfold"),
    **rows(_affine_grid, "affine_grid_generator"),
    **rows(_grid_sample, "grid_sampler grid_sampler_2d grid_sampler_3d"),
    **rows(_max_unpool, "max_unpool2d max_unpool3d"),
    **rows(_pixel_shuffle, "pixel_shuffle"),
    **rows(_pixel_unshuffle, "pixel_unshuffle"),
}
"""Operator -> rule."""

EDITS: Mapping[str, Edit] = {
    **dict.fromkeys(("constant_pad_nd", "pad"), _edit_pad),
}
"""Operator -> how the sizes in its arguments follow the labels."""

ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        "pixel_shuffle pixel_unshuffle im2col col2im unfold grid_sampler grid_sampler_2d "
        "grid_sampler_3d max_unpool2d max_unpool3d".split(),
        zero_as_first,
    ),
    **dict.fromkeys(PADS.split(), _padded_zero),
}
"""Operator, in place or not -> whether its value is zero at masked units."""
