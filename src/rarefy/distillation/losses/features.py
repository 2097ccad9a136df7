"""Losses of single features: hints, attention transfer, variational information."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rarefy.distillation.losses.base import FeatureLoss
from rarefy.distillation.losses.projectors import feature_rows, projector


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
