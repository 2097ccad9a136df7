"""Which weights of a network may be stored as integer codes, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import FormatError
from rarefy.graph.declarations import resolve
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref
from rarefy.grid import Grid, grids
from rarefy.storage.adapt import Held
from rarefy.storage.codes import dequantize, quantize
from rarefy.storage.index import WEIGHTS, GridRecord
from rarefy.storage.pack import Bytes


@dataclass(frozen=True)
class Quantized:
    """A weight as codes on its grid, with where the file has the grid from.

    Attributes:
        record: what the table of contents says.
        grid: the grid.
        codes: of the weight.
        own: tensors of the grid that are none of the network's, by path.
    """

    record: GridRecord
    grid: Grid
    codes: Bytes
    own: Mapping[str, Tensor] = field(default_factory=dict)


_FAKE_QUANTIZE: Mapping[str, tuple[str, ...]] = {
    "aten.fake_quantize_per_channel_affine.default": ("scale", "zero", "axis", "low", "high"),
    "aten.fake_quantize_per_tensor_affine.default": ("scale", "zero", "low", "high"),
    "aten.fake_quantize_per_tensor_affine.tensor_qparams": ("scale", "zero", "low", "high"),
}
"""Operators whose first argument may be stored as codes, and what their others are."""


def quantized_weights(model: nn.Module, held: Held) -> dict[str, Quantized]:
    """The weights that codes stand for without loss."""
    found = _rounded(model, held)
    if isinstance(model, GraphModel):
        found |= _fake_quantized(model, held)
    return found


# --- weights that were rounded -------------------------------------------------------------------


def _rounded(model: nn.Module, held: Held) -> dict[str, Quantized]:
    """The weights that lie on the grids that the network notes, bit for bit."""
    found: dict[str, Quantized] = {}
    for name, grid in grids(model).items():
        path = held.aliases.get(name, name)
        tensor = held.tensors.get(path)
        if tensor is None or str(tensor.dtype).removeprefix("torch.") not in WEIGHTS:
            continue
        paths = (f"{path}.scale", f"{path}.zero_point")
        if held.paths().isdisjoint(paths) and grid.holds(tensor):
            own = {paths[0]: shortest(grid.scale)}
            zero: str | int = paths[1]
            if grid.zero_point.ndim:
                own[paths[1]] = grid.zero_point.to(torch.uint8)
            else:
                zero = int(grid.zero_point)
            record = GridRecord(
                scale=paths[0],
                zero_point=zero,
                axis=grid.axis,
                low=grid.low,
                high=grid.high,
                group=grid.group,
            )
            found[path] = Quantized(record, grid, quantize(tensor, grid), own)
    return found


def shortest(scale: Tensor) -> Tensor:
    """Scales in half precision where that is exact."""
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


# --- weights under quantizers --------------------------------------------------------------------


def _fake_quantized(model: GraphModel, held: Held) -> dict[str, Quantized]:
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
    real = scale.dtype in (torch.float32, torch.float16)
    dims = 1 if record.group is None else 2
    if not real or not whole or unsigned or max(scale.ndim, zero.ndim) > dims:
        return None
    if not 0 < record.high - record.low < 256:
        return None
    return Grid(scale.float(), zero, record.axis, record.low, record.high, record.group)


def _codes(weight: Tensor, grid: Grid, call: Node) -> Bytes | None:
    """Codes of a weight, if its quantizer gives the same for what they stand for, bit for bit."""
    if weight.dtype != torch.float32 or not grid.fits(tuple(weight.shape)):
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
