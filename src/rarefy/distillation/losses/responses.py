"""Losses of a student's outputs against its teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.base import POSITIVE, Against, Loss, Number, require
from rarefy.distillation.losses.layouts import pair


@dataclass(frozen=True)
class KD(Loss):
    """Knowledge distillation: the divergence of softened predictions.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2::

        T^2 * mean over examples of sum over classes of p * (log p - log q)

    with ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``. The factor ``T^2`` keeps
    the size of the gradients when the temperature changes. Classes to which the teacher gives
    probability 0 (logit ``-inf``) contribute nothing.

    Args:
        temperature: T, above 0. 1 compares the predictions as they are.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: the temperature is not a positive number; when called, the shapes of student
            and teacher differ, or the class dimension is not known.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> round(KD(temperature=1.0)(student, teacher).item(), 4)
        0.1308
    """

    temperature: Number = 4.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = pair("KD", logits, reference, self.dim, mask)
        temperature = self.number("temperature")
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        return temperature**2 * divergence(log_p, log_q).sum() / max(len(log_p), 1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p * (log p - log q)`` element by element; 0 where p is 0, for 0 * log 0 is 0, not NaN."""
    p = log_p.exp()
    impossible = p == 0
    return p * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))


@dataclass(frozen=True)
class MSE(Loss):
    """Mean squared difference of the logits, over classes, examples and positions.

    Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in
    Knowledge Distillation"; they sum over the classes, this averages, as ``nn.MSELoss`` does: for
    logits of mean 0 it is then twice the limit of :class:`KD` at high temperature.

    Args:
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: when called, the shapes of student and teacher differ, or the class dimension
            is not known.

    Example:
        >>> MSE()(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """

    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = pair("MSE", logits, reference, self.dim, mask)
        return (student - teacher).square().sum() / max(student.numel(), 1)
