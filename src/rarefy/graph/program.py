"""A captured network as plain data: a frozen list of ATen calls.

A :class:`Graph` holds no tensor and no code: it can be written to JSON, read back and compared.
:class:`~rarefy.graph.model.GraphModel` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch

from rarefy.errors import InputError
from rarefy.graph.declarations import kind, schema, writes


@dataclass(frozen=True)
class Ref:
    """The value of another node, by name."""

    name: str


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor, at the batch size of the capture."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Value: TypeAlias = "Spec | int | float | bool | str | tuple[Value, ...] | None"
"""What a node returns: a tensor's spec, a number or text known at capture, or several of these."""


@dataclass(frozen=True)
class Node:
    """One step of a graph.

    Attributes:
        name: unique within the graph.
        op: an operator such as ``"aten.conv2d.default"``, or ``"input"``, ``"tensor"`` (a
            parameter, buffer or constant of the model) or ``"output"``.
        args: arguments; other nodes' values appear as :class:`Ref`, nested at will. For a
            ``"tensor"`` the path, for the ``"output"`` the list of outputs.
        kwargs: keyword arguments.
        value: what it returned at capture.
        scope: path of the module whose forward made the call.
        source: the line of the user's code that made the call, ``"file.py:12: x = ..."``.
    """

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    value: Value = None
    scope: str = ""
    source: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's tensor.

        Raises:
            InputError: the node does not return one tensor.
        """
        if not isinstance(self.value, Spec):
            raise InputError(f"node {self.name}", "it does not return one tensor", "Ask another")
        return self.value.shape

    @property
    def options(self) -> Mapping[str, Any]:
        """Keyword arguments, never None."""
        return self.kwargs or {}

    @cached_property
    def kind(self) -> str:
        """What the operator does: ``"conv2d"`` for all overloads of that."""
        return kind(self.op)

    def argument(self, name: str) -> Any:
        """An argument by its name in the operator's declaration, or its default; else None."""
        declared = schema(self.op)
        if name in self.options or declared is None:
            return self.options.get(name)
        for position, formal in enumerate(declared.arguments):
            if formal.name == name:
                given = position < len(self.args)
                return self.args[position] if given else formal.default_value
        return None

    @property
    def path(self) -> str:
        """Path of the parameter or buffer that a ``"tensor"`` node reads."""
        return str(self.args[0])

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes whose values this node reads, in order."""
        return tuple(ref.name for ref in refs((self.args, dict(self.options))))


def derived(name: str, suffix: str) -> str:
    """The name of a node that is made for another; captured names are identifiers, without dots."""
    return f"{name}.{suffix}"


def refs(arg: Any) -> Iterator[Ref]:
    """All references in nested arguments."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, tuple | list):
        for item in arg:
            yield from refs(item)
    elif isinstance(arg, Mapping):
        for item in arg.values():
            yield from refs(item)
    elif isinstance(arg, slice):
        yield from refs((arg.start, arg.stop, arg.step))


def substitute(arg: Any, lookup: Callable[[Ref], Any]) -> Any:
    """Nested arguments with every reference replaced by ``lookup(reference)``."""
    if isinstance(arg, Ref):
        return lookup(arg)
    if isinstance(arg, list):
        return [substitute(item, lookup) for item in arg]
    if isinstance(arg, tuple):
        return tuple(substitute(item, lookup) for item in arg)
    if isinstance(arg, Mapping):
        return {key: substitute(item, lookup) for key, item in arg.items()}
    return arg


@dataclass(frozen=True)
class Graph:
    """A network's computation: nodes in order of execution, and how arguments are flattened.

    Attributes:
        nodes: inputs, tensors, calls, and one ``"output"`` last.
        in_spec: pytree structure of ``(args, kwargs)``, as JSON.
        out_spec: pytree structure of the result, as JSON.
    """

    nodes: tuple[Node, ...]
    in_spec: str
    out_spec: str

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """Node of each name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """For each node's name, the nodes that read its value (each once)."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @property
    def calls(self) -> Iterator[Node]:
        """The nodes that compute something."""
        return (n for n in self.nodes if n.op not in ("input", "tensor", "output"))

    @cached_property
    def exits(self) -> Mapping[str, Node]:
        """Path of a module to the node whose tensor leaves it: the last that is read outside of it.

        Modules of which nothing is left, or that compute no tensor, are not among them.
        """
        found: dict[str, Node] = {}
        for node in self.calls:
            parts = node.scope.split(".") if node.scope and isinstance(node.value, Spec) else []
            for count in range(len(parts), 0, -1):
                path = ".".join(parts[:count])
                if all(f"{user.scope}.".startswith(f"{path}.") for user in self.users[node.name]):
                    break  # what does not leave a module does not leave those around it either
                found[path] = node
        return found

    @cached_property
    def tensor_paths(self) -> frozenset[str]:
        """Paths of all parameters, buffers and constants that are read."""
        return frozenset(n.path for n in self.nodes if n.op == "tensor")

    @property
    def output(self) -> Node:
        """The last node."""
        return self.nodes[-1]

    @cached_property
    def live(self) -> Graph:
        """The graph without calls that ``forward`` makes for nothing: their value is not read.

        Operators that write in place are kept.
        """
        read = set(self.output.inputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.op in ("input", "output") or node.name in read or writes(node.op):
                read.update(node.inputs)
                kept.append(node)
        return self if len(kept) == len(self.nodes) else self.with_nodes(kept[::-1])

    def with_nodes(self, nodes: Sequence[Node]) -> Graph:
        """The same graph with other nodes."""
        return replace(self, nodes=tuple(nodes))
