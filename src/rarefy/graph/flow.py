"""State of one walk over a graph, and what all rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from rarefy.graph.declarations import is_random, writes
from rarefy.graph.labels import FIXED, Atoms, Labels, Ledger
from rarefy.graph.memory import Memory
from rarefy.graph.program import Graph, Node, Ref, Spec, Value

EXTENT = "is the extent of a kernel"
"""Reason that is not worth telling: nobody expects a 3x3 kernel to become 3x2."""

Carried: TypeAlias = Any
"""Labels of a tensor, a tuple of these for several results, None for numbers."""

Rule: TypeAlias = "Callable[[Flow, Node], Carried]"

Zero: TypeAlias = "Callable[[Flow, Node], bool]"
"""Whether a node's value is zero at masked units, given where its inputs are."""


@dataclass
class Flow:
    """State of one walk over a graph.

    Attributes:
        graph: what is walked.
        ledger: atoms, ties, relations.
        labels: per node, the labels of its value.
        tensors: labels by identity and shape of parameters and buffers.
        vanishing: nodes whose value is zero wherever a unit is masked.
        counts: (node, argument) -> atoms whose surviving number that argument states.
        shapes: (node, argument) -> per dimension of the shape that it states, the atoms whose
            surviving number it is, or a size that stays.
        implicit_scale: attention nodes whose scale is not stated but follows from the size of their
            heads -> atoms of that dimension; fewer of them would change the scale.
        over_survivors: nodes that mix entries of a labelled dimension (a layer norm's statistics),
            so that they mean something else over fewer of them. By convention they are computed
            over what remains, and so does the reference of the proof.
        unknown: operators without a rule, with how often they were met.
        values: constants and whole-number buffers by path, whose entries may be positions.
        known: per node asked for, its value where it follows from ``values`` alone, else None.
        made: paths of the tensors that ``forward`` makes and no module owns.
    """

    graph: Graph
    ledger: Ledger = field(default_factory=Ledger)
    labels: dict[str, Any] = field(default_factory=dict)
    tensors: dict[tuple[int | str, tuple[int, ...]], Labels] = field(default_factory=dict)
    vanishing: set[str] = field(default_factory=set)
    counts: dict[tuple[str, str], Atoms] = field(default_factory=dict)
    shapes: dict[tuple[str, str], tuple[Atoms | int, ...]] = field(default_factory=dict)
    implicit_scale: dict[str, Atoms] = field(default_factory=dict)
    over_survivors: set[str] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    @cached_property
    def memory(self) -> Memory:
        """Which values share memory."""
        return Memory(self.graph)

    @cached_property
    def constant(self) -> frozenset[str]:
        """Nodes whose value follows from ``values`` and numbers alone."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "tensor":
                constant = node.path in self.values
            else:
                is_call = node.op not in ("input", "output") and not is_random(node.op)
                constant = is_call and found.issuperset(node.inputs)
            if constant:
                found.add(node.name)
        return frozenset(found)

    @cached_property
    def in_place(self) -> bool:
        """Whether any operator writes into its argument."""
        return any(writes(node.op) for node in self.graph.calls)

    def of(self, arg: Any) -> Labels:
        """Labels of a tensor argument; none for numbers."""
        return self.labels.get(arg.name) or () if isinstance(arg, Ref) else ()

    def shape(self, arg: Any) -> tuple[int, ...]:
        """Shape of a tensor argument; ``()`` for numbers."""
        value = self.graph.by_name[arg.name].value if isinstance(arg, Ref) else None
        return value.shape if isinstance(value, Spec) else ()

    def number(self, arg: Any) -> int:
        """A whole number, given or computed in the graph."""
        value = self.graph.by_name[arg.name].value if isinstance(arg, Ref) else arg
        assert isinstance(value, int)
        return value

    def zero(self, arg: Any) -> bool:
        """Whether the argument is zero wherever a unit is masked (numbers: whether it is 0)."""
        return arg.name in self.vanishing if isinstance(arg, Ref) else arg == 0

    def tie(self, node: Node, *sides: Atoms | None) -> Atoms | None:
        """Sides of one dimension go together; one that cannot change fixes the others."""
        known = [side for side in sides if side is not None]
        if len(known) < len(sides):
            for side in known:
                self.freeze(node, side, "meets a dimension whose size cannot change")
            return None
        for side in known[1:]:
            self.ledger.tie(known[0], side)
        return known[0] if known else None

    def freeze(self, node: Node, atoms: Atoms | None, reason: str) -> None:
        """These atoms cannot go, because of what ``node`` does."""
        if atoms is not None and not (len(atoms) and bool((atoms == FIXED).all())):
            self.ledger.fix(atoms, node.name, reason)

    def freeze_dims(self, node: Node, labels: Labels, dims: Sequence[int], reason: str) -> Labels:
        """Freeze these dimensions and return the labels of the others."""
        wrapped = {d % max(len(labels), 1) for d in dims}
        for d in wrapped & set(range(len(labels))):
            self.freeze(node, labels[d], reason)
        return tuple(None if d in wrapped else label for d, label in enumerate(labels))


def unlabeled(value: Value) -> Carried:
    if isinstance(value, Spec):
        return (None,) * len(value.shape)
    if isinstance(value, tuple):
        return tuple(unlabeled(v) for v in value)
    return None


def freeze_all(flow: Flow, node: Node, reason: str) -> None:
    for name in dict.fromkeys(node.inputs):
        for atoms in every(flow.labels.get(name)):
            flow.freeze(node, atoms, reason)


def every(carried: Any) -> list[Atoms]:
    if isinstance(carried, np.ndarray):
        return [carried]
    if isinstance(carried, tuple):
        return [atoms for part in carried for atoms in every(part)]
    return []


def zero_as_first(flow: Flow, node: Node) -> bool:
    """The value is zero wherever the first argument is."""
    return flow.zero(node.args[0])


def rows(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}
