"""A captured network as plain data, and the module that runs it.

A :class:`Graph` is a frozen list of ATen calls. It holds no tensor and no code: it can be written
to JSON, read back and compared. A :class:`GraphModel` is the ``nn.Module`` that runs a graph with
parameters and buffers of its own, under the paths that they have in the user's module.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.errors import FormatError, InputError


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

    @cached_property
    def owner(self) -> Mapping[str, str]:
        """For each node's name, the node whose value lies in the same memory, if any but itself:
        views, and what is written in place, share that of what they are made of."""
        found: dict[str, str] = {}
        for node in self.nodes:
            owners = [found[name] for name in sharing(node)] or [node.name]
            found[node.name] = owners[0]
            if len({*owners}) > 1:  # which of them it is cannot be told
                found = {name: owners[0] if o in owners else o for name, o in found.items()}
        return found

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """For each :attr:`owner` of memory, the nodes that read or write it, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(self.owner[name] for name in node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def effects(self) -> Mapping[str, tuple[str, ...]]:
        """For each node's name, the nodes that depend on it: its users, and after a write in place
        those that read the memory that was written; the output where that is an argument's."""
        found = {name: [user.name for user in users] for name, users in self.users.items()}
        given = {self.owner[n.name] for n in self.nodes if n.op in ("input", "tensor")}
        for node in (n for n in self.calls if writes(n.op)):
            memory = self.owner[node.name]
            touching = self.readers[memory]
            found[node.name] += [n.name for n in touching[touching.index(node) + 1 :]]
            if memory in given:
                found[node.name].append(self.output.name)
        return {name: tuple(dict.fromkeys(names)) for name, names in found.items()}

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


SCALAR_OPS: Mapping[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in "getitem add sub mul floordiv mod neg truediv pow eq ne lt le gt ge".split()
} | {
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "math.ceil": torch.sym_int,
}
"""Operators on the numbers of a dynamic shape; all others are ATen's."""


def is_known(op: str) -> bool:
    """Whether :func:`resolve` finds the operator."""
    try:
        resolve(op)
    except FormatError:
        return False
    return True


def resolve(op: str) -> Callable[..., Any]:
    """The function behind an operator's name: one of :data:`SCALAR_OPS`, of ATen, of a library.

    Operators of libraries are those registered in this process; a stored graph may call none.

    Raises:
        FormatError: the name is not that of such an operator.
    """
    if op in SCALAR_OPS:
        return SCALAR_OPS[op]
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if all(part.isidentifier() for part in (namespace, name, overload)):
        packet = getattr(getattr(torch.ops, namespace, None), name, None)
        found = getattr(packet, overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise FormatError(
        f"operator {op!r}",
        "it is not an operator that this version of PyTorch has",
        "Use the PyTorch version that wrote the file, or a newer one",
    )


def kind(op: str) -> str:
    """An operator's name without namespace and overload.

    Example:
        >>> kind("aten.conv2d.default"), kind("operator.add"), kind("input")
        ('conv2d', 'add', 'input')
    """
    namespace, _, rest = op.partition(".")
    return rest.partition(".")[0] or namespace


def schema(op: str) -> torch.FunctionSchema | None:
    """The declaration of an ATen operator; None for all others."""
    try:
        found = resolve(op)
    except FormatError:
        return None
    return found._schema if isinstance(found, torch._ops.OpOverload) else None


_MAY_RETURN_INPUT = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout type_as broadcast_tensors "
    "meshgrid atleast_1d atleast_2d atleast_3d einsum".split()
)
"""Operators that may return (a view of) an argument though their declaration does not say so."""


def shares_memory(op: str) -> bool:
    """Whether the result may be, or may be a view of, an argument of the operator."""
    declared = schema(op)
    if declared is None or kind(op) in _MAY_RETURN_INPUT:
        return True
    return any(value.alias_info is not None for value in declared.returns)


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


def is_view(op: str) -> bool:
    """Whether the result is a view of an argument, by the operator's declaration."""
    declared = schema(op)
    if declared is None:
        return op == "operator.getitem"
    return not declared.is_mutable and any(v.alias_info is not None for v in declared.returns)


def writes(op: str) -> bool:
    """Whether the operator writes into its first argument."""
    declared = schema(op)
    return declared is not None and declared.is_mutable


def is_random(op: str) -> bool:
    """Whether the operator draws numbers, or is none that is known."""
    if not is_known(op):
        return True
    return torch.Tag.nondeterministic_seeded in getattr(resolve(op), "tags", ())


class _Container(nn.Module):
    """A nameless place for parameters under a dotted path."""


def assign(root: nn.Module, path: str, tensor: Tensor, *, buffer: bool = False) -> None:
    """Put a tensor at ``path`` below ``root``, making the containers on the way."""
    *parents, leaf = path.split(".")
    module = root
    for name in parents:
        if name not in module._modules:
            module.add_module(name, _Container())
        module = module.get_submodule(name)
    if buffer:
        module.register_buffer(leaf, tensor)
    elif isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor))


TRAINING_FLAG = {
    "aten.batch_norm.default": 5,
    **{f"aten.{name}.input": 6 for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{
        f"aten.{name}.default": 2
        for base in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
        for name in (base, f"{base}_")
    },
}
"""Operators that act differently in training, and which argument says so."""


class GraphModel(nn.Module):
    """A network that runs a :class:`Graph`, with tensors under the paths of the original.

    It trains (``train()`` and ``eval()`` switch BatchNorm and dropout), copies, moves between
    devices and exports like any module; its ``state_dict`` has the original's keys.

    Args:
        graph: what to compute.
        parameters: path to parameter; all that the graph reads.
        buffers: path to buffer or constant; all that the graph reads.

    Raises:
        InputError: the graph reads a tensor that is not given.
    """

    def __init__(
        self, graph: Graph, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        missing = sorted(graph.tensor_paths - parameters.keys() - buffers.keys())
        if missing:
            raise InputError("GraphModel", f"no tensor for {missing}", "Give every tensor read")
        self.graph = graph
        for path, tensor in parameters.items():
            assign(self, path, tensor)
        for path, tensor in buffers.items():
            assign(self, path, tensor, buffer=True)
        self._in_spec = pytree.treespec_loads(graph.in_spec)
        self._keywords = _keyword_names(graph)
        self._out_spec = pytree.treespec_loads(graph.out_spec)
        self._steps = [(n, _function(n)) for n in graph.nodes]
        self._last_use = last_use(graph)
        self.eval()

    def with_graph(self, graph: Graph) -> GraphModel:
        """Another graph over the same tensors, which are shared."""
        return GraphModel(
            graph,
            dict(self.named_parameters(remove_duplicate=False)),
            dict(self.named_buffers(remove_duplicate=False)),
        )

    @property
    def is_quantized(self) -> bool:
        """Whether it holds quantizers of activations or weights."""
        kinds = ("fake_quantize", "_fake_quantize")
        return any(node.kind.startswith(kinds) for node in self.graph.calls)

    def tensor(self, path: str) -> Tensor:
        """The parameter or buffer at ``path``."""
        module_path, _, leaf = path.rpartition(".")
        found = getattr(self.get_submodule(module_path), leaf)
        assert isinstance(found, Tensor)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; arguments as those of the capture, of any batch size it allows."""
        ordered = {name: kwargs[name] for name in self._keywords if name in kwargs} | kwargs
        flat, spec = pytree.tree_flatten((args, ordered))
        if spec != self._in_spec:
            raise InputError(
                "forward(...)",
                f"arguments are structured as {spec}, the graph was captured with {self._in_spec}",
                "Call it as it was captured",
            )
        values: dict[str, Any] = {}
        given = iter(flat)
        for node, function in self._steps:
            if node.op == "input":
                values[node.name] = _checked(node, next(given))
            elif node.op == "tensor":
                values[node.name] = self.tensor(node.path)
            elif node.op == "output":
                outputs = substitute(node.args[0], lambda ref: values[ref.name])
                return pytree.tree_unflatten(outputs, self._out_spec)
            else:
                assert function is not None
                values[node.name] = self.step(node, function, values)
            for name in self._last_use[node.name]:
                del values[name]
        raise AssertionError("a graph ends with its output")

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Run one call on the values of the nodes before it."""
        args = substitute(node.args, lambda ref: values[ref.name])
        if self.training and node.op in TRAINING_FLAG:
            flag = TRAINING_FLAG[node.op]
            args = (*args[:flag], True, *args[flag + 1 :])
        return function(*args, **substitute(node.options, lambda ref: values[ref.name]))


def _keyword_names(graph: Graph) -> list[str]:
    """Names of the keyword arguments, in the order of the capture."""
    _, keywords = json.loads(graph.in_spec)[1]["children_spec"]
    return list(json.loads(keywords["context"]))


def _checked(node: Node, given: Any) -> Any:
    """An argument, as long as it is what the graph was captured with where that is no tensor."""
    known = node.value
    if isinstance(known, Spec) or (not isinstance(given, Tensor) and given == known):
        return given
    raise InputError(
        f"forward(...): argument {node.name}",
        f"it was {known!r} when the graph was captured, which holds for that value only, and is "
        f"{given if not isinstance(given, Tensor) else 'a tensor'!r} now",
        "Call it as it was captured, or capture the network again",
    )


def _function(node: Node) -> Callable[..., Any] | None:
    return None if node.op in ("input", "tensor", "output") else resolve(node.op)


def last_use(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """For each node, the values that nobody reads after it (its own, where nobody ever does)."""
    last = {node.name: node.name for node in graph.nodes}
    for node in graph.nodes:
        for name in node.inputs:
            last[name] = node.name
    done: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for name, user in last.items():
        if user != graph.output.name:
            done[user].append(name)
    return {name: tuple(names) for name, names in done.items()}
