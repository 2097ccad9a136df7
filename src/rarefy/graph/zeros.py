"""Where masked units give zero: what may be summed over without them."""

from __future__ import annotations

from rarefy.graph.declarations import writes
from rarefy.graph.flow import Flow, every
from rarefy.graph.program import Graph, Node
from rarefy.graph.rules import ZEROS


def note_zeros(flow: Flow, node: Node) -> None:
    """Note whether the node's value vanishes; a write that does not spoils all that share it."""
    if node.name in flow.over_survivors or vanishes(flow, node):
        flow.vanishing.add(node.name)
    elif writes(node.op) and every(flow.labels.get(node.name)):
        owner = flow.memory.owner
        flow.vanishing -= {n for n in flow.vanishing if owner[n] == owner[node.name]}


def vanishes(flow: Flow, node: Node) -> bool:
    """Whether the value is zero at masked units, given where its inputs are."""
    if flow.labels.get(node.name) is None:  # a number
        return False
    rule = ZEROS.get(node.kind.removesuffix("_"))
    return rule is not None and rule(flow, node)


def directions(graph: Graph) -> frozenset[tuple[str, int]]:
    """(parameter, dimension) of the vectors that a weight norm divides by their length.

    A vector of a masked unit keeps its values: zeros would be divided by zero, and the length that
    the unit has beside it, a parameter of its own, is masked already.
    """
    found = set()
    for node in graph.calls:
        vectors = graph.by_name[node.inputs[0]] if node.kind == "_weight_norm" else node
        if vectors.op == "tensor":
            found.add((vectors.path, int(node.argument("dim"))))
    return frozenset(found)
