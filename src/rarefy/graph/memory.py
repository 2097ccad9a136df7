"""Which values lie in the same memory: views, and what is written in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rarefy.graph.declarations import schema, writes
from rarefy.graph.program import Graph, Node, refs

_MAY_RETURN_INPUT = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout type_as broadcast_tensors "
    "meshgrid atleast_1d atleast_2d atleast_3d einsum".split()
)
"""Operators that may return (a view of) an argument though their declaration does not say so."""


def sharing(node: Node) -> tuple[str, ...]:
    """Names of the nodes in whose memory a call's result may lie, or into which it writes."""
    declared = schema(node.op)
    if node.op == "output" or not node.inputs:
        return ()
    if declared is None or node.kind in _MAY_RETURN_INPUT:
        given = (*node.args, *node.options.values())
        return tuple(ref.name for ref in refs(next(arg for arg in given if any(refs(arg)))))
    formals = [formal.name for formal in declared.arguments if formal.alias_info is not None]
    return tuple(ref.name for name in formals for ref in refs(node.argument(name)))


@dataclass(frozen=True)
class Memory:
    """What a graph's values share.

    Attributes:
        graph: any.
    """

    graph: Graph

    @cached_property
    def owner(self) -> Mapping[str, str]:
        """For each node's name, the node whose value lies in the same memory, if any but itself:
        views, and what is written in place, share that of what they are made of."""
        found: dict[str, str] = {}
        for node in self.graph.nodes:
            owners = [found[name] for name in sharing(node)] or [node.name]
            found[node.name] = owners[0]
            if len({*owners}) > 1:  # which of them it is cannot be told
                found = {name: owners[0] if o in owners else o for name, o in found.items()}
        return found

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """For each :attr:`owner` of memory, the nodes that read or write it, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            for name in dict.fromkeys(self.owner[name] for name in node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def effects(self) -> Mapping[str, tuple[str, ...]]:
        """For each node's name, the nodes that depend on it: its users, and after a write in place
        those that read the memory that was written; the output where that is an argument's."""
        found = {name: [user.name for user in users] for name, users in self.graph.users.items()}
        given = {self.owner[n.name] for n in self.graph.nodes if n.op in ("input", "tensor")}
        for node in (n for n in self.graph.calls if writes(n.op)):
            memory = self.owner[node.name]
            touching = self.readers[memory]
            found[node.name] += [n.name for n in touching[touching.index(node) + 1 :]]
            if memory in given:
                found[node.name].append(self.graph.output.name)
        return {name: tuple(dict.fromkeys(names)) for name, names in found.items()}

    @cached_property
    def written(self) -> frozenset[str]:
        """Names of the values in memory that something writes into, but for dropout at rest."""
        memory = {
            self.owner[node.name]
            for node in self.graph.calls
            if writes(node.op) and (node.kind != "dropout_" or node.argument("train"))
        }
        return frozenset(name for name, owner in self.owner.items() if owner in memory)
