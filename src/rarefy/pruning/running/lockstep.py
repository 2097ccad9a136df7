"""What healing and reconstruction share: two networks on their way through a graph, layer by layer.

A layer is an operator with an input, a weight and perhaps a bias that can be solved by least
squares: convolutions of any rank, transposed ones too, linear layers, products with a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, map_tensors
from rarefy.graph.declarations import resolve, writes
from rarefy.graph.model import GraphModel, last_use
from rarefy.graph.program import Graph, Node, Ref, substitute
from rarefy.pruning.running.inputs import CONVOLUTIONS, DECONVOLUTIONS
from rarefy.types import Inputs

OPERANDS = {
    **dict.fromkeys((*CONVOLUTIONS, *DECONVOLUTIONS, "linear"), ("input", "weight", "bias")),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
}
"""Operators whose weights are solved -> the names of their inputs, weight and bias."""

TRANSPOSED = frozenset(("addmm", "mm", "matmul")) | DECONVOLUTIONS
"""Those whose weight has its outputs along the second dimension."""

AS_THEY_LIE = OPERANDS.keys() - DECONVOLUTIONS
"""Those whose weight is the matrix of a product as it lies, or transposed: nothing is turned."""


class Run:
    """One network on its way through a graph, operator by operator."""

    def __init__(self, model: GraphModel, inputs: Inputs) -> None:
        args, given = arguments(inputs)
        named = {name: given[name] for name in model._keywords if name in given} | given
        self._model = model
        self._nodes = list(model.graph.nodes)
        names = [node.name for node in self._nodes if node.op == "input"]
        self._given = dict(zip(names, pytree.tree_leaves((args, named)), strict=True))
        self._writes = any(writes(node.op) for node in model.graph.calls)
        self._last_use = last_use(model.graph)
        self._dead: tuple[str, ...] = ()
        self.values: dict[str, Any] = {}

    def through(self, node: Node) -> None:
        """Run all nodes up to this one, and it."""
        self.before(node)
        self._step()

    def before(self, node: Node) -> None:
        """Run all nodes before this one; what it reads is in ``values``."""
        while self._nodes[0] is not node:
            self._step()

    def forget(self) -> None:
        """Give up the values that no node to come reads."""
        for name in self._dead:
            del self.values[name]
        self._dead = ()

    def renew(self, node: Node) -> None:
        """Compute what a call gives of tensors of the network alone once more: they changed."""
        if node.name in self.values:
            nodes, model = self._model.graph.by_name, self._model
            values = {name: model.tensor(nodes[name].path) for name in node.inputs}
            self.values[node.name] = self._value(node, values)

    def rest(self, changed: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> list[Tensor]:
        """What the network would return with other tensors; the run itself stays where it is.

        Args:
            changed: name of a parameter's or buffer's node -> what takes its place.
            shifts: name of a call -> what is added to its result.
        """
        nodes, dead = self._nodes, self._dead
        values = dict(self.values)
        if self._writes:
            values = _apart(values, self._model.graph.by_name)
        values |= changed
        for node in nodes:
            for name in dead:
                values.pop(name, None)
            if node.op == "output":
                leaves = pytree.tree_leaves(substitute(node.args[0], lambda ref: values[ref.name]))
                return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
            if node.name not in changed:
                value = self._value(node, values)
                values[node.name] = map_tensors(torch.clone, value) if node.op == "input" else value
            if node.name in shifts:
                values[node.name] = values[node.name] + shifts[node.name]
            dead = self._last_use[node.name]
        raise AssertionError("a graph ends with its output")

    def _step(self) -> None:
        self.forget()
        node = self._nodes.pop(0)
        value = self._value(node, self.values)
        if node.op == "input":
            del self._given[node.name]
            value = map_tensors(torch.clone, value) if self._writes else value
        self.values[node.name] = value
        self._dead = self._last_use[node.name]

    def _value(self, node: Node, values: Mapping[str, Any]) -> Any:
        """What a node gives on the values of those before it."""
        if node.op == "input":
            return self._given[node.name]
        if node.op == "tensor":
            return self._model.tensor(node.path)
        return self._model.step(node, resolve(node.op), values)


def _apart(values: Mapping[str, Any], nodes: Mapping[str, Node]) -> dict[str, Any]:
    """The values in memory of their own, views of one another as before; tensors as they are."""
    copies: dict[int, torch.UntypedStorage] = {}

    def own(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor.clone()
        held = tensor.untyped_storage()
        if held.data_ptr() not in copies:
            copies[held.data_ptr()] = held.clone()  # type: ignore[no-untyped-call]
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(copies[held.data_ptr()], *place)

    return {
        name: value if nodes[name].op == "tensor" else map_tensors(own, value)
        for name, value in values.items()
    }


def operand(node: Node, which: int) -> Any:
    """The reference to a layer's inputs (0), weight (1) or bias (2), which may be None."""
    name = OPERANDS[node.kind][which]
    return node.argument(name) if name else None


def weight_of(graph: Graph, node: Node) -> tuple[Node, Node | None]:
    """The tensor that a layer's weight is, and the fake quantizer between them, if any."""
    given = graph.by_name[operand(node, 1).name]
    if given.kind.startswith("fake_quantize"):
        sources = [graph.by_name[name] for name in given.inputs]
        if all(source.op == "tensor" for source in sources):
            return sources[0], given
    return given, None


def layer_name(node: Node) -> str:
    """Path of the module that makes the call, or the node's own name."""
    return node.scope or node.name


def unsolvable(graph: Graph, weight: Node, *uses: Node) -> str:
    """Why the weight of one layer, or of several calls at once, cannot be solved for; or empty."""
    node, own = uses[0], {use.name for use in uses}
    if weight.op != "tensor":
        return "its weight is computed in the graph"
    if 0 in weight.shape:
        return "its weight has no entries"
    if not _readers(graph, weight) <= own:
        return "its weight is used several times"
    ways = {(u.kind, u.argument("groups"), *(repr(operand(u, i)) for i in (1, 2))) for u in uses}
    if len(ways) > 1:
        return "its weight is used in several ways"
    if node.kind in DECONVOLUTIONS and node.argument("groups") > 1:
        return "it is a transposed convolution in groups"
    if node.kind in TRANSPOSED - DECONVOLUTIONS and (
        len(weight.shape) != 2
        or {use.argument(name) for use in uses for name in ("alpha", "beta")} - {None, 1}
    ):
        return "it is more than a product with a matrix"
    bias = operand(node, 2)
    if isinstance(bias, Ref) and graph.by_name[bias.name].op != "tensor":
        return "its bias is computed in the graph"
    if isinstance(bias, Ref) and not _readers(graph, graph.by_name[bias.name]) <= own:
        return "its bias is used several times"
    if node.kind.startswith("conv") and any(len(u.shape) != len(weight.shape) for u in uses):
        return "its inputs have no batch dimension"
    return ""


def _readers(graph: Graph, tensor: Node) -> set[str]:
    """Names of the calls that read a tensor, itself or through a fake quantizer."""
    found = set()
    for user in graph.users[tensor.name]:
        rounds = user.kind.startswith("fake_quantize") and user.inputs[0] == tensor.name
        found |= {n.name for n in graph.users[user.name]} if rounds else {user.name}
    return found


def unseen(lead: tuple[int, ...], held_out: Tensor) -> Tensor:
    """For each row of a tensor with these leading dimensions, whether its example is held out.

    The examples are along the first dimension of a multiple of their number: they come first in
    it where others (windows, frames) were merged into it. Without one, the first dimension is
    divided as if they were.
    """
    if not lead:
        return held_out[:1]
    examples = len(held_out)
    dim = next((d for d, size in enumerate(lead) if size % examples == 0), 0)
    owner = torch.arange(lead[dim]) * examples // lead[dim]
    column = held_out[owner].reshape(-1, *[1] * (len(lead) - dim - 1))
    return column.expand(lead).reshape(-1)
