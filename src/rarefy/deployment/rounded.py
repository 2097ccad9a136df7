"""Weights that lie on a grid, as INT8 or INT4 initializers with a DequantizeLinear.

Runtimes compute with them in float. An INT4 initializer and blocks of neighbors need opset 21.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.deployment.rewrite import Array, add_constant, constant, insert
from rarefy.grid import Grid, as_matrix, grids

OPSET = 21
"""The first with INT4 and with blocks."""

TOLERANCE = 1e-5
"""How far a weight may be from a multiple of another, relative to its channel's largest: the
exporter folds BatchNorms in single precision."""


LEAST_BLOCK = 8
"""OpenVINO takes only blocks that divide the inputs. Where a group does not, the largest block that
divides both is taken, with scales repeated; below this the weight stays in float."""


@dataclass(frozen=True)
class Rounded:
    """A weight that lies on its grid.

    Attributes:
        weight: its values, float32.
        grid: the grid.
    """

    weight: Tensor
    grid: Grid


def rounded_weights(model: nn.Module) -> dict[str, Rounded]:
    """The float32 weights of a network that lie on the grids that it notes, by path."""
    held = dict(model.named_parameters(remove_duplicate=False))
    return {
        path: Rounded(held[path].detach().cpu(), grid)
        for path, grid in grids(model).items()
        if path in held and held[path].dtype is torch.float32 and grid.holds(held[path])
    }


def opset(weights: Iterable[Rounded]) -> int | None:
    """The opset that the weights need; None for any."""
    return OPSET if any(w.grid.bits or w.grid.group for w in weights) else None


def fold_grids(model: Any, weights: Mapping[str, Rounded]) -> None:
    """Store initializers of an ``onnx_ir.Model`` that are these weights as codes, in place.

    An initializer is one of them if it has its values, or those of its transpose, or if it has its
    name and is a multiple of it in each output channel, which is what a folded BatchNorm leaves.
    Blocks of weights with more than two dimensions are stored as a matrix that a Reshape turns
    back. Blocks of transposed convolutions, and groups that have no block in common with the number
    of inputs, stay in float.
    """
    known: dict[bytes, tuple[str, bool]] = {}
    for path, rounded in weights.items():
        own = rounded.weight.numpy()
        for turned, values in ((False, own), (True, own.T))[: 1 + (own.ndim == 2)]:
            known.setdefault(_key(values), (path, turned))
    for name, value in list(model.graph.initializers.items()):
        array = constant(value)
        if array is None or array.dtype != np.float32:
            continue
        path, turned = known.get(_key(array), (name, False))
        if path not in weights:
            continue
        rounded, gain = weights[path], None
        if _key(array) not in known:
            gain = _gain(torch.from_numpy(array.copy()), rounded)
            if gain is None:
                continue
        _store(model, value, _Codes.of(rounded, gain), turned)


def _key(array: Array) -> bytes:
    return repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()


def _gain(found: Tensor, rounded: Rounded) -> Tensor | None:
    """By what each channel of a weight was multiplied; None where it is no multiple."""
    if found.shape != rounded.weight.shape:
        return None
    axis = rounded.grid.axis
    new, old = as_matrix(found, axis).double(), as_matrix(rounded.weight, axis).double()
    gain = (new * old).sum(1) / old.square().sum(1).clamp_min(1e-300)
    missed = (new - gain[:, None] * old).abs().amax(1)
    return gain if bool((missed <= TOLERANCE * new.abs().amax(1)).all()) else None


@dataclass(frozen=True)
class _Codes:
    """A weight as integers.

    Attributes:
        codes: of the weight's shape.
        scale: as :attr:`Grid.scale`, spread to a number per channel.
        zero: likewise.
        grid: axis, range and group.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    @classmethod
    def of(cls, rounded: Rounded, gain: Tensor | None) -> _Codes:
        """Codes of a weight whose channels are multiplied by ``gain``; those below 0 are turned."""
        weight, grid = rounded.weight, rounded.grid
        shape = grid.shape_for(tuple(weight.shape))
        scale, zero = (t.expand(shape) for t in (grid.scale, grid.zero_point.to(torch.int32)))
        steps = grid.steps(weight)
        if gain is not None:
            sign = torch.where(gain < 0, -1, 1)
            size = torch.where(gain == 0, 1.0, gain.abs()).reshape(-1, *[1] * (scale.ndim - 1))
            scale = (scale.double() * size).float()
            along = [-1 if d == grid.axis else 1 for d in range(weight.ndim)]
            steps = steps * (sign * (gain != 0)).to(steps.dtype).reshape(along)
            flipped = sign.reshape(-1, *[1] * (zero.ndim - 1)) < 0
            zero = torch.where(flipped, grid.low + grid.high - zero, zero)
        codes = steps + grid.spread(zero, tuple(weight.shape))
        return cls(codes, scale, zero, grid)


def _store(model: Any, value: Any, found: _Codes, turned: bool) -> None:
    """Let all readers of an initializer read what a DequantizeLinear makes of codes."""
    grid, shape = found.grid, tuple(found.codes.shape)
    codes, scale, zero = found.codes, found.scale, found.zero
    axis, options = grid.axis, {}
    if grid.group is not None:
        if len(shape) > 2 and axis != 0:
            return
        codes = as_matrix(codes, axis) if len(shape) > 2 else codes
        axis = 1 - axis
        block = math.gcd(min(grid.group, codes.shape[axis]), codes.shape[axis])
        if block < LEAST_BLOCK and block < grid.group:
            return
        options, times = {"block_size": block}, max(grid.group // block, 1)
        count = codes.shape[axis] // block
        scale, zero = (t.repeat_interleave(times, 1)[:, :count] for t in (scale, zero))
        scale, zero = (t.T if axis == 0 else t for t in (scale, zero))
    if turned:
        codes, axis = codes.T, 1 - axis
        scale, zero = (t.T if t.ndim == 2 else t for t in (scale, zero))
    dtype = _dtype(grid)
    inputs = [add_constant(model, f"{value.name}_codes", _array(codes, dtype))]
    inputs.append(add_constant(model, f"{value.name}_scale", _array(scale, np.float32)))
    if bool(zero.any()):
        inputs.append(add_constant(model, f"{value.name}_zero_point", _array(zero, dtype)))
    first = next(iter(model.graph))
    result = insert(model, first, "DequantizeLinear", inputs, {"axis": axis, **options})
    if codes.ndim != len(shape):
        target = np.asarray(shape, np.int64)
        inputs = [result, add_constant(model, f"{value.name}_shape", target)]
        result = insert(model, first, "Reshape", inputs, {})
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    del model.graph.initializers[value.name]


def _dtype(grid: Grid) -> Any:
    """The smallest integers of ONNX that hold the codes."""
    import ml_dtypes

    if grid.low < 0:
        return ml_dtypes.int4 if grid.bits else np.int8
    return ml_dtypes.uint4 if grid.bits else np.uint8


def _array(tensor: Tensor, dtype: Any) -> Array:
    return np.ascontiguousarray(tensor.numpy()).astype(dtype)
