"""Stacks of layers, and which of their layers can go as a whole.

A layer of a transformer, or a residual block of a convolutional network, is a child of an
``nn.ModuleList`` or ``nn.Sequential``. It can go where all that leaves it is one tensor, and this
is the tensor that enters it but for what its residual branches add and what normalizations and
activations make of the sum. Its neighbors then meet without it, normalizations and all, as in the
students of DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from torch import nn

from rarefy.graph.blocks import SAME, Block
from rarefy.graph.count import batch_of, graph_macs
from rarefy.graph.program import Node, Ref, Spec
from rarefy.graph.stubs import without_nodes
from rarefy.graph.trace import Network


@dataclass(frozen=True)
class Stack:
    """Consecutive children of one container, of one class, that give values of one shape.

    Attributes:
        path: of the container.
        names: of its children that belong to the stack, in order.
        layers: what goes with each of them that can go, by name: one block without a branch, in
            whose place the value that enters the layer is handed on, or all blocks of a layer
            whose forward is written outside of it.
        stuck: why the others cannot, by name.
    """

    path: str
    names: tuple[str, ...]
    layers: Mapping[str, tuple[Block, ...]]
    stuck: Mapping[str, str]

    def of(self, name: str) -> str:
        """The path of a child."""
        return f"{self.path}.{name}" if self.path else name


def find_stacks(model: nn.Module, network: Network) -> tuple[Stack, ...]:
    """The stacks of a network of which a layer can go, in the order of its modules.

    Of stacks within each other, the one with more layers counts.

    Args:
        model: the network.
        network: its trace.
    """
    finder = _Finder(model, network)
    containers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    found = [s for path, m in containers for s in finder.stacks(path, m) if s.layers]
    counted: list[Stack] = []
    for stack in sorted((s for s in found if len(s.names) > 1), key=lambda s: -len(s.names)):
        if not any(_nested(stack, other) or _nested(other, stack) for other in counted):
            counted.append(stack)
    return tuple(stack for stack in found if stack in counted)


def _nested(inner: Stack, outer: Stack) -> bool:
    return any(f"{inner.path}.".startswith(f"{outer.of(name)}.") for name in outer.names)


class _Finder:
    """Searches one network."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        self.graph = network.captured.graph.live
        self.blocks = network.blocks
        self.trunks = {block.add: block.trunk for block in network.blocks}
        self.macs = graph_macs(self.graph, lambda name: self.graph.by_name[name].shape)
        self.parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
        self.inside: dict[str, list[Node]] = {}
        for node in self.graph.calls:
            parts = node.scope.split(".")
            for count in range(1, len(parts) + 1):
                self.inside.setdefault(".".join(parts[:count]), []).append(node)

    def stacks(self, path: str, container: nn.Module) -> Iterator[Stack]:
        """Runs of children that are layers of one kind."""
        within = {name: f"{path}.{name}" if path else name for name in container._modules}
        exits = {name: self._exits(own) for name, own in within.items()}

        def kind(child: tuple[str, nn.Module | None]) -> object:
            found = exits[child[0]]
            value = found[-1].value if found else None
            return type(child[1]), value.shape if isinstance(value, Spec) else child[0]

        for _, run in groupby(container._modules.items(), kind):
            names = tuple(name for name, module in run if module is not None)
            layers: dict[str, tuple[Block, ...]] = {}
            stuck: dict[str, str] = {}
            for name in names:
                entry, fault = self._entry(within[name], exits[name])
                if entry is not None:
                    layers[name] = (self._layer(within[name], exits[name][0], entry),)
                elif own := self._branches(within[name]):
                    layers[name] = own
                else:
                    stuck[name] = fault
            yield Stack(path, names, layers, stuck)

    def _branches(self, path: str) -> tuple[Block, ...]:
        """The blocks that all of a module's calls belong to; none where they do other things."""
        own = {n.name for n in self.inside.get(path, ()) if isinstance(n.value, Spec | tuple)}
        found = tuple(block for block in self.blocks if not own.isdisjoint(block.nodes))
        covered = own.issubset(name for block in found for name in block.nodes)
        return found if covered else ()

    def _exits(self, path: str) -> list[Node]:
        """The nodes of a module whose tensors are read outside of it."""
        own = {node.name for node in self.inside.get(path, ())}
        return [
            node
            for node in self.inside.get(path, ())
            if isinstance(node.value, Spec | tuple)
            and not own.issuperset(user.name for user in self.graph.users[node.name])
        ]

    def _entry(self, path: str, exits: Sequence[Node]) -> tuple[Node | None, str]:
        """What stands in for the value that leaves a module; or None, and why nothing does."""
        if len(exits) != 1:
            return None, f"{len(exits)} values leave it" if exits else "it computes nothing"
        own = {node.name for node in self.inside[path]}
        node, passed = exits[0], 0
        while node.name in own:
            passed += node.name in self.trunks
            source = self.trunks.get(node.name) or _source(node)
            if not source:
                return None, f"its output is no residual stream: it comes from {node.kind}"
            node = self.graph.by_name[source]
        if not passed:
            return None, "it has no residual block that can be bypassed"
        if node.value != exits[0].value or node.op == "tensor":
            return None, "its output has another shape or type than its input"
        return node, ""

    def _layer(self, path: str, leaving: Node, entering: Node) -> Block:
        graph = self.graph
        after, _ = without_nodes(graph, {leaving.name: entering.name})
        gone = [node for node in graph.nodes if node.name not in after.by_name]
        tensors = [node for node in gone if node.op == "tensor"]
        read = [n for n in graph.nodes if n.op == "tensor" and n.path in self.parameters]
        params = sum(prod(n.shape) for n in tensors if n.path in self.parameters)
        macs = sum(self.macs.get(node.name, 0) for node in gone)
        return Block(
            name=path,
            add=leaving.name,
            trunk=entering.name,
            branch="",
            nodes=tuple(node.name for node in gone),
            tensors=tuple(node.path for node in tensors),
            macs=macs // batch_of(graph),
            params=params,
            macs_share=macs / max(sum(self.macs.values()), 1),
            params_share=params / max(sum(prod(n.shape) for n in read), 1),
        )


_AFTER_SUMS = frozenset(
    "relu gelu silu hardtanh hardswish leaky_relu elu layer_norm rms_norm group_norm batch_norm "
    "instance_norm".split()
)
"""What a layer may do with a sum of its own: it goes with the layer."""


def _source(node: Node) -> str:
    """The value that an operator hands on, normalized or rectified perhaps; empty for others."""
    first = node.args[0] if node.args else None
    kind = node.kind.removesuffix("_")
    passes = kind in SAME or kind in _AFTER_SUMS
    return first.name if passes and isinstance(first, Ref) else ""


def evenly(count: int, keep: int) -> tuple[int, ...]:
    """Numbers of the layers that stay of a stack, the first and the last among them.

    ``round(i (count - 1) / (keep - 1))`` for i = 0 to keep - 1, halves up; the first alone where
    one stays.

    Args:
        count: layers of the stack, at least 1.
        keep: how many stay, 1 to ``count``.

    Example:
        >>> evenly(12, 6)
        (0, 2, 4, 7, 9, 11)
    """
    steps = keep - 1
    if not steps:
        return (0,)
    return tuple((2 * i * (count - 1) + steps) // (2 * steps) for i in range(keep))


def spread(count: int, keep: int, fixed: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers picked evenly where some have to stay: each of these takes the nearest one's place.

    Where more have to stay than should, they alone do.

    Example:
        >>> spread(12, 4), spread(12, 4, fixed=[1])
        ((0, 4, 7, 11), (1, 4, 7, 11))
    """
    free = [pick for pick in evenly(count, keep) if pick not in fixed]
    for number in fixed:
        if len(free) + len(fixed) > keep and free:
            free.remove(min(free, key=lambda pick: abs(pick - number)))
    return tuple(sorted({*free, *fixed}))
