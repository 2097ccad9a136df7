"""What ``prune`` is asked to do to a network, traced and scored once for all budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, cast

import torch
from torch import nn

from rarefy.copies import copied
from rarefy.errors import BudgetError
from rarefy.graph.capture import check_runs
from rarefy.graph.model import GraphModel
from rarefy.graph.trace import Network, trace
from rarefy.pruning.narrow import Pruned, carry, narrow, noted, widths
from rarefy.pruning.repair import repair
from rarefy.pruning.scoring.compensated import Response
from rarefy.pruning.scoring.curves import Sensitivity
from rarefy.pruning.scoring.judging import Rule, judged
from rarefy.pruning.scoring.passes import LossFunction
from rarefy.pruning.selection.accounts import account
from rarefy.pruning.selection.costs import Costs
from rarefy.pruning.selection.landing import is_close
from rarefy.pruning.selection.limits import concerning
from rarefy.pruning.shorten import Shortened, shorten
from rarefy.pruning.sparsity.elements import ElementCriterion
from rarefy.pruning.sparsity.patterns import Pattern
from rarefy.pruning.sparsity.sparsify import sparsify
from rarefy.types import Budget, Data, Inputs

Timing = Callable[[nn.Module, Network], Costs]
"""A network and its trace -> the latencies of its layers."""

REMOVED = ("channel", "depth")
"""Structures that are really removed, alone or together: units, residual blocks."""


def removes(structure: object) -> frozenset[str]:
    """Which of :data:`REMOVED` a structure is; empty where it sets weights to zero."""
    several = isinstance(structure, tuple | list | set | frozenset)
    kinds: list[Any] = list(structure) if several else [structure]  # type: ignore[call-overload]
    known = all(isinstance(kind, str) and kind in REMOVED for kind in kinds)
    return frozenset(kinds) if known else frozenset()


def check_fit(structure: object, budget: Budget) -> None:
    """Refuse budgets that do not fit the units or blocks that are to be removed.

    Raises:
        BudgetError: a number of blocks where not only these go; one that units and blocks cannot
            share; what concerns units where none go.
    """
    removed = removes(structure)
    where = f"prune(structure={structure!r}, budget=Budget({budget.kind}={budget.share:g}))"
    if budget.blocks is not None and removed != {"depth"}:
        raise BudgetError(
            where,
            "a number of blocks can be removed only where nothing else is",
            "Use structure='depth', or give the share of macs or params that may remain",
        )
    shared = budget.kind in ("macs", "params", "bytes", "latency") and budget.scope == "global"
    if len(removed) > 1 and not shared:
        raise BudgetError(
            where,
            "blocks go by what they save, together with units over the whole network",
            "Give a budget of macs, params, bytes or latency with scope='global'",
        )
    if removed == {"depth"}:
        local = {} if budget.scope == "global" else {"scope": budget.scope}
        for name, value in {**budget.of_units, **local}.items():
            raise BudgetError(
                where,
                f"{name}={value!r} concerns units, and only blocks are to be removed",
                f"Leave {name} out, and exclude blocks that have to stay",
            )


SPARED = 3
"""How many of the blocks that go come back at most so that units can land on the budget."""


@dataclass(frozen=True, eq=False)
class Request:
    """What :func:`~rarefy.pruning.prune.prune` is asked to do, under any budget.

    Attributes:
        model: the network; left as it is.
        example_inputs: what it is called with.
        structure: what is removed, or set to zero.
        criterion: how important a unit or weight is.
        data: batches to score and to repair with.
        loss: (logits, targets) -> mean loss of a batch.
        heal: whether what is left is repaired on the data.
        sensitivity: what the removal of each group's units costs.
        exclude: paths or patterns of what keeps its width.
        keep_class: never return a rewritten graph.
    """

    model: nn.Module
    example_inputs: Inputs
    structure: str | Pattern | Sequence[str] = "channel"
    criterion: Rule | ElementCriterion | None = None
    data: Data | None = None
    loss: LossFunction | None = None
    heal: bool = True
    sensitivity: Sensitivity | None = None
    exclude: Sequence[str] = ()
    keep_class: bool = False

    @cached_property
    def network(self) -> Network:
        """The trace of the network."""
        found = trace(self.model, self.example_inputs)
        check_runs(self.model, self.example_inputs)
        return found

    @cached_property
    def response(self) -> Response:
        """The importance of its units, and what their removal costs where that is measured."""
        found = self._judged(self.model, self.network)
        if self.sensitivity is None:
            return found
        return replace(found, losses=self.sensitivity.losses(self.network.groups))

    @torch.inference_mode(False)
    def to(self, budget: Budget | None, costs: Timing | None = None) -> nn.Module:
        """The largest network within a budget, not repaired.

        Args:
            budget: how much may remain; None where a pattern says it all.
            costs: times the layers of a traced network, for a budget of latency.

        Raises:
            BudgetError: it is out of reach.
        """
        removed = self.removed
        if not removed:
            given: dict[str, Any] = {"criterion": self.criterion, "data": self.data}
            given |= {"example_inputs": self.example_inputs, "exclude": self.exclude}
            structure = cast("str | Pattern", self.structure)
            return sparsify(self.model, budget, structure, loss=self.loss, **given)
        assert budget is not None
        check_fit(self.structure, budget)
        if "depth" not in removed:
            timed = None if costs is None else costs(self.model, self.network)
            whole = (self.model, self.example_inputs, self.network)
            small = narrow(*whole, budget, self.response, costs=timed, **self._options)
        else:
            small = self._without(budget, costs, 0)
            if "channel" in removed and costs is None:
                small = self._nearest(small, budget)
        return small

    def done(self, budget: Budget | None) -> nn.Module:
        """What is asked for under a budget that is counted: with its record, and repaired."""
        small = self.to(budget)
        return self.finished(small if budget is None or not self.removed else noted(small, budget))

    @torch.inference_mode(False)
    def finished(self, small: nn.Module) -> nn.Module:
        """A smaller network, repaired where that is asked for and there are data."""
        if self.data is None or not self.heal or not self.removed:
            return small
        return repair(self.model, small, self.data)

    @property
    def removed(self) -> frozenset[str]:
        """Which of :data:`REMOVED` go; empty where weights are set to zero."""
        return removes(self.structure)

    @property
    def _options(self) -> dict[str, Any]:
        return {"exclude": self.exclude, "keep_class": self.keep_class}

    def _judged(self, model: nn.Module, network: Network) -> Response:
        criterion = cast("Rule | None", self.criterion)
        return judged(model, network, criterion, self.data, self.loss)

    def _without(self, budget: Budget, costs: Timing | None, spared: int) -> nn.Module:
        """The network without blocks, narrower where units may go too.

        Args:
            budget: how much may remain.
            costs: times the layers of a traced network.
            spared: how many of the blocks that would go stay, so that units go instead.
        """
        model, network, width = self.model, self.network, "channel" in self.removed
        timed = None if costs is None else costs(model, network)
        short = shorten(
            model, self.example_inputs, network, self.response, budget,
            width=width, data=self.data, costs=timed, spared=spared, **self._options,
        )  # fmt: skip
        small = self._narrowed(budget, short, costs) if width else short.model
        return recorded(model, network, short, small)

    def _narrowed(self, budget: Budget, short: Shortened, costs: Timing | None) -> nn.Module:
        """The network without some blocks, narrower by what is left of the budget.

        Raises:
            BudgetError: units do not reach it; the message says what is reachable.
        """
        small, network, inputs = short.model, self.network, self.example_inputs
        timed = None if costs is None else costs(self.model, network)
        options = {**self._options, "costs": timed}
        if not short.blocks:
            return narrow(self.model, inputs, network, budget, self.response, **options)
        if next(small.parameters(), None) is None:
            return small
        rest = trace(small, inputs)
        left_over = None if costs is None else costs(small, rest)
        whole = _left(network, self.model, budget, timed)
        share = _left(rest, small, budget, left_over) / max(whole, 1e-12)
        named = concerning(rest, small, [*self.exclude, *(name for name, _ in budget.limits)])
        layers = tuple(pair for pair in budget.limits if pair[0] in named)
        if budget.share >= share and not layers:
            return small
        wanted: dict[str, Any] = {budget.kind: min(budget.share / share, 1.0), "layers": layers}
        kept = [name for name in self.exclude if name in named]
        options |= {"exclude": kept, "costs": left_over}
        try:
            left = replace(budget, **wanted)
            return narrow(small, inputs, rest, left, self._judged(small, rest), **options)
        except BudgetError as error:
            raise BudgetError(
                f"prune(budget=Budget({budget.kind}={budget.share:g}))",
                f"without {len(short.blocks)} blocks {share:.3f} remain, and of these {error.what}",
                f"Ask for more {budget.kind}, or relax min_keep, max_drop, round_to, layers and "
                "exclude",
            ) from error

    def _nearest(self, small: nn.Module, budget: Budget) -> nn.Module:
        """The network that comes nearest to its budget as more and more blocks are spared."""
        for spared in range(1, SPARED + 1):
            record: Any = small.pruned
            if is_close(record.left, budget.share) or len(record.blocks) < spared:
                break
            try:
                other = self._without(budget, None, spared)
            except BudgetError:
                break
            found: Any = other.pruned
            small = other if found.left > record.left else small
        return small


def _left(network: Network, model: nn.Module, budget: Budget, costs: Costs | None) -> float:
    """What a network has of the cost that a budget is about."""
    found = account(network, model, budget, costs)
    assert found is not None
    return found.before


def recorded(model: nn.Module, network: Network, short: Shortened, small: nn.Module) -> nn.Module:
    """The result with the record of what went from ``model``, blocks and units."""
    held: Any = small.pruned if small is not short.model else None
    shares = [share for share in (short.left, held and held.left) if share is not None]
    small = copied(model).eval() if small is model else small  # nothing went
    kept = held.kept if held else {}
    left = {path for path, _ in small.named_parameters(remove_duplicate=False)}
    carry(model, small)
    small.pruned = Pruned(  # type: ignore[assignment]
        kind="graph" if isinstance(small, GraphModel) else "module",
        reason=short.reason or (held.reason if held else ""),
        widths=widths(model, kept, left),
        kept=kept,
        frozen=held.frozen if held else network.frozen,
        error=max(short.error, held.error if held else 0.0),
        blocks=tuple(block.name for block in short.blocks),
        held=short.held,
        left=prod(shares) if shares else None,
        missed=held.missed if held else "",
        earlier=getattr(model, "pruned", None),
    )
    return small
