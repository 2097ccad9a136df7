"""Peak memory of files."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from rarefy.deployment import memory, timing
from rarefy.deployment.measure import measure
from rarefy.deployment.memory import STATUS, peak_mb
from rarefy.errors import RarefyError
from rarefy.graph.layer import Layer

linux = pytest.mark.skipif(not STATUS.is_file(), reason="only Linux tells the resident set")
absent = importlib.util.find_spec("openvino") is None
OPENVINO = pytest.param(
    "openvino",
    marks=[pytest.mark.skipif(absent, reason="openvino is not installed"), pytest.mark.slow],
)
X = torch.ones(1, 2048)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 33 MB of weights."""
    found = Layer("matmul", 2048, 4096, times=1)
    path = tmp_path_factory.mktemp("memory") / "large.onnx"
    timing._write(found, path)
    return path


@linux
@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO])
def test_memory_is_at_least_that_of_the_weights(large: Path, runtime: str) -> None:
    found = measure(large, X, runtime=runtime, calls=2, memory=True)
    assert large.stat().st_size / 1e6 < found.peak_mb < 300
    assert not found.notes


@linux
def test_a_process_that_fails_says_why(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 1, "", "Traceback\nInputError: wrong inputs\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RarefyError, match="InputError: wrong inputs"):
        peak_mb(large, X, "onnxruntime", 1)


def test_where_the_system_does_not_tell_nothing_is_guessed(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert peak_mb(large, X, "onnxruntime", 1) is None
    found = measure(large, X, calls=1, warmup=0, memory=True)
    assert "does not tell" in found.notes[0]
