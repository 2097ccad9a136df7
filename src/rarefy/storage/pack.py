"""Tensors as few bytes, without loss.

A tensor is taken as ``count`` elements of ``itemsize`` bytes, and each codec keeps every bit of
them, so NaN payloads, negative zeros and denormals come back as they were:

    raw       the elements as they lie in memory
    zstd      byte planes (all first bytes, then all second bytes, ...), compressed
    sparse    one bit per element that is not all zero bits, then those elements as byte planes;
              both compressed

Codes of four bits are two to a byte instead of byte planes. :func:`pack` takes the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from rarefy.errors import FormatError, InputError

Bytes: TypeAlias = NDArray[np.uint8]
"""Elements of a tensor, of shape ``(count, itemsize)``, or a stream of bytes, ``(length,)``."""

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

SMALL = 1 << 20
"""Up to this many bytes compression may take its time."""


@dataclass(frozen=True)
class Packed:
    """Bytes of one tensor.

    Attributes:
        codec: ``"raw"``, ``"zstd"`` or ``"sparse"``.
        streams: the bytes, in one or two parts; each is compressed where that made it smaller.
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
    elements: Bytes, bits: int | None = None, codecs: Collection[str] = ("zstd", "sparse")
) -> Packed:
    """The smallest lossless form of ``(count, itemsize)`` bytes.

    Args:
        elements: the bytes.
        bits: 4 where each element is one byte below 16, so that two share a byte.
        codecs: what to try besides ``raw``.

    Example:
        >>> pack(np.zeros((1000, 4), np.uint8)).size < 100
        True
    """
    raw = Packed("raw", (_join(elements, bits).tobytes() if bits else elements.tobytes(),))
    found = [raw]
    if "zstd" in codecs:
        found.append(_pack_zstd(elements, bits))
    if "sparse" in codecs and np.count_nonzero(elements.any(axis=1)) < MAX_PRESENT * len(elements):
        found.append(_pack_sparse(elements, bits))
    best = min(found, key=lambda packed: packed.size)
    return best if best.size <= raw.size * (1 - MIN_GAIN) else raw


def unpack(packed: Packed, count: int, itemsize: int, bits: int | None = None) -> Bytes:
    """The elements that :func:`pack` was given, as ``(count, itemsize)`` bytes.

    No more memory is used than the elements need, whatever the streams say.

    Raises:
        FormatError: the streams do not hold exactly these elements.
    """
    unpacker = _UNPACKERS.get(packed.codec)
    if unpacker is None:
        raise damaged("tensor", f"unknown codec {packed.codec!r:.40}")
    try:
        return unpacker(packed.streams, count, itemsize, bits)
    except (ValueError, zstandard.ZstdError) as error:
        if isinstance(error, FormatError):
            raise
        raise damaged("tensor", f"its bytes cannot be unpacked ({error})") from error


def damaged(where: str, what: str) -> FormatError:
    """The error of a file that is not as it was written."""
    return FormatError(where, what, "The file is damaged; get it again or save it anew")


# --- streams -----------------------------------------------------------------------------------


def compress(data: bytes) -> bytes:
    """``data`` as one zstd frame that says its length."""
    level = 19 if len(data) <= SMALL else 9
    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data)


def decompress(data: bytes, size: int) -> bytes:
    """The content of one zstd frame, which must be of exactly ``size`` bytes.

    Raises:
        FormatError: it is no such frame.
    """
    try:
        declared = zstandard.frame_content_size(data)
        if declared != size:
            raise damaged("compressed bytes", f"{declared} bytes are declared, {size} expected")
        content = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise damaged("compressed bytes", f"they cannot be decompressed ({error})") from error
    if len(content) != size:
        raise damaged("compressed bytes", f"they hold {len(content)} bytes, {size} expected")
    return content


def _stream(data: Bytes) -> bytes:
    raw = data.tobytes()
    small = compress(raw)
    return small if len(small) < len(raw) else raw


def _unstream(data: bytes, size: int) -> Bytes:
    content = data if len(data) == size else decompress(data, size)
    return np.frombuffer(content, np.uint8)


# --- codecs ------------------------------------------------------------------------------------


def _join(elements: Bytes, bits: int | None) -> Bytes:
    """Elements as one stream: byte planes, or two codes of four bits to a byte."""
    if bits is None:
        return np.ascontiguousarray(elements.T).reshape(-1)
    if elements.shape[1] != 1 or (elements.size and elements.max() > 15):
        raise InputError("pack(bits=4)", "an element is not below 16", "Pack it as whole bytes")
    codes = np.resize(elements.reshape(-1), len(elements) + len(elements) % 2)
    codes[len(elements) :] = 0
    return (codes[0::2] | (codes[1::2] << 4)).astype(np.uint8)


def _split(stream: Bytes, count: int, itemsize: int, bits: int | None) -> Bytes:
    if bits is None:
        return np.ascontiguousarray(stream.reshape(itemsize, count).T)
    codes = np.stack([stream & 15, stream >> 4], axis=1).reshape(-1)
    return codes[:count].reshape(count, 1)


def _length(count: int, itemsize: int, bits: int | None) -> int:
    return count * itemsize if bits is None else (count + 1) // 2


def _pack_zstd(elements: Bytes, bits: int | None) -> Packed:
    return Packed("zstd", (_stream(_join(elements, bits)),))


def _pack_sparse(elements: Bytes, bits: int | None) -> Packed:
    present = elements.any(axis=1)
    mask = np.packbits(present, bitorder="little")
    return Packed("sparse", (_stream(mask), _stream(_join(elements[present], bits))))


def _unpack_raw(streams: tuple[bytes, ...], count: int, itemsize: int, bits: int | None) -> Bytes:
    (stream,) = streams
    data = np.frombuffer(stream, np.uint8)
    if len(data) != _length(count, itemsize, bits):
        raise damaged("tensor", f"it has {len(data)} bytes, not those of {count} elements")
    return _split(data, count, itemsize, bits) if bits else data.reshape(count, itemsize)


def _unpack_zstd(streams: tuple[bytes, ...], count: int, itemsize: int, bits: int | None) -> Bytes:
    (stream,) = streams
    return _split(_unstream(stream, _length(count, itemsize, bits)), count, itemsize, bits)


def _unpack_sparse(
    streams: tuple[bytes, ...], count: int, itemsize: int, bits: int | None
) -> Bytes:
    mask, values = streams
    present = np.unpackbits(_unstream(mask, (count + 7) // 8), count=count, bitorder="little")
    number = int(present.sum())
    elements = np.zeros((count, itemsize), np.uint8)
    data = _unstream(values, _length(number, itemsize, bits))
    elements[present.astype(bool)] = _split(data, number, itemsize, bits)
    return elements


_UNPACKERS: Mapping[str, Callable[[tuple[bytes, ...], int, int, int | None], Bytes]] = {
    "raw": _unpack_raw,
    "zstd": _unpack_zstd,
    "sparse": _unpack_sparse,
}
