"""A budget and the user's names -> how many units of each group may go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rarefy.errors import InputError
from rarefy.graph.trace import Network, storages
from rarefy.paths import excluded, matches, matching, paths, within
from rarefy.types import Budget, Limit


@dataclass(frozen=True)
class Range:
    """How many of ``size`` units may go: from ``low`` to ``high``, leaving a multiple of ``step``.

    Where there are not more than ``step`` units, any number may stay.

    Example:
        >>> Range(size=64, low=0, high=60, step=16).nearest(30)
        16
    """

    size: int
    low: int
    high: int
    step: int = 1

    def nearest(self, count: int) -> int:
        """How many go where ``count`` should: never more of them, except for ``low``."""
        keep = self.size - min(max(count, self.low), self.high)
        if self.size > self.step:
            keep = min(self.size, math.ceil(keep / self.step) * self.step)
        return self.size - keep

    def fewer(self, count: int, by: int = 1) -> int:
        """A number smaller by at least ``by`` that may go, or ``count`` where there is none."""
        found = self.nearest(count - by)
        return found if self.low <= found < count else count

    def more(self, count: int) -> int:
        """The next larger number that may go, or ``count`` where there is none."""
        step = self.step if self.size > self.step else 1
        keep = (self.size - count - 1) // step * step
        return self.size - keep if keep >= self.size - self.high else count


def ranges(
    network: Network,
    model: nn.Module,
    budget: Budget,
    exclude: Sequence[str] = (),
) -> dict[int, Range]:
    """For each group that may lose units, how many.

    A name concerns the groups that its own outputs belong to: of a stream that several layers add
    to, the limit of any of them holds for all.

    Args:
        network: the trace.
        model: the network.
        budget: with the limits of single layers.
        exclude: paths or patterns whose own outputs keep their width.

    Raises:
        InputError: a name matches nothing, or nothing that could be removed.
    """
    known = paths(model)
    outputs = _outputs(network, model)
    held = _named(excluded(exclude, known), outputs)
    limits: dict[int, Limit] = {}
    for name, limit in budget.limits:
        where = f"Budget(layers={{{name!r}: ...}})"
        concerned = _named(matching(name, known, where), outputs)
        if not concerned:
            raise InputError(
                where,
                "none of its outputs can be removed",
                "Leave it out; rarefy.trace(model, example_inputs) lists what can go and why the "
                "rest cannot",
            )
        limits |= dict.fromkeys(concerned, limit)
    return {
        g: _range(len(group), budget, limits.get(g, Limit(max_drop=budget.max_drop)))
        for g, group in enumerate(network.groups)
        if g not in held
    }


def concerning(network: Network, model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of these paths and patterns that outputs of any group match."""
    known = paths(model)
    outputs = _outputs(network, model)
    return frozenset(name for name in names if _named(matches(name, known), outputs))


def _outputs(network: Network, model: nn.Module) -> dict[int, tuple[str, ...]]:
    """For each group, the parameters whose own outputs its units are, by all of their names."""
    identity, names = storages(model), dict[int, list[str]]()
    for path, tensor in identity.items():
        names.setdefault(tensor, []).append(path)
    return {
        g: tuple(
            name
            for m in group.members
            if m.dim == output_dim(model, m.path)
            for name in names.get(identity.get(m.path, -1), [m.path])
        )
        for g, group in enumerate(network.groups)
    }


def output_dim(model: nn.Module, path: str) -> int:
    """The dimension of a parameter that holds its layer's outputs."""
    owner, _, leaf = path.rpartition(".")
    if leaf != "weight":
        return 0
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return 0
    return int(isinstance(module, nn.modules.conv._ConvTransposeNd))


def _named(names: frozenset[str], outputs: Mapping[int, Sequence[str]]) -> list[int]:
    return [g for g, own in outputs.items() if any(within(path, names) for path in own)]


def _range(size: int, budget: Budget, limit: Limit) -> Range:
    """The bounds of one group; at least one unit stays."""
    assert budget.round_to != "auto"
    if limit.sparsity is not None:
        count = min(math.floor(size * limit.sparsity + 1e-9), size - 1)
        count = Range(size, 0, count, budget.round_to).nearest(count)
        return Range(size, count, count, budget.round_to)
    drop = budget.max_drop if limit.max_drop is None else limit.max_drop
    keep = budget.min_keep if limit.min_keep is None else limit.min_keep
    most = min(math.floor(size * drop + 1e-9), size - keep, size - 1)
    return Range(size, 0, max(most, 0), budget.round_to)
