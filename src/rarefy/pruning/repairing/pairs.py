"""Layers of two networks that go together: the original's, and those of what was made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from rarefy.errors import InputError
from rarefy.graph.count import COSTS, is_uncounted
from rarefy.graph.program import Graph, Node


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
    """The two networks have no layer in common."""


def layer_pairs(first: Graph, second: Graph) -> tuple[list[Pair], list[Node]]:
    """Layers of both graphs that go together, in order, and those of the second that are alone.

    Raises:
        StrangersError: no two layers go together.
    """
    sides = [_layers(graph) for graph in (first, second)]
    keys = [[key for key, _ in side] for side in sides]
    blocks = SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    found = [
        (sides[0][block.a + i][1], sides[1][block.b + i][1])
        for block in blocks
        for i in range(block.size)
    ]
    if sides[1] and not found:
        raise StrangersError(
            "repair(original, compressed)",
            "the two networks do not run the same operators",
            "Give the network that was compressed and the result of compressing it",
        )
    pairs = list(_ended(first, second, found))
    paired = {pair.right.name for pair in pairs}
    return pairs, [node for _, node in sides[1] if node.name not in paired]


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


def _ended(first: Graph, second: Graph, found: Sequence[tuple[Node, Node]]) -> Iterator[Pair]:
    """The pairs with their ends; without those whose end is only behind the next layer."""
    rank = {node.name: number for number, node in enumerate(first.nodes)}
    lefts = [left.name for left, _ in found]
    for (left, right), following in zip(found, [*lefts[1:], first.output.name], strict=True):
        norm, end = next_norm(first, left), left
        if norm is not None and norm.name not in lefts and next_norm(second, right) is None:
            end = norm
        if rank[end.name] < rank[following]:
            yield Pair(left, right, end)


def next_norm(graph: Graph, layer: Node) -> Node | None:
    """The BatchNorm of a layer's result, if that is all that becomes of it."""
    users = graph.users[layer.name]
    if len(users) != 1 or users[0].kind != "batch_norm":
        return None
    return users[0] if users[0].args[0].name == layer.name else None
