"""Removing weights of one layer with reconstruction: SparseGPT's sweep, on sums alone.

Everything here works on one layer in the form of its normal equations: the Hessian
``H = X^T X + ridge``, shape (groups, columns, columns), and weights (groups, rows, columns), one
row for each output. Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rarefy.pruning.sparsity.patterns import NM, Pattern

MAX_SOLVE = 2e11
"""Multiplications that the exact solve of a layer's surviving weights may take."""

GROWTH = 10.0
"""Factor by which a ridge grows where a matrix is not positive definite with it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """Which columns are chosen from together, and how many units of them go.

    Attributes:
        pattern: what goes together.
        count: units that go in all; N:M fixes them itself.
        inputs: columns of one stretch (N:M groups do not reach over its end).
        block: columns of one selection.
    """

    pattern: Pattern
    count: int
    inputs: int
    block: int

    def ranges(self, columns: int) -> Iterator[tuple[int, int]]:
        """First and last (exclusive) column of every selection."""
        if isinstance(self.pattern, NM):
            for stretch in range(0, columns, self.inputs):
                end = stretch + self.inputs
                for start in range(stretch, end, self.pattern.m):
                    yield start, min(start + self.pattern.m, end)
            return
        width = getattr(self.pattern, "columns", 1)
        step = max(width, self.block // width * width)
        for start in range(0, columns, step):
            yield start, min(start + step, columns)

    def gone(self, scores: Tensor, start: int, end: int, columns: int) -> Tensor:
        """Which weights of the columns from ``start`` to ``end`` go, shape (rows, columns)."""
        if isinstance(self.pattern, NM):
            return self.pattern.gone(scores, end - start)
        rows, size = len(scores), self.pattern.size
        whole = max(size(rows, columns), 1)
        done, upto = (self.count * size(rows, column) // whole for column in (start, end))
        return self.pattern.gone(scores, upto - done)


def reconstructed(
    optimum: Tensor, hessian: Tensor, selection: Selection, plain: Tensor
) -> tuple[Tensor, Tensor]:
    """The best of what is tried: the sweep's choice and plain magnitude's, each solved exactly.

    Args:
        optimum: (groups, rows, columns), the weights without removal.
        hessian: (groups, columns, columns).
        selection: what goes.
        plain: what goes by magnitude; as many units.

    Returns:
        The weights with the least error on the rows of the Hessian, and what went.
    """
    swept, gone = sweep(optimum, hessian, selection)
    found = [(swept, gone)]
    for mask in (gone, plain):
        exact = solved(optimum, hessian, mask)
        if exact is not None:
            found.append((exact, mask))
    return min(found, key=lambda pair: float(cost(pair[0] - optimum, hessian).sum()))


def cost(step: Tensor, hessian: Tensor) -> Tensor:
    """``step H step^T`` of every row, shape (groups, rows)."""
    return ((step @ hessian) * step).sum(2)


def ridge_of(gram: Tensor, damp: float) -> Tensor:
    """``damp`` times the mean diagonal of a Gram matrix, shape (groups,); 1 where it is zero."""
    scale = damp * gram.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def ridged(gram: Tensor, ridge: Tensor) -> Tensor:
    """A Gram matrix with a ridge, shape (groups,), added to its diagonal."""
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + ridge[:, None, None] * eye


def regularized(gram: Tensor, ridge: Tensor, solve: Callable[[Tensor], T]) -> T:
    """What is solved with a Gram matrix and its ridge, which grows as long as that fails.

    Rounding leaves matrices whose smallest eigenvalues are far below the largest not positive
    definite. The ridge grows tenfold then, from the precision of their entries on, until it is as
    large as they are.

    Args:
        gram: (groups, columns, columns).
        ridge: (groups,), the least one.
        solve: from ``gram`` with the ridge.

    Raises:
        LinAlgError: it fails with any of them, as it does where the entries are not finite.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    least = torch.finfo(gram.dtype).eps * trace
    while True:
        try:
            return solve(ridged(gram, ridge))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if not bool((ridge < trace).any()):
                raise
            ridge = torch.maximum(GROWTH * ridge, least)


def moved(weight: Tensor, gram: Tensor, cross: Tensor, hessian: Tensor) -> Tensor:
    """The weights nearest to their present values that give the wanted outputs.

    The minimum of ``||X w - Y||^2 + ridge ||w - weight||^2``.

    Args:
        weight: (groups, rows, columns), what they are.
        gram: ``X^T X``.
        cross: ``X^T Y``, (groups, columns, rows).
        hessian: ``gram`` with its ridge.
    """
    residual = cross - gram @ weight.transpose(1, 2)
    step = torch.cholesky_solve(residual, torch.linalg.cholesky(hessian))
    return weight + step.transpose(1, 2)


def sweep(weight: Tensor, hessian: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Choose the weights that go, column by column, the others making up for them.

    Args:
        weight: (groups, rows, columns), the optimum without removal.
        hessian: (groups, columns, columns), positive definite.
        selection: what goes.

    Returns:
        The weights, exactly zero where they went, and where that is; both of the shape of
        ``weight``.
    """
    groups, rows, columns = weight.shape
    w = weight.clone()
    gone = torch.zeros_like(w, dtype=torch.bool)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for ranges in _batched(list(selection.ranges(columns)), selection.block):
        first, last = ranges[0][0], ranges[-1][1]
        errors = w.new_zeros(groups, rows, last - first)
        for start, end in ranges:
            diagonal = factor[:, start:end, start:end].diagonal(dim1=1, dim2=2)[:, None]
            scores = (w[:, :, start:end] / diagonal).square().flatten(0, 1)
            chosen = selection.gone(scores, start, end, columns)
            gone[:, :, start:end] = chosen.view(groups, rows, end - start)
            for column in range(start, end):
                error = torch.where(gone[:, :, column], w[:, :, column], 0.0)
                error = error / factor[:, column, column, None]
                # lazily: only the columns of this batch now, all others once it is through
                w[:, :, column:last] -= error[:, :, None] * factor[:, None, column, column:last]
                errors[:, :, column - first] = error
        w[:, :, last:] -= errors @ factor[:, first:last, last:]
    return w.masked_fill(gone, 0.0), gone


def _batched(ranges: list[tuple[int, int]], block: int) -> Iterator[list[tuple[int, int]]]:
    """Neighboring selections together, up to ``block`` columns or one selection."""
    batch: list[tuple[int, int]] = []
    for start, end in ranges:
        if batch and end - batch[0][0] > block:
            yield batch
            batch = []
        batch.append((start, end))
    yield batch


def solved(optimum: Tensor, hessian: Tensor, gone: Tensor) -> Tensor | None:
    """The best weights with these ones zero: every row's least squares over those that stay.

    The minimum of ``(w - optimum) H (w - optimum)^T`` over the weights that stay, row by row.

    Args:
        optimum: (groups, rows, columns), the minimum without zeros.
        hessian: (groups, columns, columns).
        gone: which weights are zero.

    Returns:
        The weights, or None where that takes more than :data:`MAX_SOLVE` multiplications.
    """
    groups, rows = optimum.shape[:2]
    kept = ~gone
    widest = int(kept.sum(2).max())
    if groups * rows * widest**3 / 3 > MAX_SOLVE:
        return None
    order = torch.argsort(gone.to(torch.uint8), dim=2, stable=True)[:, :, :widest]
    wanted = optimum @ hessian
    result = torch.zeros_like(optimum)
    step = max(1, (1 << 24) // max(widest * widest, 1))
    for group in range(groups):
        for start in range(0, rows, step):
            index = order[group, start : start + step]
            stays = kept[group, start : start + step].gather(1, index)
            matrix = hessian[group][index[:, :, None], index[:, None, :]]
            both = stays[:, :, None] & stays[:, None, :]
            matrix = torch.where(both, matrix, 0.0) + torch.diag_embed((~stays).to(matrix.dtype))
            right = wanted[group, start : start + step].gather(1, index) * stays
            found = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(matrix))[..., 0]
            result[group, start : start + step].scatter_(1, index, found * stays)
    return result.masked_fill(gone, 0.0)
