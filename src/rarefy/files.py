"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 200
"""Characters of a file's name that the name of its draft keeps: systems allow 255 bytes."""


@contextmanager
def replacing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A draft next to ``path`` that takes its place at the end, or vanishes on an error.

    A reader finds the old file or the new one, also after a loss of power. The file has the rights
    that the umask says, whatever the writer gave to the draft.

    Args:
        path: the file to write; a link stays a link, and its target is replaced.
        replace: False for a file that must be new: of several writers one wins.

    Yields:
        An empty file to write to, named ``.<name>.<random>.tmp``.

    Raises:
        FileExistsError: without ``replace``, there is one.
        OSError: the file cannot be written; what was at ``path`` is unchanged.
    """
    target = path.resolve()
    draft = target.with_name(f".{target.name[:LONGEST]}.{secrets.token_hex(4)}.tmp")
    try:
        draft.touch(exist_ok=False)
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        settle(draft, target, replace=replace)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def settle(draft: Path, target: Path, *, replace: bool = True) -> None:
    """Give a complete draft its name, with everything in it on the disk first.

    Args:
        draft: a file in the folder of ``target``.
        target: its name; without ``replace`` one that is taken is an error.
        replace: whether it takes the place of what has that name.

    Raises:
        FileExistsError: the name is taken.
        OSError: the file cannot be moved.
    """
    _sync(draft)
    if replace:
        os.replace(draft, target)  # noqa: PTH105 - the name of the system call it must be
    else:
        os.link(draft, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a directory where the system allows that, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
