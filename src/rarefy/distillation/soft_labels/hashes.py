"""Hashes by which inputs are known again: of batches, and of examples before they are batched.

The hash of an example does not depend on the batch that it is in: collation may pad it to the
longest of the batch, and another batch has another longest.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.batches import batch_size, is_of, tensors
from rarefy.distillation.soft_labels.records import Array
from rarefy.types import Inputs

HASHED = 1024
"""Numbers of a tensor, evenly spread, that its hash covers: at least these, and fewer than twice
as many."""

TARGETS = frozenset(("labels", "label", "label_ids"))
"""Keys under which an example has its target: what the convention, and what Transformers calls
it."""


def input_hashes(inputs: Inputs) -> Array:
    """CRC-32 of each example's tensors in a batch: shapes, types, and evenly spread numbers."""
    found = [0] * batch_size(inputs)
    for tensor in tensors(inputs):
        if is_of(len(found), tensor):
            found = _continued(found, tensor.detach())
    return np.array(found, np.uint32)


def item_hash(item: Any) -> int:
    """CRC-32 of an item of a data set without its target.

    Of tensors, arrays, images and lists of numbers shape, type and evenly spread numbers count; of
    anything else its type and, where that is plain data, its value. A pair is an input and its
    target, unless it is a list of numbers; of a mapping the keys of :data:`TARGETS` do not count.

    Example:
        >>> item_hash((torch.arange(3), 0)) == item_hash((torch.arange(3), 1))
        True
    """
    if isinstance(item, Mapping):
        return _folded({key: value for key, value in item.items() if key not in TARGETS}, 0)
    is_pair = isinstance(item, tuple | list) and len(item) in (1, 2) and not _is_numbers(item)
    return _folded(item[0] if is_pair else item, 0)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _folded(value: Any, before: int) -> int:
    """The hash of a value, begun with another."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if _is_numbers(value):
        numbers = np.asarray(value)  # tokens, samples of sound
        value = numbers if numbers.dtype != object else value
    if isinstance(value, tuple | list):
        for part in value:
            before = _folded(part, before)
        return before
    is_array = hasattr(value, "__array_interface__")  # images of Pillow, too
    if is_array and not isinstance(value, Tensor):
        array = np.asarray(value)
        value = torch.from_numpy(array.copy()) if array.dtype.kind in "biuf" else str(array)
    if isinstance(value, Tensor):
        return _continued([before], value.detach()[None])[0]
    known = isinstance(value, str | bytes | int | float | None)
    return zlib.crc32(repr(value if known else type(value)).encode(), before)


def _continued(before: list[int], tensor: Tensor) -> list[int]:
    """Hashes of examples, continued with the rows of a tensor (N, ...)."""
    if not tensor.numel():
        return before
    rows = tensor.reshape(len(before), -1)
    picked = rows[:, :: max(1, rows.shape[1] // HASHED)].cpu().contiguous()
    lines = picked.view(torch.uint8).numpy()
    head = f"{tuple(tensor.shape[1:])} {tensor.dtype}".encode()
    return [
        zlib.crc32(line.data, zlib.crc32(head, one))
        for one, line in zip(before, lines, strict=True)
    ]
