"""Int8 quantization of a captured network, calibrated on a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict

from torch import nn

from rarefy.batches import batches, take
from rarefy.copies import hand_on
from rarefy.errors import InputError
from rarefy.graph.constants import fold_constants
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import plain_graph
from rarefy.paths import matching, within
from rarefy.pruning.repair import repair
from rarefy.quantization.affine import affine
from rarefy.quantization.bias import correct_biases
from rarefy.quantization.calibration import Calibration
from rarefy.quantization.dynamic import dynamic_placement, dynamic_quantizers
from rarefy.quantization.fold import fold_batch_norms
from rarefy.quantization.insertion import (
    check_finite,
    check_unquantized,
    inserted,
    static_quantizers,
)
from rarefy.quantization.mixed import Allowance, Evaluate, checked_costs, search
from rarefy.quantization.placement import LAYERS, TABLE, Placement, place
from rarefy.quantization.scaling import equalize, rescaled, smooth
from rarefy.quantization.splitting import split_silu
from rarefy.quantization.summary import COMPARED, QuantizationSummary, noise, outputs, sqnr_by_layer
from rarefy.schemes import Int8
from rarefy.types import Data, Inputs

SENSED = 64
"""Examples on which each layer's sensitivity is measured."""


class QuantizeOptions(TypedDict, total=False):
    """Arguments of :func:`quantize` by keyword."""

    evaluate: Evaluate | None
    max_drop: float
    higher_is_better: bool
    costs: Mapping[str, float] | None


def quantize(
    model: nn.Module,
    calibration: Data,
    scheme: Int8 | None = None,
    *,
    evaluate: Evaluate | None = None,
    max_drop: float = 0.01,
    higher_is_better: bool = True,
    costs: Mapping[str, float] | None = None,
) -> GraphModel:
    """Quantize a network to int8, with quantizers where runtimes fuse them.

    Activations become unsigned 8-bit with one range per tensor, found on the calibration data;
    weights of convolutions and linear layers become signed 8-bit with a scale per output channel.
    BatchNorms are folded, and weights that the forward makes of parameters alone are computed once.
    The forward of the result *is* the quantized network, computed in float
    with rounded values; ``rarefy.export`` turns it into integers. Gradients pass the rounding
    straight through, so that the result can be trained.

    With ``evaluate``, the layers whose quantization costs more than ``max_drop`` of the metric stay
    in float: the error that each layer makes alone at the outputs, per cost, says which come first,
    a bisection over evaluations how many, at most
    :func:`~rarefy.quantization.mixed.most` evaluations in all.

    Args:
        model: any module that can be captured, in float; left as it is.
        calibration: batches as in the data convention; targets are not used. A few hundred
            typical examples suffice.
        scheme: how ranges are found; ``Int8()`` if None.
        evaluate: the metric, e.g. ``lambda m: rarefy.evaluate(m, val)``; it gets networks in eval
            mode, and the same random numbers every time.
        max_drop: the largest loss of the metric.
        higher_is_better: False where the metric is a loss.
        costs: of every layer in float by path, such as measured milliseconds; its MACs if None.

    Returns:
        The quantized network, in eval mode, with the attribute ``quantization``, a
        :class:`~rarefy.quantization.summary.QuantizationSummary`, and ``rescaled``: what layers'
        outputs were divided by where their channels were smoothed or equalized.

    Raises:
        CaptureError: the network cannot be captured.
        DataError: there are no calibration data, the network does not run on a batch, or a tensor
            is not finite on them.
        InputError: no layer can be quantized, a weight is not finite, the model is quantized
            already, a name to skip matches nothing, or the evaluation failed.
        BudgetError: with a single layer quantized the metric still falls too far.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(quantize(net, [torch.randn(16, 4)]).quantization.layers)
        ['0', '2']

    Source: Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342.
    """
    scheme = scheme or Int8()
    if evaluate is None and costs is not None:
        raise InputError(
            "quantize(costs=...)", "without evaluate, no layer is put back", "Give evaluate, too"
        )
    allowance = None if evaluate is None else Allowance(evaluate, max_drop, higher_is_better)
    first, _ = next(batches(calibration, "quantize(calibration)"))
    net = fold_batch_norms(_captured(model, first))
    if scheme.functions == "split":
        net = split_silu(net)
    skipped = _skipped(model, net, scheme.skip)
    if scheme.smooth is not None:
        net = smooth(net, calibration, scheme.smooth)
    if scheme.equalize:
        net = equalize(net)
    job = _Job(net, calibration, Calibration(net, calibration, scheme), scheme, first, skipped)
    summary = QuantizationSummary()
    if allowance is not None:
        layer_costs = checked_costs(net.graph, job.placement({}), costs)
        found = search(net, job.network, job.sensitivities, layer_costs, allowance)
        job = replace(job, skipped={**skipped, **found.left})
        summary = replace(summary, drop=found.drop, evaluations=found.evaluations)
    placement, quantized = job.placement({}), job.network({})
    layers = sqnr_by_layer(net, quantized, placement, take(first, COMPARED))
    solved = getattr(getattr(quantized, "repaired", None), "errors", {})
    quantized.quantization = replace(  # type: ignore[assignment]
        summary, layers=layers, left=placement.left, rounding=solved
    )
    quantized.rescaled = rescaled(net)  # type: ignore[assignment]
    hand_on(model, quantized)  # its zeros are zeros here, and are to stay so
    return quantized


def _captured(model: nn.Module, example: Inputs) -> GraphModel:
    check_unquantized(model)
    net = fold_constants(plain_graph(model, example))
    _check_finite(net)
    return net


def _check_finite(net: GraphModel) -> None:
    """Pass where the weights and biases of all layers are numbers.

    Raises:
        InputError: some are not.
    """
    read = {
        name
        for node in net.graph.calls
        if node.op in LAYERS or node.op == TABLE
        for name in node.inputs[node.op != TABLE :]
    }
    for node in net.graph.nodes:
        if node.op == "tensor" and node.name in read:
            check_finite(node.path, net.tensor(node.path))


def _skipped(model: nn.Module, net: GraphModel, patterns: tuple[str, ...]) -> dict[str, str]:
    """Layers that the user leaves in float, by their own paths or those of modules around them.

    A layer whose weight several modules share has the paths of them all.

    Raises:
        InputError: a pattern matches nothing.
    """
    found = place(net.graph)
    layers = {layer: {layer} for layer in (*found.readers.values(), *found.left)}
    for sharing in _sharing(model):
        for layer in layers.keys() & sharing:
            layers[layer] |= sharing
    parts = [name.split(".") for names in layers.values() for name in names]
    known = {".".join(names[:count]) for names in parts for count in range(1, len(names) + 1)}
    chosen = [path for p in patterns for path in matching(p, known, "Int8(skip=...)")]
    return {
        layer: "left in float by choice"
        for layer, names in layers.items()
        if any(within(name, chosen) for name in names)
    }


def _sharing(model: nn.Module) -> Iterable[set[str]]:
    """Paths of the modules that hold a weight, for each weight."""
    found: dict[int, set[str]] = {}
    for path, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.ndim > 1:
            found.setdefault(id(tensor), set()).add(path.rpartition(".")[0] or path)
    return found.values()


@dataclass(frozen=True)
class _Job:
    """A float network, and all that is needed to quantize it.

    Attributes:
        net: with BatchNorms folded, channels rescaled.
        data: examples.
        calibration: of the same network on them.
        scheme: what is asked for.
        first: the first batch.
        skipped: layer that stays in float -> reason.
    """

    net: GraphModel
    data: Data
    calibration: Calibration
    scheme: Int8
    first: Inputs
    skipped: Mapping[str, str]

    def placement(self, left: Mapping[str, str]) -> Placement:
        """Where the quantizers go when these layers stay in float, too."""
        kept = {**self.skipped, **left}
        if self.scheme.activations == "dynamic":
            return dynamic_placement(self.net.graph, kept)
        return self.calibration.placement(kept)

    def network(self, left: Mapping[str, str]) -> GraphModel:
        """The quantized network, without a summary."""
        quantized = self.nearest(left)
        if self.scheme.rounding == "nearest":
            return quantized
        quantized.quantization = QuantizationSummary()  # type: ignore[assignment]
        rounding = self.scheme.rounding
        return repair(self.net, quantized, self.data, rounding=rounding)  # type: ignore[return-value]

    def nearest(self, left: Mapping[str, str]) -> GraphModel:
        """The network with each weight rounded by itself."""
        net, placement = self.net, self.placement(left)
        if self.scheme.activations == "dynamic":
            return inserted(net, placement, dynamic_quantizers(net.graph, placement))
        grids = {
            name: affine(*self.calibration.ranges[source])
            for name, source in placement.activations.items()
        }
        steps = {name: grid.scale for name, grid in grids.items()}
        quantized = inserted(net, placement, static_quantizers(net.graph, grids), steps)
        if self.scheme.correct_bias:
            return correct_biases(net, quantized, placement, self.first)
        return quantized

    def sensitivities(self) -> dict[str, float]:
        """Error at the outputs when one layer alone is quantized, by layer."""
        placement = self.placement({})
        layers, known = dict.fromkeys(placement.layers.values()), {*placement.readers.values()}
        alone = {layer: dict.fromkeys(known - {layer}, "on trial") for layer in layers}
        if self.scheme.activations == "static":
            kept = [{**self.skipped, **left} for left in alone.values()]
            self.calibration.observe(
                name for left in kept for name in self.calibration.planned(left).observed
            )
        inputs = take(self.first, SENSED)
        exact = outputs(self.net, inputs)
        return {
            layer: noise(exact, outputs(self.nearest(left), inputs))
            for layer, left in alone.items()
        }
