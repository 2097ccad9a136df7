"""SiLU as the two operators that it is made of, for runtimes that know these in integers.

``x * sigmoid(x)`` is one operator in PyTorch, and runtimes fuse it in float. onnxruntime has
integer kernels for a sigmoid and for a product, and none for both in one: with a quantizer between
them the whole stays in integers, without it the network leaves them at every activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref, derived

SILU = "aten.silu.default"


def split_silu(model: GraphModel) -> GraphModel:
    """The same network with every SiLU as a sigmoid and a product; its tensors are shared.

    Example:
        >>> net = plain_graph(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), x)  # doctest: +SKIP
        >>> [node.kind for node in split_silu(net).graph.calls]  # doctest: +SKIP
        ['linear', 'sigmoid', 'mul']
    """
    nodes = [part for node in model.graph.nodes for part in _parts(node)]
    return model.with_graph(model.graph.with_nodes(nodes))


def _parts(node: Node) -> Iterator[Node]:
    if node.op != SILU:
        yield node
        return
    gate = derived(node.name, "gate")
    yield replace(node, name=gate, op="aten.sigmoid.default")
    yield replace(node, op="aten.mul.Tensor", args=(node.args[0], Ref(gate)))
