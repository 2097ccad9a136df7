"""What a report says about the machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import rarefy
from rarefy.environment import environment


def test_versions_and_hardware_are_named() -> None:
    found = environment()
    assert found["rarefy"] == rarefy.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"onnx", "onnxruntime", "system", "cores", "training threads"} <= found.keys()
    assert found["training threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) and value for value in found.values())


def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def missing(path: Path, *options: Any, **more: Any) -> str:
        if path == Path("/proc/cpuinfo"):
            raise FileNotFoundError
        return read(path, *options, **more)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert "processor" not in environment()
