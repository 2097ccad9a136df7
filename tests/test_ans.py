"""The entropy coder against Shannon's bound, and against streams that it did not write."""

import contextlib
import math
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import FormatError
from rarefy.storage import ans


def drawn(seed: int, count: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    samples = {
        "one value": lambda: np.full(count, 7),
        "flat": lambda: rng.integers(0, 256, count),
        "bell": lambda: rng.normal(0, 9, count).round().astype(np.int64) & 255,
        "nibbles": lambda: rng.binomial(15, 0.3, count) | rng.binomial(15, 0.3, count) << 4,
        "rare": lambda: np.where(rng.random(count) < 0.001, rng.integers(0, 256, count), 3),
    }
    return samples[kind]().astype(np.uint8)


KINDS = ["one value", "flat", "bell", "nibbles", "rare"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_decoding_is_the_inverse(seed: int, count: int, kind: str) -> None:
    data = drawn(seed, count, kind)
    stream = ans.encode(data, 10**9)
    assert np.array_equal(ans.decode(stream, count), data)
    assert ans.encode(data, len(stream)) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_near_the_bound(kind: str) -> None:
    """The entropy of the bytes, by another way of counting, and little more."""
    data = drawn(0, 100_000, kind)
    _, counts = np.unique(data, return_counts=True)
    bound = float(-(counts * np.log2(counts / len(data))).sum()) / 8
    rare = len(counts) / 4096 * len(data) / 8 * math.log2(math.e)  # each has a share of 1 / 4096
    assert len(ans.encode(data, 10**9)) < 1.013 * bound + 250 + rare * (kind == "rare")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_means_the_same_everywhere(kind: str) -> None:
    """One lane, decoded symbol by symbol with whole numbers of any size."""
    data = drawn(1, 300, kind)
    stream = ans.encode(data, 10**9)
    width, lanes, length = struct.unpack_from("<BIH", stream)
    assert lanes == 1
    frequencies = ans._frequencies(ans._read_table(stream[7 : 7 + length], width)).tolist()
    assert sum(frequencies) == 4096
    state = int.from_bytes(stream[7 + length : 11 + length], "little")
    words = list(struct.iter_unpack("<H", stream[11 + length :]))[::-1]
    found = []
    for _ in range(300 * 8 // width):
        place, symbol = state % 4096, 0
        while place >= frequencies[symbol]:
            place -= frequencies[symbol]
            symbol += 1
        state = state // 4096 * frequencies[symbol] + place
        if state < 2**16:
            state = state * 2**16 + words.pop()[0]
        found.append(symbol)
    assert not words
    assert state == 2**16
    assert found == ans._symbols(data, width).tolist()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_changed_streams_are_refused_or_decoded(data: st.DataObject) -> None:
    content = drawn(0, 2000, data.draw(st.sampled_from(KINDS)))
    stream = bytearray(ans.encode(content, 10**9))
    for _ in range(data.draw(st.integers(0, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    changed = bytes(stream)[: data.draw(st.sampled_from([None, -1, -2, 20]))]
    with contextlib.suppress(FormatError):
        assert len(ans.decode(changed, 2000)) == 2000


@pytest.mark.parametrize("size", [0, 1, 1900, 2100, 10**12])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        ans.decode(ans.encode(drawn(0, 2000, "bell"), 10**9), size)


@pytest.mark.parametrize("table", [bytes(16), b"\xff" * 16, bytes(15), b"\x01" * 256])
@pytest.mark.parametrize("width", [0, 4, 5, 8])
def test_impossible_tables_are_refused(table: bytes, width: int) -> None:
    stream = struct.pack("<BIH", width, 1, len(table)) + table + bytes(4)
    with pytest.raises(FormatError):
        ans.decode(stream, 100)


def test_a_short_stream_cannot_ask_for_much_time_or_memory() -> None:
    """Symbols that cost nothing: their number is bounded by the lanes, which cost bytes."""
    table = bytes([*[0] * 15, 40])
    bomb = struct.pack("<BIH", 4, 4, 16) + table + struct.pack("<I", 1 << 16) * 4
    with pytest.raises(FormatError, match="symbols in 4 lanes"):
        ans.decode(bomb, 1 << 28)
    allowed = 4 * ans.MAX_STEPS // 2
    tracemalloc.start()
    begin = time.process_time()
    assert (ans.decode(bomb, allowed) == 255).all()
    assert time.process_time() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 4 * allowed + 1_000_000
    tracemalloc.stop()
