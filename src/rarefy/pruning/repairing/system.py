"""One layer's least squares from sums over its rows: for free weights, sparse ones, and rounded.

The weights sought minimize ``||x w + b - y||^2 + ridge ||w - present||^2``, where those that are
zero stay zero, and are then rounded where the layer has a grid. What is found is taken only where
it is nearer to ``y`` on rows that no solve has seen.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from rarefy.pruning.repairing.grids import Grid
from rarefy.pruning.repairing.rounding import on_grid
from rarefy.pruning.sparsity.gram import Sums
from rarefy.pruning.sparsity.sparsegpt import moved, regularized, solved

RIDGE = 1e-3
"""Regularization towards the present weights, relative to the mean of the Gram diagonal."""

FLOOR = torch.finfo(torch.float32).eps
"""The least regularization, relative to the squares that are summed up, all inputs together: by as
much may the eigenvalues of sums in single precision be off."""

NOISE = 16 * FLOOR
"""Share of an input that may be rounding in the layers before it. Its square, relative to the mean
square of the inputs, is regularization, too: what inputs differ by no more is not solved on."""

STEPS = 100
"""Most steps of conjugate gradients, each at the cost of one product with the Gram matrix."""

TOLERANCE = 1e-6
"""Residual, relative to that at the start, at which conjugate gradients stop."""

DIRECT = 4
"""How many times faster a product with a matrix is, per multiplication, than many small solves."""


class Mean(Enum):
    """What takes up the mean of a layer's outputs."""

    BIAS = "the layer's own bias, which is solved for"
    NORM = "the BatchNorm that follows, so that the mean does not count here"
    NONE = "nothing: the weights alone give the outputs"


@dataclass(frozen=True)
class Weights:
    """What is known of a layer's weights.

    Attributes:
        values: (groups, outputs of one group, unknowns), double precision, as the layer uses them.
        bias: (groups, 1, outputs), zeros where there is none.
        mean: what takes up the mean of the outputs.
        gone: which weights are zero and stay so, of the shape of ``values``; None for none.
        grid: the values that they may have; None for any.
        rounding: how they are rounded to it, a name in
            :data:`~rarefy.pruning.repairing.rounding.ROUNDINGS`.
    """

    values: Tensor
    bias: Tensor
    mean: Mean
    gone: Tensor | None = None
    grid: Grid | None = None
    rounding: str = "gptq"


@dataclass(frozen=True)
class Solved:
    """What was found for a layer.

    Attributes:
        values: as :attr:`Weights.values`.
        bias: as :attr:`Weights.bias`.
        errors: relative squared error on the held-out rows, before and after; equal where
            nothing better was found and the weights are as they were.
    """

    values: Tensor
    bias: Tensor
    errors: tuple[float, float]

    @property
    def is_better(self) -> bool:
        """Whether anything changed."""
        return self.errors[1] < self.errors[0]


def solve(fit: Sums, check: Sums, weights: Weights) -> Solved:
    """The best of the weights that least squares give, and of the present ones.

    The present ones are tried with their bias corrected, too, and alone where the inputs hardly
    differ from row to row, so that rounding leaves nothing to solve for. Weights with a grid change
    only where the error on the rows to solve on does not rise either.

    Args:
        fit: sums over the rows to solve on.
        check: sums over held-out rows.
        weights: the present ones.
    """
    sums = fit.raw() if weights.mean is Mean.NONE else fit.centered()
    judged, seen = (g.centered() if weights.mean is Mean.NORM else g for g in (check, fit))
    tried = [weights.values]
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        found = partial(least_squares, sums, weights=weights)
        tried.append(regularized(sums.xx, ridge_for(sums.xx, fit), found))
    error = partial(Sums.error, about_mean=False)
    old = weights.values.transpose(1, 2)
    before = error(judged, old, weights.bias)
    limit = float("inf") if weights.grid is None else error(seen, old, weights.bias)
    best = Solved(weights.values, weights.bias, (before, before))
    for values in tried:
        w, bias = values.transpose(1, 2), weights.bias
        if weights.mean is Mean.BIAS:
            bias = fit.mean_y - fit.mean_x @ w
        after = error(judged, w, bias)
        if after < best.errors[1] and error(seen, w, bias) <= limit:
            best = Solved(values, bias, (before, after))
    return best


def least_squares(sums: Sums, hessian: Tensor, weights: Weights) -> Tensor:
    """The solved weights, zero where they are gone, on their grid if they have one."""
    optimum = moved(weights.values, sums.xx, sums.xy, hessian)
    gone = weights.gone
    if gone is not None:
        optimum = masked(optimum, hessian, gone, weights.values)
    if weights.grid is None:
        return optimum
    return on_grid(optimum, hessian, weights.grid, gone, weights.rounding)


def ridge_for(gram: Tensor, fit: Sums) -> Tensor:
    """The ridge of a Gram matrix that was made of sums, shape (groups,); 1 where all are zero."""
    own = gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    ridge = RIDGE * own.mean(1) + FLOOR * own.sum(1) + NOISE**2 * fit.squares.mean(1)
    return torch.where(ridge > 0, ridge, torch.ones_like(ridge))


def masked(optimum: Tensor, hessian: Tensor, gone: Tensor, start: Tensor) -> Tensor:
    """The best weights with these ones zero: ``argmin (w - optimum) H (w - optimum)^T``.

    Small layers are solved exactly, output by output; where products with the whole matrix cost
    less, by conjugate gradients for all outputs at once.

    Args:
        optimum: (groups, outputs, unknowns), the minimum without zeros.
        hessian: (groups, unknowns, unknowns).
        gone: which weights are zero.
        start: weights to start from.
    """
    kept = float((~gone).sum(2).max())
    if DIRECT * kept**3 / 3 <= STEPS * float(gone.shape[2]) ** 2:
        exact = solved(optimum, hessian, gone)
        if exact is not None:
            return exact
    return conjugate_gradients(optimum, hessian, gone, start)


def conjugate_gradients(optimum: Tensor, hessian: Tensor, gone: Tensor, start: Tensor) -> Tensor:
    """As :func:`masked`, by conjugate gradients with the diagonal as preconditioner.

    Every step lowers the error of every output, so that stopping early is nearer to the start and
    never worse than it.
    """
    kept = (~gone).to(optimum.dtype)
    scale = kept / hessian.diagonal(dim1=1, dim2=2)[:, None]
    w = start * kept
    residual = ((optimum - w) @ hessian) * kept
    ready = residual * scale
    direction = ready
    size = (residual * ready).sum(2, keepdim=True)
    goal = TOLERANCE**2 * size
    for _ in range(STEPS):
        if bool((size <= goal).all()):
            break
        pushed = (direction @ hessian) * kept
        curvature = (direction * pushed).sum(2, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0.0)
        w = w + step * direction
        residual = residual - step * pushed
        ready = residual * scale
        last, size = size, (residual * ready).sum(2, keepdim=True)
        direction = ready + torch.where(last > 0, size / last, 0.0) * direction
    return w
