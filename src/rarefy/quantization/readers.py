"""What a network's graph tells of the weights that it reads: their inputs and their outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.batches import batch_size, evaluating, tensors
from rarefy.errors import DataError
from rarefy.graph.declarations import is_view
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node
from rarefy.pruning.running.inputs import squares
from rarefy.pruning.running.lockstep import Run
from rarefy.pruning.running.products import products
from rarefy.quantization.affine import sqnr
from rarefy.types import Inputs


def readers(graph: Graph, paths: Collection[str]) -> Iterator[tuple[Node, str]]:
    """The calls that compute with weights, in order, each with the path of one that it reads."""
    source = {node.name: node.path for node in graph.nodes if node.op == "tensor"}
    source = {name: path for name, path in source.items() if path in paths}
    for node in graph.calls:
        own = [source[name] for name in node.inputs if name in source]
        if own and is_view(node.op):
            source[node.name] = own[0]
        else:
            yield from ((node, path) for path in dict.fromkeys(own))


def sqnr_of_readers(
    pair: tuple[GraphModel, GraphModel], layers: Mapping[str, str], inputs: Inputs
) -> dict[str, float]:
    """SQNR in dB of what reads a weight, by layer, the worst of its calls.

    Args:
        pair: the float network and the quantized one, with one graph.
        layers: path of a weight -> name of its layer.
        inputs: what to compare on.
    """
    found: dict[str, float] = {}
    first, second = pair
    with evaluating(first, second):
        one, two = Run(first, inputs), Run(second, inputs)
        for node, path in readers(first.graph, layers.keys()):
            if node.name not in one.values:
                one.through(node)
                two.through(second.graph.by_name[node.name])
            ratio = _ratio(one.values[node.name], two.values[node.name])
            found[layers[path]] = min(ratio, found.get(layers[path], float("inf")))
    return found


def _ratio(exact: object, found: object) -> float:
    """SQNR of the first tensor of a call's value."""
    a, b = (next(t for t in tensors(value)) for value in (exact, found))
    return sqnr(a, b)


def mean_squares(
    model: GraphModel, weights: Collection[str], parts: Sequence[Inputs], where: str
) -> dict[str, Tensor]:
    """For each entry of a weight, the squares of all that it is multiplied with, by example.

    Args:
        model: the network.
        weights: paths; those that are multiplied with activations are answered.
        parts: examples, some at a time.
        where: the argument that errors name.

    Returns:
        Path -> means over examples of sums over places, of the weight's shape, double precision.

    Raises:
        DataError: activations are not finite.
    """
    found: dict[str, Tensor] = {}
    examples = sum(map(batch_size, parts))
    multiplied = [(p, p.index.flatten()) for p in products(model.graph, weights)]
    with evaluating(model):
        for part in parts:
            run = Run(model, part)
            for product, index in multiplied:
                run.before(product.node)
                path, shape = product.path, product.entries.shape
                total = found.setdefault(path, torch.zeros(shape, dtype=torch.float64))
                added = squares(product, run.values).flatten().cpu().double() / examples
                total.view(-1).index_add_(0, index, added)
    for path, total in found.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(
                f"{where}, weight {path!r}",
                "activations are NaN or infinite",
                "Check the data, and that the network gives finite outputs for them",
            )
    return found
