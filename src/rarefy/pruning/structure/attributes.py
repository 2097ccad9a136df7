"""Which attributes of PyTorch's own modules follow from the shapes of their parameters.

After surgery a ``Conv2d`` must say its new ``out_channels``, a ``BatchNorm2d`` its new
``num_features``. For the modules of ``torch.nn`` these follow exactly from the parameters, so they
are derived and never guessed. The same numbers are what a file stores of a changed structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from rarefy.batches import evaluating

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
    shape = module.normalized_shape if module.weight is None else module.weight.shape
    return {"normalized_shape": tuple(shape)}


def _group_norm(module: Any) -> dict[str, Any]:
    channels = module.num_channels if module.weight is None else module.weight.shape[0]
    return {"num_channels": channels, "num_groups": module.num_groups}


def _embedding(module: Any) -> dict[str, Any]:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


def _bilinear(module: Any) -> dict[str, Any]:
    names = ("out_features", "in1_features", "in2_features")
    return dict(zip(names, module.weight.shape, strict=True))


def _recurrent(module: Any) -> dict[str, Any]:
    gates, projected = _GATES[module.mode], module.proj_size > 0
    rows, inputs = module.weight_ih_l0.shape
    return {
        "input_size": inputs,
        "hidden_size": rows // gates,
        "proj_size": module.weight_hr_l0.shape[0] if projected else 0,
    }


def _recurrent_cell(module: Any) -> dict[str, Any]:
    return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Kind of a recurrent layer -> how many gates it has: rows of a weight for each hidden unit."""

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
    nn.EmbeddingBag: _embedding,
    nn.Bilinear: _bilinear,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
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
    """Derived attributes of every module of ``model``, by path.

    In eval mode: a weight that is computed from others may change them in training.
    """
    with evaluating(model):
        found = {path: derive(module) for path, module in model.named_modules()}
    return {path: attributes for path, attributes in found.items() if attributes}


def remember(model: nn.Module, changed: Attributes) -> None:
    """Note attributes that no rule derives, so that a saved file carries them."""
    held: dict[str, dict[str, Any]] = dict(model.__dict__.get(KEY, {}))
    for path, values in changed.items():
        derived = derive(model.get_submodule(path))
        own = {name: value for name, value in values.items() if name not in derived}
        if own:
            held[path] = {**held.get(path, {}), **own}
    if held:
        model.__dict__[KEY] = held


BUFFERS = "_rarefy_buffers"
"""Where a module keeps the paths of non-persistent buffers whose size surgery changed."""


def passing(model: nn.Module) -> frozenset[str]:
    """Paths of the non-persistent buffers of a network."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )


def remember_buffers(model: nn.Module, paths: Iterable[str]) -> None:
    """Note which of these non-persistent buffers a saved file has to hold nevertheless."""
    held = {*model.__dict__.get(BUFFERS, ()), *paths} & passing(model)
    if held:
        model.__dict__[BUFFERS] = tuple(sorted(held))


def holder(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where an attribute is kept, and its name there: ``"config.heads"`` is kept by ``config``.

    Only plain objects that a module holds are looked into, one level deep.

    Raises:
        KeyError: there is no such object.
    """
    owner, _, leaf = name.rpartition(".")
    if not owner:
        return vars(module), name
    held = vars(module)[owner]
    if not is_plain(held):
        raise KeyError(owner)
    return vars(held), leaf


def is_plain(value: object) -> bool:
    """Whether a value is an object with numbers of its own, such as a configuration."""
    return hasattr(value, "__dict__") and not (
        isinstance(value, nn.Module | Tensor | type)
        or callable(value)
        or type(value).__module__.split(".")[0] in ("torch", "builtins", "numpy", "types")
    )


def refresh(model: nn.Module) -> None:
    """Set every derived attribute to what the parameters imply."""
    for path, attributes in read(model).items():
        module = model.get_submodule(path)
        for name, value in attributes.items():
            setattr(module, name, value)
