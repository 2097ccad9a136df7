"""Tensors that eval mode does not read: they shrink with what they meet in training mode.

Auxiliary classifiers, embeddings of masked positions, moving averages of features: a network whose
layers are smaller must go on to train. Where such tensors could have something to follow, the
network is captured once more, in training mode, and its ties are added to those of eval mode. What
training would hold in place (random numbers, losses) is not: what eval mode computes is proven
without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from rarefy.errors import CaptureError, InputError
from rarefy.graph.capture import Capture, capture
from rarefy.graph.flow import Flow, every
from rarefy.graph.model import GraphModel
from rarefy.graph.ops import walk
from rarefy.graph.program import Graph, Node, Spec
from rarefy.types import Inputs


def resting(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Parameters, and buffers of numbers that are not whole, that no call of the graph reads."""
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    read = {id(named[path]) for path in graph.tensor_paths & named.keys()}
    found: dict[int, str] = {}
    for path, tensor in named.items():
        if id(tensor) not in read and (tensor.is_floating_point() or tensor.is_complex()):
            found.setdefault(id(tensor), path)
    return {path: named[path] for path in found.values()}


def with_resting(
    model: nn.Module,
    example_inputs: Inputs,
    captured: Capture,
    flow: Flow,
    parameters: Mapping[str, int],
) -> Capture:
    """The capture with the tensors that training mode alone reads, which ``flow`` then labels.

    Args:
        model: the network.
        example_inputs: what it was captured with.
        captured: its graph in eval mode.
        flow: the walk over that graph; its ledger takes in the ties of training mode.
        parameters: path -> storage identity, as for the walk.
    """
    tensors = {} if isinstance(model, GraphModel) else resting(model, captured.graph)
    widths = {len(atoms) for labels in flow.labels.values() for atoms in every(labels)}
    if not widths & {n for tensor in tensors.values() for n in tensor.shape if n > 1}:
        return captured
    with suppress(CaptureError, InputError):
        graph = capture(model, example_inputs, training=True).graph
        held = len(flow.ledger.fixings)
        other = walk(graph, parameters, flow.values, beside=flow)
        del flow.ledger.fixings[held:]
        return replace(captured, graph=_with_tensors(flow, other, tensors))
    return captured


def _with_tensors(flow: Flow, other: Flow, tensors: Mapping[str, Tensor]) -> Graph:
    """The graph with nodes for those of these tensors that the other walk met."""
    found: list[Node] = []
    taken = set(flow.graph.by_name)
    for node in other.graph.nodes:
        if node.op == "tensor" and node.path in tensors:
            name = f"{node.name}_in_training"
            while name in taken:
                name += "_"
            taken.add(name)
            value = Spec(tuple(tensors[node.path].shape), tensors[node.path].dtype)
            found.append(Node(name, "tensor", (node.path,), value=value))
            flow.labels[name] = other.labels[node.name]
            flow.vanishing.add(name)
    *nodes, output = flow.graph.nodes
    flow.graph = flow.graph.with_nodes((*nodes, *found, output))
    return flow.graph
