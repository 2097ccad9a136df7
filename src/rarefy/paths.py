"""Names that a user writes -> paths of modules and parameters, those of the network itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from rarefy.errors import InputError
from rarefy.types import check_network

WRAPPERS: Mapping[str, str] = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
"""Class of a wrapper -> its attribute that holds the network itself."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within wrappers that compile it, spread it over devices or average it.

    Raises:
        InputError: it is no network.

    Example:
        >>> unwrapped(nn.DataParallel(nn.ReLU()))
        ReLU()
    """
    check_network(model, "model")
    attribute = wrapped_at(model)
    return model if attribute is None else unwrapped(getattr(model, attribute))


def wrapped_at(model: nn.Module) -> str | None:
    """The attribute in which a wrapper holds the network; None for what is no wrapper."""
    names = (kind.__name__ for kind in type(model).__mro__)
    return next((WRAPPERS[name] for name in names if name in WRAPPERS), None)


def within_wrappers(path: str) -> str:
    """A path without the attributes at its beginning in which wrappers hold the network.

    Example:
        >>> within_wrappers("_orig_mod.module.conv.weight")
        'conv.weight'
    """
    first, _, rest = path.partition(".")
    return within_wrappers(rest) if rest and first in WRAPPERS.values() else path


def paths(model: nn.Module) -> frozenset[str]:
    """Paths of all modules and parameters."""
    modules = (name for name, _ in model.named_modules(remove_duplicate=False) if name)
    return frozenset(modules).union(
        name for name, _ in model.named_parameters(remove_duplicate=False)
    )


def matches(pattern: str, known: frozenset[str]) -> frozenset[str]:
    """The paths that a name means: itself, or all that a pattern with ``*?[]`` matches."""
    found = frozenset([pattern]) & known
    return found or frozenset(path for path in known if fnmatchcase(path, pattern))


SHOWN = 6
"""How many paths an error shows where none is near to the one that was given."""


def matching(pattern: str, among: Iterable[str], where: str) -> frozenset[str]:
    """The paths that a name means: itself, or all that a pattern with ``*?[]`` matches.

    ``*`` matches dots, too.

    Args:
        pattern: what the user wrote.
        among: paths of the network.
        where: the argument concerned, for the error.

    Raises:
        InputError: nothing matches; the message has the nearest paths.

    Example:
        >>> sorted(matching("layer?.conv", {"layer1.conv", "layer2.conv", "fc"}, "exclude"))
        ['layer1.conv', 'layer2.conv']
    """
    known = frozenset(among)
    found = matches(pattern, known)
    if not found:
        raise InputError(
            where, f"no module or parameter has the path {pattern!r}", remedy(pattern, known)
        )
    return found


def excluded(names: object, among: Iterable[str]) -> frozenset[str]:
    """The paths that ``exclude=`` means.

    Raises:
        InputError: one of the names matches nothing, or they are no list of names.
    """
    if not isinstance(names, list | tuple | set | frozenset):
        what = f"a {type(names).__name__} was given"
        raise InputError("exclude=...", what, "Give a list of module paths")
    for name in names:
        if not isinstance(name, str):
            raise InputError(
                "exclude=...",
                f"it holds a {type(name).__name__}",
                "Give paths, as model.named_modules() has them",
            )
    known = frozenset(among)
    return frozenset[str]().union(*(matching(n, known, f"exclude=[{n!r}]") for n in names))


def remedy(pattern: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that nothing has.

    Example:
        >>> remedy("layer1", {"layers.1", "head"})
        'Did you mean layers.1'
    """
    names = sorted(known)
    if near := difflib.get_close_matches(pattern, names, 3):
        return f"Did you mean {' or '.join(near)}"
    some = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"There are {some}; see model.named_modules()" if names else "See model.named_modules()"


def within(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is one of these, or lies in one of these modules."""
    return any(f"{path}.".startswith(f"{module}.") for module in modules)
