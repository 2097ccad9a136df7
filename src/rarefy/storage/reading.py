"""An open file: all that it says is checked before it is believed."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import FormatError
from rarefy.grid import Grid
from rarefy.storage.adapt import Held
from rarefy.storage.codes import dequantize
from rarefy.storage.container import Reader
from rarefy.storage.grids import grid_of
from rarefy.storage.index import VERSION, Index, Record, check, decode
from rarefy.storage.layout import CHANNELS_LAST, INDEX, KEY, PACKED, PLAIN, is_plain
from rarefy.storage.pack import DTYPES, Packed, damaged, from_bytes, unpack


@dataclass(frozen=True)
class File:
    """An open file whose table of contents has been checked."""

    reader: Reader
    index: Index
    graph: str
    records: Mapping[str, Record]
    offsets: Mapping[str, int]

    def tensor(self, path: str) -> Tensor:
        """One stored tensor."""
        record = self.records[path]
        dtype = DTYPES[record.dtype]
        grid = self._grid(path)
        packed = Packed(record.codec, self._streams(record))
        where = f"{self.reader.where}, tensor {path!r}"
        try:
            if grid is None:
                elements = unpack(packed, record.count, dtype.itemsize, None, record.shape)
                tensor = from_bytes(elements, record.shape, dtype)
            else:
                codes = unpack(packed, record.count, 1, grid.bits, record.shape)
                tensor = dequantize(codes, record.shape, grid).to(dtype)
        except FormatError as error:
            raise FormatError(where, error.what, error.remedy) from error
        if "l" in record.flags:
            form = CHANNELS_LAST[tensor.ndim]
            tensor = torch.empty_like(tensor, memory_format=form).copy_(tensor)
        if "p" in record.flags:
            return nn.Parameter(tensor, requires_grad="g" in record.flags)
        return tensor

    def paths(self) -> set[str]:
        """Paths of the stored tensors that are the network's."""
        return {path for path, record in self.records.items() if "n" not in record.flags}

    def held(self) -> Held:
        """All tensors of the network."""
        own = self.paths()
        tensors = {path: self.tensor(path) for path in self.records if path in own}
        return Held(tensors, self.index.aliases)

    def grids(self) -> dict[str, Grid]:
        """The grids of weights that no quantizer reads."""
        return {
            path: grid
            for path, record in self.index.grids.items()
            if isinstance(record.scale, str) and "n" in self.records[record.scale].flags
            if (grid := self._grid(path)) is not None
        }

    def _grid(self, path: str) -> Grid | None:
        record = self.index.grids.get(path)
        if record is None:
            return None
        names = [n for n in (record.scale, record.zero_point) if isinstance(n, str)]
        grid = grid_of(record, {name: self.tensor(name) for name in names})
        if grid is None:
            raise damaged(f"{self.reader.where}, tensor {path!r}", "its grid is not valid")
        return grid

    def _streams(self, record: Record) -> tuple[bytes, ...]:
        content = b""
        if "e" in record.flags:
            content = self.reader.read(record.path).tobytes()
        elif record.stored:
            start = self.offsets[record.path]
            content = self.reader.read(PACKED, start, start + record.stored).tobytes()
        if len(content) != record.stored or f"{zlib.crc32(content):08x}" != record.crc32:
            raise damaged(
                f"{self.reader.where}, tensor {record.path!r}", "its bytes do not fit its checksum"
            )
        ends = itertools.accumulate(record.sizes, initial=0)
        return tuple(content[a:b] for a, b in itertools.pairwise(ends))


def open_file(reader: Reader) -> File:
    """Read and check the table of contents."""
    head = _head(reader)
    if INDEX not in reader.names or reader.form(INDEX)[0] != "U8":
        raise damaged(reader.where, f"it has no {INDEX!r}")
    table = reader.read(INDEX).tobytes()
    if head.get("crc32") != f"{zlib.crc32(table):08x}":
        raise damaged(reader.where, "its table of contents does not fit its checksum")
    try:
        index, graph = decode(table)
        if head.get("kind") != index.kind:
            raise damaged("metadata", f"it says {head.get('kind')!r:.40}, the index {index.kind!r}")
        found = check(index, reader.size)
        offsets = _offsets(reader, index, found)
    except FormatError as error:
        raise FormatError(f"{reader.where}, {error.where}", error.what, error.remedy) from error
    return File(reader, index, graph, found, offsets)


def _head(reader: Reader) -> Mapping[str, Any]:
    if KEY not in reader.metadata:
        raise FormatError(
            reader.where,
            "it is a safetensors file without the structure that rarefy writes",
            "Read its tensors with safetensors.torch.load_file(path) and load_state_dict",
        )
    try:
        head = json.loads(reader.metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise damaged(reader.where, "its metadata is not JSON") from error
    version = head.get("version") if isinstance(head, dict) else None
    if type(version) is not int or version < 1:
        raise damaged(reader.where, f"its metadata says version {version!r:.40}")
    if version > VERSION:
        raise FormatError(
            reader.where,
            f"it has version {version} of the format, and this rarefy reads up to {VERSION}",
            "Use a newer rarefy: pip install -U rarefy",
        )
    return head  # type: ignore[no-any-return]


def _offsets(reader: Reader, index: Index, found: Mapping[str, Record]) -> Mapping[str, int]:
    """Where each small tensor begins, once every entry is what the index says."""
    offsets: dict[str, int] = {}
    forms = {INDEX: reader.form(INDEX)}
    end = 0
    for path, record in found.items():
        if "e" not in record.flags:
            offsets[path] = end
            end += record.stored
        elif is_plain(record, index):
            forms[path] = (PLAIN[DTYPES[record.dtype]], record.shape)
        else:
            forms[path] = ("U8", (record.stored,))
    if end:
        forms[PACKED] = ("U8", (end,))
    if forms.keys() != reader.names:
        odd = sorted(forms.keys() ^ reader.names)[0]
        raise damaged("entries", f"{odd[:80]!r} is only in one of header and index")
    for name, form in forms.items():
        if reader.form(name) != form:
            raise damaged(f"entry {name[:80]!r}", f"it is {reader.form(name)}, not {form}")
    return offsets
