"""The folder of one run: its artifacts, and a manifest of the stages that are complete.

A stage is complete when its artifact is on disk and the manifest says so; both are written to a
temporary name and moved into place. A run that was interrupted continues after its last complete
stage. Nothing of an earlier run is overwritten unasked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.errors import OutputError

MANIFEST = "run.json"


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
            OutputError: it cannot be written, holds other files or an earlier run, or a run with
                other options is to be continued.
        """
        folder = cls(Path(path), identity)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            probe = folder.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                str(path),
                f"the output folder cannot be written ({error.strerror or error})",
                "Choose another folder with --out (out= in Python)",
            ) from error
        folder._check(resume=resume, overwrite=overwrite)
        return folder

    def _check(self, *, resume: bool, overwrite: bool) -> None:
        manifest = self._read()
        if manifest is None:
            if any(self.path.iterdir()) and not overwrite:
                raise OutputError(
                    str(self.path),
                    "the folder is not empty and holds no run of rarefy",
                    "Choose an empty or new folder, or pass --overwrite (overwrite=True)",
                )
        elif resume:
            if manifest.get("identity") != self.identity:
                raise OutputError(
                    str(self.path),
                    "the run in it was made with another network, other options or another seed",
                    "Continue it with what it was started with, or choose another folder",
                )
            return
        elif not overwrite:
            raise OutputError(
                str(self.path),
                "it holds an earlier run",
                "Continue it with --resume, replace it with --overwrite, or choose another folder "
                "with --out",
            )
        self._write({"identity": self.identity, "stages": {}})

    def file(self, name: str) -> Path:
        """Path of an artifact."""
        return self.path / name

    def complete(self) -> dict[str, dict[str, Any]]:
        """Stages that are complete, in order, with what was noted about them."""
        stages: dict[str, dict[str, Any]] = (self._read() or {}).get("stages", {})
        return stages

    def note(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Mark a stage as complete; its artifact must be on disk already."""
        stages = self.complete() | {stage: dict(facts)}
        self._write({"identity": self.identity, "stages": stages})

    def _read(self) -> dict[str, Any] | None:
        path = self.file(MANIFEST)
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and isinstance(manifest.get("stages"), dict):
                return manifest
        except (OSError, ValueError):
            pass
        raise OutputError(
            str(path),
            "the manifest of the earlier run cannot be read",
            "Remove the folder, or choose another one",
        )

    def _write(self, manifest: Mapping[str, Any]) -> None:
        draft = self.file(f".{MANIFEST}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            draft.replace(self.file(MANIFEST))
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise OutputError(
                str(self.path), f"the run cannot be noted ({error})", "Free space or change --out"
            ) from error
