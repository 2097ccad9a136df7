"""The values that the weights of a layer may have, as a solve over its rows needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref
from rarefy.grid import Grid as WeightGrid
from rarefy.pruning.running.products import Product, matrix, viewed


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


def of_quantizer(model: GraphModel, layer: Product) -> Grid | None:
    """The grid of a weight that a fake quantizer rounds; None where that is computed.

    Args:
        model: the quantized network.
        layer: a call of the layer, with the quantizer on the way of its entries.
    """
    way, quantizer = layer.entries.way, layer.entries.quantizer
    assert quantizer is not None
    at = way.index(quantizer)
    shape = tuple(viewed(way[:at], torch.empty(layer.entries.shape, device="meta")).shape)
    axis = quantizer.argument("axis")
    scale, zero = (_numbers(model, quantizer.argument(name)) for name in ("scale", "zero_point"))
    if scale is None or zero is None:
        return None
    low, high = quantizer.argument("quant_min"), quantizer.argument("quant_max")
    if not bool(zero.any()):
        low = max(low, -high)  # symmetric: negation stays on the grid
    along = [-1 if dim == axis else 1 for dim in range(len(shape))]
    spread = [t.reshape(along).expand(shape) for t in (scale, zero)]
    return Grid(*_as_rows(layer, way[at + 1 :], *spread), low, high)


def of_rounded(grid: WeightGrid, layer: Product) -> Grid | None:
    """The grid of a weight that was rounded; None where it is not one of a weight like this.

    Args:
        grid: of the weight.
        layer: a call of the layer.
    """
    shape = layer.entries.shape
    if not grid.fits(shape):
        return None
    spread = [grid.spread(t.double(), shape).expand(shape) for t in (grid.scale, grid.zero_point)]
    return Grid(*_as_rows(layer, layer.entries.way, *spread), grid.low, grid.high)


def _as_rows(
    layer: Product, way: Sequence[Node], scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Numbers for each entry, as rows; one column of them where all columns are alike."""
    found = [matrix(layer, viewed(way, each)) for each in (scale, zero)]
    if all(bool((each == each[:, :, :1]).all()) for each in found):
        found = [each[:, :, :1] for each in found]
    return found[0], found[1]


def _numbers(model: GraphModel, given: Any) -> Tensor | None:
    """A quantizer's scale or zero point; None where it is computed in the graph."""
    if isinstance(given, Ref):
        node = model.graph.by_name[given.name]
        if node.op != "tensor":
            return None
        return model.tensor(node.path).detach().double().flatten()
    return torch.tensor([float(given)], dtype=torch.float64)
