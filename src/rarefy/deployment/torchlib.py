"""PyTorch's table of ONNX translations, kept from one file to the next.

Its exporter reads the source of some hundred functions for every file, which takes longer than all
else where a network is small.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TABLES: dict[Any, Any] = {}
"""What a table is made for -> the table; of the operators that are registered last."""


@contextmanager
def kept_translations() -> Iterator[None]:
    """PyTorch's exporter takes a copy of the table that was made before, if there is one.

    A table is made anew after operators were registered. Where a version of PyTorch has none of
    this name, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry as Table

        made = Table.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def from_torchlib(*args: Any, **options: Any) -> Any:
        operators = len(torch._C._dispatch_get_all_op_names())
        key = (operators, args, tuple(sorted(options.items())))
        if key not in _TABLES:
            for old in [other for other in _TABLES if other[0] != operators]:
                del _TABLES[old]
            _TABLES[key] = made(*args, **options)
        table = copy.copy(_TABLES[key])
        table.functions = {target: list(held) for target, held in table.functions.items()}
        return table

    before = vars(Table)["from_torchlib"]
    setattr(Table, "from_torchlib", staticmethod(from_torchlib))  # noqa: B010 - mypy
    try:
        yield
    finally:
        setattr(Table, "from_torchlib", before)  # noqa: B010
