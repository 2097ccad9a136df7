"""A network and a plan -> a smaller network: the user's own module, or a rewritten graph.

:func:`cut` slices the parameters of a copy of the user's module and brings the attributes of
PyTorch's own layers in line. :func:`rewrite` does the same to the captured graph, where every size
that the code computes with is read off the labels; it works for any forward, but returns a
:class:`~rarefy.graph.program.GraphModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.graph.capture import graph_model
from rarefy.graph.groups import Mask
from rarefy.graph.program import GraphModel, Node, Ref, Spec, Value
from rarefy.graph.rules.views import slice_bounds
from rarefy.graph.trace import Network, storages
from rarefy.pruning import attributes
from rarefy.pruning.select import Plan

Kept = Mapping[tuple[str, int], NDArray[np.int64]]
"""(path, dimension) -> the entries that stay, for every dimension that shrinks."""


def kept_entries(network: Network, plan: Plan) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Which entries of which parameters and buffers stay."""
    found = {}
    for node in network.captured.graph.nodes:
        if node.op == "tensor":
            for dim, atoms in enumerate(network.flow.labels[node.name]):
                if atoms is not None and plan.gone[atoms].any():
                    found[node.path, dim] = np.flatnonzero(~plan.gone[atoms])
    return found


def cut(model: nn.Module, network: Network, plan: Plan) -> nn.Module:
    """A copy of the user's module with the units gone; the model itself is untouched."""
    small = copy.deepcopy(model)
    kept = with_aliases(model, kept_entries(network, plan))
    old = {path: _tensor(small, path) for path in dict.fromkeys(path for path, _ in kept)}
    made: dict[int, Tensor] = {}
    for path, tensor in old.items():
        if id(tensor) not in made:
            made[id(tensor)] = sliced(tensor, {d: i for (p, d), i in kept.items() if p == path})
        _replace(small, path, made[id(tensor)])
    _set_counts(small, network, plan)
    attributes.refresh(small)
    return small


def with_aliases(model: nn.Module, kept: Kept) -> dict[tuple[str, int], NDArray[np.int64]]:
    """The same entries for all paths under which a shared tensor is registered."""
    identity = storages(model)
    paths: dict[int, list[str]] = {}
    for path, key in identity.items():
        paths.setdefault(key, []).append(path)
    return {
        (alias, dim): entries
        for (path, dim), entries in kept.items()
        for alias in paths.get(identity.get(path, -1), [path])
    }


def sliced(tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """The entries that stay, as a new tensor or parameter with the same gradient flag."""
    with torch.no_grad():
        value = tensor.detach()
        for dim, entries in kept.items():
            value = value.index_select(dim, torch.from_numpy(entries).to(value.device))
        value = value.clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters if leaf in module._parameters else module._buffers
    tensor = held[leaf]
    assert tensor is not None
    return tensor


def _replace(model: nn.Module, path: str, tensor: Tensor) -> None:
    owner_path, _, leaf = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = tensor


def _set_counts(small: nn.Module, network: Network, plan: Plan) -> None:
    """Attributes that state a number of units which no shape states: ``groups``."""
    changed: dict[str, dict[str, int]] = {}
    for (name, attribute), atoms in network.flow.counts.items():
        path = network.captured.graph.by_name[name].scope
        module = small.get_submodule(path)
        if isinstance(getattr(module, attribute, None), int):
            changed.setdefault(path, {})[attribute] = int((~plan.gone[atoms]).sum())
            setattr(module, attribute, changed[path][attribute])
    attributes.remember(small, changed)


# --- the rewritten graph -----------------------------------------------------------------------


def rewrite(model: nn.Module, network: Network, plan: Plan) -> GraphModel:
    """The captured graph with the units gone, as a module with tensors of its own."""
    graph = network.captured.graph
    editor = _Editor(network, plan)
    nodes = [editor.edit(node) for node in graph.nodes]
    kept = kept_entries(network, plan)
    whole = graph_model(model, network.captured)

    made: dict[int, Tensor] = {}

    def small(path: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = sliced(tensor, {d: i for (p, d), i in kept.items() if p == path})
        return made[id(tensor)]

    parameters = {p: small(p, t) for p, t in whole.named_parameters(remove_duplicate=False)}
    buffers = {p: small(p, t) for p, t in whole.named_buffers(remove_duplicate=False)}
    return GraphModel(graph.with_nodes(nodes), parameters, buffers)


class _Editor:
    """Brings the sizes that a node's arguments state in line with the labels."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network = network
        self.plan = plan

    def edit(self, node: Node) -> Node:
        labels = self.network.flow.labels.get(node.name)
        node = replace(node, value=self._value(node.value, labels))
        rule = EDITS.get(node.kind)
        return rule(self, node) if rule else node

    def _value(self, value: Value, labels: Any) -> Value:
        if isinstance(value, Spec) and labels is not None:
            sizes = zip(value.shape, labels, strict=True)
            return Spec(tuple(self.left(n, atoms) for n, atoms in sizes), value.dtype)
        if isinstance(value, tuple) and labels is not None:
            pairs = zip(value, labels, strict=True)
            return tuple(self._value(v, part) for v, part in pairs)
        return value

    def left(self, size: int, atoms: NDArray[np.int64] | None) -> int:
        return size if atoms is None else int((~self.plan.gone[atoms]).sum())

    def gone(self, node: Node, position: int, dim: int) -> Mask | None:
        """Which entries of an operand go along a dimension; None where none does."""
        labels = self.network.flow.of(node.args[position])
        atoms = labels[dim % len(labels)]
        if atoms is None or not self.plan.gone[atoms].any():
            return None
        return self.plan.gone[atoms]


def _sizes(editor: _Editor, node: Node) -> Node:
    """view, reshape, expand: the sizes asked for are those of the result.

    A size that depends on the batch is left to be inferred.
    """
    labels = editor.network.flow.labels[node.name]
    asked = list(node.args[1])
    for d, atoms in enumerate(labels):
        if atoms is not None and editor.plan.gone[atoms].any() and asked[d] != -1:
            asked[d] = -1 if isinstance(asked[d], Ref) else node.shape[d]
    return replace(node, args=(node.args[0], asked, *node.args[2:]))


def _unflatten(editor: _Editor, node: Node) -> Node:
    x, dim, asked = node.args
    dim %= len(editor.network.flow.of(x))
    return replace(node, args=(x, dim, list(node.shape[dim : dim + len(asked)])))


def _parts(editor: _Editor, node: Node) -> Node:
    """split, chunk: parts of the sizes that remain."""
    dim = node.argument("dim")
    if editor.gone(node, 0, dim) is None:
        return node
    assert isinstance(node.value, tuple)
    sizes = [part.shape[dim] for part in node.value if isinstance(part, Spec)]
    return replace(
        node, op="aten.split_with_sizes.default", args=(node.args[0], sizes, dim), kwargs={}
    )


def _slice(editor: _Editor, node: Node) -> Node:
    dim, start, stop, step = slice_bounds(node)
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    before = ~gone[: slice(start, stop, step).indices(len(gone))[0]]
    first = int(before.sum())
    size = node.shape[dim]
    return replace(node, args=(node.args[0], dim, first, first + size, 1))


def _select(editor: _Editor, node: Node) -> Node:
    x, dim, index = node.args
    gone = editor.gone(node, 0, dim)
    if gone is None:
        return node
    return replace(node, args=(x, dim, int((~gone[: index % len(gone)]).sum())))


def _groups(editor: _Editor, node: Node) -> Node:
    atoms = editor.network.flow.counts.get((node.name, "groups"))
    if atoms is None:
        return node
    groups = editor.left(0, atoms)
    return replace(node, args=(*node.args[:6], groups, *node.args[7:]))


EDITS: Mapping[str, Callable[[_Editor, Node], Node]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _sizes),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _parts),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups),
    "unflatten": _unflatten,
    "slice": _slice,
    "select": _select,
}
"""ATen operator -> how the sizes in its arguments follow the labels."""
