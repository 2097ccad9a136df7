"""Files of every codec, changed at any depth: refused, or read as something that fits the model.

A changed byte of a file is seen by its checksums. So that what lies behind them is reached,
mutations are made in the file, in the streams of a tensor, in what those hold compressed, and in
the table of contents, and sizes and checksums are made to fit afterwards.
"""

import contextlib
import json
import struct
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coded import KINDS, at_most, file_of, target
from forging import Parts, state
from rarefy.errors import FormatError
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor
from rarefy.storage.frames import compress, decompress

MEMORY = 48 << 20
"""Bytes by which reading a changed file of some kilobytes may let the process grow."""

SECONDS = 3.0
"""Time of the processor that it may take."""


def changed(data: bytes, draw: st.DataObject) -> bytes:
    """Bytes with one change: some replaced, cut out, put in, copied elsewhere, or the end lost."""
    at = draw.draw(st.integers(0, len(data)))
    size = draw.draw(st.integers(1, 16))
    kind = draw.draw(st.sampled_from(["flip", "set", "number", "cut", "put", "copy", "end"]))
    if kind == "flip" and at < len(data):
        flipped = data[at] ^ 1 << draw.draw(st.integers(0, 7))
        return data[:at] + bytes([flipped]) + data[at + 1 :]
    if kind == "number":
        number = draw.draw(st.sampled_from([0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**48, 2**63]))
        packed = struct.pack("<Q", number)[:size]
        return data[:at] + packed + data[at + len(packed) :]
    if kind == "cut":
        return data[:at] + data[at + size :]
    if kind == "end":
        return data[:at]
    given = draw.draw(st.binary(min_size=1, max_size=16))
    if kind == "copy":
        start = draw.draw(st.integers(0, len(data)))
        given = data[start : start + size]
    return data[:at] + given + data[at + (len(given) if kind == "set" else 0) :]


def in_file(data: bytes, draw: st.DataObject) -> bytes:
    return changed(data, draw)


def in_stream(data: bytes, draw: st.DataObject) -> bytes:
    """The bytes of a stream change, and what they decompress to stays or not."""
    parts = Parts.of(data)
    row = draw.draw(st.sampled_from([r for r in parts.streams if any(r)]))
    place = draw.draw(st.sampled_from([i for i, stream in enumerate(row) if stream]))
    row[place] = changed(row[place], draw)
    parts.fit()
    return parts.joined()


def in_content(data: bytes, draw: st.DataObject) -> bytes:
    """What a stream holds compressed changes."""
    parts = Parts.of(data)
    frames = [
        (row, i)
        for row in parts.streams
        for i, stream in enumerate(row)
        if stream.startswith(b"\x28\xb5\x2f\xfd")
    ]
    if not frames:
        return in_stream(data, draw)
    row, place = draw.draw(st.sampled_from(frames))
    content = decompress(row[place], zstandard.frame_content_size(row[place]))
    row[place] = compress(changed(content, draw))
    parts.fit()
    return parts.joined()


def in_table(data: bytes, draw: st.DataObject) -> bytes:
    """The text of the table of contents or of the graph changes."""
    parts = Parts.of(data)
    if parts.graph and draw.draw(st.booleans()):
        parts.graph = changed(parts.graph.encode(), draw).decode(errors="replace")
        return parts.joined()
    text = changed(json.dumps(parts.index).encode(), draw)
    graph = parts.graph.encode()
    return parts.joined(lambda _: compress(text + b"\n" + graph))


STRANGE = [None, True, -1, 0, 1, 3, 255, 2**16, 2**31, 2**40, 2**64, 0.5, "", "raw", "a.b", [], {}]


def in_value(data: bytes, draw: st.DataObject) -> bytes:
    """One value of the table changes: a length, a shape, a codec, a name."""
    parts = Parts.of(data)
    place = parts.index
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list):
            nearby = isinstance(place[key], int) and draw.draw(st.booleans())
            step = draw.draw(st.integers(-9, 9)) if nearby else 0
            place[key] = place[key] + step if nearby else draw.draw(st.sampled_from(STRANGE))
            break
        place = place[key]
    return parts.joined()


MUTATIONS = [in_file, in_stream, in_content, in_table, in_value]


def attack(kind: str, intact: bytes, path: Path, draw: st.DataObject) -> None:
    data = intact
    mutations = draw.draw(st.lists(st.sampled_from(MUTATIONS[1:]), max_size=2))
    try:
        for mutation in mutations:
            data = mutation(data, draw)
    except (FormatError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError):
        data = intact  # the second mutation could not take the file apart any more
    damaged = not mutations or draw.draw(st.booleans())
    before = data
    if damaged:
        data = in_file(data, draw)
    path.write_bytes(data)
    found = None
    with at_most(MEMORY, SECONDS):
        with contextlib.suppress(FormatError):
            found = load(path, target(kind))
        for read in (inspect, partial(load_tensor, name="weight")):
            with contextlib.suppress(FormatError):
                read(path)
    if found is not None and damaged and before == intact:
        path.write_bytes(intact)
        assert state(found) == state(load(path, target(kind)))


@pytest.fixture(scope="module", params=KINDS, ids=lambda pair: "-".join(pair))
def stored(request, tmp_path_factory):
    kind, entropy = request.param
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    return kind, file_of(kind, entropy, path), path


QUICK = settings(max_examples=12, deadline=None, derandomize=True, database=None)
LONG = settings(
    max_examples=120,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@given(draw=st.data())
@QUICK
def test_changed_files_are_refused_or_understood(stored, draw):
    kind, intact, path = stored
    attack(kind, intact, path, draw)


@pytest.mark.slow
@given(draw=st.data())
@LONG
def test_many_changed_files_are_refused_or_understood(stored, draw):
    kind, intact, path = stored
    attack(kind, intact, path, draw)
