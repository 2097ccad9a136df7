"""Streams of bytes: what is read is what was written, in the smallest form that is allowed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import FormatError, InputError
from rarefy.storage import streams
from rarefy.storage.frames import compress, decompress

ZSTD = b"\x28\xb5\x2f\xfd"


@given(st.binary(max_size=300), st.sampled_from([1, 2, 4]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_is_read_was_written(content: bytes, parts: int, use_ans: bool) -> None:
    data = np.frombuffer(content[: len(content) // parts * parts], np.uint8)
    stream = streams.write(data, parts, use_ans=use_ans)
    assert np.array_equal(streams.read(stream, len(data), parts), data)
    assert len(stream) <= len(data)


def test_each_form_is_taken_where_it_is_smallest() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 8192).astype(np.uint8)
    skewed = rng.binomial(7, 0.2, 8192).astype(np.uint8)
    assert streams.write(noise, use_ans=True) == noise.tobytes()
    assert streams.write(skewed).startswith(ZSTD)
    assert streams.write(skewed, use_ans=True).startswith(b"\x01")
    assert streams.write(np.tile(noise[:500], 16), use_ans=True).startswith(ZSTD)
    planes = np.concatenate([noise, skewed])
    stream = streams.write(planes, 2, use_ans=True)
    assert noise.tobytes() in stream
    assert len(stream) < len(noise) + len(streams.write(skewed, use_ans=True)) + 20


@pytest.mark.parametrize("use_ans", [False, True])
@pytest.mark.parametrize("damage", ["cut", "longer", "other size", "empty"])
def test_other_streams_are_refused(use_ans: bool, damage: str) -> None:
    data = np.random.default_rng(0).binomial(7, 0.2, 8192).astype(np.uint8)
    stream, size = streams.write(data, 4, use_ans=use_ans), len(data)
    changed = {"cut": stream[:-1], "longer": stream + b"x", "empty": b""}.get(damage, stream)
    with pytest.raises(FormatError):
        streams.read(changed, size - 4 * (damage == "other size"), 4)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_codes_share_bytes(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([1, 2, 4, 8]))
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), np.uint8)
    joined = streams.join(codes, bits)
    assert len(joined) == streams.length(len(codes), bits) == -(-len(codes) * bits // 8)
    assert np.array_equal(streams.split(joined, len(codes), bits), codes)
    whole = int.from_bytes(joined.tobytes(), "little")
    assert [whole >> bits * i & 2**bits - 1 for i in range(len(codes))] == codes.tolist()


def test_a_code_that_is_too_high_is_refused() -> None:
    with pytest.raises(InputError, match="not below 4"):
        streams.join(np.array([4], np.uint8), 2)


@pytest.mark.parametrize("size", [0, 9, 11, 10**15])
def test_a_frame_of_another_length_is_refused(size: int) -> None:
    assert decompress(compress(bytes(10)), 10) == bytes(10)
    with pytest.raises(FormatError, match="declared"):
        decompress(compress(bytes(10)), size)
