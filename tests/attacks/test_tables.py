"""Tables of contents of a writer who means harm, under valid checksums."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from forging import attempt, rewritten, small
from rarefy.errors import FormatError
from rarefy.storage.format import load, save
from rarefy.storage.frames import compress


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
