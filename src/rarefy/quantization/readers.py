"""What a network's graph tells of the weights that it reads: their inputs and their outputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.batches import evaluating, tensors
from rarefy.errors import DataError
from rarefy.graph.declarations import is_view
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref
from rarefy.pruning.running.lockstep import AS_THEY_LIE, Run, operand
from rarefy.pruning.sparsity.gram import rows
from rarefy.quantization.affine import sqnr
from rarefy.types import Inputs

ROWS = 1 << 14
"""Rows of a layer's inputs that its mean squares are taken of, drawn at random."""


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


def _multiplies(graph: Graph, node: Node, path: str) -> bool:
    """Whether a call multiplies its inputs with the weight as it is."""
    given = operand(node, 1) if node.kind in AS_THEY_LIE else None
    source = graph.by_name[given.name] if isinstance(given, Ref) else None
    return source is not None and source.op == "tensor" and source.path == path


def _outputs(node: Node) -> int:
    """Dimension of the outputs in what a layer gives."""
    return 1 if node.kind.startswith("conv") else -1


def mean_squares(
    model: GraphModel, weights: Mapping[str, Tensor], parts: Sequence[Inputs], where: str
) -> dict[str, Tensor]:
    """Mean square of the input that each column of a weight meets, shape (groups, columns).

    Args:
        model: the network.
        weights: path -> weight; those of convolutions, linear layers and products are answered.
        parts: examples, some at a time.
        where: the argument that errors name.

    Raises:
        DataError: activations are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    solvable = [
        (node, path)
        for node, path in readers(model.graph, weights.keys())
        if _multiplies(model.graph, node, path)
    ]
    with evaluating(model):
        for part in parts:
            run = Run(model, part)
            for node, path in solvable:
                run.through(node)
                x, y = run.values[operand(node, 0).name], run.values[node.name]
                every = y.numel() // node.shape[_outputs(node)] * len(parts)
                share = min(1.0, ROWS / max(every, 1))
                for left, _, index in rows(node, x, y, weights[path], share, generator):
                    added = left.square().sum(1).double()
                    sums[path] = sums[path] + added if path in sums else added
                    counts[path] = counts.get(path, 0) + len(index)
    for path, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(
                f"{where}, weight {path!r}",
                "activations are NaN or infinite",
                "Check the data, and that the network gives finite outputs for them",
            )
    return {path: total / max(counts[path], 1) for path, total in sums.items()}
