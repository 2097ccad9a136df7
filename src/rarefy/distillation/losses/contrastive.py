"""The contrastive loss: an example's features resemble the teacher's of the same example most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses.arithmetic import exact, unit
from rarefy.distillation.losses.base import POSITIVE, FeatureLoss, Number, require
from rarefy.distillation.losses.projectors import channel_dim, on, require_same_batch
from rarefy.distillation.losses.relations import averaged
from rarefy.errors import InputError


@dataclass(frozen=True)
class CRD(FeatureLoss):
    """Contrastive representation distillation, with the other examples of the batch as negatives.

    Tian et al. 2020, "Contrastive Representation Distillation". With unit vectors ``s``, ``t`` of
    the learned embeddings of student and teacher::

        -mean over examples i of (log softmax over j of s_i . t_j / T at j = i
                                  + log softmax over j of t_i . s_j / T at j = i) / 2

    The paper contrasts with 16,384 stored features of earlier batches by a noise-contrastive
    estimate. This contrasts with the batch by a softmax (InfoNCE, van den Oord et al. 2018), which
    needs no memory and no numbers of examples, and wants large batches. Examples of the same class
    are negatives too.

    The head makes the embeddings of both and learns both; the teacher's feature itself receives no
    gradients. Features are ``(B, C)``; those of sequences ``(B, L, C)`` and of maps ``(B, C, H,
    W)`` are averaged over their positions first.

    Args:
        temperature: T, above 0.
        width: length of the embeddings, at least 1.
        dim: dimension of the channels; None for 1 of maps, else the last.

    Raises:
        InputError: a number is out of range; when called, the shapes differ.

    Example:
        >>> round(CRD(temperature=1)(torch.eye(2), torch.eye(2)).item(), 4)
        0.3133
    """

    temperature: Number = 0.07
    width: int = 128
    dim: int | None = None

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")
        if not isinstance(self.width, int) or self.width < 1:
            raise InputError(
                f"CRD(width={self.width!r})", "embeddings have a length", "Write width=128"
            )

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        require_same_batch("CRD", student, teacher)
        found, wanted = (unit(averaged("CRD", x, mask, self.dim)) for x in (student, teacher))
        if found.shape != wanted.shape:
            raise InputError(
                "CRD",
                f"embeddings of {found.shape[1]} and {wanted.shape[1]} numbers differ",
                "Call it with what head(student, teacher) gives",
            )
        with exact(found):
            likeness = found @ wanted.T / self.number("temperature")
        own = torch.arange(len(found), device=found.device)
        both = [F.cross_entropy(x, own, reduction="sum") for x in (likeness, likeness.T)]
        return (both[0] + both[1]) / (2 * max(len(found), 1))

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_same_batch("CRD", student, teacher)
        places = [channel_dim("CRD", x, self.dim) for x in (student, teacher)]
        layers = [
            nn.Linear(x.shape[place], self.width)
            for x, place in zip((student, teacher), places, strict=True)
        ]
        return on(student, _Embeddings(layers, places))


class _Embeddings(nn.Module):
    """Features of both to embeddings of one width, at every position."""

    def __init__(self, layers: list[nn.Linear], places: list[int]) -> None:
        super().__init__()
        self.layers, self.places = nn.ModuleList(layers), places

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        embedded = [
            layer(feature.movedim(place, -1).to(next(layer.parameters()).dtype)).movedim(-1, place)
            for layer, feature, place in zip(
                self.layers, (student, teacher.detach()), self.places, strict=True
            )
        ]
        return embedded[0], embedded[1]
