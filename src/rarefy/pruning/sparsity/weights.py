"""The weights of a network that can be set to zero, as matrices, and which of their entries go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rarefy.errors import InputError, shortened, warn
from rarefy.graph.program import Graph, Ref
from rarefy.paths import excluded, paths, within
from rarefy.pruning.running.lockstep import OPERANDS, TRANSPOSED, operand
from rarefy.pruning.sparsity.patterns import (
    NM,
    Block,
    Pattern,
    Unstructured,
    as_matrix,
    as_weight,
    counts,
    shorthand,
)


@dataclass(frozen=True)
class Layer:
    """One weight as a matrix.

    Attributes:
        path: of the parameter.
        weight: the parameter.
        input_dim: which of its first two dimensions is that of its inputs.
    """

    path: str
    weight: Tensor
    input_dim: int = 1

    @property
    def inputs(self) -> int:
        """Input channels of one group."""
        return self.weight.shape[self.input_dim]


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> list[tuple[str, Tensor]]:
    """Paths and weights of two or more dimensions, shared ones once, without the excluded.

    Raises:
        InputError: an excluded name matches nothing, or nothing is left.
    """
    whole = excluded(exclude, paths(model))
    every = list(model.named_parameters(remove_duplicate=False))
    out = {id(tensor) for path, tensor in every if within(path, whole)}
    found: list[tuple[str, Tensor]] = [
        (path, parameter)
        for path, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and id(parameter) not in out
    ]
    if not found:
        raise InputError(
            "prune(structure=...)",
            "no weight is left to prune",
            "Exclude fewer layers, or give a network with convolutions or linear layers",
        )
    return found


def warn_of_emptied(where: str, emptied: list[str]) -> None:
    """Layers that are gone altogether are seldom what was meant.

    Args:
        where: the call.
        emptied: weights of which nothing is left now, and something was before.
    """
    if emptied:
        warn(
            f"{where}: no weight is left of {shortened(emptied, 3)}: what follows sees a constant. "
            "scope='local' takes the same share of every layer"
        )


def choose(
    layers: Sequence[Layer],
    scores: Sequence[Tensor],
    pattern: Pattern,
    share: float,
    *,
    together: bool,
) -> list[Tensor]:
    """For every weight of every layer, whether it goes.

    Args:
        layers: the weights.
        scores: of each of their entries, of their shapes.
        pattern: what goes together.
        share: of the units that go.
        together: rank the units of all layers together.
    """
    matrices = [
        as_matrix(checked(s, layer), layer.input_dim, pattern)
        for s, layer in zip(scores, layers, strict=True)
    ]
    if isinstance(pattern, NM):
        numbers = [layer.inputs for layer in layers]
    else:
        numbers = counts(pattern, matrices, share, together=together)
    return [
        as_weight(pattern.gone(m, n), layer.weight, layer.input_dim, pattern)
        for m, n, layer in zip(matrices, numbers, layers, strict=True)
    ]


def checked(scores: Tensor, layer: Layer) -> Tensor:
    """The scores, where they are one finite number for every entry of the weight.

    Raises:
        InputError: they are not.
    """
    if scores.shape != layer.weight.shape or not bool(torch.isfinite(scores).all()):
        raise InputError(
            f"criterion, weight {layer.path!r}",
            f"it returned shape {tuple(scores.shape)}, for a weight of shape "
            f"{tuple(layer.weight.shape)}, or values that are not finite",
            "Return one finite score for every entry of the weight",
        )
    return scores.detach()


def zero(layers: Sequence[Layer], gone: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for layer, mask in zip(layers, gone, strict=True):
            layer.weight.masked_fill_(mask, 0.0)


def oriented(
    candidates: Sequence[Layer], model: nn.Module, graph: Graph, pattern: Pattern
) -> tuple[list[Layer], dict[str, str]]:
    """The weights that the pattern concerns with their input dimensions, and why others do not.

    Raises:
        InputError: there is none.
    """
    identity = {path: id(t) for path, t in model.named_parameters(remove_duplicate=False)}
    dims = {identity.get(path): dim for path, dim in input_dims(graph)}
    found: list[Layer] = []
    dense: dict[str, str] = {}
    for layer in candidates:
        dim = dims.get(id(layer.weight))
        if dim is None:
            if isinstance(pattern, Unstructured):
                found.append(layer)
            else:
                dense[layer.path] = "it is not the matrix of a product"
            continue
        turned = replace(layer, input_dim=dim)
        if reason := _too_small(turned, pattern):
            dense[layer.path] = reason
        else:
            found.append(turned)
    if not found:
        raise InputError(
            f"prune(structure={shorthand(pattern)!r})",
            f"no weight has that structure: {'; '.join(f'{k} {v}' for k, v in dense.items())}",
            "Exclude less, or use structure='weight'",
        )
    return found, dense


def _too_small(layer: Layer, pattern: Pattern) -> str:
    """Why not one unit of the pattern fits into a weight; empty where one does."""
    if isinstance(pattern, NM) and layer.inputs < pattern.m:
        return f"it has {layer.inputs} inputs, fewer than {pattern.m}"
    outputs = layer.weight.shape[1 - layer.input_dim]
    columns = layer.weight.numel() // max(outputs, 1)
    if isinstance(pattern, Block) and (outputs < pattern.rows or columns < pattern.columns):
        return f"it is {outputs}x{columns}, smaller than a block of {shorthand(pattern)}"
    return ""


def input_dims(graph: Graph) -> Iterator[tuple[str, int]]:
    """Path of a weight -> which of its dimensions a product sums over."""
    for node in graph.calls:
        if node.kind in OPERANDS:
            weight, dim = operand(node, 1), int(node.kind not in TRANSPOSED)
            source = graph.by_name[weight.name] if isinstance(weight, Ref) else node
            while source.kind in _TRANSPOSES and len(source.shape) == 2:
                source, dim = graph.by_name[source.inputs[0]], 1 - dim
            if source.op == "tensor":
                yield source.path, dim
        elif node.kind.startswith("conv_transpose"):
            source = graph.by_name[node.args[1].name]
            if source.op == "tensor":
                yield source.path, 0
        elif node.kind in _RECURRENT:
            tables = [graph.by_name[name] for name in node.inputs]
            yield from ((t.path, 1) for t in tables if t.op == "tensor" and len(t.shape) == 2)


_TRANSPOSES = frozenset("t transpose numpy_T permute mT".split())
"""Views that swap the dimensions of a matrix (a ``permute`` that does not is seldom written)."""

_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
