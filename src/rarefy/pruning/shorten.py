"""Which residual blocks a budget takes, alone or in competition with units, and taking them out.

Blocks and units are lanes of one choice: ranked together by importance per saved cost, or weighed
in one knapsack problem where losses were measured. The least removal that fits the budget is taken,
where the units and MACs of a block that goes are not counted a second time. The blocks found are
bypassed; the units are then chosen anew, in the network that is left, for what is left of the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.graph.blocks import Block
from rarefy.graph.trace import Network
from rarefy.paths import excluded, paths, within
from rarefy.pruning.plan import Plan
from rarefy.pruning.scoring.compensated import Response
from rarefy.pruning.scoring.influence import importances
from rarefy.pruning.selection import accounts
from rarefy.pruning.selection.accounts import Account
from rarefy.pruning.selection.allocation import (
    LEVELS,
    Allocation,
    Choices,
    Lane,
    knapsack,
    ranked,
)
from rarefy.pruning.selection.costs import Costs
from rarefy.pruning.selection.landing import Landed, closer, least_removal
from rarefy.pruning.selection.limits import Range, ranges
from rarefy.pruning.selection.select import Choice
from rarefy.pruning.structure.depth import BlockError, bypass
from rarefy.types import Budget, Data, Inputs


@dataclass(frozen=True)
class Shortened:
    """A network without some of its blocks.

    Attributes:
        model: the smaller network; the one given where no block went.
        blocks: what went.
        reason: why it is no instance of the user's class, or empty.
        error: the largest difference from masking, relative to the outputs' sensitivity.
        held: blocks that stay since the class does not work without them, each with the reason.
        left: the share that remains of what the budget counts; None where that is blocks.
    """

    model: nn.Module
    blocks: tuple[Block, ...] = ()
    reason: str = ""
    error: float = 0.0
    held: Mapping[str, str] = field(default_factory=dict)
    left: float | None = None


def shorten(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    judged: Response,
    budget: Budget,
    *,
    width: bool,
    data: Data | None = None,
    costs: Costs | None = None,
    spared: int = 0,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
) -> Shortened:
    """Bypass the residual blocks that a budget takes, with proof.

    Args:
        model: the network, which is left as it is.
        example_inputs: what it was traced with.
        network: its trace.
        judged: importance of all units.
        budget: what may remain, or how many blocks go.
        width: whether units go as well, so that blocks compete with them.
        data: batches on which the influence of blocks is measured.
        costs: latencies of the layers, for a budget of latency.
        spared: how many of the blocks that would go stay, the most important, where units go, too.
        exclude: paths or patterns of modules and parameters; blocks with any of them stay.
        keep_class: never return a rewritten graph.

    Raises:
        InputError: there is no block to remove, and only blocks may go; a name matches nothing.
        BudgetError: the budget cannot be reached with blocks alone.
        BlockError: the class has to be kept, and no block can go from it.
        ProofError: the smaller network differs from masking.
    """
    free = _free(network, model, exclude, width)
    if not free:
        return Shortened(model)
    importance = importances(model, network, _totals(judged), data)
    bounds = ranges(network, model, budget, exclude) if width else {}
    allowed = {g: own for g, own in bounds.items() if g not in judged.unmeasured}
    account = None if budget.blocks is not None else accounts.account(network, model, budget, costs)
    held: dict[str, str] = {}
    while True:
        still = [n for n in free if network.blocks[n].name not in held]
        chosen = _Choice(network, judged, importance, budget, still, allowed, account)
        blocks = chosen.among_units(spared) if width else chosen.alone()
        if not blocks:
            return Shortened(model, held=held, left=None if account is None else 1.0)
        try:
            small, reason, error = bypass(
                model, example_inputs, network, blocks, keep_class=keep_class
            )
        except BlockError as fault:
            held |= dict.fromkeys((b.name for b in fault.blocks), fault.what)
            if not width and all(network.blocks[n].name in held for n in free):
                raise
        else:
            left = None if account is None else account.share(Plan.without(network, blocks))
            return Shortened(small, blocks, reason, error, held, left)


def _totals(judged: Response) -> list[float]:
    """The importance of all units of each group together, measured where anything was."""
    if judged.losses is None:
        return [float(scores.sum()) for scores in judged.scores]
    known = judged.losses
    return [
        float(known[g](np.ones(1))[0]) if g in known else 0.0 for g in range(len(judged.scores))
    ]


def _free(
    network: Network, model: nn.Module, exclude: Collection[str], width: bool
) -> tuple[int, ...]:
    """Numbers of the blocks that may go.

    Raises:
        InputError: there are none, and nothing else may go; a name matches nothing.
    """
    named = excluded(exclude, paths(model))
    found = tuple(
        number
        for number, block in enumerate(network.blocks)
        if not any(within(path, named) for path in _paths(network, block))
    )
    if not found and not width:
        reasons = "; ".join(str(joint) for joint in network.joints[:3])
        what = "every block is excluded" if network.blocks else "it has no residual block"
        raise InputError(
            "prune(structure='depth')",
            f"{what} that can be bypassed{' (' + reasons + ')' if reasons else ''}",
            "Exclude less, or remove units: structure='channel'",
        )
    return found


def _paths(network: Network, block: Block) -> set[str]:
    """Modules and parameters that a block has."""
    graph = network.captured.graph
    return {*block.tensors, *block.shared, *(graph.by_name[n].scope for n in block.nodes)}


class _Choice:
    """Chooses blocks for a budget.

    Args:
        network: the trace.
        judged: importance of all units.
        importance: of every block.
        budget: what may remain.
        free: numbers of the blocks that may go.
        allowed: how many units of each group may go; none where only blocks do.
        account: the cost that counts; None counts blocks.
    """

    def __init__(
        self,
        network: Network,
        judged: Response,
        importance: NDArray[np.float64],
        budget: Budget,
        free: Sequence[int],
        allowed: Mapping[int, Range],
        account: Account | None,
    ) -> None:
        self.network, self.budget, self.account = network, budget, account
        self.losses = judged.losses
        if self.losses is not None:
            allowed = {g: r for g, r in allowed.items() if g in self.losses}
        self.units = Choice(network, judged.scores, allowed, account, force=False)
        self.blocks = [network.blocks[n] for n in free]
        single = Range(size=1, low=0, high=1)
        self.own = [
            Lane(importance[[n]], self._saved(block), single)
            for n, block in zip(free, self.blocks, strict=True)
        ]
        self.lanes = (*self.units.lanes, *self.own)

    def _saved(self, block: Block) -> float:
        """The share of the cost that one block saves."""
        if self.account is None:
            return 1.0
        return max(1 - self.account.share(Plan.without(self.network, [block])), 1e-12)

    def attempt(self, counts: Sequence[int]) -> Landed:
        """The plan that takes so many units of each group, and each block or not."""
        units, own = counts[: len(self.units.lanes)], counts[len(self.units.lanes) :]
        going = tuple(b for b, count in zip(self.blocks, own, strict=True) if count)
        plan = replace(self.units.plan(units, {}, None), blocks=going)
        share = 1 - len(going) / max(len(self.blocks), 1)
        if self.account is not None:
            share = self.account.share(plan)
        return Landed(plan, (*self.units.counts(plan), *own), share)

    def alone(self) -> tuple[Block, ...]:
        """The blocks that go where nothing else does, in the order of the network.

        Raises:
            BudgetError: there are too few blocks for it.
        """
        allocate = ranked(self.lanes)
        if self.account is None:
            return self.attempt(allocate(self._counted())).plan.blocks
        limit = self.budget.share
        found = least_removal(allocate, self.attempt, limit, len(self.lanes))
        if found is None:
            raise self._out_of_reach(self.attempt(allocate(1.0)).share)
        return closer(found, self.lanes, self.attempt, limit).plan.blocks

    def _counted(self) -> float:
        """The share of the blocks that goes."""
        count, most = self.budget.blocks, len(self.blocks)
        if count is None:
            return self.budget.share
        if count > most:
            raise BudgetError(
                f"prune(budget=Budget(blocks={count}))",
                f"only {most} blocks can be bypassed",
                f"Ask for {most} or fewer; rarefy.trace(model, example_inputs) lists them, with "
                "the reason why others cannot",
            )
        return count / max(most, 1)

    def among_units(self, spared: int) -> tuple[Block, ...]:
        """The blocks that go where units go, too; units give what blocks alone need not."""
        limit, items = self.budget.share, sum(len(lane.values) for lane in self.lanes)
        allocate = self._allocation()
        most = self.attempt(allocate(1.0))
        found = least_removal(allocate, self.attempt, limit, max(items, LEVELS)) or most
        groups = len(self.units.lanes)
        none, all_units = [0] * groups, list(most.counts[:groups])
        going = list(found.counts[groups:])
        by_value = sorted(
            range(len(going)), key=lambda i: -self.own[i].values[0] / self.own[i].saved
        )
        for number in (n for n in by_value if going[n]):
            fewer = [*going[:number], 0, *going[number + 1 :]]
            if self.attempt([*none, *going]).share >= limit:
                break
            if self.attempt([*all_units, *fewer]).share <= limit:
                going = fewer
        for number in [n for n in by_value if going[n]][:spared]:
            going[number] = 0
        return self.attempt([*none, *going]).plan.blocks

    def _allocation(self) -> Allocation:
        """How the removal is divided between groups and blocks."""
        if self.losses is None and self.budget.latency is None:
            return ranked(self.lanes)
        assert self.account is not None
        whole = self.account.before
        alternatives = [
            Choices((0, 1), (0.0, float(lane.values[0])), (0.0, lane.saved * whole))
            for lane in self.own
        ]
        return knapsack([*self.units.choices(self.losses), *alternatives])

    def _out_of_reach(self, reachable: float) -> BudgetError:
        name = self.budget.kind
        return BudgetError(
            f"prune(structure='depth', budget=Budget({name}={self.budget.share:g}))",
            f"without all {len(self.blocks)} blocks that can be bypassed {reachable:.3f} remain",
            f"Ask for {name}={math.ceil(reachable * 1000) / 1000:g} or more, exclude less, or let "
            "units go, too: structure=('channel', 'depth')",
        )
