"""Several networks that answer as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rarefy.batches import logits
from rarefy.distillation.losses import class_dim
from rarefy.errors import InputError


class Ensemble(nn.Module):
    """Several networks as one, whose answers are the weighted mean of theirs.

    A teacher like any other: of ``distill``, and of ``write_soft_labels``.

    Averaged logits are, as probabilities, the normalized geometric mean of the networks'
    distributions, averaged probabilities their arithmetic mean (both in Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 3). Logits can be averaged whatever they
    mean, also where outputs are no classes. With probabilities the answers are the logarithms of
    the means, from which any temperature can be taken.

    A loss of features names modules of the first network as ``"networks.0.layer3"``, of the second
    as ``"networks.1.layer3"``, and so on.

    Args:
        networks: at least one; they are held, and not copied.
        weights: of each, above 0; they are divided by their sum. None for equal ones.
        average: ``"logits"`` or ``"probabilities"``.
        dim: with probabilities, the dimension of the classes; None for the last of (B, C) and
            (B, L, C).

    Raises:
        InputError: there is no network, or the weights do not fit.

    Example:
        >>> teacher = Ensemble([nn.Linear(4, 2), nn.Linear(4, 2)], weights=[3, 1])
        >>> teacher.shares.tolist()
        [0.75, 0.25]
    """

    shares: Tensor
    """The weights, with sum 1. Like the kind of mean a buffer, so that fingerprints tell it."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        average: Literal["logits", "probabilities"] = "logits",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        listed = isinstance(networks, list | tuple | nn.ModuleList)
        strange = [n for n in networks if not isinstance(n, nn.Module)] if listed else [networks]
        if strange or not networks:
            kind = type(strange[0]).__name__ if strange else ""
            what = f"a {kind} is no {'network' if listed else 'list'}" if strange else "it is empty"
            remedy = "Give a list of networks, and their weights as weights=[...]"
            raise InputError("Ensemble(networks)", what, remedy)
        fits = weights is None or (isinstance(weights, Sequence) and len(weights) == len(networks))
        if not fits or not all(0 < w < math.inf for w in weights or ()):
            raise InputError(
                f"Ensemble(weights={weights!r})",
                f"{len(networks)} networks need as many weights above 0",
                "Give for example weights=[0.7, 0.3], or none for equal ones",
            )
        if average not in ("logits", "probabilities"):
            raise InputError(
                f"Ensemble(average={average!r})",
                "it is neither 'logits' nor 'probabilities'",
                "Write average='logits'",
            )
        self.networks, self.average, self.dim = nn.ModuleList(networks), average, dim
        given = [float(weight) for weight in weights or [1] * len(networks)]
        self.register_buffer("shares", torch.tensor([w / sum(given) for w in given]))
        self.register_buffer("probabilities", torch.tensor(average == "probabilities"))

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
        if self.average == "logits":
            return torch.stack([s * a for s, a in zip(self.shares, wide, strict=True)]).sum(0)
        dim = class_dim("Ensemble", wide[0], self.dim)
        logs = [s.log() + a.log_softmax(dim) for s, a in zip(self.shares, wide, strict=True)]
        return torch.stack(logs).logsumexp(0)
