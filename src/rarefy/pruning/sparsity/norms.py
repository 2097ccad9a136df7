"""Weights that are divided by their length before they are used: never may all of one be zero."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WHOLE = -1
"""The dimension of a weight that is one vector."""


def norms(model: nn.Module) -> tuple[frozenset[int], dict[int, int]]:
    """Identities of the lengths of weight norms, and identity of a weight -> along which dimension
    the vectors follow each other that are divided by their length.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> lengths, vectors = norms(layer)
        >>> len(lengths), vectors[id(layer.parametrizations.weight.original1)]
        (1, 0)
    """
    lengths, vectors = set[int](), dict[int, int]()
    for module in model.modules():
        first = module[0] if isinstance(module, ParametrizationList) else None
        if isinstance(first, _WeightNorm):
            lengths.add(id(module.original0))
            vectors[id(module.original1)] = first.dim
        elif isinstance(first, _SpectralNorm):
            vectors[id(module.original)] = WHOLE
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                lengths.add(id(getattr(module, f"{hook.name}_g")))
                vectors[id(getattr(module, f"{hook.name}_v"))] = hook.dim
            elif isinstance(hook, SpectralNorm):
                vectors[id(getattr(module, f"{hook.name}_orig"))] = WHOLE
    return frozenset(lengths), vectors
