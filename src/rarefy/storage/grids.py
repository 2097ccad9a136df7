"""Which weights of a captured graph may be stored as integer codes, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import FormatError
from rarefy.graph.program import Graph, GraphModel, Node, Ref, resolve
from rarefy.storage.adapt import Held
from rarefy.storage.index import GridRecord
from rarefy.storage.pack import Bytes, Grid, dequantize, quantize


@dataclass(frozen=True)
class Quantized:
    """A weight as codes on its grid, with where the file has the grid from."""

    record: GridRecord
    grid: Grid
    codes: Bytes


_FAKE_QUANTIZE: Mapping[str, tuple[str, ...]] = {
    "aten.fake_quantize_per_channel_affine.default": ("scale", "zero", "axis", "low", "high"),
    "aten.fake_quantize_per_tensor_affine.default": ("scale", "zero", "low", "high"),
    "aten.fake_quantize_per_tensor_affine.tensor_qparams": ("scale", "zero", "low", "high"),
}
"""Operators whose first argument may be stored as codes, and what their others are."""


def quantized_weights(model: GraphModel, held: Held) -> dict[str, Quantized]:
    """The weights that only quantizers read, where codes give exactly the same outputs."""
    nodes: dict[str, list[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "tensor":
            nodes.setdefault(held.aliases.get(node.path, node.path), []).append(node)
    found: dict[str, Quantized] = {}
    for path, readers in nodes.items():
        calls = [user for node in readers for user in model.graph.users[node.name]]
        records = [_grid_record(model.graph, held, call, path) for call in calls]
        record = records[0] if records else None
        if record is None or any(other != record for other in records):
            continue
        grid = grid_of(record, held.tensors)
        codes = None if grid is None else _codes(held.tensors[path], grid, calls[0])
        if grid is not None and codes is not None:
            found[path] = Quantized(record, grid, codes)
    used = {n for q in found.values() for n in (q.record.scale, q.record.zero_point)}
    return {path: quantized for path, quantized in found.items() if path not in used}


def _grid_record(graph: Graph, held: Held, call: Node, path: str) -> GridRecord | None:
    """Where a quantizer of the tensor at ``path`` has its parameters from, if it is one."""
    names = _FAKE_QUANTIZE.get(call.op)
    if names is None or call.options or len(call.args) != len(names) + 1:
        return None
    values = dict(zip(names, (_constant(graph, held, arg) for arg in call.args[1:]), strict=True))
    first = call.args[0]
    if not isinstance(first, Ref) or _constant(graph, held, first) != path:
        return None
    try:
        return GridRecord(
            scale=values["scale"],
            zero_point=values["zero"],
            axis=values.get("axis", 0),
            low=values["low"],
            high=values["high"],
        )
    except ValueError:
        return None


def _constant(graph: Graph, held: Held, arg: Any) -> Any:
    """A number as it is, and the value of a tensor of the model as its path."""
    if not isinstance(arg, Ref):
        return arg
    node = graph.by_name[arg.name]
    return held.aliases.get(node.path, node.path) if node.op == "tensor" else None


def grid_of(record: GridRecord, tensors: Mapping[str, Tensor]) -> Grid | None:
    """The grid of a record, with its tensors; None where they make none."""

    def value(given: str | float, dtype: torch.dtype) -> Tensor:
        if isinstance(given, str):
            return tensors[given].detach().cpu()
        return torch.tensor(given, dtype=dtype)

    scale, zero = value(record.scale, torch.float32), value(record.zero_point, torch.int64)
    whole = not zero.is_floating_point() and not zero.is_complex() and zero.dtype != torch.bool
    unsigned = zero.dtype in (torch.uint16, torch.uint32, torch.uint64)
    if scale.dtype != torch.float32 or not whole or unsigned or scale.ndim > 1 or zero.ndim > 1:
        return None
    if not 0 < record.high - record.low < 256:
        return None
    return Grid(scale, zero, record.axis, record.low, record.high)


def _codes(weight: Tensor, grid: Grid, call: Node) -> Bytes | None:
    """Codes of a weight, if its quantizer gives the same for what they stand for, bit for bit."""
    channels = tuple(weight.shape[grid.axis : grid.axis + 1])
    shapes = {tuple(grid.scale.shape), tuple(grid.zero_point.shape)}
    if weight.dtype != torch.float32 or not shapes <= {(), channels}:
        return None
    if not all(bool(torch.isfinite(t).all()) for t in (weight, grid.scale)):
        return None
    axis = (grid.axis,) if "per_channel" in call.op else ()
    zero: Any = grid.zero_point
    scale: Any = grid.scale
    if "per_tensor" in call.op and call.op.endswith("default"):
        scale, zero = scale.item(), zero.item()

    def quantized(tensor: Tensor) -> Tensor:
        return resolve(call.op)(  # type: ignore[no-any-return]
            tensor, scale, zero, *axis, grid.low, grid.high
        )

    try:
        expected = quantized(weight.detach().cpu())
        codes = quantize(expected, grid)
        found = quantized(dequantize(codes, tuple(weight.shape), grid))
    except (RuntimeError, FormatError):
        return None
    same = torch.equal(found.view(torch.int32), expected.view(torch.int32))
    return codes if same else None
