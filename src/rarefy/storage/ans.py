"""Entropy coding by asymmetric numeral systems, all lanes at once in numpy.

Symbols are dealt to lanes in turn; each lane is a coder with a state of its own, and all of them
take their words from one stream, so that a step of every lane is a handful of operations on arrays.
All arithmetic of the reader is on integers: what is read is the same on every machine.

Source: Duda 2013, https://arxiv.org/abs/1311.2540 (rANS); Giesen 2014,
https://arxiv.org/abs/1402.3392 (interleaved lanes).
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rarefy.storage.frames import compress, damaged, decompress

Symbols: TypeAlias = NDArray[np.uint8]
_Array: TypeAlias = NDArray[Any]

PRECISION = 12
"""Frequencies of the symbols add up to 2 to this power."""

LOWEST = 1 << 16
"""States are at least this between steps, and below 2**32; words have 16 bits."""

MAX_STEPS = 1 << 12
"""Symbols of one lane, at most: it bounds the time that a small stream can ask for."""

LANE_BYTES = 512
"""One lane for so many coded bytes; each costs about three."""

_HEAD = struct.Struct("<BIH")
"""Bits of a symbol, number of lanes, bytes of the table."""


def encode(data: Symbols, limit: int) -> bytes:
    """Bytes as a coded stream; empty where that would not be below ``limit`` bytes.

    Args:
        data: shape ``(length,)``, not empty.
        limit: bytes that the stream has to stay below.

    Example:
        >>> stream = encode(np.zeros(100_000, np.uint8), 1000)
        >>> len(stream) < 60, bool((decode(stream, 100_000) == 0).all())
        (True, True)
    """
    tables = {width: _table(data, width) for width in (4, 8)}
    sizes = {width: _size(data, table) for width, table in tables.items()}
    width = min(sizes, key=lambda w: sizes[w])
    if sizes[width] >= limit:
        return b""
    symbols = _symbols(data, width)
    lanes = max(1, int(sizes[width]) // LANE_BYTES, -(-len(symbols) // MAX_STEPS))
    states, words = _encoded(symbols, _frequencies(tables[width]), lanes)
    table = _packed_table(tables[width])
    parts = (_HEAD.pack(width, lanes, len(table)), table, states.tobytes(), words.tobytes())
    found = b"".join(parts)
    return found if len(found) < limit else b""


def decode(stream: bytes, size: int) -> Symbols:
    """The ``size`` bytes that :func:`encode` was given, in memory of little more than that.

    Raises:
        FormatError: the stream holds something else.
    """
    try:
        width, lanes, length = _HEAD.unpack_from(stream)
        start = _HEAD.size + length
        count = {4: 2, 8: 1}.get(width, 0) * size
        if not 0 < lanes <= count <= lanes * MAX_STEPS:
            raise damaged("coded bytes", f"{count} symbols in {lanes} lanes")
        frequencies = _frequencies(_read_table(stream[_HEAD.size : start], width))
        states = np.frombuffer(stream, "<u4", lanes, start)
        words = np.frombuffer(stream, "<u2", offset=start + 4 * lanes)
        symbols = _decoded(states, words, frequencies, count)
    except (ValueError, struct.error) as error:
        raise damaged("coded bytes", f"they cannot be decoded ({error})") from error
    return symbols if width == 8 else np.bitwise_or(symbols[0::2], symbols[1::2] << 4)


# --- frequencies -------------------------------------------------------------------------------

_LEVELS = np.array([0, *sorted({(4 + m << e) >> 2 for e in range(PRECISION) for m in range(4)})])
"""What a table can say of a symbol: that it is absent, or how frequent, with three leading bits."""


def _symbols(data: Symbols, width: int) -> Symbols:
    return data if width == 8 else np.stack([data & 15, data >> 4], axis=1).reshape(-1)


def _counts(data: Symbols, width: int) -> _Array:
    counts = np.bincount(data, minlength=256)
    square = counts.reshape(16, 16)  # high half, low half
    return counts if width == 8 else square.sum(0) + square.sum(1)


def _table(data: Symbols, width: int) -> Symbols:
    """For each of the 16 or 256 symbols, the place of the nearest level."""
    counts = _counts(data, width)
    wanted = counts * (1 << PRECISION) / counts.sum()
    borders = np.sqrt(_LEVELS[1:-1] * _LEVELS[2:])
    return np.where(counts > 0, np.searchsorted(borders, wanted) + 1, 0).astype(np.uint8)


def _frequencies(table: Symbols) -> _Array:
    """Frequencies that add up to ``2**PRECISION``, at least 1 where a symbol is present."""
    if not table.any() or table.max() >= len(_LEVELS):
        raise damaged("coded bytes", "they have no table of frequencies")
    present = table > 0
    more = _LEVELS[table] - present
    if not more.any():
        more = present.astype(np.int64)
    room = (1 << PRECISION) - int(present.sum())
    ends = np.cumsum(more) * room // int(more.sum())
    return np.diff(ends, prepend=0) + present


def _size(data: Symbols, table: Symbols) -> float:
    """Coded bytes, about."""
    counts = _counts(data, 4 if len(table) == 16 else 8)
    bits = PRECISION - np.log2(np.maximum(_frequencies(table), 1))
    size = float(counts @ bits) / 8
    return size + size * 3 / LANE_BYTES + len(_packed_table(table)) + _HEAD.size + 3


def _packed_table(table: Symbols) -> bytes:
    """The table; of 256 levels their differences modulo 256, compressed."""
    if len(table) == 16:
        return table.tobytes()
    return compress(np.diff(table, prepend=np.uint8(0)).tobytes())


def _read_table(data: bytes, width: int) -> Symbols:
    if width == 8:
        return np.cumsum(np.frombuffer(decompress(data, 256), np.uint8), dtype=np.uint8)
    if len(data) != 16:
        raise damaged("coded bytes", "their table of frequencies has a wrong length")
    return np.frombuffer(data, np.uint8)


# --- lanes -------------------------------------------------------------------------------------


def _encoded(symbols: Symbols, frequencies: _Array, lanes: int) -> tuple[_Array, _Array]:
    """States at the end, which are where the reader begins, and the words that it needs."""
    steps = -(-len(symbols) // lanes)
    rows = np.full(steps * lanes, frequencies.argmax(), np.uint8)
    rows[: len(symbols)] = symbols
    starts = np.cumsum(frequencies) - frequencies
    states = np.full(lanes, LOWEST, np.int64)
    words = []
    for row in rows.reshape(steps, lanes)[::-1]:
        share = frequencies[row]
        full = np.flatnonzero(states >= share << (32 - PRECISION))
        words.append(states[full].astype("<u2"))
        states[full] >>= 16
        quotient, rest = np.divmod(states, share)
        states = (quotient << PRECISION) + rest + starts[row]
    return states.astype("<u4"), np.concatenate(words[::-1])


def _decoded(states: _Array, words: _Array, frequencies: _Array, count: int) -> Symbols:
    lanes = len(states)
    steps = -(-count // lanes)
    # One number per slot: symbol, place within the symbol's slots, frequency of the symbol.
    symbol = np.repeat(np.arange(len(frequencies)), frequencies)
    place = np.arange(1 << PRECISION) - (np.cumsum(frequencies) - frequencies)[symbol]
    slots = symbol << 32 | place << 16 | frequencies[symbol]
    state = states.astype(np.int64)
    slot, found = np.empty_like(state), np.empty_like(state)
    symbols = np.empty((steps, lanes), np.uint8)
    position = 0
    for row in symbols:
        np.bitwise_and(state, (1 << PRECISION) - 1, out=slot)
        np.take(slots, slot, out=found, mode="clip")
        np.right_shift(found, 32, out=row, casting="unsafe")
        np.right_shift(state, PRECISION, out=state)
        np.multiply(state, np.bitwise_and(found, 0xFFFF, out=slot), out=state)
        np.right_shift(found, 16, out=found)
        np.add(state, np.bitwise_and(found, 0xFFFF, out=found), out=state)
        low = np.flatnonzero(state < LOWEST)
        end = position + len(low)
        state[low] = state[low] << 16 | words[position:end]
        position = end
    if position != len(words) or bool((state != LOWEST).any()):
        raise damaged("coded bytes", "they do not end where they should")
    return symbols.reshape(-1)[:count]
