"""What is constant in eval mode, computed once, so that integer kernels find their layers.

Weights that ``forward`` makes of parameters alone (weight and spectral norm, standardized weights,
masks, slices) become tensors, and products with a constant matrix (``x @ w``, ``addmm``, as in
transformers' ``Conv1D``) become linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count
from typing import Any

import torch
from torch import nn

from rarefy.graph.declarations import is_random, resolve, writes
from rarefy.graph.memory import Memory
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, Spec, derived, substitute
from rarefy.graph.stubs import without_unused

LINEAR = "aten.linear.default"

FOLDABLE = frozenset(
    {
        "aten.conv1d.default",
        "aten.conv2d.default",
        "aten.conv3d.default",
        "aten.conv1d.padding",
        "aten.conv2d.padding",
        "aten.conv3d.padding",
        "aten.linear.default",
    }
)
"""Operators with arguments (input, weight, bias, ...) and output channels first in the weight."""


def fold_constants(net: GraphModel) -> GraphModel:
    """A network that computes the same in eval mode, with constant weights as tensors.

    A weight that holds more numbers than what it is made of stays as it is: its file would grow.

    Args:
        net: left as it is; the result shares those of its tensors that it reads.
    """
    folding = _Folding(net, _constant(net.graph))
    with torch.no_grad():
        nodes = [new for node in net.graph.nodes for new in folding.folded(node)]
    if not folding.changed:
        return net
    graph = without_unused(net.graph.with_nodes(nodes))
    parameters = {**dict(net.named_parameters(remove_duplicate=False)), **folding.made}
    return GraphModel(
        graph,
        {path: tensor for path, tensor in parameters.items() if path in graph.tensor_paths},
        {
            path: tensor
            for path, tensor in net.named_buffers(remove_duplicate=False)
            if path in graph.tensor_paths and path not in folding.made
        },
    )


def _constant(graph: Graph) -> Mapping[str, frozenset[str]]:
    """Nodes that follow from the network's tensors alone -> the tensors, by node."""
    changed = Memory(graph).written
    found: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if node.name in changed or node.op in ("input", "output"):
            continue
        if node.op == "tensor":
            found[node.name] = frozenset({node.name})
        elif all(name in found for name in node.inputs) and not (
            writes(node.op) or is_random(node.op) or node.argument("running_mean") is not None
        ):
            found[node.name] = frozenset().union(*(found[name] for name in node.inputs))
    return found


@dataclass
class _Folding:
    """One walk over a graph.

    Attributes:
        net: the network.
        sources: constant node -> the tensors that it is made of.
        values: of constant nodes, where they were asked for.
        made: path -> new parameter.
        paths: (constant node, transposed) -> name of the node that reads its tensor.
        changed: whether anything was folded.
    """

    net: GraphModel
    sources: Mapping[str, frozenset[str]]
    values: dict[str, Any] = field(default_factory=dict)
    made: dict[str, nn.Parameter] = field(default_factory=dict)
    paths: dict[tuple[str, bool], str] = field(default_factory=dict)
    changed: bool = False

    def folded(self, node: Node) -> Iterator[Node]:
        """The node with constant weights, behind the tensors that it reads for the first time."""
        given = _layer(self.net.graph, node)
        if given is None:
            yield node
            return
        x, tensors, transposed = given
        if transposed and x.name in self.sources:
            yield node
            return
        read: list[Any] = []
        for position, arg in enumerate(tensors):
            flipped = transposed and position == 0
            new = self._tensor(arg, flipped, node) if isinstance(arg, Ref) else None
            if new is not None and new.name not in self.net.graph.by_name:
                if (arg.name, flipped) not in self.paths:
                    yield new
                self.paths[arg.name, flipped] = new.name
            if new is None and flipped:
                yield node
                return
            read.append(arg if new is None else Ref(new.name))
        if node.op in FOLDABLE:
            args = (x, *read, *node.args[1 + len(read) :])
            result = replace(node, args=args)
        else:
            result = replace(node, op=LINEAR, args=(x, *read), kwargs=None)
        self.changed = self.changed or result != node
        yield result

    def _tensor(self, arg: Ref, transposed: bool, reader: Node) -> Node | None:
        """A node that reads a constant as a tensor of the network; None where it is none, or
        would take more place than what it is made of."""
        graph, own = self.net.graph, self.net.graph.by_name[arg.name]
        if own.op == "tensor" and not transposed:
            return own
        if arg.name not in self.sources or not isinstance(own.value, Spec):
            return None
        known = self.paths.get((arg.name, transposed))
        value = self._value(arg.name).t() if transposed else self._value(arg.name)
        spec = Spec(tuple(value.shape), value.dtype)
        if known is not None:
            return Node(known, "tensor", value=spec)
        sources = [graph.by_name[name] for name in sorted(self.sources[arg.name])]
        held = [self.net.tensor(source.path) for source in sources]
        for source, tensor in zip(sources, held, strict=True):
            if tensor.dtype == value.dtype and torch.equal(tensor, value):
                return source
        if value.numel() > sum(tensor.numel() for tensor in held):
            return None
        path = self._path(sources, reader, "bias" if value.ndim == 1 else "weight")
        trained = any(tensor.requires_grad for tensor in held)
        self.made[path] = nn.Parameter(value.detach().clone().contiguous(), requires_grad=trained)
        name = derived(arg.name, "transposed" if transposed else "folded")
        return Node(name, "tensor", (path,), value=spec, scope=reader.scope)

    def _value(self, name: str) -> Any:
        """What a constant node returns; a loop, since chains of them may be long."""
        waiting = [name]
        while waiting:
            node = self.net.graph.by_name[waiting[-1]]
            missing = [other for other in node.inputs if other not in self.values]
            if missing:
                waiting += missing
            elif waiting.pop() not in self.values:
                self.values[node.name] = self._computed(node)
        return self.values[name]

    def _computed(self, node: Node) -> Any:
        """What a node returns whose inputs' values are known."""
        if node.op == "tensor":
            return self.net.tensor(node.path).detach()
        args, kwargs = substitute((node.args, node.options), lambda ref: self.values[ref.name])
        return resolve(node.op)(*args, **kwargs)

    def _path(self, sources: list[Node], reader: Node, leaf: str) -> str:
        """That of the one tensor that it is made of, if nobody else reads it, or a free one."""
        graph = self.net.graph
        if len(sources) == 1 and len(graph.users[sources[0].name]) == 1:
            source = sources[0].path
            readers = sum(n.op == "tensor" and n.path == source for n in graph.nodes)
            if readers == 1 and source not in self.made:
                return source
        prefix = f"{reader.scope}." if reader.scope else ""
        held = graph.tensor_paths | self.made.keys()
        taken = {part for path in held for part in accumulate(path.split("."), "{}.{}".format)}
        names = chain((leaf,), (f"{reader.name}_{leaf}{'_' * number}" for number in count()))
        return next(path for name in names if (path := f"{prefix}{name}") not in taken)


def _layer(graph: Graph, node: Node) -> tuple[Any, list[Any], bool] | None:
    """Input, weight and bias of a layer or product, and whether the weight is to be transposed."""
    if node.op in FOLDABLE:
        return node.args[0], list(node.args[1:3]), False
    if node.kind in ("matmul", "mm") and len(node.args) == 2 and not node.options:
        x, weight, bias = *node.args, None
    elif node.kind == "addmm" and len(node.args) == 3 and not node.options:
        bias, x, weight = node.args
    else:
        return None
    specs = [graph.by_name[r.name].value if isinstance(r, Ref) else None for r in (x, weight)]
    bias_node = graph.by_name[bias.name] if isinstance(bias, Ref) else None
    if any(not isinstance(spec, Spec) or spec.dtype != torch.float32 for spec in specs):
        return None
    if len(specs[0].shape) < 2 or len(specs[1].shape) != 2:  # type: ignore[union-attr]
        return None
    if bias_node is not None and (bias_node.op != "tensor" or len(bias_node.shape) != 1):
        return None
    return x, [weight] if bias is None else [weight, bias], True
