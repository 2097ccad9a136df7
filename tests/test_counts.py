"""Numbers of examples in int8 files: OpenVINO computes what onnxruntime does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.deployment.runtimes import OnnxSession, OpenVinoSession

pytest.importorskip("openvino")


class Speech(nn.Module):
    """A convolution whose outputs a recurrent layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=(1, 2), padding=1)
        self.rnn = nn.GRU(80, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 10, 20) -> (B, 10, 16)."""
        x = self.conv(x.unsqueeze(1)).relu()
        out: Tensor = self.rnn(x.permute(0, 2, 1, 3).flatten(2))[0]
        return out


class Token(nn.Module):
    """Patches behind a token of which there is one for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.inner, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 16, 16) -> (B, 5)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        out: Tensor = self.out(self.inner(self.norm(x)).relu())[:, 0]
        return out


SHAPE = (3, 16, 16)
NETWORKS = {"speech": (Speech, (10, 20)), "token": (Token, SHAPE)}


@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_computes_what_onnxruntime_does(name, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    net = make().eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.bias)
    path = rf.export(rf.quantize(net, [torch.randn(32, *shape)]), tmp_path / "a.onnx", _x(shape))
    assert "Shape" not in {node.op_type for node in onnx.load(path).graph.node}
    for count in (1, 3):
        x = torch.randn(count, *shape)
        (exact,), (found,) = OnnxSession(path)(x), OpenVinoSession(path)(x)
        assert exact.shape[0] == count
        np.testing.assert_allclose(found, exact, atol=1e-2 * float(exact.abs().max()))


def _x(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *shape)


def test_files_that_round_nothing_keep_their_shapes(tmp_path: Path) -> None:
    kinds = {}
    for name, net in (
        ("float", Token().eval()),
        ("int8", rf.quantize(Token().eval(), [_x(SHAPE)])),
    ):
        path = rf.export(net, tmp_path / f"{name}.onnx", _x(SHAPE))
        kinds[name] = {node.op_type for node in onnx.load(path).graph.node}
    assert "Shape" in kinds["float"]
    assert "Size" not in kinds["float"]
    assert "Size" in kinds["int8"]
