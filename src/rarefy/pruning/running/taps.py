"""The captured network on its way through data, with a look at what its calls read.

The parameters are those of the user's network under another name: they share its memory, but not
its ``requires_grad`` and ``grad``. Nothing that runs here leaves a trace on the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import answering, arguments, batch_size, call, map_tensors, take, tensors
from rarefy.errors import DataError
from rarefy.graph.declarations import is_view
from rarefy.graph.equations import equation
from rarefy.graph.flow import every
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Spec
from rarefy.graph.trace import Network, trace
from rarefy.pruning.running.lockstep import batch_dims
from rarefy.pruning.running.origins import Along, Origins
from rarefy.pruning.running.products import CONVOLUTIONS, DECONVOLUTIONS
from rarefy.types import Inputs

Watcher: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Values that a call is about to read, by name -> those that it is to read instead."""


class Watched(GraphModel):
    """A network that runs its graph, and shows the operands of some calls to watchers.

    Args:
        model: the user's network, whose memory is shared.
        network: its trace.
        trainable: whether its parameters are differentiated, all of them.

    Attributes:
        dims: name of a value -> where its examples lie; None where it is not known.
        origins: what the rows of values come from, on the batch that is run; whoever runs it sets
            it.
        instead: functions that take the place of calls' own, by the call.
    """

    def __init__(self, model: nn.Module, network: Network, *, trainable: bool = False) -> None:
        graph, paths = network.captured.graph, network.captured.graph.tensor_paths
        shared: dict[int, nn.Parameter] = {}
        parameters: dict[str, Tensor] = {}
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if path in paths:
                wanted = trainable and parameter.is_floating_point()
                parameters[path] = shared.setdefault(
                    id(parameter), nn.Parameter(parameter.detach(), requires_grad=wanted)
                )
        buffers = dict(network.captured.constants)
        buffers |= dict(model.named_buffers(remove_duplicate=False))
        super().__init__(
            graph, parameters, {p: b.detach().clone() for p, b in buffers.items() if p in paths}
        )
        self.network = network
        self.dims: Mapping[str, Along] | None = None
        self.origins = Origins(1)
        self.watchers: dict[str, list[Watcher]] = {}
        self.instead: dict[str, Callable[..., Any]] = {}

    def watch(self, node: str, watcher: Watcher) -> None:
        """Show the operands of a call to a watcher, every time before it is made."""
        self.watchers.setdefault(node, []).append(watcher)

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Run one call, on what its watchers make of its operands."""
        for watcher in self.watchers.get(node.name, ()):
            values = {**{name: values[name] for name in node.inputs}, **watcher(values)}
        if node.kind == "sym_size":
            function = Tensor.size  # says the same, and is known to vmap
        return super().step(node, self.instead.get(node.name, function), values)


Attach: TypeAlias = Callable[[Watched, "Sequence[End]"], None]
"""Puts watchers on a network, told where its units are read."""


class Runner:
    """Runs a network on batches; for inputs of another form than the example it is traced anew.

    Args:
        model: the user's network.
        network: its trace.
        attach: puts the watchers on every trace that is run.
        trainable: whether parameters are differentiated.
        where: the call that errors name.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        attach: Attach | None = None,
        *,
        trainable: bool = False,
        where: str = "prune(data)",
    ) -> None:
        self._model, self._network, self._where = model, network, where
        self._attach, self._trainable = attach, trainable
        self._traces: dict[tuple[Any, ...], Network] = {}
        self._ready: dict[int, Watched] = {}

    def of(self, inputs: Inputs) -> Watched:
        """The network that runs on inputs of this form.

        Raises:
            DataError: it runs on none such, or its units are others then.
        """
        network = self.trace(inputs)
        if id(network) not in self._ready:
            self._ready[id(network)] = self._made(network, inputs)
        return self._ready[id(network)]

    def trace(self, inputs: Inputs) -> Network:
        """The trace for inputs of this form; of as many examples, where one holds for no others.

        Raises:
            DataError: the network runs on none such.
        """
        form = _form(inputs)
        sized = (batch_size(inputs), form)
        for key in (form, sized):
            if key in self._traces:
                return self._traces[key]
        network = self._network
        if form != _form_of(network.captured.graph):
            network = self._again(inputs)
        any_size = self._runs(network, take(inputs, 1))
        if not any_size and network is self._network and not self._runs(network, inputs):
            network = self._again(inputs)
        self._traces[form if any_size else sized] = network
        return network

    def _runs(self, network: Network, inputs: Inputs) -> bool:
        try:
            with torch.no_grad():
                call(Watched(self._model, network), map_tensors(torch.clone, inputs))
        except Exception:  # noqa: BLE001 - operators raise anything
            return False
        return True

    def _again(self, inputs: Inputs) -> Network:
        if isinstance(self._model, GraphModel):
            raise DataError(
                self._where,
                "the graph does not run on batches of this form",
                "Give inputs of the shapes that the network was captured with",
            )
        with answering(self._where):
            return trace(self._model, inputs)

    def _made(self, network: Network, inputs: Inputs) -> Watched:
        made = Watched(self._model, network, trainable=self._trainable)
        made.dims = batch_dims(made, inputs)
        if self._attach is not None:
            found = list(ends(network))
            if network is not self._network:
                found = list(_renumbered(found, self._network, network, self._where))
            self._attach(made, _with_batch(made, found, inputs))
        return made


def _form(inputs: Inputs) -> tuple[Any, ...]:
    """Shapes without the batch, of all tensors, by argument."""
    args, given = arguments(inputs)
    named = [(key, tuple(t.shape[1:])) for key in sorted(given) for t in tensors(given[key])]
    return (*(tuple(t.shape[1:]) for t in tensors(args)), *named)


def _form_of(graph: Graph) -> tuple[Any, ...]:
    """The form of the inputs that a graph was captured with."""
    specs = [n.value for n in graph.nodes if n.op == "input"]
    spec = pytree.treespec_loads(graph.in_spec)
    leaves = [s if isinstance(s, Spec) else None for s in specs]
    args, given = pytree.tree_unflatten(leaves, spec)
    named = [
        (key, s.shape[1:])
        for key in sorted(given)
        for s in pytree.tree_leaves(given[key])
        if s is not None
    ]
    return (*(s.shape[1:] for s in pytree.tree_leaves(args) if s is not None), *named)


# --- where units are read ----------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """An operand that carries units which the result of the call carries no more.

    The call sums over them, so the network learns of a unit through all of its ends and nowhere
    else: the derivative by a gate on the unit is the sum over its ends of entry times gradient.

    Attributes:
        node: the call.
        operand: name of the value that it reads.
        dim: dimension along which the units lie.
        units, positions: pairs of a unit and an entry that goes with it.
        batch: where the examples lie, or None where the operand is the same for all of them.
    """

    node: str
    operand: str
    dim: int
    units: Tensor
    positions: Tensor
    batch: Along | None = field(default_factory=partial(Along, 0))

    def summed(self, values: Tensor, examples: int) -> Tensor:
        """Sums of the values of each unit, by example: (examples, units that end here), pairs."""
        own = () if self.batch is None else (self.batch.dim,)
        rest = [d for d in range(values.ndim) if d not in (self.dim, *own)]
        total = values.sum(rest) if rest else values
        if self.batch is None:
            per_example = total[None].expand(examples, -1) / examples
        else:
            total = total.T if self.batch.dim > self.dim else total
            index = self.batch.examples(len(total), examples).to(total.device)
            per_example = total.new_zeros(examples, total.shape[1]).index_add_(0, index, total)
        return per_example.double()[:, self.positions]


def ends(network: Network) -> Iterator[End]:
    """All operands at which units end, in the order of the graph."""
    graph, labels = network.captured.graph, network.flow.labels
    live = {node.name for node in graph.nodes if node.op == "input"}
    for node in graph.calls:
        if live.isdisjoint(node.inputs):
            continue
        live.add(node.name)
        if is_view(node.op) or not _holds_tensors(node.value):
            continue
        carried, read = _units(network, labels.get(node.name)), set[int]()
        for name in dict.fromkeys(node.inputs):
            value = graph.by_name[name].value
            if name not in live or not isinstance(value, Spec) or not value.dtype.is_floating_point:
                continue
            for dim, atoms in enumerate(labels[name]):
                if atoms is None:
                    continue
                units, positions = network.coupling.pairs(atoms)
                over = read if _is_summed(graph, node, name, dim) else read | carried
                ending = ~np.isin(units, list(over))
                if ending.any():
                    own, places = (torch.from_numpy(a[ending]) for a in (units, positions))
                    yield End(node.name, name, dim, own, places)
            read |= _units(network, labels[name])


def _is_summed(graph: Graph, node: Node, name: str, dim: int) -> bool:
    """Whether a call is known to sum over a dimension of an operand.

    Its result may have the same units along another: those of a layer in a stream to which it adds.
    """
    kind = node.kind.removesuffix("_")
    if kind in CONVOLUTIONS | DECONVOLUTIONS:
        channels = len(graph.by_name[name].shape) - int(kind[-2]) - 1  # conv2d: the third last
        return node.argument("groups") == 1 and dim == channels
    found = equation(node, lambda ref: len(graph.by_name[ref.name].shape))
    if found is None:
        return False
    return any(own[dim] not in found.result for ref, own in found.operands if ref.name == name)


def _units(network: Network, carried: Any) -> set[int]:
    pairs = (network.coupling.pairs(atoms) for atoms in every(carried))
    return {unit for units, _ in pairs for unit in units.tolist()}


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Spec) for leaf in pytree.tree_leaves(value))


def _renumbered(
    found: Sequence[End], network: Network, other: Network, where: str
) -> Iterator[End]:
    """Ends of another trace with the numbers that the units have in this one."""
    number = np.full(other.coupling.units, -1, np.int64)
    same = len(network.groups) == len(other.groups)
    for own, its in zip(network.groups, other.groups, strict=False):
        same = same and len(own.members) == len(its.members)
        same = same and all(
            (a.path, a.dim) == (b.path, b.dim) and np.array_equal(a.indices, b.indices)
            for a, b in zip(own.members, its.members, strict=False)
        )
        if same:
            number[its.units] = own.units
    if not same:
        raise DataError(
            where,
            "for inputs of these shapes other units of the network can be removed",
            "Trace the network with example inputs of the shapes of the data",
        )
    for end in found:
        units = torch.from_numpy(number)[end.units]
        kept = units >= 0
        yield replace(end, units=units[kept], positions=end.positions[kept])


def _with_batch(model: Watched, found: Sequence[End], inputs: Inputs) -> list[End]:
    """The ends, each with where its examples lie."""
    graph, examples = model.network.captured.graph, batch_size(inputs)

    def batch(end: End) -> Along | None:
        if model.dims is not None:
            return model.dims.get(end.operand)
        captured = graph.by_name[end.operand].shape
        lead = [d for d, n in enumerate(captured) if d != end.dim and n % examples == 0]
        return Along(lead[0]) if lead else None

    return [replace(end, batch=batch(end)) for end in found]


class Tap(torch.autograd.Function):
    """The identity, which shows the value and its gradient to a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, report: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return ``x``."""
        ctx.save_for_backward(x)
        ctx.report = report
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Report, and return the gradient."""
        (x,) = ctx.saved_tensors
        ctx.report(x, gradients[0])
        return gradients[0], None


def tapped(x: Tensor, report: Callable[[Tensor, Tensor], None]) -> Tensor:
    """``x``, such that its gradient at this place alone is reported."""
    found: Tensor = Tap.apply(x if x.requires_grad else x.detach().requires_grad_(), report)
    return found
