"""The folder of a run: claimed, continued and replaced without losing anything unasked."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from rarefy.errors import InputError, OutputError
from rarefy.run_folder import MANIFEST, RunFolder, StageFacts

FACTS = StageFacts(accuracy=0.9, params=7, macs=5, notes=("a note",), seconds=1.5)


def claim(path: Path, identity: str = "a", resume: bool = False, overwrite: bool = False):  # type: ignore[no-untyped-def]
    return RunFolder.claim(path, identity, resume=resume, overwrite=overwrite)


def with_stage(path: Path, stage: str = "teacher") -> RunFolder:
    folder: RunFolder = claim(path)
    for artifact in folder.artifacts(stage):
        artifact.write_bytes(stage.encode())
    folder.note(stage, FACTS)
    return folder


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = claim(tmp_path / "a" / "b")
    assert folder.complete("teacher") is None
    assert set(contents(folder.path)) == {MANIFEST}


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    with_stage(tmp_path)
    found = claim(tmp_path, resume=True).complete("teacher")
    assert found is not None
    assert found.model_copy(update={"files": {}}) == FACTS


def test_an_earlier_run_is_neither_overwritten_nor_changed(tmp_path: Path) -> None:
    with_stage(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"holds an earlier run.*--resume.*--overwrite"):
        claim(tmp_path)
    with pytest.raises(OutputError, match="another network, other options or another seed"):
        claim(tmp_path, identity="b", resume=True)
    with pytest.raises(InputError, match="not both"):
        claim(tmp_path, resume=True, overwrite=True)
    assert contents(tmp_path) == before


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    with_stage(tmp_path, "quantized")
    (tmp_path / "report.html").write_text("earlier")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.onnx").write_text("mine")
    folder = claim(tmp_path, identity="b", overwrite=True)
    assert set(contents(tmp_path)) == {MANIFEST, "notes.txt", "other.onnx"}
    assert folder.complete("quantized") is None


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.onnx").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="not empty and holds no run of rarefy"):
            claim(tmp_path, **options)
    assert contents(tmp_path) == {"teacher.onnx": b"mine"}


def test_resuming_where_nothing_was_begun_begins(tmp_path: Path) -> None:
    assert claim(tmp_path / "new", resume=True).complete("teacher") is None


def test_drafts_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    names = [".teacher.onnx.0a1b2c3d.tmp", ".run.json.9f8e7d6c.tmp", ".report.html.00112233.tmp"]
    for name in names:
        (tmp_path / name).touch()
    claim(tmp_path)
    assert set(contents(tmp_path)) == {MANIFEST}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\udc80",
        '{"identity": "a"}',
        '{"identity": "a", "stages": []}',
        '{"identity": "a", "stages": {"teacher": {}}}',
        '{"identity": "a", "stages": {}, "more": 1}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_named_and_can_be_replaced(tmp_path: Path, text: str) -> None:
    with_stage(tmp_path)
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match=r"run\.json: the manifest .* damaged .*--overwrite"):
        claim(tmp_path, resume=True)
    claim(tmp_path, overwrite=True)
    assert set(contents(tmp_path)) == {MANIFEST}


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.onnx"])
@pytest.mark.parametrize(
    ("content", "state"),
    [
        (None, "is missing"),
        (b"", "is not what"),
        (b"teache", "is not what"),
        (b"Teacher", "is not"),
    ],
)
def test_a_changed_artifact_is_named(
    tmp_path: Path, name: str, content: bytes | None, state: str
) -> None:
    with_stage(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError) as caught:
        claim(tmp_path, resume=True).complete("teacher")
    assert name in str(caught.value)
    assert state in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"cannot be written.*--out"):
            claim(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        claim(tmp_path)


def test_a_full_disk_leaves_the_manifest_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_stage(tmp_path)
    before = contents(tmp_path)
    for artifact in folder.artifacts("pruned"):
        artifact.write_bytes(b"pruned")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(OutputError, match="No space left"):
                folder.note("pruned", FACTS)
        assert (tmp_path / MANIFEST).read_bytes() == before[MANIFEST]
        assert not list(tmp_path.glob(".*"))
    assert json.loads(before[MANIFEST])["stages"].keys() == {"teacher"}
