"""Layers of two networks that go together: the original's, and those of what was made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TypeAlias

from rarefy.errors import InputError
from rarefy.graph.count import COSTS, is_uncounted
from rarefy.graph.program import Graph, Node
from rarefy.pruning.running.solvable import next_norm
from rarefy.pruning.running.uses import adjoins, sources


@dataclass(frozen=True)
class Pair:
    """One layer in both networks.

    Attributes:
        left: the original's.
        right: the compressed network's.
        end: the original's call whose result the right one should give: the left one, or the
            BatchNorm behind it where the compressed network has folded that into the layer.
    """

    left: Node
    right: Node
    end: Node


class StrangersError(InputError):
    """One of the two networks was not made of the other."""


Group: TypeAlias = tuple[Pair, ...]
"""One layer with those of its calls that stand next to each other, of which none reads another."""


def layer_pairs(first: Graph, second: Graph) -> tuple[list[Group], list[Node]]:
    """Layers of both graphs that go together, in order, and those of the second that are alone.

    Raises:
        StrangersError: no two layers go together.
    """
    graphs = first, second
    sides = [_layers(graph) for graph in graphs]
    kinds = [[kind for kind, _ in side] for side in sides]
    blocks = SequenceMatcher(None, kinds[0], kinds[1], autojunk=False).get_matching_blocks()
    matched = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    if sides[1] and not matched:
        raise StrangersError(
            "repair(original, compressed)",
            "the two networks do not run the same operators",
            "Give the network that was compressed and the result of compressing it",
        )
    ranks = [{node.name: number for number, node in enumerate(g.nodes)} for g in graphs]
    keys = [sources(graph, graph.tensor_paths) for graph in graphs]
    found: list[list[_Calls]] = []
    for i, j in matched:
        calls = sides[0][i][1], sides[1][j][1]
        if found and all(map(adjoins, ranks, keys, zip(*found[-1], strict=True), calls)):
            found[-1].append(calls)
        else:
            found.append([calls])
    groups = list(_ended(first, second, ranks[0], found))
    paired = {pair.right.name for group in groups for pair in group}
    return groups, [node for _, node in sides[1] if node.name not in paired]


_Calls: TypeAlias = tuple[Node, Node]
"""One call in both graphs."""


def _layers(graph: Graph) -> list[tuple[tuple[str, str], Node]]:
    """Operators that have weights, each under its kind and the path of its first tensor.

    That path tells layers apart in both graphs, whose other operators may differ: a forward may do
    something else with other sizes, surgery on a graph writes some operators in another way, and
    quantizers stand between.
    """
    owner: dict[str, str] = {n.name: n.path for n in graph.nodes if n.op == "tensor"}
    found = []
    for node in graph.calls:
        given = [owner[name] for name in node.inputs if name in owner]
        counted = node.kind == "batch_norm" or node.kind.removesuffix("_") in COSTS
        counted = counted or is_uncounted(node, lambda name: graph.by_name[name].shape)
        if given and counted:
            found.append(((node.kind, given[0]), node))
        elif given and len(given) == len(node.inputs):
            owner[node.name] = given[0]  # computed from weights alone
    return found


def _ended(
    first: Graph, second: Graph, rank: Mapping[str, int], found: Sequence[Sequence[_Calls]]
) -> Iterator[Group]:
    """The pairs with their ends; without those whose end is only behind the next layer."""
    lefts = {left.name for calls in found for left, _ in calls}
    limits = [rank[calls[0][0].name] for calls in found[1:]] + [rank[first.output.name]]
    for calls, limit in zip(found, limits, strict=True):
        group: list[Pair] = []
        for left, right in calls:
            norm, end = next_norm(first, left), left
            if norm is not None and norm.name not in lefts and next_norm(second, right) is None:
                end = norm
            is_next = not group or rank[group[-1].end.name] < rank[end.name]
            if is_next and rank[end.name] < limit:
                group.append(Pair(left, right, end))
        if group:
            yield tuple(group)
