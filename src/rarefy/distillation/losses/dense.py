"""Losses of the features and outputs of dense prediction: maps ``(B, C, H, W)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses.arithmetic import divergence, precise
from rarefy.distillation.losses.base import INNER_SHARE, POSITIVE, FeatureLoss, Number, require
from rarefy.distillation.losses.layouts import require_mask
from rarefy.distillation.losses.projectors import (
    channel_dim,
    feature_rows,
    on,
    projector,
    require_same_shape,
    resized,
)
from rarefy.errors import InputError


@dataclass(frozen=True)
class CWD(FeatureLoss):
    """Channel-wise distillation: where every channel is active, as a distribution over positions.

    Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction"::

        T^2 * mean over examples and channels of sum over positions of p * (log p - log q)

    with ``p``, ``q`` the softmax of teacher and student over the positions of a channel at
    temperature T, and a learned 1x1 convolution of the student's maps where the shapes differ. It
    serves for the logits of segmentation, too: bind it to the last module.

    Features are ``(B, C, H, W)``, or ``(B, L, C)`` with a mask ``(B, L)``. An example none of whose
    positions counts is left out.

    Args:
        temperature: T, above 0.
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: the temperature is not a positive number; when called, the shapes differ, or
            there are no positions; of the head, the shapes cannot be bridged.

    Example:
        >>> maps = torch.randn(2, 3, 4, 4)
        >>> CWD()(maps + 1, maps).item() < 1e-5
        True
    """

    temperature: Number = 4.0
    dim: int | None = None

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = self.number("temperature")
        place = channel_dim("CWD", student, self.dim)
        require_same_shape("CWD", student, teacher)
        if student.ndim < 3:
            raise InputError(
                "CWD",
                f"features of shape {tuple(student.shape)} have no positions",
                "Give (B, C, H, W) or (B, L, C)",
            )
        if mask is not None:
            require_mask("CWD", student, place, mask)
        log_q, log_p = (
            _over_positions(precise(x).movedim(place, 1) / temperature, mask)
            for x in (student, teacher.detach())
        )
        count = max(log_q.shape[0] * log_q.shape[1], 1)
        return temperature**2 * divergence(log_p, log_q).sum() / count

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        return projector("CWD", student, teacher, self.dim)


def _over_positions(features: Tensor, mask: Tensor | None) -> Tensor:
    """Log-softmax over the positions that count of ``(B, C, ...)``, as ``(B, C, P)``."""
    rows = features.flatten(2)
    if mask is not None:
        counts = mask.bool().flatten(1)
        some = counts.any(1)
        rows = rows[some].masked_fill(~counts[some][:, None], -math.inf)
    return F.log_softmax(rows, dim=-1)


@dataclass(frozen=True)
class MGD(FeatureLoss):
    """Masked generative distillation: from a part of its maps the student makes the teacher's.

    Yang et al. 2022, "Masked Generative Distillation"::

        mean over positions and channels of (teacher - G(M * r(student)))^2

    with a learned 1x1 convolution ``r`` where channels differ, random positions ``M`` that are set
    to 0 anew at every step, and two learned 3x3 convolutions with a ReLU between them for ``G``.
    They sum where we average: their weight 2e-5 is 2e-5 times the number of elements of a map here.

    Features are ``(B, C, H, W)``. The call is the mean squared difference; the head does the rest,
    with PyTorch's global random numbers.

    Args:
        masked: share of the positions that are set to 0, above 0 and below 1.

    Raises:
        InputError: the share is out of range; when called, the shapes differ; of the head, features
            are no maps.

    Example:
        >>> student, teacher = torch.zeros(2, 4, 8, 8), torch.ones(2, 6, 8, 8)
        >>> MGD().head(student, teacher)(student, teacher)[0].shape
        torch.Size([2, 6, 8, 8])
    """

    masked: float = 0.65

    def __post_init__(self) -> None:
        require(self, INNER_SHARE, "masked")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        found, wanted = feature_rows("MGD", student, teacher, None, mask)
        return (found - wanted).square().sum() / max(found.numel(), 1)

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_maps("MGD", student, teacher)
        fit = projector("MGD", student, teacher)
        return on(student, _Generator(fit, teacher.shape[1], self.number("masked")))


class _Generator(nn.Module):
    """The teacher's maps from the student's, of which positions are missing."""

    def __init__(self, fit: nn.Module | None, channels: int, masked: float) -> None:
        super().__init__()
        self.fit, self.masked = fit, masked
        self.generate = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        fitted = student if self.fit is None else self.fit(student, teacher)[0]
        kept = torch.rand_like(fitted[:, :1], dtype=torch.float32) >= self.masked
        weight = next(self.generate.parameters())
        return self.generate(fitted.to(weight.dtype) * kept), teacher.detach()


@dataclass(frozen=True)
class ReviewKD(FeatureLoss):
    """Knowledge review: the teacher's early stages teach the student's later ones.

    Chen et al. 2021, "Distilling Knowledge via Knowledge Review", section 3. The student's stages
    are fused from the last to the first, each with the result of the one after it by learned
    attention (ABF), and each fused map is compared with the teacher's stage by the hierarchical
    context loss (HCL)::

        sum over stages of sum over sizes s of w_s * mean (pool_s(fused) - pool_s(teacher))^2

    with the maps as they are and pooled to 4x4, 2x2 and 1x1 where they are larger, and weights 1,
    1/2, 1/4, 1/8, divided by the sum of those used.

    Features are sequences of maps ``(B, C, H, W)``, from the first stage to the last; as many of
    both. The head is always needed.

    Args:
        width: channels within the fusion; None for those of the student's last stage, at most 512.

    Raises:
        InputError: when called, the shapes differ, or a mask is given; of the head, features are no
            sequences of maps.

    Example:
        >>> term = ReviewKD().at(("layer1", "layer2", "layer3"))
        >>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
        >>> ReviewKD()(maps, maps).item()
        0.0
    """

    width: int | None = None
    several: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.width is not None and not (isinstance(self.width, int) and self.width > 0):
            raise InputError(
                f"ReviewKD(width={self.width!r})", "it counts channels", "Write width=64, or None"
            )

    def __call__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            raise InputError("ReviewKD", "maps have no mask", "Call it without one")
        stages = _stages(student, teacher)
        for found, wanted in stages:
            require_same_shape("ReviewKD", found, wanted)
        each = [_hierarchical(precise(s), precise(t.detach())) for s, t in stages]
        return torch.stack(each).sum()

    def head(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> nn.Module:
        stages = _stages(student, teacher)
        last = stages[-1][0].shape[1]
        return on(student[0], _Review(stages, self.width or min(last, 512)))


def _stages(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if isinstance(student, Tensor) or isinstance(teacher, Tensor) or len(student) != len(teacher):
        counts = [1 if isinstance(x, Tensor) else len(x) for x in (student, teacher)]
        raise InputError(
            "ReviewKD",
            f"{counts[0]} features of the student, {counts[1]} of the teacher, not two sequences",
            "Give the maps of as many stages of both: loss.at(('layer1', 'layer2'))",
        )
    if not len(student):
        raise InputError("ReviewKD", "there is no feature", "Give the maps of one stage or more")
    for pair in zip(student, teacher, strict=True):
        require_maps("ReviewKD", *pair)
    return list(zip(student, teacher, strict=True))


def require_maps(where: str, *features: Tensor) -> None:
    """Refuse features that are no maps ``(B, C, H, W)``.

    Raises:
        InputError: one is not.
    """
    for feature in features:
        if channel_dim(where, feature) != 1 or feature.ndim != 4:
            raise InputError(
                where,
                f"a feature of shape {tuple(feature.shape)} is no map",
                "Give features (B, C, H, W); FitNet() takes the others",
            )


def _hierarchical(found: Tensor, wanted: Tensor) -> Tensor:
    total, weight, weights = F.mse_loss(found, wanted), 1.0, 1.0
    for size in (4, 2, 1):
        if size < found.shape[2]:
            weight, small = weight / 2, (size, size)
            ours, theirs = (F.adaptive_avg_pool2d(x, small) for x in (found, wanted))
            total, weights = total + weight * F.mse_loss(ours, theirs), weights + weight
    return total / weights


class _Review(nn.Module):
    """The student's stages, fused from the last to the first, in the shapes of the teacher's."""

    def __init__(self, stages: list[tuple[Tensor, Tensor]], width: int) -> None:
        super().__init__()
        self.sizes = [(t.shape[2], t.shape[3]) for _, t in stages]
        last = len(stages) - 1
        self.fusions = nn.ModuleList(
            _Fusion(s.shape[1], width, t.shape[1], fused=i < last)
            for i, (s, t) in enumerate(stages)
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        results: list[Tensor] = []
        later: Tensor | None = None
        for feature, fusion, size in reversed(
            list(zip(student, self.fusions, self.sizes, strict=True))
        ):
            later, found = fusion(feature, later)
            results.append(resized(found, size))
        return results[::-1], [t.detach() for t in teacher]


class _Fusion(nn.Module):
    """Attention-based fusion (ABF) of a stage with what came of the stages after it."""

    def __init__(self, channels: int, width: int, target: int, *, fused: bool) -> None:
        super().__init__()
        self.narrow = _convolution(channels, width, 1)
        self.widen = _convolution(width, target, 3)
        self.attention = nn.Conv2d(2 * width, 2, 1) if fused else None

    def forward(self, feature: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self.narrow(feature.to(next(self.narrow.parameters()).dtype))
        if self.attention is not None and later is not None:
            after = F.interpolate(later, size=own.shape[2:], mode="nearest")
            share = self.attention(torch.cat([own, after], 1)).sigmoid()
            own = own * share[:, :1] + after * share[:, 1:]
        return own, self.widen(own)


def _convolution(channels: int, target: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, target, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(target),
    )
