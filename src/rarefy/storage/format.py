"""One small file for a compressed network: ``save``, ``load``, ``load_tensor``, ``inspect``.

The file is a valid safetensors file; ``docs/format.md`` is its specification. Nothing in it is
executed, and all that it says is checked before it is believed.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.errors import FormatError, InputError, RarefyError
from rarefy.graph.program import Graph, GraphModel
from rarefy.graph.serialize import from_json, to_json
from rarefy.grid import Grid, put_grids
from rarefy.pruning.structure import attributes
from rarefy.storage import adapt
from rarefy.storage.adapt import Held
from rarefy.storage.codes import dequantize
from rarefy.storage.container import Reader, write
from rarefy.storage.grids import Quantized, grid_of, quantized_weights
from rarefy.storage.index import (
    VERSION,
    GridRecord,
    Index,
    Record,
    capacity,
    check,
    decode,
    encode,
    to_columns,
)
from rarefy.storage.pack import (
    DTYPES,
    NAMES,
    Bytes,
    Packed,
    damaged,
    from_bytes,
    pack,
    to_bytes,
    unpack,
)

KEY = "rarefy"
"""The one key of the metadata."""

INDEX, PACKED = "rarefy.index", "rarefy.packed"
"""Entries of the table of contents, and of all tensors that are too small for their own."""

Entropy: TypeAlias = Literal["zstd", "ans"]
"""How bytes are compressed."""

OWN_ENTRY = 1 << 14
"""Tensors of at least this many stored bytes have an entry of their own."""

_PLAIN = {
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


def save(model: nn.Module, path: str | Path, *, entropy: Entropy = "zstd") -> Path:
    """Write a network to one file, which takes the place of an older one in a single step.

    Parameters and persistent buffers are stored without loss, each in the smallest of its
    encodings; equal models give equal bytes. A :class:`~rarefy.graph.program.GraphModel` is
    stored with its graph; there, float32 weights that only ``fake_quantize`` operators read are
    stored as their integer codes, and come back as the values that the codes stand for, with the
    same outputs.

    Args:
        model: any module, pruned or not, or a ``GraphModel``.
        path: of the file; its directory must exist.
        entropy: how bytes are compressed: ``"zstd"``, fast to read, or ``"ans"``, which takes
            asymmetric numeral systems where these are smaller. Quantized weights come out a few
            percent smaller, most of all sparse ones.

    Returns:
        The path.

    Raises:
        InputError: the model has tensors without data, or state that is no tensor; or
            ``entropy`` is neither.
        OutputError: the file cannot be written; an older one is unchanged.
        FormatError: a graph holds what a file may not hold, such as an unknown operator.

    Example:
        >>> save(torch.nn.Linear(3, 2), "/tmp/linear.safetensors").name
        'linear.safetensors'
    """
    if entropy not in get_args(Entropy):
        raise InputError(
            f"save(entropy={entropy!r})", "there is no such coder", "Use 'zstd' or 'ans'"
        )
    held = adapt.held(model)
    adapt.check_storable(model, dict(held.tensors))
    graph, grids = "", quantized_weights(model, held)
    settings: dict[str, Any] = {}
    if isinstance(model, GraphModel):
        graph = to_json(model.graph)
    else:
        settings = {
            "attributes": adapt.implied(model),
            "custom": adapt.custom(model),
            "stubs": adapt.stand_ins(model),
        }
    parts = _parts(held, grids, partial(pack, ans=entropy == "ans"))
    if sum(p.record.bytes for p in parts) > capacity(sum(p.record.stored for p in parts)):
        parts = _parts(held, grids, partial(pack, codecs=()))
    index = Index(
        kind="graph" if isinstance(model, GraphModel) else "module",
        class_name=f"{type(model).__module__}.{type(model).__qualname__}"[:1000],
        tensors=to_columns([part.record for part in parts]),
        aliases=dict(held.aliases),
        grids={name: grid.record for name, grid in grids.items()},
        **settings,
    )
    write(Path(path), *_entries(parts, index, encode(index, graph)))
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a network that :func:`save` wrote; its outputs and state are the same, bit for bit.

    Args:
        path: of the file.
        model: an instance of the saved class, with its original or any other widths; it is
            copied, not changed. A file of a captured graph needs none and ignores it.

    Returns:
        A module in eval mode: the copy of ``model`` with the tensors and widths of the file, or
        a :class:`~rarefy.graph.program.GraphModel`.

    Raises:
        InputError: the file needs a model and none is given, or it cannot be copied.
        FormatError: the file is missing, damaged, hostile, of a newer version, or of another
            class.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> loaded = load(save(layer, "/tmp/linear.safetensors"), torch.nn.Linear(8, 8))
        >>> bool((loaded.weight == layer.weight).all()), loaded.in_features
        (True, 3)
    """
    with Reader(path) as reader:
        contents = _open(reader)
        index = contents.index
        if index.kind == "graph":
            graph = from_json(contents.graph)
            found = _graph_model(reader.where, graph, contents.held())
            put_grids(found, contents.grids())
            return found
        if model is None:
            raise InputError(
                f"load({str(path)!r})",
                f"the file holds the tensors of class {index.class_name}, but not its code",
                "Give an instance of that class: load(path, model)",
            )
        copy = adapt.clone(model)
        adapt.put_stubs(copy, index.stubs)
        attributes.remember_buffers(copy, contents.records)
        adapt.check_paths(copy, contents.paths() | index.aliases.keys(), index.class_name)
        put_grids(copy, contents.grids())
        loaded = contents.held()
    adapt.apply(copy, index.attributes, index.custom)
    adapt.fill(copy, loaded)
    if index.custom:
        vars(copy)[attributes.KEY] = {
            name: {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
            for name, values in index.custom.items()
        }
    return copy.eval()


def load_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a file, whatever its encoding, without reading the others.

    Args:
        path: of the file.
        name: path of the parameter or buffer, e.g. ``"layer1.0.conv1.weight"``.

    Raises:
        FormatError: the file is damaged, or holds no such tensor.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> load_tensor(save(layer, "/tmp/linear.safetensors"), "weight").shape
        torch.Size([2, 3])
    """
    with Reader(path) as reader:
        contents = _open(reader)
        source = contents.index.aliases.get(name, name)
        if source not in contents.records:
            known = [*contents.records, *contents.index.aliases]
            raise FormatError(
                f"load_tensor({str(path)!r})",
                f"it has no tensor {name!r}{adapt._nearest(name, known)}",
                "Print inspect(path) for a list",
            )
        return contents.tensor(source).detach()


# --- inspect -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        path: of the parameter or buffer.
        shape: its shape.
        dtype: name of its dtype.
        encoding: of :data:`rarefy.storage.pack.CODECS`, the same after ``"int8+"`` or ``"int4+"``,
            or ``"same as <path>"``.
        bytes: its bytes in the file.
        bits_per_weight: of the file, for each element; 0 for tensors without elements.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Contents:
    """What a file holds; ``str()`` of it is a table.

    Attributes:
        kind: ``"module"`` or ``"graph"``.
        version: of the format.
        class_name: of the model that was saved.
        bytes: size of the file.
        tensors: its tensors, shared ones under each of their paths.
    """

    kind: str
    version: int
    class_name: str
    bytes: int
    tensors: tuple[Entry, ...]

    def __str__(self) -> str:
        stored = sum(entry.bytes for entry in self.tensors)
        head = ("tensor", "shape", "dtype", "encoding", "bytes", "bits/weight")
        rows = [head, *map(_row, self.tensors)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            f"{self.kind} of {self.class_name}, format {self.version}: {self.bytes:,} bytes, "
            f"{self.bytes - stored:,} of them structure"
        ]
        for row in rows:
            texts = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            texts += [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(texts).rstrip())
        return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "-"
    figures = (f"{entry.bytes:,}", f"{entry.bits_per_weight:.2f}")
    return (entry.path, shape, entry.dtype, entry.encoding, *figures)


def inspect(path: str | Path) -> Contents:
    """What a file holds, without reading its tensors.

    Raises:
        FormatError: the file is missing, damaged or of another kind.

    Example:
        >>> inspect(save(torch.nn.Linear(3, 2), "/tmp/linear.safetensors")).tensors[0].shape
        (2, 3)
    """
    with Reader(path) as reader:
        contents = _open(reader)
        index, held = contents.index, contents.records
        found = [_entry(record, index.grids.get(name)) for name, record in held.items()]
        for alias, source in index.aliases.items():
            same = _entry(held[source], None)
            found.append(
                replace(
                    same, path=alias, encoding=f"same as {source}", bytes=0, bits_per_weight=0.0
                )
            )
        return Contents(index.kind, VERSION, index.class_name, reader.size, tuple(found))


def _entry(record: Record, grid: GridRecord | None) -> Entry:
    encoding = record.codec
    if grid is not None:
        encoding = f"{'int4' if grid.high - grid.low < 16 else 'int8'}+{encoding}"
    bits = 8 * record.stored / record.count if record.count else 0.0
    return Entry(record.path, record.shape, record.dtype, encoding, record.stored, bits)


# --- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A tensor as it goes into the file."""

    record: Record
    packed: Packed


_Packer: TypeAlias = Callable[[Bytes, int | None, tuple[int, ...]], Packed]


def _parts(held: Held, grids: Mapping[str, Quantized], packer: _Packer) -> list[_Part]:
    """The network's tensors, then what grids have of their own."""
    numbers = {name: t for quantized in grids.values() for name, t in quantized.own.items()}
    own = [_part(name, tensor, grids.get(name), packer) for name, tensor in held.tensors.items()]
    return own + [_part(name, tensor, None, packer, "n") for name, tensor in numbers.items()]


def _part(
    path: str, tensor: Tensor, quantized: Quantized | None, packer: _Packer, flags: str = ""
) -> _Part:
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
    return _Part(Record(path, dtype, shape, flags, packed.codec, sizes, f"{crc:08x}"), packed)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.ndim not in _CHANNELS_LAST or not tensor.numel():
        return False
    shape, form = tensor.shape, _CHANNELS_LAST[tensor.ndim]
    last = torch.empty(shape, memory_format=form, device="meta").stride()
    return last == tensor.stride() != torch.empty(shape, device="meta").stride()


def _entries(
    parts: list[_Part], index: Index, table: bytes
) -> tuple[dict[str, Tensor], dict[str, str]]:
    entries: dict[str, Tensor] = {}
    small: list[bytes] = []
    for part in parts:
        record, streams = part.record, part.packed.streams
        if "e" not in record.flags:
            small += streams
        elif _is_plain(record, index):
            entries[record.path] = (
                _blob(streams[0]).view(DTYPES[record.dtype]).reshape(record.shape)
            )
        else:
            entries[record.path] = _blob(b"".join(streams))
    if any(small):
        entries[PACKED] = _blob(b"".join(small))
    entries[INDEX] = _blob(table)
    head = {"version": VERSION, "kind": index.kind, "crc32": f"{zlib.crc32(table):08x}"}
    return entries, {KEY: json.dumps(head)}


def _is_plain(record: Record, index: Index) -> bool:
    return (
        record.codec == "raw"
        and record.path not in index.grids
        and (DTYPES[record.dtype] in _PLAIN)
    )


def _blob(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
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
            form = _CHANNELS_LAST[tensor.ndim]
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


def _open(reader: Reader) -> _File:
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
    return _File(reader, index, graph, found, offsets)


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
        elif _is_plain(record, index):
            forms[path] = (_PLAIN[DTYPES[record.dtype]], record.shape)
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


def _graph_model(where: str, graph: Graph, held: Held) -> GraphModel:
    tensors = {
        name: held.tensors[path] for path, names in held.sharing().items() for name in sorted(names)
    }
    parameters = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    buffers = {n: t for n, t in tensors.items() if n not in parameters}
    try:
        return GraphModel(graph, parameters, buffers)
    except (RarefyError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(where, f"its graph and tensors do not fit ({str(error)[:200]})") from error
