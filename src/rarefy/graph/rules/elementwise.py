"""Operators that work entry by entry, or make new tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Carried, Flow, Rule, rows, unlabeled
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref


def _same(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])


def free(flow: Flow, node: Node) -> Carried:
    """A value that does not depend on the entries of its input (a shape, a new tensor)."""
    return unlabeled(node.value)


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
    pole = POLES.get(node.kind.removesuffix("_"))
    operand = pole(node) if pole else None
    if isinstance(operand, Ref) and flow.zero(operand):
        for atoms in flow.of(operand):
            flow.freeze(node, atoms, "is infinite where masked units give zero")


def pointwise(flow: Flow, node: Node) -> Carried:
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


def _prelu(flow: Flow, node: Node) -> Carried:
    labels, slope = flow.of(node.args[0]), flow.of(node.args[1])
    if len(labels) < 2 or slope[0] is None:
        return labels
    return (labels[0], flow.tie(node, labels[1], slope[0]), *labels[2:])


def _fake_quantize(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if "per_channel" not in node.kind:
        return labels
    axis = node.argument("axis")
    sides = [labels[axis], *(flow.of(a)[0] for a in node.args[1:3])]
    tied = flow.tie(node, *sides) if flow.shape(node.args[0])[axis] > 1 else None
    return (*labels[:axis], tied, *labels[axis + 1 :])


ROWS: Mapping[str, Rule] = {
    **rows(
        pointwise,
        "hardswish hardsigmoid hardtanh log_sigmoid softplus mish relu6 selu celu silu elu rrelu "
        "threshold",
    ),
    **rows(_prelu, "prelu"),
    **rows(_fake_quantize, "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"),
    **rows(
        _same,
        "dropout alpha_dropout feature_dropout feature_alpha_dropout clone contiguous alias detach "
        "to type_as _to_copy zeros_like ones_like full_like rand_like randn_like "
        "empty_like",
    ),
    **rows(
        free,
        "sym_size zeros ones full empty arange rand randn new_zeros new_ones new_full "
        "new_empty scalar_tensor eye linspace",
    ),
}
"""Operator -> rule; operators that PyTorch tags as pointwise need no row."""


EDITS: Mapping[str, Edit] = {}
"""Operator -> how the sizes in its arguments follow the labels."""
