"""Brackets, gather, scatter and their like: entries read or written by position.

Where the positions are known at capture, labels are picked like the entries, as in
:mod:`rarefy.graph.rules.picking`. A dimension that is indexed by anything else is frozen; the
others carry their labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled, zero_as_first
from rarefy.graph.labels import Atoms, Labels
from rarefy.graph.program import Node, Ref, Spec
from rarefy.graph.rules.picking import LOOKED_UP, edit_picked, pick, positions

# --- index with brackets -----------------------------------------------------------------------


@dataclass(frozen=True)
class Lookup:
    """How ``x[..., index, ...]`` puts a result together.

    Attributes:
        dims: dimensions of ``x`` that are indexed.
        at: position of the index's own dimensions in the result.
        rank: how many dimensions the index has.
        rest: the other dimensions of ``x``, in order.
    """

    dims: tuple[int, ...]
    at: int
    rank: int
    rest: tuple[int, ...]

    def join(self, labels: Labels) -> Labels:
        """Labels of the result; the dimensions of the index carry none."""
        others = tuple(labels[d] for d in self.rest)
        return (*others[: self.at], *(None,) * self.rank, *others[self.at :])


def lookup(flow: Flow, x: Any, indices: Sequence[Any]) -> Lookup:
    """Which dimensions are indexed, and where those of the index go."""
    dims: list[int] = []
    starts: list[int] = []
    ranks = [0]
    at = 0
    for place, index in enumerate(indices):
        if not isinstance(index, Ref):
            at += 1
            continue
        value = flow.graph.by_name[index.name].value
        is_mask = isinstance(value, Spec) and value.dtype in (torch.bool, torch.uint8)
        width = len(flow.shape(index)) if is_mask else 1
        ranks.append(1 if is_mask else len(flow.shape(index)))
        dims += range(at, at + width)
        starts.append(place)
        at += width
    rest = tuple(d for d in range(len(flow.shape(x))) if d not in dims)
    joined = not starts or starts[-1] - starts[0] == len(starts) - 1
    first = dims[0] if dims and joined else 0
    return Lookup(tuple(dims), first, max(ranks), rest)


def _index(flow: Flow, node: Node) -> Carried:
    x, indices = node.args[:2]
    found = lookup(flow, x, indices)
    _freeze_indices(flow, node, indices)
    only = _only_index(flow, node)
    if only is not None:
        return pick(flow, node, *only)
    labels = flow.freeze_dims(node, flow.of(x), found.dims, LOOKED_UP)
    carried = found.join(labels)
    if len(carried) == len(node.shape):
        return carried
    freeze_all(flow, node, LOOKED_UP)
    return unlabeled(node.value)


def _freeze_indices(flow: Flow, node: Node, indices: Sequence[Any]) -> None:
    for index in indices:
        for atoms in flow.of(index):
            flow.freeze(node, atoms, "is used as positions")


def _only_index(flow: Flow, node: Node) -> tuple[int, Atoms] | None:
    """The one dimension that is indexed, by a line of known positions; else None."""
    places = [(d, i) for d, i in enumerate(node.args[1]) if isinstance(i, Ref)]
    if len(places) != 1:
        return None
    dim, index = places[0]
    if len(flow.shape(index)) != 1 or flow.of(node.args[0])[dim] is None:
        return None
    entries = positions(flow, index, flow.shape(node.args[0])[dim])
    return None if entries is None else (dim, entries)


def _edit_index(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
    only = _only_index(editor.flow, node)
    return node if only is None else edit_picked(lambda flow, node: only)(editor, node)


def _index_put(flow: Flow, node: Node) -> Carried:
    """Entries written at positions: what is written is aligned with what an index would read."""
    x, indices, written = node.args[:3]
    found = lookup(flow, x, indices)
    _freeze_indices(flow, node, indices)
    labels = flow.freeze_dims(node, flow.of(x), found.dims, "is written by index")
    target = found.join(labels)
    shape = [flow.shape(x)[d] for d in found.rest]
    sizes = (*shape[: found.at], *(0,) * found.rank, *shape[found.at :])
    own, own_shape = flow.of(written), flow.shape(written)
    for d, atoms in enumerate(own):
        place = d - len(own) + len(target)
        if own_shape[d] == 1:
            continue
        if place < 0 or sizes[place] != own_shape[d]:
            flow.freeze(node, atoms, "is written by index")
            if place >= 0:
                flow.freeze(node, target[place], "is written by index")
        else:
            flow.tie(node, target[place], atoms)
    return labels


# --- gather, scatter and their like ------------------------------------------------------------


def _aligned(flow: Flow, node: Node, dim: int, others: Sequence[Any]) -> Labels:
    """Along all dimensions but one, the other tensors are aligned with the first by position."""
    x = node.args[0]
    labels, shape = list(flow.of(x)), flow.shape(x)
    for other in others:
        own, own_shape = flow.of(other), flow.shape(other)
        for d, atoms in enumerate(own):
            if d != dim and len(own) == len(shape) and own_shape[d] == shape[d]:
                labels[d] = flow.tie(node, labels[d], atoms) if shape[d] > 1 else None
                continue
            flow.freeze(node, atoms, LOOKED_UP)
            if d < len(labels):
                flow.freeze(node, labels[d], LOOKED_UP)
                labels[d] = None
    if labels:
        flow.freeze(node, labels[dim], LOOKED_UP)
        labels[dim] = None
    return tuple(labels)


def _dim(flow: Flow, node: Node) -> int | None:
    dim, rank = node.argument("dim"), len(flow.shape(node.args[0]))
    return dim % max(rank, 1) if isinstance(dim, int) else None


def _along(flow: Flow, node: Node) -> Carried:
    """gather and scatter: one dimension by index, the others side by side."""
    dim = _dim(flow, node)
    tensors = [Ref(name) for name in node.inputs[1:]]
    if dim is None or len(flow.shape(node.args[0])) != len(node.shape):
        freeze_all(flow, node, LOOKED_UP)
        return unlabeled(node.value)
    return _aligned(flow, node, dim, [t for t in tensors if flow.shape(t)])


def _rows_of(flow: Flow, node: Node) -> Carried:
    """index_add, index_copy: a line of positions, and a tensor whose other dimensions fit."""
    dim = _dim(flow, node)
    if dim is None:
        freeze_all(flow, node, LOOKED_UP)
        return unlabeled(node.value)
    index, source = node.argument("index"), node.argument("source")
    _freeze_indices(flow, node, [index])
    return _aligned(flow, node, dim, [source] if isinstance(source, Ref) else [])


def _index_fill(flow: Flow, node: Node) -> Carried:
    _freeze_indices(flow, node, [node.args[2]])
    return flow.freeze_dims(node, flow.of(node.args[0]), [node.args[1]], LOOKED_UP)


# --- writes into a part ------------------------------------------------------------------------


def _slice_scatter(flow: Flow, node: Node) -> Carried:
    labels, part = flow.of(node.args[0]), flow.of(node.args[1])
    dim = node.argument("dim") % len(labels)
    if any(isinstance(b, Ref) for b in node.args[3:]) or not _one_type(flow, node):
        freeze_all(flow, node, "is written at places that follow the batch, or as another type")
        return unlabeled(node.value)
    bounds = [node.argument(name) for name in ("start", "end", "step")]
    cut = slice(*(None if b is None else flow.number(b) for b in bounds))
    found: list[Atoms | None] = []
    for d, (whole, own) in enumerate(zip(labels, part, strict=True)):
        if d != dim:
            found.append(flow.tie(node, whole, own) if node.shape[d] > 1 else None)
            continue
        written = None if whole is None else whole[cut]
        if whole is None or own is None:
            flow.freeze(node, written, LOOKED_UP)
            flow.freeze(node, own, LOOKED_UP)
        else:
            flow.tie(node, written, own)
        found.append(whole)
    return tuple(found)


def _one_type(flow: Flow, node: Node) -> bool:
    values = [flow.graph.by_name[arg.name].value for arg in node.args[:2]]
    return len({value.dtype for value in values if isinstance(value, Spec)}) == 1


def _edit_slice_scatter(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
    dim = node.argument("dim") % len(node.shape)
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    flow = editor.flow
    bounds = [node.argument(name) for name in ("start", "end", "step")]
    cut = slice(*(None if b is None else flow.number(b) for b in bounds))
    entries = np.arange(*cut.indices(len(gone)))
    places = (np.cumsum(~gone) - 1)[entries[~gone[entries]]]
    path = editor.unused(f"{node.name}_entries")
    editor.constants[path] = torch.from_numpy(np.ascontiguousarray(places, np.int64))
    line = Node(path, "tensor", (path,), value=Spec((len(places),), torch.int64))
    args = (node.args[0], dim, Ref(path), node.args[1])
    return (line, replace(node, op="aten.index_copy.default", args=args, kwargs={}))


def _select_scatter(flow: Flow, node: Node) -> Carried:
    labels, part = flow.of(node.args[0]), flow.of(node.args[1])
    dim = node.args[2] % len(labels)
    atoms = labels[dim]
    if atoms is not None:
        flow.freeze(node, atoms[[flow.number(node.args[3])]], "is written by its position")
    others = (*labels[:dim], *labels[dim + 1 :])
    sizes = (*node.shape[:dim], *node.shape[dim + 1 :])
    tied = [
        flow.tie(node, whole, own) if n > 1 else None
        for whole, own, n in zip(others, part, sizes, strict=True)
    ]
    return (*tied[:dim], atoms, *tied[dim:])


def _edit_select_scatter(editor: Editor, node: Node) -> Node:
    x, part, dim, index = node.args
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    return replace(node, args=(x, part, dim, int((~gone[: index % len(gone)]).sum())))


ROWS: Mapping[str, Rule] = {
    **rows(_index, "index"),
    **rows(_index_put, "index_put"),
    **rows(_along, "gather take_along_dim scatter scatter_add scatter_reduce"),
    **rows(_rows_of, "index_add index_copy index_reduce"),
    **rows(_index_fill, "index_fill"),
    **rows(_slice_scatter, "slice_scatter"),
    **rows(_select_scatter, "select_scatter"),
}
"""Operator -> rule."""


EDITS: Mapping[str, Edit] = {
    "index": _edit_index,
    "slice_scatter": _edit_slice_scatter,
    "select_scatter": _edit_select_scatter,
}
"""Operator -> how the positions in its arguments follow the labels."""


# --- where masked units give zero --------------------------------------------------------------


def _written_too(position: int) -> Zero:
    """Zero where the tensor is, and what is written into it (a number or a tensor) is."""

    def rule(flow: Flow, node: Node) -> bool:
        written = node.args[position] if len(node.args) > position else None
        zero = written is not None and flow.zero(written)
        labelled = [d for d, atoms in enumerate(flow.labels[node.name]) if atoms is not None]
        own = flow.of(written) if isinstance(written, Ref) else flow.labels[node.name]
        reach = [d - len(node.shape) + len(own) for d in labelled]
        return (
            zero and flow.zero(node.args[0]) and all(d >= 0 and own[d] is not None for d in reach)
        )

    return rule


def _put_zero(flow: Flow, node: Node) -> bool:
    """What is written is aligned from the right, behind the dimensions that are indexed."""
    found = lookup(flow, node.args[0], node.args[1])
    labelled = [d for d, atoms in enumerate(flow.labels[node.name]) if atoms is not None]
    behind = all(d > max(found.dims, default=-1) for d in labelled)
    return behind and _written_too(2)(flow, node)


def _slice_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0]) and flow.zero(node.args[1])


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(("index", "gather", "take_along_dim"), zero_as_first),
    **dict.fromkeys("scatter scatter_add scatter_reduce".split(), _written_too(3)),
    **dict.fromkeys("index_add index_copy index_reduce index_fill".split(), _written_too(3)),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _slice_zero),
    "index_put": _put_zero,
}
"""Operator, in place or not -> whether its value is zero at masked units."""
