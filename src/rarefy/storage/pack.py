"""Tensors as few bytes, without loss.

A tensor is taken as ``count`` elements of ``itemsize`` bytes, and each codec keeps every bit of
them, so NaN payloads, negative zeros and denormals come back as they were. A codec says which
elements are stored, and how:

    raw       all, as they lie in memory
    planes    all, as byte planes: all first bytes, then all second bytes, ...
    palette   all, as a codebook of distinct elements and the place of each in it
    sparse    one bit per element that is not all zero bits, then byte planes of those
    sparse0   the same, with the elements in another order: those along dimension 0 side by side
    sparse1   along dimension 1: where N of every M inputs of a convolution are kept, the M bits lie
              together and compress to the logarithm of the number of choices
    ...+palette   the bits, then a codebook of the elements and places

Codes of four bits are two to a byte instead of byte planes. :func:`pack` takes the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.storage import streams
from rarefy.storage.frames import damaged as damaged
from rarefy.storage.streams import Bytes as Bytes

_DTYPE_NAMES = """
bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64
complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
"""

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split()}
"""Name in a file -> dtype."""

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""dtype -> name in a file."""

MIN_GAIN = 0.02
"""A codec other than ``raw`` is used where it saves at least this share, since raw bytes can be
read by others and at once."""

MAX_PRESENT = 0.9
"""``sparse`` is tried where fewer elements than this share are not zero."""

MAX_PALETTE = 256
"""Distinct elements of a palette, at most."""

LOOK = 4096
"""Elements that are looked at before all of them are sorted for a palette."""


@dataclass(frozen=True)
class Codec:
    """How a tensor is stored.

    Attributes:
        mask: whether bits say which elements are not zero, and only those are stored.
        dim: the dimension whose elements lie side by side; None for the last.
        palette: whether elements are places in a codebook.
    """

    mask: bool = False
    dim: int | None = None
    palette: bool = False

    @property
    def streams(self) -> int:
        """How many streams it has."""
        return 1 + self.mask + self.palette


CODECS: Mapping[str, Codec] = {
    "raw": Codec(),
    "planes": Codec(),
    "palette": Codec(palette=True),
    "sparse": Codec(mask=True),
    "sparse0": Codec(mask=True, dim=0),
    "sparse1": Codec(mask=True, dim=1),
    "sparse+palette": Codec(mask=True, palette=True),
    "sparse0+palette": Codec(mask=True, dim=0, palette=True),
    "sparse1+palette": Codec(mask=True, dim=1, palette=True),
}
"""Name in a file -> codec."""

_NAMES = {codec: name for name, codec in CODECS.items()}


@dataclass(frozen=True)
class Packed:
    """Bytes of one tensor.

    Attributes:
        codec: one of :data:`CODECS`.
        streams: the bytes, in one to three parts; each is compressed where that made it smaller.
    """

    codec: str
    streams: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of all streams."""
        return sum(map(len, self.streams))


def to_bytes(tensor: Tensor) -> Bytes:
    """Elements of a tensor of any shape, as ``(count, itemsize)`` bytes in row-major order."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().reshape(-1, tensor.element_size())


def from_bytes(elements: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of :func:`to_bytes`, in memory of its own.

    Raises:
        FormatError: elements of a boolean tensor are other than 0 and 1.
    """
    if dtype == torch.bool and elements.size and elements.max() > 1:
        raise damaged("tensor", "a boolean is neither 0 nor 1")
    flat = np.array(elements, dtype=np.uint8, order="C").reshape(-1)
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def pack(
    elements: Bytes,
    bits: int | None = None,
    shape: tuple[int, ...] = (),
    *,
    codecs: Collection[str] = tuple(CODECS),
    ans: bool = False,
) -> Packed:
    """The smallest lossless form of ``(count, itemsize)`` bytes.

    Args:
        elements: the bytes.
        bits: 4 where each element is one byte below 16, so that two share a byte.
        shape: of the tensor, if its dimensions are to be looked at.
        codecs: what to try besides ``raw``.
        ans: whether streams may be coded by asymmetric numeral systems, too, which makes them a
            little smaller and slower to read.

    Example:
        >>> pack(np.zeros((1000, 4), np.uint8)).size < 100
        True
    """
    plain = streams.join(elements[:, 0], bits) if bits else elements
    raw = Packed("raw", (plain.tobytes(),))
    found = [raw]
    for codec, mask, kept in _masked(elements, shape, codecs, ans):
        if _NAMES[codec] in codecs:
            planes = _write_planes(kept, bits, ans)
            found.append(Packed(_NAMES[codec], (*mask, planes)))
        name = _NAMES[replace(codec, palette=True)]
        palette = _palette(kept) if name in codecs and bits is None else None
        if palette is not None:
            found.append(Packed(name, (*mask, *_write_palette(*palette, ans))))
    best = min(found, key=lambda packed: packed.size)
    return best if best.size <= raw.size * (1 - MIN_GAIN) else raw


def unpack(
    packed: Packed,
    count: int,
    itemsize: int,
    bits: int | None = None,
    shape: tuple[int, ...] = (),
) -> Bytes:
    """The elements that :func:`pack` was given, as ``(count, itemsize)`` bytes.

    No more memory is used than a few times what the elements need, whatever the streams say.

    Raises:
        FormatError: the streams do not hold exactly these elements.
    """
    codec = CODECS.get(packed.codec)
    if codec is None or codec.streams != len(packed.streams):
        raise damaged("tensor", f"codec {packed.codec!r:.40} of {len(packed.streams)} streams")
    if packed.codec == "raw":
        return _read_raw(packed.streams[0], count, itemsize, bits)
    if codec.dim is not None and codec.dim >= len(shape):
        raise damaged("tensor", f"codec {packed.codec!r} of {len(shape)} dimensions")
    mask, rest = packed.streams[: codec.mask], packed.streams[codec.mask :]
    present = None
    if codec.mask:
        stored = streams.read(mask[0], streams.length(count, 1))
        present = np.unpackbits(stored, count=count, bitorder="little").view(np.bool_)
    number = count if present is None else int(np.count_nonzero(present))
    reader = _read_palette if codec.palette else _read_planes
    elements = reader(rest, number, itemsize, bits)
    if present is not None:
        whole = np.zeros(count, _ITEMS[itemsize])
        whole[present] = elements.view(_ITEMS[itemsize])[:, 0]
        elements = whole.view(np.uint8).reshape(count, itemsize)
    return elements if codec.dim is None else _swapped(elements, shape, codec.dim, back=True)


# --- which elements are stored -----------------------------------------------------------------


_ITEMS: Mapping[int, str] = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""Bytes of an element -> a type of that size, whose values are moved as they are."""


def _swapped(elements: Bytes, shape: tuple[int, ...], dim: int, *, back: bool = False) -> Bytes:
    """The elements with those along ``dim`` side by side, or from there as they were."""
    size, after = shape[dim], math.prod(shape[dim + 1 :])
    parts = (after, size) if back else (size, after)
    whole = elements.reshape(math.prod(shape[:dim]), *parts, elements.shape[1])
    return np.ascontiguousarray(whole.swapaxes(1, 2)).reshape(elements.shape)


def _masked(
    elements: Bytes, shape: tuple[int, ...], codecs: Collection[str], ans: bool
) -> Iterator[tuple[Codec, tuple[bytes, ...], Bytes]]:
    """All elements, and those that are not zero under the smallest mask."""
    yield Codec(), (), elements
    present: NDArray[np.bool_] = np.any(elements, axis=1)
    if np.count_nonzero(present) >= MAX_PRESENT * len(elements):
        return
    dims = [d for d in (0, 1) if math.prod(shape[d + 1 :]) > 1 and f"sparse{d}" in codecs]
    masks = {}
    for dim in (None, *dims):
        bits = present.view(np.uint8)
        if dim is not None:
            bits = _swapped(bits[:, None], shape, dim)[:, 0]
        mask = streams.write(np.packbits(bits, bitorder="little"), use_ans=ans)
        masks[dim] = mask
    best = min(masks, key=lambda dim: len(masks[dim]))
    ordered = elements if best is None else _swapped(elements, shape, best)
    yield Codec(mask=True, dim=best), (masks[best],), ordered[ordered.any(axis=1)]


# --- how they are stored -----------------------------------------------------------------------


def _write_planes(elements: Bytes, bits: int | None, ans: bool) -> bytes:
    if bits:
        return streams.write(streams.join(elements[:, 0], bits), use_ans=ans)
    planes = np.ascontiguousarray(elements.T)
    return streams.write(planes.reshape(-1), len(planes), use_ans=ans)


def _read_planes(stored: tuple[bytes, ...], count: int, itemsize: int, bits: int | None) -> Bytes:
    if bits:
        data = streams.read(stored[0], streams.length(count, bits))
        return streams.split(data, count, bits).reshape(count, 1)
    data = streams.read(stored[0], count * itemsize, itemsize)
    return np.ascontiguousarray(data.reshape(itemsize, count).T)


def _read_raw(stream: bytes, count: int, itemsize: int, bits: int | None) -> Bytes:
    data = np.frombuffer(stream, np.uint8)
    if len(data) != (streams.length(count, bits) if bits else count * itemsize):
        raise damaged("tensor", f"it has {len(data)} bytes, not those of {count} elements")
    return (streams.split(data, count, bits) if bits else data).reshape(count, itemsize)


def _palette(elements: Bytes) -> tuple[Bytes, Bytes] | None:
    """The distinct elements, the most frequent first, and the place of each element among them."""
    count, itemsize = elements.shape
    if not count or itemsize > 8:
        return None
    values = np.ascontiguousarray(elements).view(_ITEMS[itemsize])[:, 0]
    if len(np.unique(values[:: count // LOOK + 1])) > MAX_PALETTE:
        return None
    book, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(book) > MAX_PALETTE:
        return None
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(order), np.uint8)
    ranks[order] = np.arange(len(order))
    return book[order].view(np.uint8).reshape(-1, itemsize), ranks[places]


def _width(entries: int) -> int:
    """Bits of a place in a codebook: the fewest that divide a byte."""
    return next(bits for bits in (1, 2, 4, 8) if entries <= 1 << bits)


def _write_palette(book: Bytes, places: Bytes, ans: bool) -> tuple[bytes, bytes]:
    codes = streams.join(places, _width(len(book)))
    return book.tobytes(), streams.write(codes, use_ans=ans)


def _read_palette(stored: tuple[bytes, ...], count: int, itemsize: int, bits: int | None) -> Bytes:
    book = np.frombuffer(stored[0], np.uint8)
    if bits or len(book) % itemsize or not 0 < len(book) <= MAX_PALETTE * itemsize:
        raise damaged("tensor", f"a codebook of {len(book)} bytes")
    book = book.reshape(-1, itemsize)
    width = _width(len(book))
    places = streams.split(streams.read(stored[1], streams.length(count, width)), count, width)
    if count and int(places.max()) >= len(book):
        raise damaged("tensor", f"a place beyond the {len(book)} entries of its codebook")
    return book[places]
