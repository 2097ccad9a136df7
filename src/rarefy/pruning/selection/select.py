"""Scores and a budget -> which units go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.graph.flow import every
from rarefy.graph.groups import Mask
from rarefy.graph.labels import Atoms
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.scoring.curves import Losses
from rarefy.pruning.selection import accounts
from rarefy.pruning.selection.accounts import Account
from rarefy.pruning.selection.allocation import (
    LEVELS,
    Allocation,
    Choices,
    Lane,
    even,
    knapsack,
    ranked,
)
from rarefy.pruning.selection.costs import Costs
from rarefy.pruning.selection.landing import Landed, Track, is_close, landed
from rarefy.pruning.selection.limits import Range, ranges
from rarefy.pruning.selection.projections import projections
from rarefy.pruning.structure.sizes import Sizes
from rarefy.types import Budget

OPTIONS = 32
"""Alternatives of each group that a knapsack chooses from, at most; single units then close in."""


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
    costs: Costs | None = None,
    losses: Mapping[int, Losses] | None = None,
) -> Plan:
    """Choose the units that go so that what remains fits the budget.

    Units are ranked by score: within each group (``scope="local"``), or over the whole network by
    score per saved cost (``scope="global"``), where others go on for those that limits keep. Where
    the cost is latency, which falls in steps, or where the loss was measured, a knapsack problem is
    solved instead. What still fits is given back in the end. Every group keeps what its limits say,
    and every tensor keeps an entry along every dimension.

    Args:
        network: the trace.
        model: the network, for the sizes of its parameters.
        scores: importance of every unit, one array per group.
        budget: what may remain, as a share of what can be counted.
        exclude: module or parameter paths, or patterns, whose outputs keep their width.
        sizes: what the user's forward states of its sizes; the plan is one that it can carry out,
            except where it states plain numbers.
        closed: numbers of groups that stay whole, each with the reason.
        keep_class: leave groups whole whose size the forward states as a plain number.
        costs: latencies of the layers, for a budget of latency.
        losses: group -> what the removal of a share of its units costs, measured; groups that are
            not in it stay whole.

    Raises:
        InputError: a name matches nothing; nothing can be pruned.
        BudgetError: the budget cannot be reached; the message says what can.
    """
    closed = closed or {}
    free = ranges(network, model, budget, exclude)
    allowed = {g: r for g, r in free.items() if g not in closed and (losses is None or g in losses)}
    if not allowed:
        raise _nothing(network)
    account = accounts.account(network, model, budget, costs)
    choice = Choice(network, scores, allowed, account, keep_class)
    even = budget.scope == "local"
    search = _Search(choice, choice.allocation(budget, losses), closed, sizes, even)
    if account is None:
        found, missed = _of_units(search, budget, free, ranking=losses is None or even)
    else:
        found, missed = _of_cost(search, budget), []
    gone = dict(zip(choice.groups, found.counts, strict=True))
    missed += _held_back(network, free, gone)
    left = None if account is None else found.share
    return replace(found.plan, left=left, missed="; ".join(missed))


@dataclass(frozen=True)
class _Search:
    """Plans for numbers of units that go.

    Attributes:
        choice: what may go.
        allocate: a share -> how many units of each group that takes.
        closed: groups that stay whole.
        sizes: what the forward states of its sizes.
        even: whether all groups lose the same share.
    """

    choice: Choice
    allocate: Allocation
    closed: Mapping[int, str]
    sizes: Sizes | None
    even: bool

    def tried(self, counts: Sequence[int]) -> Landed:
        """What comes of so many units of each group."""
        plan = self.choice.plan(counts, self.closed, self.sizes)
        return Landed(plan, self.choice.counts(plan), self.choice.share(plan))

    def most(self) -> Landed:
        """As much as may go."""
        return self.tried(self.allocate(1.0))

    def down_to(self, share: float) -> Landed | None:
        """The least removal that leaves no more than a share; None where none does."""
        choice = self.choice
        together = () if self.sizes is None else choice.together(self.sizes)
        levels = max(sum(map(len, choice.network.groups)), LEVELS)
        how = (self.allocate, choice.lanes, self.tried, share, levels)
        return landed(*how, even=self.even, together=together)


def _of_cost(search: _Search, budget: Budget) -> Landed:
    """The least removal within a budget of a cost."""
    found = search.down_to(budget.share)
    if found is None:
        raise _out_of_reach(budget, search.most().share)
    return found


def _of_units(
    search: _Search, budget: Budget, free: Mapping[int, Range], *, ranking: bool
) -> tuple[Landed, list[str]]:
    """The removal of a share of the units, and what of it cannot be had.

    Args:
        search: plans.
        budget: the share that goes.
        free: how many units of each group may go, of those too that stay whole.
        ranking: whether units go by their scores; others go on for those that limits keep.
    """
    choice, even = search.choice, search.even
    own = [r.size for r in (choice.allowed if even else free).values()]
    asked = sum(_share_of(size, budget.share) for size in (own if even else [sum(own)]))
    counts = search.allocate(budget.share)
    found = search.tried(counts) if ranking else None
    if found is None or not (even or sum(found.counts) == asked):
        units = sum(map(len, choice.network.groups))
        found = search.down_to(1 - asked / units) or search.most()
    gone = sum(found.counts)
    allowing = sum(choice.taken(counts).values()) if even else gone
    return found, [] if is_close(allowing, asked) else [_short(budget, asked, gone)]


def _share_of(units: int, share: float) -> int:
    """So many of these units are a share of them."""
    return math.floor(share * units + 1e-9)


def _short(budget: Budget, asked: int, gone: int) -> str:
    """How many of the units that a sparsity takes stay."""
    return (
        f"sparsity={budget.share:g} takes {asked} units, and min_keep, max_drop, round_to, layers, "
        f"sizes that the forward states, or the projections of an LSTM, let {gone} of them go"
    )


def _held_back(network: Network, free: Mapping[int, Range], gone: Mapping[int, int]) -> list[str]:
    """Groups that keep units which their own limits take."""
    return [
        f"layers= takes {r.low} of {r.size} units of {network.groups[g].name}, and its forward, or "
        f"what its units are measured on, lets {gone.get(g, 0)} of them go"
        for g, r in free.items()
        if gone.get(g, 0) < r.low
    ]


def _nothing(network: Network) -> InputError:
    reasons = "; ".join(str(f) for f in network.frozen[:4])
    return InputError(
        "prune(model)",
        f"no unit of this network can be removed{' (' + reasons + ')' if reasons else ''}",
        "Exclude less, or change what holds the units; rarefy.trace(model, example_inputs) "
        "lists every tensor with its reason",
    )


def _out_of_reach(budget: Budget, reachable: float) -> BudgetError:
    least = math.ceil(reachable * 1000) / 1000
    return BudgetError(
        f"prune(budget=Budget({budget.kind}={budget.share:g}))",
        f"the smallest share that can remain is {reachable:.3f}",
        f"Ask for {budget.kind}={least:g} or more, or relax min_keep, max_drop, round_to, layers "
        "and exclude",
    )


class Choice:
    """Numbers of units to remove -> a plan, and what it leaves.

    Args:
        network: the trace.
        scores: importance of every unit.
        allowed: how many units of each group may go.
        account: the cost that counts; None counts units.
        force: leave units in place also where the forward states a plain number.
    """

    def __init__(
        self,
        network: Network,
        scores: Scores,
        allowed: Mapping[int, Range],
        account: Account | None,
        force: bool,
    ) -> None:
        self.network, self.scores, self.allowed = network, scores, allowed
        self.account, self.force = account, force
        self.groups = tuple(allowed)
        self.dimensions = _Dimensions(network)
        self.projections = [one for one in projections(network) if one.hidden[0] in allowed]
        self.order = {g: np.argsort(scores[g], kind="stable") for g in self.groups}
        least = min([0.0, *(scores[g].min(initial=0.0) for g in self.groups)])
        self.lanes = tuple(  # a share of what is saved asks for a zero below all scores
            Lane(np.sort(scores[g]) - least, self._saved_by_one(g), allowed[g]) for g in self.groups
        )

    def plan(self, counts: Sequence[int], closed: Mapping[int, str], sizes: Sizes | None) -> Plan:
        """The units with the least scores go, as many of each group as are counted and allowed."""
        removed = np.zeros(self.network.coupling.units, np.bool_)
        for g, count in self.taken(counts).items():
            removed[self.network.groups[g].units[self.order[g][:count]]] = True
        found = replace(
            _keep_alive(self.network, self.dimensions, removed, self.scores), whole=closed
        )
        if sizes is None:
            return found
        floors = {g: r.size - r.high for g, r in self.allowed.items()}
        step = max(r.step for r in self.allowed.values())
        return sizes.agree(found, self.scores, floors, step, force=self.force)

    def taken(self, counts: Sequence[int]) -> dict[int, int]:
        """Group -> how many of its units may go where so many should."""
        found = {g: self.allowed[g].nearest(n) for g, n in zip(self.groups, counts, strict=True)}
        for projection in self.projections:
            hidden, *_ = projection.hidden
            found[hidden] = min(found[hidden], projection.most(found))
        return found

    def together(self, sizes: Sizes) -> tuple[Track, ...]:
        """Groups that may have to shrink by one share, by their places among the lanes."""
        place = {g: i for i, g in enumerate(self.groups)}
        tracks = (tuple(place[g] for g in groups) for groups in sizes.together(place))
        return tuple(dict.fromkeys(tracks))

    def counts(self, plan: Plan) -> tuple[int, ...]:
        """How many units of each group a plan takes."""
        return tuple(int(plan.removed[self.network.groups[g].units].sum()) for g in self.groups)

    def share(self, plan: Plan) -> float:
        """What a plan leaves of the cost."""
        if self.account is not None:
            return self.account.share(plan)
        return 1 - float(plan.removed.sum()) / sum(map(len, self.network.groups))

    def allocation(self, budget: Budget, losses: Mapping[int, Losses] | None) -> Allocation:
        """How the removal is divided between the groups."""
        if budget.scope == "local":
            return even(self.lanes)
        if losses is not None or budget.latency is not None:
            return knapsack(self.choices(losses))
        return ranked(self.lanes)

    def choices(self, losses: Mapping[int, Losses] | None) -> list[Choices]:
        """Alternatives of every group."""
        return [
            self._choices(i, None if losses is None else losses[g])
            for i, g in enumerate(self.groups)
        ]

    def _choices(self, lane: int, losses: Losses | None) -> Choices:
        """Alternatives of one group: by the losses measured, or by its units' scores."""
        g, allowed = self.groups[lane], self.allowed[self.groups[lane]]
        most = allowed.nearest(allowed.high)
        wanted = np.linspace(allowed.low, most, OPTIONS)
        counts = sorted({allowed.nearest(math.ceil(n)) for n in wanted})
        scored = np.concatenate([[0.0], np.cumsum(self.lanes[lane].values)])
        lost = (
            scored
            if losses is None
            else losses(np.arange(len(scored)) / max(len(self.order[g]), 1))
        )
        return Choices(
            tuple(counts),
            tuple(float(lost[n]) for n in counts),
            tuple(self._saved(g, n) for n in counts),
        )

    def _saved_by_one(self, group: int) -> float:
        whole = sum(map(len, self.network.groups)) if self.account is None else self.account.before
        return max(self._saved(group, 1) / max(whole, 1e-12), 1e-12)

    def _saved(self, group: int, count: int) -> float:
        """What the removal of so many units of one group alone saves."""
        if self.account is None:
            return float(count)
        removed = np.zeros(self.network.coupling.units, np.bool_)
        removed[self.network.groups[group].units[self.order[group][:count]]] = True
        return self.account.before - self.account(Plan.of(self.network, removed))


class _Dimensions:
    """The labels of all dimensions, each distinct one once, to tell which would be left empty."""

    def __init__(self, network: Network) -> None:
        labels = (atoms for found in network.flow.labels.values() for atoms in every(found))
        self._labels = list({id(atoms): atoms for atoms in labels if len(atoms)}.values())
        lengths = np.array([len(atoms) for atoms in self._labels], np.int64)
        self._start = np.cumsum(lengths) - lengths
        self._atoms = np.concatenate(self._labels) if self._labels else np.zeros(0, np.int64)

    def empty(self, plan: Plan) -> list[Atoms]:
        """Those of which a plan leaves nothing."""
        if not self._labels:
            return []
        empty = np.logical_and.reduceat(plan.gone[self._atoms], self._start)
        return [self._labels[i] for i in np.flatnonzero(empty)]


def _keep_alive(network: Network, dimensions: _Dimensions, removed: Mask, scores: Scores) -> Plan:
    """Give back units until every dimension of every tensor keeps an entry."""
    plan = Plan.of(network, removed)
    value = np.zeros(network.coupling.units)
    for group, score in zip(network.groups, scores, strict=True):
        value[group.units] = score
    for atoms in dimensions.empty(plan):
        if not plan.gone[atoms].all():
            continue
        units = np.unique(network.coupling.pairs(atoms)[0])
        held = units[plan.removed[units]]
        best = held[np.argmax(value[held])]
        entries = network.coupling.pairs(atoms)
        again = plan.removed.copy()
        entry = entries[1][entries[0] == best][0]
        again[entries[0][entries[1] == entry]] = False
        plan = Plan.of(network, again)
    return plan
