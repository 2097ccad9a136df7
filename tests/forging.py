"""Networks of each kind, their files, and files forged from them under valid checksums."""

import contextlib
import itertools
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import nn

from rarefy.errors import FormatError
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref, Spec
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor
from rarefy.storage.frames import compress, decompress

IN = '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", "context": "null", "children_spec": [{"type": null, "context": null, "children_spec": []}]}, {"type": "builtins.dict", "context": "[]", "children_spec": []}]}]'  # noqa: E501
OUT = '[1, {"type": null, "context": null, "children_spec": []}]'


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 70, bias=False), nn.Linear(70, 70))


def graph() -> GraphModel:
    weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    nodes = (
        Node("x", "input"),
        Node("w", "tensor", ("weight",), value=Spec((3, 4), torch.float32)),
        Node("s", "tensor", ("scale",)),
        Node("z", "tensor", ("zero",)),
        Node(
            "q",
            "aten.fake_quantize_per_channel_affine.default",
            (Ref("w"), Ref("s"), Ref("z"), 0, -128, 127),
        ),
        Node("y", "aten.linear.default", (Ref("x"), Ref("q"))),
        Node("output", "output", ([Ref("y")],)),
    )
    buffers = {"scale": torch.full((3,), 1 / 127), "zero": torch.zeros(3, dtype=torch.int32)}
    return GraphModel(Graph(nodes, IN, OUT), {"weight": weight}, buffers)


class Big(nn.Module):
    """With a tensor of each place: an own plain entry, an own entry of bytes, the packed one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("plain", torch.randint(-(2**31), 2**31, (5000,), generator=generator))
        self.plain = self.plain.to(torch.int32)
        self.weight = nn.Parameter(torch.randn(5000, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))


MODELS: dict[str, Callable[[], nn.Module]] = {"module": small, "graph": graph, "big": Big}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


@dataclass
class Parts:
    """A file taken apart; :meth:`joined` puts it together again, with sizes and checksums that fit.

    Attributes:
        header: of the container.
        index: the table of contents, without the graph.
        graph: the graph.
        streams: for each row of the table, its streams.
        entries: for each row, the entry that they are in.
    """

    header: dict[str, Any]
    index: dict[str, Any]
    graph: str
    streams: list[list[bytes]]
    entries: list[str]

    @classmethod
    def of(cls, data: bytes) -> "Parts":
        header, body = split(data)
        entries = {
            name: body[slice(*entry["data_offsets"])]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        table = entries["rarefy.index"]
        size = zstandard.frame_content_size(table)
        text, _, graph = decompress(table, size).decode().partition("\n")
        index = json.loads(text)
        columns = index["tensors"]
        streams, names = [], []
        used = dict.fromkeys(entries, 0)
        rows = zip(columns["path"], columns["flags"], columns["sizes"], strict=True)
        for path, flags, sizes in rows:
            name = path if "e" in flags else "rarefy.packed"
            ends = [used.get(name, 0) + end for end in itertools.accumulate(sizes, initial=0)]
            streams.append(
                [entries[name][a:b] if b > a else b"" for a, b in itertools.pairwise(ends)]
            )
            names.append(name)
            used[name] = ends[-1]
        return cls(header, index, graph, streams, names)

    def fit(self) -> None:
        """Let sizes and checksums of the table be those of the streams."""
        columns = self.index["tensors"]
        columns["sizes"] = [[len(stream) for stream in row] for row in self.streams]
        columns["crc32"] = [f"{zlib.crc32(b''.join(row)):08x}" for row in self.streams]

    def joined(self, raw: Callable[[bytes], bytes] = lambda table: table) -> bytes:
        """The file."""
        stored: dict[str, bytes] = {}
        for name, row in zip(self.entries, self.streams, strict=True):
            stored[name] = stored.get(name, b"") + b"".join(row)
        table = raw(compress(f"{json.dumps(self.index)}\n{self.graph}".encode()))
        stored = {name: content for name, content in stored.items() if content}
        stored["rarefy.index"] = table
        head = json.loads(self.header["__metadata__"]["rarefy"])
        head["crc32"] = f"{zlib.crc32(table):08x}"
        header: dict[str, Any] = {"__metadata__": {"rarefy": json.dumps(head)}}
        end = 0
        for name, content in stored.items():
            old = self.header.get(name, {"dtype": "U8"})
            shape = [len(content)] if old["dtype"] == "U8" else old["shape"]
            offsets = [end, end + len(content)]
            header[name] = {"dtype": old["dtype"], "shape": shape, "data_offsets": offsets}
            end += len(content)
        return joined(header, b"".join(stored.values()))


def rewritten(
    data: bytes,
    change: Callable[[dict[str, Any]], Any] = lambda index: None,
    graph: Callable[[str], str] = lambda text: text,
    raw: Callable[[bytes], bytes] = lambda table: table,
) -> bytes:
    """The file with another table of contents, under a valid checksum."""
    parts = Parts.of(data)
    change(parts.index)
    parts.graph = graph(parts.graph)
    return parts.joined(raw)


def attempt(kind: str, data: bytes, path: Path) -> nn.Module:
    """Give a file to every reader; what the one that reads all of it says counts."""
    path.write_bytes(data)
    for read in (inspect, partial(load_tensor, name="weight")):
        with contextlib.suppress(FormatError):
            read(path)
    return load(path, MODELS[kind]())


def state(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def assert_refused_or_same(kind: str, data: bytes, intact: bytes, path: Path) -> None:
    expected = state(attempt(kind, intact, path))
    try:
        found = attempt(kind, data, path)
    except FormatError:
        return
    assert state(found) == expected
