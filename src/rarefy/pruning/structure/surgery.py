"""A network and a plan -> a smaller network: the user's own module, or a rewritten graph.

:func:`cut` slices the parameters of a copy of the user's module and brings the attributes of
PyTorch's own layers in line. :func:`rewrite` does the same to the captured graph, where every size
that the code computes with is read off the labels; it works for any forward, but returns a
:class:`~rarefy.graph.model.GraphModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rarefy.batches import evaluating
from rarefy.copies import successor
from rarefy.graph.capture import graph_model
from rarefy.graph.editor import Editor
from rarefy.graph.model import GraphModel
from rarefy.graph.ops import edit
from rarefy.graph.stubs import stubs, without_zeros
from rarefy.graph.trace import Network, storages
from rarefy.pruning.lengths import remaining_lengths
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure import attributes
from rarefy.pruning.structure.sizes import Values

Kept = Mapping[tuple[str, int], NDArray[np.int64]]
"""(path, dimension) -> the entries that stay, for every dimension that shrinks."""


def kept_entries(
    network: Network, plan: Plan, *, made: bool = False
) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Which entries of which parameters and buffers stay; with ``made``, of constants too."""
    found = {}
    for node in network.captured.graph.nodes:
        if node.op == "tensor" and (made or node.path not in network.flow.made):
            for dim, atoms in enumerate(network.flow.labels[node.name]):
                if atoms is not None and plan.gone[atoms].any():
                    found[node.path, dim] = np.flatnonzero(~plan.gone[atoms])
    return found


def cut(model: nn.Module, network: Network, plan: Plan, values: Values | None = None) -> nn.Module:
    """A copy of the user's module with the units gone; the model itself is untouched.

    Args:
        model: the user's module.
        network: its trace.
        plan: what goes.
        values: numbers that attributes of its modules need, from
            :mod:`rarefy.pruning.structure.sizes`.
    """
    small = successor(model)
    kept = with_aliases(model, kept_entries(network, plan))
    lengths = remaining_lengths(network.captured.graph, lambda path: _tensor(small, path), kept)
    for path, length in lengths.items():
        _tensor(small, path).data.copy_(length)
    old = {path: _tensor(small, path) for path in dict.fromkeys(path for path, _ in kept)}
    slice_once = _slicer(kept)
    for path, tensor in old.items():
        _replace(small, path, slice_once(path, tensor))
    attributes.remember_buffers(small, old)
    _set_counts(small, network, plan)
    _set_values(small, values or {})
    _recompute(small)
    attributes.refresh(small)
    return small


def _recompute(model: nn.Module) -> None:
    """Weights that the hooks of ``torch.nn.utils.weight_norm`` and the like keep as tensors.

    They would be computed anew by the next call; but their shapes are read before that.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                with torch.no_grad(), evaluating(module):
                    hook(module, ())


def with_aliases(model: nn.Module, kept: Kept) -> dict[tuple[str, int], NDArray[np.int64]]:
    """The same entries for all paths under which a shared tensor is registered."""
    identity = storages(model)
    paths: dict[int, list[str]] = {}
    for path, key in identity.items():
        paths.setdefault(key, []).append(path)
    return {
        (alias, dim): entries
        for (path, dim), entries in kept.items()
        for alias in paths.get(identity.get(path, -1), [path])
    }


def sliced(tensor: Tensor, kept: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """The entries that stay, as a new tensor or parameter with the same gradient flag."""
    with torch.no_grad():
        value = tensor.detach()
        for dim, entries in kept.items():
            value = value.index_select(dim, torch.from_numpy(entries).to(value.device))
        value = value.clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _slicer(kept: Kept) -> Callable[[str, Tensor], Tensor]:
    """(path, tensor) -> what stays of it; a tensor under several paths stays one."""
    by_path: dict[str, dict[int, NDArray[np.int64]]] = {}
    for (path, dim), entries in kept.items():
        by_path.setdefault(path, {})[dim] = entries
    made: dict[int, Tensor] = {}

    def small(path: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = sliced(tensor, by_path.get(path, {}))
        return made[id(tensor)]

    return small


def _tensor(model: nn.Module, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    held = module._parameters if leaf in module._parameters else module._buffers
    tensor = held[leaf]
    assert tensor is not None
    return tensor


def _replace(model: nn.Module, path: str, tensor: Tensor) -> None:
    owner_path, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner_path), leaf, tensor)  # recurrent layers take note of it


def _set_counts(small: nn.Module, network: Network, plan: Plan) -> None:
    """Attributes that state numbers of units which no parameter's shape states: ``groups``."""
    changed: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for (name, attribute), atoms in network.flow.counts.items():
        path = network.captured.graph.by_name[name].scope
        module = small.get_submodule(path)
        if getattr(module, attribute, None) == len(atoms):  # else the forward computes with it
            changed.setdefault(path, {})[attribute] = int((~plan.gone[atoms]).sum())
    for (name, attribute), sizes in network.flow.shapes.items():
        path = network.captured.graph.by_name[name].scope
        if isinstance(getattr(small.get_submodule(path), attribute, None), tuple):
            changed.setdefault(path, {})[attribute] = tuple(
                n if isinstance(n, int) else int((~plan.gone[n]).sum()) for n in sizes
            )
    for path, values in changed.items():
        for attribute, value in values.items():
            setattr(small.get_submodule(path), attribute, value)
    attributes.remember(small, changed)


def _set_values(small: nn.Module, values: Values) -> None:
    """Attributes that the forward computes sizes with; of a tuple or list, one of its numbers."""
    changed: dict[str, dict[str, Any]] = {}
    for attribute, value in values.items():
        owner, name = attributes.holder(small.get_submodule(attribute.path), attribute.name)
        held = owner.get(name)
        if attribute.index is not None and isinstance(held, tuple | list):
            numbers = list(held)
            numbers[attribute.index] = value
            new: Any = type(held)(numbers)
        else:
            new = value
        if held != new:
            owner[name] = new
            changed.setdefault(attribute.path, {})[attribute.name] = new
    attributes.remember(small, changed)


# --- the rewritten graph -----------------------------------------------------------------------


def rewrite(model: nn.Module, network: Network, plan: Plan) -> GraphModel:
    """The captured graph with the units gone, as a module with tensors of its own."""
    graph = network.captured.graph.live
    editor = Editor(network.flow, plan.gone)
    nodes = [edited for node in graph.nodes for edited in edit(editor, node)]
    kept = kept_entries(network, plan, made=True)
    whole = graph_model(model, network.captured)
    small = _slicer(kept)
    parameters: dict[str, Tensor] = dict(whole.named_parameters(remove_duplicate=False))
    for path, length in remaining_lengths(graph, whole.tensor, kept).items():
        flag = parameters[path].requires_grad
        parameters[path] = nn.Parameter(length, requires_grad=flag)
    parameters = {p: small(p, t) for p, t in parameters.items()}
    buffers = {p: small(p, t) for p, t in whole.named_buffers(remove_duplicate=False)}
    device = next((tensor.device for tensor in parameters.values()), torch.device("cpu"))
    buffers |= {path: tensor.to(device) for path, tensor in editor.constants.items()}
    plain = without_zeros(graph.with_nodes(nodes), stubs(model))
    return GraphModel(plain, parameters, buffers)
