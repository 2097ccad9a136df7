"""Where the bytes of a file are: its entries, and which tensors have one of their own."""

from __future__ import annotations

import torch

from rarefy.storage.index import Index, Record
from rarefy.storage.pack import DTYPES

KEY = "rarefy"
"""The one key of the metadata."""

INDEX, PACKED = "rarefy.index", "rarefy.packed"
"""Entries of the table of contents, and of all tensors that are too small for their own."""

OWN_ENTRY = 1 << 14
"""Tensors of at least this many stored bytes have an entry of their own."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Number of dimensions -> the order of memory of flag ``l``."""

PLAIN = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Raw tensors of these dtypes are ordinary safetensors entries, which any reader understands."""


def is_plain(record: Record, index: Index) -> bool:
    """Whether a tensor with an entry of its own is an ordinary one there."""
    return (
        record.codec == "raw" and record.path not in index.grids and (DTYPES[record.dtype] in PLAIN)
    )
