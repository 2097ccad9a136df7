"""PyTorch's table of ONNX translations, kept from one file to the next.

Its exporter reads the source of some hundred functions for every file, which takes longer than all
else where a network is small.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TABLES: dict[Any, Any] = {}
"""What a table was made for -> the table; only those of what is registered now."""

_LOCK = threading.RLock()
"""Held while PyTorch's own function is exchanged, by one thread at a time."""


@contextmanager
def kept_translations() -> Iterator[None]:
    """PyTorch's exporter takes a copy of the table that was made before, if there is one.

    A table is made anew after operators, or onnxscript's translations, were registered. Where a
    version of PyTorch or onnxscript has none of these names, nothing is changed.
    """
    with _LOCK:
        table, registered = _table(), _registered()
        if table is None or registered is None:
            yield
            return
        made, before = table.from_torchlib, vars(table)["from_torchlib"]

        def from_torchlib(*args: Any, **options: Any) -> Any:
            key = (registered, args, tuple(sorted(options.items())))
            if key not in _TABLES:
                for old in [other for other in _TABLES if other[0] != registered]:
                    del _TABLES[old]
                _TABLES[key] = made(*args, **options)
            own = copy.copy(_TABLES[key])
            own.functions = {target: list(held) for target, held in own.functions.items()}
            return own

        table.from_torchlib = staticmethod(from_torchlib)
        try:
            yield
        finally:
            table.from_torchlib = before


def _table() -> Any:
    """PyTorch's class of tables; None where there is none that makes itself."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry if "from_torchlib" in vars(ONNXRegistry) else None


def _registered() -> Any:
    """The operators that PyTorch knows, and the functions that onnxscript has for them, if told."""
    try:
        from onnxscript.function_libs.torch_lib import ops, registration

        del ops  # which registers its own
        held = list(registration.default_registry.values())
        functions = [function for one in held for function in (*one.overloads, *one.complex)]
        return frozenset(torch._C._dispatch_get_all_op_names()), tuple(functions)
    except (ImportError, AttributeError):
        return None
