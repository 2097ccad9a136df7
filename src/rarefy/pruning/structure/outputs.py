"""The outputs of a network as numbers, and how far those of two networks differ."""

from __future__ import annotations

from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import call, evaluating, map_tensors
from rarefy.types import Inputs


def holds_nan(outputs: list[Tensor]) -> bool:
    """Whether any value is no number."""
    return any(bool(torch.isnan(tensor).any()) for tensor in outputs)


def magnitude(outputs: list[Tensor]) -> float:
    """The largest absolute value that is finite; 0 where there is none."""
    return max((float(finite(t).abs().max()) for t in outputs if t.numel()), default=0.0)


def without_one_more(moved: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Outputs without those of the one example that is more, where it has entries of its own."""
    found = list(moved)
    for i, (tensor, other) in enumerate(zip(moved, like, strict=False)):
        more = [d for d, n in enumerate(tensor.shape[: other.ndim]) if n != other.shape[d]]
        if len(more) == 1 and tensor.shape[more[0]] == other.shape[more[0]] + 1:
            found[i] = tensor.narrow(more[0], 0, other.shape[more[0]])
    return found


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that a network returns in eval mode; its inputs are not written to."""
    with evaluating(model):
        outputs = call(model, map_tensors(torch.clone, inputs))
    leaves: list[Any] = pytree.tree_leaves(outputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        leaves = list(getattr(outputs, "__dict__", {}).values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is no number."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return inf
    worst = 0.0
    for a, b in zip(map(real, first), map(real, second), strict=True):
        differences = (a - b).abs()[a != b]  # equal infinities differ by nothing
        if differences.numel():
            largest = float(differences.max())
            worst = max(worst, inf if isnan(largest) else largest)
    return worst


def real(tensor: Tensor) -> Tensor:
    """In double precision, complex numbers as pairs."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def finite(tensor: Tensor) -> Tensor:
    """As :func:`real`, with zeros for what is not finite."""
    return torch.nan_to_num(real(tensor), 0.0, 0.0, 0.0)
