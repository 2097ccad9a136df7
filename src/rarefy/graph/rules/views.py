"""Operators that move, cut and join entries: labels move with them, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled
from rarefy.graph.labels import FIXED, Atoms, Labels
from rarefy.graph.program import Node, Ref, Spec
from rarefy.graph.rules.indexing import edit_strided, strided


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
    if labels[dim] is None or any(isinstance(b, Ref) for b in (start, stop, step)):
        return flow.freeze_dims(node, labels, [dim], "is sliced at places that follow the batch")
    if step != 1:
        return strided(flow, node)
    return _cut(labels, dim % len(labels), slice(start, stop))


def _narrow(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim, start, length = node.args[1:4]
    if isinstance(start, Ref) or isinstance(length, Ref):
        return flow.freeze_dims(node, labels, [dim], "is sliced at places that follow the batch")
    dim %= len(labels)
    start %= max(flow.shape(node.args[0])[dim], 1)
    return _cut(labels, dim, slice(start, start + length))


def _select(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dim, index = node.args[1] % len(labels), node.args[2]
    atoms = labels[dim]
    if atoms is not None:
        chosen = atoms if isinstance(index, Ref) else atoms[[index]]
        flow.freeze(node, chosen, "is selected by its position")
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


def _diagonal(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dims = [node.argument(name) % len(labels) for name in ("dim1", "dim2")]
    frozen = flow.freeze_dims(node, labels, dims, "only its diagonal is read")
    return (*(label for d, label in enumerate(frozen) if d not in dims), None)


def _triangle(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, [-2, -1], "only a triangle of it is read")


def _affine_grid(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "is a matrix of an affine map")
    return unlabeled(node.value)


def _as_complex(flow: Flow, node: Node) -> Carried:
    """Pairs in the last dimension become numbers: both of a pair stay."""
    return flow.freeze_dims(node, flow.of(node.args[0]), [-1], "is read as complex numbers")[:-1]


def _as_real(flow: Flow, node: Node) -> Carried:
    return (*flow.of(node.args[0]), None)


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


def _new_last(flow: Flow, node: Node) -> Carried:
    """Every number becomes a line of numbers."""
    return (*flow.of(node.args[0]), None)


def _first_carries(flow: Flow, node: Node) -> Carried:
    """Entry by entry, looked up in the other tensors."""
    for arg in (*node.args[1:], *node.options.values()):
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is searched in")
    return flow.of(node.args[0])


def _apart(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "is taken apart at computed places")
    return unlabeled(node.value)


SPLITS = (
    "split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk"
)

ROWS: Mapping[str, Rule] = {
    "operator.getitem": _getitem,
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
    **rows(_broadcast_tensors, "broadcast_tensors"),
    **rows(_meshgrid, "meshgrid"),
    **rows(_cat, f"cat concat concatenate {' '.join(CAT_DIM)}"),
    **rows(_stack, "stack"),
    **rows(_split, f"{SPLITS} {' '.join(SPLIT_DIM)}"),
    "aten.tensor_split.tensor_indices_or_sections": _apart,
    **rows(_unbind, "unbind"),
    **rows(_glu, "glu"),
    **rows(_slice, "slice"),
    **rows(_narrow, "narrow"),
    **rows(_select, "select"),
    **rows(_pad, "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d"),
    **rows(_im2col, "im2col"),
    **rows(_col2im, "col2im"),
    **rows(_unfold, "unfold"),
    **rows(_diagonal, "diagonal"),
    **rows(_triangle, "tril triu"),
    **rows(_affine_grid, "affine_grid_generator"),
    **rows(_as_complex, "view_as_complex"),
    **rows(_as_real, "view_as_real"),
    **rows(_grid_sample, "grid_sampler grid_sampler_2d grid_sampler_3d"),
    **rows(_max_unpool, "max_unpool2d max_unpool3d"),
    **rows(_new_last, "one_hot"),
    **rows(_first_carries, "bucketize isin"),
    **rows(_pixel_shuffle, "pixel_shuffle"),
    **rows(_pixel_unshuffle, "pixel_unshuffle"),
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
    **dict.fromkeys((*SPLITS.split(), *SPLIT_DIM), _edit_parts),
    **dict.fromkeys(("repeat", "tile"), _edit_repeat),
    **dict.fromkeys(("constant_pad_nd", "pad"), _edit_pad),
    "narrow": _edit_narrow,
    "unflatten": _edit_unflatten,
    "slice": _edit_slice,
    "select": _edit_select,
}
"""Operator -> how the sizes in its arguments follow the labels."""


def _first_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0])


def _spread_zero(flow: Flow, node: Node) -> bool:
    """One entry shown as many has no masked ones among them."""
    own, carried = flow.of(node.args[0]), flow.labels[node.name]
    pad = len(carried) - len(own)
    return flow.zero(node.args[0]) and all(
        atoms is None or (d >= pad and own[d - pad] is not None) for d, atoms in enumerate(carried)
    )


def _parts_zero(flow: Flow, node: Node) -> bool:
    """Every part is zero where masked, or cannot lose anything."""
    return all(
        flow.zero(part) or all(atoms is None for atoms in flow.of(part)) for part in node.args[0]
    )


def _padded_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0]) and not node.argument("value")


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        "view reshape flatten unflatten _unsafe_view ravel view_as reshape_as unsqueeze squeeze "
        "atleast_1d atleast_2d atleast_3d permute transpose t swapaxes swapdims movedim moveaxis "
        "mT mH adjoint numpy_T matrix_H slice narrow select unbind glu getitem repeat_interleave "
        "pixel_shuffle pixel_unshuffle im2col col2im unfold diagonal tril triu view_as_complex "
        "view_as_real grid_sampler grid_sampler_2d grid_sampler_3d max_unpool2d "
        "max_unpool3d".split(),
        _first_zero,
    ),
    **dict.fromkeys((*SPLITS.split(), *SPLIT_DIM), _first_zero),
    **dict.fromkeys("expand expand_as broadcast_to repeat tile".split(), _spread_zero),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", *CAT_DIM), _parts_zero),
    **dict.fromkeys(
        "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d".split(),
        _padded_zero,
    ),
}
"""Operator -> whether its value is zero at masked units."""
