"""Training on a teacher's answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.batches import (
    batches,
    call,
    device_of,
    evaluating,
    logits,
    moved,
    seeded,
    tensors,
    unchanged,
)
from rarefy.copies import own_copy
from rarefy.distillation.losses import KD, FeatureLoss
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.errors import InputError, RarefyError, first_line
from rarefy.metrics import Metric, Top1
from rarefy.process import replayable, set_epoch
from rarefy.training.job import AfterStep, Job, Penalty, Trackers
from rarefy.training.loop import fit, require_usable
from rarefy.training.networks import require_trainable
from rarefy.training.objective import LossFunction, Objective, unheard
from rarefy.training.options import OPTIMIZERS, TrainOptions, with_changes
from rarefy.training.record import Trained
from rarefy.training.stored import Joined, require_answerable
from rarefy.training.teachers import Teacher, Tutor, as_teacher
from rarefy.training.terms import bindings, heads_for, paired
from rarefy.types import Data, Inputs, check_network


def distill(
    teacher: nn.Module | Teacher | SoftLabels,
    student: nn.Module,
    data: Data,
    *,
    loss: LossFunction | None = None,
    label_weight: float = 0.1,
    label_loss: LossFunction | None = None,
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
    gradients, and it is an error if its weights or buffers change meanwhile. The same call heals a
    pruned network (with the original as the teacher; ``after_step=rf.hold(student)`` keeps zeros)
    and trains a quantized one, whose gradients pass its rounding straight through.

    The loss may have terms of features, which name modules: ``KD() + 10 * FitNet().at("layer2",
    teacher="layer4")``. What such a term learns along, a projector between unequal shapes for
    example, is trained by the student's optimizer and is gone from the result. The path ``"*"``
    leaves the pairing to :func:`~rarefy.distillation.pairing.pairs`. Weights and temperatures may
    be schedules over the steps.

    Where the inputs are a mapping with an ``attention_mask`` (B, L), padding counts for nothing in
    logits and features (B, L, C). Where logits have other positions, as after subsampling, or the
    inputs have lengths instead, the student gives the mask of its logits as ``mask`` (B, L) beside
    its ``logits``; without it padding counts. Labels of sequences must stand at the position of
    their prediction: nothing is shifted. Dense outputs (B, C, H, W) take losses that name the
    classes, ``KD(dim=1)``; image-to-image networks take ``loss=L2()`` and
    ``label_loss=nn.functional.l1_loss``.

    Before the first step the whole objective is computed on the first batch, which is read once
    more for that, so that what does not fit is known at once.

    Args:
        teacher: the network to learn from, which is not changed; or one of ``rf.teachers``,
            ``Ensemble([...])`` for several, ``Earlier()`` for the student itself as it was,
            ``Peer(network)`` for one that learns along; or ``rf.SoftLabels(path)`` for stored
            answers, where no teacher runs.
        student: the network to train; it is not changed.
        data: batches, labelled or not, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(student_logits, teacher_logits)`` to a scalar, with ``mask=`` where there is
            one; None for ``KD(temperature=4)``. From a store of log-probabilities only losses
            learn that do not change where a constant is added to all logits, and from one of
            draws :class:`~rarefy.losses.KD` at their temperature.
        label_weight: share of the loss on the true labels, 0 to 1.
        label_loss: ``loss(student_logits, labels)`` to a scalar, for labels of any kind, with
            ``mask=`` where there is one and the function takes it; None for
            :class:`~rarefy.losses.CrossEntropy`.
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
        The trained student, in eval mode; its ``trained`` says what was done, as for
        :func:`train`, and holds the peer where there is one.

    Raises:
        InputError: the student has nothing to train, a network holds NaN or answers with NaN, the
            two have other numbers of classes, a path is no module's, or an option is out of range.
        DataError: the data are empty, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite, or the teacher changed.

    Example:
        >>> import torch
        >>> student = distill(nn.Linear(4, 2), nn.Linear(4, 2), [torch.zeros(8, 4)],
        ...                   epochs=1, progress=False)
    """
    loss = loss or KD()
    _require_sensible(student, loss, label_weight)
    if isinstance(teacher, SoftLabels):
        require_answerable(loss, teacher)
    chosen = with_changes("distill", options, changes)
    if chosen.lr is None and isinstance(chosen.optimizer, str):
        chosen = replace(chosen, lr=OPTIMIZERS[chosen.optimizer].gentle)
    require_trainable(student, "distill")
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
    require_usable(data, job)
    own = own_copy(student, "distill")
    with seeded(seed), replayable(data):
        tutor, taught = _begin(teacher, own, data)
        first, taught = _first(taught)
        objective = _objective(own, tutor, first, loss, label_weight, label_loss)
    return _ended(fit(objective, taught, job), tutor)


def _require_sensible(student: object, loss: Any, label_weight: float) -> None:
    check_network(student, "distill(student)")
    if not isinstance(label_weight, int | float) or not 0 <= label_weight <= 1:
        raise InputError(
            f"distill(label_weight={label_weight!r})", "it is a share, 0 to 1", "Write 0.1"
        )
    if not callable(loss) or isinstance(loss, type):
        raise InputError(
            f"distill(loss={loss!r})", "it is no loss that can be called", "Give KD() or MSE()"
        )
    if isinstance(loss, FeatureLoss):
        name = type(loss).__name__
        raise InputError(
            f"distill(loss={name}(...))",
            "it compares features, and does not say which",
            f"Name the module: KD() + {name}(...).at('layer3'), or leave the pairing to '*'",
        )
    if getattr(loss, "against", "teacher") == "labels":
        raise InputError(
            f"distill(loss={loss!r})",
            "it compares with labels, not with a teacher",
            "Give KD() or MSE(); label_weight is the share of the labels",
        )


def _ended(student: nn.Module, tutor: Tutor | None) -> nn.Module:
    """The student, whose record holds a network that was trained along."""
    if tutor is not None:
        tutor.finish("distill(teacher)")
    record: Any = student.trained
    if tutor is not None and tutor.learns and isinstance(record, Trained):
        peer = tutor.network.to(device_of(student))
        student.trained = replace(record, peer=peer)  # type: ignore[assignment]
    return student


def _begin(teacher: Any, student: nn.Module, data: Data) -> tuple[Tutor | None, Data]:
    """The teacher at work, or none and the data with what it said of them."""
    if isinstance(teacher, SoftLabels):
        return None, Joined(teacher, data)
    where = "distill(teacher)"
    return as_teacher(teacher, where).start(student, where), data


def _first(data: Data) -> tuple[tuple[Inputs, Any], Data]:
    """The first batch, and the data that still begin with it."""
    first = next(batches(data, "distill(data)"))
    if isinstance(data, Iterator):
        return first, itertools.chain([first], data)
    set_epoch(data, 0)
    return first, data


def _objective(
    student: nn.Module,
    tutor: Tutor | None,
    first: tuple[Inputs, Any],
    loss: LossFunction,
    label_weight: float,
    label_loss: LossFunction | None,
) -> Objective:
    """The objective, tried on the first batch."""
    device = device_of(student)
    inputs, labels = moved(first[0], device), first[1]
    notes, heads = tuple[str, ...](), nn.ModuleDict()
    if tutor is not None:
        tutor = tutor.to(device)
        _require_numbers(tutor, inputs)
        loss, found = paired(loss, student, tutor.network, inputs)
        notes = tuple(f"features: {pair}" for pair in found)
        heads = heads_for(loss, student, tutor.network, inputs)
    elif bindings(loss):
        raise InputError(
            "distill(loss)",
            "it compares features, and a store holds outputs alone",
            "Give the teacher itself, or a loss of outputs",
        )
    with unchanged(student):
        _answers("distill(student)", student, lambda: logits(call(student, inputs)), inputs)
    objective = Objective("distill", student, loss, tutor, label_weight, label_loss)
    objective.heads, objective.notes = heads, notes
    with evaluating(objective), unchanged(student):
        objective(inputs, labels)
    if tutor is not None and not tutor.learns:
        tutor.finish("distill(teacher)")  # known now, not after hours
    return objective


def _require_numbers(tutor: Tutor, inputs: Inputs) -> None:
    answers = _answers("distill(teacher)", tutor, lambda: tutor(inputs), inputs)
    wrong = unheard(answers)
    if wrong.any():
        raise InputError(
            "distill(teacher)",
            f"{int(wrong.sum())} of the {answers.numel()} numbers that the {tutor.name} "
            "gives for the first batch are NaN or +inf",
            "Check the teacher, its precision and the inputs",
        )


def _answers(
    where: str, network: nn.Module, answer: Callable[[], Tensor], inputs: Inputs
) -> Tensor:
    """What a network says to the first batch.

    Raises:
        InputError: it does not run on it, or holds no logits.
    """
    try:
        with evaluating(network):
            return answer()
    except RarefyError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(inputs))
        raise InputError(
            where,
            f"it does not run on the first batch ({shapes.replace('torch.', '')}): "
            f"{first_line(error)}",
            "Give a network that takes what the data yield",
        ) from error
