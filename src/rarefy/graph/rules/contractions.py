"""Operators that multiply and sum: both sides of the summed dimension go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rarefy.graph.declarations import schema
from rarefy.graph.editor import Edit, Editor
from rarefy.graph.equations import EQUATIONS, equation, sizes
from rarefy.graph.flow import (
    EXTENT,
    Carried,
    Flow,
    Rule,
    Zero,
    freeze_all,
    rows,
    unlabeled,
    zero_as_first,
)
from rarefy.graph.labels import Atoms, Labels
from rarefy.graph.program import Node, Ref
from rarefy.graph.rules.along import zero_along
from rarefy.graph.rules.windows import window

NOT_ZERO = "is summed over, and masked units do not give zero"
"""Reason to freeze both sides of a sum."""

SHARED = "is a filter that all groups share"
"""Reason to freeze rows of a kernel that is repeated, and what meets them."""


# --- sums of products by letter ----------------------------------------------------------------


def by_letter(flow: Flow, node: Node) -> Carried:
    """Matrix products of all kinds: what shares a letter goes together.

    Along a letter that is summed over, masked units must add nothing: one of the factors of a
    product is zero there, or all terms of a difference.
    """
    found = equation(node, lambda ref: len(flow.shape(ref)))
    if found is None:
        freeze_all(flow, node, "multiplies in a way that rarefy does not follow")
        return unlabeled(node.value)
    size = sizes(found, flow.shape)
    carried: dict[str, Atoms | None] = {}
    for letter in found.letters:
        sides = [
            (operand, d)
            for operand, letters in found.operands
            for d, own in enumerate(letters)
            if own == letter and flow.shape(operand)[d] == size[letter] > 1
        ]
        silent = (all if found.differs else any)(
            flow.zero(operand) or zero_along(flow, operand, d) for operand, d in sides
        )
        if found.differs and len(sides) < len(found.operands):  # one is broadcast along it
            silent = False
        atoms = [flow.of(operand)[d] for operand, d in sides]
        if letter not in found.result and not silent:
            for side in atoms:
                flow.freeze(node, side, NOT_ZERO)
        carried[letter] = flow.tie(node, *atoms)
    labels = tuple(carried[letter] for letter in found.result)
    return labels if found.added is None else _plus(flow, node, labels, found.added)


def _plus(flow: Flow, node: Node, labels: Labels, added: Ref) -> Labels:
    """Labels of a sum with an operand that is aligned with the last dimensions."""
    other, shape = flow.of(added), flow.shape(added)
    first = len(labels) - len(other)
    return tuple(
        flow.tie(node, label, other[d - first])
        if d >= first and shape[d - first] == size > 1
        else label
        for d, (label, size) in enumerate(zip(labels, node.shape, strict=True))
    )


def _grouped_product(flow: Flow, node: Node) -> Carried:
    """Each row of (T, K) times the matrix, of (E, K, N), of the expert that it is sent to."""
    x, weight = node.args[:2]
    labels, experts = flow.of(x), flow.of(weight)
    if (len(labels), len(experts)) != (2, 3) or node.argument("bias") is not None:
        freeze_all(flow, node, "multiplies in a way that rarefy does not follow")
        return unlabeled(node.value)
    flow.freeze(node, experts[0], "experts are chosen by the routing")
    flow.freeze(node, labels[0], "is sent to an expert by its position")
    _contract(flow, node, (x, 1), (weight, 1))
    return (None, experts[2])


def _kron(flow: Flow, node: Node) -> Carried:
    """Every entry of one times the other: each dimension is merged from two."""
    ranks = len(node.shape)
    sides = []
    for arg in node.args[:2]:
        labels, shape = flow.of(arg), flow.shape(arg)
        pad = ranks - len(shape)
        sides.append(((None,) * pad + labels, (1,) * pad + shape))
    (a, n), (b, m) = sides
    return tuple(flow.ledger.merge([a[d], b[d]], [n[d], m[d]]) for d in range(ranks))


def _pairwise_distance(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "adds a small number to every difference that it sums over")
    return unlabeled(node.value)


# --- convolutions ------------------------------------------------------------------------------


def _convolution(flow: Flow, node: Node) -> Carried:
    if node.argument("transposed"):
        return _conv_transpose(flow, node)
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
        out = _grouped(flow, node, labels[channel], groups)
    out = _with_bias(flow, node, out, node.argument("bias"))
    return _conv_result(flow, node, labels, channel, out)


def _conv_transpose(flow: Flow, node: Node) -> Carried:
    """The kernel is (inputs, outputs per group, ...)."""
    x, weight = node.args[:2]
    groups = flow.number(node.argument("groups"))
    labels, kernel = flow.of(x), flow.of(weight)
    channel = len(labels) - len(kernel) + 1
    n, per_group = flow.shape(weight)[:2]
    tiled = _tiled(flow, node)
    if tiled is None:
        _contract(flow, node, (x, channel), (weight, 0))
    else:
        flow.freeze(node, tiled, SHARED)
        _need_zero(flow, node, (x, x), [labels[channel]])
    if groups == 1:
        out = kernel[1]
    else:
        group, position = flow.ledger.split(labels[channel], (groups, n // groups))
        if tiled is not None:
            flow.freeze(node, position, SHARED)
        if group is not None:
            flow.counts[node.name, "groups"] = group
        out = flow.ledger.merge([group, kernel[1]], [groups, per_group])
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
    _need_zero(flow, node, (first[0], second[0]), sides)
    flow.tie(node, *_both(sides[0], sides[1], flow.shape(first[0])[first[1]]))


def _need_zero(
    flow: Flow, node: Node, operands: tuple[Any, Any], sides: list[Atoms | None]
) -> None:
    """Freeze what is summed over where neither operand is zero at masked units."""
    if not any(flow.zero(operand) for operand in operands):
        for atoms in sides:
            flow.freeze(node, atoms, NOT_ZERO)


def _with_bias(flow: Flow, node: Node, out: Atoms | None, bias: Any) -> Atoms | None:
    if not isinstance(bias, Ref) or flow.shape(bias) == (1,):
        return out
    label = flow.of(bias)[0]
    return flow.tie(node, out, label) if out is not None or label is not None else None


def _depthwise(
    flow: Flow, node: Node, channels: Atoms | None, filters: Atoms | None, n: int
) -> Atoms | None:
    """One group per channel; of channels that cannot change, a position in all can go."""
    if channels is None or filters is None:
        groups = flow.number(node.argument("groups"))
        flow.freeze(node, channels, "meets filters that cannot change")
        group, _ = flow.ledger.split(filters, (groups, n // groups))
        flow.freeze(node, group, "filters channels that cannot change")
        return filters
    flow.counts[node.name, "groups"] = channels
    tiled = _tiled(flow, node)
    if tiled is not None:
        flow.freeze(node, tiled, SHARED)
        return np.repeat(channels, n // len(channels))
    return flow.tie(node, filters, np.repeat(channels, n // len(channels)))


def _tiled(flow: Flow, node: Node) -> Atoms | None:
    """Rows of a kernel that is repeated for all groups (a wavelet for each channel), if it is one.

    They stay; the groups go with the channels that they filter, and only those.
    """
    groups = node.argument("groups")
    rows_of_all = flow.of(node.args[1])[0]
    if rows_of_all is None or not isinstance(groups, int) or groups < 2:
        return None
    if len(rows_of_all) % groups or len(rows_of_all) == groups:
        return None
    grid = rows_of_all.reshape(groups, -1)
    once: Atoms = grid[0]
    return once if bool((grid == once).all()) else None


def _grouped(flow: Flow, node: Node, channels: Atoms | None, groups: int) -> Atoms | None:
    """A grouped convolution keeps groups of equal size: whole groups go, or a position in all."""
    x, weight = node.args[:2]
    kernel = flow.of(weight)
    filters, per_group = flow.shape(weight)[:2]
    group_in, position_in = flow.ledger.split(channels, (groups, per_group))
    group_out, _ = flow.ledger.split(kernel[0], (groups, filters // groups))
    _need_zero(flow, node, (x, weight), [position_in, kernel[1]])
    flow.tie(node, position_in, kernel[1])
    both = flow.tie(node, group_in, group_out)
    if both is not None:
        flow.counts[node.name, "groups"] = both
    return kernel[0]


def _conv_result(
    flow: Flow, node: Node, labels: Labels, channel: int, out: Atoms | None
) -> Carried:
    found = [*labels[:channel], out, *labels[channel + 1 :]]
    for d in range(channel + 1, len(labels)):
        found[d] = _slid_along(flow, node, labels[d], d - channel - 1)
        if found[d] is None:
            flow.freeze(node, labels[d], "a convolution slides along it")
    for atoms in flow.of(node.args[1])[2:]:
        flow.freeze(node, atoms, EXTENT)
    return tuple(found)


def _slid_along(flow: Flow, node: Node, atoms: Atoms | None, place: int) -> Atoms | None:
    """Labels along which a kernel slides, where each unit is the middle of a window of its own.

    What is not one window is computed over the units that remain (efficient channel attention).
    """
    sliding = window(node, place, flow.shape(node.args[1])[2 + place])
    if atoms is None or sliding is None:
        return None
    turned = "transpose" in node.kind or bool(node.argument("transposed"))
    if turned and sliding.size > 1:
        return None
    found = sliding.slid_over(atoms)
    if found is not None and sliding.size > 1:
        flow.over_survivors.add(node.name)
    return found


# --- look-ups and transforms --------------------------------------------------------------------


def _embedding(flow: Flow, node: Node) -> Carried:
    """Rows by index: what is looked up are positions or words, which are no units."""
    table, index = flow.of(node.args[0]), flow.of(node.args[1])
    flow.freeze(node, table[0], "is looked up by index")
    for atoms in index:
        flow.freeze(node, atoms, "is used as positions")
    return (*(None,) * len(index), table[1])


def _embedding_renorm(flow: Flow, node: Node) -> Carried:
    """Rows that are too long are shortened; masked entries add nothing to their length."""
    table, index = flow.of(node.args[0]), flow.of(node.args[1])
    flow.freeze(node, table[0], "is looked up by index")
    for atoms in index:
        flow.freeze(node, atoms, "is used as positions")
    if node.args[3] <= 0:
        flow.freeze(node, table[1], "zeros change a norm of this order")
    return table


def _embedding_bag(flow: Flow, node: Node) -> Carried:
    table = flow.of(node.args[0])
    freeze_all(flow, replace(node, args=node.args[1:]), "says which rows are summed")
    flow.freeze(node, table[0], "is looked up by index")
    assert isinstance(node.value, tuple)
    return ((None, table[1]), *(unlabeled(part) for part in node.value[1:]))


def _fourier(flow: Flow, node: Node) -> Carried:
    """Every frequency depends on all entries; dimensions that are not transformed carry."""
    labels = flow.of(node.args[0])
    dims = node.argument("dim")
    if dims is None:
        wanted = node.argument("s")
        dims = range(-len(wanted), 0) if wanted is not None else range(len(labels))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return flow.freeze_dims(node, labels, dims, "is transformed along")


_FORWARD = "conv1d conv2d conv3d convolution _convolution _convolution_mode"
_TRANSPOSED = "conv_transpose1d conv_transpose2d conv_transpose3d"
_FOURIER = (
    "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 "
    "fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift"
)

ROWS: Mapping[str, Rule] = {
    **rows(by_letter, " ".join(EQUATIONS)),
    **rows(_kron, "kron"),
    **rows(_pairwise_distance, "pairwise_distance"),
    **rows(_convolution, _FORWARD),
    **rows(_conv_transpose, _TRANSPOSED),
    **rows(_embedding, "embedding"),
    **rows(_embedding_renorm, "embedding_renorm"),
    **rows(_embedding_bag, "embedding_bag"),
    **rows(_fourier, _FOURIER),
    "aten._grouped_mm": _grouped_product,
    "transformers.grouped_mm_fallback": _grouped_product,
}
"""Operator -> rule."""


def with_argument(node: Node, name: str, value: Any) -> Node:
    """The node with another value of the argument that its operator's declaration calls so."""
    declared = schema(node.op)
    names = [formal.name for formal in declared.arguments] if declared else []
    position = names.index(name) if name in names else len(node.args)
    if position < len(node.args):
        return replace(node, args=(*node.args[:position], value, *node.args[position + 1 :]))
    return replace(node, kwargs={**node.options, name: value})


def _edit_groups(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
    atoms = editor.flow.counts.get((node.name, "groups"))
    if atoms is None or editor.hit(atoms) is None:
        return node
    edited = with_argument(node, "groups", editor.left(0, atoms))
    return edited if _tiled(editor.flow, node) is None else _of_remaining(editor, edited)


def _of_remaining(editor: Editor, node: Node) -> tuple[Node, ...]:
    """The convolution with a repeated kernel, of which the rows of gone groups are left out."""
    x, weight = node.args[:2]
    flow = editor.flow
    turned = "transpose" in node.kind or bool(node.argument("transposed"))
    labels = flow.of(x) if turned else flow.of(Ref(node.name))
    gone = editor.hit(labels[len(labels) - len(flow.of(weight)) + 1])
    if gone is None:
        return (node,)
    source = editor.shrunk(flow.graph.by_name[weight.name])
    named = replace(source, name=editor.unused(f"{weight.name}_rows"))
    picked = editor.picked(named, source, [(0, np.flatnonzero(~gone))])
    return (*picked, replace(node, args=(x, Ref(named.name), *node.args[2:])))


EDITS: Mapping[str, Edit] = dict.fromkeys(f"{_FORWARD} {_TRANSPOSED}".split(), _edit_groups)
"""Operator -> how the sizes in its arguments follow the labels."""


# --- where the results are zero ----------------------------------------------------------------


def _product_is_zero(flow: Flow, node: Node) -> bool:
    """Along every labelled dimension one factor is zero, and so is what is added."""
    found = equation(node, lambda ref: len(flow.shape(ref)))
    if found is None:
        return False
    size = sizes(found, flow.shape)
    for d, (letter, atoms) in enumerate(zip(found.result, flow.of(Ref(node.name)), strict=True)):
        factors = [
            operand
            for operand, letters in found.operands
            if letter in letters and flow.shape(operand)[letters.index(letter)] == size[letter]
        ]
        if atoms is not None and not any(flow.zero(operand) for operand in factors):
            return False
        if atoms is not None and not _is_added_zero(flow, found.added, len(found.result) - d):
            return False
    return True


def _is_added_zero(flow: Flow, added: Ref | None, place: int) -> bool:
    """Whether what is added vanishes along a labelled dimension, counted from the last."""
    if added is None:
        return True
    labels = flow.of(added)
    return flow.zero(added) and len(labels) >= place and labels[-place] is not None


def _convolution_is_zero(flow: Flow, node: Node) -> bool:
    """Rows of the kernel and bias give zero outputs; so do masked examples and positions without a
    bias."""
    x, weight = node.args[:2]
    bias = node.argument("bias")
    channel = len(flow.of(x)) - len(flow.of(weight)) + 1
    labels = flow.of(Ref(node.name))
    examples = any(atoms is not None for d, atoms in enumerate(labels) if d != channel)
    if examples and not (flow.zero(x) and bias is None):
        return False
    silent = flow.zero(weight) and (_tiled(flow, node) is None or flow.zero(x))
    return silent and (bias is None or flow.zero(bias))


def _kron_is_zero(flow: Flow, node: Node) -> bool:
    return all(flow.zero(x) or all(a is None for a in flow.of(x)) for x in node.args[:2])


def _second_is_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[1])


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(EQUATIONS.keys() - {"cdist"}, _product_is_zero),
    **dict.fromkeys(f"{_FORWARD} {_TRANSPOSED}".split(), _convolution_is_zero),
    **dict.fromkeys(_FOURIER.split(), zero_as_first),
    **dict.fromkeys(("embedding", "embedding_renorm", "embedding_bag"), zero_as_first),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _second_is_zero),
    "kron": _kron_is_zero,
}
"""Operator -> whether its value is zero at masked units."""
