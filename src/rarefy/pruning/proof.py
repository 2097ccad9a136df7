"""The proof of a structural change: the smaller network equals the original with units masked.

Both are run in float64 where the network allows it, in eval mode, on the example inputs and on a
second set of inputs, with the *same* random disturbance added to every parameter: a layer scale of
zero would hide a wrong index. BatchNorm statistics are taken from the inputs and disturbed, so that
the signal neither dies out nor explodes on its way. The largest difference must be far below the
outputs' own sensitivity to the inputs, since two networks that return constants are equal for
nothing.

Masking is plain zeroing of every coupled slice, in the user's own module, except that operators
which mix entries in another way than by adding them are computed over what remains: normalization
statistics are taken over the units that remain (:mod:`rarefy.pruning.reference`). That needs the
captured graph, which is then held against the user's module first, unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.batches import batch_size, call, doubled, evaluating, map_tensors, seeded, take, tensors
from rarefy.copies import copied
from rarefy.errors import InputError, ProofError, first_line
from rarefy.graph.capture import graph_model
from rarefy.graph.groups import Mask
from rarefy.graph.program import GraphModel
from rarefy.graph.trace import Network
from rarefy.pruning.plan import Plan
from rarefy.pruning.reference import masked, mixing, over_survivors
from rarefy.types import Inputs

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Precisions to try, in this order, and the largest difference that each allows, relative to how
far the outputs move with the inputs."""

ROUNDED = 1e-5
"""What float64 allows where the smaller network rounds to float32 on its way: constants that are
made in ``forward``, casts that a capture in float32 wrote down."""

LEAST = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Sensitivity that is still told from rounding, relative to the outputs' magnitude."""

EXAMPLES = 2
"""How many of the example inputs are run, where the network takes so few."""

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


def prove(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> float:
    """Hold ``build(model, plan)`` against masking.

    Returns:
        The largest difference, relative to the outputs' sensitivity to the inputs.

    Raises:
        InputError: the network's outputs are not deterministic in eval mode.
        ProofError: the difference is above :data:`TOLERANCE`; the message names the group.
    """
    found = compare(model, example_inputs, network, plan, build)
    if not found.fault:
        return found.error
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
    for group in network.groups:
        alone: Mask = plan.removed & False
        alone[group.units] = plan.removed[group.units]
        if alone.any():
            part = Plan.of(network, alone)
            if compare(model, example_inputs, network, part, build).fault:
                return f" (group {group.name})"
    return ""


def compare(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> Comparison:
    """Run the smaller network and the masked original side by side.

    A graph that does not run in float64, since it holds a cast to float32, is tried in float32; one
    that was captured for a single batch size is tried on all of the inputs. Whatever ``build``
    itself raises is a defect, and is not caught.

    Raises:
        InputError: the network's outputs are not deterministic in eval mode, or no numbers.
        ProofError: the captured graph, where it has to serve as reference, differs from the module.
    """
    found = Comparison(inf, "the network does not run on the example inputs in eval mode")
    for dtype in TOLERANCE:
        for inputs in _accepted(model, example_inputs, dtype):
            try:
                return _compare(model, inputs, dtype, network, plan, build)
            except _DoesNotRunError as failure:
                found = Comparison(inf, f"{failure.what} does not run: {first_line(failure.error)}")
                if not failure.graph:
                    break
    return found


class _DoesNotRunError(Exception):
    """A network, perhaps a graph of fixed batch size or precision, does not take some inputs."""

    def __init__(self, what: str, graph: bool, error: Exception) -> None:
        super().__init__(what)
        self.what, self.graph, self.error = what, graph, error


def _compare(
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    network: Network,
    plan: Plan,
    build: Build,
) -> Comparison:
    """One comparison, in one precision, on inputs that the network takes."""
    disturbed = _disturbed(model, inputs, dtype)
    if mixing(network, plan):
        _check_capture(disturbed, inputs, dtype, network)
        reference: nn.Module = over_survivors(disturbed, network, plan)
    else:
        reference = masked(disturbed, network, plan)
    expected = _attempt(reference, inputs, "the masked network")
    _check_numbers(disturbed, inputs, expected)
    other, moved = _elsewhere(reference, inputs, expected)
    _check_repeats(expected, _run(reference, inputs))
    small = build(disturbed, plan)
    with _Rounding() as rounding:
        results = [_attempt(small, given, "the smaller network") for given in (inputs, other)]
    difference = max(_largest(expected, results[0]), _largest(moved, results[1]))
    difference = max(difference, _in_larger_batch(reference, small, other))
    error = difference / _scale(expected, moved, dtype)
    if error <= rounding.tolerance(dtype):
        return Comparison(error)
    fault = f"the smaller network differs from masking by {error:.1e} of the outputs' range"
    return Comparison(error, fault)


def _attempt(model: nn.Module, inputs: Inputs, what: str) -> list[Tensor]:
    try:
        return _run(model, inputs)
    except Exception as failure:
        raise _DoesNotRunError(what, isinstance(model, GraphModel), failure) from failure


def _check_capture(model: nn.Module, inputs: Inputs, dtype: torch.dtype, network: Network) -> None:
    """The captured graph computes what the module does; else nothing is proven by it."""
    if isinstance(model, GraphModel):
        return
    expected = _run(model, inputs)
    with _Rounding() as rounding:
        found = _attempt(graph_model(model, network.captured), inputs, "the captured graph")
    if _largest(expected, found) == 0:  # the same operators on the same numbers, as a rule
        return
    _check_numbers(model, inputs, expected)
    _check_repeats(expected, _run(model, inputs))
    _, moved = _elsewhere(model, inputs, expected)
    error = _largest(expected, found) / _scale(expected, moved, dtype)
    if error <= rounding.tolerance(dtype):
        return
    if dtype is not list(TOLERANCE)[-1]:  # a cast to float32 in the graph may be all
        cause = ValueError(f"it differs from the network by {error:.1e} of the outputs' range")
        raise _DoesNotRunError("the captured graph", graph=False, error=cause)
    raise ProofError(
        "prune(model)",
        f"the captured graph differs from the network by {error:.1e} of the outputs' range on the "
        "example inputs, so nothing can be proven and nothing was returned",
        "Let forward depend on its inputs alone: no state kept between calls, no choice by values",
    )


def _check_numbers(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> None:
    """Refuse outputs that are no numbers, of the network itself or of what is left of it."""
    if not _holds_nan(expected):
        return
    if _holds_nan(_run(model, inputs)):
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


def _holds_nan(outputs: list[Tensor]) -> bool:
    return any(bool(torch.isnan(tensor).any()) for tensor in outputs)


def _check_repeats(first: list[Tensor], second: list[Tensor]) -> None:
    if _largest(first, second) > 0:
        raise InputError(
            "prune(model)",
            "two equal calls in eval mode give different outputs, so nothing can be proven",
            "Make forward deterministic in eval mode",
        )


def _scale(first: list[Tensor], second: list[Tensor], dtype: torch.dtype) -> float:
    """How far the outputs move with the inputs; 1 where all are zero."""
    moved = _largest(first, second)
    magnitude = max((float(_finite(t).abs().max()) for t in first if t.numel()), default=0.0)
    sensitivity = moved if isfinite(moved) else 0.0
    return max(sensitivity, magnitude * LEAST[dtype]) or 1.0


def _accepted(model: nn.Module, example_inputs: Inputs, dtype: torch.dtype) -> Iterator[Inputs]:
    """Few of the inputs, all of them, and one doubled, as far as the network takes them."""
    candidate = _converted(model, dtype)
    size = batch_size(example_inputs) if any(t.ndim for t in tensors(example_inputs)) else 0
    few = take(example_inputs, EXAMPLES)
    more = [few, example_inputs] if size > EXAMPLES else [example_inputs]
    if size == 1:  # the capture doubles a batch of one
        more.append(doubled(example_inputs))
    for given in more:
        inputs = _cast(given, dtype)
        try:
            _run(candidate, inputs)
        except Exception:  # noqa: BLE001 - the network's forward may raise anything
            continue
        yield inputs


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose real numbers have this precision."""
    candidate = copied(model)
    return candidate.double() if dtype is torch.float64 else candidate.float()


def _disturbed(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> nn.Module:
    """A copy with a little noise on every parameter and BatchNorm statistic."""
    candidate = _converted(model, dtype)
    with torch.no_grad(), seeded(0):
        for parameter in candidate.parameters():
            if parameter.is_floating_point():
                spread = float(parameter.std(correction=0)) if parameter.numel() else 0.0
                parameter.add_(_noise(parameter), alpha=0.1 * spread + 0.05)
        with _Calibration():  # type: ignore[no-untyped-call]
            _run(candidate, inputs)
        for name, buffer in candidate.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * _noise(buffer)
            elif name.endswith("running_var"):
                buffer *= torch.exp(0.1 * _noise(buffer))
    return candidate


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64).to(like.device, like.dtype)


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


class _Calibration(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sets the statistics of every BatchNorm to those of its input before it runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in func._schema.name:
            x, _, _, mean, variance = args[:5]
            values = x.numel() // max(x.shape[1], 1)
            if isinstance(mean, Tensor) and values > 1:
                dims = [d for d in range(x.ndim) if d != 1]
                found = torch.var_mean(x, dims, correction=0)
                mean.copy_(found[1])
                variance.copy_(torch.where(found[0] > 0, found[0], variance))
        return func(*args, **(kwargs or {}))


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast: Inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return cast


def _elsewhere(
    reference: nn.Module, inputs: Inputs, expected: list[Tensor]
) -> tuple[Inputs, list[Tensor]]:
    """Other inputs with their outputs; the same ones where the network takes no others."""
    other = _other(inputs)
    with suppress(Exception):  # numbers that forward uses as indices, for one, have a range
        return other, _run(reference, other)
    return inputs, expected


def _in_larger_batch(reference: nn.Module, small: nn.Module, inputs: Inputs) -> float:
    """The difference for one example more, where the masked network takes that.

    A size that is written in ``forward`` can fit the smaller network by chance, for one batch size:
    the two rows of ``view(-1, 8)`` become one that holds both examples.
    """
    if isinstance(small, GraphModel):
        return 0.0
    size = batch_size(inputs)
    larger = map_tensors(
        lambda t: torch.cat([t, t[:1]]) if t.ndim and len(t) == size else t, inputs
    )
    try:
        expected = _run(reference, larger)
    except Exception:  # noqa: BLE001 - many networks take one batch size only
        return 0.0
    found = _attempt(small, larger, "the smaller network")
    fits = [t.shape for t in expected] == [t.shape for t in found]
    if isinstance(reference, GraphModel) and not fits:  # a capture for one batch size may be wrong
        return 0.0
    return _largest(expected, found)


def _other(inputs: Inputs) -> Inputs:
    """Different inputs of the same form: disturbed numbers, indices drawn from those given."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or not bool(torch.isfinite(tensor).all()):
            return tensor  # infinities stand in masks, whose pattern counts
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, dtype=tensor.dtype).to(tensor.device)
            return tensor * 0.9 + noise * (0.3 * tensor.abs().mean() + 0.1)
        if tensor.dtype == torch.bool or tensor.ndim == 0 or not tensor.numel():
            return tensor
        drawn = torch.randint(tensor.numel(), tensor.shape).to(tensor.device)
        return tensor.flatten()[drawn]

    with seeded(1):
        changed: Inputs = map_tensors(change, inputs)
    return changed


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model):
        outputs = call(model, map_tensors(torch.clone, inputs))
    leaves: list[Any] = pytree.tree_leaves(outputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        leaves = list(getattr(outputs, "__dict__", {}).values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _largest(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is no number."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return inf
    worst = 0.0
    for a, b in zip(map(_real, first), map(_real, second), strict=True):
        differences = (a - b).abs()[a != b]  # equal infinities differ by nothing
        if differences.numel():
            largest = float(differences.max())
            worst = max(worst, inf if isnan(largest) else largest)
    return worst


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(_real(tensor), 0.0, 0.0, 0.0)
