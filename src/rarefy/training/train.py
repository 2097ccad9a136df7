"""Training on labels."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.copies import own_copy
from rarefy.distillation.losses import CrossEntropy
from rarefy.training.loop import AfterStep, Job, Penalty, fit
from rarefy.training.objective import LossFunction, Objective
from rarefy.training.options import TrainOptions, with_changes
from rarefy.types import Data


def train(
    model: nn.Module,
    data: Data,
    *,
    loss: LossFunction | None = None,
    options: TrainOptions | None = None,
    val: Data | None = None,
    seed: int = 0,
    progress: bool = True,
    after_step: AfterStep | None = None,
    regularizer: Penalty | None = None,
    **changes: Any,
) -> nn.Module:
    """Train a copy of a network on labelled data.

    Accelerate chooses the device (``accelerate config`` and ``accelerate launch`` apply); the
    result is on the device of ``model``. All its modules are trained in training mode, all
    parameters with ``requires_grad`` are learned.

    Two runs with one seed on one machine are equal bit for bit. Where a ``DataLoader`` has a
    generator of its own, that generator decides the order and starts every run from the state that
    it has when the run begins; its state is put back afterwards, like the global random states.

    A batch of a single example is left out where the network has BatchNorm, which needs two.

    Args:
        model: the network; it is not changed.
        data: labelled batches, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(logits, labels)`` to a scalar; None for :class:`CrossEntropy`.
        options: how to train; None for the defaults of :class:`TrainOptions`.
        val: labelled batches whose top-1 accuracy is shown before the first step and after every
            epoch, and not computed where nothing is shown. It has no influence on the result: the
            last epoch is returned, not the best.
        seed: of shuffling, dropout and augmentation.
        progress: show a bar on a terminal, or a line for every epoch elsewhere, on stderr.
        after_step: called with the network after every optimizer step, for example to keep pruned
            weights at zero. It may change weights in place, and nothing else.
        regularizer: ``penalty(model, step)``, added to the loss.
        **changes: single fields of ``options``, for example ``epochs=30, lr=0.05``.

    Returns:
        The trained network, in eval mode.

    Raises:
        InputError: the network has nothing to train or holds NaN, or an option is out of range.
        DataError: the data are empty, not labelled, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite.

    Example:
        >>> net = train(nn.Linear(4, 2), [(torch.zeros(8, 4), torch.zeros(8).long())],
        ...             epochs=1, progress=False)
        >>> net.training
        False
    """
    job = Job(
        "train",
        with_changes("train", options, changes),
        val,
        seed,
        progress,
        after_step,
        regularizer,
    )
    objective = Objective("train", own_copy(model, "train"), loss or CrossEntropy())
    return fit(objective, data, job)
