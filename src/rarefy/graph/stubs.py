"""What stands where a module was that nothing needs any more, and graphs without such parts.

Where a residual branch is bypassed in the user's own class, the forward still calls its modules
and adds what they give. A :class:`Stub` in their place gives zeros, or hands on what it is given.
A captured graph needs neither: :func:`without_blocks` and :func:`without_zeros` leave the calls
out, so that nothing of the branch runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from rarefy.batches import tensors
from rarefy.graph.blocks import SUMS, Block
from rarefy.graph.capture import Capture, capture, graph_model
from rarefy.graph.declarations import is_view, writes
from rarefy.graph.memory import Memory
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, substitute
from rarefy.types import Inputs

Gives: TypeAlias = Literal["zeros", "input"]
"""What a stub returns: zeros like its first tensor, or that tensor itself."""


class Stub(nn.Module):
    """Stands in for a module of which nothing is left.

    It keeps the plain numbers, flags and texts of that module, which other code may read. A hook
    that does nothing keeps ``nn.TransformerEncoderLayer`` from its fast path, which reads weights.

    Args:
        replaced: the module that it stands for.
        gives: ``"zeros"`` of the shape of the first tensor among its arguments, or ``"input"``,
            that tensor.
        outputs: 0 where it returns a tensor, else the length of the tuple of which that tensor is
            the first element and the others are None.

    Example:
        >>> Stub(nn.Linear(2, 2), "zeros")(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    def __init__(self, replaced: nn.Module, gives: Gives, outputs: int = 0) -> None:
        super().__init__()
        own = vars(nn.Module()).keys()
        for name, value in vars(replaced).items():
            if name not in own and isinstance(value, int | float | str):
                vars(self)[name] = value
        self.stub_gives = gives
        self.stub_outputs = outputs
        self.train(replaced.training)
        self.register_forward_pre_hook(_nothing)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, or zeros like it."""
        value: Tensor = tensors((args, kwargs))[0]
        if self.stub_gives == "zeros":
            value = torch.zeros_like(value)
        return (value, *[None] * (self.stub_outputs - 1)) if self.stub_outputs else value

    def extra_repr(self) -> str:
        """What it gives."""
        return repr(self.stub_gives)


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before a call."""


GIVES: tuple[Gives, ...] = get_args(Gives)
"""All that a stub can give."""


def stubs(model: nn.Module) -> dict[str, Stub]:
    """The stubs in a network, by path, shared ones under each of their paths."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, Stub)}


def put(model: nn.Module, path: str, stub: nn.Module) -> None:
    """Put a module in the place of the one at ``path``."""
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._modules[name] = stub


def plain_graph(model: nn.Module, example_inputs: Inputs) -> GraphModel:
    """The captured network, without what stubs leave behind; a graph is returned as it is.

    Raises:
        CaptureError: the network cannot be captured.
    """
    if isinstance(model, GraphModel):
        return model
    captured = capture(model, example_inputs)
    graph = without_zeros(captured.graph, stubs(model))
    return graph_model(model, Capture(graph, captured.constants))


def without_blocks(graph: Graph, blocks: Iterable[Block]) -> Graph:
    """The graph with these branches bypassed, and without what only they needed."""
    return without_nodes(graph, {block.add: block.trunk for block in blocks})[0]


def without_zeros(graph: Graph, scopes: Iterable[str]) -> Graph:
    """The graph without sums with the zeros that stubs give.

    Args:
        graph: of a network with stubs.
        scopes: paths of its stubs.
    """
    paths = frozenset(scopes)
    if not paths:
        return graph
    zero: set[str] = set()
    instead: dict[str, str] = {}
    for node in graph.calls:
        given = [arg.name for arg in node.args if isinstance(arg, Ref)]
        if writes(node.op) and not zero.isdisjoint(given[:1]):
            return graph
        if node.kind == "zeros_like" and node.scope in paths:
            zero.add(node.name)
        elif not zero.isdisjoint(given):
            if (
                zero.issuperset(given) and (is_view(node.op) or node.kind in _KEEP_ZERO)
            ) or node.kind == "mul":
                zero.add(node.name)
            elif node.kind in SUMS and (trunk := _remaining(graph, node, given, zero)):
                instead[node.name] = trunk
    return without_nodes(graph, instead)[0]


_KEEP_ZERO = frozenset(
    "add sub neg relu gelu silu tanh hardswish dropout feature_dropout clone contiguous detach to "
    "reshape flatten roll flip pad constant_pad_nd mean sum".split()
)
"""Operators, besides views, that make zeros of zeros."""


def _remaining(graph: Graph, node: Node, given: list[str], zero: set[str]) -> str:
    """The operand that a sum with zeros is equal to; empty where there is none."""
    left = [name for name in given if name not in zero]
    scaled = node.kind.startswith("sub") or node.options.get("alpha", 1) != 1
    if len(given) != 2 or len(left) != 1 or (scaled and left[0] != given[0]):
        return ""
    return left[0] if graph.by_name[left[0]].value == node.value else ""


def without_nodes(graph: Graph, instead: Mapping[str, str]) -> tuple[Graph, dict[str, str]]:
    """The graph with other values in place of some, and without what nothing reads then.

    A ``relu`` of what is one already goes, too. Where the graph writes into values in place, a
    value that stands for another becomes a copy of it.

    Args:
        graph: a captured network.
        instead: name of a node -> name of an earlier node of the same shape and type.

    Returns:
        The graph, and for each node that another stands for, the name of that.
    """
    copies = any(writes(node.op) for node in graph.calls)
    renamed: dict[str, str] = {}
    positive: set[str] = set()
    nodes: list[Node] = []

    def current(ref: Ref) -> Ref:
        return Ref(renamed.get(ref.name, ref.name))

    for node in graph.nodes:
        node = replace(
            node, args=substitute(node.args, current), kwargs=substitute(node.options, current)
        )
        first = node.args[0] if node.args else None
        source = first.name if isinstance(first, Ref) else ""
        if node.name in instead or (node.kind == "relu" and source in positive and instead):
            target = instead.get(node.name, source)
            target = renamed.get(target, target)
            if not copies:
                renamed[node.name] = target
                continue
            node = replace(node, op="aten.clone.default", args=(Ref(target),), kwargs={})
            source = target
        if node.kind == "relu" or (node.kind in _KEEP_SIGN and source in positive):
            positive.add(node.name)
        nodes.append(node)
    return without_unused(graph.with_nodes(nodes)), renamed


_KEEP_SIGN = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d dropout clone contiguous "
    "flatten view reshape permute transpose".split()
)
"""Operators that give no negative values where they are given none."""


def without_unused(graph: Graph) -> Graph:
    """The graph without calls and tensors on which its outputs do not depend."""
    live, effects = {graph.output.name}, Memory(graph).effects
    for node in reversed(graph.nodes):
        if node.op == "input" or not live.isdisjoint(effects[node.name]):
            live.add(node.name)
    return graph.with_nodes([node for node in graph.nodes if node.name in live])
