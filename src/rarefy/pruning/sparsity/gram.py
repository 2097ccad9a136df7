"""What a least-squares solve needs of a layer's rows, summed batch by batch in fixed memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from rarefy.pruning.running.inputs import places, results, rows
from rarefy.pruning.running.lockstep import unseen
from rarefy.pruning.running.products import Product


def add_rows(
    sums: tuple[Sums, Sums],
    product: Product,
    operands: tuple[Tensor, Tensor],
    wanted: Tensor,
    held_out: Tensor,
    share: float,
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
        held_out: for each example, whether it is held out.
        share: of the rows that are used, drawn at random.
        generator: of the draw.
    """
    fit, check = sums
    if product.letters is None:
        out = unseen(wanted.shape[:1], held_out).repeat_interleave(prod(wanted.shape[2:]))
    else:
        out = unseen(places(product, operands[0]), held_out)
    every = results(product, wanted)
    for part in rows(product, *operands, lambda count: ceil(share * count), generator):
        left, right = part.inputs, every[:, part.index.to(every.device)]
        aside = out[part.index].to(left.device)
        fit.add(left[:, ~aside], right[:, ~aside])
        check.add(left[:, aside].double(), right[:, aside].double())


@dataclass
class Sums:
    """Sums over rows of ``x`` and ``y``, for each group of channels.

    Attributes:
        count: rows.
        xx: (groups, unknowns, unknowns), of ``x^T x``.
        xy: (groups, unknowns, outputs), of ``x^T y``.
        yy: (groups, 1, outputs), of ``y^2``.
        x: (groups, 1, unknowns).
        y: (groups, 1, outputs).
    """

    count: int
    xx: Tensor
    xy: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def empty(
        cls, groups: int, unknowns: int, outputs: int, device: torch.device | None = None
    ) -> Sums:
        """No rows yet."""
        shapes = ((unknowns, unknowns), (unknowns, outputs), (1, outputs), (1, unknowns))
        sums = [
            torch.zeros(groups, *shape, dtype=torch.float64, device=device)
            for shape in (*shapes, shapes[2])
        ]
        return cls(0, *sums)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: (groups, rows, unknowns) and (groups, rows, outputs)."""
        self.count += x.shape[1]
        self.xx += x.transpose(1, 2) @ x
        self.xy += x.transpose(1, 2) @ y
        self.yy += y.square().sum(1, keepdim=True)
        self.x += x.sum(1, keepdim=True)
        self.y += y.sum(1, keepdim=True)

    def centered(self) -> Sums:
        """The same with the means of ``x`` and ``y`` taken off every row."""
        n = max(self.count, 1)
        return Sums(
            self.count,
            self.xx - self.x.transpose(1, 2) @ self.x / n,
            self.xy - self.x.transpose(1, 2) @ self.y / n,
            (self.yy - self.y.square() / n).clamp_min(0),
            torch.zeros_like(self.x),
            torch.zeros_like(self.y),
        )

    def error(self, w: Tensor, offset: Tensor, *, about_mean: bool = True) -> float:
        """``||x w + offset - y||^2`` over ``||y||^2``; infinite where not finite.

        Args:
            w: (groups, unknowns, outputs).
            offset: (groups, 1, outputs).
            about_mean: ``||y||^2`` without the mean of ``y``, unless all its rows are alike.
        """
        total = self.yy + ((self.xx @ w) * w - 2 * self.xy * w).sum(1, keepdim=True)
        total = total + offset * (2 * (self.x @ w - self.y) + self.count * offset)
        scale = (about_mean and float(self.centered().yy.sum())) or float(self.yy.sum())
        found = max(float(total.sum()), 0.0) / max(scale, 1e-30)
        return found if found == found else float("inf")
