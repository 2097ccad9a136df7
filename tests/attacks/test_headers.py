"""Hostile headers of the safetensors container."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from forging import attempt, joined, small, split
from rarefy.errors import FormatError
from rarefy.storage.format import save


def header_attacks(header: dict[str, Any], body: bytes) -> dict[str, bytes]:
    first = next(name for name in header if name != "__metadata__")
    entry = header[first]
    start, end = entry["data_offsets"]
    text = json.dumps(header).encode()
    meta = json.loads(header["__metadata__"]["rarefy"])

    def with_entry(**changes: Any) -> bytes:
        return joined({**header, first: {**entry, **changes}}, body)

    def with_meta(**changes: Any) -> bytes:
        return joined({**header, "__metadata__": {"rarefy": json.dumps(meta | changes)}}, body)

    return {
        "entry twice": joined(b'{"' + first.encode() + b'":' + json.dumps(entry).encode() + b","
                              + text[1:], body),
        "overlap": with_entry(data_offsets=[0, end + 1]),
        "negative offset": with_entry(data_offsets=[-1, end]),
        "backwards": with_entry(data_offsets=[end, start]),
        "huge offset": with_entry(data_offsets=[0, 2**63]),
        "huge shape": with_entry(shape=[2**40, 2**40]),
        "wrong dtype": with_entry(dtype="I8"),
        "unknown dtype": with_entry(dtype="PICKLE"),
        "deep header": joined(b"[" * 100_000, body),
        "no header": joined(b"", body),
        "list header": joined(b"[]", body),
        "number header": joined(b"5", body),
        "huge header": struct.pack("<Q", 2**63) + text + body,
        "longer header": struct.pack("<Q", 90_000_000) + text + body,
        "metadata list": joined({**header, "__metadata__": {"rarefy": "[1]"}}, body),
        "metadata deep": joined({**header, "__metadata__": {"rarefy": "[" * 100_000}}, body),
        "metadata number": joined({**header, "__metadata__": {"rarefy": 5}}, body),
        "version 0": with_meta(version=0),
        "version true": with_meta(version=True),
        "version text": with_meta(version="1"),
        "version 2": with_meta(version=2),
        "no checksum": with_meta(crc32=None),
        "other kind": with_meta(kind="pickle"),
    }  # fmt: skip


@pytest.mark.parametrize("attack", header_attacks(
    {"__metadata__": {"rarefy": "{}"}, "a": {"data_offsets": [0, 1]}}, b""
))  # fmt: skip
def test_hostile_headers_are_refused(original: tuple[str, bytes, Path], attack: str) -> None:
    kind, intact, path = original
    header, body = split(intact)
    with pytest.raises(FormatError):
        attempt(kind, header_attacks(header, body)[attack], path)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    header, body = split(save(small(), tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(FormatError, match=r"version 2 of the format.*newer rarefy"):
        attempt("module", header_attacks(header, body)["version 2"], tmp_path / "b")


def test_an_entry_that_the_index_does_not_know_is_refused(tmp_path: Path) -> None:
    header, body = split(save(small(), tmp_path / "a.safetensors").read_bytes())
    end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    header["more"] = {"dtype": "U8", "shape": [1], "data_offsets": [end, end + 1]}
    with pytest.raises(FormatError, match="only in one"):
        attempt("module", joined(header, body + b"x"), tmp_path / "b")
