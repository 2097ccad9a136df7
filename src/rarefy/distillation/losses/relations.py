"""Losses of the relations between the examples of a batch; channels need not agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.base import FeatureLoss
from rarefy.distillation.losses.projectors import channel_dim, counted
from rarefy.errors import InputError


@dataclass(frozen=True)
class SP(FeatureLoss):
    """Similarity preserving: which examples of a batch resemble each other.

    Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", equations 2 to 4::

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
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows @ rows.T, dim=1)


def require_same_batch(where: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different batches.

    Raises:
        InputError: they are of other numbers of examples.
    """
    for feature in (student, teacher):
        channel_dim(where, feature)
    if len(student) != len(teacher):
        raise InputError(
            where,
            f"the batches hold {len(student)} and {len(teacher)} examples",
            "Give the features of student and teacher on the same inputs",
        )
