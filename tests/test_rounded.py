"""Weights on grids in ONNX files: integers, computed with as PyTorch does, in both runtimes."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import rarefy as rf
from rarefy.deployment.rounded import fold_grids, opset, rounded_weights
from rarefy.deployment.runtimes import (
    ExactOnnxSession,
    OnnxSession,
    OpenVinoSession,
    openvino_core,
)
from rarefy.grid import Grid, put_grids
from rarefy.schemes import WeightOnly


class Net(nn.Module):
    """A convolution with its norm, linear layers of three dimensions and of two, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.table = nn.Embedding(10, 64)
        self.inner = nn.Linear(64, 32)
        self.head = nn.Linear(32, 16)
        nn.init.normal_(self.norm.weight)  # some below zero
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        with torch.no_grad():
            self.norm.weight[3] = 0

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) and tokens (B, L) -> (B, 16)."""
        seen = self.up(self.norm(self.stem(x)).relu()).mean((1, 2, 3))
        words = self.inner(self.table(tokens)).relu()
        out: Tensor = self.head(words)[:, 0] + self.head(words.mean(1)) + seen[:, None]
        return out


def case() -> tuple[Net, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), (torch.randn(4, 3, 8, 8), torch.randint(10, (4, 5)))


def in_openvino(path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output with inputs of products left in float, which OpenVINO rounds to int8 by itself."""
    pytest.importorskip("openvino")
    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(path, "CPU", settings)
    result = compiled([tensor.numpy() for tensor in inputs])
    return torch.from_numpy(result[compiled.output(0)].copy())


CASES = [(8, None, True), (4, None, False), (3, 32, True), (4, 16, False), (4, 24, True)]


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_runtimes_compute_the_same_from_integers(tmp_path, bits, group, symmetric) -> None:
    net, x = case()
    scheme = WeightOnly(bits=bits, group=group, symmetric=symmetric, method="rtn")
    quantized = rf.quantize(net, None, scheme)
    path = rf.export(quantized, tmp_path / "a.onnx", x)
    with torch.no_grad():
        expected = quantized(*x)
    (found,) = ExactOnnxSession(path)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (near,) = OnnxSession(path)(x)
    assert float((near - expected).norm()) < 0.02 * float(expected.norm())
    held = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    wanted = {4: (TensorProto.UINT4, TensorProto.INT4), 8: (TensorProto.UINT8, TensorProto.INT8)}
    table = {name: held.pop(name) for name in list(held) if name.startswith("table.weight_codes")}
    codes = [dtype for name, dtype in held.items() if name.endswith("_codes")]
    assert set(codes) == {wanted[8 if bits == 8 else 4][symmetric]}
    # blocks of the transposed convolution lie along another dimension than ONNX has them, and no
    # block divides both a group of 16 and the 27 inputs of the first convolution
    floats = {
        None: set(),
        24: {"up.weight", "stem.weight"},
        32: {"up.weight"},
        16: {"up.weight", "stem.weight"},
    }[group]
    assert held.keys() & {"stem.weight", "up.weight", "table.weight", "head.weight"} == floats
    assert len(codes) == 5 - len(floats)
    in_bytes = wanted[8][symmetric and bits == 8]  # in which the table is looked up
    own = [dtype for name, dtype in table.items() if name.endswith(("_codes", "_rows", "_pairs"))]
    assert own == [in_bytes]
    torch.testing.assert_close(in_openvino(path, x), expected, rtol=1e-3, atol=1e-4)
    (near,) = OpenVinoSession(path)(x)
    assert float((near - expected).norm()) < 0.02 * float(expected.norm())


def test_files_are_smaller(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    x = torch.randn(2, 256)
    whole = rf.export(net, tmp_path / "a.onnx", x).stat().st_size
    for bits, factor in ((8, 3.8), (4, 7)):
        small = rf.quantize(net, None, WeightOnly(bits=bits, method="rtn"))
        assert whole / rf.export(small, tmp_path / "b.onnx", x).stat().st_size > factor


def test_weights_that_left_their_grid_stay_in_float(tmp_path: Path) -> None:
    net = rf.quantize(nn.Linear(8, 8), None, WeightOnly(method="rtn"))
    assert rounded_weights(net).keys() == {"weight"}
    with torch.no_grad():
        net.weight[0, 0] += 1e-3
    assert not rounded_weights(net)
    path = rf.export(net, tmp_path / "a.onnx", torch.randn(2, 8))
    assert {t.data_type for t in onnx.load(path).graph.initializer} == {TensorProto.FLOAT}


def test_only_small_codes_and_blocks_need_a_new_opset() -> None:
    weights = {}
    for bits, group in ((8, None), (8, 4), (4, None)):
        net = rf.quantize(nn.Linear(8, 8), None, WeightOnly(bits, group, method="rtn"))
        weights[bits, group] = opset(rounded_weights(net).values())
    assert weights == {(8, None): None, (8, 4): 21, (4, None): 21}


def test_a_weight_of_that_name_and_other_values_stays(tmp_path: Path) -> None:
    import onnx_ir as ir

    layer = rf.quantize(nn.Linear(8, 8), None, WeightOnly(method="rtn"))
    other = nn.Linear(8, 8)
    model = ir.load(rf.export(other, tmp_path / "a.onnx", torch.randn(2, 8)))
    before = set(model.graph.initializers)
    fold_grids(model, rounded_weights(layer))
    assert set(model.graph.initializers) == before
    put_grids(other, {"weight": Grid(torch.ones(8), torch.tensor(0), 0, -7, 7)})
    assert not rounded_weights(other)
