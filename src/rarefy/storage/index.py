"""The table of contents of a file: what is where, how it is encoded, what structure it has.

It is JSON, checked against :class:`Index` and then by :func:`check`, before any tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rarefy.errors import FormatError, InputError
from rarefy.graph.serialize import valid_path
from rarefy.graph.stubs import Gives
from rarefy.storage.frames import compress, damaged, decompress
from rarefy.storage.pack import CODECS, DTYPES

VERSION = 1
"""Version of the format that is written, and the newest that is read."""

WEIGHTS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of weights that may be stored as codes; float32 alone where a quantizer reads them."""

MAX_INDEX = 1 << 24
"""Longest table of contents, decompressed."""

FREE_LISTS = 1000
BYTES_PER_LIST = 16
"""A table may hold ``FREE_LISTS`` lists and objects, and one for so many of its bytes: a parser
takes a hundred times the two bytes of an empty one, and a tensor's two lists come with 50 bytes."""

SHOWN = 100
"""More errors of a table of contents than these are only counted."""

FREE_BYTES = 1 << 28
MAX_RATIO = 1024
"""A file may hold tensors of ``FREE_BYTES`` and ``MAX_RATIO`` times its own size, together."""

Kind: TypeAlias = Literal["module", "graph"]
_Size: TypeAlias = Annotated[int, Field(ge=0, lt=2**48)]
_Code: TypeAlias = Annotated[int, Field(ge=-(2**15), lt=2**16)]
_Number: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
_Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
_Item = TypeVar("_Item")
# To tell of millions of values what is wrong with each would take half a minute.
_List: TypeAlias = Annotated[list[_Item], Field(fail_fast=True)]
_Settings: TypeAlias = dict[str, dict[str, _Number | _List[_Number]]]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class GridRecord(_Strict):
    """Where a quantized tensor's scale and zero point are: at a path, or this number.

    With ``group``, they are of shape (channels, blocks of so many neighbors).
    """

    scale: str | _Finite
    zero_point: str | _Code
    axis: Annotated[int, Field(ge=0, lt=64)]
    low: _Code
    high: _Code
    group: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class StubRecord(_Strict):
    """What a stub gives, and how many outputs it has: 0 for a tensor, else those of a tuple."""

    gives: Gives
    outputs: Annotated[int, Field(ge=0, le=64)] = 0


class Columns(_Strict):
    """One column per property of the tensors; columns compress better than rows."""

    path: _List[str] = []
    dtype: _List[str] = []
    shape: _List[Annotated[_List[_Size], Field(max_length=64)]] = []
    flags: _List[str] = []
    codec: _List[str] = []
    sizes: _List[_List[_Size]] = []
    crc32: _List[str] = []


class Index(_Strict):
    """The whole table of contents.

    Attributes:
        kind: ``"module"`` or ``"graph"``.
        class_name: of the model that was saved, for messages.
        tensors: the stored tensors.
        aliases: path -> path of the stored tensor that it shares.
        grids: path of a quantized tensor -> its grid.
        attributes: module path -> attribute -> value, as the shapes imply them.
        custom: the same for attributes that surgery adapted by itself.
        stubs: path of a module of which nothing is left -> what stands in for it.
    """

    kind: Kind
    class_name: Annotated[str, Field(max_length=1000)]
    tensors: Columns
    aliases: dict[str, str] = {}
    grids: dict[str, GridRecord] = {}
    attributes: _Settings = {}
    custom: _Settings = {}
    stubs: dict[str, StubRecord] = {}


@dataclass(frozen=True)
class Record:
    """One stored tensor.

    Attributes:
        path: of the parameter or buffer.
        dtype: name of the dtype.
        shape: of the tensor, not of its bytes.
        flags: ``p`` a parameter, ``g`` that requires grad, ``l`` channels last in memory, ``e``
            bytes in an entry of their own, named by the path; ``n`` numbers of a grid, no tensor
            of the network.
        codec: see :mod:`rarefy.storage.pack`.
        sizes: bytes of each stream.
        crc32: of the streams, as eight hexadecimal digits.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    flags: str
    codec: str
    sizes: tuple[int, ...]
    crc32: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.count * DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> int:
        """Bytes of the tensor in the file."""
        return sum(self.sizes)


def to_columns(records: list[Record]) -> Columns:
    """Records as columns."""
    names = list(Columns.model_fields)
    columns = {name: [getattr(record, name) for record in records] for name in names}
    for name in ("shape", "sizes"):
        columns[name] = [list(value) for value in columns[name]]
    return Columns(**columns)


def records(index: Index) -> Iterator[Record]:
    """The stored tensors, in the order of their bytes.

    Raises:
        FormatError: the columns are not equally long.
    """
    c = index.tensors
    columns = (c.path, c.dtype, map(tuple, c.shape), c.flags, c.codec, map(tuple, c.sizes), c.crc32)
    try:
        for row in zip(*columns, strict=True):
            yield Record(*row)
    except ValueError as error:
        raise damaged("index", "its columns are not equally long") from error


def encode(index: Index, graph: str) -> bytes:
    """Index and graph (or ``""``) as compressed bytes.

    Raises:
        InputError: they are longer than a reader takes.
    """
    text = f"{index.model_dump_json(exclude_defaults=True)}\n{graph}".encode()
    if len(text) > MAX_INDEX:
        raise InputError(
            "save(model)",
            f"its structure takes {len(text)} bytes, and {MAX_INDEX} are the most",
            "Save parts of the network as files of their own",
        )
    return compress(text)


def decode(data: bytes) -> tuple[Index, str]:
    """Index and graph of :func:`encode`, of bounded size and of valid form.

    Raises:
        FormatError: the bytes are not such.
    """
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise damaged("index", f"it cannot be decompressed ({error})") from error
    if not 0 < size <= min(MAX_INDEX, (1 << 20) + 300 * len(data)):
        raise damaged("index", f"it declares {size} bytes")
    try:
        text, _, graph = decompress(data, size).decode().partition("\n")
        if text.count("[") + text.count("{") > FREE_LISTS + len(text) // BYTES_PER_LIST:
            raise damaged("index", "it has more lists than tensors need")
        return Index.model_validate_json(text), graph
    except UnicodeDecodeError as error:
        raise damaged("index", f"it is not valid ({error.reason})") from error
    except ValidationError as error:
        many = error.error_count() > SHOWN
        shown = f"{error.error_count()} values" if many else " ".join(str(error).split())[:300]
        raise damaged("index", f"it is not valid ({shown})") from error


# --- checks ------------------------------------------------------------------------------------


def capacity(stored: int) -> int:
    """How many bytes of tensors a file of ``stored`` bytes may hold."""
    return FREE_BYTES + MAX_RATIO * stored


def check(index: Index, stored: int) -> Mapping[str, Record]:
    """The records by path, once all that they say is possible.

    Args:
        index: of a file.
        stored: bytes of the file.

    Raises:
        FormatError: a path repeats or is not valid, a type or codec is unknown, sizes are
            impossible, or together more than the file may hold.
    """
    found: dict[str, Record] = {}
    total = 0
    for record in records(index):
        where = f"tensor {record.path[:80]!r}"
        if not valid_path(record.path) or record.path in found:
            raise damaged(where, "its path is not valid or repeats")
        _check_record(where, record, index.grids.get(record.path))
        total += record.bytes
        found[record.path] = record
    if total > capacity(stored):
        raise damaged("index", f"it declares tensors of {total} bytes in a file of {stored}")
    for path, source in index.aliases.items():
        if not valid_path(path) or path in found or source not in found:
            raise damaged(f"tensor {path[:80]!r}", f"it cannot share {source[:80]!r}")
    for path, grid in index.grids.items():
        _check_grid(path, grid, found, index.grids)
    _check_numbers(index, found)
    return found


def _check_numbers(index: Index, found: Mapping[str, Record]) -> None:
    """Pass where tensors that are none of the network's are numbers of a grid, and nothing else."""
    named = {n for grid in index.grids.values() for n in (grid.scale, grid.zero_point)}
    shared = set(index.aliases.values())
    for path, record in found.items():
        alone = path in named and path not in shared and not set("pgl") & set(record.flags)
        if "n" in record.flags and not alone:
            raise damaged(f"tensor {path[:80]!r}", "it is of no grid, or of more than that")


def _check_record(where: str, record: Record, grid: GridRecord | None) -> None:
    if record.dtype not in DTYPES:
        raise FormatError(
            where, f"its dtype {record.dtype[:40]!r} is unknown", "Use a newer version of rarefy"
        )
    codec = CODECS.get(record.codec)
    if codec is None or codec.streams != len(record.sizes):
        raise damaged(where, f"codec {record.codec[:40]!r} of {len(record.sizes)} streams")
    if math.prod(size for size in record.shape if size) >= 2**48:
        raise damaged(where, f"its shape {record.shape} is impossible")
    if len(set(record.flags)) != len(record.flags) or not set(record.flags) <= set("pglen"):
        raise damaged(where, f"its flags {record.flags[:40]!r} are unknown")
    dtype = DTYPES[record.dtype]
    differentiable = dtype.is_floating_point or dtype.is_complex
    if "g" in record.flags and not ("p" in record.flags and differentiable):
        raise damaged(where, "it cannot require a gradient")
    if "l" in record.flags and len(record.shape) not in (4, 5):
        raise damaged(where, "it cannot be channels last")
    if record.codec == "raw" and grid is None and record.stored != record.bytes:
        raise damaged(where, f"{record.stored} bytes are not those of {record.bytes}")


def _check_grid(
    path: str,
    grid: GridRecord,
    found: Mapping[str, Record],
    grids: Mapping[str, GridRecord],
) -> None:
    where = f"quantized tensor {path[:80]!r}"
    record = found.get(path)
    scale = found.get(grid.scale) if isinstance(grid.scale, str) else None
    dtypes = ("float32",) if scale is None or "n" not in scale.flags else WEIGHTS
    if record is None or record.dtype not in dtypes or not 0 < grid.high - grid.low < 256:
        raise damaged(where, "its dtype has no codes, or its codes no range")
    if "n" in record.flags or (grid.group is not None and grid.axis >= len(record.shape)):
        raise damaged(where, "it cannot have a grid")
    shapes = ((), _grid_shape(record.shape, grid))
    for name, real in ((grid.scale, True), (grid.zero_point, False)):
        if not isinstance(name, str):
            continue
        held = found.get(name)
        if held is None or name in grids:
            raise damaged(where, f"there is no {name[:80]!r}")
        if held.shape not in shapes or held.dtype not in _GRID_DTYPES[real]:
            raise damaged(where, f"{name[:80]!r} has another shape or dtype")


def _grid_shape(shape: tuple[int, ...], grid: GridRecord) -> tuple[int, ...]:
    """Shape of the scales of a tensor, where there is more than one."""
    channels = shape[grid.axis : grid.axis + 1]
    if grid.group is None:
        return channels
    others = math.prod(size for dim, size in enumerate(shape) if dim != grid.axis)
    return (*channels, -(-others // grid.group))


_GRID_DTYPES: Mapping[bool, tuple[str, ...]] = {
    True: ("float32", "float16"),
    False: ("uint8", "int8", "int16", "int32", "int64"),
}
