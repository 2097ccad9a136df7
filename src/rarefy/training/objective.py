"""What is minimized: a batch to a loss, against its labels or against a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import call, logits
from rarefy.distillation.losses import CrossEntropy
from rarefy.metrics import tensor_of_labels
from rarefy.types import Inputs

LossFunction: TypeAlias = Callable[..., Tensor]
"""``loss(logits, reference)`` to a scalar, such as those of :mod:`rarefy.distillation.losses`."""


class Objective(nn.Module):
    """A batch to the loss. What Accelerate wraps and patches is this, never the user's network.

    All that is trained is a submodule: the network, and the heads of losses, which are dropped
    after training. The loss is computed in ``forward``, so that a wrapper which averages gradients
    over processes sees every use of every parameter. What only answers, a teacher or a loss that is
    a module, is no submodule: ``train()``, optimizers, wrappers and checkpoints do not see it. It
    stays in eval mode without gradients, and moves along.

    Args:
        where: the call that errors name.
        network: what is trained, in place.
        loss: ``loss(logits, labels)``, or ``loss(student_logits, teacher_logits)``.
        teacher: a network of our own whose answers are learned; None to learn from labels.
        label_weight: with a teacher, the share of the cross entropy.
    """

    def __init__(
        self,
        where: str,
        network: nn.Module,
        loss: LossFunction,
        teacher: nn.Module | None = None,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.where, self.network, self.heads = where, network, nn.ModuleDict()
        # A copy, for it is moved and the caller's stays where it is.
        self.loss = Aside(copy.deepcopy(loss)) if isinstance(loss, nn.Module) else loss
        self.teacher = None if teacher is None else Aside(teacher)
        self.label_weight, self.label_loss = label_weight, CrossEntropy()

    def forward(self, inputs: Inputs, labels: Tensor | None, step: int = 0) -> Tensor:
        """The loss of a batch at a step of the optimizer, a scalar."""
        if self.teacher is None:
            student = logits(call(self.network, inputs))
            return self.loss(student, self.labels(labels, student.device))
        with torch.no_grad():
            answers = logits(call(self.teacher, inputs))
        student = logits(call(self.network, inputs))
        options = _mask(inputs, student)
        value = self.loss(student, answers, **options)
        if labels is None or not self.label_weight:
            return value
        hard = self.label_loss(student, self.labels(labels, student.device), **options)
        return (1 - self.label_weight) * value + self.label_weight * hard

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Name to network of those that it learns from."""
        return {} if self.teacher is None else {"teacher": self.teacher.module}

    def labels(self, labels: Tensor | None, device: torch.device) -> Tensor:
        """The labels on a device, or an error where there are none."""
        return tensor_of_labels(self.where, labels).to(device, non_blocking=True)


class Aside(nn.Module):
    """A module that is called and moved, and otherwise hidden from what holds it.

    It is in eval mode and its parameters are not trained, though gradients pass through it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module.eval().requires_grad_(False),)

    @property
    def module(self) -> nn.Module:
        """What is held."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of it."""
        return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Aside:
        """Moves go through this method of PyTorch, whatever their names."""
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _mask(inputs: Inputs, answers: Tensor) -> dict[str, Tensor]:
    """``{"mask": ...}`` where the inputs say which positions of a sequence are padding."""
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    fits = isinstance(found, Tensor) and answers.ndim == 3 and found.shape == answers.shape[:2]
    return {"mask": found} if fits and found is not None else {}
