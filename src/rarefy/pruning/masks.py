"""Single weights set to zero: the shapes stay, the file shrinks, nothing runs faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rarefy.errors import BudgetError, InputError
from rarefy.pruning.paths import matching, paths, within
from rarefy.types import Budget


def sparsify(model: nn.Module, budget: Budget, *, exclude: Sequence[str] = ()) -> nn.Module:
    """Set the smallest weights to zero (L1 magnitude), in a copy of the model.

    Concerns weights of two or more dimensions; biases and normalization stay. The share is exact:
    ``floor(sparsity * n)`` of the ``n`` weights, of every tensor (``scope="local"``) or of all of
    them together (``scope="global"``). Han et al. 2015, https://arxiv.org/abs/1506.02626.

    Args:
        model: any network.
        budget: ``Budget(sparsity=...)``.
        exclude: module or parameter paths that stay dense.

    Raises:
        BudgetError: the budget is not a sparsity.
        InputError: an excluded name matches nothing, or no weight is left to prune.
    """
    if budget.sparsity is None:
        raise BudgetError(
            "prune(structure='weight')",
            "zeros save neither MACs nor parameters",
            "Give Budget(sparsity=0.9), the share of weights to set to zero",
        )
    for name in ("min_keep", "max_drop", "round_to", "layers"):
        if getattr(budget, name) != Budget.__dataclass_fields__[name].default:
            raise BudgetError(
                f"Budget({name}={getattr(budget, name)!r})",
                "it concerns units, and single weights are to be removed",
                f"Leave {name} out",
            )
    sparse = copy.deepcopy(model)
    weights = prunable(sparse, exclude)
    groups = [weights] if budget.scope == "global" else [[w] for w in weights]
    with torch.no_grad():
        for tensors in groups:
            _zero_smallest(tensors, budget.sparsity)
    return sparse.eval()


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> list[Tensor]:
    """Weights of two or more dimensions, shared ones once, without the excluded.

    Raises:
        InputError: an excluded name matches nothing, or nothing is left.
    """
    known = paths(model)
    excluded = frozenset[str]().union(
        *(matching(name, known, f"prune(exclude=[{name!r}])") for name in exclude)
    )
    found: list[Tensor] = [
        parameter
        for path, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and not within(path, excluded)
    ]
    if not found:
        raise InputError(
            "prune(structure='weight')",
            "no weight is left to prune",
            "Exclude fewer layers, or give a network with convolutions or linear layers",
        )
    return found


def _zero_smallest(tensors: Sequence[Tensor], sparsity: float) -> None:
    magnitudes = torch.cat([t.detach().abs().flatten().cpu() for t in tensors])
    count = int(sparsity * len(magnitudes) + 1e-9)
    keep = torch.ones(len(magnitudes), dtype=torch.bool)
    keep[torch.argsort(magnitudes, stable=True)[:count]] = False
    start = 0
    for tensor in tensors:
        mask = keep[start : start + tensor.numel()].view(tensor.shape)
        tensor.masked_fill_(~mask.to(tensor.device), 0.0)
        start += tensor.numel()


def hold(model: nn.Module) -> Callable[[nn.Module], None]:
    """A function that sets weights which are zero now back to zero, to call after every step.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
        >>> again = hold(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> again(layer)
        >>> layer.weight.tolist()
        [[0.0, 2.0]]
    """
    zeros = {path: p.detach() == 0 for path, p in model.named_parameters() if p.ndim > 1}

    def again(module: nn.Module) -> None:
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                if path in zeros:
                    parameter.masked_fill_(zeros[path].to(parameter.device), 0.0)

    return again


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights of two or more dimensions."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in weights)
    return sum(int((p == 0).sum()) for p in weights) / total if total else 0.0
