"""Features in one shape: where their channels are, and the learned map from one to the other."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses.arithmetic import precise
from rarefy.distillation.losses.layouts import require_mask, rows, without
from rarefy.errors import InputError

Size: TypeAlias = tuple[int, int]
"""Height and width."""

Module = TypeVar("Module", bound=nn.Module)


def channel_dim(where: str, feature: Tensor, dim: int | None = None) -> int:
    """The channel dimension of a feature, from 0: 1 of maps ``(B, C, H, W)``, else the last.

    Raises:
        InputError: the feature has one dimension or more than four, is no tensor of floating-point
            numbers, or the dimension that is given is the batch or out of range.
    """
    if not isinstance(feature, Tensor) or not feature.is_floating_point():
        kind = feature.dtype if isinstance(feature, Tensor) else type(feature).__name__
        raise InputError(where, f"a feature is {kind}", "Give tensors of floating-point numbers")
    if not 2 <= feature.ndim <= 4:
        raise InputError(
            where,
            f"a feature of shape {tuple(feature.shape)} has {feature.ndim} dimensions",
            "Give (B, C), (B, L, C) or (B, C, H, W)",
        )
    if dim is None:
        return 1 if feature.ndim == 4 else feature.ndim - 1
    if not -feature.ndim < dim < feature.ndim or dim == 0:
        raise InputError(
            f"{where}(dim={dim})",
            f"a feature of shape {tuple(feature.shape)} has no channels there",
            "Name the dimension of the channels, for example dim=-1 for (B, H, W, C)",
        )
    return dim % feature.ndim


def feature_rows(
    where: str, student: Tensor, teacher: Tensor, dim: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The positions of both that count as ``(N, C)``; the teacher's receive no gradients.

    Raises:
        InputError: the shapes differ, or the mask does not fit.
    """
    found = channel_dim(where, student, dim)
    require_same_shape(where, student, teacher)
    return rows(where, student, found, mask), rows(where, teacher.detach(), found, mask)


def require_same_batch(where: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different batches.

    Raises:
        InputError: they are of other numbers of examples.
    """
    for feature in (student, teacher):
        channel_dim(where, feature)
    if len(student) != len(teacher):
        raise InputError(
            where,
            f"the batches hold {len(student)} and {len(teacher)} examples",
            "Give the features of student and teacher on the same inputs",
        )


def require_same_shape(where: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different shapes.

    Raises:
        InputError: they differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            where,
            f"features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ",
            "Bring them to one shape with the module that head(student, teacher) makes",
        )


def counted(where: str, feature: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """The feature in float32 or better, with 0 at the positions that do not count.

    Raises:
        InputError: the mask does not fit.
    """
    place = channel_dim(where, feature, dim)
    if mask is None:
        return precise(feature)
    require_mask(where, feature, place, mask)
    return precise(feature).masked_fill(~mask.bool().unsqueeze(place), 0.0)


def projector(
    where: str, student: Tensor, teacher: Tensor, dim: int | None = None
) -> Projector | None:
    """A learned map of the student's feature to the teacher's shape; None where they are equal.

    Channels are mapped linearly at every position: a 1x1 convolution for maps, a linear layer for
    ``(B, C)`` and ``(B, L, C)``. Maps of another size are resized besides.

    Raises:
        InputError: the numbers of dimensions or of positions of a sequence differ.
    """
    source, target = channel_dim(where, student, dim), channel_dim(where, teacher, dim)
    if student.shape[1:] == teacher.shape[1:]:
        return None
    size = bridged(where, student, teacher, dim)
    channels, wanted, maps = student.shape[source], teacher.shape[target], student.ndim == 4
    layers = nn.Identity() if channels == wanted else pointwise(channels, wanted, maps)
    return on(student, Projector(layers, source, size, maps=maps))


def bridged(where: str, student: Tensor, teacher: Tensor, dim: int | None) -> Size | None:
    """Height and width to bring the student's maps to; None where positions agree.

    Raises:
        InputError: the numbers of dimensions or of positions of a sequence differ.
    """
    source, target = channel_dim(where, student, dim), channel_dim(where, teacher, dim)
    places = [without(f, c)[1:] for f, c in ((student, source), (teacher, target))]
    if student.ndim != teacher.ndim or (student.ndim < 4 and places[0] != places[1]):
        raise InputError(
            where,
            f"no projector leads from {tuple(student.shape)} to {tuple(teacher.shape)}",
            "Compare features of as many dimensions, and sequences of the same length",
        )
    return None if places[0] == places[1] else (places[1][0], places[1][1])


def on(feature: Tensor, module: Module) -> Module:
    """A module on the device of a feature, in float32, or in float64 where the feature is."""
    return module.to(device=feature.device, dtype=precise(feature.detach()[:0]).dtype)


class Projector(nn.Module):
    """The student's feature in the shape of the teacher's, which is passed on as it is.

    Args:
        layers: the map of the channels, of maps ``(B, C, H, W)`` or with the channels last.
        dim: the dimension of the channels.
        size: height and width of the teacher's maps; None where they are the student's.
        maps: whether features are maps, of four dimensions.
    """

    def __init__(self, layers: nn.Module, dim: int, size: Size | None, *, maps: bool) -> None:
        super().__init__()
        self.dim, self.size, self.place = dim, size, 1 if maps else -1
        self.layers = layers

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(student), teacher.detach()

    def project(self, student: Tensor) -> Tensor:
        """The student's feature alone."""
        moved = student.movedim(self.dim, self.place)
        weight = next(self.layers.parameters(), moved)
        moved = self.layers(moved.to(weight.dtype))
        if self.size is not None:
            moved = resized(moved, self.size)
        return moved.movedim(self.place, self.dim)


def pointwise(channels: int, target: int, maps: bool) -> nn.Module:
    """A linear map of the channels at every position: a 1x1 convolution of maps, else a layer."""
    return nn.Conv2d(channels, target, 1) if maps else nn.Linear(channels, target)


def resized(maps: Tensor, size: Size) -> Tensor:
    """Maps ``(B, C, H, W)`` in another size: averaged where smaller, else bilinear."""
    height, width = maps.shape[2:]
    if (height, width) == size:
        return maps
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
