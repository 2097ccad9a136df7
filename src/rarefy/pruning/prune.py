"""``prune``: trace, score, select, cut, prove, and repair where data are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, TypedDict, cast

import torch
from torch import nn

from rarefy.batches import Leading, check_rereadable
from rarefy.copies import copied, ordinary
from rarefy.errors import BudgetError, InputError
from rarefy.graph.capture import check_runs
from rarefy.graph.model import GraphModel
from rarefy.graph.trace import Network, trace
from rarefy.paths import excluded, paths
from rarefy.pruning.checks import check_arguments, check_copies, check_finite
from rarefy.pruning.narrow import Pruned, narrow, noted, widths
from rarefy.pruning.repair import repair
from rarefy.pruning.scoring.compensated import Compensated, Response
from rarefy.pruning.scoring.criteria import Criterion
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
from rarefy.types import Budget, Data, Inputs, is_count

Timing = Callable[[nn.Module, Network], Costs]
"""A network and its trace -> the latencies of its layers."""


class PruneOptions(TypedDict, total=False):
    """Options of :func:`prune` that every kind of budget leaves to the user."""

    criterion: str | Criterion | Compensated | ElementCriterion | None
    structure: str | Pattern | Sequence[str]
    data: Data | None
    samples: int | None
    loss: LossFunction | None
    heal: bool
    exclude: Sequence[str]
    keep_class: bool
    sensitivity: Sensitivity | None


@torch.inference_mode(False)
def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None = None,
    *,
    criterion: str | Criterion | Compensated | ElementCriterion | None = None,
    structure: str | Pattern | Sequence[str] = "channel",
    data: Data | None = None,
    samples: int | None = 1024,
    loss: LossFunction | None = None,
    heal: bool = True,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
    costs: Timing | None = None,
    sensitivity: Sensitivity | None = None,
) -> nn.Module:
    """Remove the least important units of a network, with proof.

    What :func:`rarefy.prune` does where a budget is counted rather than measured; see there for the
    arguments that both have, and for what they raise.

    Args:
        model: a trained network; left as it is.
        example_inputs: what it is called with.
        budget: how much may remain.
        criterion: how important a unit or weight is.
        structure: what is removed.
        data: batches to score and to repair with.
        samples: how many of their first examples; None for all.
        loss: (logits, targets) -> mean loss of a batch.
        heal: whether the smaller network is repaired where data are given.
        exclude: paths or patterns of what keeps its width.
        keep_class: never return a rewritten graph.
        costs: times the layers of the traced network, for a budget of latency.
        sensitivity: what the removal of each group's units costs.

    Returns:
        A new network in eval mode. Where units were removed, its attribute ``pruned`` is a
        :class:`~rarefy.pruning.narrow.Pruned` record; where weights were set to zero,
        ``sparsified`` is a :class:`~rarefy.pruning.sparsity.sparsify.Sparsified` record.
    """
    removed = removes(structure)
    check_arguments(model, budget, Budget if removed else Budget | None)
    model = ordinary(model)
    excluded(exclude, paths(model))
    check_finite(model)
    check_copies(model)
    _check_sensitivity(structure, sensitivity)
    data = _leading(data, samples)
    if not removed:
        given: dict[str, Any] = {"criterion": criterion, "data": data, "loss": loss}
        given |= {"example_inputs": example_inputs, "exclude": exclude}
        return sparsify(model, budget, cast("str | Pattern", structure), **given)
    assert budget is not None
    check_fit(structure, budget)
    network = trace(model, example_inputs)
    check_runs(model, example_inputs)
    judge = partial(judged, criterion=cast("Rule | None", criterion), data=data, loss=loss)
    response = judge(model, network)
    if sensitivity is not None:
        response = replace(response, losses=sensitivity.losses(network.groups))
    options: dict[str, Any] = {"exclude": exclude, "keep_class": keep_class}
    timed = None if costs is None else costs(model, network)
    if "depth" in removed:
        width = "channel" in removed

        def without(spared: int) -> nn.Module:
            short = shorten(
                model, example_inputs, network, response, budget,
                width=width, data=data, costs=timed, spared=spared, **options,
            )  # fmt: skip
            if not width:
                return recorded(model, network, short, short.model)
            given = (model, example_inputs, network, budget, short, judge, costs, options)
            return recorded(model, network, short, _narrowed(*given))

        small = without(0)
        if width and costs is None:
            small = _nearest(small, budget, without)
    else:
        small = narrow(model, example_inputs, network, budget, response, costs=timed, **options)
    record: Any = small.pruned
    small = noted(small, budget, record.left)
    return small if data is None or not heal else repair(model, small, data)


REMOVED = ("channel", "depth")
"""Structures that are really removed, alone or together: units, residual blocks."""


def _leading(data: Data | None, samples: int | None) -> Data | None:
    if samples is not None and not is_count(samples):
        raise InputError(
            f"prune(samples={samples!r})",
            "it is the number of examples that data give, at least 1",
            "Use a few hundred, or None for all of them",
        )
    if data is None:
        return None
    check_rereadable(data, "prune(data)")
    return Leading(data, samples, "prune(data)")


def removes(structure: object) -> frozenset[str]:
    """Which of :data:`REMOVED` a structure is; empty where it sets weights to zero."""
    several = isinstance(structure, tuple | list | set | frozenset)
    kinds: list[Any] = list(structure) if several else [structure]  # type: ignore[call-overload]
    known = all(isinstance(kind, str) and kind in REMOVED for kind in kinds)
    return frozenset(kinds) if known else frozenset()


def _check_sensitivity(structure: object, sensitivity: object) -> None:
    if sensitivity is None:
        return
    if removes(structure) != {"channel"}:
        raise InputError(
            f"prune(structure={structure!r}, sensitivity=...)",
            "sensitivity was measured for units, and others than units are to be removed",
            "Leave sensitivity out",
        )
    if not isinstance(sensitivity, Sensitivity):
        raise InputError(
            f"prune(sensitivity={sensitivity!r})",
            f"it is a {type(sensitivity).__name__}",
            "Give what rarefy.sensitivity returned, or rarefy.Sensitivity.load(path)",
        )


def check_fit(structure: object, budget: Budget) -> None:
    """Refuse budgets that do not fit the units or blocks that are to be removed.

    Raises:
        BudgetError: a number of blocks where not only these go; one that units and blocks cannot
            share; limits of layers where no units go.
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
    if removed == {"depth"} and budget.limits:
        raise BudgetError(
            where,
            "its limits of layers concern units, and only blocks are to be removed",
            "Leave layers out, and exclude blocks that have to stay",
        )


def _narrowed(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    budget: Budget,
    short: Shortened,
    judge: Callable[[nn.Module, Network], Response],
    costs: Timing | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """The network without some blocks, narrower by what is left of the budget.

    Raises:
        BudgetError: units do not reach it; the message says what is reachable.
    """
    small = short.model
    timed = None if costs is None else costs(model, network)
    if not short.blocks:
        options = {**options, "costs": timed}
        return narrow(model, example_inputs, network, budget, judge(model, network), **options)
    if next(small.parameters(), None) is None:
        return small
    rest = trace(small, example_inputs)
    left_over = None if costs is None else costs(small, rest)
    whole = _left(network, model, budget, timed)
    share = _left(rest, small, budget, left_over) / max(whole, 1e-12)
    named = concerning(rest, small, [*options["exclude"], *(name for name, _ in budget.limits)])
    layers = tuple(pair for pair in budget.limits if pair[0] in named)
    if budget.share >= share and not layers:
        return small
    wanted: dict[str, Any] = {budget.kind: min(budget.share / share, 1.0), "layers": layers}
    kept = [name for name in options["exclude"] if name in named]
    options = {**options, "exclude": kept, "costs": left_over}
    try:
        left = replace(budget, **wanted)
        return narrow(small, example_inputs, rest, left, judge(small, rest), **options)
    except BudgetError as error:
        raise BudgetError(
            f"prune(budget=Budget({budget.kind}={budget.share:g}))",
            f"without {len(short.blocks)} blocks {share:.3f} remain, and of these {error.what}",
            f"Ask for more {budget.kind}, or relax min_keep, max_drop, round_to, layers and "
            "exclude",
        ) from error


SPARED = 3
"""How many of the blocks that go come back at most so that units can land on the budget."""


def _nearest(small: nn.Module, budget: Budget, without: Callable[[int], nn.Module]) -> nn.Module:
    """The network that comes nearest to its budget as more and more blocks are spared."""
    for spared in range(1, SPARED + 1):
        record: Any = small.pruned
        if is_close(record.left, budget.share) or len(record.blocks) < spared:
            break
        try:
            other = without(spared)
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
