"""Losses of a generator's next-token predictions: divergences that do not chase every mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.arithmetic import divergence
from rarefy.distillation.losses.base import INNER_SHARE, POSITIVE, Against, Loss, Number, require
from rarefy.distillation.losses.layouts import choices


@dataclass(frozen=True)
class ReverseKL(Loss):
    """The divergence seen from the student: it may leave out what the teacher can do, not add.

    Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", for
    every token of given texts instead of sampled ones::

        T^2 * mean over examples and positions of sum over classes of q * (log q - log p)

    with ``q``, ``p`` the softmax of student and teacher at temperature T.

    Args:
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: the temperature is not a positive number; when called, the shapes of student
            and teacher differ, the class dimension is not known, or there is one class.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        >>> round(ReverseKL()(student, teacher).item(), 4)
        0.1438
    """

    temperature: Number = 1.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = self.number("temperature")
        student, teacher = choices("ReverseKL", logits, reference, self.dim, mask)
        log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
        return temperature**2 * divergence(log_q, log_p).sum() / max(len(log_q), 1)


@dataclass(frozen=True)
class JSD(Loss):
    """The generalized Jensen-Shannon divergence: from that of :class:`KD` to :class:`ReverseKL`.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes" (GKD)::

        T^2 * mean over examples and positions of (beta * KL(p || m) + (1 - beta) * KL(q || m))
        m = beta * p + (1 - beta) * q

    with ``p``, ``q`` the softmax of teacher and student at temperature T; the factor ``T^2`` is
    ours, as in :class:`KD`. At 0.5 it is the Jensen-Shannon divergence, at most ``log 2``. Divided
    by ``beta`` it tends to ``KL(p || q)`` where ``beta`` tends to 0, and divided by ``1 - beta`` to
    ``KL(q || p)`` where it tends to 1.

    Args:
        beta: weight of the teacher, above 0 and below 1.
        temperature: T, above 0.
        dim: dimension of the classes; None for the last one of 2-D and 3-D logits.

    Raises:
        InputError: a number is out of range; when called, the shapes of student and teacher differ,
            the class dimension is not known, or there is one class.

    Example:
        >>> student, teacher = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
        >>> round(JSD()(student, teacher).item(), 4)
        0.6931
    """

    beta: Number = 0.5
    temperature: Number = 1.0
    dim: int | None = None
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        require(self, INNER_SHARE, "beta")
        require(self, POSITIVE, "temperature")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        beta, temperature = self.number("beta"), self.number("temperature")
        student, teacher = choices("JSD", logits, reference, self.dim, mask)
        log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
        impossible = (log_q == -math.inf) & (log_p == -math.inf)
        log_q, log_p = (x.masked_fill(impossible, 0.0) for x in (log_q, log_p))
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        each = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
        return temperature**2 * each.sum() / max(len(log_q), 1)
