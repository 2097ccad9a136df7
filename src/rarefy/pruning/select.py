"""Scores and a budget -> which units go."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.graph.count import graph_macs
from rarefy.graph.flow import every
from rarefy.graph.groups import Group, Mask
from rarefy.graph.program import Spec
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.sizes import Sizes
from rarefy.types import Budget


def select(
    network: Network,
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    exclude: Sequence[str] = (),
    sizes: Sizes | None = None,
    *,
    closed: Mapping[int, str] | None = None,
    keep_class: bool = False,
) -> Plan:
    """Choose the units that go so that what remains fits the budget.

    Units are ranked by score: within each group (``scope="local"``), or over the whole network by
    score per saved cost (``scope="global"``). Every group keeps ``min_keep`` units and loses at
    most ``max_drop`` of them, and every tensor keeps an entry along every dimension.

    Args:
        network: the trace.
        model: the network, for the sizes of its parameters.
        scores: importance of every unit, one array per group.
        budget: what may remain.
        exclude: module or parameter paths whose outputs keep their width.
        sizes: what the user's forward states of its sizes; the plan is one that it can carry out,
            except where it states plain numbers.
        closed: numbers of groups that stay whole, each with the reason.
        keep_class: leave groups whole whose size the forward states as a plain number.

    Raises:
        InputError: an excluded name matches nothing; nothing can be pruned.
        BudgetError: the budget cannot be reached; the message says what can.
    """
    closed = closed or {}
    open_groups = [g for g in free_groups(network, model, exclude) if g not in closed]
    if not open_groups:
        reasons = "; ".join(str(f) for f in network.frozen[:4])
        raise InputError(
            "prune(model)",
            f"no unit of this network can be removed{' (' + reasons + ')' if reasons else ''}",
            "Exclude less, or change what holds the units; rarefy.trace(model, example_inputs) "
            "lists every tensor with its reason",
        )
    accountant = Accountant(network, model)
    floors = {g: floor_of(network.groups[g], budget) for g in open_groups}
    widths = {g: len(network.groups[g]) for g in open_groups}
    if budget.scope == "local":
        counter = _local(widths)
    else:
        even = [1.0] * len(network.groups)
        saved = even if budget.sparsity is not None else accountant.savings(budget)
        counter = _global(widths, scores, saved)
    choose = _chooser(network, counter, scores, floors, budget)

    def plan(share: float) -> Plan:
        found = replace(_keep_alive(network, choose(share), scores), whole=closed)
        if sizes is None:
            return found
        return sizes.agree(found, scores, floors, budget.round_to, force=keep_class)

    if budget.sparsity is not None:
        return plan(budget.sparsity)
    return _fit(network, accountant, plan, budget)


def free_groups(network: Network, model: nn.Module, exclude: Sequence[str]) -> list[int]:
    """Groups none of whose own outputs is excluded."""
    paths = {name for name, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    for name in exclude:
        if name not in paths:
            near = difflib.get_close_matches(name, sorted(paths - {""}), 3)
            raise InputError(
                f"prune(exclude=[{name!r}])",
                "no module or parameter has that path",
                f"Did you mean {' or '.join(near)}" if near else "See model.named_modules()",
            )
    transposed = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvTransposeNd)
    }

    def excluded(group: Group) -> bool:
        for member in group.members:
            owner = member.path.rpartition(".")[0]
            own_dim = 1 if owner in transposed and member.path.endswith(".weight") else 0
            if member.dim == own_dim and any(
                member.path == name or f"{member.path}.".startswith(f"{name}.") for name in exclude
            ):
                return True
        return False

    return [g for g, group in enumerate(network.groups) if not excluded(group)]


def floor_of(group: Group, budget: Budget) -> int:
    """The number of units that a group keeps whatever the budget."""
    most = math.floor(len(group) * budget.max_drop + 1e-9)
    return min(len(group), max(budget.min_keep, len(group) - most, 1))


class Accountant:
    """MACs and parameters that remain under a plan."""

    def __init__(self, network: Network, model: nn.Module) -> None:
        self.network = network
        graph = network.captured.graph
        self.tensors = {n.path: n.name for n in graph.nodes if n.op == "tensor"}
        self.unread = 0
        self.counted: list[str] = []
        for path, parameter in model.named_parameters():
            if path in self.tensors:
                self.counted.append(self.tensors[path])
            else:
                self.unread += parameter.numel()
        nothing = np.zeros(network.coupling.units, np.bool_)
        self.macs_before = self.macs(Plan.of(network, nothing))
        self.params_before = self.params(Plan.of(network, nothing))

    def shape(self, plan: Plan) -> Callable[[str], tuple[int, ...]]:
        survivors: dict[int, int] = {}

        def left(size: int, atoms: NDArray[np.int64] | None) -> int:
            if atoms is None:
                return size
            if id(atoms) not in survivors:
                survivors[id(atoms)] = size - int(plan.gone[atoms].sum())
            return survivors[id(atoms)]

        def shape(name: str) -> tuple[int, ...]:
            value = self.network.captured.graph.by_name[name].value
            assert isinstance(value, Spec)
            labels = self.network.flow.labels[name]
            return tuple(left(n, a) for n, a in zip(value.shape, labels, strict=True))

        return shape

    def macs(self, plan: Plan) -> int:
        return sum(graph_macs(self.network.captured.graph, self.shape(plan)).values())

    def params(self, plan: Plan) -> int:
        shape = self.shape(plan)
        return self.unread + sum(prod(shape(name)) for name in self.counted)

    def share(self, plan: Plan, budget: Budget) -> float:
        if budget.macs is not None:
            return self.macs(plan) / max(self.macs_before, 1)
        return self.params(plan) / max(self.params_before, 1)

    def savings(self, budget: Budget) -> list[float]:
        """What removing one unit of each group saves, in MACs or parameters."""
        before = self.params_before if budget.params is not None else self.macs_before
        found = []
        for group in self.network.groups:
            removed = np.zeros(self.network.coupling.units, np.bool_)
            removed[group.units[0]] = True
            plan = Plan.of(self.network, removed)
            after = self.params(plan) if budget.params is not None else self.macs(plan)
            found.append(max(float(before - after), 1.0))
        return found


Chooser = Callable[[float], Mask]
"""Share of units to remove, 0 to 1 -> which units go."""
Counter = Callable[[float], Mapping[int, int]]
"""Share of units to remove, 0 to 1 -> how many go of each group."""


def _chooser(
    network: Network, counter: Counter, scores: Scores, floors: Mapping[int, int], budget: Budget
) -> Chooser:
    """The units with the least scores go, as many of each group as are counted, rounded."""
    order = {g: np.argsort(scores[g], kind="stable") for g in floors}

    def choose(share: float) -> Mask:
        removed = np.zeros(network.coupling.units, np.bool_)
        counts = counter(share)
        for g, floor in floors.items():
            units = network.groups[g].units
            removed[units[order[g][: _rounded(counts[g], len(units), floor, budget)]]] = True
        return removed

    return choose


def _local(sizes: Mapping[int, int]) -> Counter:
    """The same share of every group."""
    return lambda share: {g: math.floor(share * n + 1e-9) for g, n in sizes.items()}


def _global(sizes: Mapping[int, int], scores: Scores, saved: Sequence[float]) -> Counter:
    """The least scores per saved cost of all groups together."""
    owner = np.concatenate([np.full(n, g) for g, n in sizes.items()])
    value = np.concatenate([_ascending(scores[g]) / saved[g] for g in sizes])
    rank = np.argsort(value, kind="stable")

    def count(share: float) -> Mapping[int, int]:
        first = owner[rank[: math.floor(share * len(rank) + 1e-9)]]
        counts = np.bincount(first, minlength=max(sizes) + 1)
        return {g: int(counts[g]) for g in sizes}

    return count


def _ascending(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of a group in ascending order: which of its units go is decided by ``order``."""
    return np.asarray(np.sort(scores))


def _rounded(count: int, size: int, floor: int, budget: Budget) -> int:
    """How many of ``size`` units go so that a multiple of ``round_to`` (and the floor) stays."""
    keep = max(size - count, floor)
    if size > budget.round_to:
        keep = min(size, math.ceil(keep / budget.round_to) * budget.round_to)
    return size - keep


def _fit(
    network: Network,
    accountant: Accountant,
    choose: Callable[[float], Plan],
    budget: Budget,
) -> Plan:
    """The least removal that fits, by bisection over the share of units removed."""
    limit = budget.macs if budget.macs is not None else budget.params
    assert limit is not None
    total = sum(len(g) for g in network.groups)
    low, high = 0, total
    most = choose(1.0)
    reachable = accountant.share(most, budget)
    if reachable > limit:
        name = "macs" if budget.macs is not None else "params"
        raise BudgetError(
            f"prune(budget=Budget({name}={limit:g}))",
            f"the smallest share that can remain is {reachable:.3f}",
            f"Ask for {name}={math.ceil(reachable * 1000) / 1000:g} or more, or relax min_keep, "
            "max_drop, round_to and exclude",
        )
    best = most
    while low < high:
        middle = (low + high) // 2
        plan = choose(middle / total)
        if accountant.share(plan, budget) <= limit:
            best, high = plan, middle
        else:
            low = middle + 1
    return best


def _keep_alive(network: Network, removed: Mask, scores: Scores) -> Plan:
    """Give back units until every dimension of every tensor keeps an entry."""
    plan = Plan.of(network, removed)
    value = np.zeros(network.coupling.units)
    for group, score in zip(network.groups, scores, strict=True):
        value[group.units] = score
    seen: set[int] = set()
    for labels in network.flow.labels.values():
        for atoms in every(labels):
            if not len(atoms) or id(atoms) in seen or not plan.gone[atoms].all():
                continue
            seen.add(id(atoms))
            units = np.unique(network.coupling.pairs(atoms)[0])
            held = units[plan.removed[units]]
            best = held[np.argmax(value[held])]
            entries = network.coupling.pairs(atoms)
            again = plan.removed.copy()
            entry = entries[1][entries[0] == best][0]
            again[entries[0][entries[1] == entry]] = False
            plan = Plan.of(network, again)
    return plan
