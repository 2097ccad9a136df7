"""What a least-squares solve needs of a layer's rows, summed batch by batch in fixed memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rarefy.graph.program import Node
from rarefy.pruning.running.inputs import CHUNK, patches
from rarefy.pruning.running.lockstep import TRANSPOSED, unseen


def rows(
    node: Node, x: Tensor, y: Tensor, weight: Tensor, share: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A layer's inputs and outputs as rows of ``x w = y``, some examples at a time.

    Args:
        node: the layer.
        x: its inputs.
        y: outputs, of the layer's or of another network's at the same place.
        weight: its weight.
        share: of the rows, drawn at random where it is below 1.
        generator: of the draw.

    Yields:
        (groups, rows, unknowns), (groups, rows, outputs of one group), and the numbers that these
        rows have among all.
    """
    convolution = node.kind.startswith("conv")
    groups = node.argument("groups") if convolution else 1
    unknowns = weight.numel() // weight.shape[int(node.kind in TRANSPOSED)]
    if x.ndim < 2:
        x, y = x[None], y[None]
    places = prod(y.shape[2:]) if convolution else prod(x.shape[1:-1])
    step = max(1, CHUNK // (4 * max(1, places) * unknowns * groups))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        left = patches(node, part, weight) if convolution else part
        right = y[start : start + step]
        right = right.movedim(1, -1) if convolution else right
        lead = right.shape[:-1]
        index = torch.arange(prod(lead))
        if share < 1:
            index = index[torch.rand(len(index), generator=generator) < share]
        place = torch.unravel_index(index, lead)
        left = left[place].flatten(1) if share < 1 else left.flatten(0, len(lead) - 1).flatten(1)
        right = right[place] if share < 1 else right.flatten(0, -2)
        yield (
            _exact(left).reshape(-1, groups, unknowns).transpose(0, 1),
            _exact(right).reshape(len(left), groups, -1).transpose(0, 1),
            start * prod(lead[1:]) + index,
        )


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def add_rows(
    sums: tuple[Sums, Sums],
    node: Node,
    pair: tuple[Tensor, Tensor],
    weight: Tensor,
    held_out: Tensor,
    share: float,
    generator: torch.Generator,
) -> None:
    """Add a layer's rows to the sums to solve on, or to those of held-out examples.

    Products of the former are in the precision of the activations, those of the latter, which are
    to tell small errors apart, in double precision.

    Args:
        sums: to solve on, and to check on.
        node: the layer.
        pair: its inputs, and what its outputs should be.
        weight: its weight.
        held_out: for each example, whether it is held out.
        share: of the rows that are used, drawn at random.
        generator: of the draw.
    """
    x, y = pair
    fit, check = sums
    lead = y.shape[:1] if node.kind.startswith("conv") else y.shape[:-1]
    places = prod(y.shape[2:]) if node.kind.startswith("conv") else 1
    out = unseen(tuple(lead), held_out).repeat_interleave(places)
    for left, right, index in rows(node, x, y, weight, share, generator):
        aside = out[index].to(left.device)
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

    def error(self, w: Tensor, offset: Tensor) -> float:
        """``||x w + offset - y||^2`` over ``||y||^2`` without its mean; infinite where not finite.

        Args:
            w: (groups, unknowns, outputs).
            offset: (groups, 1, outputs).
        """
        total = self.yy + ((self.xx @ w) * w).sum(1, keepdim=True)
        total = total - 2 * (self.xy * w).sum(1, keepdim=True)
        total = total + offset * (2 * (self.x @ w - self.y) + self.count * offset)
        scale = float(self.centered().yy.sum())
        found = float(total.sum().clamp_min(0)) / max(scale, 1e-30)
        return found if found == found else float("inf")
