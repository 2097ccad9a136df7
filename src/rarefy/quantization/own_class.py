"""BatchNorms folded in a network of the user's own class, which stays one.

What is left of such a BatchNorm is a stub that hands on its input: it takes no time, and no space
in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rarefy.copies import copied
from rarefy.graph.program import Graph, GraphModel, Node
from rarefy.graph.stubs import Stub, plain_graph, put
from rarefy.quantization.fold import BATCH_NORM, Pair, arguments, fold_batch_norms, folded, pairs
from rarefy.quantization.insertion import check_finite
from rarefy.types import Inputs


def fold_modules(model: nn.Module, example_inputs: Inputs) -> tuple[nn.Module, Mapping[str, str]]:
    """A network of its own class without the BatchNorms that fold.

    Each layer takes up the BatchNorm behind it, with a bias where it had none, and a
    :class:`~rarefy.graph.stubs.Stub` that hands on its input stands where the BatchNorm was.

    Args:
        model: left as it is.
        example_inputs: what it runs on.

    Returns:
        A copy in eval mode that computes the same up to rounding, and the BatchNorms that stay, by
        the path of their module, with the reason.

    Raises:
        CaptureError: the network cannot be captured.
        InputError: a BatchNorm holds values that are not finite.
    """
    if isinstance(model, GraphModel):
        return fold_batch_norms(model).eval(), {}
    net = plain_graph(model, example_inputs)
    found = pairs(net.graph)
    left = {
        node.scope: reason
        for node in net.graph.calls
        if node.op == BATCH_NORM and (reason := _unfit(model, net.graph, node, found))
    }
    result = copied(model).eval()
    for pair in {pair.weight: pair for pair in found if pair.norm.scope not in left}.values():
        layer = result.get_submodule(pair.weight.rpartition(".")[0])
        assert isinstance(layer, _ConvNd | nn.Linear)
        weight, bias = folded(*arguments(net, pair))
        check_finite(pair.norm.scope, bias)
        layer.weight.data = weight
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        norm = result.get_submodule(pair.norm.scope)
        stub = Stub(norm, "input")
        for path, module in list(result.named_modules(remove_duplicate=False)):
            if module is norm:
                put(result, path, stub)
    return result, left


def _unfit(model: nn.Module, graph: Graph, norm: Node, found: Sequence[Pair]) -> str:
    """Why the module of a BatchNorm has to stay; empty where it can go."""
    pair = next((pair for pair in found if pair.norm is norm), None)
    if pair is None:
        return "no convolution or linear layer right before it takes it up alone"
    owner, _, leaf = pair.weight.rpartition(".")
    layer, own = model.get_submodule(owner), f"{norm.scope}."
    plain = isinstance(layer, _ConvNd | nn.Linear) and leaf == "weight"
    if not plain or pair.bias != f"{owner}.bias" or "bias" not in layer._parameters:
        return "the layer before it keeps its weight or its bias in a way of its own"
    calls = {n.name for n in graph.calls if n.scope == norm.scope or n.scope.startswith(own)}
    readers = {
        user.name
        for node in graph.nodes
        if node.op == "tensor" and node.path.startswith(own)
        for user in graph.users[node.name]
    }
    going = {p.norm.name for p in found}
    if not isinstance(model.get_submodule(norm.scope), _BatchNorm) or not calls <= going:
        return "its module does more than to normalize"
    return "" if readers <= going else "its tensors are read elsewhere, too"
