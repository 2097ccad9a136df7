"""The weights of a network that can be set to zero, as matrices, and which of their entries go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rarefy.errors import BudgetError, InputError, shortened, warn
from rarefy.graph.program import Graph
from rarefy.paths import excluded, paths, within
from rarefy.pruning.running.products import DECONVOLUTIONS, inputs_dim, products
from rarefy.pruning.sparsity.norms import WHOLE, norms
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
        groups: how many groups of inputs follow each other along that dimension.
        normed: the dimension along which vectors follow each other that are divided by their
            length (:mod:`rarefy.pruning.sparsity.norms`); None where nothing is.
    """

    path: str
    weight: Tensor
    input_dim: int = 1
    groups: int = 1
    normed: int | None = None

    @property
    def inputs(self) -> int:
        """Input channels of one group."""
        return self.weight.shape[self.input_dim] // self.groups

    def matrix(self, tensor: Tensor, pattern: Pattern) -> Tensor:
        """A tensor of the weight's shape as the matrix that the pattern looks at."""
        return as_matrix(tensor, self.input_dim, pattern, self.groups)

    def tensor(self, matrix: Tensor, pattern: Pattern) -> Tensor:
        """What :meth:`matrix` was given."""
        return as_weight(matrix, self.weight, self.input_dim, pattern, self.groups)

    def spared(self, scores: Tensor) -> Tensor:
        """The scores, infinite for the best entry of every vector that has to keep a length."""
        if self.normed is None or not scores.numel():
            return scores
        vectors = scores[None] if self.normed == WHOLE else scores.movedim(self.normed, 0)
        flat = vectors.flatten(1)
        flat = flat.scatter(1, flat.argmax(1, keepdim=True), torch.inf).view(vectors.shape)
        return flat[0] if self.normed == WHOLE else flat.movedim(0, self.normed)


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> list[Layer]:
    """Weights of two or more dimensions, shared ones once, without the excluded.

    The lengths of a weight norm stay, as other normalization does.

    Raises:
        InputError: an excluded name matches nothing, or nothing is left.
    """
    whole = excluded(exclude, paths(model))
    every = list(model.named_parameters(remove_duplicate=False))
    lengths, vectors = norms(model)
    out = {id(tensor) for path, tensor in every if within(path, whole)} | lengths
    found = [
        Layer(path, parameter, normed=vectors.get(id(parameter)))
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
    energy: float | None = None,
) -> list[Tensor]:
    """For every weight of every layer, whether it goes.

    Vectors that are divided by their length keep their best entry.

    Args:
        layers: the weights.
        scores: of each of their entries, of their shapes.
        pattern: what goes together.
        share: of the units that go.
        together: rank the units of all layers together.
        energy: how scores of several layers compare, see
            :func:`~rarefy.pruning.sparsity.patterns.counts`.

    Raises:
        BudgetError: nothing would be left of such a vector.
    """
    matrices = [
        layer.matrix(layer.spared(checked(s, layer)), pattern)
        for s, layer in zip(scores, layers, strict=True)
    ]
    if isinstance(pattern, NM):
        numbers = [layer.inputs for layer in layers]
    else:
        numbers = counts(pattern, matrices, share, together=together, energy=energy)
    gone = [pattern.gone(m, n) for m, n in zip(matrices, numbers, strict=True)]
    for layer, matrix, mask in zip(layers, matrices, gone, strict=True):
        if layer.normed is not None and bool(matrix[mask].isinf().any()):
            raise BudgetError(
                f"prune(structure={shorthand(pattern)!r}), weight {layer.path!r}",
                "it is divided by a length of zero where nothing is left of it, or of one of its "
                "outputs",
                "Ask for less, use scope='global', exclude it, or take its norm off before "
                "(torch.nn.utils.parametrize.remove_parametrizations)",
            )
    return [layer.tensor(mask, pattern) for mask, layer in zip(gone, layers, strict=True)]


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
    places = {identity.get(path): place for path, *place in input_dims(graph)}
    found: list[Layer] = []
    dense: dict[str, str] = {}
    for layer in candidates:
        place = places.get(id(layer.weight))
        if place is None:
            if isinstance(pattern, Unstructured):
                found.append(layer)
            else:
                dense[layer.path] = "no product or convolution reads it as it is"
            continue
        turned = replace(layer, input_dim=place[0], groups=place[1])
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
    if not layer.weight.numel():
        return "it has no entries"
    if isinstance(pattern, NM) and layer.inputs < pattern.m:
        return f"it has {layer.inputs} inputs, fewer than {pattern.m}"
    outputs = layer.weight.shape[1 - layer.input_dim] * layer.groups
    columns = layer.weight.numel() // outputs
    if isinstance(pattern, Block) and (outputs < pattern.rows or columns < pattern.columns):
        return f"it is {outputs}x{columns}, smaller than a block of {shorthand(pattern)}"
    return ""


def input_dims(graph: Graph) -> Iterator[tuple[str, int, int]]:
    """Path of a weight, which of its dimensions a product sums over, and how many groups of
    inputs follow each other along it."""
    found = {product.node.name: product for product in products(graph, graph.tensor_paths)}
    for node in graph.calls:
        if node.name in found:
            dim = inputs_dim(found[node.name])
            grouped = node.kind in DECONVOLUTIONS
            if dim is not None:
                yield found[node.name].path, dim, found[node.name].groups if grouped else 1
        elif node.kind in _RECURRENT:
            tables = [graph.by_name[name] for name in node.inputs]
            yield from ((t.path, 1, 1) for t in tables if t.op == "tensor" and len(t.shape) == 2)


_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
