"""The folder of one run: its artifacts, and a manifest of the stages that are complete.

A stage is complete when its artifacts are on disk and the manifest says so; both are written to a
temporary name and moved into place. A run that was interrupted continues after its last complete
stage, once its artifacts are found to be what the manifest says. Nothing of an earlier run is
overwritten unasked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.errors import InputError, OutputError
from rarefy.files import replacing

MANIFEST = "run.json"

SUFFIXES = ("safetensors", "onnx")
"""Of the artifacts of every stage."""

OWN = (
    MANIFEST,
    "report.html",
    "report.json",
    *(
        f"{stage}.{suffix}"
        for stage in ("teacher", "pruned", "repaired", "sparse", "distilled", "quantized")
        for suffix in SUFFIXES
    ),
)
"""Names of all files that a run may write."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PruningFacts(_Record):
    """What a pruning did, as :class:`~rarefy.pruning.narrow.Pruned` with plain entries."""

    kind: Literal["module", "graph"]
    reason: str
    error: float
    widths: tuple[tuple[str, int, int], ...]
    frozen: tuple[str, ...]
    kept: tuple[tuple[str, int, tuple[int, ...]], ...]


class StageFacts(_Record):
    """What was measured on a stage when it was made, and the SHA-256 of each of its artifacts."""

    accuracy: float
    params: int
    macs: int
    notes: tuple[str, ...]
    seconds: float
    pruning: PruningFacts | None = None
    files: dict[str, str] = {}


class _Manifest(_Record):
    identity: str
    stages: dict[str, StageFacts]


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: the folder.
        identity: hash of the network, the options and the seed; a run is only continued by one of
            the same identity.
    """

    path: Path
    identity: str

    @classmethod
    def claim(cls, path: str | Path, identity: str, *, resume: bool, overwrite: bool) -> RunFolder:
        """Make the folder, or take one that may be written.

        Raises:
            InputError: the run is to be continued and replaced at once.
            OutputError: the folder cannot be written, holds other files or an earlier run, or a
                run with other options is to be continued.
        """
        if resume and overwrite:
            what = "a run can be continued or replaced, not both"
            raise InputError("resume, overwrite", what, "Give one of the two")
        folder = cls(Path(path), identity)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            probe = folder.path / f".{MANIFEST}.probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                str(path),
                f"the output folder cannot be written ({error.strerror or error})",
                "Choose another folder with --out (out= in Python)",
            ) from error
        folder._prepare(resume=resume, overwrite=overwrite)
        return folder

    def _prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Continue, replace or begin a run, whichever is allowed."""
        drafts = list(self._drafts())
        if self.file(MANIFEST).exists():
            if overwrite:
                self._replace()
            else:
                self._continue(resume)
        elif set(self.path.iterdir()) - set(drafts):
            raise OutputError(
                str(self.path),
                "the folder is not empty and holds no run of rarefy",
                "Choose an empty or new folder with --out (out= in Python)",
            )
        else:
            self._write({})
        for draft in drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _continue(self, resume: bool) -> None:
        if not resume:
            raise OutputError(
                str(self.path),
                "it holds an earlier run",
                "Continue it with --resume, replace it with --overwrite, or choose another folder "
                "with --out",
            )
        if self._read().identity != self.identity:
            raise OutputError(
                str(self.path),
                "the run in it was made with another network, other options or another seed",
                "Continue it with what it was started with, or choose another folder",
            )

    def _replace(self) -> None:
        """Begin anew; the files of an earlier run go, all others stay."""
        self._write({})
        try:
            for name in OWN:
                if name != MANIFEST:
                    self.file(name).unlink(missing_ok=True)
        except OSError as error:
            what = f"the earlier run cannot be removed ({error})"
            raise OutputError(str(self.path), what, "Choose another folder with --out") from error

    def _drafts(self) -> Iterator[Path]:
        """What a run that was killed left half written."""
        return (path for name in OWN for path in self.path.glob(f".{name}.*"))

    def file(self, name: str) -> Path:
        """Path of an artifact."""
        return self.path / name

    def artifacts(self, stage: str) -> tuple[Path, ...]:
        """Paths of a stage's artifacts."""
        return tuple(self.file(f"{stage}.{suffix}") for suffix in SUFFIXES)

    def complete(self, stage: str) -> StageFacts | None:
        """What was noted about a stage, or None where it is not complete.

        Raises:
            OutputError: an artifact is missing or is not what it was.
        """
        facts = self._read().stages.get(stage)
        if facts is None:
            return None
        for path in self.artifacts(stage):
            state = "is missing" if not path.is_file() else "is not what the run wrote"
            if not path.is_file() or _digest(path) != facts.files.get(path.name):
                raise OutputError(
                    str(path),
                    f"this file of the complete stage {stage!r} {state}",
                    "Put it back, or start again with --overwrite (overwrite=True)",
                )
        return facts

    def note(self, stage: str, facts: StageFacts) -> None:
        """Mark a stage as complete; its artifacts must be on disk already."""
        files = {path.name: _digest(path) for path in self.artifacts(stage)}
        self._write({**self._read().stages, stage: facts.model_copy(update={"files": files})})

    def _read(self) -> _Manifest:
        path = self.file(MANIFEST)
        try:
            return _Manifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise OutputError(
                str(path),
                "the manifest of the run is damaged or missing, or of another version of rarefy",
                "Start again with --overwrite (overwrite=True), or choose another folder",
            ) from error

    def _write(self, stages: dict[str, StageFacts]) -> None:
        manifest = _Manifest(identity=self.identity, stages=stages)
        try:
            with replacing(self.file(MANIFEST)) as draft:
                draft.write_text(manifest.model_dump_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                str(self.path), f"the run cannot be noted ({error})", "Free space or change --out"
            ) from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OutputError(str(path), f"it cannot be read ({error})", "Check its rights") from error
