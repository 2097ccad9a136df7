"""What an operator's name stands for: its function, its declaration, whether it writes or draws."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rarefy.errors import FormatError

SCALAR_OPS: Mapping[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in "getitem add sub mul floordiv mod neg truediv pow eq ne lt le gt ge".split()
} | {
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "math.ceil": torch.sym_int,
}
"""Operators on the numbers of a dynamic shape; all others are ATen's."""


def is_known(op: str) -> bool:
    """Whether :func:`resolve` finds the operator."""
    try:
        resolve(op)
    except FormatError:
        return False
    return True


def resolve(op: str) -> Callable[..., Any]:
    """The function behind an operator's name: one of :data:`SCALAR_OPS`, of ATen, of a library.

    Operators of libraries are those registered in this process; a stored graph may call none.

    Raises:
        FormatError: the name is not that of such an operator.
    """
    if op in SCALAR_OPS:
        return SCALAR_OPS[op]
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if all(part.isidentifier() for part in (namespace, name, overload)):
        packet = getattr(getattr(torch.ops, namespace, None), name, None)
        found = getattr(packet, overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise FormatError(
        f"operator {op!r}",
        "it is not an operator that this version of PyTorch has",
        "Use the PyTorch version that wrote the file, or a newer one",
    )


def kind(op: str) -> str:
    """An operator's name without namespace and overload.

    Example:
        >>> kind("aten.conv2d.default"), kind("operator.add"), kind("input")
        ('conv2d', 'add', 'input')
    """
    namespace, _, rest = op.partition(".")
    return rest.partition(".")[0] or namespace


def schema(op: str) -> torch.FunctionSchema | None:
    """The declaration of an ATen operator; None for all others."""
    try:
        found = resolve(op)
    except FormatError:
        return None
    return found._schema if isinstance(found, torch._ops.OpOverload) else None


def is_view(op: str) -> bool:
    """Whether the result is a view of an argument, by the operator's declaration."""
    declared = schema(op)
    if declared is None:
        return op == "operator.getitem"
    return not declared.is_mutable and any(v.alias_info is not None for v in declared.returns)


def writes(op: str) -> bool:
    """Whether the operator writes into an argument."""
    declared = schema(op)
    return declared is not None and declared.is_mutable


def is_random(op: str) -> bool:
    """Whether the operator draws numbers, or is none that is known."""
    if not is_known(op):
        return True
    return torch.Tag.nondeterministic_seeded in getattr(resolve(op), "tags", ())
