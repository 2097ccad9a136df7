"""The proof of a structural change: the smaller network equals the original with units masked.

Both are run in float64 where the network allows it, in eval mode, on the example inputs and on a
second set of inputs, with the *same* random disturbance added to every parameter and BatchNorm
statistic: a BatchNorm that is still at its initial value, or a layer scale of zero, would hide a
wrong index. The largest difference must be far below the outputs' own sensitivity to the inputs,
since two networks that return constants are equal for nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import call, evaluating, map_tensors, seeded
from rarefy.errors import InputError, ProofError
from rarefy.graph.groups import Mask
from rarefy.graph.trace import Network
from rarefy.pruning.select import Plan
from rarefy.pruning.surgery import kept_entries
from rarefy.types import Inputs

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Largest difference allowed, relative to how far the outputs move with the inputs."""

Build = Callable[[nn.Module, Plan], nn.Module]
"""(model, plan) -> the model with the plan's units gone."""


def masked(model: nn.Module, network: Network, plan: Plan) -> nn.Module:
    """A copy of the model with every coupled slice of the removed units set to zero."""
    reference = copy.deepcopy(model)
    tensors: dict[str, Tensor] = dict(reference.named_parameters(remove_duplicate=False))
    tensors |= dict(reference.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for (path, dim), kept in kept_entries(network, plan).items():
            tensor = tensors[path]
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[torch.from_numpy(kept)] = False
            index = gone.nonzero().ravel().to(tensor.device)
            tensor.index_fill_(dim, index, 0)
    return reference


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
    try:
        error, dtype = _difference(model, example_inputs, network, plan, build)
        if error <= TOLERANCE[dtype]:
            return error
        what = f"the smaller network differs from masking by {error:.1e} of the outputs' range"
    except (RuntimeError, IndexError, TypeError) as failure:
        what = f"the smaller network does not run: {first_line(failure)}"
    raise ProofError(
        "prune(model)",
        f"{what}{_culprit(model, example_inputs, network, plan, build)}; nothing was returned",
        "Exclude that layer with exclude=[...], and report the network: this is a defect of rarefy",
    )


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message, with its type."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


def _culprit(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> str:
    """The first group whose units alone, removed as planned, make the difference."""
    for group in network.groups:
        alone: Mask = plan.removed & False
        alone[group.units] = plan.removed[group.units]
        if not alone.any():
            continue
        try:
            part = Plan.of(network, alone)
            error, dtype = _difference(model, example_inputs, network, part, build)
        except (RuntimeError, IndexError, TypeError) as failure:
            return f" (group {group.name}: {first_line(failure)})"
        if error > TOLERANCE[dtype]:
            return f" (group {group.name})"
    return ""


def _difference(
    model: nn.Module, example_inputs: Inputs, network: Network, plan: Plan, build: Build
) -> tuple[float, torch.dtype]:
    disturbed, dtype = _disturbed(model, example_inputs)
    inputs = _cast(example_inputs, dtype)
    other = _other(inputs)
    reference = masked(disturbed, network, plan)
    small = build(disturbed, plan)
    expected, moved = _run(reference, inputs), _run(reference, other)
    if not _equal(expected, _run(reference, inputs)):
        raise InputError(
            "prune(model)",
            "two equal calls in eval mode give different outputs, so nothing can be proven",
            "Make forward deterministic in eval mode",
        )
    differences = [
        _largest(expected, _run(small, inputs)),
        _largest(moved, _run(small, other)),
    ]
    scale = _largest(expected, moved) or _magnitude(expected) or 1.0
    return max(differences) / scale, dtype


def _disturbed(model: nn.Module, example_inputs: Inputs) -> tuple[nn.Module, torch.dtype]:
    """A copy with a little noise on every parameter, in float64 where the network allows it."""
    dtype = torch.float64
    candidate = copy.deepcopy(model).double()
    try:
        _run(candidate, _cast(example_inputs, dtype))
    except (RuntimeError, TypeError, ValueError):
        candidate, dtype = copy.deepcopy(model).float(), torch.float32
    with torch.no_grad(), seeded(0):
        for parameter in candidate.parameters():
            if parameter.is_floating_point():
                spread = float(parameter.std(correction=0)) if parameter.numel() else 0.0
                noise = torch.randn(parameter.shape, dtype=dtype).to(parameter.device)
                parameter.add_(noise, alpha=0.1 * spread + 0.05)
        for name, buffer in candidate.named_buffers():
            noise = torch.randn(buffer.shape, dtype=dtype).to(buffer.device)
            if name.endswith("running_mean"):
                buffer += 0.1 * noise
            elif name.endswith("running_var"):
                buffer *= torch.exp(0.1 * noise)
    return candidate, dtype


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast: Inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return cast


def _other(inputs: Inputs) -> Inputs:
    """Different inputs of the same form: disturbed numbers, reversed indices."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, dtype=tensor.dtype).to(tensor.device)
            return tensor * 0.9 + noise * (0.3 * tensor.abs().mean() + 0.1)
        if tensor.dtype == torch.bool or tensor.ndim == 0:
            return tensor
        return tensor.flip(-1)

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
    """Largest absolute difference; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    if len(first) != len(second):
        return float("inf")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    return worst if worst == worst else float("inf")


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _magnitude(outputs: list[Tensor]) -> float:
    return max((float(t.double().abs().max()) for t in outputs if t.numel()), default=0.0)
