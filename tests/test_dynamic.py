"""Dynamic int8: ranges of each call, in PyTorch, in files and in the runtimes."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantized_networks import build
from rarefy.deployment.export import export
from rarefy.deployment.runtimes import OnnxSession, OpenVinoSession, optimized_ops
from rarefy.errors import InputError
from rarefy.quantization.affine import sqnr
from rarefy.quantization.quantize import quantize
from rarefy.schemes import Int8
from rarefy.storage.format import load, save

DYNAMIC = Int8(activations="dynamic", smooth=None)


class Encoder(nn.Module):
    """Three layers that read one tensor, attention, and a network of two layers."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).unsqueeze(1) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = x + self.mlp(self.after(x))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder().eval(), torch.randn(6, 7, 16)


def test_one_layer_computes_what_onnx_defines(tmp_path):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 6) * 3 + 1
    net = quantize(layer, [x], DYNAMIC)
    given = x[:3] * 2
    low, high = min(float(given.min()), 0), max(float(given.max()), 0)
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    a = (np.clip(np.rint(given.numpy() / scale) + zero, 0, 255) - zero) * scale
    w = layer.weight.detach().numpy()
    steps = np.abs(w).max(1, keepdims=True) / 127
    expected = a @ (np.rint(w / steps) * steps).T + layer.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(net(given).numpy(), expected, atol=1e-5)


def test_linear_layers_alone_are_quantized_and_ranges_follow_each_call(encoder):
    model, x = encoder
    net = quantize(model, [x], DYNAMIC)
    assert set(net.quantization.layers) == {"q", "k", "v", "out", "mlp.0", "mlp.2", "head"}
    assert "attention" in str(net.quantization.left.values())
    with torch.no_grad():
        for factor in (1, 1000):
            assert sqnr(model(x * factor), net(x * factor)) > 25
        assert torch.isfinite(net(x * 0)).all()
    model, data = build("lenet")
    net = quantize(model, data, DYNAMIC)
    assert "linear layers" in net.quantization.left["conv1"]
    assert set(net.quantization.layers) == {"fc1", "fc2"}
    with pytest.raises(InputError, match="no layer"):
        quantize(nn.Conv2d(3, 4, 1), [torch.randn(2, 3, 4, 4)], DYNAMIC)


def test_onnxruntime_multiplies_integers_and_agrees(encoder, tmp_path):
    model, x = encoder
    net = quantize(model, [x], DYNAMIC)
    path = export(net, tmp_path / "net.onnx", x)
    ops = optimized_ops(path)
    assert ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == 7
    assert not {"Gemm", "QuantizeLinear", "DequantizeLinear", "ReduceMin"} & ops.keys()
    with torch.no_grad():
        for given in (x, x[:1], x[:4] * 3):
            [found] = OnnxSession(path)(given)
            assert sqnr(net(given), found) > 30
    plain = export(model, tmp_path / "float.onnx", x)
    assert path.stat().st_size < plain.stat().st_size


class Speech(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind=nn.LSTM, bidirectional=False, out=16, **options):
        super().__init__()
        self.into = nn.Linear(6, 12)
        self.recurrent = kind(12, 16, bidirectional=bidirectional, **options)
        self.out = nn.Linear(out * (1 + bidirectional), 5)

    def forward(self, x):
        y, state = self.recurrent(self.into(x))
        return self.out(y), state[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "num_layers": 2}, {"bidirectional": True, "batch_first": True}],
    ids=str,
)
def test_lstms_have_integer_weights_here_and_in_onnxruntime(options, tmp_path):
    torch.manual_seed(0)
    model, x = Speech(**options).eval(), torch.randn(4, 7, 6)
    net = quantize(model, [x], Int8(activations="dynamic", skip=["into", "out"]))
    assert set(net.quantization.layers) == {"recurrent"}
    rounded = Speech(**options).eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in rounded.recurrent.parameters():
            if weight.ndim == 2:
                steps = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / steps).round() * steps)
        for found, expected in zip(net(x), rounded(x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    path = export(net, tmp_path / "net.onnx", x)
    ops = optimized_ops(path)
    assert ops["DynamicQuantizeLSTM"] == options.get("num_layers", 1)
    assert not {"LSTM", "DequantizeLinear", "QuantizeLinear"} & ops.keys()
    for given in (x, 2 * x[:3]) if options.get("batch_first") else (x,):
        for found, expected in zip(OnnxSession(path)(given), net(given), strict=True):
            assert sqnr(expected.detach(), found) > 30
    plain = export(model, tmp_path / "float.onnx", x)
    weights = sum(p.numel() for p in model.recurrent.parameters() if p.ndim == 2)
    assert path.stat().st_size < plain.stat().st_size - 2 * weights
    sizes = [save(n, tmp_path / "net.safetensors").stat().st_size for n in (model, net)]
    assert sizes[1] < sizes[0] - weights


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.cell(x[:, 0])[0])


def test_other_recurrent_layers_are_named_and_left():
    x = torch.randn(4, 7, 6)
    for kind in (nn.GRU, nn.RNN):
        net = quantize(Speech(kind).eval(), [x], DYNAMIC)
        assert set(net.quantization.layers) == {"into", "out"}
        assert "LSTMs" in net.quantization.left["recurrent"]
    net = quantize(Speech(proj_size=8, out=8).eval(), [x], DYNAMIC)
    assert set(net.quantization.layers) == {"into", "out"}
    assert "without projections" in net.quantization.left["recurrent"]
    net = quantize(Cell().eval(), [x], DYNAMIC)
    assert set(net.quantization.layers) == {"out"}
    assert "LSTMs" in net.quantization.left["cell"]
    net = quantize(Speech().eval(), [x], Int8(activations="dynamic", skip=["recurrent"]))
    assert net.quantization.left == {"recurrent": "left in float by choice"}


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no openvino")
def test_openvino_reads_the_file(encoder, tmp_path):
    model, x = encoder
    net = quantize(model, [x], DYNAMIC)
    [found] = OpenVinoSession(export(net, tmp_path / "net.onnx", x))(x)
    with torch.no_grad():
        assert sqnr(net(x), found) > 30


def test_files_hold_it_and_it_trains(encoder, tmp_path):
    model, x = encoder
    net = quantize(model, [x], DYNAMIC)
    save(net, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", Encoder())
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
