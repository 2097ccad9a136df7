"""What a report says about the machine."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rarefy
from rarefy.environment import environment
from rarefy.types import Latency, Measurement


def test_versions_and_hardware_are_named() -> None:
    found = environment()
    assert found["rarefy"] == rarefy.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"onnx", "onnxruntime", "system", "cores", "training threads"} <= found.keys()
    assert found["training threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) and value for value in found.values())


def test_latency_is_described_by_what_was_measured() -> None:
    assert not {"latency", "order of calls"} & environment().keys()
    one = Measurement("a.onnx", "onnxruntime 1.2.3", 1, 10, Latency(1, 1, 1), 200, 1)
    found = environment([one])
    assert found["latency"] == "onnxruntime 1.2.3, 1 thread, batch 1, 200 calls of each file"
    assert "order of calls" not in found
    other = replace(one, threads=4, batch=8, calls=7)
    assert environment([one, one, other])["latency"].endswith(
        "; onnxruntime 1.2.3, 4 threads, batch 8, 7 calls of each file"
    )
    assert environment([one, other])["order of calls"] == "each file in turn"


def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def missing(path: Path, *options: Any, **more: Any) -> str:
        if path == Path("/proc/cpuinfo"):
            raise FileNotFoundError
        return read(path, *options, **more)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert "processor" not in environment()
