"""Operators that work entry by entry, normalize, pool or reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rarefy.graph.flow import (
    Carried,
    Flow,
    Rule,
    argument,
    freeze_all,
    rows,
    unlabeled,
)
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref, Spec


def scalar(flow: Flow, node: Node) -> Carried:
    return unlabeled(node.value)


def _same(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])


def _free(flow: Flow, node: Node) -> Carried:
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
    pole = POLES.get(node.op.split(".")[1].removesuffix("_"))
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


def _batch_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    sides = [labels[1]] + [flow.of(a)[0] for a in node.args[1:5] if isinstance(a, Ref)]
    if flow.shape(node.args[0])[1] == 1:
        return labels
    tied = flow.tie(node, *sides)
    if tied is not None:
        flow.counts[node.name, "num_features"] = tied
    return (labels[0], tied, *labels[2:])


def _pool(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    spatial = len(node.args[1]) if isinstance(node.args[1], list | tuple) else 1
    spatial = max(spatial, _rank(node.op))
    found = flow.freeze_dims(
        node, labels, list(range(len(labels) - spatial, len(labels))), "is pooled over"
    )
    return found if isinstance(node.value, Spec) else tuple(found for _ in node.value)  # type: ignore[union-attr]


def _rank(op: str) -> int:
    """2 for ``aten.max_pool2d.default``; 1 where the name says nothing."""
    for rank in (1, 2, 3):
        if f"{rank}d" in op:
            return rank
    return 1


def _reduce(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if not isinstance(node.value, Spec):
        freeze_all(flow, node, "is reduced over")
        return unlabeled(node.value)
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = list(range(len(labels))) if not dims else [d % len(labels) for d in dims]
    if not (node.op.startswith("aten.sum") and flow.zero(node.args[0])):
        flow.freeze_dims(node, labels, dims, "is averaged or reduced over")
    if len(node.shape) == len(labels):
        return tuple(None if d in dims else label for d, label in enumerate(labels))
    return tuple(label for d, label in enumerate(labels) if d not in dims)


def _normalize_last(flow: Flow, node: Node) -> Carried:
    """Layer and RMS norm: normalized over the last dimensions."""
    labels = flow.of(node.args[0])
    count = len(node.args[1])
    dims = range(len(labels) - count, len(labels))
    for arg in node.args[2:4]:
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is normalized over")
    return flow.freeze_dims(node, labels, list(dims), "is normalized over")


def _group_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    for arg in node.args[2:4]:
        for atoms in flow.of(arg):
            flow.freeze(node, atoms, "is normalized over in groups")
    return flow.freeze_dims(node, labels, range(1, len(labels)), "is normalized over in groups")


def _along_dim(flow: Flow, node: Node) -> Carried:
    """Softmax, cumulative sums: entries along one dimension meet."""
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, [argument(node, "dim")], "entries along it meet")


def _upsample(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, range(2, len(labels)), "is resampled")


def _fake_quantize(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if "per_channel" not in node.op:
        return labels
    axis = node.args[3]
    sides = [labels[axis], *(flow.of(a)[0] for a in node.args[1:3])]
    tied = flow.tie(node, *sides) if flow.shape(node.args[0])[axis] > 1 else None
    return (*labels[:axis], tied, *labels[axis + 1 :])


ROWS: Mapping[str, Rule] = {
    **rows(
        pointwise,
        "hardswish hardsigmoid hardtanh log_sigmoid softplus mish relu6 selu celu silu elu rrelu "
        "threshold",
    ),
    **rows(_batch_norm, "batch_norm instance_norm"),
    **rows(_normalize_last, "layer_norm rms_norm"),
    **rows(_group_norm, "group_norm"),
    **rows(
        _pool,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d max_pool2d_with_indices",
    ),
    **rows(_reduce, "mean sum amax amin prod var std any all norm linalg_vector_norm logsumexp"),
    **rows(_along_dim, "softmax log_softmax cumsum"),
    **rows(
        _upsample,
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
        "upsample_bicubic2d upsample_linear1d upsample_trilinear3d",
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
        _free,
        "sym_size zeros ones full empty arange rand randn new_zeros new_ones new_full "
        "new_empty scalar_tensor eye linspace",
    ),
}
"""Operator -> rule; operators that PyTorch tags as pointwise need no row."""
