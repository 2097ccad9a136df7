"""Scaled dot-product attention: heads go together, positions within heads on either side.

Queries (..., H, L, D), keys (..., H, S, D), values (..., H, S, E) give (..., H, L, E). D is summed
over and E carries on. Keys and values may have fewer heads, each for a run of the queries' heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, rows
from rarefy.graph.labels import Atoms, Labels
from rarefy.graph.program import Node, Ref
from rarefy.graph.rules.contractions import NOT_ZERO, with_argument

OVER_POSITIONS = "attention normalizes over positions"
"""Reason to freeze the length of keys and values."""


def _attention(flow: Flow, node: Node) -> Carried:
    operands = node.args[:3]
    q, k, v = (flow.of(operand) for operand in operands)
    if not any(flow.zero(operand) for operand in operands[:2]):
        for labels in (q, k):
            flow.freeze(node, labels[-1], NOT_ZERO)
    within = flow.tie(node, q[-1], k[-1])
    if within is not None and node.argument("scale") is None:
        flow.implicit_scale[node.name] = within
    for labels in (k, v):
        flow.freeze(node, labels[-2], OVER_POSITIONS)
    positions = q[-2]
    if node.argument("is_causal"):
        flow.freeze(node, positions, OVER_POSITIONS)
        positions = None
    lead = _leading(flow, node, (q, k, v))
    return (*_masked(flow, node, (*lead, positions)), v[-1])


def _leading(flow: Flow, node: Node, operands: tuple[Labels, Labels, Labels]) -> Labels:
    """Batch and heads: equal on all sides, or of size 1, or heads that share keys and values."""
    count = len(node.shape) - 2
    shapes = [flow.shape(operand)[:-2] for operand in node.args[:3]]
    found: list[Atoms | None] = []
    for d in range(-count, 0):
        present = [
            (labels[d - 2], shape[d])
            for labels, shape in zip(operands, shapes, strict=True)
            if len(shape) >= -d and shape[d] > 1
        ]
        size = node.shape[d - 2]
        atoms = flow.tie(node, *(atoms for atoms, n in present if n == size))
        shared = {n for _, n in present if n != size}
        for n in shared:  # a head of the keys goes with all its queries, or one query of each goes
            each, _ = flow.ledger.split(atoms, (n, size // n))
            flow.tie(node, each, *(part for part, m in present if m == n))
        found.append(atoms)
    return tuple(found)


def _masked(flow: Flow, node: Node, labels: Labels) -> Labels:
    """Labels of heads and query positions after the mask (..., H, L, S) or a part of that."""
    mask = node.argument("attn_mask")
    if not isinstance(mask, Ref):
        return labels
    other, shape = flow.of(mask), flow.shape(mask)
    if other:
        flow.freeze(node, other[-1], OVER_POSITIONS)
    return tuple(
        flow.tie(node, label, other[d]) if len(shape) >= -d and shape[d] == size > 1 else label
        for d, label, size in _from_right(labels, node.shape[:-1])
    )


def _from_right(labels: Labels, shape: Sequence[int]) -> list[tuple[int, Atoms | None, int]]:
    """Dimensions counted from the end of a tensor that has one dimension more."""
    count = len(labels)
    return [(d - count - 1, labels[d], shape[d]) for d in range(count)]


def _gives_zero(flow: Flow, node: Node) -> bool:
    """Where the values are zero, and no queries are masked that share them with others."""
    *lead, positions, _ = flow.labels[node.name]
    values = flow.shape(node.args[2])[:-2]
    own = all(
        atoms is None or (len(values) >= len(lead) - d and values[d - len(lead)] == node.shape[d])
        for d, atoms in enumerate(lead)
    )
    return flow.zero(node.args[2]) and positions is None and own


ROWS: Mapping[str, Rule] = rows(_attention, "scaled_dot_product_attention")
"""Operator -> rule."""


def _edit_scale(editor: Editor, node: Node) -> Node:
    """The scale of the original, where it would follow the number of positions that remain."""
    within = editor.flow.implicit_scale.get(node.name)
    if editor.hit(within) is None:
        return node
    return with_argument(node, "scale", 1 / sqrt(editor.flow.shape(node.args[0])[-1]))


EDITS: Mapping[str, Edit] = {"scaled_dot_product_attention": _edit_scale}
"""Operator -> how the sizes in its arguments follow the labels."""

ZEROS: Mapping[str, Zero] = {"scaled_dot_product_attention": _gives_zero}
"""Operator -> whether its value is zero at masked units."""
