"""Weights alone on few values: the network stays what it is, and its file becomes small.

Zeros stay zero, so that what was pruned is pruned still, and N:M stays N:M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, take
from rarefy.copies import hand_on, successor
from rarefy.errors import InputError, warn
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import plain_graph, stubs
from rarefy.grid import Grid, check_float, grids, put_grids
from rarefy.pruning.repair import repair
from rarefy.pruning.running.examples import affordable, collect, parts
from rarefy.quantization.affine import sqnr
from rarefy.quantization.calibration import WHERE
from rarefy.quantization.insertion import check_finite, check_unquantized
from rarefy.quantization.own_class import fold_modules
from rarefy.quantization.palette import palette
from rarefy.quantization.readers import mean_squares, sqnr_of_readers
from rarefy.quantization.rounding import grid_for
from rarefy.quantization.summary import COMPARED, QuantizationSummary
from rarefy.quantization.weights import Weight, find
from rarefy.schemes import ROUNDINGS, Half, WeightOnly
from rarefy.types import Data, Inputs

SAMPLES = 512
"""Calibration examples that are used at most."""

ON_DATA = (*ROUNDINGS, "awq")
"""Methods that need calibration data."""


def weight_only(model: nn.Module, calibration: Data | None, scheme: WeightOnly) -> nn.Module:
    """A copy of a network whose weights take few values.

    Weights of convolutions, linear layers (also transformers' ``Conv1D``), embeddings, attention
    and recurrent layers are quantized. Layers that GPTQ or learned rounding cannot solve, and those
    that are nearer to the original without it on examples that it has not seen, are rounded to
    nearest. The targets of both are the outputs of the float network for the float network's
    activations, so that they make up for the layers before, too; means of the outputs are taken up
    by the layer's bias or by the statistics of the BatchNorm behind it.

    Args:
        model: any network in float; for methods that need data it must be one that can be
            captured.
        calibration: batches; None for ``"rtn"`` and ``"palette"`` without figures of outputs.
        scheme: how.

    Returns:
        An instance of the network's own class in eval mode, with the attribute ``quantization``.
        Without data its figures are those of the weights instead of the layers' outputs. With
        GPTQ and learned rounding, ``repaired`` tells what became of each layer.

    Raises:
        CaptureError: data are given, and the network cannot be captured.
        DataError: the data yield nothing, or values are not finite.
        InputError: data are missing, a parameter is NaN or infinite somewhere, no weight can be
            quantized, or they are quantized already.

    Source: Frantar et al. 2022 (GPTQ), https://arxiv.org/abs/2210.17323; Nagel et al. 2020
    (AdaRound), https://arxiv.org/abs/2004.10568; Lin et al. 2023 (AWQ),
    https://arxiv.org/abs/2306.00978, of which this is the search of ranges: its scaling of input
    channels would need another operator where it cannot be folded, and is not done. Han et al.
    2016 (Deep Compression), https://arxiv.org/abs/1510.00149.
    """
    _check(model)
    if calibration is None and scheme.method in ON_DATA:
        raise InputError(
            f"quantize(calibration=None, WeightOnly(method={scheme.method!r}))",
            "this method needs calibration data",
            "Give some hundred unlabelled examples, or write method='rtn'",
        )
    if calibration is None and scheme.fold:
        raise InputError(
            "quantize(calibration=None, WeightOnly(fold=True))",
            "without an example it is unknown which layer a BatchNorm follows",
            "Give calibration data, or leave fold out",
        )
    joined = shown = None
    if calibration is not None:
        joined, single = collect(calibration, SAMPLES, WHERE)
        shown = take(joined, COMPARED) if batch_size(joined) > 1 else single
    kept: Mapping[str, str] = {}
    given = model
    if scheme.fold and shown is not None:
        model, kept = fold_modules(model, shown)
    result = successor(model).eval()
    hand_on(given, result)
    first = None if shown is None else plain_graph(model, shown)
    weights, left = find(
        result, None if first is None else first.graph, scheme.skip, "WeightOnly(skip=...)"
    )
    if not weights:
        raise InputError(
            "quantize(model)",
            f"no weight can be quantized: {left or 'there is none'}",
            "Give a network with convolutions or linear layers, and skip fewer of them",
        )
    left.update(kept)
    importance: Mapping[str, Tensor] = {}
    if first is not None and joined is not None and scheme.method in ON_DATA:
        importance = _importance(first, weights, joined)
    _round(result, weights, scheme, importance)
    result.quantization = QuantizationSummary(left=left)  # type: ignore[assignment]
    solved: Mapping[str, tuple[float, float]] = {}
    if scheme.method in ROUNDINGS and calibration is not None:
        result = repair(model, result, calibration, samples=SAMPLES, rounding=scheme.method)
        solved = result.repaired.errors  # type: ignore[union-attr,assignment]
        if not solved:
            _warn_of(result.repaired.skipped)  # type: ignore[union-attr,arg-type]
        _settle(result)
    if first is not None and shown is not None:
        layers = {weight.path: weight.layer for weight in weights}
        noise = sqnr_of_readers((first, _graph(model, result, shown)), layers, shown)
    else:
        noise = _weight_noise(model, weights)
    result.quantization = QuantizationSummary(noise, left, rounding=solved)  # type: ignore[assignment]
    return result


def _warn_of(skipped: Mapping[str, str]) -> None:
    """Say that no layer was solved, and why."""
    reasons = "; ".join(dict.fromkeys(skipped.values())) or "there is none to solve"
    warn(f"quantize(): all weights are rounded to nearest, no layer was solved: {reasons}")


def _check(model: nn.Module) -> None:
    """Pass where a network is in float and not quantized yet."""
    check_unquantized(model)
    check_float(model, "quantize(model)")


def _importance(
    first: GraphModel, weights: Sequence[Weight], inputs: Inputs
) -> Mapping[str, Tensor]:
    """Mean squares of what each entry of a weight is multiplied with."""
    few = take(inputs, affordable(first, batch_size(inputs)))
    return mean_squares(first, {weight.path for weight in weights}, parts(first, few), WHERE)


@torch.no_grad()
def _round(
    model: nn.Module,
    weights: Sequence[Weight],
    scheme: WeightOnly,
    importance: Mapping[str, Tensor],
) -> None:
    """Round the weights in place, and note their grids."""
    found: dict[str, Grid] = {}
    for weight in weights:
        tensor = weight.tensor
        if scheme.method == "palette":
            tensor.copy_(palette(tensor, 2**scheme.bits))
            continue
        counted = importance.get(weight.path)
        grid = grid_for(tensor, weight.axis, scheme, counted)
        tensor.copy_(grid.nearest(tensor))
        found[weight.path] = grid
    put_grids(model, found)


@torch.no_grad()
def _settle(model: nn.Module) -> None:
    """Put weights of less than single precision on their grids to the last bit."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for path, grid in grids(model).items():
        held[path].copy_(grid.nearest(held[path]))


def _graph(model: nn.Module, result: nn.Module, shown: Inputs) -> GraphModel:
    """The graph of the float network, with the tensors of the quantized one."""
    if isinstance(result, GraphModel):
        return result
    if stubs(model):
        return plain_graph(result, shown)
    return graph_model(result, capture(model, shown))


@torch.no_grad()
def _weight_noise(model: nn.Module, weights: Sequence[Weight]) -> dict[str, float]:
    """SQNR of the weights themselves, the worst of a layer's."""
    found: dict[str, float] = {}
    exact = dict(model.named_parameters(remove_duplicate=False))
    for weight in weights:
        ratio = sqnr(exact[weight.path], weight.tensor)
        found[weight.layer] = min(ratio, found.get(weight.layer, float("inf")))
    return found


def half(model: nn.Module, scheme: Half) -> nn.Module:
    """A copy of a network whose weights are numbers of half precision, in their own dtype.

    Tensors with a value beyond the range of half precision stay as they are.

    Args:
        model: any network.
        scheme: which half precision.

    Returns:
        An instance of the network's own class in eval mode, with the attribute ``quantization``:
        SQNR of the parameters, and those that are left alone.

    Raises:
        InputError: a parameter is NaN or infinite somewhere, or quantized already.
    """
    _check(model)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[scheme.dtype]
    result = successor(model).eval()
    noise: dict[str, float] = {}
    left: dict[str, str] = {}
    with torch.no_grad():
        for path, tensor in result.named_parameters():
            check_finite(path, tensor)
            if tensor.dtype not in (torch.float32, torch.float64):
                continue
            rounded = tensor.to(dtype).to(tensor.dtype)
            if not bool(rounded.isfinite().all()):
                left[path] = f"its largest value, {float(tensor.abs().max()):.3g}, overflows"
                continue
            noise[path] = sqnr(tensor, rounded)
            tensor.copy_(rounded)
    result.quantization = QuantizationSummary(noise, left)  # type: ignore[assignment]
    return result
