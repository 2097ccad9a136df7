"""Which layers read the units of a group, with the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from rarefy.batches import batch_size
from rarefy.graph.groups import Group
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph
from rarefy.graph.trace import Network
from rarefy.pruning.running.inputs import rows
from rarefy.pruning.running.lockstep import Run, batch_dims
from rarefy.pruning.running.products import Product, matrix, outputs_dim, products, roles
from rarefy.pruning.scoring.surgeon import Columns, Reader
from rarefy.types import Inputs

ROWS = 100
"""Rows of inputs per unknown of a layer that its Gram matrix is summed over, at most."""

LEAST = 16384
"""Rows that are summed over where there are as many, at least."""

EXAMPLES = 64
"""Examples that these rows are of, at least."""

LARGEST = 6144
"""Unknowns of the largest layer whose Gram matrix is made."""

MEMORY = 1 << 31
"""Bytes of all Gram matrices; the largest are not made beyond it."""


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


def places(network: Network, model: GraphModel, parts: Sequence[Inputs]) -> list[Place]:
    """All layers that read units of the network, on their inputs.

    Args:
        network: the trace.
        model: its graph with the network's tensors.
        parts: examples, some at a time.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph = network.captured.graph.live
    labels = _labels(network.groups)
    found: list[_Site] = []
    for product in products(graph, parameters):
        parameter = parameters.get(product.path)
        if parameter is None or not product.has_rows or product.path not in labels:
            continue
        positions = matrix(product, product.index)
        columns = [dict(_columns(own, labels[product.path], parameter.shape)) for own in positions]
        if any(columns) and positions.shape[-1] <= LARGEST:
            found.append(_Site(product, positions, columns, _centered(graph, product)))
    found = _held(found)
    total = sum(map(batch_size, parts))
    sums: dict[Any, _Sums] = {}
    dims = batch_dims(model, parts[0])
    for part in parts:
        run, keys = Run(model, part, dims), dict[tuple[Any, ...], str]()
        for site in found:
            run.before(model.graph.by_name[site.product.node.name])
            key = site.key(run)
            first = keys.setdefault(key, site.product.node.name)
            if first == site.product.node.name:
                sums.setdefault(first, _Sums(site.centered)).add(site, run, total)
            else:
                sums[site.product.node.name] = sums[first]
    return [
        place for site in found for place in _of(site, sums[site.product.node.name], parameters)
    ]


@dataclass(frozen=True)
class _Site:
    """A call that reads units, and the columns that read them, group by group."""

    product: Product
    positions: Tensor
    columns: Sequence[Mapping[int, Columns]]
    centered: bool

    @property
    def unknowns(self) -> int:
        return int(self.positions.shape[-1])

    @property
    def size(self) -> int:
        """Bytes of its Gram matrices."""
        return 4 * len(self.positions) * self.unknowns**2

    def key(self, run: Run) -> tuple[Any, ...]:
        """Equal for calls that read the same inputs in the same way."""
        node, x = self.product.node, run.values[self.product.x]
        if self.product.letters is None:
            return (node.name,)
        shared, _, unknowns = roles(self.product.letters)
        own = self.product.letters[0]
        return (self.product.x, x._version, own, shared, unknowns, self.centered)


def _held(found: Sequence[_Site]) -> list[_Site]:
    """The calls whose Gram matrices fit into :data:`MEMORY`, the smallest first, in their order."""
    left, fitting = MEMORY, set[str]()
    for site in sorted(found, key=lambda s: s.size):
        left -= site.size
        if left >= 0:
            fitting.add(site.product.node.name)
    return [site for site in found if site.product.node.name in fitting]


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


def _of(site: _Site, sums: _Sums, parameters: Mapping[str, Tensor]) -> Iterator[Place]:
    product, positions = site.product, site.positions
    node, parameter = product.node, parameters[product.path]
    grams, means = sums.moments()
    weight = parameter.detach().cpu().double().flatten()[positions]
    dim = outputs_dim(product)
    dim = dim - 1 if dim == 1 and len(node.shape) == parameter.ndim - 1 else dim
    for group, own in enumerate(site.columns):
        if own:
            mean = means[group] if site.centered else None
            reader = Reader(weight[group], grams[group], own)
            first = group * positions.shape[1]
            yield Place(reader, node.name, product.path, positions[group], first, mean, dim)


def _centered(graph: Graph, product: Product) -> bool:
    """Whether a layer's bias, or what follows it, takes up a shift of its outputs."""
    node = product.node
    if not (node.kind.startswith("conv") or node.kind in ("linear", "addmm")):
        return False
    if product.added is not None:
        return True
    users = graph.users[node.name]
    return bool(users) and all(user.kind == "batch_norm" for user in users)


class _Sums:
    """Sums over the inputs of a call, about a first mean where they are to be centered."""

    def __init__(self, centered: bool) -> None:
        self._centered, self._count = centered, 0
        self._total, self._sum, self._about = (torch.zeros(()) for _ in range(3))
        self._found: tuple[Tensor, Tensor] | None = None

    def add(self, site: _Site, run: Run, examples: int) -> None:
        """Add rows of one part of the examples, of which there are so many in all."""
        product = site.product
        x, weight = run.values[product.x], run.values[product.weight]
        wanted = max(ROWS * site.unknowns, LEAST)
        share = 1.0
        whole = run.origins.tokens is None  # else rows are told by all examples
        if product.letters is None and x.ndim == weight.ndim and whole:
            needed = max(EXAMPLES, wanted // max(prod(product.node.shape[2:]), 1))
            share = min(1.0, needed / examples)
            x = x[: ceil(share * len(x))]
        generator = torch.Generator().manual_seed(self._count)
        most = ceil(wanted * min(1.0, len(x) / (share * examples))) if x.ndim else wanted
        for part in rows(product, x, weight, lambda every: most, generator, run.origins):
            self._take(part.inputs.cpu())

    def _take(self, part: Tensor) -> None:
        if self._centered and not self._count:
            self._about = part.mean(1, keepdim=True)
        part = part - self._about if self._centered else part
        self._total = self._total + part.transpose(1, 2) @ part
        self._sum = self._sum + part.sum(1).double()
        self._count += part.shape[1]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean products (groups, unknowns, unknowns) and means (groups, unknowns)."""
        if self._found is None:
            count = max(self._count, 1)
            mean = self._sum / count
            gram = self._total.div_(count)
            if self._centered:
                gram = gram - (mean[:, :, None] * mean[:, None, :]).to(gram.dtype)
                mean = mean + self._about[:, 0].double()
            self._found = gram, mean
        return self._found
