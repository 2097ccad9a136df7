"""Shards that are appended to, cut at any byte, and continued."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.distillation.soft_labels import shards
from rarefy.distillation.soft_labels.records import Array, Dense, Layout
from rarefy.distillation.soft_labels.shards import Shard, appending, begun, opened, shards_of
from rarefy.errors import FormatError, OutputError

LAYOUT, SALT = Layout(Dense(), (5,)), 77
SIZE = LAYOUT.dtype.itemsize


def packed(start: int, stop: int) -> Array:
    values = torch.arange(start, stop)[:, None] * torch.ones(5) + torch.arange(5)
    rows = np.arange(start, stop)
    return LAYOUT.pack(values, rows, rows.astype(np.uint32), 0, SALT)


def test_a_shard_gets_its_name_with_its_last_record(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 3, 20, 30)
    with appending(shard, LAYOUT, SALT) as writer:
        writer.append(packed(20, 26))
        assert not shard.complete
        writer.append(packed(26, 30))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00003.records"]
    assert (opened(shard, LAYOUT) == packed(20, 30)).all()


@given(st.integers(0, 9 * SIZE), st.binary(max_size=2 * SIZE))
@settings(max_examples=40, deadline=None)
def test_a_part_is_continued_after_its_last_whole_record(tmp_path_factory, cut, noise) -> None:
    folder = tmp_path_factory.mktemp("store")
    shard = Shard(folder, 0, 0, 9)
    shard.part.write_bytes(packed(0, 9).tobytes()[:cut] + noise)
    whole = cut // SIZE
    row = begun(shard, LAYOUT, SALT)
    assert row == whole or (row > whole and shard.part.read_bytes()[: row * SIZE])
    with appending(shard, LAYOUT, SALT) as writer:
        assert writer.row == row
        if row < 9:
            writer.append(packed(row, 9))
    assert (opened(shard, LAYOUT) == packed(0, 9)).all()


def test_records_of_another_place_or_store_are_not_continued(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 0, 0, 9)
    shard.part.write_bytes(packed(1, 5).tobytes())
    assert begun(shard, LAYOUT, SALT) == 0
    shard.part.write_bytes(packed(0, 5).tobytes())
    assert begun(shard, LAYOUT, SALT) == 5
    assert begun(shard, LAYOUT, SALT + 1) == 0


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    shard = Shard(tmp_path, 0, 0, 9)
    with (
        appending(shard, LAYOUT, SALT) as writer,
        pytest.raises(OutputError, match="another process"),
        appending(shard, LAYOUT, SALT),
    ):
        pass
    writer.file.close()
    with appending(shard, LAYOUT, SALT):
        pass


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch) -> None:
    shard = Shard(tmp_path, 0, 0, 9)
    real = shards.write_all

    def full(file, content: bytes) -> None:
        real(file, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with appending(shard, LAYOUT, SALT) as writer:
        writer.append(packed(0, 4))
        monkeypatch.setattr(shards, "write_all", full)
        with pytest.raises(OutputError, match=r"No space left.*continues"):
            writer.append(packed(4, 9))
    monkeypatch.setattr(shards, "write_all", real)
    assert 4 <= begun(shard, LAYOUT, SALT) < 9
    with appending(shard, LAYOUT, SALT) as writer:
        writer.append(packed(writer.row, 9))
    assert (opened(shard, LAYOUT) == packed(0, 9)).all()


def test_short_writes_go_on() -> None:
    class Slow:
        content = b""

        def write(self, view: memoryview) -> int:
            self.content += bytes(view[:3])
            return min(3, len(view))

    file = Slow()
    shards.write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.content == b"0123456789"


@pytest.mark.parametrize("change", [None, -1, 1, -SIZE])
def test_a_shard_of_another_size_is_refused(tmp_path: Path, change: int | None) -> None:
    shard = Shard(tmp_path, 0, 0, 9)
    if change is not None:
        shard.path.write_bytes(b"x" * (9 * SIZE + change))
    with pytest.raises(FormatError, match=r"shard-00000\.records"):
        opened(shard, LAYOUT)


@given(st.integers(1, 100), st.integers(1, 120))
def test_shards_cover_every_row_once(rows: int, each: int) -> None:
    found = list(shards_of(Path(), rows, each))
    assert [row for s in found for row in range(s.start, s.stop)] == list(range(rows))
    assert [s.index for s in found] == list(range(len(found)))
