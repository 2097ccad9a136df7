"""Calls that share a weight, such as the towers of a Siamese network or a head on many scales.

What all of them say about the weight has to be known at once to solve it. So the calls are brought
next to each other, wherever none of them waits for another.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import pairwise

from rarefy.graph.declarations import is_random, writes
from rarefy.graph.memory import Memory
from rarefy.graph.program import Graph, Node, Ref
from rarefy.pruning.running.products import products


def gathered(graph: Graph, paths: Collection[str]) -> Graph:
    """The same computation, with the calls of one weight next to each other where they can be.

    Args:
        graph: any.
        paths: of the weights for which that is done, of BatchNorms the running means.
    """
    uses: dict[Hashable, list[str]] = {}
    for name, key in sources(graph, paths).items():
        uses.setdefault(key, []).append(name)
    shared = [calls for calls in uses.values() if len(calls) > 1]
    if not shared:
        return graph
    later = _later(graph)
    unit = {node.name: node.name for node in graph.nodes}
    order: Sequence[Node] = graph.nodes
    left = [shared]
    while left:  # those that can come together all at once, else half of them, and so on
        some = left.pop()
        tried = unit | {name: calls[0] for calls in some for name in calls}
        found = _ordered(graph, later, tried)
        if found is not None:
            unit, order = tried, found
        elif len(some) > 1:
            left += [some[len(some) // 2 :], some[: len(some) // 2]]
    return graph.with_nodes(order)


def sources(graph: Graph, paths: Collection[str]) -> Mapping[str, Hashable]:
    """For the names of calls, what they read of these tensors, equal for calls of one layer.

    Of products that is the weight, of BatchNorms the running mean.
    """
    found: dict[str, Hashable] = {p.node.name: p.entries.key for p in products(graph, paths)}
    for node in graph.calls:
        mean = node.argument("running_mean") if node.kind == "batch_norm" else None
        source = graph.by_name[mean.name] if isinstance(mean, Ref) else None
        if source is not None and source.op == "tensor" and source.path in paths:
            found[node.name] = source.path
    order = [node.name for node in graph.calls if node.name in found]
    return {name: found[name] for name in order}


def adjoins(
    rank: Mapping[str, int], keys: Mapping[str, Hashable], group: Sequence[Node], call: Node
) -> bool:
    """Whether a call of the layer of a group stands right behind it and reads nothing of it.

    Args:
        rank: place of each node's name in its graph.
        keys: as :func:`sources` returns them.
        group: calls, one behind the other.
        call: a later one.
    """
    last, key = group[-1], keys.get(call.name)
    is_next = rank[call.name] == rank[last.name] + 1 and key == keys.get(last.name)
    return key is not None and is_next and {node.name for node in group}.isdisjoint(call.inputs)


def _later(graph: Graph) -> Mapping[str, list[str]]:
    """For each node's name, nodes that have to stay behind it."""
    memory = Memory(graph)
    found = {name: list(names) for name, names in memory.effects.items()}
    for node in (call for call in graph.calls if writes(call.op)):
        touching = memory.readers[memory.owner[node.name]]
        for before in touching[: touching.index(node)]:
            found[before.name].append(node.name)
    for one, other in pairwise(call.name for call in graph.calls if _draws(call)):
        found[one].append(other)
    return found


def _draws(node: Node) -> bool:
    """Whether a call draws numbers: dropout, and attention with it, do so only where told to."""
    told = map(node.argument, ("train", "training", "dropout_p"))
    return is_random(node.op) and not any(value == 0 for value in told)


def _ordered(
    graph: Graph, later: Mapping[str, list[str]], unit: Mapping[str, str]
) -> list[Node] | None:
    """The nodes with those of a unit together, as near to their order as can be; None for none."""
    waiting = dict.fromkeys(unit.values(), 0)
    members: dict[str, list[Node]] = {name: [] for name in waiting}
    for node in graph.nodes:
        members[unit[node.name]].append(node)
        for name in later[node.name]:
            waiting[unit[name]] += 1
    rank = {name: number for number, name in enumerate(members)}
    ready = [(rank[name], name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    found: list[Node] = []
    while ready:
        _, name = heapq.heappop(ready)
        found += members[name]
        for node in members[name]:
            for other in (unit[after] for after in later[node.name]):
                waiting[other] -= 1
                if not waiting[other]:
                    heapq.heappush(ready, (rank[other], other))
    return found if len(found) == len(graph.nodes) else None
