"""The tensors of a network as the entries of a file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.storage.adapt import Held
from rarefy.storage.grids import Quantized
from rarefy.storage.index import VERSION, Index, Record
from rarefy.storage.layout import CHANNELS_LAST, INDEX, KEY, OWN_ENTRY, PACKED, is_plain
from rarefy.storage.pack import DTYPES, NAMES, Bytes, Packed, to_bytes


@dataclass(frozen=True)
class Part:
    """A tensor as it goes into the file."""

    record: Record
    packed: Packed


Packer: TypeAlias = Callable[[Bytes, int | None, tuple[int, ...]], Packed]


def parts(held: Held, grids: Mapping[str, Quantized], packer: Packer) -> list[Part]:
    """The network's tensors, then what grids have of their own."""
    numbers = {name: t for quantized in grids.values() for name, t in quantized.own.items()}
    own = [_part(name, tensor, grids.get(name), packer) for name, tensor in held.tensors.items()]
    return own + [_part(name, tensor, None, packer, "n") for name, tensor in numbers.items()]


def _part(
    path: str, tensor: Tensor, quantized: Quantized | None, packer: Packer, flags: str = ""
) -> Part:
    flags += ("p" if isinstance(tensor, nn.Parameter) else "") + "g" * tensor.requires_grad
    flags += "l" * _is_channels_last(tensor)
    if quantized is None:
        packed = packer(to_bytes(tensor), None, tuple(tensor.shape))
    else:
        packed = packer(quantized.codes, quantized.grid.bits, tuple(tensor.shape))
    if packed.size >= OWN_ENTRY and path not in (INDEX, PACKED):
        flags += "e"
    crc = 0
    for stream in packed.streams:
        crc = zlib.crc32(stream, crc)
    sizes = tuple(map(len, packed.streams))
    shape, dtype = tuple(tensor.shape), NAMES[tensor.dtype]
    return Part(Record(path, dtype, shape, flags, packed.codec, sizes, f"{crc:08x}"), packed)


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.ndim not in CHANNELS_LAST or not tensor.numel():
        return False
    shape, form = tensor.shape, CHANNELS_LAST[tensor.ndim]
    last = torch.empty(shape, memory_format=form, device="meta").stride()
    return last == tensor.stride() != torch.empty(shape, device="meta").stride()


def entries(
    packed: list[Part], index: Index, table: bytes
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The entries of a file by name, and its metadata.

    Args:
        packed: the tensors.
        index: what says where they are.
        table: the index as bytes.
    """
    found: dict[str, Tensor] = {}
    small: list[bytes] = []
    for part in packed:
        record, streams = part.record, part.packed.streams
        if "e" not in record.flags:
            small += streams
        elif is_plain(record, index):
            found[record.path] = _blob(streams[0]).view(DTYPES[record.dtype]).reshape(record.shape)
        else:
            found[record.path] = _blob(b"".join(streams))
    if any(small):
        found[PACKED] = _blob(b"".join(small))
    found[INDEX] = _blob(table)
    head = {"version": VERSION, "kind": index.kind, "crc32": f"{zlib.crc32(table):08x}"}
    return found, {KEY: json.dumps(head)}


def _blob(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
