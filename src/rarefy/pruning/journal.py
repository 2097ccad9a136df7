"""Measurements of a sensitivity in a file of JSON lines, one appended after each evaluation.

The first line says what is measured. A process that is killed while it writes leaves half a line,
which the next one cuts off.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rarefy.errors import FormatError, OutputError
from rarefy.pruning.scoring.curves import Point, point

FORMAT = "rarefy.sensitivity/1"

BEGINNING = json.dumps({"format": FORMAT})[:-1].encode()
"""Of every journal."""


class Journal:
    """What was measured so far, in a file or, without a path, in memory.

    Args:
        path: the file; it is made where there is none, and continued where there is one.
        fingerprint: of the network and the options.

    Attributes:
        base: the metric of the whole network, once it is known.
        points: the measurements.

    Raises:
        OutputError: the file is of another network or other options, or cannot be read.
        FormatError: it is no journal.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.base: float | None = None
        self.points: list[Point] = []
        if path is not None and path.exists():
            self._read(path)

    def start(self, base: float) -> None:
        """Note the metric of the whole network."""
        self.base = base
        self._append({"format": FORMAT, "fingerprint": self.fingerprint, "base": base})

    def add(self, measured: Point) -> None:
        """Note a measurement."""
        self.points.append(measured)
        self._append(asdict(measured))

    def _append(self, held: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(held) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            what = f"measurements cannot be kept there: {error}"
            raise OutputError(str(self.path), what, "Check the path") from error

    def _read(self, path: Path) -> None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise OutputError(str(path), f"it cannot be read: {error}", "Check the path") from error
        whole = text[: text.rfind(b"\n") + 1]
        if whole or not BEGINNING.startswith(text[: len(BEGINNING)]):
            self._parse(path, whole)
        if len(whole) < len(text):
            with suppress(OSError):  # then the next line cannot be written, either
                os.truncate(path, len(whole))

    def _parse(self, path: Path, text: bytes) -> None:
        try:
            head, *rest = (json.loads(line) for line in text.splitlines())
            if head["format"] != FORMAT:
                raise ValueError(head["format"])
            self.points = [point(held) for held in rest]
            self.base = float(head["base"])
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(
                str(path),
                "it holds no measurements of a sensitivity, or is damaged",
                "Give another path, or remove the file to measure again",
            ) from error
        if head.get("fingerprint") != self.fingerprint:
            raise OutputError(
                str(path),
                "its measurements are of another network, or were made with other options, or with "
                "data in another order where the criterion asks for data",
                "Give another path, or remove the file to measure again",
            )
