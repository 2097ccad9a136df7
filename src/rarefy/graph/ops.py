"""How each operator carries labels: a table from ATen names to small pure functions.

A rule receives the walk's :class:`Flow` and a node, and returns the labels of the node's value.
A new operator is one row and, at most, one function. An operator without a row freezes every
label that it touches, which is always safe, and is named in the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.graph.declarations import resolve
from rarefy.graph.editor import Editor
from rarefy.graph.flow import Carried, Flow, Rule, freeze_all, unlabeled
from rarefy.graph.labels import Labels
from rarefy.graph.program import Graph, Node, Spec, Value
from rarefy.graph.rules import EDITS, ROWS, elementwise
from rarefy.graph.zeros import note_zeros


def walk(
    graph: Graph,
    parameters: Mapping[str, int],
    values: Mapping[str, Tensor] | None = None,
    *,
    beside: Flow | None = None,
) -> Flow:
    """Carry labels through a graph.

    Args:
        graph: the captured network.
        parameters: path -> storage identity of every parameter and buffer whose size may change;
            tensors that share storage share labels. All others are made in ``forward``.
        values: constants and whole-number buffers by path, whose entries may be positions.
        beside: a walk over another graph of the same network, whose parameters have the same
            labels; what is found here is written down there, too.
    """
    flow = Flow(graph, values=values or {})
    if beside is not None:
        flow.ledger, flow.tensors = beside.ledger, beside.tensors
    for node in graph.nodes:
        if node.op == "input":
            flow.labels[node.name] = unlabeled(node.value)
        elif node.op == "tensor":
            flow.labels[node.name] = _tensor(flow, node, parameters)
            _note_tensor(flow, node, parameters)
        elif node.op == "output":
            freeze_all(flow, node, "is an output of the network")
        else:
            flow.labels[node.name] = _call(flow, node)
            note_zeros(flow, node)
    return flow


def _tensor(flow: Flow, node: Node, parameters: Mapping[str, int]) -> Labels:
    shape = node.shape
    key = (parameters.get(node.path, node.path), shape)
    if key not in flow.tensors:
        flow.tensors[key] = tuple(flow.ledger.fresh(n) if n > 1 else None for n in shape)
    return flow.tensors[key]


def _note_tensor(flow: Flow, node: Node, parameters: Mapping[str, int]) -> None:
    """Tensors of the model are masked with a unit; those made in ``forward`` keep their values."""
    if node.path in parameters:
        flow.vanishing.add(node.name)
        return
    flow.made.add(node.path)
    value = flow.values.get(node.path)
    if value is not None and not value.any():
        flow.vanishing.add(node.name)


def _call(flow: Flow, node: Node) -> Carried:
    rule = find(node.op)
    return _fit(flow, node, node.value, rule(flow, node))


def _unknown(flow: Flow, node: Node) -> Carried:
    flow.unknown[node.op] = flow.unknown.get(node.op, 0) + 1
    freeze_all(flow, node, "is read by an operator that rarefy does not know")
    return unlabeled(node.value)


def _fit(flow: Flow, node: Node, value: Value, carried: Carried) -> Carried:
    """Drop labels of dimensions of size 1, which broadcast: their one entry must stay.

    Those of empty dimensions have nothing to say.
    """
    if isinstance(value, tuple) and isinstance(carried, tuple):
        pairs = zip(value, carried, strict=True)
        return tuple(_fit(flow, node, part, labels) for part, labels in pairs)
    if not isinstance(value, Spec) or carried is None:
        return carried
    assert len(carried) == len(value.shape)
    alone = [d for d, size in enumerate(value.shape) if size <= 1]
    return flow.freeze_dims(node, carried, alone, "is alone in its dimension")


def find(op: str) -> Rule:
    """The rule of an operator: its own row, that of all its overloads, or pointwise by tag.

    Whatever has none freezes all labels that it reads.

    An operator that writes in place (``dropout_``) carries labels like the one that does not.
    """
    family = op.rpartition(".")[0]
    rule = RULES.get(op) or RULES.get(family) or RULES.get(family.removesuffix("_"))
    if rule is not None:
        return rule
    if op.startswith(("operator.", "torch.sym", "math.")):
        return elementwise.free
    if op.startswith("aten.") and torch.Tag.pointwise in getattr(resolve(op), "tags", ()):
        return elementwise.pointwise
    return _unknown


RULES: Mapping[str, Rule] = {
    **ROWS,
    **dict.fromkeys(("aten.view.dtype", "aten.where.default"), _unknown),
}
"""Operator (of one overload or all) -> rule. Pointwise operators need no row."""


def edit(editor: Editor, node: Node) -> tuple[Node, ...]:
    """The nodes that compute what is left of a node's value when units go."""
    node = editor.shrunk(node)
    rule = EDITS.get(node.kind)
    edited = rule(editor, node) if rule else node
    return (edited,) if isinstance(edited, Node) else edited
