"""What the proof runs on: networks and inputs with the same random disturbance on both sides."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.batches import batch_size, doubled, is_of, map_tensors, seeded, take, tensors
from rarefy.copies import converted
from rarefy.pruning.structure.outputs import outputs_of, without_one_more
from rarefy.types import Inputs

EXAMPLES = 2
"""How many of the example inputs are run, where the network takes so few."""

PERIOD = 65_521
"""Numbers drawn for a parameter. A prime, so that no two of its rows or columns are disturbed alike
unless as many of them lie between."""


def nudged(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Real numbers changed in their last digit."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + torch.finfo(dtype).eps * torch.randn(tensor.shape).to(tensor))


def candidates(example_inputs: Inputs) -> list[Inputs]:
    """Few of the inputs, all of them, and one doubled."""
    size = batch_size(example_inputs) if any(t.ndim for t in tensors(example_inputs)) else 0
    found = [take(example_inputs, EXAMPLES)] if size > EXAMPLES else []
    found.append(example_inputs)
    if size == 1:  # the capture doubles a batch of one
        found.append(doubled(example_inputs))
    return found


def disturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of this precision with a little noise on every parameter and running statistic."""
    candidate = converted(model, dtype)
    with torch.no_grad(), seeded(0):
        for parameter in candidate.parameters():
            if parameter.is_floating_point():
                spread = float(parameter.std(correction=0)) if parameter.numel() else 0.0
                parameter.add_(noise(parameter), alpha=0.1 * spread + 0.05)
        for name, buffer in candidate.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * noise(buffer)
            elif name.endswith("running_var"):
                buffer *= torch.exp(0.1 * noise(buffer))
    return candidate


def noise(like: Tensor) -> Tensor:
    """Numbers that repeat after :data:`PERIOD`: to draw all of them takes longer than a run."""
    count = like.numel()
    drawn = torch.randn(min(count, PERIOD), dtype=torch.float64).to(like.device, like.dtype)
    if count > PERIOD:
        drawn = drawn.repeat(-(-count // PERIOD))[:count]
    return drawn.reshape(like.shape)


class Calibration(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sets the statistics of every BatchNorm to those of its input, disturbed, before it runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in func._schema.name:
            x, _, _, mean, variance = args[:5]
            values = x.numel() // max(x.shape[1], 1)
            if isinstance(mean, Tensor) and values > 1:
                dims = [d for d in range(x.ndim) if d != 1]
                found = torch.var_mean(x, dims, correction=0)
                mean.copy_(found[1] + 0.1 * noise(mean))
                spread = torch.where(found[0] > 0, found[0], variance)
                variance.copy_(spread * torch.exp(0.1 * noise(variance)))
        return func(*args, **(kwargs or {}))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their real numbers in this precision."""
    found: Inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return found


def other_inputs(inputs: Inputs) -> Inputs:
    """Different inputs of the same form: disturbed numbers, indices drawn from those given."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or not bool(torch.isfinite(tensor).all()):
            return tensor  # infinities stand in masks, whose pattern counts
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, dtype=tensor.dtype).to(tensor.device)
            return tensor * 0.9 + drawn * (0.3 * tensor.abs().mean() + 0.1)
        if tensor.dtype == torch.bool or tensor.ndim == 0 or not tensor.numel():
            return tensor
        drawn = torch.randint(tensor.numel(), tensor.shape).to(tensor.device)
        return tensor.flatten()[drawn]

    with seeded(1):
        changed: Inputs = map_tensors(change, inputs)
    return changed


def elsewhere(
    reference: nn.Module, inputs: Inputs, expected: list[Tensor]
) -> tuple[Inputs, list[Tensor], bool]:
    """Other inputs, their outputs, and whether they are of one example more."""
    with suppress(Exception):  # many networks take one batch size only
        size = batch_size(inputs)
        larger = map_tensors(
            lambda t: torch.cat([t, t[:1]]) if is_of(size, t) else t,
            other_inputs(inputs),
        )
        moved = outputs_of(reference, larger)
        if [t.shape for t in without_one_more(moved, expected)] == [t.shape for t in expected]:
            return larger, moved, True
    return *alike(reference, inputs, expected), False


def alike(
    reference: nn.Module, inputs: Inputs, expected: list[Tensor]
) -> tuple[Inputs, list[Tensor]]:
    """As many other inputs; the same ones where the network takes no others."""
    other = other_inputs(inputs)
    with suppress(Exception):  # numbers that forward uses as indices, for one, have a range
        return other, outputs_of(reference, other)
    return inputs, expected
