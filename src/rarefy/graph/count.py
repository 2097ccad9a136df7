"""Multiply-accumulate operations and parameters of a graph, by layer.

One multiply-accumulate (MAC) is one multiplication with the addition that follows it, as the
field counts it; biases, normalization and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.program import Graph, GraphModel, Node, Spec
from rarefy.types import Inputs

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Callable[[str], Shape]
"""Node name -> the shape of its value."""


def _convolution(node: Node, shape: Shapes) -> int:
    weight = shape(node.args[1].name)
    return prod(shape(node.name)) * prod(weight[1:])


def _conv_transpose(node: Node, shape: Shapes) -> int:
    weight = shape(node.args[1].name)
    return prod(shape(node.args[0].name)) * prod(weight[1:])


def _linear(node: Node, shape: Shapes) -> int:
    return prod(shape(node.name)) * shape(node.args[1].name)[-1]


def _matmul(node: Node, shape: Shapes) -> int:
    return prod(shape(node.name)) * shape(node.args[0].name)[-1]


def _addmm(node: Node, shape: Shapes) -> int:
    return prod(shape(node.name)) * shape(node.args[1].name)[-1]


def _attention(node: Node, shape: Shapes) -> int:
    q, k, v = (shape(a.name) for a in node.args[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


COSTS: Mapping[str, Callable[[Node, Shapes], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "linear": _linear,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
}
"""ATen operator -> its MACs, from the shapes of its operands and result."""

UNCOUNTED = frozenset(
    "einsum baddbmm lstm gru rnn_tanh rnn_relu bilinear _native_multi_head_attention "
    "convolution addbmm addmv mv dot vdot inner tensordot".split()
)
"""Operators that multiply and accumulate but that no row of :data:`COSTS` counts."""


@dataclass(frozen=True)
class Cost:
    """MACs of one example, and parameters.

    Attributes:
        macs: of one example.
        params: number of parameter values, shared ones once.
        by_layer: MACs by module path; calls outside of any submodule under ``""``.
        uncounted: operators whose cost is not known, with how often they occur.
    """

    macs: int
    params: int
    by_layer: Mapping[str, int]
    uncounted: Mapping[str, int]


def count(model: nn.Module, example_inputs: Inputs) -> Cost:
    """Count the MACs of one example and the parameters of a network.

    Args:
        model: any module; one that is a graph already is not captured again.
        example_inputs: what it is called with, any batch size.

    Raises:
        CaptureError: the network cannot be captured.

    Example:
        >>> import torch
        >>> count(torch.nn.Linear(3, 2), torch.zeros(1, 3)).macs
        6
    """
    graph = model.graph if isinstance(model, GraphModel) else capture(model, example_inputs).graph
    by_layer: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for name, macs in graph_macs(graph, lambda name: graph.by_name[name].shape).items():
        scope = graph.by_name[name].scope
        by_layer[scope] = by_layer.get(scope, 0) + macs
    batch = batch_of(graph)
    for node in graph.calls:
        if node.kind in UNCOUNTED:
            uncounted[node.kind] = uncounted.get(node.kind, 0) + 1
    return Cost(
        sum(by_layer.values()) // batch,
        sum(p.numel() for p in model.parameters()),
        {scope: macs // batch for scope, macs in by_layer.items()},
        uncounted,
    )


def graph_macs(graph: Graph, shape: Shapes) -> dict[str, int]:
    """MACs of each node that has any, for the captured batch, under the shapes given."""
    return {node.name: COSTS[node.kind](node, shape) for node in graph.calls if node.kind in COSTS}


def batch_of(graph: Graph) -> int:
    """Batch size of the capture: the first dimension of the first input that has one."""
    for node in graph.nodes:
        if node.op == "input" and isinstance(node.value, Spec) and node.value.shape:
            return max(node.value.shape[0], 1)
    return 1
