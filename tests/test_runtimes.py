"""onnxruntime behind one small class."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from rarefy.deployment import runtimes
from rarefy.deployment.export import export
from rarefy.deployment.runtimes import OnnxSession, optimized_ops
from rarefy.errors import FormatError, InputError, MissingExtraError


class Sum(nn.Module):
    def forward(self, left, right):
        return left + 2 * right


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "sum.onnx"
    return export(Sum(), path, {"left": torch.ones(2, 3), "right": torch.ones(2, 3)})


def test_takes_all_forms_of_inputs(path):
    session = OnnxSession(path)
    left, right = torch.ones(4, 3), torch.arange(12.0).reshape(4, 3)
    assert session.inputs == ("left", "right")
    for inputs in ((left, right), {"right": right, "left": left}):
        [result] = session(inputs)
        assert torch.equal(result, left + 2 * right)


def test_wrong_inputs_and_files_are_refused(path, tmp_path):
    session = OnnxSession(path)
    with pytest.raises(InputError, match="inputs were given"):
        session(torch.ones(2, 3))
    with pytest.raises(InputError, match="refuses"):
        session((torch.ones(2, 4), torch.ones(2, 3)))
    with pytest.raises(InputError):
        OnnxSession(tmp_path / "absent.onnx")
    with pytest.raises(InputError):
        OnnxSession(path, threads=0)
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    with pytest.raises(FormatError):
        OnnxSession(tmp_path / "broken.onnx")


def test_optimized_ops(path):
    assert sum(optimized_ops(path).values()) == 2


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_extra_names_its_install_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rarefy\[onnx\]'"):
        getattr(runtimes, f"load_{name}")()


def test_importing_loads_nothing_optional():
    code = (
        "import sys, rarefy.deployment.export, rarefy.deployment.measure, "
        "rarefy.quantization.quantize; "
        "sys.exit(bool({'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
