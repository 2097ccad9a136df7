"""Losses of the relations between the examples of a batch; channels need not agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.arithmetic import divergence, exact, unit
from rarefy.distillation.losses.base import NOT_NEGATIVE, FeatureLoss, Number, require
from rarefy.distillation.losses.projectors import channel_dim, counted, require_same_batch


@dataclass(frozen=True)
class SP(FeatureLoss):
    """Similarity preserving: which examples of a batch resemble each other.

    Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", section 3::

        G = rows of Q Q^T, each divided by its length;  Q = features, one flat row per example
        loss = sum of (G_student - G_teacher)^2 / B^2

    Features are ``(B, C)``, ``(B, L, C)`` with a mask ``(B, L)``, or ``(B, C, H, W)``; student and
    teacher need have nothing in common but the batch.

    Raises:
        InputError: when called, the batches differ, or the mask does not fit.

    Example:
        >>> round(SP()(torch.ones(2, 3), torch.eye(2)).item(), 4)
        0.2929
    """

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        require_same_batch("SP", student, teacher)
        found = _similarities(counted("SP", student, mask).flatten(1))
        wanted = _similarities(counted("SP", teacher.detach(), mask).flatten(1))
        return (found - wanted).square().sum() / max(len(student), 1) ** 2


def _similarities(rows: Tensor) -> Tensor:
    with exact(rows):
        return unit(rows @ rows.T)


@dataclass(frozen=True)
class RKD(FeatureLoss):
    """Relational knowledge distillation: distances and angles between the examples of a batch.

    Park et al. 2019, "Relational Knowledge Distillation", section 3, with ``l`` the Huber loss
    at 1::

        distance * mean over pairs of l(d_student, d_teacher)
            + angle * mean over triples of l(a_student, a_teacher)
        d = |x_i - x_j| / mean over pairs of |x_i - x_j|
        a = cosine of the angle at x_j in the triangle of x_i, x_j, x_k

    over ordered pairs and triples of different examples. Features are ``(B, C)``; those of
    sequences ``(B, L, C)``, with a mask ``(B, L)``, and of maps ``(B, C, H, W)`` are averaged over
    their positions first. Memory grows with the cube of the batch.

    Args:
        distance: weight of the distances, at least 0.
        angle: weight of the angles, at least 0; the paper weighs angles twice as much.
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: a weight is out of range; when called, the batches differ, or the mask does not
            fit.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> RKD()(2 * corners + 1, corners).item()
        0.0
    """

    distance: Number = 1.0
    angle: Number = 2.0
    dim: int | None = None

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "distance", "angle")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = embeddings("RKD", student, teacher, mask, self.dim)
        (near, seen), (near_wanted, seen_wanted) = _geometry(found), _geometry(wanted)
        pairs = F.huber_loss(near, near_wanted, reduction="sum") / max(near.numel(), 1)
        triples = F.huber_loss(seen, seen_wanted, reduction="sum") / max(seen.numel(), 1)
        return self.number("distance") * pairs + self.number("angle") * triples


def _geometry(points: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs of different points over their mean, and cosines of all triples."""
    sides = points[:, None] - points[None, :]
    different = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    lengths = torch.linalg.vector_norm(sides, dim=-1)[different]
    mean = lengths.sum() / max(lengths.numel(), 1)
    with exact(points):
        directions = unit(sides)  # from corner j, the second, to i
        cosines = torch.einsum("ijc,kjc->jik", directions, directions)
    triples = different[:, :, None] & different[:, None, :] & different[None, :, :]
    return lengths / mean.masked_fill(mean == 0, 1.0), cosines[triples]


@dataclass(frozen=True)
class PKT(FeatureLoss):
    """Probabilistic knowledge transfer: how likely an example is to choose another as neighbor.

    Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    with the cosine kernel::

        mean over examples i of sum over j != i of p_ij * (log p_ij - log q_ij)
        p_ij = K(t_i, t_j) / sum over k != i of K(t_i, t_k);  K(a, b) = (cosine(a, b) + 1) / 2

    and ``q`` the same of the student; the paper sums over the examples. Features as in
    :class:`RKD`.

    Args:
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: when called, the batches differ, or the mask does not fit.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> PKT()(3 * features, features).item()
        0.0
    """

    dim: int | None = None

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = embeddings("PKT", student, teacher, mask, self.dim)
        if len(found) < 2:
            return found[:0].sum()  # nobody to choose
        return divergence(_neighbors(wanted), _neighbors(found)).sum() / len(found)


def _neighbors(points: Tensor) -> Tensor:
    """Log-probabilities of neighbors; ``-inf`` of a point itself."""
    with exact(points):
        kernel = (unit(points) @ unit(points).T + 1) / 2
    log_kernel = kernel.clamp_min(torch.finfo(kernel.dtype).eps).log()
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    return F.log_softmax(log_kernel.masked_fill(itself, -math.inf), dim=1)


def embeddings(
    where: str, student: Tensor, teacher: Tensor, mask: Tensor | None, dim: int | None
) -> tuple[Tensor, Tensor]:
    """One vector for each example of both, the mean over its positions, in float32 or better.

    The teacher's receive no gradients.

    Raises:
        InputError: the batches differ, or the mask does not fit.
    """
    require_same_batch(where, student, teacher)
    return averaged(where, student, mask, dim), averaged(where, teacher.detach(), mask, dim)


def averaged(where: str, feature: Tensor, mask: Tensor | None, dim: int | None) -> Tensor:
    """The mean of a feature over the positions that count, ``(B, C)``; 0 where none does."""
    rows = counted(where, feature, mask, dim).movedim(channel_dim(where, feature, dim), 1)
    totals = rows.flatten(2).sum(2) if rows.ndim > 2 else rows
    if mask is None:
        return totals / max(math.prod(rows.shape[2:]), 1)
    return totals / mask.bool().flatten(1).sum(1, keepdim=True).clamp_min(1)
