"""Files that were cut, lengthened or changed on their way."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forging import assert_refused_or_same, attempt
from rarefy.errors import FormatError
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_flipped_bytes_never_pass_unnoticed(
    original: tuple[str, bytes, Path], data: st.DataObject
) -> None:
    kind, intact, path = original
    changed = bytearray(intact)
    header = 8 + struct.unpack("<Q", intact[:8])[0]
    span = data.draw(st.sampled_from([header, len(intact)]))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, span - 1))] ^= data.draw(st.integers(1, 255))
    assert_refused_or_same(kind, bytes(changed), intact, path)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_truncated_and_extended_files_are_refused(
    original: tuple[str, bytes, Path], data: st.DataObject
) -> None:
    kind, intact, path = original
    length = data.draw(st.integers(0, len(intact) - 1))
    with pytest.raises(FormatError):
        attempt(kind, intact[:length], path)
    with pytest.raises(FormatError):
        attempt(kind, intact + data.draw(st.binary(min_size=1, max_size=9)), path)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    for read in (load, inspect, lambda p: load_tensor(p, "a")):
        with pytest.raises(FormatError):
            read(path)
