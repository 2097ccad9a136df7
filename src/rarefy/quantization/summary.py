"""What became of each layer, and how far its output is from the float network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.batches import call, evaluating, tensors
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, derived
from rarefy.quantization.affine import sqnr
from rarefy.quantization.calibration import Watched
from rarefy.quantization.insertion import PER_TENSOR, QUANTIZED
from rarefy.quantization.placement import Placement, carrier
from rarefy.types import Inputs

COMPARED = 8
"""Examples on which the layers' outputs are compared with the float network's."""


@dataclass(frozen=True)
class QuantizationSummary:
    """What was quantized, how well, and what was not.

    Attributes:
        layers: quantized layer -> SQNR in dB of its output, against the float network's on the
            first calibration examples; the noise of all layers before it is included.
        left: layer left in float -> reason.
        drop: how much of the user's metric was lost; None where it was not measured.
        evaluations: how often the user's evaluation was called.
        rounding: layer whose weights were rounded by a solve -> squared error of its output,
            relative to the float network's, on calibration examples that the solve has not seen:
            with weights rounded to nearest, and as they are. Equal where nothing was better.
    """

    layers: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    drop: float | None = None
    evaluations: int = 0
    rounding: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def sqnr_by_layer(
    net: GraphModel, quantized: GraphModel, placement: Placement, inputs: Inputs
) -> dict[str, float]:
    """SQNR in dB of every layer's output, the worst call of a layer that is called several times.

    Args:
        net: the float network.
        quantized: the same network with quantizers.
        placement: of the quantizers.
        inputs: what to compare on.
    """
    carriers = {
        carrier(net.graph, net.graph.by_name[name]).name: layer
        for name, layer in placement.readers.items()
    }
    exact: dict[str, Tensor] = {}
    found: dict[str, float] = {}

    def remember(node: Node, value: Any) -> None:
        exact[node.name] = tensors(value)[0]

    def compare(node: Node, value: Any) -> None:
        name = shown[node.name]
        reference, layer = exact.pop(name), carriers[name]
        if node.op == PER_TENSOR and node.argument("zero_point") == 0:
            reference = reference.clamp_min(0)  # it does the work of a relu further on
        found[layer] = min(sqnr(reference, tensors(value)[0]), found.get(layer, float("inf")))

    last = {name: derived(name, QUANTIZED) for name in carriers}
    present = quantized.graph.by_name.keys()
    shown = {q if q in present else name: name for name, q in last.items()}
    with evaluating(net, quantized):
        call(Watched(net, frozenset(carriers), remember), inputs)
        call(Watched(quantized, frozenset(shown), compare), inputs)
    return {layer: found[layer] for layer in dict.fromkeys(placement.readers.values())}


def outputs(net: GraphModel, inputs: Inputs) -> list[Tensor]:
    """The tensors of real numbers that a network returns."""
    with evaluating(net):
        return [t for t in tensors(call(net, inputs)) if t.is_floating_point()]


def noise(exact: list[Tensor], found: list[Tensor]) -> float:
    """Energy of the error relative to that of the values, the mean over several outputs."""
    pairs = zip(exact, found, strict=True)
    shares = [10 ** (-sqnr(a.nan_to_num(), b.nan_to_num()) / 10) for a, b in pairs]
    return float(torch.tensor(shares, dtype=torch.float64).mean()) if shares else 0.0
