"""Losses against the true labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.base import SHARE_BELOW_ONE, Against, Loss, Number, require
from rarefy.distillation.losses.layouts import (
    IGNORE,
    class_dim,
    indices,
    label_dim,
    pair,
    require_choice,
    require_probabilities,
    rows,
)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross entropy of the logits with the true labels.

    Labels are class indices of the shape of the logits without the class dimension (positions
    labelled -100 count for nothing), or probabilities of the shape of the logits. Szegedy et al.
    2016, "Rethinking the Inception Architecture", section 7, for label smoothing.

    Args:
        label_smoothing: the share of the label that is spread evenly over all classes, in [0, 1).
        dim: dimension of the classes; None for the one that fits the labels: the last of (B, C)
            and (B, L, C), else 1; 1 of maps (B, C, H, W), else the last.

    Raises:
        InputError: the share is out of range; when called, there is one class.
        DataError: when called, the labels do not fit the logits, one is no class, or probabilities
            do not sum to 1.

    Example:
        >>> round(CrossEntropy()(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.6931
    """

    label_smoothing: Number = 0.0
    dim: int | None = None
    against: ClassVar[Against] = "labels"

    def __post_init__(self) -> None:
        require(self, SHARE_BELOW_ONE, "label_smoothing")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        if reference.shape == logits.shape and reference.is_floating_point():
            found, targets = pair("CrossEntropy", logits, reference, self.dim, mask)
            require_probabilities("CrossEntropy", targets)
            count = len(found)
        else:
            dim = label_dim("CrossEntropy", logits, reference) if self.dim is None else self.dim
            found = rows("CrossEntropy", logits, class_dim("CrossEntropy", logits, dim), mask)
            targets, count = indices("CrossEntropy", reference, mask, len(found), found.shape[-1])
        require_choice("CrossEntropy", found)
        total = F.cross_entropy(
            found,
            targets,
            reduction="sum",
            ignore_index=IGNORE,
            label_smoothing=self.number("label_smoothing"),
        )
        return total / max(count, 1)
