"""Shapes of outputs: where the classes are, which positions count, and in which precision.

Logits are ``(B, C)``, or ``(B, L, C)`` for sequences, with the classes in the **last** dimension;
any other layout, such as ``(B, C, H, W)``, is named by its dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.distillation.losses.arithmetic import precise
from rarefy.errors import DataError, InputError

IGNORE = -100
"""A label that counts for nothing, as in PyTorch and transformers."""


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
            f"Give (B, C) or (B, L, C), or name the dimension: {where}(dim=1) for (B, C, H, W); "
            "outputs that are no classes, such as images, are compared by L2() or L1()",
        )
    return dim % logits.ndim


def label_dim(where: str, logits: Tensor, labels: Tensor) -> int:
    """The class dimension of logits that fits class indices.

    Of (B, C) and (B, L, C) the last, else 1; of maps (B, C, H, W), and of more dimensions, 1, else
    the last.

    Raises:
        DataError: neither does.
    """
    last = logits.ndim - 1
    for dim in (last, 1) if last < 3 else (1, last):
        if 0 < dim <= last and without(logits, dim) == tuple(labels.shape):
            return dim
    raise DataError(
        where,
        f"{str(labels.dtype).removeprefix('torch.')} labels of shape {tuple(labels.shape)} do not "
        f"fit logits of shape {tuple(logits.shape)}",
        "Give one class index for each example or position, for example (B,) for (B, C); labels of "
        "another kind need a loss and a metric of their own",
    )


def without(logits: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of logits without the class dimension."""
    shape: Sequence[int] = logits.shape
    return (*shape[:dim], *shape[dim + 1 :])


def pair(
    where: str, student: Tensor, teacher: Tensor, dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of both, ``(N, C)`` each; those of the teacher receive no gradients."""
    found = class_dim(where, student, dim)
    require_same_logits(where, student, teacher, found)
    return rows(where, student, found, mask), rows(where, teacher.detach(), found, mask)


def choices(
    where: str, student: Tensor, teacher: Tensor, dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`pair` of logits whose softmax means something: of two classes or more.

    Raises:
        InputError: there is one class; otherwise as :func:`pair`.
    """
    found = pair(where, student, teacher, dim, mask)
    require_choice(where, found[0])
    return found


def require_choice(where: str, found: Tensor) -> None:
    """Refuse rows ``(N, 1)``: any loss of their softmax is constant, and nothing is learned.

    Raises:
        InputError: there is one class.
    """
    if found.shape[-1] < 2:
        raise InputError(
            where,
            "the logits have one class, whose probability is 1 whatever the network says",
            "Use Binary() and nn.BCEWithLogitsLoss() for outputs of a sigmoid, L2() and "
            "nn.MSELoss() for real numbers",
        )


def require_probabilities(where: str, targets: Tensor) -> None:
    """Refuse rows ``(N, C)`` that are no probabilities of classes that exclude each other.

    Raises:
        DataError: numbers are negative, or do not sum to 1.
    """
    total = targets.sum(-1)
    wrong = ((total - 1).abs() > 0.01) | (targets < 0).any(-1)
    if wrong.any():
        raise DataError(
            where,
            "labels of the shape of the logits are taken for probabilities, and those of one "
            f"example sum to {float(total[wrong][0]):g}, or are negative",
            "Give class indices, or probabilities that sum to 1; name the loss for labels of "
            "another kind, nn.BCEWithLogitsLoss() for multi-label or nn.MSELoss() for real numbers",
        )


def require_same_logits(where: str, student: Tensor, teacher: Tensor, found: int) -> None:
    """Refuse logits of different shapes, saying whether it is the classes, in dimension ``found``.

    Raises:
        InputError: they differ.
    """
    if student.shape != teacher.shape:
        classes = student.ndim == teacher.ndim and student.shape[found] != teacher.shape[found]
        raise InputError(
            where,
            f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ"
            + (f": {student.shape[found]} and {teacher.shape[found]} classes" if classes else ""),
            "Give student and teacher the same classes, in the same order, and the same inputs",
        )


def rows(where: str, logits: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """The logits that count as ``(N, C)``, in float32 or better."""
    if not logits.is_floating_point():
        raise InputError(where, f"logits are {logits.dtype}", "Give floating-point logits")
    if mask is not None:
        require_mask(where, logits, dim, mask)
    last = logits.movedim(dim, -1)
    return precise(last.flatten(0, -2) if mask is None else last[mask.bool()])


def require_mask(where: str, tensor: Tensor, dim: int, mask: Tensor) -> None:
    """Refuse a mask that has not the shape of a tensor without its classes or channels.

    Raises:
        InputError: it has another.
    """
    if tuple(mask.shape) != without(tensor, dim):
        raise InputError(
            where,
            f"a mask of shape {tuple(mask.shape)} does not fit a tensor of {tuple(tensor.shape)}",
            f"Give a mask of shape {without(tensor, dim)}",
        )


def require_labels(where: str, logits: Tensor, dim: int | None, labels: Tensor) -> None:
    """Refuse labels that are not one class index for each example or position.

    Raises:
        DataError: they are of another shape or type.
    """
    wanted = without(logits, class_dim(where, logits, dim))
    if tuple(labels.shape) != wanted or labels.is_floating_point():
        raise DataError(
            where,
            f"labels of shape {tuple(labels.shape)}, {labels.dtype}, are no classes of logits of "
            f"shape {tuple(logits.shape)}",
            f"Give class indices of shape {wanted}, or no labels",
        )


def indices(
    where: str, labels: Tensor, mask: Tensor | None, count: int, classes: int
) -> tuple[Tensor, int]:
    """Class indices ``(N,)`` as int64, and how many of them count."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            where,
            f"labels of shape {tuple(labels.shape)} are {labels.dtype}",
            "Give class indices as integers, or probabilities of the shape of the logits; "
            "distill(label_weight=0) leaves labels out",
        )
    found = (labels.flatten() if mask is None else labels[mask.bool()]).long()
    if len(found) != count:
        raise DataError(
            where,
            f"{len(found)} labels for {count} predictions",
            "Give one class index for each example or position",
        )
    if not count:
        return found, 0
    low, high = found.aminmax()
    if low >= 0 and high < classes:
        return found, count
    labelled = found[found != IGNORE]
    wrong = labelled[(labelled < 0) | (labelled >= classes)]
    if len(wrong):
        raise DataError(
            where,
            f"label {int(wrong[0])} is none of the {classes} classes",
            f"Number the classes from 0 to {classes - 1}; {IGNORE} leaves a position out",
        )
    return found, len(labelled)
