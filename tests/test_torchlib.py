"""The kept table of translations: files are the same, and nothing of one export stays."""

import threading

import pytest
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib import registration
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import rarefy as rf
from rarefy.deployment import torchlib
from rarefy.deployment.runtimes import OnnxSession
from rarefy.deployment.torchlib import kept_translations
from rarefy.errors import ExportError


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The tables that are kept: none at first."""
    held: dict = {}
    monkeypatch.setattr(torchlib, "_TABLES", held)
    return held


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))).mean((2, 3)))


def test_a_file_is_the_same_whether_the_table_is_new_or_kept(tmp_path, tables) -> None:
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    paths = [rf.export(net, tmp_path / f"{n}.onnx", x) for n in range(2)]
    assert len(tables) == 1
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_table_is_made_once_for_each_version_and_set_of_operators(monkeypatch, tables) -> None:
    made = []

    def counted(cls, opset_version):
        made.append(opset_version)
        table = cls()
        table.functions = {"aten::relu": ["first"]}
        return table

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    with kept_translations():
        table = ONNXRegistry.from_torchlib(opset_version=18)
        table.functions["aten::relu"].insert(0, "own")
        table.functions["aten::own"] = ["own"]
    with kept_translations():
        assert ONNXRegistry.from_torchlib(opset_version=18).functions == {"aten::relu": ["first"]}
        ONNXRegistry().from_torchlib(opset_version=21)
        assert made == [18, 21]
    with torch.library._scoped_library("rarefy_tests", "FRAGMENT") as library:
        library.define("registered_later(Tensor x) -> Tensor")
        with kept_translations():
            ONNXRegistry.from_torchlib(opset_version=18)
    assert made == [18, 21, 18]
    assert len(tables) == 1  # those of fewer operators are gone


def test_a_translation_that_is_registered_after_an_export_is_taken(tmp_path) -> None:
    with torch.library._scoped_library("rarefy_tests", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

        class Twice(nn.Module):
            def forward(self, x):
                return torch.ops.rarefy_tests.twice(x)

        with pytest.raises(ExportError, match="twice"):
            rf.export(Twice(), tmp_path / "a.onnx", torch.randn(2, 3))

        @registration.torch_op("rarefy_tests::twice", trace_only=True)
        def twice(x):
            return opset18.Add(x, x)

        try:
            path = rf.export(Twice(), tmp_path / "a.onnx", torch.randn(2, 3))
        finally:
            del registration.default_registry._registry["rarefy_tests::twice"]
        x = torch.randn(5, 3)
        torch.testing.assert_close(OnnxSession(path)(x)[0], 2 * x)


def test_two_threads_leave_pytorch_as_it_was() -> None:
    before = vars(ONNXRegistry)["from_torchlib"]
    first, second = threading.Event(), threading.Event()

    def enters() -> None:
        first.wait()
        with kept_translations():
            second.set()

    other = threading.Thread(target=enters)
    other.start()
    with kept_translations():
        first.set()
        assert not second.wait(0.05)  # one at a time
    other.join()
    assert second.is_set()
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_pytorch_is_as_it_was_after_an_error(monkeypatch, tmp_path) -> None:
    def fails(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.onnx, "export", fails)
    before = vars(ONNXRegistry)["from_torchlib"]
    with pytest.raises(ExportError, match="ZeroDivisionError"):
        rf.export(Net().eval(), tmp_path / "a.onnx", torch.randn(2, 3, 8, 8))
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_a_version_of_pytorch_without_such_a_table_is_left_alone(monkeypatch, tables) -> None:
    monkeypatch.delattr(ONNXRegistry, "from_torchlib")
    with kept_translations():
        assert not hasattr(ONNXRegistry, "from_torchlib")
    assert not tables
