"""Copies of networks, also of those that hold computed tensors, and what tells two apart."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rarefy.batches import tensors
from rarefy.errors import InputError
from rarefy.paths import unwrapped
from rarefy.types import check_network

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, instead: Mapping[int, Any] | None = None) -> Model:
    """A deep copy of a network that shares nothing with it.

    PyTorch refuses to copy a tensor that was computed from others with gradients, such as the
    ``weight`` that ``torch.nn.utils.weight_norm`` keeps beside ``weight_g`` and ``weight_v``, or a
    cache that ``forward`` left behind. Of these the copy holds the values.

    Args:
        model: the network.
        instead: what the copy is to hold in place of some objects, by their identity.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer(torch.ones(1, 2))
        >>> copied(layer).last.requires_grad
        False
    """
    with torch.inference_mode(False):
        return copy.deepcopy(model, computed(model) | dict(instead or {}))


MEASURED = ("repaired", "served", "derived")
"""Attributes that tell of a network what is not true of one that is made of it: what was measured
of its layers and in a runtime, and how it was derived."""


def successor(model: Model) -> Model:
    """A copy that is about to be changed: without what was measured on the network as it is.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.served = "0.3 ms"
        >>> hasattr(successor(layer), "served")
        False
    """
    found = copied(model)
    for holder in (found, unwrapped(found)):
        for name in MEASURED:
            holder.__dict__.pop(name, None)
    return found


def hand_on(model: nn.Module, result: nn.Module) -> None:
    """Give a network of the same units and zeros the records of what went."""
    for name in ("pruned", "sparsified"):
        if hasattr(model, name):
            setattr(result, name, getattr(model, name))


def ordinary(model: Model) -> Model:
    """The network; a copy where it was made in inference mode, whose tensors gradients refuse."""
    held = [*model.parameters(), *model.buffers()]
    made_in_it = any(not is_lazy(tensor) and tensor.is_inference() for tensor in held)
    return copied(model) if made_in_it else model


def own_copy(model: Model, where: str) -> Model:
    """A deep copy of a network, or an error that names the call.

    Raises:
        InputError: it is no network, or cannot be copied.
    """
    check_network(model, where)
    try:
        return copied(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            where,
            f"the network cannot be copied: {error}",
            "Keep no locks, open files or tensors that cannot be copied as its attributes",
        ) from error


def converted(model: Model, dtype: torch.dtype) -> Model:
    """A copy whose real parameters and buffers have this precision.

    Parameters are converted on their way, so that none is held twice.
    """
    instead = {
        id(parameter): nn.Parameter(
            parameter.detach().to(dtype, copy=True), requires_grad=parameter.requires_grad
        )
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    }
    candidate = copied(model, instead)
    return candidate.double() if dtype is torch.float64 else candidate.float()


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


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, types and bytes of all parameters and buffers.

    Example:
        >>> fingerprint(nn.ReLU())[:8]
        'e3b0c442'
    """
    found = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
