"""The values that the weights of a layer may have, as a solve over its rows needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref
from rarefy.grid import Grid as WeightGrid
from rarefy.grid import as_matrix


@dataclass(frozen=True)
class Grid:
    """The values ``(q - zero) * scale`` for whole ``q`` from ``low`` to ``high``.

    Attributes:
        scale: broadcasts against a weight of shape (groups, outputs of one group, unknowns).
        zero: the whole number that stands for 0, of the same shape.
        low: smallest whole number.
        high: largest whole number.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def column(self, index: int) -> Grid:
        """The grid of one unknown."""
        if self.scale.shape[2] == 1:
            return self
        part = slice(index, index + 1)
        return replace(self, scale=self.scale[:, :, part], zero=self.zero[:, :, part])

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest values of a weight, shape (groups, outputs, unknowns)."""
        q = (torch.round(weight / self.scale) + self.zero).clamp(self.low, self.high)
        return (q - self.zero) * self.scale


def grid_of(model: GraphModel, quantizer: Node, outputs: int, groups: int, dim: int) -> Grid | None:
    """The grid of a weight's fake quantizer; None where it is not one per output or for all.

    Args:
        model: the quantized network.
        quantizer: the call that rounds the weight.
        outputs: of all groups.
        groups: of channels.
        dim: dimension of the outputs in the weight.
    """
    axis = quantizer.argument("axis")
    scale, zero = (_numbers(model, quantizer.argument(name)) for name in ("scale", "zero_point"))
    if scale is None or zero is None:
        return None
    if axis is None and scale.numel() == 1:
        shape = (1, 1, 1)
    elif axis == dim and scale.numel() == outputs:
        shape = (groups, outputs // groups, 1)
    else:
        return None
    zero = zero.reshape(shape) if zero.numel() == scale.numel() else zero.expand(shape)
    low, high = quantizer.argument("quant_min"), quantizer.argument("quant_max")
    if not bool(zero.any()):
        low = max(low, -high)  # symmetric: negation stays on the grid
    return Grid(scale.reshape(shape), zero, low, high)


def as_rows(grid: WeightGrid, shape: tuple[int, ...], groups: int, dim: int) -> Grid | None:
    """The grid of a weight that was rounded; None where it is not one for its outputs.

    Args:
        grid: of the weight.
        shape: of the weight.
        groups: of channels.
        dim: dimension of the outputs in the weight.
    """
    if grid.axis != dim or not grid.fits(shape):
        return None
    scale, zero = (
        as_matrix(grid.spread(t.double(), shape).expand(shape), dim).reshape(
            groups, shape[dim] // groups, -1
        )
        for t in (grid.scale, grid.zero_point)
    )
    return Grid(scale, zero, grid.low, grid.high)


def _numbers(model: GraphModel, given: Any) -> Tensor | None:
    """A quantizer's scale or zero point; None where it is computed in the graph."""
    if isinstance(given, Ref):
        node = model.graph.by_name[given.name]
        if node.op != "tensor":
            return None
        return model.tensor(node.path).detach().double().flatten()
    return torch.tensor([float(given)], dtype=torch.float64)
