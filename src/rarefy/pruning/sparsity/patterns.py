"""Which weights go together: single ones, N of every M, blocks. Frozen values; the type acts.

A pattern looks at a weight as a matrix (outputs, columns). Its columns are the inputs times the
places of the kernel, in the order that the pattern wants (:func:`as_matrix`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import BudgetError, InputError
from rarefy.pruning.scoring.aggregation import share_of_the_rest
from rarefy.types import check_counts


@dataclass(frozen=True)
class Unstructured:
    """Single weights. Files get smaller; no runtime gets faster.

    Example:
        >>> Unstructured().gone(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        tensor([[False,  True,  True]])
    """

    def size(self, rows: int, columns: int) -> int:
        """How many units a matrix has."""
        return rows * columns

    def units(self, scores: Tensor) -> Tensor:
        """Scores of the units, shape (units,), of scores of weights, shape (rows, columns)."""
        return scores.flatten()

    def spread(self, gone: Tensor, rows: int, columns: int) -> Tensor:
        """For each weight, shape (rows, columns), whether its unit goes, of shape (units,)."""
        return gone.view(rows, columns)

    def gone(self, scores: Tensor, count: int) -> Tensor:
        """For each weight, whether it is of the ``count`` units with the smallest scores."""
        return self.spread(_smallest(self.units(scores), count), *scores.shape)


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` outputs times ``columns`` columns, removed or kept as wholes.

    The weight is seen as a matrix (outputs, inputs * kernel), so that the columns of a block of a
    convolution run over the kernel first. Blocks at the right and lower edges may be smaller. A
    block's score is the mean of its weights' scores (Narang et al. 2017,
    https://arxiv.org/abs/1711.02782, takes the maximum). The share counts blocks.

    Args:
        rows: outputs of one block, at least 1.
        columns: columns of one block, at least 1.

    Raises:
        InputError: a size is below 1.

    Example:
        >>> Block(1, 2).gone(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 1)
        tensor([[False, False,  True,  True]])
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_counts(self, "rows columns", 4)

    def size(self, rows: int, columns: int) -> int:
        """How many units a matrix has."""
        return ceil(rows / self.rows) * ceil(columns / self.columns)

    def units(self, scores: Tensor) -> Tensor:
        """Mean score of every block, row by row of blocks, shape (units,)."""
        return self._sums(scores) / self._sums(torch.ones_like(scores))

    def spread(self, gone: Tensor, rows: int, columns: int) -> Tensor:
        """For each weight, shape (rows, columns), whether its unit goes, of shape (units,)."""
        blocks = gone.view(-1, ceil(columns / self.columns))
        tall = blocks.repeat_interleave(self.rows, 0)[:rows]
        return tall.repeat_interleave(self.columns, 1)[:, :columns]

    def gone(self, scores: Tensor, count: int) -> Tensor:
        """For each weight, whether it is of the ``count`` units with the smallest scores."""
        return self.spread(_smallest(self.units(scores), count), *scores.shape)

    def _sums(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape
        padded = F.pad(scores, (0, -columns % self.columns, 0, -rows % self.rows))
        tall = padded.shape[0] // self.rows
        parts = padded.reshape(tall, self.rows, -1, self.columns)
        return parts.sum((1, 3)).flatten()


@dataclass(frozen=True)
class NM:
    """Of every ``m`` weights that follow each other along the inputs, the ``n`` largest stay.

    That is what sparse tensor cores take (Mishra et al. 2021, https://arxiv.org/abs/2104.08378).
    In a convolution the ``m`` weights are those of neighboring input channels at one place of the
    kernel. Inputs that do not fill a group of ``m`` at the end stay dense, and with them layers
    with fewer than ``m`` input channels, such as depthwise convolutions.

    Args:
        n: how many stay, at least 1.
        m: how many there are, more than ``n``.

    Raises:
        InputError: not ``1 <= n < m``.

    Example:
        >>> NM(1, 2).gone(torch.tensor([[3.0, 1.0, 2.0, 4.0, 0.5]]), inputs=5)
        tensor([[False,  True,  True, False, False]])
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_counts(self, "n m", 4)
        if self.n >= self.m:
            raise InputError(
                f"NM({self.n}, {self.m})",
                "so many of each group stay that nothing goes",
                "Write NM(2, 4) to keep two of every four",
            )

    @property
    def sparsity(self) -> float:
        """Share of the weights that go, where all are in groups."""
        return 1 - self.n / self.m

    def gone(self, scores: Tensor, inputs: int) -> Tensor:
        """For each weight of (rows, columns), whether it goes.

        Args:
            scores: of weights; ``inputs`` neighboring columns share a place of the kernel.
            inputs: how many columns a stretch has; groups do not reach over its end.
        """
        full = inputs // self.m * self.m
        stretches = scores.reshape(len(scores), -1, inputs)[..., :full]
        parts = stretches.reshape(*stretches.shape[:2], -1, self.m)
        order = torch.argsort(parts, dim=-1, descending=True, stable=True)
        gone = torch.ones_like(parts, dtype=torch.bool)
        gone.scatter_(-1, order[..., : self.n], False)
        return F.pad(gone.flatten(2), (0, inputs - full)).flatten(1)


Pattern: TypeAlias = Unstructured | Block | NM
"""What goes together."""

PATTERNS: Mapping[str, Pattern] = {
    "weight": Unstructured(),
    "unstructured": Unstructured(),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
    "1:4": NM(1, 4),
    "1x4": Block(1, 4),
    "4x1": Block(4, 1),
    "16x16": Block(16, 16),
}
"""Shorthand -> pattern."""


def named(structure: str | Pattern) -> Pattern:
    """A pattern from its shorthand, or itself.

    Raises:
        InputError: no pattern has that name.
    """
    if isinstance(structure, Unstructured | Block | NM):
        return structure
    if not isinstance(structure, str) or structure not in PATTERNS:
        raise InputError(
            f"prune(structure={structure!r})",
            "unknown structure",
            "Use 'channel' (units really removed), 'depth' (residual blocks), both as "
            "('channel', 'depth'), "
            f"{', '.join(map(repr, PATTERNS))} (weights set to zero), NM(n, m) or Block(r, c)",
        )
    return PATTERNS[structure]


def shorthand(pattern: Pattern) -> str:
    """How a pattern is written in short, e.g. ``"2:4"``."""
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}"
    return f"{pattern.rows}x{pattern.columns}" if isinstance(pattern, Block) else "weight"


# --- weights as matrices -------------------------------------------------------------------------


def as_matrix(weight: Tensor, input_dim: int, pattern: Pattern, groups: int = 1) -> Tensor:
    """A weight as (outputs, columns), in the order of columns that the pattern wants.

    Args:
        weight: two dimensions or more; those beyond are the places of a kernel.
        input_dim: 0 or 1, the dimension of its inputs; the other one is that of its outputs.
        pattern: N:M takes all inputs of one place of the kernel together, all others the reverse.
        groups: how many groups of channels follow each other along dimension 0 though it is that
            of the inputs, as in transposed convolutions.
    """
    if groups > 1:
        weight = _by_output(weight, groups)
    parts = weight.movedim(input_dim, 1).flatten(2) if weight.ndim > 2 else weight
    if weight.ndim == 2:
        return parts.movedim(input_dim, 1)
    return (parts.transpose(1, 2) if isinstance(pattern, NM) else parts).flatten(1)


def as_weight(
    matrix: Tensor, like: Tensor, input_dim: int, pattern: Pattern, groups: int = 1
) -> Tensor:
    """What :func:`as_matrix` was given, of the shape of ``like``."""
    if groups > 1:
        weight = as_weight(matrix, _by_output(like, groups), input_dim, pattern)
        inputs, outputs = len(weight), weight.shape[1] // groups
        parts = weight.reshape(inputs, groups, outputs, *weight.shape[2:])
        return parts.movedim(1, 0).flatten(0, 1)
    shape = like.movedim(input_dim, 1).shape
    if isinstance(pattern, NM) and like.ndim > 2:
        matrix = matrix.reshape(len(matrix), -1, shape[1]).transpose(1, 2)
    return matrix.reshape(shape).movedim(1, input_dim)


def _by_output(weight: Tensor, groups: int) -> Tensor:
    """(groups * inputs, outputs of one, ...) as (inputs, groups * outputs, ...)."""
    parts = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    return parts.movedim(0, 1).flatten(1, 2)


# --- what goes -----------------------------------------------------------------------------------


def exact(share: float, size: int) -> int:
    """``floor(share * size)``, where rounding of the product does not count."""
    return int(share * size + 1e-9)


def counts(
    pattern: Unstructured | Block,
    scores: Sequence[Tensor],
    share: float,
    *,
    together: bool,
    energy: float | None = None,
) -> list[int]:
    """How many units of each matrix go.

    Args:
        pattern: the units.
        scores: of the weights of every matrix.
        share: of the units, 0 to 1.
        together: rank all matrices together, so that ``floor(share * n)`` of all their units go;
            otherwise so many of each.
        energy: power of the scores that is an error of a layer's outputs; it then counts, as in
            LAMP, as a share of the errors of all units of its matrix that are no smaller, since
            outputs of several layers are of other sizes. None where scores of all are alike.
    """
    sizes = [pattern.size(*s.shape) for s in scores]
    if not together:
        return [exact(share, size) for size in sizes]
    units = [pattern.units(s).cpu() for s in scores]
    if energy is not None:
        units = [_relative(own, energy) for own in units]
    every = torch.cat(units)
    gone = _smallest(every, exact(share, len(every)))
    return [int(part.sum()) for part in torch.split(gone, sizes)]


def _relative(scores: Tensor, energy: float) -> Tensor:
    """The errors as shares of what is no smaller; infinite scores stay so."""
    finite = scores.isfinite()
    shares = share_of_the_rest(scores[finite].double() ** energy)
    return scores.double().masked_scatter(finite, shares)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """For each score, whether it is of the ``count`` smallest; of equal ones the first go."""
    gone = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    gone[torch.argsort(scores, stable=True)[:count]] = True
    return gone


def resolved_share(pattern: Pattern, share: float | None, where: str) -> float:
    """The share of units to remove, which N:M itself fixes.

    Raises:
        BudgetError: none is given where one is needed, or another than N:M fixes.
    """
    if isinstance(pattern, NM):
        if share is not None and abs(share - pattern.sparsity) > 1e-9:
            raise BudgetError(
                where,
                f"{shorthand(pattern)} sets {pattern.sparsity:.4g} of the weights to zero, and a "
                f"sparsity of {share:.4g} is asked for",
                f"Leave the budget out, or write Budget(sparsity={pattern.sparsity:.4g})",
            )
        return pattern.sparsity
    if share is None:
        raise BudgetError(
            where,
            "no sparsity is given",
            "Give Budget(sparsity=0.9), the share of weights to set to zero",
        )
    return share
