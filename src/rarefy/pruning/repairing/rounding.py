"""Rounding of solved weights to a grid, so that a layer's outputs stay near.

Rounding every weight to its neighbor loses what was gained by solving for them. With the Gram
matrix ``H`` of a layer's inputs, the error of its outputs is ``(w - optimum) H (w - optimum)^T``
for each output, whatever the number of examples: a quadratic form over the roundings.

* ``"gptq"``: column by column, the weights that are not rounded yet make up for the rounding of
  those that are. Frantar et al. 2022, https://arxiv.org/abs/2210.17323.
* ``"learned"``: whether each weight goes up or down is learned by gradient descent on all of them
  at once (AdaRound). Nagel et al. 2020, https://arxiv.org/abs/2004.10568. Coordinate descent
  (as in QuantEase, Behdin et al. 2023, https://arxiv.org/abs/2309.01885) follows, from there and
  from the result of GPTQ; the better is taken for each output. Unlike in the paper, the loss is of
  the layer's outputs before any activation function, which makes it the quadratic form above: the
  gradient is that of all examples, and nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rarefy.pruning.repairing.grids import Grid

BLOCK = 128
"""Columns that are made up for at once; all others follow block by block."""

STEPS = 300
"""Gradient steps of learned rounding."""

RATE = 0.1
"""Adam's step size."""

PULL = 0.3
"""Weight of the regularizer that drives every choice to 0 or 1, relative to the error of a whole
step of a weight alone."""

FREE = 0.2
"""Share of the steps before the regularizer sets in."""

EXPONENTS = 20.0, 2.0
"""Of the regularizer, at its start and at the end: first only undecided weights feel it."""

STRETCH = 1.2, -0.1
"""Factor and offset of the sigmoid, clipped to [0, 1], so that 0 and 1 are reached."""

SWEEPS = 10
"""Rounds of coordinate descent over all columns, at most."""

Method = Callable[[Tensor, Tensor, Grid, Tensor], Tensor]
"""Optimum, Hessian, grid and what stays zero -> weights on the grid."""


def on_grid(
    optimum: Tensor,
    hessian: Tensor,
    grid: Grid,
    gone: Tensor | None = None,
    method: str = "gptq",
) -> Tensor:
    """Weights on a grid whose outputs are near those of the optimum.

    Args:
        optimum: (groups, outputs, unknowns), the best weights without a grid.
        hessian: (groups, unknowns, unknowns), positive definite.
        grid: what they may be.
        gone: where they are zero.
        method: a name in :data:`ROUNDINGS`.

    Returns:
        Shape of ``optimum``; the better for each output of the method and of the nearest values.

    Raises:
        RuntimeError: the Hessian is not positive definite in double precision.
    """
    nothing = torch.zeros_like(optimum, dtype=torch.bool) if gone is None else gone
    found = ROUNDINGS[method](optimum, hessian, grid, nothing)
    return _better(found, _nearest(optimum, grid, nothing), optimum, hessian)


def _better(first: Tensor, second: Tensor, optimum: Tensor, hessian: Tensor) -> Tensor:
    """For each output the one with less error, the first where they are equal."""
    costs = [(((w - optimum) @ hessian) * (w - optimum)).sum(2) for w in (first, second)]
    return torch.where((costs[0] <= costs[1])[..., None], first, second)


def _nearest(optimum: Tensor, grid: Grid, gone: Tensor) -> Tensor:
    return grid.nearest(optimum).masked_fill(gone, 0.0)


# --- column by column ----------------------------------------------------------------------------


def swept(optimum: Tensor, hessian: Tensor, grid: Grid, gone: Tensor) -> Tensor:
    """Column by column, the rest making up for it (GPTQ)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    w = optimum.clone()
    columns = w.shape[2]
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = w.new_zeros(*w.shape[:2], last - first)
        for column in range(first, last):
            now = w[:, :, column].clone()
            value = grid.column(column).nearest(now[:, :, None])[:, :, 0]
            value = value.masked_fill(gone[:, :, column], 0.0)
            error = (now - value) / factor[:, column, column, None]
            w[:, :, column:last] -= error[:, :, None] * factor[:, None, column, column:last]
            w[:, :, column] = value
            errors[:, :, column - first] = error
        w[:, :, last:] -= errors @ factor[:, first:last, last:]
    return w


# --- learned -------------------------------------------------------------------------------------


def learned(optimum: Tensor, hessian: Tensor, grid: Grid, gone: Tensor) -> Tensor:
    """The better for each output of what descends from GPTQ and from learned choices."""
    starts = (method(optimum, hessian, grid, gone) for method in (swept, relaxed))
    ends = [descended(start, optimum, hessian, grid, gone) for start in starts]
    return _better(ends[0], ends[1], optimum, hessian)


def relaxed(optimum: Tensor, hessian: Tensor, grid: Grid, gone: Tensor) -> Tensor:
    """Each weight up or down, as gradient descent on soft choices decides (AdaRound).

    The choice is ``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)``, the loss the quadratic form in units
    of a step plus ``sum(1 - |2 h(v) - 1| ** exponent)``, where the exponent falls to 2.
    """
    steps = optimum / grid.scale
    below = torch.clamp(torch.floor(steps), min=grid.low - grid.zero)
    below = torch.minimum(below, grid.high - 1 - grid.zero)
    target = (steps - below).float()
    size = grid.scale.expand_as(optimum)
    size = (size / size.square().mean(2, keepdim=True).sqrt()).float()
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    form = (hessian / mean).float()
    factor, offset = STRETCH
    v = torch.logit((target.clamp(0.01, 0.99) - offset) / factor)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(1, STEPS + 1):
        sigmoid = torch.sigmoid(v)
        soft = factor * sigmoid + offset
        choice = soft.clamp(0, 1)
        slope = 2 * (((choice - target) * size).masked_fill(gone, 0.0) @ form) * size
        slope = slope - _pull(choice, step / STEPS)
        slope = slope * ((soft > 0) & (soft < 1)) * factor * sigmoid * (1 - sigmoid)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        spread = (second / (1 - 0.999**step)).sqrt() + 1e-8
        v = v - RATE * first / (1 - 0.9**step) / spread
    up = (factor * torch.sigmoid(v) + offset >= 0.5).to(below.dtype)
    return ((below + up) * grid.scale).masked_fill(gone, 0.0)


def _pull(choice: Tensor, progress: float) -> Tensor:
    """Minus the slope of the regularizer, by the choices."""
    if progress <= FREE:
        return torch.zeros_like(choice)
    high, low = EXPONENTS
    share = 0.5 * (1 + math.cos(math.pi * (progress - FREE) / (1 - FREE)))
    exponent = low + (high - low) * share
    side = 2 * choice - 1
    return PULL * 2 * exponent * side.sign() * side.abs() ** (exponent - 1)


def descended(start: Tensor, optimum: Tensor, hessian: Tensor, grid: Grid, gone: Tensor) -> Tensor:
    """Weight by weight the value on the grid with the least error, until none changes.

    No step raises the error of any output.
    """
    w = start.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    columns = w.shape[2]
    for _ in range(SWEEPS):
        slope = (w - optimum) @ hessian
        changed = False
        for first in range(0, columns, BLOCK):
            last = min(first + BLOCK, columns)
            moves = w.new_zeros(*w.shape[:2], last - first)
            for column in range(first, last):
                least = w[:, :, column] - slope[:, :, column] / diagonal[:, column, None]
                value = grid.column(column).nearest(least[:, :, None])[:, :, 0]
                value = value.masked_fill(gone[:, :, column], 0.0)
                move = value - w[:, :, column]
                slope[:, :, column:last] += move[:, :, None] * hessian[:, None, column, column:last]
                w[:, :, column] = value
                moves[:, :, column - first] = move
            slope[:, :, last:] += moves @ hessian[:, first:last, last:]
            changed = changed or bool(moves.any())
        if not changed:
            break
    return w


ROUNDINGS: Mapping[str, Method] = {"gptq": swept, "learned": learned}
"""Name of a method -> how it rounds."""
