"""One network on its way through its graph, operator by operator, with others beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, batch_size, is_of, map_tensors, tensors
from rarefy.graph.declarations import resolve, writes
from rarefy.graph.model import GraphModel, last_use
from rarefy.graph.program import Node, substitute
from rarefy.pruning.running.origins import Along, Origins
from rarefy.types import Inputs

ALIKE = 1e-5
"""Difference below which values are the same, relative to the largest of them."""

COUNTS = (2, 1, 3)
"""How many examples a network is tried on, in order: few, and several where it takes several."""


class Run:
    """One network on its way through a graph, operator by operator.

    Args:
        model: the network.
        inputs: a batch.
        dims: name of a value -> where its examples lie, where known.

    Attributes:
        values: what is computed and will be read, by name.
        origins: what the rows of values come from.
    """

    def __init__(
        self, model: GraphModel, inputs: Inputs, dims: Mapping[str, Along] | None = None
    ) -> None:
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
        self.origins = Origins.of(inputs, dims)

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

    def renew(self, way: Sequence[Node]) -> None:
        """Compute once more what calls give of tensors of the network alone: these changed.

        Args:
            way: calls, each of which reads the one before and tensors.
        """
        nodes, values = self._model.graph.by_name, dict[str, Any]()
        for node in way:
            for name in node.inputs:
                if nodes[name].op == "tensor":
                    values[name] = self._model.tensor(nodes[name].path)
            values[node.name] = self._value(node, values)
            if node.name in self.values:
                self.values[node.name] = values[node.name]

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
                value = values[node.name]
                values[node.name] = value + shifts[node.name].to(value.dtype)
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


def layer_name(node: Node) -> str:
    """Path of the module that makes the call, or the node's own name."""
    return node.scope or node.name


def batch_dims(model: GraphModel, inputs: Inputs) -> dict[str, Along] | None:
    """Name of a value -> where its examples lie, where it grows with their number.

    Found by running on some examples and on the same ones twice: where what was merged with them
    comes behind them, all entries of the first come first, and where it comes before them, they
    come first of each part.

    Args:
        model: the network.
        inputs: a batch.

    Returns:
        None where the network takes none of :data:`COUNTS` and twice as many.
    """
    for count in COUNTS:
        with suppress(Exception), torch.no_grad():  # a network of one batch size raises anything
            few, more = (Run(model, part) for part in _once_and_twice(inputs, count))
            found: dict[str, Along] = {}
            for node in model.graph.nodes:
                if node.op != "output":
                    few.through(node)
                    more.through(node)
                    along = _along(few.values[node.name], more.values[node.name], count)
                    if along is not None:
                        found[node.name] = along
            return found
    return None


def _once_and_twice(inputs: Inputs, count: int) -> tuple[Inputs, Inputs]:
    """Some examples of a batch, of which the second differs from the first if any does; and twice.

    In memory they lie as those of the batch, which a network may view in its own way.
    """
    size = batch_size(inputs)
    held = [tensor for tensor in tensors(inputs) if is_of(size, tensor)]
    other = next(
        (n for n in range(1, size) if any(not torch.equal(t[n], t[0]) for t in held)), size - 1
    )
    numbers = torch.tensor([0, other, 0][:count])

    def taken(index: Tensor) -> Inputs:
        chosen: Inputs = map_tensors(
            lambda t: _picked(t, index.to(t.device)) if is_of(size, t) else t.clone(), inputs
        )
        return chosen

    return taken(numbers), taken(numbers.repeat(2))


def _picked(tensor: Tensor, index: Tensor) -> Tensor:
    """Some examples of a tensor, whose dimensions lie in its order."""
    order = sorted(range(tensor.ndim), key=lambda d: -tensor.stride()[d])
    back = [order.index(d) for d in range(tensor.ndim)]
    return tensor.permute(order).index_select(back[0], index).permute(back)


def _along(once: Any, twice: Any, count: int) -> Along | None:
    """Where the examples of a value lie, of so many and of the same ones twice."""
    if not isinstance(once, Tensor) or not isinstance(twice, Tensor) or once.ndim != twice.ndim:
        return None
    sizes = enumerate(zip(once.shape, twice.shape, strict=True))
    dim = next((d for d, (n, m) in sizes if m == 2 * n > 0), None)
    if dim is None:
        return None
    each, rest = divmod(once.shape[dim], count)
    if each <= 1 or rest or not once.is_floating_point():
        return Along(dim)
    own = once.to(torch.promote_types(once.dtype, torch.float32))
    entries = torch.arange(2 * once.shape[dim], device=twice.device)

    def apart(before: int) -> float:
        """How far the first examples of each part are from those that ran once."""
        first = entries.view(before, 2, -1)[:, 0].flatten()
        return float((twice.index_select(dim, first) - own).abs().nan_to_num().max())

    found = {n: apart(n) for n in range(1, each + 1) if each % n == 0}
    largest = float(own.abs().nan_to_num(posinf=0.0).max())
    alike = 4 * min(found.values()) + ALIKE * largest
    return Along(dim, next(n for n, far in found.items() if far <= alike))
