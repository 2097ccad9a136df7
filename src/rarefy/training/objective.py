"""What is minimized: a batch to a loss, against its labels or against a teacher."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, call, fitting, logits, mask_of, moved, padding_of
from rarefy.distillation.losses import CrossEntropy, Loss
from rarefy.distillation.taps import Taps, taps
from rarefy.errors import InputError
from rarefy.metrics import tensor_of_labels
from rarefy.training.stored import Answered, labels_of
from rarefy.training.teachers import Aside, Tutor
from rarefy.training.terms import Batch, bindings, of_features, of_outputs, paths_of
from rarefy.types import Inputs

LossFunction: TypeAlias = Callable[..., Tensor]
"""``loss(logits, reference)`` to a scalar, such as those of :mod:`rarefy.distillation.losses`."""


Weights: TypeAlias = tuple[float, float]
"""Of a batch's losses against the teacher and on the labels, among the batches of a step."""


class Objective(nn.Module):
    """A batch to the loss. What Accelerate wraps and patches is this, never the user's network.

    All that is trained is a submodule: the network, the heads of losses, which are dropped after
    training, and a teacher that learns along. The loss is computed in ``forward``, so that a
    wrapper which averages gradients over processes sees every use of every parameter. What only
    answers, a frozen teacher or a loss that is a module, is no submodule but beside them, see
    :class:`~rarefy.training.teachers.Aside`.

    Args:
        where: the call that errors name.
        network: what is trained, in place.
        loss: ``loss(logits, labels)``, or ``loss(student_logits, teacher_logits)``, perhaps with
            terms of features.
        tutor: a teacher at work; None to learn from labels, or from answers that come with them.
        label_weight: the share of ``label_loss`` where a teacher answers.
        label_loss: ``loss(logits, labels)``.

    Attributes:
        heads: what terms of features train along, by the number of the term.
        notes: what to tell the user before the first step.
        heard: what the teacher said to the last batch.
        positions: whether the ``attention_mask`` of the inputs said which of its logits count.
    """

    def __init__(
        self,
        where: str,
        network: nn.Module,
        loss: LossFunction,
        tutor: Tutor | None = None,
        label_weight: float = 0.0,
        label_loss: LossFunction | None = None,
    ) -> None:
        super().__init__()
        self.where, self.network, self.tutor = where, network, tutor
        self.loss, self.label_weight = _own(loss), label_weight
        self.label_loss = _own(label_loss or CrossEntropy())
        self.masked, self.label_masked = takes_mask(self.loss), takes_mask(self.label_loss)
        self.scheduled = any(at_step(x, 0) is not x for x in (self.loss, self.label_loss))
        self.heads, self.notes = nn.ModuleDict(), tuple[str, ...]()
        self.heard: Tensor | None = None
        self.positions = False
        places = bindings(loss)
        self.ours = tuple(path for place in places for path in paths_of(place.student))
        self.theirs = tuple(path for place in places for path in paths_of(place.teacher))

    def forward(
        self,
        inputs: Inputs,
        labels: Any,
        step: int = 0,
        weights: Weights = (1.0, 1.0),
        penalty: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The loss of a batch at a step of the optimizer, a scalar; with a penalty on weights."""
        value = self._loss(inputs, labels, step, weights)
        if penalty is not None:
            with torch.autocast(value.device.type, enabled=False):
                value = value + penalty()
        return value

    def _loss(self, inputs: Inputs, labels: Any, step: int, weights: Weights) -> Tensor:
        loss, label_loss = self.loss, self.label_loss
        if self.scheduled:
            loss, label_loss = at_step(loss, step), at_step(label_loss, step)
        if self.tutor is None and not isinstance(labels, Answered):
            student, options = self._answer(inputs)
            options = options if self.masked else {}
            value = loss(student, self._labels(loss, labels, student), **options)
            return weights[1] * self._scalar("loss", value)
        batch, ours, theirs = self._run(inputs, labels)
        value = self._scalar("loss", of_outputs(loss, batch.apart()))
        if ours is not None and theirs is not None:
            value = value + of_features(loss, self.heads, ours, theirs, batch.padding)
        if not step:
            self._require_gradient(value)
        total = self._mixed(value, label_loss, batch, weights)
        if self.tutor is not None and self.tutor.learns:
            batch = batch.swapped()
            value = self._scalar("loss", of_outputs(loss, batch.apart()))
            total = total + self._mixed(value, label_loss, batch, weights)
        return total

    def _run(self, inputs: Inputs, labels: Any) -> tuple[Batch, Taps | None, Taps | None]:
        """Both networks on a batch, and the features that the loss compares."""
        stored = labels if isinstance(labels, Answered) else None
        if stored is not None:
            answers, labels, theirs = stored.answers, stored.labels, None
        else:
            assert self.tutor is not None
            with self._tapped(self.tutor.network, self.theirs) as theirs:
                answers = self.tutor(inputs)
        with self._tapped(self.network, self.ours) as ours:
            student, options = self._answer(inputs)
        needed = getattr(self.loss, "needs_labels", False)
        if labels is not None and (needed or self.label_weight):
            labels = self._labels(self.label_loss, labels, student)
        answers = answers.to(student.device, non_blocking=True)
        self.heard = answers
        if options and not self.masked:
            raise InputError(
                f"{self.where}(loss)",
                "it takes no mask=, and these sequences have one: padding would count",
                "Write loss(student_logits, teacher_logits, mask=None), a mean over the positions "
                "where the mask is not 0",
            )
        return Batch(student, answers, options, labels, padding_of(inputs)), ours, theirs

    def _answer(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's logits, and ``mask=`` of them: its own, else that of the inputs."""
        outputs = call(self.network, inputs)
        student = logits(outputs)
        own, given = (fitting(m, student) for m in (mask_of(outputs), padding_of(inputs)))
        self.positions = given is not None and own is None
        mask = given if own is None else own
        return student, {} if mask is None else {"mask": mask}

    def answered(self, inputs: Inputs) -> int:
        """What the loss against a teacher is a mean over: positions that count, or examples.

        Where the network itself gives the mask, it is not known before it ran: examples.
        """
        padding = padding_of(inputs)
        if self.positions and padding is not None:
            return int(padding.count_nonzero())
        return batch_size(inputs)

    def _mixed(
        self, value: Tensor, label_loss: LossFunction, batch: Batch, weights: Weights
    ) -> Tensor:
        """The loss against a teacher, and that against the labels where there are some."""
        value = weights[0] * value
        if batch.labels is None or not self.label_weight:
            return value
        options = batch.options if self.label_masked else {}
        hard = self._scalar("label_loss", label_loss(batch.student, batch.labels, **options))
        return (1 - self.label_weight) * value + self.label_weight * weights[1] * hard

    def _scalar(self, name: str, value: Any) -> Tensor:
        """The value of a loss, or an error where it is not one number."""
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        found = type(value).__name__
        if isinstance(value, Tensor):
            found = f"tensor of shape {tuple(value.shape)}"
        raise InputError(
            f"{self.where}({name})",
            f"it gives a {found}",
            'Return one number as a tensor: reduction="mean", and no .item()',
        )

    def _require_gradient(self, value: Tensor) -> None:
        """Refuse a loss that no gradient comes from: the others would be all that is learned."""
        if torch.is_grad_enabled() and not value.requires_grad:
            raise InputError(
                f"{self.where}(loss)",
                "no gradient comes from it to the student",
                "Compute it from the student's logits, and detach them neither in the loss nor in "
                "the network",
            )

    def _tapped(self, network: nn.Module, paths: tuple[str, ...]) -> AbstractContextManager[Any]:
        return taps(network, paths, where=f"{self.where}(loss)") if paths else nullcontext()

    def _labels(self, loss: LossFunction, labels: Any, student: Tensor) -> Any:
        """A copy of the labels on the device of the outputs, or an error where there are none."""
        if isinstance(loss, Loss) or labels is None:
            labels = tensor_of_labels(self.where, labels)
        return moved(labels, student.device)

    def heeds(self, labels: Any) -> bool:
        """Whether it learns from these labels of a batch, and not from a teacher alone."""
        alone = self.tutor is None and not isinstance(labels, Answered)
        return labels_of(labels) is not None and (alone or bool(self.label_weight))

    def after_step(self) -> None:
        """What follows the network does so, after a step of the optimizer."""
        if self.tutor is not None:
            self.tutor.after_step(self.network)

    def misheard(self) -> bool:
        """Whether no student can learn from the last answers of the teacher."""
        return self.heard is not None and bool(unheard(self.heard).any())

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Name to network of those that it learns from."""
        return {} if self.tutor is None else {self.tutor.name: self.tutor.network}


def unheard(answers: Tensor) -> Tensor:
    """Where answers are NaN or +inf; a logit of -inf rules a class out."""
    return answers.isnan() | (answers == math.inf)


def at_step(loss: LossFunction, step: int) -> LossFunction:
    """A loss whose schedules are the numbers of a step."""
    return loss.at_step(step) if isinstance(loss, Loss) else loss


def _own(loss: LossFunction) -> LossFunction:
    """A copy of a loss that is a module, for it is moved and the caller's stays where it is."""
    return Aside(copy.deepcopy(loss)) if isinstance(loss, nn.Module) else loss


def takes_mask(loss: LossFunction) -> bool:
    """Whether a loss can be called with ``mask=``."""
    try:
        known = inspect.signature(loss.module.forward if isinstance(loss, Aside) else loss)
    except (TypeError, ValueError):  # of some builtin functions nothing is known
        return False
    return any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in known.parameters.values())
