"""What a least-squares solve needs of a layer's rows, summed batch by batch in fixed memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from rarefy.pruning.running.inputs import batched, free_dims, results, row_source, rows
from rarefy.pruning.running.origins import Origins
from rarefy.pruning.running.products import Product

ROWS = 64
"""Rows of a layer per unknown of one output that are used at most, drawn at random."""

LEAST = 4096
"""Rows that are used where there are as many, at least."""


def add_rows(
    sums: tuple[Sums, Sums],
    product: Product,
    operands: tuple[Tensor, Tensor],
    wanted: Tensor,
    origins: Origins,
    held_out: Tensor,
    every: float,
    generator: torch.Generator,
) -> None:
    """Add a layer's rows to the sums to solve on, or to those of held-out examples.

    Products of the former are in the precision of the activations, those of the latter, which are
    to tell small errors apart, in double precision.

    Args:
        sums: to solve on, and to check on.
        product: a call of the layer.
        operands: its inputs and its weight.
        wanted: what its outputs should be.
        origins: of the rows; padding is left out.
        held_out: for each example, whether it is held out.
        every: how many rows the layer has in all, of which :data:`ROWS` per unknown are drawn.
        generator: of the draw.
    """
    fit, check = sums
    share = min(1.0, max(ROWS * fit.xx.shape[1], LEAST) / max(every, 1))
    shape = batched(product, wanted if product.letters is None else operands[0]).shape
    out = held_out[origins.examples_at(row_source(product), shape, free_dims(product))]
    outputs = results(product, wanted)
    for part in rows(product, *operands, lambda count: ceil(share * count), generator, origins):
        left, right = part.inputs, outputs[:, part.index.to(outputs.device)]
        aside = out[part.index].to(left.device)
        fit.add(left[:, ~aside], right[:, ~aside])
        check.add(left[:, aside].double(), right[:, aside].double())


@dataclass
class Sums:
    """Sums over rows of ``x`` and ``y`` less a pivot of each, for each group of channels.

    The pivots are the means of the first rows that come. Products of rows in single precision keep
    the digits of their spread so, however far from zero the rows are; what the pivots add is put
    back in double precision.

    Attributes:
        count: rows.
        xx: (groups, unknowns, unknowns), of ``(x - pivot_x)^T (x - pivot_x)``.
        xy: (groups, unknowns, outputs), of ``(x - pivot_x)^T (y - pivot_y)``.
        yy: (groups, 1, outputs), of ``(y - pivot_y)^2``.
        x: (groups, 1, unknowns), of ``x - pivot_x``.
        y: (groups, 1, outputs), of ``y - pivot_y``.
        pivot_x: (groups, 1, unknowns).
        pivot_y: (groups, 1, outputs).
    """

    count: int
    xx: Tensor
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor
    pivot_x: Tensor
    pivot_y: Tensor

    @classmethod
    def empty(
        cls, groups: int, unknowns: int, outputs: int, device: torch.device | None = None
    ) -> Sums:
        """No rows yet."""
        x, y = (1, unknowns), (1, outputs)
        shapes = ((unknowns, unknowns), (unknowns, outputs), y, x, y, x, y)
        sums = [torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes]
        return cls(0, *sums)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: (groups, rows, unknowns) and (groups, rows, outputs)."""
        if not x.shape[1]:
            return
        if not self.count:
            self.pivot_x, self.pivot_y = _mean(x).double(), _mean(y).double()
        self.count += x.shape[1]
        x, y = x - self.pivot_x.to(x.dtype), y - self.pivot_y.to(y.dtype)
        self.xx += x.transpose(1, 2) @ x
        self.xy += x.transpose(1, 2) @ y
        self.yy += y.square().sum(1, keepdim=True)
        self.x += x.sum(1, keepdim=True)
        self.y += y.sum(1, keepdim=True)

    @property
    def mean_x(self) -> Tensor:
        """Of ``x``: (groups, 1, unknowns)."""
        return self.pivot_x + self.x / max(self.count, 1)

    @property
    def mean_y(self) -> Tensor:
        """Of ``y``: (groups, 1, outputs)."""
        return self.pivot_y + self.y / max(self.count, 1)

    @property
    def squares(self) -> Tensor:
        """Sums of ``x^2``, pivot and all: (groups, unknowns)."""
        own = self.xx.diagonal(dim1=1, dim2=2)
        return own + (self.pivot_x * (2 * self.x + self.count * self.pivot_x))[:, 0]

    def raw(self) -> Sums:
        """The same about zero: of the rows as they came."""
        x, y = (self.x + self.count * self.pivot_x, self.y + self.count * self.pivot_y)
        left, before = self.pivot_x.transpose(1, 2), self.x.transpose(1, 2)
        return Sums(
            self.count,
            self.xx + left @ x + before @ self.pivot_x,
            self.xy + left @ y + before @ self.pivot_y,
            self.yy + self.pivot_y * (y + self.y),
            x,
            y,
            torch.zeros_like(x),
            torch.zeros_like(y),
        )

    def centered(self) -> Sums:
        """The same with the means of ``x`` and ``y`` taken off every row."""
        n = max(self.count, 1)
        x, y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        return Sums(
            self.count,
            self.xx - self.x.transpose(1, 2) @ self.x / n,
            self.xy - self.x.transpose(1, 2) @ self.y / n,
            (self.yy - self.y.square() / n).clamp_min(0),
            x,
            y,
            x,
            y,
        )

    def error(self, w: Tensor, offset: Tensor, *, about_mean: bool = True) -> float:
        """``||x w + offset - y||^2`` over ``||y||^2``; infinite where not finite.

        Args:
            w: (groups, unknowns, outputs).
            offset: (groups, 1, outputs).
            about_mean: ``||y||^2`` without the mean of ``y``, unless all its rows are alike.
        """
        offset = offset + self.pivot_x @ w - self.pivot_y
        total = self.yy + ((self.xx @ w) * w - 2 * self.xy * w).sum(1, keepdim=True)
        total = total + offset * (2 * (self.x @ w - self.y) + self.count * offset)
        level = self.pivot_y * (2 * self.y + self.count * self.pivot_y)
        spread = (self.yy - self.y.square() / max(self.count, 1)).clamp_min(0)
        scale = (about_mean and float(spread.sum())) or float((self.yy + level).sum())
        found = max(float(total.sum()), 0.0) / max(scale, 1e-30)
        return found if found == found else float("inf")


def _mean(rows: Tensor) -> Tensor:
    """Mean of (groups, rows, columns) over rows; exactly what all rows are where they are alike."""
    first = rows[:, :1]
    return first + (rows - first).mean(1, keepdim=True)
