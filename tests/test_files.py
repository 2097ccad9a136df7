"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from rarefy.files import replacing
from rarefy.run_folder import OWN, RunFolder


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as draft:
        draft.write_text("new")
        assert draft.parent == tmp_path
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "file") as draft:
        draft.write_text("new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="rights of POSIX")
def test_rights_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "file"
    with replacing(path) as draft:
        draft.write_text("new")
        draft.chmod(0o600)
    assert path.stat().st_mode & 0o777 == umask


def test_drafts_of_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_must_be_new_takes_nobodys_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "other"):
        with (
            nullcontext() if text == "one" else pytest.raises(FileExistsError),
            replacing(path, replace=False) as draft,
        ):
            draft.write_text(text)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(target)
    with replacing(link) as draft:
        draft.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("name", OWN)
def test_a_run_knows_the_drafts_of_its_files(tmp_path: Path, name: str) -> None:
    with replacing(tmp_path / name) as draft:
        draft.write_text("half")
        assert list(RunFolder(tmp_path, "identity")._drafts()) == [draft]
