"""Intermediate values of a network by the paths of its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from rarefy.batches import tensors
from rarefy.errors import InputError
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node
from rarefy.paths import remedy, unwrapped

_INDEXED = re.compile(r"(?P<module>.+)\[(?P<key>[^\[\]]+)\]")

Found = TypeVar("Found")


class Taps:
    """What the tapped modules returned in the last forward pass, by path.

    Args:
        where: the call that errors name.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._held: dict[str, tuple[Tensor, int]] = {}

    def __getitem__(self, path: str) -> Tensor:
        """The tensor of a path.

        Raises:
            InputError: the module did not run, or its output was overwritten by what follows it.
        """
        if path not in self._held:
            raise InputError(
                f"{self._where}: {path!r}",
                "the module did not run in the forward pass",
                "Name one that the network calls in training and in eval mode",
            )
        tensor, version = self._held[path]
        if _version(tensor) != version:
            raise InputError(
                f"{self._where}: {path!r}",
                "its output is overwritten in place by what follows",
                "Name the module that overwrites it, or give that one inplace=False",
            )
        return tensor

    def note(self, path: str, output: Any, key: str | None = None) -> None:
        """Hold the tensor of a module's output.

        Raises:
            InputError: there is none, or none under the key.
        """
        found = output if isinstance(output, Tensor) else _picked(output, key)
        if not isinstance(found, Tensor):
            held = len(tensors(output))
            raise InputError(
                f"{self._where}: {path!r}",
                f"the module returns a {type(output).__name__} with {held} tensors, and none there",
                "Name an index of its outputs, for example 'layer[0]', or another module",
            )
        self._held[path] = found, _version(found)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, where PyTorch counts that."""
    return 0 if tensor.is_inference() else tensor._version


def _picked(output: Any, key: str | None) -> Any:
    """The first tensor of outputs, or the one under an index or a name."""
    if key is None:
        return next(iter(tensors(output)), None)
    if isinstance(output, Mapping):
        return output.get(key)
    if isinstance(output, Sequence) and key.lstrip("-").isdigit():
        index = int(key)
        return output[index] if -len(output) <= index < len(output) else None
    return getattr(output, key, None)


@contextmanager
def taps(model: nn.Module, paths: Iterable[str], *, where: str = "taps") -> Iterator[Taps]:
    """Tap the outputs of modules while the context is open; its hooks are removed in any case.

    Of a module that returns several tensors the first is meant; ``"layer[1]"`` names another of a
    tuple, and ``"layer[hidden]"`` one of a mapping or of an object with names. Of a module that is
    called several times in one forward pass the output of the last call counts. Networks that were
    rewritten as a graph have the paths of their original, as far as its modules are still there.
    ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` need no prefix.

    Args:
        model: the network; nothing of it is changed afterwards.
        paths: paths of modules as in ``model.named_modules()``, with an index or not.
        where: the call that errors name.

    Raises:
        InputError: no module has such a path; the message has the nearest ones.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with taps(net, ["0"]) as found:
        ...     _ = net(torch.ones(1, 2))
        >>> found["0"].shape
        torch.Size([1, 3])
    """
    network = unwrapped(model)
    found = Taps(where)
    with ExitStack() as stack:
        if isinstance(network, GraphModel):
            stack.enter_context(_watched(network, paths, found, where))
        else:
            for path in dict.fromkeys(paths):
                module, key = _located(path, _finder(network), lambda: _names(network), where)
                stack.callback(module.register_forward_hook(_hook(found, path, key)).remove)
        yield found


def _located(
    path: str,
    find: Callable[[str], Found | None],
    known: Callable[[], Iterable[str]],
    where: str,
) -> tuple[Found, str | None]:
    """What a path names, and the index or name of one of its outputs.

    Raises:
        InputError: nothing has that path; the message has the nearest ones.
    """
    readings: list[tuple[str, str | None]] = [(path, None)]
    if indexed := _INDEXED.fullmatch(path):
        readings.append((indexed["module"], indexed["key"]))
    for name, key in readings:
        found = find(name)
        if found is not None:
            return found, key
    name = readings[-1][0]
    raise InputError(where, f"no module has the path {name!r}", remedy(name, known()))


def _finder(network: nn.Module) -> Callable[[str], nn.Module | None]:
    def find(path: str) -> nn.Module | None:
        try:
            return network.get_submodule(path) if path else None
        except AttributeError:
            return None

    return find


def _names(network: nn.Module) -> list[str]:
    return [path for path, _ in network.named_modules(remove_duplicate=False) if path]


def _hook(found: Taps, path: str, key: str | None) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, given, output: found.note(path, output, key)


# --- networks that are a graph -----------------------------------------------------------------


@contextmanager
def _watched(network: GraphModel, paths: Iterable[str], found: Taps, where: str) -> Iterator[None]:
    """Note values of nodes; the network's way to run a step is its own again afterwards."""
    leaving = network.graph.exits
    wanted: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        node, _ = _located(path, leaving.get, lambda: leaving, where)
        wanted.setdefault(node.name, []).append(path)
    plain = network.step

    def step(node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        value = plain(node, function, values)
        for path in wanted.get(node.name, ()):
            found.note(path, value)
        return value

    network.__dict__["step"] = step
    try:
        yield
    finally:
        del network.__dict__["step"]
