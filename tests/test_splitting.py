"""SiLU in integers: the same network in float, and onnxruntime stays in integers."""

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.graph.stubs import plain_graph
from rarefy.quantization.splitting import SILU, split_silu


class Gated(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.activation = activation
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.first(x))
        return self.head(self.activation(self.second(x)).mean((2, 3)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Gated(nn.SiLU()).eval()


def test_both_parts_give_the_whole(model: nn.Module, x: torch.Tensor) -> None:
    net = plain_graph(model, x)
    assert any(node.op == SILU for node in net.graph.calls)
    parts = split_silu(net)
    assert not any(node.op == SILU for node in parts.graph.calls)
    torch.testing.assert_close(parts(x), model(x), rtol=1e-6, atol=1e-6)
    assert [n.kind for n in parts.graph.calls].count("sigmoid") == 2


def test_a_network_without_it_stays_as_it_is(x: torch.Tensor) -> None:
    net = plain_graph(Gated(nn.ReLU()).eval(), x)
    assert split_silu(net).graph.nodes == net.graph.nodes


@pytest.mark.parametrize("split", [False, True])
def test_onnxruntime_computes_it_in_integers(
    model: nn.Module, x: torch.Tensor, split: bool, tmp_path
) -> None:
    pytest.importorskip("onnxruntime")
    from rarefy.deployment.runtimes import optimized_ops

    small = rf.quantize(model, [x], rf.Int8(functions="split" if split else "apart"))
    ops = optimized_ops(rf.export(small, tmp_path / "small.onnx", x))
    assert (ops["Sigmoid"], ops["QLinearSigmoid"]) == ((0, 2) if split else (2, 0))
    assert ops["QLinearMul"] == (2 if split else 0)
    with torch.no_grad():
        exact, found = model(x), small(x)
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_fused_functions_read_the_convolution_as_it_is(model: nn.Module, x: torch.Tensor) -> None:
    apart, fused = (rf.quantize(model, [x], rf.Int8(functions=f)).graph for f in ("apart", "fused"))
    counts = [sum("fake_quantize" in n.op for n in graph.calls) for graph in (apart, fused)]
    assert counts[0] - counts[1] == 2
    for node in fused.calls:
        if node.kind == "silu":
            assert fused.by_name[node.inputs[0]].kind == "conv2d"
