"""Which attributes of PyTorch's own modules follow from the shapes of their parameters.

After surgery a ``Conv2d`` must say its new ``out_channels``, a ``BatchNorm2d`` its new
``num_features``. For the modules of ``torch.nn`` these follow exactly from the parameters, so they
are derived and never guessed. The same numbers are what a file stores of a changed structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

Attributes: TypeAlias = Mapping[str, Mapping[str, "int | tuple[int, ...]"]]
"""Module path -> attribute -> value."""


def _conv(module: Any) -> dict[str, Any]:
    return {
        "out_channels": module.weight.shape[0],
        "in_channels": module.weight.shape[1] * module.groups,
        "groups": module.groups,
    }


def _conv_transpose(module: Any) -> dict[str, Any]:
    return {
        "in_channels": module.weight.shape[0],
        "out_channels": module.weight.shape[1] * module.groups,
        "groups": module.groups,
    }


def _linear(module: Any) -> dict[str, Any]:
    return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}


def _norm(module: Any) -> dict[str, Any]:
    held = [module.weight, module.bias, getattr(module, "running_mean", None)]
    sizes = [t.shape[0] for t in held if t is not None]
    return {"num_features": sizes[0] if sizes else module.num_features}


def _layer_norm(module: Any) -> dict[str, Any]:
    if module.weight is None:
        return {}
    return {"normalized_shape": tuple(module.weight.shape)}


def _group_norm(module: Any) -> dict[str, Any]:
    size = {"num_channels": module.weight.shape[0]} if module.weight is not None else {}
    return {**size, "num_groups": module.num_groups}


def _embedding(module: Any) -> dict[str, Any]:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

KEY = "_rarefy_attributes"
"""Where a module keeps the attributes that surgery adapted and that no shape implies."""

RULES: Mapping[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(_CONV, _conv),
    **dict.fromkeys(_CONV_TRANSPOSE, _conv_transpose),
    nn.Linear: _linear,
    nn.modules.batchnorm._BatchNorm: _norm,
    nn.modules.instancenorm._InstanceNorm: _norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: lambda module: {"num_parameters": module.weight.shape[0]},
}
"""A module type (and its subclasses) -> the attributes that its parameters' shapes imply."""


def derive(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Attributes of one module as its parameters imply them; empty for unknown types."""
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module)
    return {}


def read(model: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Derived attributes of every module of ``model``, by path."""
    found = {path: derive(module) for path, module in model.named_modules()}
    return {path: attributes for path, attributes in found.items() if attributes}


def remember(model: nn.Module, changed: Attributes) -> None:
    """Note attributes that no rule derives, so that a saved file carries them."""
    held: dict[str, dict[str, Any]] = dict(model.__dict__.get(KEY, {}))
    for path, values in changed.items():
        if not derive(model.get_submodule(path)):
            held[path] = {**held.get(path, {}), **values}
    if held:
        model.__dict__[KEY] = held


def refresh(model: nn.Module) -> None:
    """Set every derived attribute to what the parameters imply."""
    for path, attributes in read(model).items():
        module = model.get_submodule(path)
        for name, value in attributes.items():
            setattr(module, name, value)
