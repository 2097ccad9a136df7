"""Streams of bytes, each in the smallest of its forms.

    raw    the bytes themselves, where the stream has the length that is expected
    zstd   one frame, which begins with the byte 0x28
    ans    the byte 0x01, the lengths of all parts but the last, then the parts, each of them coded
           by itself (:mod:`rarefy.storage.ans`) or, where it has its full length, as it is

Codes of fewer than eight bits share bytes, the first in the lowest bits.
"""

from __future__ import annotations

import itertools
import struct
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rarefy.errors import InputError
from rarefy.storage import ans
from rarefy.storage.frames import compress, damaged, decompress

Bytes: TypeAlias = NDArray[np.uint8]
"""Elements of a tensor, of shape ``(count, itemsize)``, or a stream of bytes, ``(length,)``."""

_ANS = b"\x01"

MIN_GAIN = 0.02
"""Numeral systems have to save this share of a stream, since they take longer to read."""

_LENGTH = struct.Struct("<Q")


def write(data: Bytes, parts: int = 1, *, use_ans: bool = False) -> bytes:
    """A stream of ``parts`` equal parts, such as byte planes, whose symbols are alike."""
    raw = data.tobytes()
    best = min(raw, compress(raw), key=len)
    if use_ans and len(raw):
        coded = [_part(part, len(best)) for part in data.reshape(parts, -1)]
        lengths = b"".join(_LENGTH.pack(len(part)) for part in coded[:-1])
        whole = b"".join([_ANS, lengths, *coded])
        best = whole if len(whole) <= (1 - MIN_GAIN) * len(best) else best
    return best if len(best) < len(raw) else raw


def read(data: bytes, size: int, parts: int = 1) -> Bytes:
    """The ``size`` bytes of :func:`write`.

    Raises:
        FormatError: the stream holds something else.
    """
    if len(data) == size:
        return np.frombuffer(data, np.uint8)
    if not data.startswith(_ANS):
        return np.frombuffer(decompress(data, size), np.uint8)
    starts = 1 + _LENGTH.size * (parts - 1)
    if len(data) < starts:
        raise damaged("coded bytes", "they end too early")
    lengths = [n for (n,) in _LENGTH.iter_unpack(data[1:starts])]
    ends = [*itertools.accumulate(lengths, initial=starts), len(data)]
    found = np.empty((parts, size // parts), np.uint8)
    for row, (start, end) in zip(found, itertools.pairwise(ends), strict=True):
        part = data[start:end]
        same = len(part) == len(row)
        row[:] = np.frombuffer(part, np.uint8) if same else ans.decode(part, len(row))
    return found.reshape(-1)


def _part(part: Bytes, limit: int) -> bytes:
    raw = part.tobytes()
    return ans.encode(part, min(limit, len(raw))) or raw


# --- codes in shared bytes ---------------------------------------------------------------------


def length(count: int, bits: int) -> int:
    """Bytes of ``count`` codes."""
    return -(-count * bits // 8)


def join(codes: Bytes, bits: int) -> Bytes:
    """Codes of 1, 2, 4 or 8 bits, shape ``(count,)``, as bytes.

    Raises:
        InputError: a code is too high.
    """
    if codes.size and int(codes.max()) >> bits:
        raise InputError(
            f"pack(bits={bits})", f"a code is not below {1 << bits}", "Pack it as whole bytes"
        )
    each = 8 // bits
    padded = np.zeros(length(len(codes), bits) * each, np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    joined: Bytes = np.bitwise_or.reduce(padded.reshape(-1, each) << shifts, axis=1)
    return joined


def split(data: Bytes, count: int, bits: int) -> Bytes:
    """The first ``count`` codes of :func:`join`."""
    if bits == 8:
        return data[:count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:count]
