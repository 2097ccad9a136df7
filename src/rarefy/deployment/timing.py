"""Latencies of single layers in a runtime, at several widths, kept between runs.

Each layer is made a network of its own (a small ONNX graph, or a module) and timed; all widths of
one layer in turn, so that they meet the same noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.deployment.cache import Cache
from rarefy.deployment.rounds import latency, timed
from rarefy.deployment.runtimes import RUNTIMES, load_onnx
from rarefy.graph.count import batch_of
from rarefy.graph.layer import Layer, layer
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.accounts import Extents
from rarefy.pruning.selection.costs import Costs, Surface

SHARES = (0.25, 0.5, 0.75)
"""Shares of a layer's widths at which it is timed, beside the whole."""

CALLS = 30
"""Timed calls of each width, at most."""

SECONDS = 0.1
"""Wall time for each width, about."""

OPSET = 18


def layer_costs(
    network: Network,
    whole: float,
    *,
    runtime: str,
    threads: int,
    batch: int,
    step: int,
    cache: Cache,
) -> Costs:
    """Time every convolution, matrix product and attention of a network.

    Args:
        network: the trace.
        whole: milliseconds of the whole network. What the layers do not account for is the rest;
            where they take longer than the whole, which fuses them, all are scaled to it.
        runtime: a key of :data:`~rarefy.deployment.runtimes.RUNTIMES`.
        threads: intra-op threads.
        batch: examples of one call.
        step: what the widths that are timed are multiples of.
        cache: what is known of earlier runs.

    Raises:
        MissingExtraError: onnx or the runtime is not installed.
    """
    graph = network.captured.graph
    repeat = batch / batch_of(graph)
    grids = {}
    for node in graph.calls:
        full = layer(graph, node, lambda name: graph.by_name[name].shape)
        if full is not None:
            halved = layer(graph, node, _halved(network))
            grids[node.name] = full, _grid(full, halved or full, step)
    known: dict[Layer, float] = {}
    for full, grid in grids.values():
        variants = [_variant(full, *widths, repeat) for widths in product(*grid)]
        missing = [v for v in variants if v not in known]
        known |= cache.get(missing, partial(_timed, runtime=runtime, threads=threads))
    surfaces = {name: _surface(full, *grid, repeat, known) for name, (full, grid) in grids.items()}
    total = sum(surface(grids[name][0]) for name, surface in surfaces.items())
    if total > whole:
        surfaces = {name: _scaled(s, whole / total) for name, s in surfaces.items()}
    return Costs(surfaces, max(whole - total, 0.0))


def _halved(network: Network) -> Callable[[str], tuple[int, ...]]:
    """Shapes where every group has lost a unit: which dimensions can change."""
    removed = np.zeros(network.coupling.units, np.bool_)
    for group in network.groups:
        removed[group.units[: len(group) - 1][:1]] = True
    extents = Extents(network)
    return partial(extents.shape, extents.left(Plan.of(network, removed)))


def _grid(full: Layer, smaller: Layer, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inner and outer widths to time."""
    inner = _widths(full.inner, step) if smaller.inner < full.inner else (full.inner,)
    outer = _widths(full.outer, step) if smaller.outer < full.outer else (full.outer,)
    return inner, outer


def _widths(width: int, step: int) -> tuple[int, ...]:
    if width <= step:
        return tuple(sorted({max(width // 2, 1), width}))
    rounded = {math.ceil(width * share / step) * step for share in SHARES}
    return tuple(sorted({min(n, width) for n in rounded} | {width}))


def _variant(full: Layer, inner: int, outer: int, repeat: float) -> Layer:
    """The layer at other widths; a convolution with one input channel a group loses groups."""
    times = max(round(full.times * repeat), 1)
    if full.groups == 1:
        return replace(full, inner=inner, outer=outer, times=times)
    if full.inner > 1:
        outer = max(outer // full.groups, 1) * full.groups
        return replace(full, inner=inner, outer=outer, times=times)
    each = max(full.outer // full.groups, 1)
    groups = max(outer // each, 1)
    return replace(full, outer=groups * each, groups=groups, times=times)


def _surface(
    full: Layer,
    inner: Sequence[int],
    outer: Sequence[int],
    repeat: float,
    known: Mapping[Layer, float],
) -> Surface:
    rows = tuple(tuple(known[_variant(full, i, o, repeat)] for o in outer) for i in inner)
    return Surface(tuple(inner), tuple(outer), rows, full.times)


def _scaled(surface: Surface, factor: float) -> Surface:
    return replace(surface, ms=tuple(tuple(ms * factor for ms in row) for row in surface.ms))


def _timed(layers: Sequence[Layer], *, runtime: str, threads: int) -> list[float]:
    """Milliseconds of each layer: the 10th percentile, which other programs disturb least.

    With one thread it is the processor's time.
    """
    row = RUNTIMES[RUNTIMES[runtime].layers]
    with TemporaryDirectory(prefix="rarefy-") as folder, ExitStack() as stack:
        runners = []
        for number, found in enumerate(layers):
            path = Path(folder) / f"{number}.onnx"
            inputs = _write(found, path) if row.serves == "file" else _inputs(found)
            session = row.open(path if row.serves == "file" else _Module(found), threads)
            stack.callback(session.close)
            runners.append(partial(session.run, session.feed(inputs)))
        end = time.monotonic() + SECONDS * len(runners)
        times = timed(runners, CALLS, 2, end)
    return [latency(series.undisturbed(threads)).p10 for series in times]


# --- a layer as an ONNX graph, or as a module --------------------------------------------------


def _write(found: Layer, path: Path) -> tuple[torch.Tensor, ...]:
    """Write a layer with random weights; returns inputs for it."""
    onnx = load_onnx()
    nodes, weights, inputs = WRITERS[found.kind](found)
    held = _random(weights)
    made = onnx.helper.make_graph(
        [onnx.helper.make_node(op, reads, [out], **options) for op, reads, out, options in nodes],
        "layer",
        [onnx.helper.make_tensor_value_info(n, 1, shape) for n, shape in inputs.items()],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(value.numpy(), n) for n, value in held.items()],
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    onnx.save(onnx.helper.make_model(made, opset_imports=opset, ir_version=9), path)
    return _inputs(found)


class _Module(nn.Module):
    """A layer with the same random weights, in PyTorch."""

    def __init__(self, found: Layer) -> None:
        super().__init__()
        self.nodes, weights, self.inputs = WRITERS[found.kind](found)
        for name, value in _random(weights).items():
            self.register_buffer(name, value)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        held = dict(self.named_buffers()) | dict(zip(self.inputs, inputs, strict=True))
        for op, reads, out, options in self.nodes:
            held[out] = OPERATORS[op](*(held[name] for name in reads), **options)
        return held["y"]


def _inputs(found: Layer) -> tuple[torch.Tensor, ...]:
    """Random inputs of a layer."""
    return tuple(_random(WRITERS[found.kind](found)[2]).values())


def _random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    return {
        name: torch.from_numpy(generator.standard_normal(shape, np.float32))
        for name, shape in shapes.items()
    }


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
    group: int,
) -> torch.Tensor:
    rank = len(kernel_shape)
    before, after = pads[:rank], pads[rank:]
    if before != after:
        both = zip(reversed(before), reversed(after), strict=True)
        x, before = F.pad(x, [n for pair in both for n in pair]), (0,) * rank
    return torch.convolution(x, weight, bias, strides, before, dilations, False, (0,) * rank, group)


OPERATORS: Mapping[str, Callable[..., torch.Tensor]] = {
    "Conv": _convolved,
    "MatMul": torch.matmul,
    "Softmax": lambda x, axis: x.softmax(axis),
}
"""ONNX operator -> the same in PyTorch."""


_Written = tuple[
    list[tuple[str, list[str], str, dict[str, Any]]],
    dict[str, tuple[int, ...]],
    dict[str, tuple[int, ...]],
]
"""Nodes (operator, inputs, output, attributes), shapes of the weights, shapes of the inputs."""


def _conv(found: Layer) -> _Written:
    extent, kernel, stride, before, after, dilation = found.form
    options = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": (*before, *after),
        "dilations": dilation,
        "group": found.groups,
    }
    weights = {"w": (found.outer, found.inner, *kernel), "b": (found.outer,)}
    inputs = {"x": (found.times, found.inner * found.groups, *extent)}
    return [("Conv", ["x", "w", "b"], "y", options)], weights, inputs


def _matmul(found: Layer) -> _Written:
    weights: dict[str, tuple[int, ...]] = {"w": (found.inner, found.outer)}
    return [("MatMul", ["x", "w"], "y", {})], weights, {"x": (found.times, found.inner)}


def _product(found: Layer) -> _Written:
    rows, times = found.form[0][0], found.times
    inputs: dict[str, tuple[int, ...]] = {
        "a": (times, rows, found.inner),
        "b": (times, found.inner, found.outer),
    }
    return [("MatMul", ["a", "b"], "y", {})], {}, inputs


def _attention(found: Layer) -> _Written:
    (queries, keys), times = found.form[0], found.times
    inputs: dict[str, tuple[int, ...]] = {
        "q": (times, queries, found.inner),
        "k": (times, found.inner, keys),
        "v": (times, keys, found.outer),
    }
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("MatMul", ["q", "k"], "s", {}),
        ("Softmax", ["s"], "p", {"axis": -1}),
        ("MatMul", ["p", "v"], "y", {}),
    ]
    return nodes, {}, inputs


WRITERS: Mapping[str, Callable[[Layer], _Written]] = {
    "conv": _conv,
    "matmul": _matmul,
    "product": _product,
    "attention": _attention,
}
"""Kind of layer -> its ONNX graph."""
