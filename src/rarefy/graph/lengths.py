"""``len(x)`` of a tensor as a size, as ``x.shape[0]`` is, while ``torch.export`` follows forward.

Python makes a plain number of what ``len`` returns, so that a network which reads the number of its
examples this way would be captured for those at hand alone.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def free_lengths(model: nn.Module) -> Iterator[None]:
    """Another ``len`` meanwhile in the files that define the classes of a network's modules.

    Files that have one of their own keep it, and PyTorch's stay as they are.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    names = {kind.__module__ for kind in classes if kind.__module__.split(".")[0] not in _SETTLED}
    files = [vars(sys.modules[name]) for name in names & sys.modules.keys()]
    changed = [file for file in files if "len" not in file]
    for file in changed:
        file["len"] = _length
    try:
        yield
    finally:
        for file in changed:
            file.pop("len", None)


_SETTLED = frozenset({"builtins", "torch"})
"""Packages whose classes do not count examples by ``len``."""


def _length(value: Any) -> Any:
    """``len``, but of a tensor the size of its first dimension."""
    has_one = isinstance(value, Tensor) and value.ndim > 0
    return value.shape[0] if has_one else builtins.len(value)
