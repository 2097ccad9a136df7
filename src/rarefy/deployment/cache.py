"""Latencies of layers that earlier runs measured, in a file of the user's cache folder.

There is a file for each runtime with its version, number of threads and processor. It is replaced
as a whole, so that a reader finds the old one or the new one; what cannot be read counts as empty,
and where nothing can be written nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from math import isfinite
from pathlib import Path
from tempfile import gettempdir

from rarefy.environment import processor
from rarefy.files import replacing
from rarefy.graph.layer import Layer


def cache_folder() -> Path:
    """``$RAREFY_CACHE``, or ``rarefy`` in the user's folder for caches, or in that for what is
    temporary where the user has no home."""
    own = os.environ.get("RAREFY_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rarefy"
    except RuntimeError:
        return Path(gettempdir()) / "rarefy"


@dataclass(frozen=True)
class Cache:
    """Milliseconds by layer.

    Attributes:
        path: the file.
        environment: what the figures depend on beside the layer.
    """

    path: Path
    environment: tuple[str, ...]

    @classmethod
    def of(cls, runtime: str, threads: int, folder: Path | None = None) -> Cache:
        """The figures of a runtime (with its version), on so many threads of this processor."""
        environment = (runtime, f"{threads} threads", processor())
        name = hashlib.sha256("\n".join(environment).encode()).hexdigest()[:16]
        return cls((folder or cache_folder()) / f"layers-{name}.json", environment)

    def get(
        self, layers: Sequence[Layer], measure: Callable[[Sequence[Layer]], Sequence[float]]
    ) -> dict[Layer, float]:
        """Milliseconds of these layers; what is not known is measured, and kept."""
        layers = list(dict.fromkeys(layers))
        known = self._read()
        missing = [found for found in layers if _key(found) not in known]
        if missing:
            new = dict(zip(map(_key, missing), measure(missing), strict=True))
            known |= new
            self._write({**self._read(), **new})  # another process may have added to it
        return {found: known[_key(found)] for found in layers}

    def _read(self) -> dict[str, float]:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if held["environment"] != list(self.environment):
                return {}
            return {str(k): float(v) for k, v in held["ms"].items() if isfinite(v) and v > 0}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}

    def _write(self, ms: dict[str, float]) -> None:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as draft:
                held = {"environment": self.environment, "ms": ms}
                draft.write_text(json.dumps(held), encoding="utf-8")


def _key(found: Layer) -> str:
    return json.dumps(astuple(found))
