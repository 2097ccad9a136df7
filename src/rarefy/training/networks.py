"""What training asks of a network, and copies of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.errors import InputError, TrainingError, warn
from rarefy.graph.model import GraphModel
from rarefy.grid import grids


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


@torch.no_grad()
def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters and buffers of the same names."""
    for name, tensor in tensors_of(model):
        unexpanded(tensor).copy_(unexpanded(values[name], tensor))


def unexpanded(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The entries with memory of their own: of each dimension that is expanded, the first.

    Args:
        tensor: any.
        like: the tensor whose expanded dimensions these are; ``tensor`` itself by default.
    """
    given = tensor if like is None else like
    if given.layout is not torch.strided or 0 not in given.stride():
        return tensor
    return tensor[tuple(slice(0, 1 if step == 0 else None) for step in given.stride())]


def require_trainable(model: nn.Module, where: str) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"{where}(model)",
            "no parameter is trainable",
            "Give a network with parameters, and set requires_grad on those to learn",
        )
    devices = {tensor.device for _, tensor in tensors_of(model)}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise InputError(
            f"{where}(model)",
            f"its tensors are on {sorted(map(str, devices))}",
            "Move it to one real device first",
        )
    require_finite(model, f"{where}(model)", InputError, "Check the checkpoint it was loaded from")


def require_dense(model: nn.Module, where: str) -> None:
    """Pass where files can hold all tensors."""
    for name, tensor in tensors_of(model):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "quantized by PyTorch" if tensor.is_quantized else "sparse"
            raise InputError(
                where,
                f"{name!r} of {type(model).__name__} is {kind}, and files hold dense tensors",
                "Hold it as dense tensors, or train without checkpoints",
            )


def warn_of_rounded(model: nn.Module, where: str) -> None:
    """Say so where training moves weights that were rounded alone off their few values."""
    held = dict(model.named_parameters(remove_duplicate=False))
    moving = [path for path in grids(model) if held[path].requires_grad]
    if moving:
        warn(
            f"{where}(model): {len(moving)} weights that were rounded alone, {moving[0]!r} among "
            "them, become floats again, and a file of the result larger. Train first, then round; "
            "networks of quantize(..., Int8()) stay in int8 as they learn."
        )


def require_finite(
    model: nn.Module, where: str, error: type[InputError | TrainingError], remedy: str
) -> None:
    """Parameters are finite and buffers hold no NaN (an attention mask may hold ``-inf``)."""
    for name, parameter in model.named_parameters():
        if not parameter.detach().isfinite().all():
            raise error(where, f"parameter {name!r} holds NaN or infinity", remedy)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise error(where, f"buffer {name!r} holds NaN", remedy)


def has_batch_norm(model: nn.Module) -> bool:
    return any(
        isinstance(module, _BatchNorm)
        or (
            isinstance(module, GraphModel)
            and any(node.op == "aten.batch_norm.default" for node in module.graph.calls)
        )
        for module in model.modules()
    )
