"""Operators that arrange the entries of one tensor anew: labels move with them, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled, zero_as_first
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref
from rarefy.graph.rules.picking import cut, edit_strided, strided


def _reshape(flow: Flow, node: Node) -> Carried:
    if 0 in node.shape:
        freeze_all(flow, node, "is viewed while it has no entries")
        return unlabeled(node.value)
    return flow.ledger.reshape(flow.of(node.args[0]), flow.shape(node.args[0]), node.shape)


def _like(flow: Flow, node: Node) -> Carried:
    """view_as, expand_as: the sizes are those of another tensor, which stays in step."""
    carried = _expand(flow, node) if node.kind == "expand_as" else _reshape(flow, node)
    other = flow.of(node.args[1])
    sides = zip(carried, other, node.shape, strict=True)
    return tuple(flow.tie(node, own, theirs) if n > 1 else None for own, theirs, n in sides)


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
    return (*labels[:-2], labels[-1], labels[-2]) if len(labels) > 1 else labels


def _reversed(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])[::-1]


def _expand(flow: Flow, node: Node) -> Carried:
    """One entry shown as many: as many as are asked for, so that they follow what they meet."""
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    asked = node.args[1] if node.kind != "expand_as" else node.shape
    pad = len(node.shape) - len(shape)
    labels, shape = ((None,) * pad + labels, (1,) * pad + shape)
    return tuple(
        label if n == m or isinstance(size, Ref) else flow.ledger.fresh(m)
        for label, n, m, size in zip(labels, shape, node.shape, asked, strict=True)
    )


def _times(flow: Flow, node: Node) -> list[Any]:
    """How often each dimension of the result repeats one of the input."""
    times = list(node.args[1])
    return [1] * (len(node.shape) - len(times)) + times


def _repeat(flow: Flow, node: Node) -> Carried:
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    pad = len(node.shape) - len(labels)
    found: list[Atoms | None] = []
    for d, times in enumerate(_times(flow, node)):
        n, label = (shape[d - pad], labels[d - pad]) if d >= pad else (1, None)
        if label is not None:
            found.append(np.tile(label, flow.number(times)))
        elif n == 1 < node.shape[d] and not isinstance(times, Ref):
            found.append(flow.ledger.fresh(node.shape[d]))
        else:
            found.append(None)
    return tuple(found)


def _repeat_interleave(flow: Flow, node: Node) -> Carried:
    """Every entry several times in a row."""
    labels, dim = flow.of(node.args[0]), node.argument("dim")
    times = node.args[1] if len(node.args) > 1 else None
    if dim is None or isinstance(times, Ref) or not isinstance(times, int) or not labels:
        freeze_all(flow, node, "is repeated by counts, or as one")
        return unlabeled(node.value)
    dim %= len(labels)
    atoms = labels[dim]
    repeated = None if atoms is None else np.repeat(atoms, times)
    return (*labels[:dim], repeated, *labels[dim + 1 :])


def slice_bounds(node: Node) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, stop and step of a slice, the defaults filled in."""
    dim, start, stop, step = (node.argument(name) for name in ("dim", "start", "end", "step"))
    return dim, start, stop, step


def _slice(flow: Flow, node: Node) -> Carried:
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    dim, start, stop, step = slice_bounds(node)
    if node.shape == shape:
        return labels
    if labels[dim] is None or any(isinstance(b, Ref) for b in (start, stop, step)):
        return flow.freeze_dims(node, labels, [dim], "is sliced at places that follow the batch")
    if step != 1:
        return strided(flow, node)
    return cut(labels, dim % len(labels), slice(start, stop))


def _narrow(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim, start, length = node.args[1:4]
    if isinstance(start, Ref) or isinstance(length, Ref):
        return flow.freeze_dims(node, labels, [dim], "is sliced at places that follow the batch")
    dim %= len(labels)
    start %= max(flow.shape(node.args[0])[dim], 1)
    return cut(labels, dim, slice(start, start + length))


def _select(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim, index = node.args[1] % len(labels), node.args[2]
    atoms = labels[dim]
    if atoms is not None:
        chosen = atoms if isinstance(index, Ref) else atoms[[index]]
        flow.freeze(node, chosen, "is selected by its position")
    return (*labels[:dim], *labels[dim + 1 :])


def _diagonal(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dims = [node.argument(name) % len(labels) for name in ("dim1", "dim2")]
    frozen = flow.freeze_dims(node, labels, dims, "only its diagonal is read")
    return (*(label for d, label in enumerate(frozen) if d not in dims), None)


def _triangle(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, [-2, -1], "only a triangle of it is read")


def _as_complex(flow: Flow, node: Node) -> Carried:
    """Pairs in the last dimension become numbers: both of a pair stay."""
    return flow.freeze_dims(node, flow.of(node.args[0]), [-1], "is read as complex numbers")[:-1]


def _as_real(flow: Flow, node: Node) -> Carried:
    return (*flow.of(node.args[0]), None)


def _new_last(flow: Flow, node: Node) -> Carried:
    """Every number becomes a line of numbers."""
    return (*flow.of(node.args[0]), None)


def _first_carries(flow: Flow, node: Node) -> Carried:
    """Entry by entry, looked up in the other tensors."""
    for arg in (*node.args[1:], *node.options.values()):
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is searched in")
    return flow.of(node.args[0])


ROWS: Mapping[str, Rule] = {
    **rows(
        _reshape,
        "view reshape flatten unflatten _unsafe_view unsqueeze squeeze ravel",
    ),
    **{f"aten.atleast_{n}d.default": _reshape for n in (1, 2, 3)},
    **rows(_like, "view_as reshape_as expand_as"),
    **rows(_permute, "permute"),
    **rows(_transpose, "transpose t swapaxes swapdims"),
    **rows(_movedim, "movedim moveaxis"),
    **rows(_last_two, "mT mH adjoint"),
    **rows(_reversed, "numpy_T matrix_H"),
    **rows(_expand, "expand broadcast_to"),
    **rows(_repeat, "repeat tile"),
    "aten.repeat_interleave.self_int": _repeat_interleave,
    **rows(_slice, "slice"),
    **rows(_narrow, "narrow"),
    **rows(_select, "select"),
    **rows(_diagonal, "diagonal"),
    **rows(_triangle, "tril triu"),
    **rows(_as_complex, "view_as_complex"),
    **rows(_as_real, "view_as_real"),
    **rows(_new_last, "one_hot"),
    **rows(_first_carries, "bucketize isin"),
}
"""Operator -> rule."""


def _edit_sizes(editor: Editor, node: Node) -> Node:
    """view, reshape, expand: the sizes asked for are those of the result.

    A size that depends on the batch is left to be inferred.
    """
    if not isinstance(node.args[1], list | tuple):  # a view as another type
        return node
    asked = _resized(editor, node, node.args[1], 0)
    return replace(node, args=(node.args[0], asked, *node.args[2:]))


def _resized(editor: Editor, node: Node, asked: Sequence[Any], first: int) -> list[Any]:
    """Sizes asked for, from dimension ``first`` on; at most one is left to be inferred."""
    labels = editor.flow.labels[node.name][first:]
    found = list(asked)
    for d, (size, atoms) in enumerate(zip(asked, labels, strict=False)):
        if editor.hit(atoms) is None or size == -1:
            continue
        if isinstance(size, Ref) and node.kind not in ("expand", "broadcast_to"):
            found = [node.shape[first + e] if s == -1 else s for e, s in enumerate(found)]
        found[d] = -1 if isinstance(size, Ref) else node.shape[first + d]
    return found


def _edit_unflatten(editor: Editor, node: Node) -> Node:
    x, dim, asked = node.args
    dim %= len(editor.flow.of(x))
    return replace(node, args=(x, dim, _resized(editor, node, asked, dim)))


def _edit_repeat(editor: Editor, node: Node) -> Node:
    """One entry that is repeated for others is repeated for those that stay."""
    flow = editor.flow
    labels, shape = flow.labels[node.name], flow.shape(node.args[0])
    pad = len(node.shape) - len(shape)
    times = _times(flow, node)
    for d, atoms in enumerate(labels):
        if editor.hit(atoms) is not None and (d < pad or shape[d - pad] == 1):
            times[d] = node.shape[d]
    return replace(node, args=(node.args[0], times, *node.args[2:]))


def _edit_slice(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
    dim, start, stop, step = slice_bounds(node)
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    if step != 1:
        return edit_strided(editor, node)
    before = ~gone[: slice(start, stop, step).indices(len(gone))[0]]
    first = int(before.sum())
    size = node.shape[dim]
    return replace(node, args=(node.args[0], dim, first, first + size, 1))


def _edit_narrow(editor: Editor, node: Node) -> Node:
    x, dim, start, _ = node.args
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    first = int((~gone[: start % len(gone)]).sum())
    return replace(node, args=(x, dim, first, node.shape[dim]))


def _edit_select(editor: Editor, node: Node) -> Node:
    x, dim, index = node.args
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    return replace(node, args=(x, dim, int((~gone[: index % len(gone)]).sum())))


EDITS: Mapping[str, Edit] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _edit_sizes),
    **dict.fromkeys(("repeat", "tile"), _edit_repeat),
    "narrow": _edit_narrow,
    "unflatten": _edit_unflatten,
    "slice": _edit_slice,
    "select": _edit_select,
}
"""Operator -> how the sizes in its arguments follow the labels."""


def _spread_zero(flow: Flow, node: Node) -> bool:
    """One entry shown as many has no masked ones among them."""
    own, carried = flow.of(node.args[0]), flow.labels[node.name]
    pad = len(carried) - len(own)
    return flow.zero(node.args[0]) and all(
        atoms is None or (d >= pad and own[d - pad] is not None) for d, atoms in enumerate(carried)
    )


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        "view reshape flatten unflatten _unsafe_view ravel view_as reshape_as unsqueeze squeeze "
        "atleast_1d atleast_2d atleast_3d permute transpose t swapaxes swapdims movedim moveaxis "
        "mT mH adjoint numpy_T matrix_H slice narrow select repeat_interleave diagonal tril triu "
        "view_as_complex view_as_real".split(),
        zero_as_first,
    ),
    **dict.fromkeys("expand expand_as broadcast_to repeat tile".split(), _spread_zero),
}
"""Operator -> whether its value is zero at masked units."""
