"""Losses of a student's outputs against its teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.arithmetic import centered, divergence
from rarefy.distillation.losses.base import NOT_NEGATIVE, POSITIVE, Against, Loss, Number, require
from rarefy.distillation.losses.layouts import (
    IGNORE,
    choices,
    indices,
    pair,
    require_labels,
)
from rarefy.errors import InputError


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
            and teacher differ, the class dimension is not known, or there is one class.

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
        student, teacher = choices("KD", logits, reference, self.dim, mask)
        temperature = self.number("temperature")
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        return temperature**2 * divergence(log_p, log_q).sum() / max(len(log_p), 1)


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
    needs_outputs: ClassVar[bool] = True

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = pair("MSE", logits, reference, self.dim, mask)
        return (student - teacher).square().sum() / max(student.numel(), 1)


@dataclass(frozen=True)
class Standardized(Loss):
    """Another loss, of logits that are standardized first: their scale is left to the student.

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation"::

        loss(Z(student), Z(teacher));  Z(x) = (x - mean(x)) / std(x) over the classes

    with the standard deviation of the paper's equation, whose sum is divided by the number of
    classes; the authors' code divides by one less. Logits that are all equal become 0, without a
    gradient.

    Args:
        loss: of logits ``(N, C)`` against the teacher's, with no dimension of its own named.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: the loss is not one against the teacher's outputs; when called, as that loss.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 30.0]])
        >>> Standardized(KD(2))(student, teacher).item()
        0.0
    """

    loss: Loss = KD(2.0)
    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss) or self.loss.against != "teacher":
            raise InputError(
                f"Standardized({self.loss!r})",
                "it standardizes the logits of student and teacher",
                "Give a loss against the teacher's outputs, such as KD(2)",
            )

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Whether the inner loss does."""
        return self.loss.needs_labels

    def __call__(
        self,
        logits: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        student, teacher = pair("Standardized", logits, reference, self.dim, mask)
        extra = {}
        if self.loss.needs_labels and labels is not None:
            require_labels("Standardized", logits, self.dim, labels)
            extra = {"labels": labels.flatten() if mask is None else labels[mask.bool()]}
        scale = math.sqrt(student.shape[-1])
        return self.loss(scale * centered(student), scale * centered(teacher), None, **extra)


@dataclass(frozen=True)
class DKD(Loss):
    """Decoupled knowledge distillation: the true class and the others are weighted apart.

    Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7::

        T^2 * mean over examples of (alpha * TCKD + beta * NCKD)
        TCKD = KL(b_teacher || b_student),  b = (p_target, 1 - p_target)
        NCKD = KL(o_teacher || o_student),  o = softmax over the classes other than the target

    all at temperature T, with the factor ``T^2`` of the authors' code. Hinton's loss is
    ``TCKD + (1 - p_target of the teacher) * NCKD``.

    The target is the true class. Positions labelled -100 count for nothing. Without labels the
    teacher's most likely class stands in, which is not in the paper.

    Args:
        alpha: weight of the target, at least 0.
        beta: weight of the other classes, at least 0; the paper takes 1 to 10, the more the more
            certain the teacher is.
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: a number is out of range; when called, the shapes of student and teacher differ,
            the class dimension is not known, or there are fewer than two classes.
        DataError: when called, the labels do not fit the logits, or one is no class.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]])
        >>> round(DKD(temperature=1)(student, teacher, labels=torch.tensor([0])).item(), 4)
        0.433
    """

    alpha: Number = 1.0
    beta: Number = 8.0
    temperature: Number = 4.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "alpha", "beta")
        require(self, POSITIVE, "temperature")

    def __call__(
        self,
        logits: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        temperature = self.number("temperature")
        student, teacher, target = _targeted("DKD", logits, reference, self.dim, mask, labels)
        binary, others = zip(
            *(_decoupled(x / temperature, target) for x in (student, teacher)), strict=True
        )
        tckd = divergence(binary[1], binary[0]).sum()
        nckd = divergence(others[1], others[0]).sum()
        total = self.number("alpha") * tckd + self.number("beta") * nckd
        return temperature**2 * total / max(len(student), 1)


@dataclass(frozen=True)
class NKD(Loss):
    """Normalized knowledge distillation: the other classes, normalized, and the true one.

    Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels", without its cross entropy with the
    labels, which is the ``label_weight`` of ``distill``::

        mean over examples of (-p_target * log q_target
                               - gamma * T^2 * sum over other classes of P * log Q)

    with ``p``, ``q`` the softmax of teacher and student at temperature 1, and ``P``, ``Q`` that of
    the classes other than the target, at temperature T. These are cross entropies: at equal logits
    the gradient of the second term is 0, its value is not.

    The target is the true class. Positions labelled -100 count for nothing. Without labels the
    teacher's most likely class stands in, which is not in the paper.

    Args:
        gamma: weight of the other classes, at least 0.
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: a number is out of range; when called, the shapes of student and teacher differ,
            the class dimension is not known, or there are fewer than two classes.
        DataError: when called, the labels do not fit the logits, or one is no class.

    Example:
        >>> round(NKD()(torch.zeros(1, 3), torch.zeros(1, 3), labels=torch.tensor([0])).item(), 4)
        1.4059
    """

    gamma: Number = 1.5
    temperature: Number = 1.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "gamma")
        require(self, POSITIVE, "temperature")

    def __call__(
        self,
        logits: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        temperature = self.number("temperature")
        student, teacher, target = _targeted("NKD", logits, reference, self.dim, mask, labels)
        log_q, log_p = (_decoupled(x, target)[0][:, 0] for x in (student, teacher))
        log_others, others = (_decoupled(x / temperature, target)[1] for x in (student, teacher))
        total = _surprise(log_p, log_q).sum()
        total = total + self.number("gamma") * temperature**2 * _surprise(others, log_others).sum()
        return total / max(len(student), 1)


def _surprise(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``-p * log q`` element by element; 0 where p is 0."""
    p = log_p.exp()
    return -p * log_q.masked_fill(p == 0, 0.0)


def _decoupled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of (p_target, 1 - p_target), ``(N, 2)``, and of the other classes among each other."""
    chosen = target[:, None]
    others = logits.scatter(1, chosen, float("-inf"))
    two = torch.cat([logits.gather(1, chosen), others.logsumexp(1, keepdim=True)], 1)
    return F.log_softmax(two, dim=1), F.log_softmax(others, dim=1)


def _targeted(
    where: str,
    logits: Tensor,
    reference: Tensor,
    dim: int | None,
    mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both that count, ``(N, C)``, and their target classes ``(N,)``."""
    student, teacher = choices(where, logits, reference, dim, mask)
    if labels is None:
        return student, teacher, teacher.argmax(-1)
    require_labels(where, logits, dim, labels)
    target, count = indices(where, labels, mask, len(student), student.shape[-1])
    if count == len(student):
        return student, teacher, target
    labelled = target != IGNORE
    return student[labelled], teacher[labelled], target[labelled]


@dataclass(frozen=True)
class DIST(Loss):
    """Relations of classes, within an example and across the batch, instead of exact values.

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher"::

        T^2 * (beta * inter + gamma * intra)
        inter = mean over examples of 1 - pearson(q, p), over the classes of one example
        intra = mean over classes of 1 - pearson(q, p), over the examples of one class

    with ``q``, ``p`` the softmax of student and teacher at temperature T. All positions are rows
    alike. What does not vary, such as a batch of one example, has the correlation 0.

    Args:
        beta: weight within examples, at least 0.
        gamma: weight within classes, at least 0; defaults are those of the authors' code.
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: a number is out of range; when called, the shapes of student and teacher differ,
            the class dimension is not known, or there is one class.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
        >>> round(DIST()(logits, logits).item(), 4)
        0.0
    """

    beta: Number = 1.0
    gamma: Number = 1.0
    temperature: Number = 1.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "beta", "gamma")
        require(self, POSITIVE, "temperature")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = self.number("temperature")
        student, teacher = choices("DIST", logits, reference, self.dim, mask)
        if not len(student):
            return student.sum()
        q, p = (F.softmax(x / temperature, dim=-1) for x in (student, teacher))
        inter = 1 - (centered(q) * centered(p)).sum(-1).mean()
        intra = 1 - (centered(q, 0) * centered(p, 0)).sum(0).mean()
        return temperature**2 * (self.number("beta") * inter + self.number("gamma") * intra)
