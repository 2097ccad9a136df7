"""Whom a student learns from: one network or several, itself earlier on, or a peer.

A :class:`Teacher` is what the user gives, a value. At the beginning of a training it makes a
:class:`Tutor`, which is the teacher at work: copies of networks that answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy.batches import call, logits, map_tensors
from rarefy.copies import fingerprint, own_copy
from rarefy.distillation.ensemble import Ensemble
from rarefy.errors import InputError, TrainingError
from rarefy.training.average import follow
from rarefy.training.networks import require_finite
from rarefy.types import Inputs

__all__ = ["Earlier", "Ensemble", "Peer", "Teacher"]


class Teacher(ABC):
    """Where a student's soft labels come from; what ``distill`` takes in place of a network."""

    @abstractmethod
    def start(self, student: nn.Module, where: str) -> Tutor:
        """The teacher at work, at the beginning of a training.

        Args:
            student: the network as it is then; it is not kept, nor changed.
            where: the argument that errors name.
        """


class Tutor(nn.Module, ABC):
    """A teacher at work, as a part of the objective.

    Its submodules are what training saves, moves and averages over processes along with the
    student: a tutor that does not change has none.

    Attributes:
        name: what lines and records call it.
        learns: whether it is trained along; all others are in eval mode and get no gradients.
        changes: whether it does during the training: it learns along, or follows the student.
    """

    name: ClassVar[str] = "teacher"
    learns: ClassVar[bool] = False
    changes: ClassVar[bool] = False

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that answers, whose features can be compared."""

    def forward(self, inputs: Inputs) -> Tensor:
        """The answers to a batch: logits. The inputs are as they were for the student."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return logits(call(self.network, map_tensors(torch.clone, inputs)))

    def train(self, mode: bool = True) -> Tutor:
        """Training mode for those who learn; eval mode always for the others."""
        return super().train(mode and self.learns)

    def after_step(self, student: nn.Module) -> None:
        """Follow the student after an optimizer step."""

    def finish(self, where: str) -> None:
        """The end of the training.

        Raises:
            TrainingError: what must not change did.
        """


class Aside(nn.Module):
    """A module that is called and moved, and otherwise hidden from what holds it.

    It is in eval mode and its parameters are not trained, though gradients pass through it.
    ``train()``, optimizers, wrappers and checkpoints do not see it.
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

    def _apply(self, fn: Any, recurse: bool = True) -> Aside:
        """Moves go through this method of PyTorch, whatever their names."""
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Frozen(Tutor):
    """A network that only answers. That it did not change is seen by its fingerprint.

    Args:
        network: of our own, which answers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.aside, self.print = Aside(network), fingerprint(network)

    @property
    def network(self) -> nn.Module:
        """The network that answers."""
        return self.aside.module

    def finish(self, where: str) -> None:
        """Compare the fingerprints.

        Raises:
            TrainingError: the network changed.
        """
        if fingerprint(self.network) != self.print:
            raise TrainingError(
                where,
                "the teacher's weights or buffers changed while it only answered",
                "Take out of its forward what writes to them, such as statistics kept in eval mode",
            )


def as_teacher(given: Any, where: str) -> Teacher:
    """The teacher that a network is, or the one that is given.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return One(given)
    raise InputError(
        where,
        f"a {type(given).__name__} is no teacher",
        "Give a network, Ensemble([...]), Earlier() or Peer(network) of rf.teachers, or "
        "rf.SoftLabels(path)",
    )


@dataclass(frozen=True)
class One(Teacher):
    """A network as it is; what ``distill(network, ...)`` stands for."""

    network: nn.Module

    def start(self, student: nn.Module, where: str) -> Tutor:
        network = own_copy(self.network, where)
        require_finite(network, where, InputError, "Check the checkpoint")
        return Frozen(network)


# --- the student itself, and others that learn -------------------------------------------------


@dataclass(frozen=True)
class Earlier(Teacher):
    """The student itself, as it was earlier on.

    Without a decay it is the student as it is given: train it once, and again on its own answers
    (Furlanello et al. 2018, "Born-Again Neural Networks"). With one it is a mean teacher, the
    moving average of the student's weights while it is trained (Tarvainen and Valpola 2017, "Mean
    teachers are better role models"): after step ``t``, from 1, ``d average + (1 - d) student``
    with ``d = min(decay, 1 - 1 / (t + 1))``, as in their code. Buffers of floating point are
    averaged like weights, others copied. Unlike theirs it answers without dropout.

    Args:
        decay: of the average, above 0 and below 1; None for the student as it is given.

    Raises:
        InputError: the decay is out of range.

    Example:
        >>> Earlier(decay=0.999)
        Earlier(decay=0.999)
    """

    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise InputError(
                f"Earlier(decay={self.decay!r})",
                "the decay must be above 0 and below 1",
                "Write decay=0.999, or None for the student as it is given",
            )

    def start(self, student: nn.Module, where: str) -> Tutor:
        if self.decay is None:
            return One(student).start(student, where)
        return MovingAverage(own_copy(student, where), self.decay)


class MovingAverage(Tutor):
    """A moving average of the student.

    Args:
        network: a copy of the student.
        decay: of the average.
    """

    changes = True

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.average, self.decay = network.eval().requires_grad_(False), decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.steps: Tensor

    @property
    def network(self) -> nn.Module:
        """The average."""
        return self.average

    def after_step(self, student: nn.Module) -> None:
        """Move towards the student."""
        self.steps += 1
        follow(self.average, student, max(1 - self.decay, 1 / (int(self.steps) + 1)))


@dataclass(frozen=True)
class Peer(Teacher):
    """A second network that is trained at the same time: each learns from the other.

    Zhang et al. 2018, "Deep Mutual Learning": both minimize the loss against the other's answers
    and that against the labels. They update the networks in turn; here both take their step at
    once, from the same answers. A copy of the peer is trained; ``distill`` returns the student.

    Args:
        network: the peer; it is not changed.

    Example:
        >>> found = Peer(nn.Linear(4, 2))
    """

    network: nn.Module

    def start(self, student: nn.Module, where: str) -> Tutor:
        network = own_copy(self.network, where)
        require_finite(network, where, InputError, "Check the checkpoint")
        return Learning(network)


class Learning(Tutor):
    """A network that learns along.

    Args:
        network: of our own, which is trained.
    """

    name, learns, changes = "peer", True, True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.peer = network

    @property
    def network(self) -> nn.Module:
        """The peer."""
        return self.peer

    def finish(self, where: str) -> None:
        """It is in eval mode, without gradients."""
        self.peer.eval().zero_grad(set_to_none=True)
