"""From scores of parameters to scores of units that are comparable between groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.graph.groups import Group, Member

TINY = torch.finfo(torch.float64).tiny


def share_of_the_rest(squares: Tensor) -> Tensor:
    """Each value over the sum of those that are not smaller: the scores of LAMP."""
    ordered, order = squares.double().flatten().sort(stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0)
    found = torch.where(rest == 0, 0.0, ordered / rest)
    return torch.empty_like(ordered).scatter_(0, order, found).view(squares.shape)


OVER: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "prod": lambda parts: parts.prod(0),
    "first": lambda parts: parts[0],
}
"""How scores of coupled parameters become one: (parameters, units) -> (units,). The first is the
layer that computes the units."""

SCALE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "share": lambda scores: scores,
    "none": lambda scores: scores,
    "sum": lambda scores: scores / scores.abs().sum().clamp_min(TINY),
    "mean": lambda scores: scores / scores.abs().mean().clamp_min(TINY),
    "max": lambda scores: scores / scores.abs().amax().clamp_min(TINY),
    "standardize": lambda s: (s - s.mean()) / s.std(correction=0).clamp_min(TINY),
    "lamp": share_of_the_rest,
}
"""How scores of a group are made comparable with those of others. ``"share"`` has been applied
before: each parameter's scores are divided by the sum over all of its entries."""


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Options of a criterion that scores units as such.

    Args:
        scale: how scores are made comparable between groups: a name in :data:`SCALE`.

    Raises:
        InputError: there is no such option.
    """

    scale: str = "none"

    def __post_init__(self) -> None:
        _check(self, "scale", self.scale, SCALE)


@dataclass(frozen=True, kw_only=True)
class Aggregated(Scaled):
    """Options of a criterion that scores units in each of the parameters that are coupled.

    Args:
        over: how scores in coupled parameters are combined: a name in :data:`OVER`.
        scale: how scores are made comparable between groups: a name in :data:`SCALE`.

    Raises:
        InputError: there is no such option.
    """

    over: str = "sum"
    scale: str = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "over", self.over, OVER)

    def combined(self, parts: Sequence[Tensor], units: int) -> Tensor:
        """Scores of each parameter as one, scaled; zeros where there is no parameter."""
        found = torch.stack(list(parts)) if parts else torch.zeros(1, units, dtype=torch.float64)
        return SCALE[self.scale](OVER[self.over](found))


def _check(options: object, name: str, value: str, known: Mapping[str, object]) -> None:
    if value not in known:
        raise InputError(
            f"{type(options).__name__}({name}={value!r})",
            "unknown option",
            f"Use one of {', '.join(known)}",
        )


def slices(values: Tensor, member: Member, *, share: bool) -> Tensor:
    """Sums over what of a parameter goes with each unit: (units,), as shares of all of it."""
    per_index = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
    found = per_index[torch.from_numpy(member.indices)].sum(1)
    return found / per_index.abs().sum().clamp_min(TINY) if share else found


def weights(group: Group, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """Members that are weight matrices or kernels, or all where a group has none."""
    found = [(m, tensors[m.path]) for m in group.members if m.path in tensors]
    kernels = [(m, t) for m, t in found if t.ndim > 1 and t.is_floating_point()]
    yield from kernels or [(m, t) for m, t in found if t.is_floating_point()]


def plain(tensor: Tensor) -> Tensor:
    """The values alone, in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)
