"""What a file holds, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rarefy.storage.container import Reader
from rarefy.storage.index import VERSION, GridRecord, Record
from rarefy.storage.reading import open_file


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        path: of the parameter or buffer.
        shape: its shape.
        dtype: name of its dtype.
        encoding: of :data:`rarefy.storage.pack.CODECS`, the same after ``"int8+"`` or ``"int4+"``,
            or ``"same as <path>"``.
        bytes: its bytes in the file.
        bits_per_weight: of the file, for each element; 0 for tensors without elements.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Contents:
    """What a file holds; ``str()`` of it is a table.

    Attributes:
        kind: ``"module"`` or ``"graph"``.
        version: of the format.
        class_name: of the model that was saved.
        bytes: size of the file.
        tensors: its tensors, shared ones under each of their paths.
    """

    kind: str
    version: int
    class_name: str
    bytes: int
    tensors: tuple[Entry, ...]

    def __str__(self) -> str:
        stored = sum(entry.bytes for entry in self.tensors)
        head = ("tensor", "shape", "dtype", "encoding", "bytes", "bits/weight")
        rows = [head, *map(_row, self.tensors)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            f"{self.kind} of {self.class_name}, format {self.version}: {self.bytes:,} bytes, "
            f"{self.bytes - stored:,} of them structure"
        ]
        for row in rows:
            texts = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            texts += [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(texts).rstrip())
        return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "-"
    figures = (f"{entry.bytes:,}", f"{entry.bits_per_weight:.2f}")
    return (entry.path, shape, entry.dtype, entry.encoding, *figures)


def inspect(path: str | Path) -> Contents:
    """What a file holds, without reading its tensors.

    Raises:
        FormatError: the file is missing, damaged or of another kind.

    Example:
        >>> import rarefy, torch
        >>> inspect(rarefy.save(torch.nn.Linear(3, 2), "/tmp/linear.safetensors")).tensors[0].shape
        (2, 3)
    """
    with Reader(path) as reader:
        contents = open_file(reader)
        index, held = contents.index, contents.records
        found = [_entry(record, index.grids.get(name)) for name, record in held.items()]
        for alias, source in index.aliases.items():
            same = _entry(held[source], None)
            found.append(
                replace(
                    same, path=alias, encoding=f"same as {source}", bytes=0, bits_per_weight=0.0
                )
            )
        return Contents(index.kind, VERSION, index.class_name, reader.size, tuple(found))


def _entry(record: Record, grid: GridRecord | None) -> Entry:
    encoding = record.codec
    if grid is not None:
        encoding = f"{'int4' if grid.high - grid.low < 16 else 'int8'}+{encoding}"
    bits = 8 * record.stored / record.count if record.count else 0.0
    return Entry(record.path, record.shape, record.dtype, encoding, record.stored, bits)
