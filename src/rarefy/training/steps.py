"""One step of the optimizer, and the losses of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, moved, seeded
from rarefy.distillation.losses import IGNORE
from rarefy.errors import InputError, TrainingError, warn
from rarefy.process import on_all, quiet_setup, shared_mean
from rarefy.training.average import Average
from rarefy.training.job import Job
from rarefy.training.networks import fill, has_batch_norm, tensors_of
from rarefy.training.objective import Objective, Weights
from rarefy.training.options import blamed, optimizer_of, require_saved, schedule_of
from rarefy.training.sharding import optimizer_state, set_optimizer_state, spread
from rarefy.training.stored import labels_of
from rarefy.types import Inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

Example: TypeAlias = tuple[Inputs, Tensor | None]
"""A batch, as :func:`rarefy.batches.batches` gives it."""

DIVERGED = "Lower lr, set clip_norm=1.0 or a longer warmup, and check the inputs for NaN"

MISHEARD = "Check the teacher, its precision, and the inputs for NaN"

COPIED = (
    "the labels are the input_ids of their own positions, so that the network learns to copy. For "
    "a causal language model shift them: labels = F.pad(labels[:, 1:], (0, 1), value=-100)"
)

PENDING = 32
"""Losses on a device that are fetched at once."""


class Meter:
    """The mean loss of an epoch. A loss that is not finite ends the training.

    On a CPU every loss is looked at before the weights change. On other devices looking makes the
    CPU wait for the device, so it is done every ``PENDING`` steps, and before anything is shown,
    saved or returned: then weights that a NaN has reached are dropped, with an error that names the
    step; the caller's network and all checkpoints are from before it.

    Args:
        where: the call that errors name.
        accelerator: where the losses are.
        misheard: whether the teacher's last answers are to blame.
    """

    def __init__(self, where: str, accelerator: Accelerator, misheard: Callable[[], bool]) -> None:
        self.where, self.accelerator, self.misheard = where, accelerator, misheard
        self.every = 1 if accelerator.device.type == "cpu" else PENDING
        self.alone = accelerator.num_processes == 1
        self.pending: list[tuple[Tensor, int, int]] = []
        self.total, self.count, self.last = 0.0, 0, math.nan

    def add(self, loss: Tensor, epoch: int, step: int) -> None:
        """Note the loss of a step."""
        self.pending.append((loss, epoch, step))
        if len(self.pending) >= self.every:
            self.drain()

    def drain(self) -> None:
        """Look at all losses that were noted."""
        if not self.pending:
            return
        noted, self.pending = self.pending, []
        if len(noted) == 1 and self.alone:
            values = [float(noted[0][0])]
        else:
            losses = torch.stack([loss.reshape(()) for loss, _, _ in noted])
            values = shared_mean(losses, self.accelerator).tolist()
        for value, (_, epoch, step) in zip(values, noted, strict=True):
            if not math.isfinite(value):
                where = f"{self.where}, epoch {epoch + 1}, step {step + 1}"
                if any(on_all(self.misheard(), self.accelerator)):
                    raise TrainingError(where, "the teacher's answers hold NaN or +inf", MISHEARD)
                raise TrainingError(where, f"the loss is {value}", DIVERGED)
            self.total, self.count, self.last = self.total + value, self.count + 1, value


class Stepper:
    """Takes the steps of a training.

    Args:
        objective: what is minimized; it is trained in place.
        job: how.
        length: batches of an epoch on this process, 0 where that is not known.
        accelerator: where.

    Attributes:
        held: how the processes hold the objective.
        running: the objective that takes the steps, or its copy in shards.
        followed: whether anything else reads or writes weights between two steps.
    """

    def __init__(
        self, objective: Objective, job: Job, length: int, accelerator: Accelerator
    ) -> None:
        self.objective, self.job, self.accelerator = objective, job, accelerator
        self.model, self.options = objective.network, job.options
        self.updates, self.steps = math.ceil(length / job.options.accumulate), 0
        self.schedule = schedule_of(self.options, max(self.updates, 1) * self.options.epochs)
        objective.to(accelerator.device).train()
        self.held = spread(objective, job.where, accelerator)
        self.running = self.held.running
        with quiet_setup(), self.held.preparing():
            self.built = optimizer_of(self.running, self.options)
            self.wrapped, optimizer = accelerator.prepare(self.running, self.built)
        # Accelerate's wrapper costs 0.3 ms a step: only where it does something.
        plain = accelerator.distributed_type == "NO" and accelerator.scaler is None
        self.optimizer = self.built if plain else optimizer
        self.blamed = blamed if callable(self.options.optimizer) else nullcontext
        if job.checkpoint is not None:
            require_saved(self.built)
        self.needs_two = has_batch_norm(self.model)
        self.left_out = False
        self.meter = Meter(job.where, accelerator, self.running.misheard)
        decay, zeros = self.options.ema, job.after_step is not None
        self.average = None if decay is None else Average(self.model, decay, zeros=zeros)
        changes = objective.tutor is not None and objective.tutor.changes
        hooks = (job.after_step, job.regularizer, decay)
        self.followed = changes or any(hook is not None for hook in hooks)

    @property
    def subject(self) -> nn.Module:
        """The network that is evaluated and returned: the average, where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.built.param_groups[0]["lr"])

    def step(self, group: Sequence[Example], epoch: int, index: int) -> None:
        """One step on a few batches, the so-many-th of its epoch."""
        weights = self.weights(group)
        used = [(batch, w) for batch, w in zip(group, weights, strict=True) if w is not None]
        self.left_out |= len(used) < len(group)
        if not used:
            return
        if not self.steps and any(self.objective.heeds(b[1]) and copied(*b) for b, _ in used):
            warn(f"{self.job.where}(data): {COPIED}")
        self.schedule_lr(epoch, index)
        self.optimizer.zero_grad()
        self.held.align()
        with self.held.stepping(first=not self.steps):
            loss = self.gradients(used, epoch, index)
        self.meter.add(loss, epoch, index)
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.options.clip_norm)
        with self.blamed():
            self.optimizer.step()
        self.steps += 1
        if self.followed:
            self.held.gather()
        if self.job.after_step is not None:
            with torch.no_grad(), self.alike():
                self.job.after_step(self.model)
        self.objective.after_step()
        if self.average is not None:
            self.average.update(self.steps)
        if self.followed:
            self.held.scatter()

    def alike(self) -> AbstractContextManager[None]:
        """What callbacks draw is the same on all processes, whose weights would part else."""
        alone = self.accelerator.num_processes == 1
        return nullcontext() if alone else seeded(self.job.seed + self.steps)

    def penalty(self) -> Tensor:
        """What the regularizer says of the network."""
        assert self.job.regularizer is not None
        with self.alike():
            return self.job.regularizer(self.model, self.steps)

    def schedule_lr(self, epoch: int, index: int) -> None:
        """Set the learning rate of a step."""
        updates = self.updates
        done = epoch * updates + min(index, updates - 1) if updates else epoch
        for group in self.built.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.schedule(done)

    def gradients(self, used: Sequence[tuple[Example, Weights]], epoch: int, index: int) -> Tensor:
        """The gradients of the weighted mean of the losses; returns it."""
        found: Tensor | None = None
        for number, ((inputs, labels), weights) in enumerate(used):
            last = number == len(used) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                placed = moved(inputs, self.accelerator.device)
                # A wrapper that averages gradients knows of no use of a parameter but forward's.
                penalty = self.penalty if last and self.job.regularizer is not None else None
                loss = self.wrapped(
                    placed, labels, step=self.steps, weights=weights, penalty=penalty
                )
                if loss.numel() != 1 or not loss.requires_grad:
                    raise InputError(
                        f"{self.job.where}, epoch {epoch + 1}, step {index + 1}",
                        f"the loss, of shape {tuple(loss.shape)}, is no scalar that depends on "
                        "the parameters",
                        "Return one number, and do not detach the logits in the network",
                    )
                self.accelerator.backward(loss)
                self.held.pass_gradients()
            found = loss.detach() if found is None else found + loss.detach()
        assert found is not None
        return found

    def weights(self, group: Sequence[Example]) -> list[Weights | None]:
        """The weights of each batch's losses, None for a batch that is left out.

        Each of the two, over all batches on all processes, has a mean over processes of 1.
        """
        sizes = [batch_size(inputs) for inputs, _ in group] if self.needs_two else None
        alone = self.accelerator.num_processes == 1
        if alone and len(group) == 1:
            return [None if sizes is not None and sizes[0] < 2 else (1.0, 1.0)]
        soft = [self.running.answered(inputs) for inputs, _ in group]
        hard = [labelled(*batch) for batch in group]
        everywhere = torch.tensor([[soft, hard, sizes or [2] * len(group)]], dtype=torch.float32)
        if not alone:
            everywhere = self.accelerator.gather(everywhere.to(self.accelerator.device))
        used = everywhere[:, 2].amin(0) >= 2
        totals = everywhere[:, :2, used].sum((0, 2)).clamp_min(1.0).tolist()
        first, second = (self.accelerator.num_processes / total for total in totals)
        mine = zip(soft, hard, used.tolist(), strict=True)
        return [(s * first, h * second) if keep else None for s, h, keep in mine]


def labelled(inputs: Inputs, labels: Tensor | None) -> int:
    """What a batch's loss on labels is a mean over: its labelled positions, or its examples."""
    labels = labels_of(labels)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        return int((labels != IGNORE).sum())
    return 0 if labels is None else batch_size(inputs)


def copied(inputs: Inputs, labels: Any) -> bool:
    """Whether labels are what Transformers' collator for causal models gives: its models shift."""
    labels = labels_of(labels)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor):
        return False
    if tokens.shape != labels.shape or tokens.ndim != 2:
        return False
    known = labels != IGNORE
    return bool(known.any()) and bool((tokens.to(labels.device) == labels)[known].all())


def state_of(stepper: Stepper) -> dict[str, Any]:
    """What a checkpoint holds of the steps."""
    scaler, average = stepper.accelerator.scaler, stepper.average
    return {
        "steps": stepper.steps,
        "losses": [stepper.meter.total, stepper.meter.count],
        "tensors": dict(tensors_of(stepper.objective)),
        "optimizer": optimizer_state(stepper.built),
        "scaler": None if scaler is None else scaler.state_dict(),
        "average": None if average is None else average.state_dict(),
        "hooks": [None if hook is None else hook.state_dict() for hook in _stateful(stepper)],
    }


def restore(stepper: Stepper, state: Mapping[str, Any]) -> None:
    """Put the steps into the state that :func:`state_of` found."""
    stepper.steps = state["steps"]
    stepper.meter.total, stepper.meter.count = state["losses"]
    fill(stepper.objective, state["tensors"])
    stepper.held.scatter()
    with stepper.blamed():
        set_optimizer_state(stepper.built, state["optimizer"])
    if stepper.accelerator.scaler is not None:
        stepper.accelerator.scaler.load_state_dict(state["scaler"])
    if stepper.average is not None:
        fill(stepper.average.model, state["average"])
    for hook, held in zip(_stateful(stepper), state["hooks"], strict=True):
        if hook is not None:
            hook.load_state_dict(held)


def _stateful(stepper: Stepper) -> list[Any]:
    """The callbacks that have a state; None for each that has none."""
    hooks = (stepper.job.after_step, stepper.job.regularizer)
    return [hook if hasattr(hook, "load_state_dict") else None for hook in hooks]
