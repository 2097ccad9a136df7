"""Shards: files of records that are appended to under another name until they are complete.

A shard is written by one process, in the order of its records, as ``<name>.part``. When it is
complete and on the disk it gets its name. Every record proves itself by its checksum, so that a
part needs no marks: what a killed writer left is read up to the first record that is not whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rarefy.distillation.soft_labels.records import Array, Layout, checksums
from rarefy.errors import FormatError, OutputError
from rarefy.files import settle

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two writers of a shard are not noticed
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Shard:
    """The place of some consecutive records.

    Args:
        folder: of the store.
        index: number of the shard.
        start, stop: its first row, and the one after its last.
    """

    folder: Path
    index: int
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """The file when it is complete."""
        return self.folder / f"shard-{self.index:05d}.records"

    @property
    def part(self) -> Path:
        """The file while it is written."""
        return self.path.with_suffix(".part")

    @property
    def complete(self) -> bool:
        """Whether every record was written."""
        return self.path.is_file()


def shards_of(folder: Path, rows: int, each: int) -> Iterator[Shard]:
    """All shards of a store of so many rows, the last of which may be shorter."""
    for index, start in enumerate(range(0, rows, each)):
        yield Shard(folder, index, start, min(start + each, rows))


def held_bytes(folder: Path) -> int:
    """Size of all shards, complete or not; others may be at work on them."""
    found = 0
    for file in folder.glob("shard-*.*"):
        with suppress(FileNotFoundError):  # just got its name
            found += file.stat().st_size
    return found


class Appending:
    """A shard that is being written.

    Args:
        shard: its place.
        file: its part, open at the end of what is whole.
        row: the next row to append.
    """

    def __init__(self, shard: Shard, file: BinaryIO, row: int) -> None:
        self.shard, self.file, self.row = shard, file, row

    def append(self, records: Array) -> None:
        """Add records; the shard gets its name with the last one.

        Raises:
            OutputError: the disk is full, or fails; what was written before stays good.
        """
        try:
            write_all(self.file, records.tobytes())
            self.row += len(records)
            if self.row == self.shard.stop:
                settle(self.shard.part, self.shard.path)
        except OSError as error:
            raise OutputError(
                str(self.shard.part),
                f"the records cannot be written ({error.strerror or error})",
                "Free space, then call write_soft_labels again: it continues where it was",
            ) from error


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write to an unbuffered file until nothing is left, or an error says why."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


@contextmanager
def appending(shard: Shard, layout: Layout, salt: int) -> Iterator[Appending]:
    """Open a shard to be continued after its last whole record; others are kept out meanwhile.

    Raises:
        OutputError: another process writes it, or it cannot be opened.
    """
    try:
        file = shard.part.open("a+b", buffering=0)
    except OSError as error:
        raise OutputError(
            str(shard.part), f"it cannot be opened ({error})", "Check the rights of the folder"
        ) from error
    with file:
        _lock(file, shard)
        row = shard.start + _whole(file, shard, layout, salt)
        file.truncate((row - shard.start) * layout.dtype.itemsize)
        writer = Appending(shard, file, row)
        if row == shard.stop:  # killed after its last record, before it got its name
            writer.append(np.zeros(0, layout.dtype))
        yield writer


def begun(shard: Shard, layout: Layout, salt: int) -> int:
    """The row after the last whole record of a shard's part; its first row where there is none."""
    try:
        with shard.part.open("rb") as file:
            return shard.start + _whole(file, shard, layout, salt)
    except FileNotFoundError:
        return shard.start


def _lock(file: BinaryIO, shard: Shard) -> None:
    """Keep others out; the lock ends with the process, however that ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            str(shard.part),
            "another process is writing it",
            "Wait for it, or give every process its own share: ranks=(rank, number of ranks)",
        ) from error
    except OSError:  # the file system has no locks
        return


def _whole(file: BinaryIO, shard: Shard, layout: Layout, salt: int) -> int:
    """How many records at the beginning of a part are whole."""
    size = layout.dtype.itemsize
    file.seek(0)
    content = file.read((shard.stop - shard.start) * size)
    records = np.frombuffer(content, layout.dtype, count=len(content) // size)
    rows = np.arange(shard.start, shard.start + len(records))
    good = checksums(records, rows, salt) == records["checksum"]
    return len(records) if good.all() else int(good.argmin())


def opened(shard: Shard, layout: Layout) -> Array:
    """The records of a complete shard as a memory map.

    Raises:
        FormatError: the file is missing, or of another size.
    """
    expected = (shard.stop - shard.start) * layout.dtype.itemsize
    found = -1
    with suppress(OSError):
        found = os.stat(shard.path).st_size  # noqa: PTH116 - one call for both questions
    if found != expected:
        raise FormatError(
            str(shard.path),
            f"it has {found} bytes, not {expected}" if found >= 0 else "there is no such file",
            "Delete it and call write_soft_labels again: it is written anew",
        )
    try:
        return np.memmap(shard.path, layout.dtype, mode="r")
    except (OSError, ValueError) as error:
        raise FormatError(
            str(shard.path), f"it cannot be read ({error})", "Check its rights and the disk"
        ) from error
