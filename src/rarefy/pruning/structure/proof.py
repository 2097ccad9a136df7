"""The proof of a structural change: the smaller network equals the original with units masked.

Both are run in float64 where the network allows it, in eval mode, on the example inputs and on a
second set of inputs, with the *same* random disturbance added to every parameter: a layer scale of
zero would hide a wrong index. BatchNorm statistics are taken from the inputs and disturbed, so that
the signal neither dies out nor explodes on its way. The largest difference must be far below the
outputs' own sensitivity to the inputs, since two networks that return constants are equal for
nothing.

Masking is plain zeroing of every coupled slice, in the user's own module, except that operators
which mix entries in another way than by adding them are computed over what remains: normalization
statistics are taken over the units that remain (:mod:`rarefy.pruning.structure.reference`). That
needs the captured graph, which is then held against the user's module first, unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.batches import map_tensors, seeded
from rarefy.errors import InputError, ProofError, first_line
from rarefy.graph.capture import graph_model
from rarefy.graph.groups import Mask
from rarefy.graph.model import GraphModel
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.disturbance import (
    Calibration,
    alike,
    candidates,
    cast,
    disturbed,
    elsewhere,
    nudged,
)
from rarefy.pruning.structure.outputs import (
    holds_nan,
    largest_difference,
    magnitude,
    outputs_of,
    without_one_more,
)
from rarefy.pruning.structure.reference import masked, mixing, over_survivors, without_branches
from rarefy.types import Inputs

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Precisions to try, in this order, and the largest difference that each allows, relative to how
far the outputs move with the inputs."""

ROUNDED = 1e-5
"""What float64 allows where the smaller network rounds to float32 on its way: constants that are
made in ``forward``, casts that a capture in float32 wrote down."""

LEAST = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Sensitivity that is still told from rounding, relative to the outputs' magnitude."""

MARGIN = 100.0
"""How many times as far as rounding may differ what is only rounding."""

Build = Callable[[nn.Module, Plan], nn.Module]
"""(model, plan) -> the model with the plan's units gone."""


@dataclass(frozen=True)
class Comparison:
    """A smaller network held against masking.

    Attributes:
        error: the largest difference, relative to the outputs' sensitivity to the inputs.
        fault: what is wrong, or empty where the two are equal within :data:`TOLERANCE`.
    """

    error: float
    fault: str = ""


class ClassError(ProofError):
    """The user's class cannot be kept with these units gone.

    Attributes:
        groups: numbers of the groups because of which it cannot, where they could be found.
    """

    groups: frozenset[int] = frozenset()


def prove(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    plan: Plan,
    build: Build,
    masking: Masking | None = None,
) -> float:
    """Hold ``build(model, plan)`` against masking.

    Args:
        model: the network.
        example_inputs: what it was traced with.
        network: its trace.
        plan: what goes.
        build: makes the smaller network.
        masking: what masking gives, where that has been computed for this plan already.

    Returns:
        The largest difference, relative to the outputs' sensitivity to the inputs.

    Raises:
        InputError: the network's outputs are not deterministic in eval mode.
        ProofError: the difference is above :data:`TOLERANCE`; the message names the group.
    """
    masking = masking or Masking(model, example_inputs, network, plan)
    found = masking.compare(build)
    if not found.fault:
        return found.error
    rounding = masking.amplified()
    if found.error <= MARGIN * rounding:
        raise ProofError(
            "prune(model)",
            f"rounding its inputs anew moves its outputs by {rounding:.1e} of their range, so that "
            f"{found.fault[0].lower()}{found.fault[1:]} proves nothing; nothing was returned",
            "Give a trained network and inputs like those that it was trained on, prune a part "
            "of the network, or let it run in float64",
        )
    group = culprit(model, example_inputs, network, plan, build)
    raise ProofError(
        "prune(model)",
        f"{found.fault}{group}; nothing was returned",
        "Exclude that layer with exclude=[...], and report the network: this is a defect of rarefy",
    )


def culprit(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> str:
    """The first group whose units alone, removed as planned, make the difference."""
    each = (frozenset([number]) for number in range(len(network.groups)))
    found = breaking(model, example_inputs, network, plan, build, each)
    return "".join(f" (group {network.groups[number].name})" for number in found)


def breaking(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    plan: Plan,
    build: Build,
    parts: Iterable[frozenset[int]],
) -> frozenset[int]:
    """The first of these sets of groups whose units alone, removed as planned, differ."""
    for part in parts:
        alone: Mask = plan.removed & False
        for number in part:
            units = network.groups[number].units
            alone[units] = plan.removed[units]
        only = Plan.of(network, alone)
        if alone.any() and compare(model, example_inputs, network, only, build).fault:
            return part
    return frozenset()


def compare(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> Comparison:
    """Run the smaller network and the masked original side by side; see :class:`Masking`."""
    return Masking(model, example_inputs, network, plan).compare(build)


class Masking:
    """What masking gives under one plan, computed once for all networks that are held against it.

    Args:
        model: the network, which is left as it is.
        example_inputs: what it was traced with.
        network: its trace.
        plan: what is masked.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan
    ) -> None:
        self._model, self._network, self._plan = model, network, plan
        self._candidates = candidates(example_inputs)
        self._refused: set[tuple[torch.dtype, int]] = set()
        self._disturbed: tuple[torch.dtype, nn.Module] | None = None
        self._case: tuple[tuple[torch.dtype, int], _Case] | None = None

    def compare(self, build: Build) -> Comparison:
        """Run the smaller network on the same inputs as the masked one.

        A graph that does not run in float64, since it holds a cast to float32, is tried in float32;
        one that was captured for a single batch size is tried on all of the inputs. Whatever
        ``build`` itself raises is a defect, and is not caught.

        Raises:
            InputError: the network's outputs are not deterministic in eval mode, or no numbers, or
                it runs in no precision in which the two could be told apart.
            ProofError: the captured graph, where it has to serve as reference, differs from the
                module.
        """
        found = None
        for dtype in TOLERANCE:
            for number in range(len(self._candidates)):
                try:
                    case = self._prepared(dtype, number)
                    if case is not None:
                        return case.against(build)
                except _RefusedError:
                    self._refused.add((dtype, number))
                    self._case = None
                except _DoesNotRunError as failure:
                    found = Comparison(
                        inf, f"{failure.what} does not run: {first_line(failure.error)}"
                    )
                    if failure.final:
                        return found
                    if not failure.graph:
                        break
        if found is None:
            raise InputError(
                "prune(model)",
                "it runs on the example inputs in eval mode neither in float64 nor in float32, in "
                "which removal is held against masking",
                "Where it has layers of half precision and casts between them, prune it in float32 "
                "and convert it afterwards",
            )
        return found

    def amplified(self) -> float:
        """How far a change of the inputs in their last digit moves the outputs."""
        if self._disturbed is None or self._case is None:
            return 0.0
        dtype, model = self._disturbed
        inputs = cast(self._candidates[self._case[0][1]], dtype)
        with seeded(2):
            near = map_tensors(lambda t: nudged(t, dtype), inputs)
        first, second = outputs_of(model, inputs), outputs_of(model, near)
        return largest_difference(first, second) / (magnitude(first) or 1.0)

    def _prepared(self, dtype: torch.dtype, number: int) -> _Case | None:
        """The masked network's outputs on some of the inputs; None where they are refused."""
        key = (dtype, number)
        if key in self._refused:
            return None
        if self._case is None or self._case[0] != key:
            self._case = None  # what it holds goes before more is made
            if self._disturbed is None or self._disturbed[0] is not dtype:
                self._disturbed = None
                self._disturbed = dtype, disturbed(self._model, dtype)
            inputs = cast(self._candidates[number], dtype)
            case = _Case(self._disturbed[1], inputs, dtype, self._network, self._plan)
            self._case = key, case
        return self._case[1]


class _RefusedError(Exception):
    """The network does not take some inputs."""


class _DoesNotRunError(Exception):
    """A network, perhaps a graph of fixed batch size or precision, does not take some inputs.

    Attributes:
        final: whether other inputs or another precision cannot change that: the whole network
            takes these, and the user's class with fewer units does not.
    """

    def __init__(self, what: str, graph: bool, error: Exception, *, final: bool = False) -> None:
        super().__init__(what)
        self.what, self.graph, self.error, self.final = what, graph, error, final


class _Case:
    """The masked network's outputs on inputs that it takes, in one precision.

    The masked network itself is not kept, since its tensors are as large as the network's.

    Raises:
        _RefusedError: the network does not take the inputs.
        _DoesNotRunError: it does, and with its units masked it does not.
        InputError, ProofError: the outputs are no numbers.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, dtype: torch.dtype, network: Network, plan: Plan
    ) -> None:
        self.model, self.inputs, self.dtype = model, inputs, dtype
        self.network, self.plan = network, plan
        self.mixing = bool(plan.blocks or mixing(network, plan))
        self.checked = False
        calibrates = any("batch_norm" in node.kind for node in network.captured.graph.calls)
        if calibrates and not _takes(model, inputs, Calibration()):  # type: ignore[no-untyped-call]
            raise _RefusedError
        reference = self.reference()
        try:
            self.expected = _attempt(reference, inputs, "the masked network")
        except _DoesNotRunError:
            if not calibrates and not _takes(model, inputs, nullcontext()):
                raise _RefusedError from None
            raise
        _check_numbers(model, inputs, self.expected)
        self.other, self.moved, self.larger = elsewhere(reference, inputs, self.expected)
        self.scale = _scale(self.expected, without_one_more(self.moved, self.expected), dtype)

    def reference(self) -> nn.Module:
        """The masked network, with operators that mix entries over what remains."""
        if self.plan.blocks:
            return without_branches(self.model, self.network, self.plan)
        make = over_survivors if self.mixing else masked
        return make(self.model, self.network, self.plan)

    def against(self, build: Build) -> Comparison:
        """Hold the smaller network against these outputs."""
        small = build(self.model, self.plan)
        whole = isinstance(small, GraphModel)
        if whole and self.mixing:  # a wrong capture would be in both
            self.check()
        with _Rounding() as rounding:
            try:
                first = _attempt(small, self.inputs, "the smaller network")
            except _DoesNotRunError:
                if not whole:  # the reference may be a graph that takes what the network does not
                    self._check_taken()
                raise
            difference = max(largest_difference(self.expected, first), self._elsewhere(small))
        error = difference / self.scale
        if error <= rounding.tolerance(self.dtype):
            if not whole:  # what a graph computes depends on nothing else
                _check_repeats(first, outputs_of(small, self.inputs))
            return Comparison(error)
        self.check()
        fault = f"the smaller network differs from masking by {error:.1e} of the outputs' range"
        return Comparison(error, fault)

    def _elsewhere(self, small: nn.Module) -> float:
        """The difference on other inputs, of one example more where both take that.

        A size that is written in ``forward`` can fit the smaller network by chance, for one batch
        size: the two rows of ``view(-1, 8)`` become one that holds both examples. A capture for
        one batch size need not be right for another, though it may run there.
        """
        graph = isinstance(small, GraphModel)
        try:
            found = _attempt(small, self.other, "the smaller network")
        except _DoesNotRunError:
            if not (graph and self.larger):
                raise
            return self._elsewhere_alike(small)
        difference = largest_difference(self.moved, found)
        fits = [t.shape for t in self.moved] == [t.shape for t in found]
        if not self.larger or (fits and not graph) or not (graph or self.mixing):
            return difference
        if fits and difference <= TOLERANCE[self.dtype] * self.scale:
            return difference
        return self._elsewhere_alike(small)

    def _elsewhere_alike(self, small: nn.Module) -> float:
        """The difference on as many other examples as were given."""
        other, moved = alike(self.reference(), self.inputs, self.expected)
        return largest_difference(moved, _attempt(small, other, "the smaller network"))

    def _check_taken(self) -> None:
        if not _takes(self.model, self.inputs, nullcontext()):
            raise _RefusedError

    def check(self) -> None:
        """Once: the network is deterministic, and its graph, where that is used, computes the same.

        Raises:
            InputError: two equal calls give different outputs.
            ProofError, _DoesNotRunError: the graph computes something else.
        """
        if self.checked:
            return
        self.checked = True
        try:
            expected = outputs_of(self.model, self.inputs)
        except Exception:  # noqa: BLE001 - the user's forward may raise anything
            raise _RefusedError from None
        if not self.mixing or isinstance(self.model, GraphModel):
            _check_repeats(expected, outputs_of(self.model, self.inputs))
            return
        with _Rounding() as rounding:
            graph = graph_model(self.model, self.network.captured)
            found = _attempt(graph, self.inputs, "the captured graph")
        if largest_difference(expected, found) == 0:
            return  # the same operators on the same numbers, as a rule
        _check_numbers(self.model, self.inputs, expected)
        _check_repeats(expected, outputs_of(self.model, self.inputs))
        _, moved = alike(self.model, self.inputs, expected)
        error = largest_difference(expected, found) / _scale(expected, moved, self.dtype)
        if error > rounding.tolerance(self.dtype):
            _refuse_capture(error, self.dtype)


def _refuse_capture(error: float, dtype: torch.dtype) -> NoReturn:
    if dtype is not list(TOLERANCE)[-1]:  # a cast to float32 in the graph may be all
        cause = ValueError(f"it differs from the network by {error:.1e} of the outputs' range")
        raise _DoesNotRunError("the captured graph", graph=False, error=cause)
    raise ProofError(
        "prune(model)",
        f"the captured graph differs from the network by {error:.1e} of the outputs' range on the "
        "example inputs, so nothing can be proven and nothing was returned",
        "Let forward depend on its inputs alone: no state kept between calls, no choice by values",
    )


def _attempt(model: nn.Module, inputs: Inputs, what: str) -> list[Tensor]:
    try:
        return outputs_of(model, inputs)
    except Exception as failure:
        graph = isinstance(model, GraphModel)
        final = what == "the smaller network" and not graph
        raise _DoesNotRunError(what, graph, failure, final=final) from failure


def _takes(model: nn.Module, inputs: Inputs, context: AbstractContextManager[Any]) -> bool:
    """Whether the network runs on the inputs, which is done within a context."""
    with suppress(Exception), seeded(0), context:  # forward may raise anything
        outputs_of(model, inputs)
        return True
    return False


def _check_numbers(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> None:
    """Refuse outputs that are no numbers, of the network itself or of what is left of it."""
    if not holds_nan(expected):
        return
    if holds_nan(outputs_of(model, inputs)):
        raise InputError(
            "prune(model)",
            "its outputs on the example inputs are no numbers, so nothing can be proven",
            "Give example inputs like those that the network was trained on",
        )
    raise ProofError(
        "prune(model)",
        "without the removed units its outputs are no numbers (the variance of one entry that "
        "remains, a division by nothing); nothing was returned",
        "Remove less, or keep two units of each layer at least with Budget(min_keep=2)",
    )


def _check_repeats(first: list[Tensor], second: list[Tensor]) -> None:
    if largest_difference(first, second) > 0:
        raise InputError(
            "prune(model)",
            "two equal calls in eval mode give different outputs, so nothing can be proven",
            "Make forward deterministic in eval mode",
        )


def _scale(first: list[Tensor], second: list[Tensor], dtype: torch.dtype) -> float:
    """How far the outputs move with the inputs; 1 where all are zero."""
    moved = largest_difference(first, second)
    sensitivity = moved if isfinite(moved) else 0.0
    return max(sensitivity, magnitude(first) * LEAST[dtype]) or 1.0


class _Rounding(TorchDispatchMode):
    """Notes whether any operator returns numbers of single precision."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest difference to allow in this precision."""
        return max(TOLERANCE[dtype], ROUNDED if self.seen else 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.seen:
            leaves = pytree.tree_leaves(found)
            self.seen = any(isinstance(t, Tensor) and t.dtype is torch.float32 for t in leaves)
        return found
