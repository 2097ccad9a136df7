"""The weights of a network that can be quantized alone, each with the dimension of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Ref
from rarefy.paths import matching, paths, within
from rarefy.pruning.sparsity.weights import input_dims
from rarefy.quantization.insertion import check_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of weights that are quantized."""


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        path: of the parameter.
        tensor: the parameter.
        axis: the dimension of its outputs, each of which has scales of its own.
    """

    path: str
    tensor: Tensor
    axis: int

    @property
    def layer(self) -> str:
        """Path of the module that holds it, or its own where that is the network."""
        return self.path.rpartition(".")[0] or self.path


def find(
    model: nn.Module, graph: Graph | None, skip: Sequence[str], where: str
) -> tuple[list[Weight], dict[str, str]]:
    """Weights of two or more dimensions, shared ones once, and why others stay in float.

    Args:
        model: the network whose weights they are.
        graph: what it computes, which tells outputs of weights whose module does not; or None.
        skip: paths or patterns of what stays in float.
        where: the argument that errors name.

    Raises:
        InputError: a name to skip matches nothing, or a parameter that is not skipped is NaN or
            infinite somewhere.
    """
    known = paths(model)
    skipped = frozenset[str]().union(*(matching(name, known, where) for name in skip))
    every = list(model.named_parameters(remove_duplicate=False))
    out = {id(tensor) for path, tensor in every if within(path, skipped)}
    axes = _axes(model, graph)
    found: list[Weight] = []
    left: dict[str, str] = {}
    for path, tensor in model.named_parameters():
        if id(tensor) not in out:
            check_finite(path, tensor)
        if tensor.ndim < 2:
            continue
        own = axes.get(id(tensor), frozenset())
        reason = "it is to be skipped" if id(tensor) in out else _unfit(path, tensor, own)
        if reason:
            left[path] = reason
        else:
            found.append(Weight(path, tensor, *own))
    return found, left


def _unfit(path: str, tensor: Tensor, axes: frozenset[int]) -> str:
    """Why a weight cannot be quantized; empty where it can."""
    if type(tensor) is not nn.Parameter or tensor.layout is not torch.strided:
        return f"a {type(tensor).__name__} of {tensor.layout} is not quantized"
    if tensor.dtype not in DTYPES or tensor.device.type == "meta":
        return f"a tensor of {tensor.dtype} on {tensor.device.type} is not quantized"
    if not tensor.numel():
        return "it has no elements"
    if not axes and ".parametrizations." in f".{path}":
        return (
            "the weight is made of it at each call; torch.nn.utils.parametrize."
            "remove_parametrizations makes the result a weight that can be quantized"
        )
    if not axes:
        return "it is unknown which of its dimensions are outputs"
    if len(axes) > 1:
        return "its outputs are along different dimensions in different places"
    return ""


def _axes(model: nn.Module, graph: Graph | None) -> Mapping[int, frozenset[int]]:
    """Identity of a parameter -> the dimensions that are its outputs."""
    found: dict[int, set[int]] = {}
    by_path = dict(model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            axis = None if parameter is None else _axis(module, name)
            if axis is not None:
                found.setdefault(id(parameter), set()).add(axis)
    if isinstance(model, GraphModel):
        graph = model.graph
    for path, axis in () if graph is None else _graph_axes(graph):
        tensor = by_path.get(path)
        if tensor is not None and (tensor.ndim == 2 or axis < 2):
            found.setdefault(id(tensor), set()).add(axis)
    return {identity: frozenset(axes) for identity, axes in found.items()}


def _axis(module: nn.Module, name: str) -> int | None:
    """The dimension of the outputs of a module's parameter; None where that is not known."""
    if isinstance(module, _ConvNd):
        return int(module.transposed)
    if isinstance(module, nn.Linear | nn.Bilinear | nn.Embedding | nn.EmbeddingBag):
        return 0
    if isinstance(module, nn.MultiheadAttention):
        return 0 if name.endswith("proj_weight") else None
    if isinstance(module, nn.RNNBase):
        return 0 if name.startswith("weight") else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return 1  # of transformers: a linear layer whose weight is transposed
    return None


def _graph_axes(graph: Graph) -> Iterator[tuple[str, int]]:
    """Path of a weight -> the dimension of its outputs, where a graph tells."""
    for path, dim, _ in input_dims(graph):
        yield path, 1 - dim
    for node in graph.calls:
        if node.kind == "embedding" and isinstance(node.args[0], Ref):
            source = graph.by_name[node.args[0].name]
            if source.op == "tensor":
                yield source.path, 0
