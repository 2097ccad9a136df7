"""The mean error of quantized layers, taken into their biases.

Rounding shifts the mean of a layer's outputs; the shift is known per channel once the float network
has seen the same inputs. Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2, in its
empirical form: layer after layer, each on what the corrected layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rarefy.batches import call, evaluating
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref
from rarefy.quantization.calibration import Watched
from rarefy.quantization.fold import named
from rarefy.quantization.placement import CONVOLUTIONS, Placement
from rarefy.types import Inputs


class _Correcting(GraphModel):
    """A quantized network that moves its biases as it runs.

    Args:
        model: with tensors of its own; its biases are changed.
        biases: call of a layer -> path of its bias.
        means: call of a layer -> mean of the float layer's output, per channel.
    """

    def __init__(
        self, model: GraphModel, biases: Mapping[str, str], means: Mapping[str, Tensor]
    ) -> None:
        super().__init__(
            model.graph, dict(named(model.named_parameters)), dict(named(model.named_buffers))
        )
        self._biases, self._means = biases, means

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """As the network's step, with the mean that the float layer has."""
        result = super().step(node, function, values)
        if node.name not in self._biases:
            return result
        shift = self._means[node.name] - _mean(node, result)
        self.tensor(self._biases[node.name]).data += shift.to(result.dtype)
        return super().step(node, function, self._renewed(node, values))

    def _renewed(self, node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
        bias = node.argument("bias")
        return {**values, bias.name: self.tensor(self._biases[node.name])}


def correct_biases(
    net: GraphModel, quantized: GraphModel, placement: Placement, inputs: Inputs
) -> GraphModel:
    """A quantized network whose layers have the float network's mean outputs on some inputs.

    Layers without a bias, or with one that others read too, stay as they are.

    Args:
        net: the float network.
        quantized: the same with quantizers; left as it is.
        placement: of the quantizers.
        inputs: some hundred typical examples in one batch.
    """
    biases = _biases(net.graph, placement)
    means: dict[str, Tensor] = {}

    def show(node: Node, value: Tensor) -> None:
        means[node.name] = _mean(node, value)

    parameters = {
        path: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        if path in biases.values()
        else p
        for path, p in named(quantized.named_parameters)
    }
    result = GraphModel(quantized.graph, parameters, dict(named(quantized.named_buffers)))
    with evaluating(net, quantized):
        call(Watched(net, frozenset(biases), show), inputs)
        call(_Correcting(result, biases, means), inputs)
    return result


def _biases(graph: Graph, placement: Placement) -> dict[str, str]:
    """Call of a quantized layer -> path of its bias, where it alone reads that parameter."""
    paths = [node.path for node in graph.nodes if node.op == "tensor"]
    found: dict[str, str] = {}
    for name in placement.layers:
        bias = graph.by_name[name].argument("bias")
        node = graph.by_name[bias.name] if isinstance(bias, Ref) else None
        if node is None or node.op != "tensor" or len(graph.users[node.name]) > 1:
            continue
        if paths.count(node.path) == 1:
            found[name] = node.path
    return found


def _mean(node: Node, value: Tensor) -> Tensor:
    """Mean of every output channel of a layer, in double precision."""
    dim = 1 if node.op in CONVOLUTIONS and value.ndim > 2 else -1
    return value.detach().double().transpose(0, dim).flatten(1).mean(1)
