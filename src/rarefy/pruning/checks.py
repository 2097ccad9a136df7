"""What is refused before a network is pruned: arguments of another kind, and what cannot be copied
or computed with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.copies import computed
from rarefy.errors import InputError, first_line
from rarefy.types import check_network


def check_arguments(model: object, budget: object, accepted: Any) -> None:
    """Refuse what is of another kind than it should be."""
    check_network(model, "prune(model)")
    if not isinstance(budget, accepted):
        what = f"a {type(budget).__name__} was given"
        raise InputError("prune(budget=...)", what, "Write for example rarefy.Budget(macs=0.5)")


def check_copies(model: nn.Module) -> None:
    """Refuse a network that holds what cannot be copied, since the result is a copy.

    Raises:
        InputError: names what Python says.
    """
    kept = [*model.parameters(), *model.buffers()]  # these can, and would take memory
    try:
        copy.deepcopy(model, computed(model) | {id(tensor): tensor for tensor in kept})
    except Exception as error:
        raise InputError(
            f"prune({type(model).__name__})",
            f"it cannot be copied: {first_line(error)}",
            "Keep open files, locks, generators and computed tensors out of the attributes of "
            "modules, or define __deepcopy__",
        ) from error


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, or that hold no values at all, and NaN in buffers.

    Infinities in buffers are let through: attention masks hold them.

    Raises:
        InputError: names the first such parameter or buffer.
    """
    for path, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and bool(buffer.isnan().any()):
            raise InputError(
                f"buffer {path}", "it holds NaN", "Load a checkpoint from before training diverged"
            )
    for path, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise InputError(
                f"parameter {path}",
                "it holds no values",
                "Load a checkpoint into the model, or run it once, before pruning",
            )
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"parameter {path}",
                "it holds NaN or infinite values",
                "Load a checkpoint from before training diverged",
            )
