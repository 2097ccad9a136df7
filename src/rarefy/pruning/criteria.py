"""How important a unit is: pure functions from a group's tensors to scores of shape (units,).

A criterion receives a :class:`~rarefy.graph.groups.Group` and the network's tensors by path, and
returns one score per unit; the smallest go first. Scores should be comparable between groups,
since a global budget ranks them together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.errors import InputError
from rarefy.graph.groups import Group, Member

Criterion: TypeAlias = Callable[[Group, Mapping[str, Tensor]], Tensor]
"""(group, tensors by path) -> scores, float64, shape (units,)."""


def magnitude(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Share of each coupled layer's squared weights that a unit holds, summed over the layers.

    ``score(u) = sum over weights W of ||W[u]||^2 / ||W||^2`` (L2 magnitude, Li et al. 2017,
    https://arxiv.org/abs/1608.08710, summed over coupled parameters as in Fang et al. 2023,
    https://arxiv.org/abs/2301.12900). Dividing by the layer's norm makes layers of different
    scale count alike.
    """
    return _shares(group, tensors, lambda w: w.square())


def magnitude_l1(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """As :func:`magnitude` with absolute values: ``||W[u]||_1 / ||W||_1``."""
    return _shares(group, tensors, lambda w: w.abs())


def random(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Uniform scores, the control; equal for equal groups."""
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    return torch.rand(len(group), generator=generator, dtype=torch.float64)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": magnitude,
    "l1": magnitude_l1,
    "random": random,
}
"""Shorthand -> criterion."""


def named(criterion: str | Criterion) -> Criterion:
    """A criterion from its shorthand, or itself.

    Raises:
        InputError: no criterion has that name.
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise InputError(
            f"prune(criterion={criterion!r})",
            "no criterion has that name",
            f"Use one of {', '.join(CRITERIA)}, or a function (group, tensors) -> scores",
        )
    return CRITERIA[criterion]


def scored(
    group: Group, tensors: Mapping[str, Tensor], criterion: Criterion
) -> NDArray[np.float64]:
    """The scores of a group, held against what a criterion promises.

    Raises:
        InputError: they are not one finite number for each unit.
    """
    scores = torch.as_tensor(criterion(group, tensors)).detach().to("cpu", torch.float64)
    if tuple(scores.shape) != (len(group),) or not bool(torch.isfinite(scores).all()):
        raise InputError(
            f"criterion {getattr(criterion, '__name__', criterion)!r}",
            f"for group {group.name} it returned shape {tuple(scores.shape)} with "
            f"{int((~torch.isfinite(scores)).sum())} values that are not finite",
            f"Return one finite score for each of the {len(group)} units",
        )
    found: NDArray[np.float64] = scores.numpy()
    return found


def _shares(
    group: Group, tensors: Mapping[str, Tensor], measure: Callable[[Tensor], Tensor]
) -> Tensor:
    scores = torch.zeros(len(group), dtype=torch.float64)
    for member, weight in weights(group, tensors):
        values = measure(weight.detach().to("cpu", torch.float64))
        per_index = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
        total = per_index.sum().clamp_min(torch.finfo(torch.float64).tiny)
        scores += per_index[torch.from_numpy(member.indices)].sum(1) / total
    return scores


def weights(group: Group, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """Members that are weight matrices or kernels, or all where a group has none."""
    found = [(m, tensors[m.path]) for m in group.members if m.path in tensors]
    kernels = [(m, t) for m, t in found if t.ndim > 1 and t.is_floating_point()]
    yield from kernels or [(m, t) for m, t in found if t.is_floating_point()]
