"""Grids for weights, found from the weights alone or with the size of the inputs that they meet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.grid import Grid, as_matrix, columns
from rarefy.schemes import WeightOnly

SHRINKAGES = torch.linspace(1, 0.2, 65)
"""Shares of the whole range that are tried; ternary weights lose least with about half of it."""

SMALLEST, LARGEST = 2.0**-14, 65504.0
"""Scales between these are kept in half precision, where they lose eleven bits of 24."""


def grid_for(
    weight: Tensor, axis: int, scheme: WeightOnly, importance: Tensor | None = None
) -> Grid:
    """The grid of a weight, one range for each output channel or block of neighbors.

    The range is the whole one, or the share of it that leaves the least
    ``sum(importance * (w - rounded)^2)``. Scales are rounded to half precision.

    Args:
        weight: any shape of two or more dimensions, finite.
        axis: the dimension of its outputs.
        scheme: bits, group, symmetric and observer count.
        importance: of the weight's shape, such as the mean square of what each entry is multiplied
            with; None for ones.
    """
    shape = tuple(weight.shape)
    whole = max(columns(shape, axis), 1)
    size = min(scheme.group or whole, whole)
    blocks = _blocks(as_matrix(weight.detach().float(), axis), size)
    counted = torch.ones_like(blocks)
    if importance is not None:
        counted = _blocks(as_matrix(importance.to(blocks), axis), size)
    searched = scheme.observer == "mse" or scheme.method == "awq"
    shares = SHRINKAGES if searched else SHRINKAGES[:1]
    best = torch.full(blocks.shape[:2], float("inf"), device=blocks.device)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for share in shares.tolist():
        candidate = _range(blocks, share, scheme)
        error = (counted * (blocks - _rounded(blocks, *candidate, scheme)).square()).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = (
            torch.where(better, new, old) for new, old in zip(candidate, (scale, zero), strict=True)
        )
    if scheme.group is None:
        scale, zero = scale[:, 0], zero[:, 0]
    low, high = limits(scheme)
    points = torch.tensor(0) if scheme.symmetric else zero.to(torch.int32).cpu()
    return Grid(scale.cpu(), points, axis, low, high, scheme.group)


def limits(scheme: WeightOnly) -> tuple[int, int]:
    """Smallest and largest code: as many below zero as above, or from 0 up."""
    if scheme.symmetric:
        return 1 - 2 ** (scheme.bits - 1), 2 ** (scheme.bits - 1) - 1
    return 0, 2**scheme.bits - 1


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """(channels, columns) -> (channels, blocks, size), zeros behind the last column."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % size))
    return padded.reshape(len(matrix), -1, size)


def _range(blocks: Tensor, share: float, scheme: WeightOnly) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every block for a share of its range; 1 and 0 for zeros alone."""
    low, high = limits(scheme)
    if scheme.symmetric:
        scale = blocks.abs().amax(2) * (share / high)
    else:
        bottom, top = blocks.amin(2).clamp_max(0) * share, blocks.amax(2).clamp_min(0) * share
        scale = (top - bottom) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if bool(((scale >= SMALLEST) & (scale <= LARGEST)).all()):
        scale = scale.half().float()
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, torch.round(low - bottom / scale).clamp(low, high)


def _rounded(blocks: Tensor, scale: Tensor, zero: Tensor, scheme: WeightOnly) -> Tensor:
    low, high = limits(scheme)
    codes = (torch.round(blocks / scale[..., None]) + zero[..., None]).clamp(low, high)
    return (codes - zero[..., None]) * scale[..., None]
