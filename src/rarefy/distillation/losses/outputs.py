"""Losses of outputs that are no choice of one class: yes or no for each, or real numbers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.arithmetic import divergence, precise
from rarefy.distillation.losses.base import POSITIVE, Against, Loss, Number, require
from rarefy.distillation.losses.layouts import pair
from rarefy.errors import InputError


@dataclass(frozen=True)
class Binary(Loss):
    """Soft labels of independent yes-or-no outputs: binary and multi-label classification.

    Yang et al. 2023, "Multi-Label Knowledge Distillation", its logit part, with a temperature::

        T^2 * mean over examples of sum over classes of
            p * (log p - log q) + (1 - p) * (log(1 - p) - log(1 - q))

    with ``p = sigmoid(teacher / T)`` and ``q = sigmoid(student / T)``. A single output is one
    class, ``(B, 1)``.

    Args:
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: the temperature is not a positive number; when called, the shapes of student
            and teacher differ, or the class dimension is not known.

    Example:
        >>> student, teacher = torch.zeros(1, 1), torch.tensor([[math.log(3.0)]])
        >>> round(Binary()(student, teacher).item(), 4)
        0.1308
    """

    temperature: Number = 1.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = self.number("temperature")
        student, teacher = pair("Binary", logits, reference, self.dim, mask)
        yes = divergence(F.logsigmoid(teacher / temperature), F.logsigmoid(student / temperature))
        no = divergence(F.logsigmoid(-teacher / temperature), F.logsigmoid(-student / temperature))
        return temperature**2 * (yes + no).sum() / max(len(student), 1)


class Regression(Loss):
    """Base of the losses of real-valued outputs of any shape, such as images or boxes.

    The mean over all numbers of the outputs. ``mask`` has the shape of the outputs, of their first
    dimensions (``(B, L)`` for ``(B, L, D)``), or theirs with some dimensions 1 (``(B, 1, H, W)``
    for ``(B, C, H, W)``); numbers where it is 0 or False count for nothing, whatever they hold.
    """

    against: ClassVar[Against] = "teacher"
    needs_outputs: ClassVar[bool] = True

    @abstractmethod
    def total(self, found: Tensor, wanted: Tensor) -> Tensor:
        """The sum over two equally long lists of numbers."""

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = _numbers(type(self).__name__, logits, reference, mask)
        return self.total(found, wanted) / max(len(found), 1)


@dataclass(frozen=True)
class L1(Regression):
    """Mean absolute difference of real-valued outputs: ``mean |student - teacher|``.

    Raises:
        InputError: when called, the shapes differ, or the mask does not fit.

    Example:
        >>> L1()(torch.zeros(1, 3, 2, 2), 2 * torch.ones(1, 3, 2, 2)).item()
        2.0
    """

    def total(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).abs().sum()


@dataclass(frozen=True)
class L2(Regression):
    """Mean squared difference of real-valued outputs: ``mean (student - teacher)^2``.

    Raises:
        InputError: when called, the shapes differ, or the mask does not fit.

    Example:
        >>> L2()(torch.zeros(1, 3, 2, 2), 2 * torch.ones(1, 3, 2, 2)).item()
        4.0
    """

    def total(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().sum()


@dataclass(frozen=True)
class Huber(Regression):
    """Squared where small, absolute where large: large differences pull no harder.

    Huber 1964, "Robust Estimation of a Location Parameter": the mean of ``d^2 / 2`` where
    ``|d| <= delta`` and of ``delta * (|d| - delta / 2)`` elsewhere, ``d = student - teacher``.
    Smooth L1 with ``beta`` is ``Huber(beta)`` divided by ``beta``.

    Args:
        delta: where the one becomes the other, above 0.

    Raises:
        InputError: delta is not a positive number; when called, the shapes differ, or the mask
            does not fit.

    Example:
        >>> Huber(1.0)(torch.zeros(1, 2), torch.tensor([[0.5, 4.0]])).item()
        1.8125
    """

    delta: Number = 1.0

    def __post_init__(self) -> None:
        require(self, POSITIVE, "delta")

    def total(self, found: Tensor, wanted: Tensor) -> Tensor:
        return F.huber_loss(found, wanted, reduction="sum", delta=self.number("delta"))


def _numbers(
    where: str, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The numbers of both that count, ``(N,)`` each, in float32 or better."""
    if student.shape != teacher.shape:
        raise InputError(
            where,
            f"outputs of shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ",
            "Give student and teacher the same inputs and outputs",
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise InputError(
            where, f"outputs are {student.dtype} and {teacher.dtype}", "Give floating-point outputs"
        )
    both = student, teacher.detach()
    if mask is None:
        found, wanted = (x.flatten() for x in both)
    else:
        counts = _expanded(where, mask.bool(), student)
        found, wanted = (x[counts] for x in both)
    return precise(found), precise(wanted)


def _expanded(where: str, mask: Tensor, outputs: Tensor) -> Tensor:
    shape = tuple(outputs.shape)
    fits = mask.ndim == len(shape) and all(
        m in (1, n) for m, n in zip(mask.shape, shape, strict=True)
    )
    if not fits and tuple(mask.shape) != shape[: mask.ndim]:
        raise InputError(
            where,
            f"a mask of shape {tuple(mask.shape)} does not fit outputs of {shape}",
            f"Give a mask of shape {shape}, of its first dimensions, or with some of them 1",
        )
    return mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape)
