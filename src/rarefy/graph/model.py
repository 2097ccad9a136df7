"""The module that runs a graph, its tensors under the paths that they have in the user's module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.errors import InputError
from rarefy.graph.declarations import resolve
from rarefy.graph.program import Graph, Node, Spec, substitute


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
