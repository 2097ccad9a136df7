"""What is minimized: a batch to a loss, against its labels or against a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import call, logits
from rarefy.distillation.losses import CrossEntropy
from rarefy.metrics import tensor_of_labels
from rarefy.types import Inputs

LossFunction: TypeAlias = Callable[..., Tensor]
"""``loss(logits, reference)`` to a scalar, such as those of :mod:`rarefy.distillation.losses`."""


class Network(nn.Module):
    """Inputs to logits. What Accelerate wraps and patches is this, never the user's network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return logits(call(self.model, inputs))


class Objective(nn.Module):
    """A batch to the loss: against its labels, or against a teacher."""

    def __init__(
        self,
        where: str,
        loss: LossFunction,
        teacher: nn.Module | None = None,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.where, self.teacher = where, teacher
        # A module follows this one's device and mode; a copy, for the caller's stays as it is.
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
        self.label_weight, self.label_loss = label_weight, CrossEntropy()

    def forward(self, network: nn.Module, inputs: Inputs, labels: Tensor | None) -> Tensor:
        if self.teacher is None:
            student = network(inputs)
            return self.loss(student, self.labels(labels, student.device))
        with torch.no_grad():
            answers = logits(call(self.teacher, inputs))
        student = network(inputs)
        options = _mask(inputs, student)
        value = self.loss(student, answers, **options)
        if labels is None or not self.label_weight:
            return value
        hard = self.label_loss(student, self.labels(labels, student.device), **options)
        return (1 - self.label_weight) * value + self.label_weight * hard

    def labels(self, labels: Tensor | None, device: torch.device) -> Tensor:
        """The labels on a device, or an error where there are none."""
        return tensor_of_labels(self.where, labels).to(device, non_blocking=True)


def _mask(inputs: Inputs, answers: Tensor) -> dict[str, Tensor]:
    """``{"mask": ...}`` where the inputs say which positions of a sequence are padding."""
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    fits = isinstance(found, Tensor) and answers.ndim == 3 and found.shape == answers.shape[:2]
    return {"mask": found} if fits and found is not None else {}
