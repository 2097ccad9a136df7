"""``quantize`` where a runtime is to serve the result: what int8 does not speed up stays in float.

Integer kernels are not faster for every kind of layer, and the changes between integers and real
numbers cost time of their own. Kinds of layers are left in float one after the other, each is timed
beside the best so far, and stays there where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack, overload

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.batches import batches, check_rereadable, of_one_length
from rarefy.copies import ordinary
from rarefy.deployment.export import export
from rarefy.deployment.measure import relative
from rarefy.deployment.runtimes import runtime_named
from rarefy.errors import InputError, warn
from rarefy.graph.constants import fold_constants
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node
from rarefy.graph.stubs import plain_graph
from rarefy.measured import SECONDS, Served
from rarefy.quantization import quantize as quantization
from rarefy.quantization.placement import FUSABLE, LAYERS, layer_name
from rarefy.quantization.quantize import QuantizeOptions
from rarefy.quantization.splitting import SILU
from rarefy.quantization.weight_only import half, weight_only
from rarefy.schemes import Half, Int8, WeightOnly
from rarefy.types import Data, Inputs, Measurement, Ratio, check_network


@overload
def quantize(
    model: nn.Module,
    calibration: Data,
    scheme: Int8 | None = None,
    *,
    runtime: str | None = None,
    threads: int = 1,
    **options: Unpack[QuantizeOptions],
) -> GraphModel: ...


@overload
def quantize(
    model: nn.Module, calibration: Data | None, scheme: WeightOnly | Half
) -> nn.Module: ...


@overload
def quantize(
    model: nn.Module,
    calibration: Data,
    scheme: Int8 | WeightOnly | Half | None = None,
    *,
    runtime: str | None = None,
    threads: int = 1,
    **options: Unpack[QuantizeOptions],
) -> nn.Module: ...


@torch.inference_mode(False)
def quantize(
    model: nn.Module,
    calibration: Data | None,
    scheme: Int8 | WeightOnly | Half | None = None,
    *,
    runtime: str | None = None,
    threads: int = 1,
    **options: Unpack[QuantizeOptions],
) -> nn.Module:
    """Quantize a network to int8, with quantizers where runtimes fuse them, or its weights alone.

    ``WeightOnly`` and ``Half`` return an instance of the network's own class whose weights take
    fewer values (:func:`rarefy.quantization.weight_only.weight_only`): :func:`rarefy.save` stores
    them in as few bits, and nothing is faster. All that follows is of ``Int8``.

    The forward of the result *is* the quantized network, computed in float with rounded values;
    ``rarefy.export`` turns it into integers, and it can be trained
    (:func:`rarefy.quantization.quantize.quantize` has the details).

    With ``evaluate``, the few and cheap layers whose quantization costs too much stay in float.
    With ``runtime``, the result and the float network are timed in it on the first batch, and kinds
    of layers (linear; convolutions of one position, as in squeeze-and-excitation; depthwise,
    pointwise and larger convolutions) that int8 does not speed up stay in float, and functions
    behind convolutions are computed in the faster way (see ``Int8(functions=)``); the attribute
    ``served`` then is a :class:`~rarefy.measured.Served` record, and a result that is not faster
    than the float network is warned of.

    Args:
        model: any module that can be captured, in float; left as it is.
        calibration: batches as in the data convention; ``WeightOnly(method="rtn")``,
            ``"palette"`` and ``Half`` need none.
        scheme: what is quantized and how; ``Int8()`` if None.
        runtime: ``"onnxruntime"`` or ``"openvino"``; None: nothing is timed.
        threads: intra-op threads of the runtime.
        evaluate: the metric, e.g. ``lambda m: rarefy.evaluate(m, val)``.
        max_drop: the largest loss of the metric, 0.01 if not given.
        higher_is_better: False where the metric is a loss.
        costs: of every layer in float by path, such as measured milliseconds; its MACs if not
            given.

    Returns:
        The quantized network, in eval mode, with the attribute ``quantization``, a
        :class:`~rarefy.quantization.summary.QuantizationSummary`: each layer's error, which layers
        stay in float and why.

    Raises:
        CaptureError: the network cannot be captured.
        DataError: there are no calibration data, the network does not run on a batch, or a tensor
            is not finite on them, or the data can be read only once.
        InputError: no layer can be quantized, the model is quantized already, or has tensors
            without values or weights that are not finite, a name to skip matches
            nothing, the evaluation failed, or the runtime is unknown or does not serve files.
        BudgetError: with a single layer quantized the metric still falls too far.
        ExportError: a network cannot be exported to be timed.
        MissingExtraError: the runtime is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(quantize(net, [torch.randn(16, 4)]).quantization.layers)  # doctest: +SKIP
        ['0', '2']
    """
    _check(model, calibration, scheme)
    model = ordinary(model)
    if isinstance(scheme, WeightOnly | Half):
        if runtime is not None or options:
            raise InputError(
                f"quantize(scheme={scheme!r})",
                "runtime, evaluate and what goes with it are for layers in int8",
                "Leave them out, or give Int8()",
            )
        if isinstance(scheme, Half):
            return half(model, scheme)
        return weight_only(model, calibration, scheme)
    if calibration is None:
        raise InputError(
            "quantize(calibration=None)", "int8 needs calibration data", "Give some batches"
        )
    calibration = of_one_length(calibration, "quantize(calibration)")
    if runtime is None:
        return quantization.quantize(model, calibration, scheme, **options)
    if runtime_named(runtime).form != ".onnx":
        in_float = runtime_named(runtime).serves == "module"
        raise InputError(
            f"quantize(runtime={runtime!r})",
            "PyTorch computes quantized networks in float"
            if in_float
            else "its files take too long to write for the many that are compared",
            f"Use one of {', '.join(FASTER)}",
        )
    scheme = scheme or Int8()
    example, _ = next(batches(calibration, "quantize(calibration)"))
    with TemporaryDirectory(prefix="rarefy-") as folder:
        compared = partial(
            relative, example_inputs=example, runtime=runtime, threads=threads, max_seconds=SECONDS
        )
        contest = _Contest(Path(folder), lambda net, path: export(net, path, example), compared)
        quick = replace(scheme, rounding="nearest")  # values take no time, rounding them may
        result, file, quick, reasons = _fastest(
            model, calibration, example, quick, contest, runtime
        )
        chosen = replace(quick, rounding=scheme.rounding)
        asked = any(options.get(name) is not None for name in ("evaluate", "costs"))
        if asked or chosen != quick:
            held = _left(result)
            result = quantization.quantize(model, calibration, chosen, **options)
            file = file if _left(result) == held else contest.written(result)
        before, after, share = contest.beside(contest.written(model), file)
    summary: Any = result.quantization
    result.quantization = replace(summary, left={**summary.left, **reasons})
    faster = share.high < 1
    result.served = Served(before, after, share.value, faster, share.noise)  # type: ignore[assignment]
    if not faster:
        warn(
            f"the quantized network is not faster in {runtime}: it takes {share} of the float "
            "network's time"
        )
    return result


def _check(model: nn.Module, calibration: object, scheme: object) -> None:
    """Pass where there is a network with values, data that can be read again, and a scheme.

    Raises:
        InputError: there is not.
    """
    check_network(model, "quantize(model)")
    check_rereadable(calibration, "quantize(calibration)")
    if scheme is not None and not isinstance(scheme, Int8 | WeightOnly | Half):
        raise InputError(
            f"quantize(scheme={scheme!r})",
            "it is no scheme",
            "Give rarefy.Int8(), rarefy.WeightOnly() or rarefy.Half(), or None for Int8()",
        )
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.device.type == "meta":
            raise InputError(
                f"quantize(model), tensor {path!r}",
                "it has no values yet: it is lazy or on the meta device",
                "Run a lazy network once on an example; load a checkpoint into one without values",
            )


class _Contest:
    """Networks written for a runtime and timed beside each other.

    Args:
        folder: where files go.
        write: puts a network into a file.
        compared: times two files.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[nn.Module, Path], Path],
        compared: Callable[[Path, Path], tuple[Measurement, Measurement, Ratio]],
    ) -> None:
        self.folder, self.write, self.beside = folder, write, compared
        self._count = 0

    def written(self, network: nn.Module) -> Path:
        """The network in a file of its own."""
        self._count += 1
        return self.write(network, self.folder / f"{self._count}.onnx")


def _left(network: nn.Module) -> Collection[str]:
    """Layers that are in float, which tell apart two results for one network and data."""
    summary: Any = network.quantization
    return set(summary.left)


FASTER = {"onnxruntime": ("split", frozenset({SILU})), "openvino": ("fused", FUSABLE)}
"""Runtime -> how it may compute functions behind convolutions faster, a value of
``Int8(functions=)``, and the operators that this concerns."""


def _fastest(
    model: nn.Module,
    calibration: Data,
    example: Inputs,
    scheme: Int8,
    contest: _Contest,
    runtime: str,
) -> tuple[GraphModel, Path, Int8, dict[str, str]]:
    """The quantized network with layers in float where that is faster, in a file of its own.

    At least one kind of layers stays in int8.

    Returns:
        The network, its file, its scheme, and the layers that went back to float -> reason.
    """
    graph = fold_constants(plain_graph(model, example)).graph
    result = quantization.quantize(model, calibration, scheme)
    best, reasons = contest.written(result), dict[str, str]()
    kinds = _kinds(graph, result.quantization.layers)  # type: ignore[union-attr,arg-type]
    trials: list[tuple[str, list[str], str]] = [(kind, kinds[kind], "") for kind in kinds]
    way, concerned = FASTER[runtime]
    undecided = (scheme.activations, scheme.functions) == ("static", "apart")
    if undecided and any(node.op in concerned for node in graph.calls):
        trials.insert(0, ("function", [], way))
    for kind, layers, functions in trials:
        if {*reasons, *layers} >= set().union(*kinds.values()):
            break
        functions = functions or scheme.functions
        trial = replace(scheme, skip=(*scheme.skip, *layers), functions=functions)
        network = quantization.quantize(model, calibration, trial)
        candidate = contest.written(network)
        *_, share = contest.beside(best, candidate)
        if share.high < 1:
            result, best, scheme = network, candidate, trial
            reason = f"faster in float: with every {kind} in float the network takes {share} of its"
            reasons |= dict.fromkeys(layers, f"{reason} time in {runtime}")
    return result, best, scheme, reasons


def _kinds(graph: Graph, layers: Mapping[str, float]) -> dict[str, list[str]]:
    """Kind of layer -> the quantized layers that are of it, the rarest kind first."""
    found: dict[str, list[str]] = {}
    for node in graph.calls:
        layer = layer_name(graph, node) if node.op in LAYERS else ""
        if layer in layers and not any(layer in held for held in found.values()):
            found.setdefault(_kind(graph, node), []).append(layer)
    return {kind: found[kind] for kind in sorted(found, key=lambda kind: len(found[kind]))}


def _kind(graph: Graph, node: Node) -> str:
    shape = graph.by_name[node.args[1].name].shape
    if len(shape) == 2:
        return "linear layer"
    if prod(node.shape[2:]) == 1:
        return "convolution of one position"
    if shape[1] == 1 and node.argument("groups") > 1:
        return "depthwise convolution"
    return "pointwise convolution" if set(shape[2:]) == {1} else "larger convolution"
