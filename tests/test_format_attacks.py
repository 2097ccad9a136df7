"""Files that are damaged or hostile: each is refused with a FormatError, fast, in little memory."""

import contextlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import FormatError
from rarefy.graph.program import Graph, GraphModel, Node, Ref, Spec
from rarefy.storage.format import inspect, load, load_tensor, save
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


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, bytes, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    path = save(MODELS[request.param](), folder / "a.safetensors")
    return request.param, path.read_bytes(), folder / "attacked.safetensors"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def rewritten(
    data: bytes,
    change: Callable[[dict[str, Any]], Any] = lambda index: None,
    graph: Callable[[str], str] = lambda text: text,
    raw: Callable[[bytes], bytes] = lambda table: table,
) -> bytes:
    """The file with another table of contents, under a valid checksum."""
    header, body = split(data)
    parts = {
        name: body[slice(*entry["data_offsets"])]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    table = parts["rarefy.index"]
    text, _, stored = (
        decompress(table, zstandard.frame_content_size(table)).decode().partition("\n")
    )
    index = json.loads(text)
    change(index)
    parts["rarefy.index"] = raw(compress(f"{json.dumps(index)}\n{graph(stored)}".encode()))
    head = json.loads(header["__metadata__"]["rarefy"])
    head["crc32"] = f"{zlib.crc32(parts['rarefy.index']):08x}"
    new: dict[str, Any] = {"__metadata__": {"rarefy": json.dumps(head)}}
    end = 0
    for name in sorted(parts, key=lambda n: header[n]["data_offsets"]):
        shape = [len(parts[name])] if name == "rarefy.index" else header[name]["shape"]
        new[name] = {**header[name], "shape": shape, "data_offsets": [end, end + len(parts[name])]}
        end += len(parts[name])
    return joined(new, b"".join(parts[n] for n in new if n != "__metadata__"))


def attempt(kind: str, data: bytes, path: Path) -> nn.Module:
    path.write_bytes(data)
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


@given(data=st.data())
@settings(max_examples=150, deadline=None)
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
@settings(max_examples=60, deadline=None)
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


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_table_of_contents_of_any_values_is_refused_or_understood(
    original: tuple[str, bytes, Path], data: st.DataObject
) -> None:
    """Beyond checksums: a writer who means harm, changing one value anywhere."""
    kind, intact, path = original
    strange = st.sampled_from(
        [
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**47,
            2**80,
            0.5,
            "",
            "x",
            "__class__",
            "weight",
            [],
            {},
            [1],
        ]
    )

    def change(index: dict[str, Any]) -> None:
        place: Any = index
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or data.draw(st.integers(0, 5)) == 0:
                place[key] = data.draw(strange)
                return
            place = place[key]

    with contextlib.suppress(FormatError):
        attempt(kind, rewritten(intact, change), path)


def column(name: str, value: Any, place: int = 0) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"][name].__setitem__(place, value)


INDEX_ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bomb": column("shape", [2**40]),
    "overflow": column("shape", [2**47, 2**47]),
    "zero hides a huge size": column("shape", [0, 2**47, 2**47]),
    "negative size": column("shape", [-3, -4]),
    "fraction": column("shape", [1.5]),
    "many dimensions": column("shape", [1] * 1000),
    "other shape": column("shape", [3, 3]),
    "negative bytes": column("sizes", [-1]),
    "too many bytes": column("sizes", [2**40]),
    "too many streams": column("sizes", [1, 1, 1]),
    "wider dtype": column("dtype", "float64"),
    "dtype of the same width": column("dtype", "object"),
    "dtype no text": column("dtype", 5),
    "unknown codec": column("codec", "pickle"),
    "unknown flags": column("flags", "zz"),
    "gradient of an integer": lambda i: (column("dtype", "int32")(i), column("flags", "pg")(i)),
    "wrong checksum": column("crc32", "00000000"),
    "path twice": lambda i: column("path", i["tensors"]["path"][1])(i),
    "path of a method": column("path", "forward"),
    "path of internals": column("path", "_modules"),
    "dunder path": column("path", "__class__"),
    "path into a tensor": lambda i: column("path", i["tensors"]["path"][1] + ".x")(i),
    "empty path": column("path", ""),
    "dots": column("path", "a..b"),
    "path of the index": lambda i: (column("path", "rarefy.index")(i), column("flags", "e")(i)),
    "columns of unequal length": lambda i: i["tensors"]["path"].append("more"),
    "columns missing": lambda i: i["tensors"].pop("crc32"),
    "alias of nothing": lambda i: i.update(aliases={"a": "nothing"}),
    "alias over a tensor": lambda i: i.update(
        aliases={i["tensors"]["path"][0]: i["tensors"]["path"][1]}
    ),
    "grid of nothing": lambda i: i.update(
        grids={"nothing": {"scale": 1.0, "zero_point": 0, "axis": 0, "low": 0, "high": 255}}
    ),
    "grid on itself": lambda i: i.update(
        grids={
            i["tensors"]["path"][0]: {
                "scale": i["tensors"]["path"][0],
                "zero_point": 0,
                "axis": 0,
                "low": 0,
                "high": 255,
            }
        }
    ),
    "grid without range": lambda i: i.update(
        grids={
            i["tensors"]["path"][0]: {
                "scale": 1.0,
                "zero_point": 0,
                "axis": 63,
                "low": 0,
                "high": 30000,
            }
        }
    ),
    "other kind": lambda i: i.update(kind="pickle"),
    "kind of the other": lambda i: i.update(kind={"graph": "module"}.get(i["kind"], "graph")),
    "more keys": lambda i: i.update(code="import os"),
    "no class": lambda i: i.pop("class_name"),
}


@pytest.mark.parametrize("attack", INDEX_ATTACKS)
def test_impossible_tables_of_contents_are_refused(
    original: tuple[str, bytes, Path], attack: str
) -> None:
    kind, intact, path = original
    with pytest.raises(FormatError):
        attempt(kind, rewritten(intact, INDEX_ATTACKS[attack]), path)


@pytest.mark.parametrize(
    "settings",
    [
        {"0": {"forward": 1}},
        {"0": {"training": 1}},
        {"0": {"__class__": 1}},
        {"0": {"_modules": 1}},
        {"0": {"weight": 1}},
        {"0": {"nothing": 1}},
        {"0": {"weight.requires_grad": 1}},
        {"0": {"__class__.in_features": 1}},
        {"0": {"_parameters.weight": 1}},
        {"0": {"bias.data.x": 1}},
        {"0": {"in_features": -1}},
        {"0": {"in_features": 2**31}},
        {"0": {"in_features": True}},
        {"0": {"in_features": 2.0}},
        {"0": {"in_features": "2"}},
        {"0": {"in_features": [2]}},
        {"0": {"in_features": None}},
        {"9": {"in_features": 2}},
        {"__class__": {"in_features": 2}},
        {"0": 5},
        [],
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["attributes", "custom"])
def test_attributes_that_no_file_may_set_are_refused(
    tmp_path: Path, key: str, settings: Any
) -> None:
    intact = save(small(), tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(FormatError):
        attempt("module", rewritten(intact, lambda i: i.update({key: settings})), tmp_path / "b")


@pytest.mark.parametrize(
    "stubs",
    [
        {"": {"gives": "zeros"}},
        {"9": {"gives": "zeros"}},
        {"1.weight": {"gives": "zeros"}},
        {"forward": {"gives": "zeros"}},
        {"__class__": {"gives": "input"}},
        {"_modules.1": {"gives": "input"}},
        {"1": {"gives": "ones"}},
        {"1": {"gives": "__class__"}},
        {"1": {"gives": None}},
        {"1": {}},
        {"1": "zeros"},
        {"1": {"gives": "zeros", "outputs": -1}},
        {"1": {"gives": "zeros", "outputs": 65}},
        {"1": {"gives": "zeros", "outputs": True}},
        {"1": {"gives": "zeros", "outputs": 2.0}},
        {"1": {"gives": "zeros", "more": 1}},
        {"1": {"gives": "zeros"}},  # the file has tensors for it
        {"1": {"gives": "zeros"}, "1.0": {"gives": "zeros"}},
        [],
    ],
    ids=str,
)
def test_stubs_that_no_file_may_put_are_refused(tmp_path: Path, stubs: Any) -> None:
    intact = save(small(), tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(FormatError):
        attempt("module", rewritten(intact, lambda i: i.update({"stubs": stubs})), tmp_path / "b")


def test_a_stub_lies_within_no_other(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.ReLU()))

    intact = save(nested(), tmp_path / "a.safetensors").read_bytes()
    stub = {"gives": "input"}
    for paths, fits in ((["1"], True), (["1.0", "1.1"], True), (["1", "1.0"], False)):
        changed = rewritten(intact, lambda i, p=paths: i.update({"stubs": dict.fromkeys(p, stub)}))
        (tmp_path / "b").write_bytes(changed)
        if fits:
            assert load(tmp_path / "b", nested())(torch.ones(1, 4)).shape == (1, 3)
        else:
            with pytest.raises(FormatError, match="no such module to be left out"):
                load(tmp_path / "b", nested())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("aten.linear.default", "aten.from_file.default"),
        ("aten.linear.default", "aten.save.default"),
        ("aten.linear.default", "os.system"),
        ("aten.linear.default", "prims.relu.default"),
        ("aten.linear.default", "library.linear.default"),
        ('"tensor",["weight"]', '"tensor",["other"]'),
        ('"tensor",["weight"]', '"tensor",["forward"]'),
        ('{"r":1}', '{"r":-1}'),
        ("builtins.tuple", "collections.defaultdict"),
        ('"nodes":[', '"nodes":[['),
    ],
)
def test_hostile_graphs_are_refused(tmp_path: Path, old: str, new: str) -> None:
    intact = save(graph(), tmp_path / "a.safetensors").read_bytes()
    changed = rewritten(intact, graph=lambda text: text.replace(old, new))
    assert changed != intact
    with pytest.raises(FormatError):
        attempt("graph", changed, tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["_steps", "_in_spec", "graph", "train", "a.forward", "T_destination"]
)
def test_tensors_cannot_take_the_place_of_a_modules_own_names(tmp_path: Path, name: str) -> None:
    intact = save(graph(), tmp_path / "a.safetensors").read_bytes()

    def change(index: dict[str, Any]) -> None:
        index["tensors"]["path"] = [name if p == "weight" else p for p in index["tensors"]["path"]]
        index["grids"] = {name: index["grids"]["weight"]}

    changed = rewritten(intact, change, lambda text: text.replace('["weight"]', f'["{name}"]'))
    with pytest.raises(FormatError):
        attempt("graph", changed, tmp_path / "b")


@pytest.mark.parametrize(
    "raw",
    [
        lambda table: b"",
        lambda table: table[:-1],
        lambda table: table + b"more",
        lambda table: compress(bytes(100_000_000)),
        lambda table: compress(b"[" * 1_000_000),
        lambda table: compress(b"\xff\xfe"),
        lambda table: b"\x28\xb5\x2f\xfd" + b"\xff" * 40,
    ],
)
def test_tables_of_contents_that_cannot_be_read_are_refused(
    original: tuple[str, bytes, Path], raw: Callable[[bytes], bytes]
) -> None:
    kind, intact, path = original
    with pytest.raises(FormatError):
        attempt(kind, rewritten(intact, raw=raw), path)


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
