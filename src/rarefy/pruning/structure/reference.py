"""What a smaller network is held against: the original with the removed units masked.

Plain masking sets every coupled slice of a unit to zero in a copy of the user's module
(:func:`masked`). It is the reference wherever no operator mixes entries that go with entries that
stay in another way than by adding them. A residual block is masked in the captured graph, where
zeros take the place of what its branch adds (:func:`without_branches`).

A layer norm, a mean over channels or a softmax over units means something else over zeros than
over fewer entries. By convention such operators (``Flow.over_survivors``) are computed over the
units that remain: a layer norm that loses half of its entries normalizes by the mean and variance
of the other half. Their reference is the captured graph of the masked original in which these
operators, and only these, see the surviving entries of their operands and give zeros for the
others (:class:`SurvivorModel`). That is a convention, not an identity: with fewer units in a
normalization, its statistics change, which zeroing in the original network would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.copies import copied
from rarefy.graph.capture import graph_model
from rarefy.graph.declarations import resolve
from rarefy.graph.editor import Editor
from rarefy.graph.flow import Flow, every
from rarefy.graph.groups import Mask
from rarefy.graph.labels import Atoms
from rarefy.graph.model import GraphModel
from rarefy.graph.ops import edit
from rarefy.graph.program import Node, Ref, substitute
from rarefy.graph.trace import Network
from rarefy.graph.zeros import directions
from rarefy.pruning.lengths import remaining_lengths
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.surgery import kept_entries


def masked(model: nn.Module, network: Network, plan: Plan) -> nn.Module:
    """A copy of the model with every coupled slice of the removed units set to zero.

    Vectors that a weight norm divides by their length keep their values, for that is set to zero;
    where they lose entries, it shrinks with them, so that the other entries of the weight stay.
    Constants made in ``forward`` are no parameters: they keep their values. Parameters that lose
    nothing are those of the model itself, to save their memory.
    """
    entries, same = kept_entries(network, plan), directions(network.captured.graph)
    zeros = [(*place, kept) for place, kept in entries.items() if place not in same]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    lengths = remaining_lengths(network.captured.graph, named.__getitem__, entries)
    lost = {path for path, _, _ in zeros} | lengths.keys()
    changed = {id(tensor) for path, tensor in parameters.items() if path in lost}
    reference = copied(model, {id(t): t for t in parameters.values() if id(t) not in changed})
    tensors: dict[str, Tensor] = dict(reference.named_parameters(remove_duplicate=False))
    tensors |= dict(reference.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for path, length in lengths.items():
            tensors[path].copy_(length)
        for path, dim, kept in zeros:
            if path not in tensors:
                continue
            tensor = tensors[path]
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[torch.from_numpy(kept)] = False
            index = gone.nonzero().ravel().to(tensor.device)
            tensor.index_fill_(dim, index, 0)
    return reference


def without_branches(model: nn.Module, network: Network, plan: Plan) -> GraphModel:
    """The captured network in which the branches of the plan's blocks give zeros.

    What leaves a block without a branch, a whole layer, is a copy of what enters it.
    """
    graph = network.captured.graph
    adds = {block.add: block.branch for block in plan.blocks if block.branch}
    whole = {block.add: block.trunk for block in plan.blocks if not block.branch}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in whole:
            given = (Ref(whole[node.name]),)
            node = replace(node, op="aten.clone.default", args=given, kwargs={})
        if node.name in adds:
            branch = graph.by_name[adds[node.name]]
            name = f"{node.name}_without_branch"
            zeros = replace(
                branch, name=name, op="aten.zeros_like.default", args=(Ref(branch.name),)
            )
            nodes.append(replace(zeros, kwargs={}))
            zeroed = {branch.name: Ref(name)}
            args = substitute(node.args, lambda ref, new=zeroed: new.get(ref.name, ref))  # type: ignore[misc]
            node = replace(node, args=args)
        nodes.append(node)
    return graph_model(model, replace(network.captured, graph=graph.with_nodes(nodes)))


def mixing(network: Network, plan: Plan) -> frozenset[str]:
    """Nodes that are computed over survivors and that lose entries under this plan."""
    flow = network.flow

    def loses(name: str) -> bool:
        touched = (name, *flow.graph.by_name[name].inputs)
        return any(
            bool(plan.gone[atoms].any())
            for value in touched
            for atoms in every(flow.labels.get(value))
        )

    return frozenset(filter(loses, flow.over_survivors & flow.graph.live.by_name.keys()))


def over_survivors(model: nn.Module, network: Network, plan: Plan) -> SurvivorModel:
    """The masked model's graph, with mixing operators computed over what remains."""
    whole = graph_model(masked(model, network, plan), network.captured)
    return SurvivorModel(whole, network.flow, plan.gone, mixing(network, plan))


_Change = Callable[[Tensor, int, Tensor, Atoms], Tensor]
"""(tensor, dimension, entries that stay, atoms of that dimension) -> another tensor."""


class SurvivorModel(GraphModel):
    """A graph of full size some of whose operators see surviving entries only.

    Args:
        whole: the graph with masked tensors.
        flow: the walk over that graph.
        gone: for each atom, whether it goes.
        nodes: names of the operators to compute over what remains.
    """

    def __init__(self, whole: GraphModel, flow: Flow, gone: Mask, nodes: frozenset[str]) -> None:
        super().__init__(
            whole.graph,
            dict(whole.named_parameters(remove_duplicate=False)),
            dict(whole.named_buffers(remove_duplicate=False)),
        )
        self._labels = flow.labels
        self._editor = Editor(flow, gone)
        self._edited = {name: edit(self._editor, flow.graph.by_name[name]) for name in nodes}

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Run one call; on survivors, and with zeros for the others, where it mixes entries."""
        edited = self._edited.get(node.name)
        if edited is None:
            return super().step(node, function, values)
        local = {
            name: self._each(_survivors, values[name], self._labels.get(name))
            for name in node.inputs
        }
        for small in edited:
            if small.op == "tensor":
                local[small.name] = self._editor.constants[small.path]
            else:
                local[small.name] = super().step(small, resolve(small.op), local)
        return self._each(_among_zeros, local[node.name], self._labels.get(node.name))

    def _each(self, change: _Change, value: Any, labels: Any) -> Any:
        """Apply ``change`` along every dimension, of every tensor, that loses entries."""
        if labels is None:
            return value
        if not isinstance(value, Tensor):
            pairs = zip(value, labels, strict=True)
            return tuple(self._each(change, part, own) for part, own in pairs)
        for dim, atoms in enumerate(labels):
            gone = self._editor.hit(atoms)
            if gone is not None:
                kept = torch.from_numpy((~gone).nonzero()[0]).to(value.device)
                value = change(value, dim, kept, atoms)
        return value


def _survivors(tensor: Tensor, dim: int, kept: Tensor, atoms: Atoms) -> Tensor:
    return tensor.index_select(dim, kept)


def _among_zeros(tensor: Tensor, dim: int, kept: Tensor, atoms: Atoms) -> Tensor:
    shape = (*tensor.shape[:dim], len(atoms), *tensor.shape[dim + 1 :])
    return tensor.new_zeros(shape).index_copy(dim, kept, tensor)
