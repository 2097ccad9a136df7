"""The state of a training in files, from which it goes on exactly where it was.

A checkpoint is one safetensors file: tensors, and everything else as JSON in its header. Nothing
in it is executed. It is written whole or not at all, and the one before stays beside it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import FormatError, InputError, OutputError, first_line
from rarefy.files import replacing

FORMAT = "rarefy training 2"
"""What the header of a checkpoint says that it is."""

KEPT = 2
"""Checkpoints that stay in a folder."""


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints, the names of which say the number of steps.

    Attributes:
        path: the folder.
        where: the call that errors name.
    """

    path: Path
    where: str

    def claim(self, resume: bool) -> None:
        """Make the folder, or take one that may be written.

        Raises:
            OutputError: it cannot be written, or holds checkpoints that are not to be resumed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            for draft in self.path.glob(".step-*.tmp"):
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.where}(checkpoint={str(self.path)!r})",
                f"the folder cannot be written ({error.strerror or error})",
                "Choose another folder",
            ) from error
        if self.files() and not resume:
            raise OutputError(
                f"{self.where}(checkpoint={str(self.path)!r})",
                "the folder holds checkpoints of an earlier run",
                "Give resume=True to go on with it, or another folder",
            )

    def files(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.path.glob("step-*.safetensors"), reverse=True)

    def newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that can be read, and what was wrong with those that cannot.

        Raises:
            FormatError: there are checkpoints, and none of them can be read.
        """
        damaged: list[str] = []
        for file in self.files():
            try:
                return read(file), damaged
            except FormatError as error:
                damaged.append(f"{file.name}: {error.what}")
        if damaged:
            raise FormatError(
                f"{self.where}(checkpoint={str(self.path)!r})",
                "no checkpoint can be read: " + "; ".join(damaged),
                "Begin anew in another folder",
            )
        return None, []

    def write(self, steps: int, state: Mapping[str, Any]) -> None:
        """Write a state, and remove all but the newest two.

        Raises:
            OutputError: it cannot be written; earlier checkpoints are as they were.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        header = {"format": FORMAT, "state": json.dumps(encode(state, tensors))}
        header["crc32"] = str(checksum(header["state"], tensors))
        target = self.path / f"step-{steps:09d}.safetensors"
        try:
            with replacing(target) as draft:
                save_file(tensors, draft, metadata=header)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                str(target),
                f"the checkpoint cannot be written ({first_line(error)})",
                "Make room on the disk; earlier checkpoints are as they were",
            ) from error
        for old in self.files()[KEPT:]:
            old.unlink(missing_ok=True)


def read(file: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        FormatError: it is truncated, damaged, or no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "Use the checkpoint before it"
    try:
        with safe_open(file, "pt") as held:
            header = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(str(file), f"it cannot be read ({first_line(error)})", remedy) from error
    if header.get("format") != FORMAT:
        raise FormatError(str(file), "it is no checkpoint of a training", remedy)
    if header.get("crc32") != str(checksum(header.get("state", ""), tensors)):
        raise FormatError(str(file), "what it holds does not fit its checksum", remedy)
    try:
        state: dict[str, Any] = decode(json.loads(header["state"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(str(file), f"it is damaged ({first_line(error)})", remedy) from error
    return state


def checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a text, then of the bytes of all tensors, in the order of their names."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested plain values as JSON; tensors go into ``tensors``, and leave their name behind.

    Raises:
        InputError: a value is neither plain nor a tensor.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": [[encode(k, tensors), encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [encode(v, tensors) for v in value]
    raise InputError(
        "checkpoint",
        f"a {type(value).__name__} is in the state of the optimizer, after_step or regularizer",
        "Return tensors, numbers and texts from its state_dict()",
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "tuple":
        return tuple(decode(v, tensors) for v in held)
    if kind == "map":
        return {decode(k, tensors): decode(v, tensors) for k, v in held}
    raise ValueError(f"unknown kind {kind!r}")
