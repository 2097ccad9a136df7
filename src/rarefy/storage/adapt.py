"""What of a module goes into a file, and how another instance of its class is made like it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rarefy.copies import copied
from rarefy.errors import FormatError, InputError
from rarefy.graph.stubs import Stub, put, stubs
from rarefy.pruning.structure import attributes
from rarefy.storage.index import StubRecord
from rarefy.storage.pack import NAMES
from rarefy.types import check_network

Settings = dict[str, dict[str, int | list[int]]]
"""Module path -> attribute -> value, as JSON has it."""


@dataclass(frozen=True)
class Held:
    """The tensors of a module that a file holds.

    Attributes:
        tensors: path -> tensor, each storage once.
        aliases: path -> path in ``tensors`` of the same tensor.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]

    def paths(self) -> set[str]:
        """All paths."""
        return self.tensors.keys() | self.aliases.keys()

    def sharing(self) -> Mapping[str, frozenset[str]]:
        """Path in ``tensors`` -> all paths of that tensor."""
        return sharing(self.tensors, self.aliases)


def sharing(paths: Iterable[str], aliases: Mapping[str, str]) -> Mapping[str, frozenset[str]]:
    """Each path with its aliases."""
    found = {path: {path} for path in paths}
    for alias, path in aliases.items():
        found[path].add(alias)
    return {path: frozenset(names) for path, names in found.items()}


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by path, shared ones under each of their paths.

    Non-persistent buffers are among them where surgery changed their size.
    """
    skipped = attributes.passing(model) - set(vars(model).get(attributes.BUFFERS, ()))
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (module._parameters | module._buffers).items():
            full = f"{path}.{name}" if path else name
            if tensor is not None and full not in skipped:
                found[full] = tensor
    return found


def held(model: nn.Module) -> Held:
    """Parameters and persistent buffers, each storage once."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for path, tensor in _named(model).items():
        source = first.setdefault(_identity(tensor), path)
        if source == path:
            tensors[path] = tensor
        else:
            aliases[path] = source
    return Held(tensors, aliases)


def _identity(tensor: Tensor) -> Any:
    """Equal for the same elements of the same storage in the same role."""
    if (
        is_lazy(tensor)
        or not tensor.numel()
        or tensor.device.type == "meta"
        or tensor.layout != torch.strided
    ):
        return id(tensor)
    layout = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (*layout, tensor.device, isinstance(tensor, nn.Parameter), tensor.requires_grad)


def check_storable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Pass where a file can hold all of a module's state.

    Raises:
        InputError: a tensor has no data, a dtype or layout that is not stored, or the module has
            state that is no tensor.
    """
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"module {path!r}",
                "it has extra state, which can be any object",
                "Register that state as buffers",
            )
    for path, tensor in tensors.items():
        where = f"tensor {path!r}"
        if tensor.device.type == "meta" or is_lazy(tensor):
            raise InputError(where, "it has no data", "Load or initialize the model first")
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.dtype not in NAMES:
            raise InputError(
                where,
                f"a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout} is not stored",
                "Convert it to an ordinary tensor of one of PyTorch's number types",
            )


# --- attributes --------------------------------------------------------------------------------


def implied(model: nn.Module) -> Settings:
    """Attributes that follow from the shapes, where the module has them."""
    found: Settings = {}
    for path, values in attributes.read(model).items():
        own = vars(model.get_submodule(path))
        kept = {name: _plain(value) for name, value in values.items() if name in own}
        if kept:
            found[path] = kept
    return found


def custom(model: nn.Module) -> Settings:
    """Attributes that surgery adapted by itself; all of them can be restored.

    Raises:
        InputError: one of them could not be restored.
    """
    given = vars(model).get(attributes.KEY, {})
    found = {path: {n: _plain(v) for n, v in values.items()} for path, values in given.items()}
    try:
        _changes(model, found)
    except FormatError as error:
        raise InputError(error.where, error.what, "Record only integers that exist") from error
    return found


def _plain(value: int | Iterable[int]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)


def apply(model: nn.Module, *settings: Settings) -> None:
    """Set attributes of modules; nothing is set unless all may be.

    Raises:
        FormatError: a module or attribute does not exist, or is no integer or sequence of such.
    """
    for module, name, value in [c for given in settings for c in _changes(model, given)]:
        owner, leaf = attributes.holder(module, name)
        owner[leaf] = value


def _changes(model: nn.Module, settings: Settings) -> list[tuple[nn.Module, str, Any]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for path, values in settings.items():
        if path not in modules:
            raise FormatError(
                f"module {path[:80]!r}",
                f"the model has no such module{nearest(path, modules)}",
                "Create the model as it was created before it was saved",
            )
        for name, value in values.items():
            new = _value(modules[path], path, name, value)
            found.append((modules[path], name, new))
    return found


def _value(
    module: nn.Module, path: str, name: str, value: Any
) -> int | list[int] | tuple[int, ...]:
    """``value`` in the form that the attribute has, where a file may set it at all."""
    current = _current(module, name)
    if _is_size(current) and _is_size(value):
        return value  # type: ignore[no-any-return]
    if _is_sizes(current) and isinstance(value, list) and _is_sizes(value):
        return list(value) if isinstance(current, list) else tuple(value)
    raise FormatError(
        f"attribute {path[:80]}.{name[:80]}",
        f"a file may not set it (to a {type(value).__name__}): only attributes that exist and are "
        "integers or sequences of integers can be set",
        "Create the model as it was created before it was saved",
    )


def _current(module: nn.Module, name: str) -> Any:
    """The attribute's value, where the name is of a form that a file may state."""
    if not re.fullmatch(r"(_?[A-Za-z]\w{0,99}\.)?_?[A-Za-z]\w{0,99}", name):
        return None
    try:
        owner, leaf = attributes.holder(module, name)
    except KeyError:
        return None
    return owner.get(leaf)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) <= 64 and all(map(_is_size, value))


# --- stubs -------------------------------------------------------------------------------------


def stand_ins(model: nn.Module) -> dict[str, StubRecord]:
    """What stands in for modules of which nothing is left."""
    return {
        path: StubRecord(gives=stub.stub_gives, outputs=stub.stub_outputs)
        for path, stub in stubs(model).items()
    }


def put_stubs(model: nn.Module, given: Mapping[str, StubRecord]) -> None:
    """Put stubs in the places of modules; nothing is changed unless all have such a place.

    Raises:
        FormatError: a module does not exist, is the network itself or lies within another.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in given:
        parents = (path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1))
        if not path or path not in modules or any(p in given for p in parents):
            raise FormatError(
                f"module {path[:80]!r}",
                f"the model has no such module to be left out{nearest(path, modules)}",
                "Create the model as it was created before it was saved",
            )
    for path, record in given.items():
        put(model, path, Stub(modules[path], record.gives, record.outputs))


# --- loading -----------------------------------------------------------------------------------


def clone(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with ``model``.

    Raises:
        InputError: it is no network, or cannot be copied.
    """
    check_network(model, "load(model)")
    try:
        return copied(model)
    except Exception as error:
        raise InputError(
            f"load(model={type(model).__name__})",
            f"it cannot be copied ({str(error)[:200]})",
            "Give a fresh instance of the class",
        ) from error


def check_paths(model: nn.Module, paths: set[str], class_name: str) -> None:
    """Pass where a model has exactly the parameters and buffers of a file.

    Raises:
        FormatError: some are missing or left over; the message names the nearest.
    """
    own = _named(model).keys()
    empty = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (module._parameters | module._buffers).items()
        if tensor is None
    }
    extra, missing = sorted(paths - own - empty), sorted(own - paths)
    if not extra and not missing:
        return
    parts = []
    if extra:
        parts.append(f"the model has no {extra[0]!r}{nearest(extra[0], own)}{_more(extra)}")
    if missing:
        parts.append(f"the file has no {missing[0]!r}{nearest(missing[0], paths)}{_more(missing)}")
    raise FormatError(
        f"load(model={type(model).__name__})",
        f"{'; '.join(parts)}; the file was saved from class {class_name}",
        "Give an instance of that class, created with the same arguments",
    )


def nearest(path: str, known: Iterable[str]) -> str:
    """The end of a message on a path that is not there: the one like it, or nothing."""
    near = difflib.get_close_matches(path[:200], list(known)[:10_000], 1)
    return f" (the nearest is {near[0]!r})" if near else ""


def _more(paths: list[str]) -> str:
    return f", and {len(paths) - 1} more" if len(paths) > 1 else ""


@torch.no_grad()
def fill(model: nn.Module, loaded: Held) -> None:
    """Give ``model`` the tensors of a file, shared as they were; parameters stay the objects
    that they are wherever that is possible.

    Raises:
        FormatError: a parameter of the file is a buffer of the model, or the other way round.
    """
    own = _named(model)
    owners: dict[int, set[str]] = {}
    for path, tensor in own.items():
        owners.setdefault(id(tensor), set()).add(path)
    device = next((t.device for t in own.values() if t.device.type != "meta"), None)
    for path, paths in loaded.sharing().items():
        new = loaded.tensors[path]
        new.data = new.data.to(device)
        held = own.get(path)
        for name in paths:
            _check_role(model, name, new)
        if held is not None and owners[id(held)] == paths and held.device == new.device:
            held.requires_grad_(False)
            held.data = new.data
            held.requires_grad_(new.requires_grad)
            continue
        for name in paths:
            module, leaf = _split(model, name)
            setattr(module, leaf, new)
    _check_data(model)


def _check_data(model: nn.Module) -> None:
    for path, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise InputError(
                f"load(model={type(model).__name__})",
                f"its buffer {path!r} is on the meta device and not in the file",
                "Create the model with data",
            )


def _split(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    module_path, _, leaf = path.rpartition(".")
    return model.get_submodule(module_path), leaf


def _check_role(model: nn.Module, path: str, tensor: Tensor) -> None:
    module, leaf = _split(model, path)
    if isinstance(tensor, nn.Parameter) != (leaf in module._parameters):
        raise FormatError(
            f"tensor {path!r}",
            "it is a parameter in one of file and model, and a buffer in the other",
            "Give an instance of the class that was saved",
        )
