"""``trace``: what can be removed from a network, and what cannot and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.errors import InputError, shortened
from rarefy.graph.blocks import Block, Depth, Joint, find_blocks
from rarefy.graph.capture import Capture, capture
from rarefy.graph.declarations import is_view
from rarefy.graph.flow import EXTENT, Flow, every
from rarefy.graph.groups import Coupling, Group, group
from rarefy.graph.labels import Atoms
from rarefy.graph.ops import walk
from rarefy.graph.resolution import resolve
from rarefy.graph.resting import resting, with_resting
from rarefy.types import Inputs, check_network


@dataclass(frozen=True)
class Frozen:
    """Entries of one tensor dimension that cannot be removed.

    Attributes:
        path: parameter or buffer.
        dim: dimension.
        entries: how many of its entries are fixed.
        size: how many it has.
        operator: the ATen operator that fixes them.
        reason: why, in words.
        source: line of the user's code, where known.
    """

    path: str
    dim: int
    entries: int
    size: int
    operator: str
    reason: str
    source: str

    def __str__(self) -> str:
        part = "" if self.entries == self.size else f" ({self.entries} of {self.size})"
        place = f" at {self.source}" if self.source else ""
        return f"{self.path} dim {self.dim}{part}: {self.operator}: {self.reason}{place}"


@dataclass(frozen=True)
class Network:
    """A traced network: what goes together, and what is frozen.

    Attributes:
        groups: removable units, grouped by what goes with them.
        frozen: what cannot be removed, each with operator and reason.
        unknown: operators that rarefy has no rule for, with how often they occur.
        captured: the graph and its constants.
        flow: labels of every value of the graph.
        coupling: which entries go when units go.
        depth: residual blocks, and where paths meet that cannot be bypassed.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, int]
    captured: Capture
    flow: Flow
    coupling: Coupling
    depth: Depth

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Residual branches that can be bypassed, in order."""
        return self.depth.blocks

    @property
    def joints(self) -> tuple[Joint, ...]:
        """Where two paths meet and neither can be bypassed, with the reason."""
        return self.depth.joints

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {sum(map(len, self.groups))} removable units"]
        if self.groups:
            wide = max(len(g.name) for g in self.groups)
            lines.append(f"{'group':<{wide}}  units  tensors")
            lines += [
                f"{g.name:<{wide}}  {len(g):>5}  "
                + shortened([f"{m.path}[{m.dim}]" for m in g.members], 4)
                for g in self.groups
            ]
        if self.blocks:
            lines += ["", *_table_of_blocks(self.blocks)]
        if self.joints:
            lines += ["", "paths that cannot be bypassed:", *_by_reason(self.joints)]
        if self.frozen:
            lines += ["", "frozen:", *(f"  {f}" for f in self.frozen)]
        if self.unknown:
            names = ", ".join(f"{op} ({n}x)" for op, n in self.unknown.items())
            lines += ["", f"operators without a rule: {names}"]
        return "\n".join(lines)


def _table_of_blocks(blocks: Sequence[Block]) -> Iterator[str]:
    wide = max(5, *(len(b.name) for b in blocks))
    yield f"{'block':<{wide}}   MACs  params  tensors"
    for b in blocks:
        shared = f", shares {', '.join(b.shared[:2])}" if b.shared else ""
        shares = f"{b.macs_share:>6.1%}  {b.params_share:>6.1%}"
        yield f"{b.name:<{wide}} {shares}  {len(b.tensors):>7}{shared}"


def _by_reason(joints: Sequence[Joint]) -> Iterator[str]:
    """Joints of one reason on one line."""
    held: dict[str, list[str]] = {}
    for joint in joints:
        held.setdefault(joint.reason, []).append(joint.scope or joint.source or joint.node)
    for reason, places in held.items():
        yield f"  {shortened(places, 4)}: {reason}"


def trace(model: nn.Module, example_inputs: Inputs) -> Network:
    """Find the units of a network that can be removed, and everything that goes with each.

    The network is captured once, in eval mode, and left as it was.

    Args:
        model: any module that ``torch.export`` can follow.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments, with a
            batch dimension first.

    Returns:
        Groups, residual blocks, frozen parts with their reasons; ``print`` shows them as a table.

    Raises:
        InputError: the model has no parameter.
        CaptureError: the network cannot be captured.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [len(g) for g in trace(net, torch.zeros(2, 4)).groups]
        [8]
    """
    check_network(model, "trace(model)")
    if next(model.parameters(), None) is None:
        raise InputError("trace(model)", "the model has no parameter", "Give a network to prune")
    captured = capture(model, example_inputs)
    flow = walk(captured.graph, storages(model), _positions(model, captured))
    _free_unused(flow)
    captured = with_resting(model, example_inputs, captured, flow, storages(model))
    coupling = resolve(flow.ledger, every(tuple(flow.labels.values())))
    tensors = {
        (node.path, dim): atoms
        for node in captured.graph.nodes
        if node.op == "tensor" and node.path not in flow.made
        for dim, atoms in enumerate(flow.labels[node.name])
        if atoms is not None
    }
    read = _read(flow, coupling)
    groups = group(coupling, _in_order_of_use(captured, tensors), read)
    frozen = (
        *_frozen(flow, coupling, tensors),
        *_unread(captured, coupling, tensors, read),
        *_resting(model, captured),
    )
    parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    depth = find_blocks(captured.graph.live, parameters)
    return Network(groups, frozen, flow.unknown, captured, flow, coupling, depth)


def _free_unused(flow: Flow) -> None:
    """Calls whose results nobody reads hold no unit in place: their operands only have to fit."""
    live = flow.graph.live.by_name
    flow.ledger.fixings[:] = [f for f in flow.ledger.fixings if f.node in live]


def _read(flow: Flow, coupling: Coupling) -> NDArray[np.bool_]:
    """Units that are computed with, and not only cut away by a view: rows of a table of positions
    beyond the length of these inputs are needed for longer ones."""
    read = np.zeros(len(coupling.fixed), np.bool_)
    for node in flow.graph.live.calls:
        for name in () if is_view(node.op) else node.inputs:
            for atoms in every(flow.labels.get(name)):
                read[coupling.component[atoms]] = True
    found: NDArray[np.bool_] = coupling.affects.T @ read.astype(np.int32) > 0
    return found


def _unread(
    captured: Capture,
    coupling: Coupling,
    tensors: Mapping[tuple[str, int], Atoms],
    read: NDArray[np.bool_],
) -> Iterator[Frozen]:
    """Entries that these inputs do not reach, and units that what is read has nothing of."""
    graph = captured.graph
    live = graph.live.tensor_paths
    idle = {n.path for n in graph.nodes if n.op == "tensor" and not graph.users[n.name]}
    for (path, dim), atoms in tensors.items():
        units, positions = coupling.pairs(atoms)
        beyond = np.unique(positions[~read[units]])
        if len(beyond):
            operator, reason = BEYOND if path in live else IDLE if path in idle else UNUSED
            yield Frozen(path, dim, len(beyond), len(atoms), operator, reason, "")


BEYOND = ("views", "is not read for inputs like these")
IDLE = ("forward", "is read in training mode alone")
UNUSED = ("forward", "is computed with, and nothing reads the result")


def _resting(model: nn.Module, captured: Capture) -> Iterator[Frozen]:
    """Tensors that nothing reads, neither in eval mode nor in training mode."""
    for path, tensor in resting(model, captured.graph).items():
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                yield Frozen(path, dim, size, size, "forward", "is not read", "")


def _positions(model: nn.Module, captured: Capture) -> dict[str, Tensor]:
    """Tensors that do not depend on training, whose entries may be used as positions."""
    found = {
        path: buffer.detach()
        for path, buffer in model.named_buffers(remove_duplicate=False)
        if not (buffer.is_floating_point() or buffer.is_complex())
    }
    return {**captured.constants, **found}


def storages(model: nn.Module) -> dict[str, int]:
    """Parameter and buffer path -> identity of its tensor; shared tensors have the same."""
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {path: id(tensor) for path, tensor in named}


def _in_order_of_use(
    captured: Capture, tensors: Mapping[tuple[str, int], Atoms]
) -> dict[tuple[str, int], Atoms]:
    path_of = {n.name: n.path for n in captured.graph.nodes if n.op == "tensor"}
    used = dict.fromkeys(
        path_of[name] for node in captured.graph.calls for name in node.inputs if name in path_of
    )
    ranked = {path: rank for rank, path in enumerate(used)}
    keys = sorted(tensors, key=lambda key: (ranked.get(key[0], len(ranked)), key[1]))
    return {key: tensors[key] for key in keys}


def _frozen(
    flow: Flow, coupling: Coupling, tensors: Mapping[tuple[str, int], Atoms]
) -> tuple[Frozen, ...]:
    found = []
    for (path, dim), atoms in tensors.items():
        components = coupling.component[atoms]
        held = coupling.fixed[components]
        if not held.any():
            continue
        number = int(coupling.cause[components[held]].max())
        if number >= 0 and flow.ledger.fixings[number].reason == EXTENT:
            continue
        if number < 0:
            operator, reason, source = "views", "is coupled with entries that cannot change", ""
        else:
            fixing = flow.ledger.fixings[number]
            node = flow.graph.by_name.get(fixing.node)
            operator, source = (node.op, node.source) if node else ("views", "")
            reason = fixing.reason
        found.append(Frozen(path, dim, int(held.sum()), len(atoms), operator, reason, source))
    return tuple(found)
