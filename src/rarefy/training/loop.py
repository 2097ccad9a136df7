"""The one training loop, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, batches, seeded
from rarefy.errors import DataError, InputError, TrainingError
from rarefy.process import local_share, own_accelerator, quiet_setup, replayable
from rarefy.progress import EpochDisplay
from rarefy.training.evaluate import evaluate
from rarefy.training.networks import (
    device_of,
    has_batch_norm,
    moved,
    require_finite,
    require_trainable,
)
from rarefy.training.objective import Objective
from rarefy.training.options import TrainOptions, optimizer_of, schedule_of
from rarefy.types import Data, Inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

AfterStep: TypeAlias = Callable[[nn.Module], None]
"""Called with the network after every optimizer step."""

Penalty: TypeAlias = Callable[[nn.Module, int], Tensor]
"""``penalty(model, step)`` to a scalar that is added to the loss, such as those of
:mod:`rarefy.pruning.sparsity.regularize`."""


@dataclass(frozen=True)
class Job:
    """The arguments that every kind of training shares."""

    where: str
    options: TrainOptions
    val: Data | None
    seed: int
    progress: bool
    after_step: AfterStep | None
    regularizer: Penalty | None


def fit(objective: Objective, data: Data, job: Job) -> nn.Module:
    """Train the network of an objective in place, and return it where it was, in eval mode."""
    network = objective.network
    require_trainable(network, job.where)
    device = device_of(network)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(job.seed),
        replayable(data, job.val),
        own_accelerator() as accelerator,
    ):
        loop = _Loop(objective, local_share(data, accelerator), job, accelerator)
        with loop.display:
            loop.run()
    for parameter in network.parameters():
        parameter.grad = None
    return network.to(device).eval()


class _Loop:
    """The state of one training run."""

    def __init__(
        self,
        objective: Objective,
        data: Data,
        job: Job,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.data, self.objective, self.job = objective.network, data, objective, job
        self.options, self.accelerator = job.options, accelerator
        self.length, self.steps = operator.length_hint(data, 0), 0
        steps = max(self.length, 1) * self.options.epochs
        self.schedule = schedule_of(self.options, steps)
        with quiet_setup():
            built = optimizer_of(objective.to(accelerator.device).train(), self.options)
            self.wrapped, wrapped = accelerator.prepare(objective, built)
        # Accelerate's wrapper costs 0.3 ms a step: only where it does something.
        plain = accelerator.distributed_type == "NO" and accelerator.scaler is None
        self.optimizer = built if plain else wrapped
        self.peak = self.optimizer.param_groups[0]["lr"]
        self.needs_two = has_batch_norm(self.model)
        shown = job.progress and accelerator.is_main_process
        self.val = job.val if shown else None  # accuracy is for the eye only
        self.display = EpochDisplay(job.where, self.options.epochs, self.length, shown)

    def run(self) -> None:
        """All epochs; the model is trained in place."""
        for text in self.objective.notes:
            self.display.note(text)
        if self.val is not None:
            before = {**self.objective.teachers, "before": self.model}
            found = {name: evaluate(network, self.val) for name, network in before.items()}
            self.display.note("  ".join(f"{k} {v:.2%}" for k, v in found.items()) + "  on val")
        for epoch in range(self.options.epochs):
            mean = self.epoch(epoch)
            require_finite(
                self.model, f"{self.job.where}, epoch {epoch + 1}", TrainingError, _DIVERGED
            )
            accuracy = None if self.val is None else evaluate(self.model, self.val)
            self.display.epoch(epoch, mean, accuracy)

    def epoch(self, epoch: int) -> float:
        """One pass over the data; returns the mean loss of its steps."""
        total, steps = 0.0, 0
        where = f"{self.job.where}(data), epoch {epoch + 1}"
        for index, (inputs, labels) in enumerate(batches(self.data, where)):
            if self.needs_two and batch_size(inputs) < 2:
                self.display.once("left out a batch of one example: BatchNorm needs two")
                continue
            loss = self.step(epoch, index, inputs, labels)
            total, steps = total + loss, steps + 1
            self.display.step(epoch, index, loss)
        if not steps:
            raise DataError(
                where,
                "every batch holds a single example, and BatchNorm needs two to train",
                "Use larger batches, or a network without BatchNorm",
            )
        return total / steps

    def step(self, epoch: int, index: int, inputs: Inputs, labels: Tensor | None) -> float:
        """One optimizer step; returns the loss before it."""
        done = epoch * self.length + min(index, self.length - 1) if self.length else epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * self.schedule(done)
        device = self.accelerator.device
        loss = self.wrapped(moved(inputs, device), labels, step=self.steps)
        if self.job.regularizer is not None:
            loss = loss + self.job.regularizer(self.model, self.steps)
        self.steps += 1
        value = _checked(loss, f"{self.job.where}, epoch {epoch + 1}, step {index + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.options.clip_norm)
        self.optimizer.step()
        if self.job.after_step is not None:
            with torch.no_grad():
                self.job.after_step(self.model)
        return value


_DIVERGED = "Lower lr, set clip_norm=1.0 or a longer warmup, and check the inputs for NaN"


def _checked(loss: Tensor, where: str) -> float:
    """The loss as a number, or an error where it cannot be minimized."""
    if loss.numel() != 1 or not loss.requires_grad:
        raise InputError(
            where,
            f"the loss, of shape {tuple(loss.shape)}, is no scalar that depends on the parameters",
            "Return one number, and do not detach the logits in the network",
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(where, f"the loss is {value}", _DIVERGED)
    return value
