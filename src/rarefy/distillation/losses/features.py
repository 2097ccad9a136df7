"""Losses of single features: hints, directions, attention transfer, variational information."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses.arithmetic import precise, unit
from rarefy.distillation.losses.base import POSITIVE, FeatureLoss, Number, require
from rarefy.distillation.losses.projectors import (
    Projector,
    bridged,
    channel_dim,
    counted,
    feature_rows,
    on,
    pointwise,
    projector,
    require_same_batch,
    resized,
)
from rarefy.errors import InputError


@dataclass(frozen=True)
class FitNet(FeatureLoss):
    """Hints: the squared difference of features.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3::

        mean over positions and channels of (r(student) - teacher)^2

    with a learned regressor ``r`` where the shapes differ: a 1x1 convolution for maps, a linear
    layer for the others. They halve the sum over channels and positions; this averages, so that the
    size depends on neither.

    Features are ``(B, C)``, ``(B, L, C)`` with a mask ``(B, L)``, or ``(B, C, H, W)``.

    Args:
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: when called, the shapes differ; of the head, they cannot be bridged.

    Example:
        >>> FitNet()(torch.zeros(2, 3), torch.ones(2, 3)).item()
        1.0
    """

    dim: int | None = None

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = feature_rows("FitNet", student, teacher, self.dim, mask)
        return (found - wanted).square().sum() / max(found.numel(), 1)

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        return projector("FitNet", student, teacher, self.dim)


@dataclass(frozen=True)
class Cosine(FeatureLoss):
    """Directions of hidden states, whatever their length: 1 less the cosine at every position.

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT"::

        mean over positions of 1 - cosine(r(student), teacher)

    with a learned linear map ``r`` where the shapes differ. Features as in :class:`FitNet`. A
    vector of zeros has the cosine 0 with any other.

    Args:
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: when called, the shapes differ; of the head, they cannot be bridged.

    Example:
        >>> Cosine()(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        0.0
    """

    dim: int | None = None

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = feature_rows("Cosine", student, teacher, self.dim, mask)
        return (1 - (unit(found) * unit(wanted)).sum(-1)).sum() / max(len(found), 1)

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        return projector("Cosine", student, teacher, self.dim)


@dataclass(frozen=True)
class AT(FeatureLoss):
    """Attention transfer: where in the picture, or in the sequence, activations are large.

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2 with p = 2::

        mean over examples of |Q_s / |Q_s| - Q_t / |Q_t||^2;  Q = sum over channels of |A|^power

    summed over positions, at most 2. Their code averages over the positions besides: a weight of
    1000 there is 1000/64 here on maps of 8x8. Channels need not agree. Of two sizes of maps the
    attention of the larger is averaged down to the smaller.

    Features are ``(B, L, C)`` with a mask ``(B, L)``, or ``(B, C, H, W)``.

    Args:
        power: of the activations, above 0.
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: the power is out of range; when called, the batches or the lengths of sequences
            differ, or the mask does not fit.

    Example:
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> AT()(student, student.flip(-1)).item()
        2.0
    """

    power: Number = 2.0
    dim: int | None = None

    def __post_init__(self) -> None:
        require(self, POSITIVE, "power")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        require_same_batch("AT", student, teacher)
        size = bridged("AT", student, teacher, self.dim)
        found, wanted = (self._map(x, mask) for x in (student, teacher.detach()))
        if size is not None:
            least = (min(found.shape[2], wanted.shape[2]), min(found.shape[3], wanted.shape[3]))
            found, wanted = (resized(x, least) for x in (found, wanted))
        distance = unit(found.flatten(1)) - unit(wanted.flatten(1))
        return distance.square().sum() / max(len(student), 1)

    def _map(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        place = channel_dim("AT", feature, self.dim)
        if feature.ndim < 3:
            raise InputError(
                "AT",
                f"a feature of shape {tuple(feature.shape)} has no positions to attend to",
                "Give (B, L, C) or (B, C, H, W)",
            )
        power = self.number("power")
        strength = counted("AT", feature, mask, place).abs()
        return strength.pow(power).movedim(place, 1).sum(1, keepdim=True)


@dataclass(frozen=True)
class VID(FeatureLoss):
    """Variational information distillation: what the student's feature tells of the teacher's.

    Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer"::

        mean over positions and channels of ((teacher - m)^2 / v + log v) / 2

    with the mean ``m``, a learned function of the student's feature at the same position, and a
    learned variance ``v`` for every channel. The constant of the Gaussian is left out, and we
    average where the paper sums. It is called with ``(m, v)`` in the place of the student's
    feature, which is what the head gives.

    Features are ``(B, C)``, ``(B, L, C)`` with a mask ``(B, L)``, or ``(B, C, H, W)``.

    Args:
        variance: from which ``v`` starts, above 0.
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: the variance is out of range; when called, the shapes differ; of the head, they
            cannot be bridged.

    Example:
        >>> student, teacher = torch.zeros(4, 8), torch.ones(4, 16)
        >>> loss = VID()
        >>> loss(*loss.head(student, teacher)(student, teacher)).shape
        torch.Size([])
    """

    variance: float = 5.0
    dim: int | None = None

    def __post_init__(self) -> None:
        require(self, POSITIVE, "variance")

    def __call__(
        self, student: tuple[Tensor, Tensor], teacher: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        if isinstance(student, Tensor):
            raise InputError(
                "VID",
                "a feature alone says nothing of its uncertainty",
                "Call it with what head(student, teacher) gives: ((mean, variance), teacher)",
            )
        mean, variance = student
        found, wanted = feature_rows("VID", mean, teacher, self.dim, mask)
        spread = precise(variance)
        each = (found - wanted).square() / spread + spread.log()
        return each.sum() / (2 * max(found.numel(), 1))

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module:
        size = bridged("VID", student, teacher, self.dim)
        source, target = (channel_dim("VID", x, self.dim) for x in (student, teacher))
        channels, maps = teacher.shape[target], student.ndim == 4
        layers = nn.Sequential(
            pointwise(student.shape[source], channels, maps),
            nn.ReLU(),
            pointwise(channels, channels, maps),
            nn.ReLU(),
            pointwise(channels, channels, maps),
        )
        mean = Projector(layers, source, size, maps=maps)
        return on(student, _Gaussian(mean, channels, self.number("variance")))


class _Gaussian(nn.Module):
    """(student, teacher) to ((mean, variance), teacher)."""

    least = 1e-5
    """The variance stays above this."""

    def __init__(self, mean: Projector, channels: int, variance: float) -> None:
        super().__init__()
        self.mean = mean
        start = math.log(math.expm1(max(variance - self.least, self.least)))
        self.spread = nn.Parameter(torch.full((channels,), start))  # softplus of it is the variance

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        variance = F.softplus(self.spread) + self.least
        return (self.mean.project(student), variance), teacher.detach()
