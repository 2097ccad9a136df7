"""Copies of networks, also of those that hold computed tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from rarefy.batches import tensors

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """A deep copy of a network that shares nothing with it.

    PyTorch refuses to copy a tensor that was computed from others with gradients, such as the
    ``weight`` that ``torch.nn.utils.weight_norm`` keeps beside ``weight_g`` and ``weight_v``, or a
    cache that ``forward`` left behind. Of these the copy holds the values.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer(torch.ones(1, 2))
        >>> copied(layer).last.requires_grad
        False
    """
    return copy.deepcopy(model, computed(model))


def computed(model: nn.Module) -> dict[int, Any]:
    """Values of the computed tensors among the attributes, by identity, for ``copy.deepcopy``."""
    return {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor | list | tuple | Mapping)
        for tensor in tensors(value)
        if not tensor.is_leaf
    }
