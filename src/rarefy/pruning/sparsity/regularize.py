"""Penalties that drive weights, units or scales towards zero while a network is trained.

Each is a frozen value. Called with a network (and the step, for strengths that change) it returns
a scalar to add to the loss::

    loss = loss + L1(1e-5)(model)

and in rarefy's loop ``train(model, data, regularizer=L1(1e-5))``. A strength is a number or a
:data:`~rarefy.schedules.Schedule` of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.errors import InputError
from rarefy.graph.groups import Group
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Ref
from rarefy.graph.trace import Network
from rarefy.paths import unwrapped
from rarefy.pruning.sparsity.masks import Masks
from rarefy.schedules import Schedule

Strength: TypeAlias = float | Schedule
"""A factor on a penalty, or what it is at each step."""


@dataclass(frozen=True)
class L1:
    """``strength * sum |w|`` over the weights of two or more dimensions (Tibshirani 1996).

    Args:
        strength: at least 0, or a schedule.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> round(L1(0.5)(layer).item(), 6)
        1.5
    """

    strength: Strength

    def __post_init__(self) -> None:
        _check(self, self.strength)

    def __call__(self, model: nn.Module, step: int = 0) -> Tensor:
        """The penalty, a scalar on the network's device."""
        weights = [p for p in unwrapped(model).parameters() if p.ndim > 1]
        return _total(self, model, (w.abs().sum() for w in weights), at(self.strength, step))


@dataclass(frozen=True)
class Slimming:
    """``strength * sum |scale|`` over all BatchNorms: network slimming.

    Liu et al. 2017, https://arxiv.org/abs/1708.06519. Afterwards prune by the scales.

    Args:
        strength: at least 0, or a schedule.

    Example:
        >>> Slimming(0.1)(nn.BatchNorm2d(4)).item()
        0.4000000059604645
    """

    strength: Strength

    def __post_init__(self) -> None:
        _check(self, self.strength)

    def __call__(self, model: nn.Module, step: int = 0) -> Tensor:
        """The penalty, a scalar on the network's device."""
        sums = (scale.abs().sum() for scale in _scales(model))
        return _total(self, model, sums, at(self.strength, step))


@dataclass(frozen=True)
class GroupLasso:
    """``strength * sum over units of sqrt(size) * ||w||_2``: whole units go to zero together.

    ``w`` are all weights that go with a unit, in all coupled layers, and ``size`` is their number
    (Yuan and Lin 2006; for networks Wen et al. 2016, https://arxiv.org/abs/1608.03665). A weight
    between two units counts with both.

    Args:
        network: ``rarefy.trace(model, example_inputs)``.
        strength: at least 0, or a schedule.

    Example:
        >>> from rarefy.graph.trace import trace
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> _ = [p.data.fill_(1.0) for p in net.parameters()]
        >>> round(GroupLasso(trace(net, torch.zeros(2, 2)), 1.0)(net).item(), 4)
        6.0
    """

    network: Network = field(repr=False)
    strength: Strength

    def __post_init__(self) -> None:
        _check(self, self.strength)
        if not isinstance(self.network, Network):
            raise InputError(
                f"GroupLasso(network={type(self.network).__name__})",
                "which weights go with a unit is in the trace of a network",
                "Write GroupLasso(rarefy.trace(model, example_inputs), 1e-4)",
            )

    def __call__(self, model: nn.Module, step: int = 0) -> Tensor:
        """The penalty, a scalar on the network's device."""
        parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        for node in self.network.captured.graph.nodes:
            held = parameters.get(node.path) if node.op == "tensor" else None
            if held is not None and held.shape != node.shape:
                raise InputError(
                    "GroupLasso(network=...)",
                    f"it is the trace of another network: {node.path} had shape {node.shape} "
                    f"there, and has {tuple(held.shape)}",
                    "Trace the network that is trained; anew after it was pruned",
                )
        sums = (x for group in self.network.groups for x in _lasso(group, parameters))
        return _total(self, model, sums, at(self.strength, step))


@dataclass(frozen=True)
class GrowingL2:
    """``strength / 2 * sum w^2`` over the weights that are to go, with a strength that grows.

    Wang et al. 2021, "Neural Pruning via Growing Regularization" (GReg-1),
    https://arxiv.org/abs/2012.09243: what goes is chosen at the start and pushed to zero ever
    harder, so that its removal at the end costs little. The paper adds ``delta`` to the strength
    every few steps up to a ceiling: ``Linear(0.0, ceiling, steps)``.

    Args:
        masks: what stays, for example ``Masks.of(prune(model, x, budget, structure="weight"))``.
        strength: at least 0, or a schedule.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> going = Masks({"weight": torch.tensor([[True, False]])})
        >>> GrowingL2(going, lambda step: 0.1 * step)(layer, step=10).item()
        8.0
    """

    masks: Mapping[str, Tensor] = field(repr=False)
    strength: Strength

    def __post_init__(self) -> None:
        _check(self, self.strength)
        object.__setattr__(self, "masks", Masks(self.masks))  # frozen

    def __call__(self, model: nn.Module, step: int = 0) -> Tensor:
        """The penalty, a scalar on the network's device."""
        pairs = Masks(self.masks).pairs(model)
        sums = (weight.masked_fill(keep, 0.0).square().sum() / 2 for weight, keep in pairs)
        return _total(self, model, sums, at(self.strength, step))


Regularizer: TypeAlias = L1 | Slimming | GroupLasso | GrowingL2
"""The penalties of this file; the loop takes any function ``(model, step) -> scalar``."""


def at(strength: Strength, step: int) -> float:
    """What a strength is at a step."""
    return strength(step) if callable(strength) else strength


def _check(owner: object, strength: Strength) -> None:
    number = isinstance(strength, int | float) and 0 <= strength < float("inf")
    if not callable(strength) and not number:
        raise InputError(
            f"{type(owner).__name__}(strength={strength!r})",
            "a strength is a number, at least 0, or a schedule",
            "Write for example strength=1e-4",
        )


def _total(owner: object, model: nn.Module, sums: Iterator[Tensor], strength: float) -> Tensor:
    found = list(sums)
    if not found:
        raise InputError(
            type(owner).__name__,
            f"{type(model).__name__} has nothing that it concerns",
            "Give the network that it was made for, or use another penalty",
        )
    return strength * torch.stack(found).sum()


def _scales(model: nn.Module) -> Iterator[Tensor]:
    """Weights of all BatchNorms, also of those in a rewritten graph."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            yield module.weight
        elif isinstance(module, GraphModel):
            for node in module.graph.calls:
                ref = node.argument("weight") if node.kind == "batch_norm" else None
                if isinstance(ref, Ref) and module.graph.by_name[ref.name].op == "tensor":
                    yield module.tensor(module.graph.by_name[ref.name].path)


def _lasso(group: Group, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Sum over the units of a group of the root of their size times their norm."""
    members = [(m, parameters[m.path]) for m in group.members if m.path in parameters]
    if not members:
        return
    squares, size = torch.zeros((), device=members[0][1].device), 0
    for member, weight in members:
        by_entry = (
            weight.square().movedim(member.dim, 0).reshape(weight.shape[member.dim], -1).sum(1)
        )
        squares = squares + by_entry[torch.from_numpy(member.indices).to(weight.device)].sum(1)
        size += member.indices.shape[1] * weight.numel() // max(weight.shape[member.dim], 1)
    # the slope of a root is infinite at zero, where the penalty is to leave a unit alone
    safe = torch.where(squares > 0, squares, 1.0)
    norms = torch.where(squares > 0, safe.sqrt(), 0.0)
    yield math.sqrt(size) * norms.sum()
