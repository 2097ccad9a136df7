"""Mixed precision: the layers that have to stay in float for a metric to stay where it was.

Each layer is quantized alone, and the error that it makes at the network's outputs on calibration
examples is its sensitivity, which costs no labels and no evaluation. Layers are put back in order
of sensitivity per cost; how many is found by bisection with the user's metric, and those that were
put back for nothing are quantized again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from rarefy.batches import evaluating, seeded
from rarefy.errors import BudgetError, InputError, first_line
from rarefy.graph.count import graph_macs
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph
from rarefy.quantization.placement import Placement, layer_name

RETURNS = 8
"""How many layers that were put back are tried in int8 again, at most."""

Evaluate: TypeAlias = Callable[[nn.Module], float]
"""(network in eval mode) -> the user's metric."""

Maker: TypeAlias = Callable[[Mapping[str, str]], GraphModel]
"""(layer that stays in float -> reason) -> the network with all other layers quantized."""


@dataclass(frozen=True)
class Allowance:
    """How much of a metric may be lost.

    Attributes:
        evaluate: the metric.
        max_drop: the largest loss, in units of the metric.
        higher_is_better: False where the metric is a loss.
    """

    evaluate: Evaluate
    max_drop: float
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise InputError(
                "quantize(evaluate=...)",
                f"a {type(self.evaluate).__name__} cannot be called",
                "Give a function of the network, e.g. lambda m: rarefy.evaluate(m, val)",
            )
        limit = self.max_drop
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not (is_number and math.isfinite(limit) and limit >= 0):
            raise InputError(
                f"quantize(max_drop={limit!r})",
                "a drop is a number of at least 0",
                "Write 0.01 for one point of accuracy",
            )

    def metric(self, network: nn.Module, what: str) -> float:
        """The metric of a network, the same random numbers every time.

        Raises:
            InputError: the evaluation failed, or gave no finite number.
        """
        where, remedy = f"quantize(evaluate=...), {what}", "Mend the evaluation"
        try:
            with seeded(0), evaluating(network):
                found = float(self.evaluate(network))
        except Exception as error:
            raise InputError(where, f"it raised {first_line(error)}", remedy) from error
        if not math.isfinite(found):
            raise InputError(where, f"it returned {found}", remedy)
        return found

    def drop(self, base: float, found: float) -> float:
        """How much worse a metric is."""
        return base - found if self.higher_is_better else found - base


@dataclass
class _Trials:
    """Networks that were evaluated."""

    base: float
    allowance: Allowance
    make: Maker
    drops: dict[frozenset[str], float] = field(default_factory=dict)

    def holds(self, left: Sequence[str]) -> bool:
        """Whether the metric is within its limit with these layers in float."""
        key = frozenset(left)
        if key not in self.drops:
            network = self.make(dict.fromkeys(left, "on trial"))
            metric = self.allowance.metric(network, f"with {len(left)} layers in float")
            self.drops[key] = self.allowance.drop(self.base, metric)
        return self.drops[key] <= self.allowance.max_drop + 1e-12


@dataclass(frozen=True)
class Mixed:
    """Which layers stay in float.

    Attributes:
        left: layer that stays -> reason.
        drop: of the metric.
        evaluations: how often it was measured.
    """

    left: Mapping[str, str]
    drop: float
    evaluations: int


def most(layers: int) -> int:
    """How many evaluations :func:`search` makes of a network with so many layers, at most.

    Example:
        >>> most(54)
        16
    """
    return 2 + max(layers - 1, 0).bit_length() + RETURNS


def search(
    net: GraphModel,
    make: Maker,
    sensitivities: Callable[[], Mapping[str, float]],
    costs: Mapping[str, float],
    allowance: Allowance,
) -> Mixed:
    """Find few and cheap layers that have to stay in float.

    Args:
        net: the float network.
        make: quantizes all layers but some.
        sensitivities: error of each layer alone, asked for where it is needed.
        costs: of each layer in float; units do not matter.
        allowance: the metric and its limit.

    Raises:
        BudgetError: with one layer quantized the drop is still above its limit.
        InputError: the evaluation failed.
    """
    base = allowance.metric(net, "the float network")
    trials = _Trials(base, allowance, make)
    if trials.holds(()):
        return Mixed({}, trials.drops[frozenset()], 2)
    found = sensitivities()
    order = sorted(found, key=lambda layer: -found[layer] / max(costs[layer], 1e-30))
    kept = order[: _bisected(trials, order)]
    for layer in sorted(kept, key=lambda name: -costs[name])[:RETURNS]:
        fewer = [other for other in kept if other != layer]
        if trials.holds(fewer):
            kept = fewer
    whole = f"with all layers in int8 the metric falls by {trials.drops[frozenset()]:.4g}"
    left = {
        layer: f"put back: quantized alone it leaves {_decibel(found[layer])} at the outputs; "
        f"{whole}, and {allowance.max_drop:g} is the limit"
        for layer in kept
    }
    return Mixed(left, trials.drops[frozenset(kept)], 1 + len(trials.drops))


def _bisected(trials: _Trials, order: Sequence[str]) -> int:
    """How many layers, in this order, have to go back: one fewer would be too few."""
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if trials.holds(order[:middle]) else (middle, high)
    if high == len(order):
        best = min(trials.drops.values())
        raise BudgetError(
            f"quantize(max_drop={trials.allowance.max_drop:g})",
            f"the metric of the float network is {trials.base:.4g}; with all layers in int8 but "
            f"for any number of the most sensitive ones it falls by {best:.4g} or more",
            "Allow a larger drop, give more calibration data, leave tables in float, too "
            "(Int8(skip=...)), or train the quantized network (rarefy.distill)",
        )
    return high


def _decibel(error: float) -> str:
    return f"{-10 * math.log10(error):.1f} dB" if error > 0 else "no error"


def checked_costs(
    graph: Graph, placement: Placement, given: Mapping[str, float] | None
) -> dict[str, float]:
    """Cost of each quantized layer in float: as given, or its MACs.

    Raises:
        InputError: a layer has no cost, or one that is no number above 0.
    """
    if given is None:
        macs = graph_macs(graph, lambda name: graph.by_name[name].shape)
        found = dict.fromkeys(placement.layers.values(), 0.0)
        for name, layer in placement.layers.items():
            assert layer == layer_name(graph, graph.by_name[name])
            found[layer] += macs.get(name, 0)
        return found
    wanted = dict.fromkeys(placement.layers.values())
    wrong = [name for name in wanted if not _is_cost(given.get(name))]
    if wrong:
        raise InputError(
            "quantize(costs=...)",
            f"no cost above 0 is given for {', '.join(wrong[:5])}",
            "Give one for every layer that is quantized, or none at all",
        )
    return {name: float(given[name]) for name in wanted}


def _is_cost(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < float(value) < math.inf  # type: ignore[arg-type]
