"""The manifest: refused when damaged or foreign, and what it says of a mismatch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from rarefy.distillation.soft_labels import manifest as manifests
from rarefy.distillation.soft_labels.manifest import DataFacts, Manifest, Teacher, differences
from rarefy.errors import FormatError, InputError


def example(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "teacher": Teacher(class_name="Net", fingerprint="a" * 64),
        "data": DataFacts(ids="dataset", samples=9, inputs={"0": "1", "8": "2"}, transform=""),
        "views": 1,
        "kind": "top-k",
        "options": {"k": 2},
        "request": "mass=0.99, temperature=4.0",
        "kept_mass": 0.995,
        "shape": (4,),
        "dim": -1,
        "dtype": "float32",
        "seed": 0,
        "salt": 3,
        "shard_rows": 9,
        "versions": manifests.versions(),
    }
    return Manifest.model_validate({**values, **changes})


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert manifests.save(example(), tmp_path) == example()
    assert manifests.load(tmp_path) == example()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_of_several_writers_one_wins(tmp_path: Path) -> None:
    manifests.save(example(salt=1), tmp_path)
    assert manifests.save(example(salt=2), tmp_path).salt == 1
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write_soft_labels"):
        manifests.load(tmp_path)


def test_every_byte_counts(tmp_path: Path) -> None:
    manifests.save(example(), tmp_path)
    path = tmp_path / manifests.NAME
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x15
        path.write_bytes(damaged)
        with suppress(FormatError):
            assert manifests.load(tmp_path) == example()  # the change was of white space
    for size in range(0, len(content) - 2, 37):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError):
            manifests.load(tmp_path)


HOSTILE = {
    "an unknown key": {"extra": 1},
    "another version": {"version": 2},
    "an unknown form": {"kind": "pickle"},
    "options of no form": {"options": {"q": 2}},
    "k above the classes": {"options": {"k": 5}},
    "no rows": {"shard_rows": 0},
    "huge rows": {"shard_rows": 2**60},
    "huge views": {"views": 2**31 + 1},
    "too many rows": {"views": 2**31, "data": {"samples": 2**47}},
    "a huge shape": {"shape": [2**20, 2**20]},
    "a negative shape": {"shape": [-4]},
    "no such dimension": {"dim": 3},
    "no dimension": {"dim": 0},
    "text for a number": {"views": "1"},
    "a wrong salt": {"salt": -1},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    body = example().model_dump(mode="json")
    for key, value in change.items():
        body[key] = {**body[key], **value} if isinstance(value, dict) and key == "data" else value
    text = json.dumps({"sha256": manifests._digest(body), "manifest": body})
    (tmp_path / manifests.NAME).write_text(text)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        manifests.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100000, '{"manifest": {}}', "\0"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / manifests.NAME).write_text(text)
    with pytest.raises(FormatError):
        manifests.load(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / manifests.NAME).open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(FormatError, match="larger"):
        manifests.load(tmp_path)


OTHERS = {
    "teacher": {"teacher": Teacher(class_name="Net", fingerprint="b" * 64)},
    "views": {"views": 2},
    "seed": {"seed": 1},
    "form": {"request": "TopK(k=3)"},
    "shape of the outputs": {"shape": (5,)},
    "dimension of the classes": {"dim": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_mismatch_is_named_with_both_sides(name: str) -> None:
    ((what, remedy),) = differences(example(), example(**OTHERS[name]))
    assert what.startswith(f"{name}: the store has ")
    assert ", this is " in what
    assert remedy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 8}, "number of examples: the store has 9, this is 8"),
        ({"inputs": {"0": "2", "8": "1"}}, "in another order at 2 of these ids"),
        ({"inputs": {"0": "1", "8": "5"}}, "other inputs at 1 of these ids (8)"),
        ({"transform": "Replay(Flip())"}, "transform: the store has none, this is Replay(Flip())"),
        ({"ids": "position"}, "ids: the store has dataset, this is position"),
    ],
)
def test_other_data_are_named(change: dict[str, object], words: str) -> None:
    other = example().data.model_copy(update=change)
    ((what, _),) = differences(example(), example(data=other))
    assert words in what


def test_versions_alone_are_no_mismatch() -> None:
    assert not differences(example(), example(versions={"torch": "1.0"}, salt=9, kept_mass=0.5))


def test_it_describes_itself() -> None:
    text = str(example())
    for word in ("Net", "top-k (k=2)", "99.50% of the mass", "9, 1 view"):
        assert word in text
