"""A safetensors file: written whole or not at all, read piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rarefy.errors import FormatError, OutputError
from rarefy.files import replacing
from rarefy.storage.frames import damaged
from rarefy.storage.streams import Bytes

ARCHIVE = b"PK\x03\x04"
"""What archives begin with, in which PyTorch writes programs and pickles."""

MAX_HEADER = 100_000_000
"""Longest header that safetensors reads."""


def write(path: Path, entries: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: either all of it is there, or the old file still is.

    Raises:
        OutputError: the place cannot be written; nothing is left behind.
    """
    target = path.resolve()
    if target.is_dir():
        raise OutputError(f"save({str(path)!r})", "it is a directory", "Name a file in it")
    if not target.parent.is_dir():
        raise OutputError(
            f"save({str(path)!r})", f"there is no directory {target.parent}", "Create it first"
        )
    try:
        with replacing(target) as draft:
            save_file(dict(entries), draft, dict(metadata))
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"save({str(path)!r})",
            f"it cannot be written ({error})",
            "Check the rights and the free space of the directory; what was there is unchanged",
        ) from error


class Reader:
    """An open safetensors file; all that can be wrong with it arises as a ``FormatError``.

    Args:
        path: the file.

    Raises:
        FormatError: it does not exist, is no file, or is no valid safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where = f"load({str(path)!r})"
        if not self.path.is_file():
            what = "it is not a file" if self.path.exists() else "there is no such file"
            raise FormatError(self.where, what, "Give the path of a file that save() wrote")
        with self._guard():
            self.size = self.path.stat().st_size
            self._check_header()
            file: Any = safe_open(self.path, framework="pt")
            self.metadata: Mapping[str, str] = file.metadata() or {}
            self.names: frozenset[str] = frozenset(file.keys())
            self._file = file

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                self.where,
                f"it is no valid safetensors file ({str(error)[:200]})",
                "The file is damaged or of another kind; get it again or save it anew",
            ) from error

    def _check_header(self) -> None:
        """Refuse what parsers read differently: a header that names an entry twice."""
        with self.path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if length > min(MAX_HEADER, self.size - 8):
                if first.startswith(ARCHIVE):
                    raise FormatError(
                        self.where,
                        "it is an archive, as torch.export and torch.save write",
                        "Load a .pt2 file with torch.export.load(path).module(); load() reads what "
                        "save() wrote",
                    )
                raise damaged(self.where, f"a header of {length} bytes does not fit the file")
            json.loads(file.read(length), object_pairs_hook=self._unique)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise damaged(self.where, "its header names an entry twice")
        return dict(pairs)

    def form(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, as safetensors names it, and shape of an entry."""
        with self._guard():
            view = self._file.get_slice(name)
            return str(view.get_dtype()), tuple(view.get_shape())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes of an entry, or of a part of an entry of bytes, in memory of their own."""
        with self._guard():
            if stop is None:
                tensor: Tensor = self._file.get_tensor(name)
            else:
                tensor = self._file.get_slice(name)[start:stop]
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            return flat.clone().numpy()
