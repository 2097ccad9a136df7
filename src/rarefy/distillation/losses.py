"""Losses as frozen values that take tensors and return a scalar tensor.

Every loss is called as ``loss(logits, reference, mask=None)``. The reference is the teacher's
logits (:class:`KD`, :class:`MSE`) or the true labels (:class:`CrossEntropy`). Losses against the
same reference add and scale: ``0.9 * KD(4) + 0.1 * MSE()``.

Conventions that all of them share:

* Logits are ``(B, C)``, or ``(B, L, C)`` for sequences: the classes are the **last** dimension.
  Any other layout, such as ``(B, C, H, W)`` for segmentation, is named: ``KD(dim=1)``.
* A loss sums over the classes (:class:`MSE` averages) and averages over all examples and positions
  together, so that its size depends on neither the batch nor the length.
* ``mask`` has the shape of the logits without the class dimension; positions where it is 0 or
  False count for nothing, whatever they hold. Where nothing counts, the loss is 0.
* Half-precision logits are converted to float32 first; float64 stays float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import DataError, InputError

IGNORE = -100
"""A label that counts for nothing, as in PyTorch and transformers."""


class Loss(ABC):
    """Base of all losses: what makes them add and scale. Subclasses are frozen dataclasses.

    Attributes:
        against: what the second argument is: ``"teacher"`` logits or true ``"labels"``.
    """

    against: Literal["teacher", "labels"]

    @abstractmethod
    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` against ``reference``, a scalar."""

    def __add__(self, other: Loss) -> Weighted:
        if not isinstance(other, Loss):
            return NotImplemented
        return Weighted((*_terms(self), *_terms(other)))

    def __mul__(self, factor: float) -> Weighted:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Weighted(tuple((factor * weight, loss) for weight, loss in _terms(self)))

    __rmul__ = __mul__


def _terms(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    return loss.terms if isinstance(loss, Weighted) else ((1.0, loss),)


@dataclass(frozen=True)
class Weighted(Loss):
    """A weighted sum of losses against the same reference; made by ``+`` and ``*``.

    Args:
        terms: ``(weight, loss)`` pairs, at least one.

    Raises:
        InputError: there is no term, a weight is not finite, or the references differ.

    Example:
        >>> 0.9 * KD(temperature=2) + 0.1 * MSE()
        Weighted(terms=((0.9, KD(temperature=2, dim=None)), (0.1, MSE(dim=None))))
    """

    terms: tuple[tuple[float, Loss], ...]

    def __post_init__(self) -> None:
        if not self.terms or not all(math.isfinite(weight) for weight, _ in self.terms):
            raise InputError("Weighted(...)", f"{self.terms!r} is no sum", "Give finite weights")
        if len({loss.against for _, loss in self.terms}) > 1:
            raise InputError(
                " + ".join(type(loss).__name__ for _, loss in self.terms),
                "one compares with the teacher, the other with labels",
                "Use the label_weight of distill(...) to mix in the labels",
            )

    @property
    def against(self) -> Literal["teacher", "labels"]:  # type: ignore[override]
        """What the second argument is."""
        return self.terms[0][1].against

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        (weight, loss), *others = self.terms
        total = weight * loss(logits, reference, mask)
        for weight, loss in others:
            total = total + weight * loss(logits, reference, mask)
        return total


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

    temperature: float = 4.0
    dim: int | None = None
    against: ClassVar[Literal["teacher"]] = "teacher"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"KD(temperature={self.temperature!r})",
                "a temperature is a number above 0",
                "Write KD(temperature=4.0)",
            )

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = _pair("KD", logits, reference, self.dim, mask)
        log_q = F.log_softmax(student / self.temperature, dim=-1)
        log_p = F.log_softmax(teacher / self.temperature, dim=-1)
        p = log_p.exp()
        impossible = p == 0  # 0 * log 0 is 0, not NaN
        terms = p * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))
        return self.temperature**2 * terms.sum() / max(len(terms), 1)


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
    against: ClassVar[Literal["teacher"]] = "teacher"  # type: ignore[misc]

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = _pair("MSE", logits, reference, self.dim, mask)
        return (student - teacher).square().sum() / max(student.numel(), 1)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross entropy of the logits with the true labels.

    Labels are class indices of the shape of the logits without the class dimension (positions
    labelled -100 count for nothing), or probabilities of the shape of the logits. Szegedy et al.
    2016, "Rethinking the Inception Architecture", section 7, for label smoothing.

    Args:
        label_smoothing: the share of the label that is spread evenly over all classes, in [0, 1).
        dim: dimension of the classes; None for the one that fits the labels: the last, else 1.

    Raises:
        InputError: the share is out of range.
        DataError: when called, the labels do not fit the logits, or one is no class.

    Example:
        >>> round(CrossEntropy()(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.6931
    """

    label_smoothing: float = 0.0
    dim: int | None = None
    against: ClassVar[Literal["labels"]] = "labels"  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"CrossEntropy(label_smoothing={self.label_smoothing!r})",
                "it is a share, at least 0 and below 1",
                "Write label_smoothing=0.1",
            )

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        if reference.shape == logits.shape and reference.is_floating_point():
            rows, targets = _pair("CrossEntropy", logits, reference, self.dim, mask)
            count = len(rows)
        else:
            dim = label_dim("CrossEntropy", logits, reference) if self.dim is None else self.dim
            rows = _rows("CrossEntropy", logits, class_dim("CrossEntropy", logits, dim), mask)
            targets, count = _indices(reference, mask, len(rows), rows.shape[-1])
        total = F.cross_entropy(
            rows,
            targets,
            reduction="sum",
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
        )
        return total / max(count, 1)


def class_dim(where: str, logits: Tensor, dim: int | None) -> int:
    """The class dimension of logits, from 0; the last of 2-D and 3-D logits where not given.

    Raises:
        InputError: it is out of range, or not given for logits of other dimensions.
    """
    if dim is None and logits.ndim in (2, 3):
        return logits.ndim - 1
    if dim is None or not -logits.ndim <= dim < logits.ndim or logits.ndim < 2:
        raise InputError(
            f"{where}(dim={dim})",
            f"logits of shape {tuple(logits.shape)} do not say which dimension is the classes",
            f"Give (B, C) or (B, L, C), or name the dimension: {where}(dim=1) for (B, C, H, W)",
        )
    return dim % logits.ndim


def label_dim(where: str, logits: Tensor, labels: Tensor) -> int:
    """The class dimension of logits that fits class indices: the last, else 1.

    Raises:
        DataError: neither does.
    """
    for dim in (logits.ndim - 1, 1):
        if 0 < dim < logits.ndim and _without(logits, dim) == tuple(labels.shape):
            return dim
    raise DataError(
        where,
        f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}",
        "Give one class index for each example or position, for example (B,) for (B, C)",
    )


def _without(logits: Tensor, dim: int) -> tuple[int, ...]:
    shape: Sequence[int] = logits.shape
    return (*shape[:dim], *shape[dim + 1 :])


def _pair(
    where: str, student: Tensor, teacher: Tensor, dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of both, ``(N, C)`` each."""
    found = class_dim(where, student, dim)
    if student.shape != teacher.shape:
        classes = student.ndim == teacher.ndim and student.shape[found] != teacher.shape[found]
        raise InputError(
            where,
            f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ"
            + (f": {student.shape[found]} and {teacher.shape[found]} classes" if classes else ""),
            "Give student and teacher the same classes, in the same order, and the same inputs",
        )
    return _rows(where, student, found, mask), _rows(where, teacher, found, mask)


def _rows(where: str, logits: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """The logits that count as ``(N, C)``, in float32 or better."""
    if not logits.is_floating_point():
        raise InputError(where, f"logits are {logits.dtype}", "Give floating-point logits")
    if mask is not None and tuple(mask.shape) != _without(logits, dim):
        raise InputError(
            where,
            f"a mask of shape {tuple(mask.shape)} does not fit logits of {tuple(logits.shape)}",
            f"Give a mask of shape {_without(logits, dim)}",
        )
    last = logits.movedim(dim, -1)
    rows = last.flatten(0, -2) if mask is None else last[mask.bool()]
    return rows if rows.dtype == torch.float64 else rows.float()


def _indices(labels: Tensor, mask: Tensor | None, rows: int, classes: int) -> tuple[Tensor, int]:
    """Class indices ``(N,)`` as int64, and how many of them count."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            "CrossEntropy",
            f"labels of shape {tuple(labels.shape)} are {labels.dtype}",
            "Give class indices as integers, or probabilities of the shape of the logits; "
            "distill(label_weight=0) leaves labels out",
        )
    indices = (labels.flatten() if mask is None else labels[mask.bool()]).long()
    if len(indices) != rows:
        raise DataError(
            "CrossEntropy",
            f"{len(indices)} labels for {rows} predictions",
            "Give one class index for each example or position",
        )
    if not rows:
        return indices, 0
    low, high = indices.aminmax()
    if low >= 0 and high < classes:
        return indices, rows
    labelled = indices[indices != IGNORE]
    wrong = labelled[(labelled < 0) | (labelled >= classes)]
    if len(wrong):
        raise DataError(
            "CrossEntropy",
            f"label {int(wrong[0])} is none of the {classes} classes",
            f"Number the classes from 0 to {classes - 1}; {IGNORE} leaves a position out",
        )
    return indices, len(labelled)
