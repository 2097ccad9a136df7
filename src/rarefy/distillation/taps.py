"""Intermediate values of a network by the paths of its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rarefy.batches import tensors
from rarefy.errors import InputError
from rarefy.graph.program import Graph, GraphModel, Node, Spec
from rarefy.paths import remedy

_INDEXED = re.compile(r"(?P<module>.+)\[(?P<key>[^\[\]]+)\]")

_INNER = ("module", "_orig_mod")
"""Where wrappers keep the network: those of several devices, and that of ``torch.compile``."""


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
            known = dict(network.named_modules(remove_duplicate=False))
            for path in dict.fromkeys(paths):
                module, key = split(path, known, where)
                handle = known[module].register_forward_hook(_hook(found, path, key))
                stack.callback(handle.remove)
        yield found


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within wrappers that hold nothing else."""
    while True:
        inner = [m for name, m in model._modules.items() if name in _INNER and m is not None]
        if len(inner) != 1 or len(model._modules) != 1:
            return model
        (model,) = inner


def split(path: str, known: Iterable[str], where: str) -> tuple[str, str | None]:
    """The module of a path, and the index or name of one of its outputs.

    Raises:
        InputError: no module has that path; the message has the nearest ones.
    """
    modules = {name for name in known if name}
    indexed = None if path in modules else _INDEXED.fullmatch(path)
    module, key = (indexed["module"], indexed["key"]) if indexed else (path, None)
    if module not in modules:
        raise InputError(where, f"no module has the path {module!r}", remedy(module, modules))
    return module, key


def _hook(found: Taps, path: str, key: str | None) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, given, output: found.note(path, output, key)


# --- networks that are a graph -----------------------------------------------------------------


def exits(graph: Graph) -> Mapping[str, Node]:
    """Path of a module to the node whose value leaves it: the last that is read outside of it.

    Modules of which nothing is left in the graph, or that compute no tensor, are not among them.
    """
    found: dict[str, Node] = {}
    for node in graph.calls:
        if not isinstance(node.value, Spec):
            continue
        parts = node.scope.split(".") if node.scope else []
        for count in range(len(parts), 0, -1):
            path = ".".join(parts[:count])
            if all(f"{user.scope}.".startswith(f"{path}.") for user in graph.users[node.name]):
                break  # what does not leave a module does not leave those around it either
            found[path] = node
    return found


@contextmanager
def _watched(network: GraphModel, paths: Iterable[str], found: Taps, where: str) -> Iterator[None]:
    """Note values of nodes; the network's way to run a step is its own again afterwards."""
    leaving = exits(network.graph)
    wanted: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        module, _ = split(path, leaving, where)
        wanted.setdefault(leaving[module].name, []).append(path)
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
