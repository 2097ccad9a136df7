"""Multiply-accumulate operations and parameters of a graph, by layer.

One multiply-accumulate (MAC) is one multiplication with the addition that follows it, as the
field counts it; biases, normalization and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TypeAlias

from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.declarations import SCALAR_OPS
from rarefy.graph.equations import EQUATIONS, equation, products
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Spec
from rarefy.types import Cost, Inputs

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Callable[[str], Shape]
"""Node name -> the shape of its value."""


def _convolution(node: Node, shape: Shapes) -> int:
    if node.argument("transposed"):
        return _conv_transpose(node, shape)
    weight = shape(node.args[1].name)
    return prod(shape(node.name)) * prod(weight[1:])


def _conv_transpose(node: Node, shape: Shapes) -> int:
    weight = shape(node.args[1].name)
    return prod(shape(node.args[0].name)) * prod(weight[1:])


def _product(node: Node, shape: Shapes) -> int:
    found = equation(node, lambda ref: len(shape(ref.name)))
    return 0 if found is None else products(found, lambda ref: shape(ref.name))


def _attention(node: Node, shape: Shapes) -> int:
    q, k, v = (shape(a.name) for a in node.args[:3])
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _recurrent(node: Node, shape: Shapes) -> int:
    """Every matrix of every layer and direction is applied once to each step of each example."""
    held = node.argument("params") or (node.argument("w_ih"), node.argument("w_hh"))
    matrices = (shape(ref.name) for ref in held)
    steps = prod(shape(node.args[0].name)[:-1])
    return steps * sum(prod(matrix) for matrix in matrices if len(matrix) == 2)


def _grouped_product(node: Node, shape: Shapes) -> int:
    """Rows by group times one matrix for each, or columns by group summed for each."""
    first, second = (shape(a.name) for a in node.args[:2])
    result = shape(node.name)
    groups = result[0] if len(first) == len(second) == 2 else 1
    return prod(result) * first[-1] // max(groups, 1)


COSTS: Mapping[str, Callable[[Node, Shapes], int]] = {
    **dict.fromkeys(EQUATIONS, _product),
    **dict.fromkeys(
        "conv1d conv2d conv3d convolution _convolution _convolution_mode".split(), _convolution
    ),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(
        "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split(),
        _recurrent,
    ),
    "scaled_dot_product_attention": _attention,
    "_grouped_mm": _grouped_product,
}
"""ATen operator -> its MACs, from the shapes of its operands and result."""

UNCOUNTED = frozenset(
    """
    _native_multi_head_attention _transformer_encoder_layer_fwd _scaled_mm _scaled_grouped_mm
    _sparse_mm _trilinear conv_tbc convolution_overrideable pairwise_distance pdist cov corrcoef
    quantized_lstm quantized_gru fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2
    fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn stft istft
    linalg_cholesky linalg_det linalg_eig linalg_eigh linalg_inv linalg_lstsq linalg_lu
    linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet linalg_solve
    linalg_solve_triangular linalg_svd matrix_exp matrix_power
    """.split()
)
"""Operators that multiply and accumulate but that no row of :data:`COSTS` counts."""


def is_uncounted(node: Node, shape: Shapes) -> bool:
    """Whether a call costs something that is not known: also where it is not one of ATen's."""
    name = node.kind.removesuffix("_")
    if name in EQUATIONS:
        return equation(node, lambda ref: len(shape(ref.name))) is None
    known = node.op.startswith("aten.") or node.op in SCALAR_OPS
    return name in UNCOUNTED or not known


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
    graph = (
        model.graph if isinstance(model, GraphModel) else capture(model, example_inputs).graph.live
    )
    by_layer: dict[str, int] = {}
    uncounted: dict[str, int] = {}

    def shape(name: str) -> Shape:
        return graph.by_name[name].shape

    for name, macs in graph_macs(graph, shape).items():
        scope = graph.by_name[name].scope
        by_layer[scope] = by_layer.get(scope, 0) + macs
    batch = batch_of(graph)
    for node in graph.calls:
        if is_uncounted(node, shape):
            uncounted[node.kind] = uncounted.get(node.kind, 0) + 1
    return Cost(
        sum(by_layer.values()) // batch,
        sum(p.numel() for p in model.parameters()),
        {scope: macs // batch for scope, macs in by_layer.items()},
        uncounted,
        _params_by_layer(model),
    )


def _params_by_layer(model: nn.Module) -> dict[str, int]:
    """Parameter values by the path of the module that holds them, shared ones where they are first
    met."""
    found: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        owner = path.rpartition(".")[0]
        found[owner] = found.get(owner, 0) + parameter.numel()
    return found


def graph_macs(graph: Graph, shape: Shapes) -> dict[str, int]:
    """MACs of each node that has any, for the captured batch, under the shapes given."""
    rows = ((node, COSTS.get(node.kind.removesuffix("_"))) for node in graph.calls)
    return {node.name: cost(node, shape) for node, cost in rows if cost is not None}


def batch_of(graph: Graph) -> int:
    """Batch size of the capture: the first dimension of the first input that has one."""
    for node in graph.nodes:
        if node.op == "input" and isinstance(node.value, Spec) and node.value.shape:
            return max(node.value.shape[0], 1)
    return 1
