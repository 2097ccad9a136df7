"""Small files that ask for much: what cannot be there is refused before memory is used for it."""

import base64
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from coded import at_most, file_of, target
from forging import Parts
from rarefy.cli import app
from rarefy.errors import FormatError
from rarefy.storage import ans
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor, save
from rarefy.storage.frames import compress
from rarefy.storage.index import MAX_INDEX

LITTLE = 32 << 20
"""Bytes by which refusing a file may let the process grow."""

ZEROS = compress(bytes(300_000_000))
"""300 MB in some ten kilobytes."""


def weight(parts: Parts) -> str:
    """Path of the tensor that is attacked."""
    return next(p for p in parts.index["tensors"]["path"] if p.endswith("weight"))


def with_streams(*streams: bytes) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        row = parts.index["tensors"]["path"].index(weight(parts))
        kept = parts.streams[row]
        parts.streams[row] = [*streams, *kept[len(streams) :]]
        parts.fit()

    return change


def with_shape(*shape: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        row = parts.index["tensors"]["path"].index(weight(parts))
        parts.index["tensors"]["shape"][row] = list(shape)

    return change


def lanes(count: int) -> bytes:
    """A coded stream that says it has so many lanes."""
    head, table = struct.pack("<BIH", 8, count, 12), b"\x00" * 12
    return b"\x01" + head + table + b"\x00" * 64


FRAME = compress(bytes(1000))
BOMBS: dict[str, tuple[str, Callable[[Parts], None]]] = {
    "a mask that decompresses to more": ("sparse", with_streams(ZEROS)),
    "planes that decompress to more": ("planes", with_streams(ZEROS)),
    "codes that decompress to more": ("int4", with_streams(ZEROS)),
    "places that decompress to more": ("palette", with_streams(b"\x00" * 8, ZEROS)),
    "a frame that does not declare its length": (
        "planes", with_streams(b"\x28\xb5\x2f\xfd\x00\x58" + FRAME[6:]),
    ),
    "two frames": ("planes", with_streams(FRAME + FRAME)),
    "a shape of 200 MB": ("planes", with_shape(50_000_000)),
    "a shape of 2^40 elements": ("planes", with_shape(2**40)),
    "a shape of 2^47 in codes": ("int8", with_shape(2**47)),
    "a shape of 200 MB in a palette": ("palette", with_shape(50_000_000)),
    "a shape of 200 MB under a mask": ("sparse+palette", with_shape(50_000_000)),
    "a shape of 200 MB along a dimension": ("sparse1", with_shape(5000, 10_000, 1)),
    "a codebook of too many entries": ("palette", with_streams(b"\x01" * 1028)),
    "an empty codebook": ("palette", with_streams(b"")),
    "half an entry": ("palette", with_streams(b"\x01" * 7)),
    "four billion lanes": ("planes", with_streams(lanes(2**32 - 1))),
    "no lanes": ("planes", with_streams(lanes(0))),
    "part lengths beyond the stream": ("planes", with_streams(b"\x01" + b"\xff" * 33)),
    "part lengths that end too early": ("planes", with_streams(b"\x01\x00")),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_the_streams_do_not_hold_is_refused_at_once(name: str, tmp_path: Path) -> None:
    kind, change = BOMBS[name]
    path = tmp_path / "a.safetensors"
    parts = Parts.of(file_of(kind, "zstd", path))
    change(parts)
    path.write_bytes(parts.joined())
    into, attacked = target(kind), weight(parts)
    for read in (lambda: load(path, into), lambda: load_tensor(path, attacked)):
        with at_most(LITTLE, 3.0), pytest.raises(FormatError) as caught:
            read()
        assert str(path) in str(caught.value)


def test_few_lanes_that_would_take_long_are_refused() -> None:
    stream = ans.encode(np.zeros(1 << 22, np.uint8), 1 << 20)
    slow = stream[:1] + struct.pack("<I", 1) + stream[5:]
    with at_most(LITTLE, 1.0), pytest.raises(FormatError, match="in 1 lanes"):
        ans.decode(slow, 1 << 22)


class Wide(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(count))


@pytest.mark.slow
def test_as_much_as_a_file_may_hold_takes_a_few_times_that(tmp_path: Path) -> None:
    """256 MB of zeros in a file of a few kilobytes are allowed, and are the most that is."""
    count = 1 << 26
    path = save(Wide(count), tmp_path / "a.safetensors")
    assert path.stat().st_size < 1 << 17
    into = Wide(1)
    with at_most(4 * 4 * count, 30.0):
        assert load(path, into).weight.shape == (count,)
    parts = Parts.of(path.read_bytes())
    with_shape(count + (1 << 26))(parts)
    path.write_bytes(parts.joined())
    with at_most(LITTLE, 3.0), pytest.raises(FormatError, match=r"declares tensors of \d+ bytes"):
        load(path, into)


TABLES: dict[str, Callable[[], bytes]] = {
    "100 MB of zeros": lambda: compress(bytes(100_000_000)),
    "a million brackets": lambda: compress(b"[" * 1_000_000),
    "a million lists": lambda: compress(
        b'{"kind":"module","class_name":"","tensors":{"shape":[' + b"[]," * 300_000 + b"[]]}}\n"
    ),
    "a long number": lambda: compress(b'{"kind":' + b"9" * 900_000 + b"}\n"),
    "a graph of a million lists": lambda: compress(b'{"kind":"graph"}\n[' + b"[]," * 300_000),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_contents_stay_small(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    parts = Parts.of(file_of("planes", "zstd", path))
    path.write_bytes(parts.joined(lambda _: TABLES[name]()))
    with at_most(128 << 20, 5.0), pytest.raises(FormatError):
        load(path, target("planes"))
    with pytest.raises(FormatError):
        inspect(path)


@pytest.mark.slow
@pytest.mark.parametrize("repeated", [b"[],", b"0,", b"[0,0,0,0,0,0,0,0,0,0,0,0,0,0],"])
@pytest.mark.parametrize("where", ["table", "graph"])
def test_the_largest_tables_take_bounded_memory(
    where: str, repeated: bytes, tmp_path: Path
) -> None:
    """As much as a table may declare, with noise that makes it worth its compressed size."""
    noise = base64.b64encode(np.random.default_rng(0).bytes(60_000))
    many = repeated * ((MAX_INDEX - 100_000) // len(repeated)) + b"0]"
    head = b'{"kind":"graph","class_name":"","tensors":{"sizes":['
    if where == "table":
        table = compress(head + many + b"}}\n" + noise)
    else:
        table = compress(head + b']}}\n{"noise":"' + noise + b'","nodes":[' + many + b"}")
    path = tmp_path / "a.safetensors"
    parts = Parts.of(file_of("graph", "zstd", path))
    parts.header["__metadata__"]["rarefy"] = '{"version":1,"kind":"graph"}'
    path.write_bytes(parts.joined(lambda _: table))
    with at_most(1 << 29, 5.0), pytest.raises(FormatError):
        load(path)


def test_the_command_line_says_it_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    intact = file_of("planes", "zstd", path)
    parts = Parts.of(intact)
    with_shape(2**40)(parts)
    for data in (parts.joined(), intact[:-1], intact[:20], b"", b"\xff" * 100):
        path.write_bytes(data)
        found = CliRunner().invoke(app, ["inspect", str(path)])
        assert found.exit_code == 1
        assert "a.safetensors" in found.stderr
        assert "Traceback" not in found.output
