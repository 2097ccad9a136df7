"""Training on labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rarefy.copies import own_copy
from rarefy.distillation.losses import CrossEntropy
from rarefy.metrics import Metric, Top1
from rarefy.training.job import AfterStep, Job, Penalty, Trackers
from rarefy.training.loop import fit
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
    metric: Metric | None = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    resume: bool = False,
    trackers: Trackers = None,
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

    Under ``torchrun`` or ``accelerate launch`` the processes share the batches of ``data``, so that
    a step takes as many batches as there are processes and weighs them as ``accumulate`` does; all
    of them return the same network, and only the first one shows and writes anything. A loader
    with a ``DistributedSampler``, or that Accelerate prepared, is each process's part already.
    Configured for FSDP 2, they hold gradients and the optimizer's state in shards.

    Args:
        model: the network; it is not changed.
        data: labelled batches, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(logits, labels)`` to a scalar; None for :class:`CrossEntropy`.
        options: how to train; None for the defaults of :class:`TrainOptions`.
        val: batches on which ``metric`` is computed before the first step and after every epoch.
            It has no influence on the result, unless ``keep="best"`` or ``patience`` is given: the
            last epoch is returned, not the best.
        seed: of shuffling, dropout and augmentation.
        progress: show a bar on a terminal, or a line for every epoch elsewhere, on stderr.
        after_step: called with the network after every optimizer step, for example to keep pruned
            weights at zero. It may change weights in place, and nothing else. In shards it finds
            no gradients.
        regularizer: ``penalty(model, step)``, added to the loss.
        metric: ``metric(model, data)`` to a number, see :mod:`rarefy.metrics`; None for top-1.
        checkpoint: a folder for checkpoints, written after every epoch, of which the newest two
            are kept; None for none. Where one cannot be written later, training goes on with a
            warning. Ctrl-C saves one more and stops after the step.
        every: optimizer steps between two more checkpoints; None for none within an epoch.
        resume: go on from the newest checkpoint that can be read, where there is one: weights,
            losses and history are then those of a training that was never stopped, bit for bit on
            the same machine with the same versions. Batches of the epoch that were seen are read
            again, and random numbers of the data must come from the global generators or that of
            the ``DataLoader`` (not from workers that persist). Data with a method
            ``set_epoch(epoch)`` are told which epoch begins, from 0.
        trackers: names of trackers that Accelerate knows, such as ``"tensorboard"``, which write
            below ``runs``, or objects of its ``GeneralTracker``; loss, learning rate and metric of
            every epoch go there.
        **changes: single fields of ``options``, for example ``epochs=30, lr=0.05``.

    Returns:
        The trained network, in eval mode. Its attribute ``trained`` is the
        :class:`~rarefy.training.record.Trained` record: history, best and last epoch, and the
        metric on ``val`` against a sample of the training data. (A network that has an attribute
        ``trained`` of its own keeps that.)

    Raises:
        InputError: the network has nothing to train or holds NaN, an option is out of range, the
            metric fails, or the checkpoint is of another training.
        DataError: the data are empty, not labelled, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite.
        OutputError: the folder cannot be written, or holds checkpoints and ``resume`` is not given.
        FormatError: none of the checkpoints in the folder can be read.

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
        metric or Top1(),
        None if checkpoint is None else Path(checkpoint),
        every,
        resume,
        trackers,
    )
    objective = Objective("train", own_copy(model, "train"), loss or CrossEntropy())
    return fit(objective, data, job)
