"""Whom a student learns from: one network or several, itself earlier on, or a peer.

A :class:`Teacher` is what the user gives, a value. At the beginning of a training it makes a
:class:`Tutor`, which is the teacher at work: copies of networks that answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rarefy.batches import call, logits, map_tensors
from rarefy.copies import fingerprint, own_copy
from rarefy.distillation.losses import class_dim
from rarefy.errors import InputError, TrainingError
from rarefy.training.average import follow
from rarefy.training.networks import require_finite
from rarefy.types import Inputs


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
    """Networks that only answer. That they did not change is seen by their fingerprints.

    Args:
        network: of our own, which answers.
        parts: name to network of what it is made of.
    """

    def __init__(self, network: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.aside, self.parts = Aside(network), (parts,)
        self.prints = {name: fingerprint(part) for name, part in parts.items()}

    @property
    def network(self) -> nn.Module:
        """The network that answers."""
        return self.aside.module

    def finish(self, where: str) -> None:
        """Compare the fingerprints.

        Raises:
            TrainingError: a network changed.
        """
        for name, part in self.parts[0].items():
            if fingerprint(part) != self.prints[name]:
                raise TrainingError(
                    where,
                    f"the {name}'s weights or buffers changed while it only answered",
                    "Take out of its forward what writes to them, such as statistics kept in eval "
                    "mode",
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
        require_finite(self.network, where, InputError, "Check the checkpoint")
        own = own_copy(self.network, where)
        return Frozen(own, {"teacher": own})


# --- several -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ensemble(Teacher):
    """Several networks, whose answers are averaged with weights.

    Averaged logits are, as probabilities, the normalized geometric mean of the networks'
    distributions, averaged probabilities their arithmetic mean (both in Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 3). Logits can be averaged whatever they
    mean, also where outputs are no classes. With probabilities the answers are the logarithms of
    the means, from which any temperature can be taken.

    A loss of features names modules of the first network as ``"networks.0.layer3"``, of the second
    as ``"networks.1.layer3"``, and so on.

    Args:
        networks: at least one; none is changed.
        weights: of each, above 0; they are divided by their sum. None for equal ones.
        average: ``"logits"`` or ``"probabilities"``.
        dim: with probabilities, the dimension of the classes; None for the last of (B, C) and
            (B, L, C).

    Raises:
        InputError: there is no network, or the weights do not fit.

    Example:
        >>> teacher = Ensemble([nn.Linear(4, 2), nn.Linear(4, 2)], weights=[3, 1])
        >>> teacher.shares
        (0.75, 0.25)
    """

    networks: Sequence[nn.Module]
    weights: Sequence[float] | None = None
    average: Literal["logits", "probabilities"] = "logits"
    dim: int | None = None

    def __post_init__(self) -> None:
        strange = [n for n in self.networks if not isinstance(n, nn.Module)]
        if strange or not self.networks:
            what = f"a {type(strange[0]).__name__} is no network" if strange else "it is empty"
            remedy = "Give a list of networks, and their weights as weights=[...]"
            raise InputError("Ensemble(networks)", what, remedy)
        weights = self.weights
        fits = weights is None or len(weights) == len(self.networks)
        if not fits or not all(0 < w < math.inf for w in weights or ()):
            raise InputError(
                f"Ensemble(weights={weights!r})",
                f"{len(self.networks)} networks need as many weights above 0",
                "Give for example weights=[0.7, 0.3], or none for equal ones",
            )
        if self.average not in ("logits", "probabilities"):
            raise InputError(
                f"Ensemble(average={self.average!r})",
                "it is neither 'logits' nor 'probabilities'",
                "Write average='logits'",
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, with sum 1."""
        weights = self.weights or [1.0] * len(self.networks)
        return tuple(weight / sum(weights) for weight in weights)

    def start(self, student: nn.Module, where: str) -> Tutor:
        names = [f"network {number} of the teacher" for number in range(len(self.networks))]
        parts = {}
        for name, network in zip(names, self.networks, strict=True):
            require_finite(network, f"{where}, {name}", InputError, "Check the checkpoint")
            parts[name] = own_copy(network, f"{where}, {name}")
        dim = self.dim if self.average == "probabilities" else None
        mean = Mean(list(parts.values()), self.shares, self.average == "probabilities", dim)
        return Frozen(mean, parts)


class Mean(nn.Module):
    """The weighted mean of what several networks answer.

    Args:
        networks: those.
        shares: the weight of each.
        probabilities: whether probabilities are averaged, and their logarithms returned.
        dim: dimension of the classes then.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        shares: Sequence[float],
        probabilities: bool,
        dim: int | None,
    ) -> None:
        super().__init__()
        self.networks, self.shares = nn.ModuleList(networks), tuple(shares)
        self.probabilities, self.dim = probabilities, dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean, in float32 or better."""
        answers = [logits(network(*args, **kwargs)) for network in self.networks]
        if len({answer.shape for answer in answers}) > 1:
            raise InputError(
                "Ensemble(networks)",
                f"their answers have shapes {[tuple(answer.shape) for answer in answers]}",
                "Give networks with the same classes, in the same order",
            )
        wide = [a if a.dtype == torch.float64 else a.float() for a in answers]
        if not self.probabilities:
            return torch.stack([s * a for s, a in zip(self.shares, wide, strict=True)]).sum(0)
        dim = class_dim("Ensemble", wide[0], self.dim)
        logs = [math.log(s) + a.log_softmax(dim) for s, a in zip(self.shares, wide, strict=True)]
        return torch.stack(logs).logsumexp(0)


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
        require_finite(self.network, where, InputError, "Check the checkpoint")
        return Learning(own_copy(self.network, where))


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
