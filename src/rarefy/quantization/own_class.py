"""BatchNorms folded in a network of the user's own class, which stays one.

What is left of such a BatchNorm is a stub that hands on its input: it takes no time, and no space
in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rarefy.batches import device_of, moved
from rarefy.copies import successor
from rarefy.errors import InputError
from rarefy.graph.capture import check_runs
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref
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
        InputError: a BatchNorm holds values that are not finite, or the network does not run
            without it.
    """
    if isinstance(model, GraphModel):
        return fold_batch_norms(model).eval(), {}
    result = successor(model).eval()
    made = _with_biases(result, pairs(plain_graph(model, example_inputs).graph))
    net = plain_graph(result, example_inputs)
    found = pairs(net.graph)
    left = {
        node.scope: reason
        for node in net.graph.calls
        if node.op == BATCH_NORM and (reason := _unfit(result, net.graph, node, found))
    }
    for pair in {pair.weight: pair for pair in found if pair.norm.scope not in left}.values():
        layer = result.get_submodule(pair.weight.rpartition(".")[0])
        weight, bias = folded(*arguments(net, pair))
        check_finite(pair.norm.scope, bias)
        layer.weight.data, layer.bias.data = weight, bias
        made.discard(layer)
        _replace(result, result.get_submodule(pair.norm.scope))
    for layer in made:
        layer.register_parameter("bias", None)
    _check_runs(result, example_inputs)
    return result, left


def _with_biases(model: nn.Module, found: Sequence[Pair]) -> set[nn.Module]:
    """Give the layers of these pairs a bias of zeros where they have none; returns those.

    The graph that is captured then shows whether the layer's forward reads its bias.
    """
    made: set[nn.Module] = set()
    for pair in found:
        layer = model.get_submodule(pair.weight.rpartition(".")[0])
        weight = layer._parameters.get("weight")
        if _is_plain(layer, pair) and weight is not None and layer.bias is None:
            zeros = weight.new_zeros(len(weight))
            layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
            made.add(layer)
    return made


def _is_plain(layer: nn.Module, pair: Pair) -> bool:
    """Whether a layer keeps its weight and its bias, or that it has none, as PyTorch's do."""
    known = isinstance(layer, _ConvNd | nn.Linear) and pair.weight.rpartition(".")[2] == "weight"
    return known and "bias" in layer._parameters


def _replace(model: nn.Module, norm: nn.Module) -> None:
    """Put a stub in the place of a norm, wherever it is."""
    stub = Stub(norm, "input")
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is norm:
            put(model, path, stub)


def _check_runs(model: nn.Module, example_inputs: Inputs) -> None:
    """Pass where the network runs without its norms.

    Raises:
        InputError: it does not; a forward that asks for the dtype of a norm's weight, say.
    """
    try:
        check_runs(model, moved(example_inputs, device_of(model)))
    except InputError as error:
        raise InputError(
            "quantize(WeightOnly(fold=True))",
            f"the network needs a BatchNorm for more than to call it: {error.what}",
            "Leave fold out",
        ) from error


def _unfit(model: nn.Module, graph: Graph, norm: Node, found: Sequence[Pair]) -> str:
    """Why the module of a BatchNorm has to stay; empty where it can go."""
    pair = next((pair for pair in found if pair.norm is norm), None)
    if pair is None:
        return "no convolution or linear layer right before it takes it up alone"
    owner, own = pair.weight.rpartition(".")[0], f"{norm.scope}."
    bias = pair.layer.argument("bias")
    reads = isinstance(bias, Ref) and graph.by_name[bias.name].path == f"{owner}.bias"
    if not reads or not _is_plain(model.get_submodule(owner), pair):
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
