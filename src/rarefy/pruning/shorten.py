"""Which residual blocks a budget takes, alone or in competition with units, and taking them out.

Blocks and units are ranked together by importance per saved cost. Below one threshold all go, and
the threshold is the least that fits the budget, where the units and MACs of a block that goes are
not counted a second time. The blocks found are bypassed; the units are then chosen anew, in the
network that is left, for what is left of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.graph.blocks import Block
from rarefy.graph.count import graph_macs
from rarefy.graph.groups import Mask
from rarefy.graph.stubs import without_blocks
from rarefy.graph.trace import Network
from rarefy.pruning.depth import BlockError, bypass
from rarefy.pruning.influence import importances
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.select import Accountant, floor_of, free_groups
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
    """

    model: nn.Module
    blocks: tuple[Block, ...] = ()
    reason: str = ""
    error: float = 0.0
    held: Mapping[str, str] = field(default_factory=dict)


def shorten(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    scores: Scores,
    budget: Budget,
    *,
    width: bool,
    data: Data | None = None,
    exclude: Collection[str] = (),
    keep_class: bool = False,
) -> Shortened:
    """Bypass the residual blocks that a budget takes, with proof.

    Args:
        model: the network, which is left as it is.
        example_inputs: what it was traced with.
        network: its trace.
        scores: importance of every unit, one array per group.
        budget: what may remain, or how many blocks go.
        width: whether units go as well, so that blocks compete with them.
        data: batches on which the influence of blocks is measured.
        exclude: paths of modules and parameters; blocks with any of them stay.
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
    importance = importances(model, network, scores, data)
    held: dict[str, str] = {}
    while True:
        still = [n for n in free if network.blocks[n].name not in held]
        chosen = _Choice(network, model, scores, importance, budget, still, exclude)
        blocks = chosen.among_units() if width else chosen.alone()
        if not blocks:
            return Shortened(model, held=held)
        try:
            small, reason, error = bypass(
                model, example_inputs, network, blocks, keep_class=keep_class
            )
        except BlockError as fault:
            held |= dict.fromkeys((b.name for b in fault.blocks), fault.what)
            if not width and all(network.blocks[n].name in held for n in free):
                raise
        else:
            return Shortened(small, blocks, reason, error, held)


def _free(
    network: Network, model: nn.Module, exclude: Collection[str], width: bool
) -> tuple[int, ...]:
    """Numbers of the blocks that may go.

    Raises:
        InputError: there are none, and nothing else may go.
    """
    free_groups(network, model, tuple(exclude))  # refuses names that are none
    found = tuple(
        number
        for number, block in enumerate(network.blocks)
        if not any(_holds(network, block, name) for name in exclude)
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


def _holds(network: Network, block: Block, name: str) -> bool:
    """Whether a block has a module or parameter of this path, or lies within it."""
    graph = network.captured.graph
    paths = {*block.tensors, *block.shared, *(graph.by_name[n].scope for n in block.nodes)}
    return any(path == name or path.startswith(f"{name}.") for path in paths)


class _Choice:
    """Chooses blocks for a budget.

    Args:
        network: the trace.
        model: the network.
        scores: importance of every unit.
        importance: of every block.
        budget: what may remain.
        free: numbers of the blocks that may go.
        exclude: paths whose units stay.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        scores: Scores,
        importance: NDArray[np.float64],
        budget: Budget,
        free: Sequence[int],
        exclude: Collection[str],
    ) -> None:
        self.network, self.scores, self.budget = network, scores, budget
        self.blocks = [network.blocks[n] for n in free]
        self.importance = importance[list(free)]
        self.groups = free_groups(network, model, tuple(exclude))
        self.accountant = Accountant(network, model)
        by_params = budget.params is not None
        costs = [max(b.params if by_params else b.macs, 1) for b in self.blocks]
        self.value = self.importance / np.array(costs)
        self.order = np.argsort(self.value, kind="stable")

    @property
    def limit(self) -> float:
        """The share of MACs or parameters that may remain."""
        found = self.budget.macs if self.budget.macs is not None else self.budget.params
        assert found is not None
        return found

    def alone(self) -> tuple[Block, ...]:
        """The blocks that go where nothing else does.

        Raises:
            BudgetError: there are too few blocks for it.
        """
        if self.budget.blocks is not None or self.budget.sparsity is not None:
            return self._counted()
        nothing = self._units(-math.inf)
        if self._remaining(self.blocks, nothing) > self.limit:
            self._refuse(self._remaining(self.blocks, nothing))
        going: list[int] = []
        for number in self.order:
            if self._remaining(self._some(going), nothing) <= self.limit:
                break
            going.append(int(number))
        for number in going[::-1]:  # what is not needed after all
            without = [n for n in going if n != number]
            if self._remaining(self._some(without), nothing) <= self.limit:
                going = without
        return self._some(going)

    def _counted(self) -> tuple[Block, ...]:
        """As many blocks as were asked for, the least important ones."""
        count, share = self.budget.blocks, self.budget.sparsity
        if count is None:
            assert share is not None
            count = math.floor(share * len(self.blocks) + 1e-9)
        if count > len(self.blocks):
            raise BudgetError(
                f"prune(budget=Budget(blocks={count}))",
                f"only {len(self.blocks)} blocks can be bypassed",
                f"Ask for {len(self.blocks)} or fewer; rarefy.trace(model, example_inputs) lists "
                "them, with the reason why others cannot",
            )
        return self._some(np.argsort(self.importance, kind="stable")[:count])

    def among_units(self) -> tuple[Block, ...]:
        """The blocks that go where units go, too."""
        self.saved = self.accountant.savings(self.budget)
        units = [self.scores[g] / self.saved[g] for g in self.groups]
        thresholds = np.unique(np.concatenate([self.value, *units]))
        low, high = 0, len(thresholds)  # below the threshold of the first, nothing goes
        while low < high:
            middle = (low + high) // 2
            level = float(thresholds[middle])
            if self._remaining(self._below(level), self._units(level)) <= self.limit:
                high = middle
            else:
                low = middle + 1
        level = float(thresholds[min(low, len(thresholds) - 1)])
        going = [int(n) for n in self.order if self.value[n] <= level]
        nothing = self._units(-math.inf)
        while going and self._remaining(self._some(going), nothing) < self.limit:
            going.pop()  # more than is needed: units give the rest
        return self._some(going)

    def _below(self, level: float) -> tuple[Block, ...]:
        return self._some(np.flatnonzero(self.value <= level))

    def _some(self, numbers: Sequence[int] | NDArray[np.int64]) -> tuple[Block, ...]:
        """Blocks in the order of the network."""
        return tuple(self.blocks[n] for n in sorted(int(n) for n in numbers))

    def _units(self, level: float) -> Mask:
        """The units below a level of importance per saved cost, as many as their groups give."""
        removed = np.zeros(self.network.coupling.units, np.bool_)
        if level == -math.inf:
            return removed
        for g in self.groups:
            group = self.network.groups[g]
            order = np.argsort(self.scores[g], kind="stable")
            order = order[: len(group) - floor_of(group, self.budget)]
            below = self.scores[g][order] / self.saved[g] <= level
            removed[group.units[order[below]]] = True
        return removed

    def _remaining(self, blocks: Sequence[Block], removed: Mask) -> float:
        """The share of MACs or parameters without these blocks and units."""
        graph = self.network.captured.graph
        left = without_blocks(graph, blocks).by_name
        shape = self.accountant.shape(Plan.of(self.network, removed))
        if self.budget.params is None:
            macs = graph_macs(graph, shape)
            after = sum(n for name, n in macs.items() if name in left)
            return after / max(self.accountant.macs_before, 1)
        held = (math.prod(shape(name)) for name in self.accountant.counted if name in left)
        return (self.accountant.unread + sum(held)) / max(self.accountant.params_before, 1)

    def _refuse(self, reachable: float) -> None:
        name = "macs" if self.budget.macs is not None else "params"
        raise BudgetError(
            f"prune(structure='depth', budget=Budget({name}={self.limit:g}))",
            f"without all {len(self.blocks)} blocks that can be bypassed {reachable:.3f} remain",
            f"Ask for {name}={math.ceil(reachable * 1000) / 1000:g} or more, exclude less, or let "
            "units go, too: structure=('channel', 'depth')",
        )
