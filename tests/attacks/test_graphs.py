"""Graphs that would do more than compute."""

from pathlib import Path
from typing import Any

import pytest

from forging import attempt, graph, rewritten
from rarefy.errors import FormatError
from rarefy.storage.format import save


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
