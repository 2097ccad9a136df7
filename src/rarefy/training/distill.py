"""Training on a teacher's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.copies import fingerprint, own_copy
from rarefy.distillation.losses import KD
from rarefy.errors import InputError, TrainingError
from rarefy.metrics import Metric, Top1
from rarefy.training.job import AfterStep, Job, Penalty, Trackers
from rarefy.training.loop import fit
from rarefy.training.networks import require_finite
from rarefy.training.objective import LossFunction, Objective
from rarefy.training.options import OPTIMIZERS, TrainOptions, with_changes
from rarefy.types import Data


def distill(
    teacher: nn.Module,
    student: nn.Module,
    data: Data,
    *,
    loss: LossFunction | None = None,
    label_weight: float = 0.1,
    options: TrainOptions | None = None,
    val: Data | None = None,
    seed: int = 0,
    progress: bool = True,
    after_step: AfterStep | None = None,
    regularizer: Penalty | None = None,
    metric: Metric | None = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    resume: bool = False,
    trackers: Trackers = None,
    **changes: Any,
) -> nn.Module:
    """Train a copy of the student to give the teacher's answers (Hinton et al. 2015).

    The objective is ``(1 - label_weight) * loss(student, teacher) + label_weight * cross entropy``
    on labelled batches and ``loss(student, teacher)`` on unlabelled ones. Both networks see the
    same inputs, so that augmentation in ``data`` is safe. The teacher works in eval mode without
    gradients. Where the inputs are a mapping with an ``attention_mask`` of the shape of a
    sequence's logits ``(B, L, C)`` without the classes, padding counts for nothing.

    Labels of sequences must stand at the position of their prediction: nothing is shifted.

    Args:
        teacher: the network to learn from; it is not changed.
        student: the network to train; it is not changed.
        data: batches, labelled or not, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(student_logits, teacher_logits)`` to a scalar, with ``mask=`` where there is
            one; None for ``KD(temperature=4)``.
        label_weight: share of the cross entropy on the true labels, 0 to 1.
        options: how to train; None for the defaults of :class:`TrainOptions`.
        val: labelled batches; the metric of teacher and student on them is shown before the
            first step, that of the student after every epoch.
        seed: as for :func:`train`, as are the arguments that follow.
        progress: show progress.
        after_step: called with the student after every optimizer step.
        regularizer: ``penalty(student, step)``, added to the objective.
        metric: as for :func:`train`, as are the arguments that follow.
        checkpoint: a folder for checkpoints.
        every: optimizer steps between two of them.
        resume: go on from the newest.
        trackers: where the history goes.
        **changes: single fields of ``options``.

    Returns:
        The trained student, in eval mode.

    Raises:
        InputError: the student has nothing to train, a network holds NaN, the two have other
            numbers of classes, or an option is out of range.
        DataError: the data are empty, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite, or the teacher changed.

    Example:
        >>> student = distill(nn.Linear(4, 2), nn.Linear(4, 2), [torch.zeros(8, 4)],
        ...                   epochs=1, progress=False)
    """
    if not 0 <= label_weight <= 1:
        raise InputError(
            f"distill(label_weight={label_weight!r})", "it is a share, 0 to 1", "Write 0.1"
        )
    if getattr(loss, "against", "teacher") != "teacher":
        raise InputError(
            f"distill(loss={loss!r})",
            "it compares with labels, not with a teacher",
            "Give KD() or MSE(); label_weight is the share of the labels",
        )
    chosen = with_changes("distill", options, changes)
    if chosen.lr is None:
        chosen = replace(chosen, lr=OPTIMIZERS[chosen.optimizer].gentle)
    job = Job(
        "distill",
        chosen,
        val,
        seed,
        progress,
        after_step,
        regularizer,
        metric or Top1(),
        None if checkpoint is None else Path(checkpoint),
        every,
        resume,
        trackers,
    )
    require_finite(teacher, "distill(teacher)", InputError, "Check the checkpoint")
    own = own_copy(teacher, "distill(teacher)")
    objective = Objective("distill", own_copy(student, "distill"), loss or KD(), own, label_weight)
    before = fingerprint(own)
    result = fit(objective, data, job)
    if fingerprint(own) != before:
        raise TrainingError(
            "distill(teacher)",
            "the teacher's weights or buffers changed while it only answered",
            "Take out of its forward what writes to them, such as statistics kept in eval mode",
        )
    return result
