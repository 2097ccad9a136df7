"""Which layers read the units of a group, with the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rarefy.graph.groups import Group
from rarefy.graph.program import Graph, GraphModel, Node, Ref
from rarefy.graph.trace import Network
from rarefy.pruning.inputs import Product, matrix, products, rows
from rarefy.pruning.lockstep import Run
from rarefy.pruning.surgeon import Columns, Reader
from rarefy.types import Inputs

ROWS = 100
"""Rows of inputs per unknown of a layer that its Gram matrix is summed over, at most."""

LEAST = 16384
"""Rows that are summed over where there are as many, at least."""

EXAMPLES = 64
"""Examples that these rows are of, at least."""

LARGEST = 6144
"""Unknowns of the largest layer whose Gram matrix is made."""


@dataclass(frozen=True)
class Place:
    """Where a :class:`Reader` stands.

    Attributes:
        reader: the layer, or one group of it.
        node: name of the call.
        path: of its parameter.
        positions: of the weight's entries in the flattened parameter, (outputs, unknowns).
        first: number of its first output among those of the call.
        mean: mean inputs, (unknowns,), where a bias or a normalization takes up a shift of the
            outputs; else None.
        dim: dimension of the call's result that its outputs lie along.
    """

    reader: Reader
    node: str
    path: str
    positions: Tensor
    first: int
    mean: Tensor | None
    dim: int


def places(network: Network, model: GraphModel, inputs: Inputs) -> list[Place]:
    """All layers that read units of the network, on their inputs.

    Args:
        network: the trace.
        model: its graph with the network's tensors.
        inputs: examples as one batch.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    labels = _labels(network.groups)
    run = Run(model, inputs)
    found: list[Place] = []
    for product in products(network.captured.graph.live, parameters):
        parameter = parameters.get(product.path)
        if parameter is None or not product.has_rows or product.path not in labels:
            continue
        positions = matrix(product, product.index)
        columns = [dict(_columns(own, labels[product.path], parameter.shape)) for own in positions]
        if not any(columns) or positions.shape[-1] > LARGEST:
            continue
        run.before(network.captured.graph.by_name[product.node.name])
        found += _of(product, positions, columns, parameter, run, network.captured.graph)
    return found


_Labels = Mapping[str, Sequence[tuple[int, int, Tensor]]]
"""Path -> (number of a group, dimension, unit of each entry along it or -1)."""


def _labels(groups: Sequence[Group]) -> dict[str, list[tuple[int, int, Tensor]]]:
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            size = int(member.indices.max()) + 1 if member.indices.size else 0
            unit = torch.full((size,), -1)
            entries = torch.from_numpy(member.indices)
            unit[entries.flatten()] = torch.arange(len(group)).repeat_interleave(entries.shape[1])
            found.setdefault(member.path, []).append((number, member.dim, unit))
    return found


def _columns(
    positions: Tensor, labels: Sequence[tuple[int, int, Tensor]], shape: torch.Size
) -> Iterator[tuple[int, Columns]]:
    """Columns of one group of a layer that read units of one kind, all columns of each."""
    for number, dim, unit in labels:
        inner = shape[dim + 1 :].numel()
        entry = positions // inner % shape[dim]
        known = entry < len(unit)
        label = torch.where(known, unit[entry.clamp_max(max(len(unit) - 1, 0))], -1)
        reads = (label == label[:1]).all(0) & (label[0] >= 0)
        if not reads.any() or bool((label == label[0, 0]).all()):
            continue  # it is written along this dimension, or belongs to one unit as a whole
        columns = reads.nonzero().flatten()
        units, order = label[0, columns].sort(stable=True)
        read, counts = torch.unique_consecutive(units, return_counts=True)
        if len(counts.unique()) == 1:
            yield number, Columns(read, columns[order].view(len(read), -1))


def _of(
    product: Product,
    positions: Tensor,
    columns: Sequence[Mapping[int, Columns]],
    parameter: Tensor,
    run: Run,
    graph: Graph,
) -> Iterator[Place]:
    node = product.node
    biased = node.kind.startswith("conv") or node.kind in ("linear", "addmm")
    centered = biased and _takes_up_shifts(graph, node)
    grams, means = _moments(product, run, centered)
    weight = parameter.detach().cpu().double().flatten()[positions]
    outputs = positions.shape[1]
    for group, own in enumerate(columns):
        if own:
            mean = means[group] if centered else None
            reader = Reader(weight[group], grams[group], own)
            dim = 1 if node.kind.startswith("conv") else -1
            dim = dim - 1 if dim == 1 and len(node.shape) == parameter.ndim - 1 else dim
            first = group * outputs
            yield Place(reader, node.name, product.path, positions[group], first, mean, dim)


def _takes_up_shifts(graph: Graph, node: Node) -> bool:
    """Whether a bias, or the running mean of a BatchNorm, can undo a shift of the outputs."""
    if isinstance(node.argument("self" if node.kind == "addmm" else "bias"), Ref):
        return True
    users = graph.users[node.name]
    return bool(users) and all(user.kind == "batch_norm" for user in users)


def _moments(product: Product, run: Run, centered: bool) -> tuple[Tensor, Tensor]:
    """Mean products (groups, unknowns, unknowns) and means (groups, unknowns) of the inputs."""
    x, weight = run.values[product.x], run.values[product.weight]
    unknowns = matrix(product, product.index).shape[-1]
    wanted = max(ROWS * unknowns, LEAST)
    if product.letters is None and x.ndim == weight.ndim:
        x = x[: max(EXAMPLES, wanted // max(prod(product.node.shape[2:]), 1))]
    generator = torch.Generator().manual_seed(0)
    count, total, sums = 0, torch.zeros(()), torch.zeros(())
    for every in rows(product, x, weight):
        part = every.cpu()
        if part.shape[1] > wanted:
            part = part[:, torch.randperm(part.shape[1], generator=generator)[:wanted]]
        total = total + (part.transpose(1, 2) @ part).double()
        sums = sums + part.sum(1).double()
        count += part.shape[1]
    mean = sums / count
    gram = total / count
    if centered:
        gram = gram - mean[:, :, None] * mean[:, None, :]
    return gram, mean
