"""The metric that every stage is measured with, whatever computes the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rarefy.batches import batches, logits
from rarefy.distillation.losses import IGNORE, label_dim
from rarefy.errors import DataError, InputError
from rarefy.types import Data, Inputs


def top1(predict: Callable[[Inputs], Any], data: Data, *, where: str = "top1") -> float:
    """Top-1 accuracy: the share of labels that have the highest logit, 0 to 1.

    For logits of several positions, ``(B, L, C)`` or ``(B, C, H, W)``, every position labelled
    other than -100 counts.

    Args:
        predict: inputs to logits of shape (B, C), (B, L, C) or (B, C, H, W), or to what holds them
            as ``logits``.
        data: labelled batches, see :mod:`rarefy.batches`.
        where: the call that errors name.

    Raises:
        DataError: the data are empty or not labelled, or labels do not fit the logits.
        InputError: the logits hold NaN, or there are none.

    Example:
        >>> top1(lambda x: x, [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    right = count = 0
    with torch.no_grad():
        for inputs, labels in batches(data, f"{where}(data)"):
            answers = logits(predict(inputs))
            hits = _hits(where, answers, tensor_of_labels(where, labels).to(answers.device))
            right, count = right + int(hits.sum()), count + len(hits)
    if not count:
        raise DataError(
            f"{where}(data)", "no position has a label", f"Label some other than {IGNORE}"
        )
    return right / count


def tensor_of_labels(where: str, labels: Any) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: the batch is not labelled, or not with a tensor.
    """
    if isinstance(labels, Tensor):
        return labels
    what = "a batch is unlabelled" if labels is None else f"labels are a {type(labels).__name__}"
    raise DataError(
        f"{where}(data)",
        what,
        "Yield (inputs, labels) with a tensor of labels; distill(...) needs none",
    )


def _hits(where: str, answers: Tensor, labels: Tensor) -> Tensor:
    """For every labelled position whether its highest logit is that of the label."""
    dim = label_dim(f"{where}(data)", answers, labels)
    best, classes = answers.argmax(dim=dim), answers.shape[dim]
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DataError(
            f"{where}(data)",
            f"label {int(wrong[0])} is none of the network's {classes} classes",
            f"Number the classes from 0 to {classes - 1}",
        )
    if answers.isnan().any():
        raise InputError(f"{where}(model)", "its logits hold NaN", "Check its weights and the data")
    return (best == labels)[labels != IGNORE]
