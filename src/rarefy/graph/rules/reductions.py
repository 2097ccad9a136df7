"""Operators in which entries along a dimension meet: pooling, sums, softmax, resampling."""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Carried, Flow, Rule, freeze_all, rows, unlabeled
from rarefy.graph.program import Node, Spec


def _pool(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    spatial = len(node.args[1]) if isinstance(node.args[1], list | tuple) else 1
    spatial = max(spatial, _rank(node.kind))
    found = flow.freeze_dims(
        node, labels, list(range(len(labels) - spatial, len(labels))), "is pooled over"
    )
    return found if isinstance(node.value, Spec) else tuple(found for _ in node.value)  # type: ignore[union-attr]


def _rank(kind: str) -> int:
    """2 for ``max_pool2d``; 1 where the name says nothing."""
    for rank in (1, 2, 3):
        if f"{rank}d" in kind:
            return rank
    return 1


def _reduce(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    if not isinstance(node.value, Spec):
        freeze_all(flow, node, "is reduced over")
        return unlabeled(node.value)
    dims = node.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = list(range(len(labels))) if not dims else [d % len(labels) for d in dims]
    if not (node.kind == "sum" and flow.zero(node.args[0])):
        flow.freeze_dims(node, labels, dims, "is averaged or reduced over")
    if len(node.shape) == len(labels):
        return tuple(None if d in dims else label for d, label in enumerate(labels))
    return tuple(label for d, label in enumerate(labels) if d not in dims)


def _along_dim(flow: Flow, node: Node) -> Carried:
    """Softmax, cumulative sums: entries along one dimension meet."""
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, [node.argument("dim")], "entries along it meet")


def _upsample(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, range(2, len(labels)), "is resampled")


ROWS: Mapping[str, Rule] = {
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
}
"""Operator -> rule."""


EDITS: Mapping[str, Edit] = {}
"""Operator -> how the sizes in its arguments follow the labels."""
