"""Operators that normalize, per channel or over whole dimensions."""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Carried, Flow, Rule, rows
from rarefy.graph.program import Node, Ref

STATISTICS = ("weight", "bias", "running_mean", "running_var")
"""Arguments of a batch or instance norm with one entry per channel."""


def _batch_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    sides = [labels[1]] + [
        flow.of(a)[0] for a in map(node.argument, STATISTICS) if isinstance(a, Ref)
    ]
    if flow.shape(node.args[0])[1] == 1:
        return labels
    tied = flow.tie(node, *sides)
    if tied is not None:
        flow.counts[node.name, "num_features"] = tied
    return (labels[0], tied, *labels[2:])


def _normalize_last(flow: Flow, node: Node) -> Carried:
    """Layer and RMS norm: normalized over the last dimensions."""
    labels = flow.of(node.args[0])
    count = len(node.args[1])
    dims = range(len(labels) - count, len(labels))
    for name in ("weight", "bias"):
        for atoms in flow.of(node.argument(name)):
            flow.freeze(node, atoms, "is normalized over")
    return flow.freeze_dims(node, labels, list(dims), "is normalized over")


def _group_norm(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    for name in ("weight", "bias"):
        for atoms in flow.of(node.argument(name)):
            flow.freeze(node, atoms, "is normalized over in groups")
    return flow.freeze_dims(node, labels, range(1, len(labels)), "is normalized over in groups")


ROWS: Mapping[str, Rule] = {
    **rows(_batch_norm, "batch_norm instance_norm"),
    **rows(_normalize_last, "layer_norm rms_norm"),
    **rows(_group_norm, "group_norm"),
}
"""Operator -> rule."""


EDITS: Mapping[str, Edit] = {}
"""Operator -> how the sizes in its arguments follow the labels."""
