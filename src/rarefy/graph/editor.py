"""What is left of every value when units go, for the edits that rewrite a graph's arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.graph.flow import Flow
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref, Spec, Value

Edit: TypeAlias = "Callable[[Editor, Node], Node | tuple[Node, ...]]"
"""(editor, node whose value is the smaller one already) -> the node, its arguments in line.

Where one call is not enough, several nodes in order, the last under the name of the first given.
"""


class Editor:
    """Brings the sizes that a node's arguments state in line with the labels.

    Args:
        flow: the walk over the graph.
        missing: for each atom, whether it goes.

    Attributes:
        constants: tensors that edited nodes read and that the network did not have, by path.
        names: the new names given out, of nodes and of these tensors.
    """

    def __init__(self, flow: Flow, missing: NDArray[np.bool_]) -> None:
        self.flow = flow
        self.missing = missing
        self.constants: dict[str, Tensor] = {}
        self.names: set[str] = set()

    def left(self, size: int, atoms: Atoms | None) -> int:
        """How many of ``size`` entries stay."""
        return size if atoms is None else int((~self.missing[atoms]).sum())

    def gone(self, node: Node, position: int, dim: int) -> NDArray[np.bool_] | None:
        """Which entries of an operand go along a dimension; None where none does."""
        labels = self.flow.of(node.args[position])
        return self.hit(labels[dim % len(labels)]) if labels else None

    def hit(self, atoms: Atoms | None) -> NDArray[np.bool_] | None:
        """Which of these entries go; None where none does."""
        if atoms is None or not self.missing[atoms].any():
            return None
        return np.asarray(self.missing[atoms])

    def unused(self, name: str) -> str:
        """A name like this one that no node and no tensor has."""
        paths = {path.partition(".")[0] for path in self.flow.graph.tensor_paths}
        taken = paths | self.flow.graph.by_name.keys() | self.names
        names = (name, *(f"{name}_{number}" for number in range(len(taken))))
        found = next(n for n in names if n not in taken)
        self.names.add(found)
        return found

    def picked(self, node: Node, source: Node, picks: Sequence[tuple[int, Atoms]]) -> list[Node]:
        """Nodes that select entries of ``source``; the last is named like ``node``.

        Args:
            node: what the selection stands for.
            source: a node of which entries are wanted, its value of the size that it has by then.
            picks: (dimension, entries of it in order), at least one.
        """
        found: list[Node] = []
        value = source.value
        assert isinstance(value, Spec)
        for number, (dim, entries) in enumerate(picks, start=1):
            path = self.unused(f"{node.name}_entries")
            self.constants[path] = torch.from_numpy(np.ascontiguousarray(entries, np.int64))
            size = Spec((len(entries),), torch.int64)
            shape = (*value.shape[:dim], len(entries), *value.shape[dim + 1 :])
            value = Spec(shape, value.dtype)
            name = node.name if number == len(picks) else self.unused(f"{node.name}_part")
            args = (Ref(source.name), dim, Ref(path))
            source = replace(
                node, name=name, op="aten.index_select.default", args=args, kwargs={}, value=value
            )
            found += [Node(path, "tensor", (path,), value=size), source]
        return found

    def shrunk(self, node: Node) -> Node:
        """The node with the shape that its value has when the units are gone."""
        return replace(node, value=self._value(node.value, self.flow.labels.get(node.name)))

    def _value(self, value: Value, labels: Any) -> Value:
        if isinstance(value, Spec) and labels is not None:
            sizes = zip(value.shape, labels, strict=True)
            return Spec(tuple(self.left(n, atoms) for n, atoms in sizes), value.dtype)
        if isinstance(value, tuple) and labels is not None:
            pairs = zip(value, labels, strict=True)
            return tuple(self._value(v, part) for v, part in pairs)
        return value
