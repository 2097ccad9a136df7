"""What a plan leaves of a cost: MACs, parameters, or estimated milliseconds.

Each of them is a sum over the nodes of the graph, whose terms depend on nothing but the sizes of
a few dimensions. Terms are remembered by those sizes, since most plans differ in few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rarefy.errors import BudgetError
from rarefy.graph.blocks import Block
from rarefy.graph.count import COSTS, Shapes
from rarefy.graph.declarations import is_view
from rarefy.graph.labels import Atoms
from rarefy.graph.layer import layer
from rarefy.graph.program import Graph, Node, Spec
from rarefy.graph.stubs import without_blocks
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.costs import Costs, Surface
from rarefy.types import Budget

Price = Callable[[Shapes], float]
"""Shapes of the network's tensors -> what one node costs."""


@dataclass(frozen=True)
class _Term:
    """One node's part of a cost.

    Attributes:
        price: what it costs under given shapes.
        sizes: numbers of the labelled dimensions that the price depends on.
        known: the price by those sizes.
    """

    price: Price
    sizes: NDArray[np.int64]
    known: dict[bytes, float]


class Account:
    """A cost as a sum over nodes; called with a plan, what it leaves.

    Args:
        network: the trace.
        prices: of the nodes that have any, by name.
        constant: a part that no plan changes.
    """

    def __init__(
        self, network: Network, prices: Mapping[str, Price], constant: float = 0.0
    ) -> None:
        self._network, self._constant = network, constant
        self._extents = Extents(network)
        self._terms = {
            name: _Term(
                price, self._extents.of([name, *network.captured.graph.by_name[name].inputs]), {}
            )
            for name, price in prices.items()
        }
        self.before = self(Plan.of(network, np.zeros(network.coupling.units, np.bool_)))

    def __call__(self, plan: Plan) -> float:
        """The cost of what a plan leaves."""
        left = self._extents.left(plan)
        shape = partial(self._extents.shape, left)
        total = self._constant
        gone = self._bypassed(plan.blocks)
        for term in (term for name, term in self._terms.items() if name not in gone):
            key = left[term.sizes].tobytes()
            if key not in term.known:
                term.known[key] = term.price(shape)
            total += term.known[key]
        return total

    def share(self, plan: Plan) -> float:
        """What a plan leaves, as a share of the whole."""
        return self(plan) / max(self.before, 1e-12)

    def _bypassed(self, blocks: Sequence[Block]) -> Collection[str]:
        """Nodes that nothing needs without these blocks."""
        if not blocks:
            return ()
        graph = self._network.captured.graph.live
        return graph.by_name.keys() - without_blocks(graph, blocks).by_name.keys()


class Extents:
    """The sizes of all labelled dimensions under a plan, each distinct one counted once."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._number: dict[int, int] = {}
        arrays: list[Atoms] = []
        for name in network.flow.labels:
            for atoms in self._labels(name):
                if atoms is not None and len(atoms) and id(atoms) not in self._number:
                    self._number[id(atoms)] = len(arrays)
                    arrays.append(atoms)
        self._atoms = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        lengths = np.array([len(a) for a in arrays], np.int64)
        self._start = np.cumsum(lengths) - lengths
        self._whole = lengths

    def _labels(self, name: str) -> tuple[Atoms | None, ...]:
        """Labels of a node with one tensor; of other nodes none."""
        node = self._network.captured.graph.by_name[name]
        if not isinstance(node.value, Spec):
            return ()
        return self._network.flow.labels.get(name) or (None,) * len(node.value.shape)

    def of(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Numbers of the labelled dimensions of these nodes."""
        found = {
            self._number[id(atoms)]
            for name in names
            for atoms in self._labels(name)
            if atoms is not None and len(atoms)
        }
        return np.array(sorted(found), np.int64)

    def left(self, plan: Plan) -> NDArray[np.int64]:
        """The size of each distinct labelled dimension under a plan."""
        if not len(self._start):
            return self._whole
        gone = np.add.reduceat(plan.gone[self._atoms].astype(np.int64), self._start)
        found: NDArray[np.int64] = self._whole - gone
        return found

    def shape(self, left: NDArray[np.int64], name: str) -> tuple[int, ...]:
        """The shape of a tensor under a plan."""
        whole = self._network.captured.graph.by_name[name].shape
        return tuple(
            size if atoms is None or not len(atoms) else int(left[self._number[id(atoms)]])
            for size, atoms in zip(whole, self._labels(name), strict=True)
        )


def account(
    network: Network, model: nn.Module, budget: Budget, costs: Costs | None = None
) -> Account | None:
    """The cost that a budget is about; None where it is a number of units or blocks.

    Raises:
        BudgetError: it has to be measured, and no costs of layers are given.
    """
    if budget.macs is not None:
        return macs(network)
    if budget.params is not None:
        return params(network, model)
    if budget.latency is not None and costs is not None:
        return latency(network, costs)
    if budget.sparsity is not None or budget.blocks is not None:
        return None
    raise BudgetError(
        f"select(budget=Budget({budget.kind}={budget.share:g}))",
        "it has to be measured, and nothing measures here",
        "Call rarefy.prune, which exports and measures what it makes",
    )


def macs(network: Network) -> Account:
    """Multiply-accumulate operations, of the batch that was captured."""
    nodes = network.captured.graph.live.calls
    rows = ((node, COSTS.get(node.kind.removesuffix("_"))) for node in nodes)
    return Account(network, {n.name: partial(cost, n) for n, cost in rows if cost is not None})


def params(network: Network, model: nn.Module) -> Account:
    """Parameters, shared ones once; those that the forward does not read stay."""
    node_of = {n.path: n.name for n in network.captured.graph.nodes if n.op == "tensor"}
    own = dict(model.named_parameters())
    unread = sum(tensor.numel() for path, tensor in own.items() if path not in node_of)
    names = [node_of[path] for path in own if path in node_of]
    return Account(network, {name: partial(_entries, name) for name in names}, unread)


def _entries(name: str, shape: Shapes) -> int:
    return prod(shape(name))


def latency(network: Network, costs: Costs) -> Account:
    """Milliseconds, as estimated from the latencies of layers."""
    graph = network.captured.graph
    prices: dict[str, Price] = {}
    others = []
    for node in graph.calls:
        if node.name in costs.surfaces:
            prices[node.name] = partial(_milliseconds, graph, node, costs.surfaces[node.name])
        elif isinstance(node.value, Spec) and not is_view(node.op):
            others.append(node)
    total = sum(prod(node.shape) for node in others)
    for node in others:
        prices[node.name] = partial(_made, node.name, costs.rest / max(total, 1))
    return Account(network, prices)


def _milliseconds(graph: Graph, node: Node, surface: Surface, shape: Shapes) -> float:
    found = layer(graph, node, shape)
    return 0.0 if found is None else surface(found)


def _made(name: str, each: float, shape: Shapes) -> float:
    return each * prod(shape(name))
