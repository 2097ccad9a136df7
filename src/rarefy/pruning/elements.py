"""How important a single weight is, by its tensor or by calibration data.

Scores of tensors are pure functions from a weight to scores of its shape. What needs data is a
frozen value whose type picks the action (:mod:`rarefy.pruning.sparsify`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rarefy.errors import InputError

Scorer: TypeAlias = Callable[[Tensor], Tensor]
"""A weight -> scores of its entries, of its shape; the smallest go first."""


def magnitude(weight: Tensor) -> Tensor:
    """``|w|`` (Han et al. 2015, https://arxiv.org/abs/1506.02626).

    Example:
        >>> magnitude(torch.tensor([[-2.0, 1.0]]))
        tensor([[2., 1.]])
    """
    return weight.detach().abs()


def random(weight: Tensor) -> Tensor:
    """Uniform scores, the control; equal for weights of equal shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def lamp(weight: Tensor) -> Tensor:
    """``w^2`` over the sum of the squares of all weights of its tensor that are not smaller.

    Magnitude that can be compared between layers (Lee et al. 2021,
    https://arxiv.org/abs/2010.07611): the order within a tensor is that of magnitude, and the
    largest weight of every tensor has the score 1, so that no layer is emptied.

    Example:
        >>> lamp(torch.tensor([[1.0, 2.0, 2.0]])).tolist()[0][1]
        0.5
    """
    squares = weight.detach().double().square().flatten()
    order = torch.argsort(squares, stable=True)
    ascending = squares[order]
    rest = ascending.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
    scores = torch.empty_like(squares)
    scores[order] = ascending / rest
    return scores.view(weight.shape)


def _at_least_one(owner: object, samples: int) -> None:
    if not isinstance(samples, int) or samples < 1:
        raise InputError(
            f"{type(owner).__name__}(samples={samples!r})", "below 1", "Use a few hundred"
        )


@dataclass(frozen=True)
class Wanda:
    """``|w_ij| * ||x_j||``, compared within each output row (https://arxiv.org/abs/2306.11695).

    The norm of an input is taken over calibration data, in the network as pruned so far. No weight
    changes other than to zero.

    Args:
        samples: number of examples to use.
    """

    samples: int = 512

    def __post_init__(self) -> None:
        _at_least_one(self, self.samples)


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with reconstruction on calibration data.

    Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774: the columns of a layer are swept
    once; of every ``block`` of them the weights go whose removal costs least to second order,
    ``w^2 / [H^-1]_jj`` by the Cholesky factor of the inverse Hessian ``H = X^T X``, and the
    weights to the right make up for them. ``X`` are the layer's inputs in the network as pruned so
    far. Added to the paper: before the sweep the weights are moved to reproduce the dense
    network's outputs from those inputs; after it the surviving weights of each row are solved
    exactly where that is cheap, and so are those that magnitude would leave, should they be better;
    and the layer's bias, or the running mean of a BatchNorm that alone reads it, takes up what the
    mean of the outputs moved.

    A fifth of the examples is kept from all this. A layer that is not nearer to the original on
    them than by plain magnitude is pruned by that, and named in the record.

    Args:
        samples: number of examples to use.
        damp: added to the diagonal of the Hessian, relative to its mean, above 0.
        block: columns of one selection, at least 1.

    Raises:
        InputError: a value is out of range.
    """

    samples: int = 512
    damp: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        _at_least_one(self, self.samples)
        if not 0 < self.damp < float("inf"):
            raise InputError(f"SparseGPT(damp={self.damp!r})", "must be above 0", "Write damp=0.01")
        if self.block < 1:
            raise InputError(f"SparseGPT(block={self.block!r})", "below 1", "Write block=128")


ElementCriterion: TypeAlias = Scorer | Wanda | SparseGPT
"""How single weights are chosen."""

ELEMENT_CRITERIA: Mapping[str, ElementCriterion] = {
    "magnitude": magnitude,
    "random": random,
    "lamp": lamp,
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}
"""Shorthand -> criterion."""


def named(criterion: str | ElementCriterion) -> ElementCriterion:
    """A criterion from its shorthand, or itself.

    Raises:
        InputError: no criterion has that name.
    """
    if not isinstance(criterion, str):
        return criterion
    if criterion not in ELEMENT_CRITERIA:
        raise InputError(
            f"prune(criterion={criterion!r})",
            "no criterion of single weights has that name",
            f"Use one of {', '.join(ELEMENT_CRITERIA)}, or a function weight -> scores",
        )
    return ELEMENT_CRITERIA[criterion]
