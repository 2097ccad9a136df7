"""The manifest of a store: what its records are of, and where they stand. One JSON file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rarefy import __version__
from rarefy.distillation.soft_labels.records import FORMS, Form, Layout, record_size
from rarefy.distillation.soft_labels.shards import shards_of
from rarefy.errors import FormatError, InputError
from rarefy.files import replacing

NAME = "manifest.json"
_MAX_BYTES = 1 << 20
_Count = Field(ge=1, le=2**48)


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Teacher(_Facts):
    """The network that answered.

    Attributes:
        class_name: for messages only.
        fingerprint: SHA-256 of its parameters and buffers.
    """

    class_name: str
    fingerprint: str


class DataFacts(_Facts):
    """The examples.

    Attributes:
        ids: ``"dataset"`` where an id is the index in a map-style data set, ``"position"`` where
            it is the running number of an example in batches that are read in order.
        samples: how many there are.
        inputs: id to a hash of its input in the first view, for some ids spread over all.
        transform: what replays the views; empty for inputs that are the same in every view.
    """

    ids: Literal["dataset", "position"]
    samples: int = _Count
    inputs: dict[str, str]
    transform: str


class Manifest(_Facts):
    """Everything that a reader of a store must know.

    Attributes:
        teacher: the network that answered.
        data: the examples.
        views: answers to each example, one for each augmentation of it.
        kind, options: the form of the records, see :data:`FORMS`.
        request: the form that was asked for, or the mass by which it was chosen.
        kept_mass: share of the teacher's probability that the form keeps, measured when it was
            chosen; None where it was not.
        shape: of the teacher's outputs for one example.
        sequences: whether their first dimension are the positions that ``attention_mask`` counts.
        dim: dimension of the classes among those of a batch of outputs.
        dtype: of the teacher's outputs.
        seed: of everything drawn.
        salt: begins the checksum of every record, so that those of other stores are told apart.
        shard_rows: records of a shard.
        versions: of what wrote it.
    """

    format: Literal["rarefy soft labels"] = "rarefy soft labels"
    version: Literal[1] = 1
    teacher: Teacher
    data: DataFacts
    views: int = Field(ge=1, le=2**31)
    kind: str
    options: dict[str, int | float | str]
    request: str
    kept_mass: float | None
    shape: tuple[int, ...] = Field(max_length=16)
    sequences: bool = False
    dim: int
    dtype: str
    seed: int
    salt: int = Field(ge=0, lt=2**32)
    shard_rows: int = _Count
    versions: dict[str, str]

    @property
    def rows(self) -> int:
        """Records of the store."""
        return self.views * self.data.samples

    @property
    def layout(self) -> Layout:
        """Where the numbers stand in a record."""
        form: Form = FORMS[self.kind](**self.options)
        return Layout(form, self.shape, self.dim)

    @property
    def bytes(self) -> int:
        """Size of all records."""
        return self.rows * self.layout.dtype.itemsize

    def missing(self, folder: Path) -> int:
        """Records of shards that are not complete."""
        shards = shards_of(folder, self.rows, self.shard_rows)
        return sum(shard.stop - shard.start for shard in shards if not shard.complete)

    def __str__(self) -> str:
        where = "x".join(map(str, self.shape)) or "scalar"
        kept = "" if self.kept_mass is None else f", {self.kept_mass:.2%} of the mass"
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        lines = {
            "teacher": f"{self.teacher.class_name} {self.teacher.fingerprint[:16]}",
            "examples": f"{self.data.samples:,}, {self.views} "
            + ("view" if self.views == 1 else "views"),
            "outputs": f"{where} ({self.dtype}), classes in dimension {self.dim}",
            "form": f"{self.kind}{f' ({given})' if given else ''}{kept}",
            "record": f"{self.layout.dtype.itemsize:,} bytes, {self.bytes:,} together",
            "transform": self.data.transform or "none",
            "seed": str(self.seed),
            "written by": ", ".join(f"{name} {value}" for name, value in self.versions.items()),
        }
        return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def versions() -> dict[str, str]:
    """Versions of what writes."""
    return {"rarefy": __version__, "torch": torch.__version__, "numpy": np.__version__}


def save(manifest: Manifest, folder: Path) -> Manifest:
    """Write the manifest of a new store; of several processes one wins, and all go on with its.

    Raises:
        OSError: it cannot be written.
    """
    body = manifest.model_dump(mode="json")
    text = json.dumps({"sha256": _digest(body), "manifest": body}, indent=1)
    try:
        with replacing(folder / NAME, replace=False) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
        return manifest
    except FileExistsError:
        return load(folder)


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a store.

    Raises:
        InputError: there is none.
        FormatError: it is damaged, or of another kind or version.
    """
    path = folder / NAME
    remedy = "Write the store again, into another folder"
    if not path.is_file():
        raise InputError(str(folder), f"it holds no {NAME}", "Write it with rf.write_soft_labels")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise FormatError(str(path), f"it is larger than {_MAX_BYTES} bytes", remedy)
        found = json.loads(content)
        body = found["manifest"]
        if found["sha256"] != _digest(body):
            raise FormatError(str(path), "it was changed after it was written", remedy)
        manifest = Manifest.model_validate_json(json.dumps(body))
        _check(manifest)
    except (OSError, ValueError, TypeError, KeyError, LookupError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        what = f"it is no manifest of this version ({_reason(error)})"
        raise FormatError(str(path), what, remedy) from error
    return manifest


def _check(manifest: Manifest) -> None:
    """What a manifest says of its records makes sense.

    Raises:
        ValueError, TypeError, LookupError: it does not.
    """
    layout = manifest.layout
    dimensions = len(manifest.shape)
    if any(n < 1 for n in manifest.shape) or manifest.dim == 0:
        raise ValueError(f"outputs of shape {manifest.shape}, classes in {manifest.dim}")
    if dimensions and not -dimensions <= manifest.dim <= dimensions:
        raise ValueError(f"no dimension {manifest.dim}")
    if manifest.sequences and dimensions != 2:
        raise ValueError(f"outputs of shape {manifest.shape} are no sequences")
    size = layout.positions * record_size(layout.form, layout.classes)
    if max(size, math.prod(manifest.shape)) > 2**30 or manifest.rows > 2**48:
        raise ValueError("no store is that large")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"[:200]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


_COMPARED: Mapping[str, tuple[Callable[[Manifest], Any], str]] = {
    "teacher": (
        lambda m: m.teacher.fingerprint[:16],
        "give the teacher that wrote it; any change of its weights makes other labels",
    ),
    "number of examples": (lambda m: m.data.samples, "give the data that it was written from"),
    "ids": (lambda m: m.data.ids, "give a DataLoader where one was given, batches where not"),
    "transform": (
        lambda m: m.data.transform or "none",
        "give a Replay with the transform and the seed that it was written with",
    ),
    "inputs": (
        lambda m: m.data.inputs,
        "the order or the preprocessing changed: give the data as they were",
    ),
    "shape of the outputs": (lambda m: m.shape, "give the teacher that wrote it"),
    "sequences": (lambda m: m.sequences, "give inputs with an attention_mask where it was given"),
    "dimension of the classes": (lambda m: m.dim, "give the same dim"),
    "views": (lambda m: m.views, "give the same number of views"),
    "seed": (lambda m: m.seed, "give the same seed"),
    "form": (lambda m: m.request, "ask for the same form"),
}
"""What must be equal to go on: its name, where it stands, and what to do where it is not."""


def differences(was: Manifest, now: Manifest) -> list[tuple[str, str]]:
    """What differs between two manifests in a sentence each, with what to do about it."""
    found = []
    for name, (of, remedy) in _COMPARED.items():
        before, after = of(was), of(now)
        if before != after:
            if isinstance(before, dict):
                before, after = changed_inputs(before, after)
            found.append((f"{name}: the store has {before}, this is {after}", remedy))
    return found


def changed_inputs(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, str]:
    """In words, which inputs are others."""
    ids = [i for i in before if before[i] != after.get(i)]
    shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    moved = sum(value in before.values() for i, value in after.items() if before.get(i) != value)
    what = "in another order" if moved else "other inputs"
    return f"{len(before)} hashes of inputs", f"{what} at {len(ids)} of these ids ({shown})"
