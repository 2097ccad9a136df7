"""Operators that PyTorch's exporter does not know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rarefy.deployment.export import export
from rarefy.deployment.runtimes import OnnxSession

moe = pytest.importorskip("transformers.integrations.moe")


class Experts(nn.Module):
    """Rows go to the expert that they name; the third of four has none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        order = expert.argsort()
        ends = torch.histc(expert.float(), 4, 0, 3).cumsum(0).to(torch.int32)
        return torch.ops.transformers.grouped_mm_fallback(x[order], self.weight, ends)


class Windows(nn.Module):
    """Attention within each of several windows, with a bias or not."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 1, 5, 5)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        batch, windows, length, width = x.shape
        parts = self.project(x).reshape(batch, windows, length, 3, 2, width // 2)
        q, k, v = parts.permute(3, 0, 4, 1, 2, 5)
        y = nn.functional.scaled_dot_product_attention(q, k, v, self.bias)
        return y.permute(0, 2, 3, 1, 4).reshape(batch, windows, length, width)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_within_windows(tmp_path, biased) -> None:
    model, x = Windows(biased).eval(), torch.randn(3, 4, 5, 8)
    path = export(model, tmp_path / "m.onnx", x)
    (found,) = OnnxSession(path)(x[:2])
    assert (found - model(x[:2])).abs().max() < 1e-5


def test_products_of_groups_of_rows(tmp_path) -> None:
    model, x = Experts().eval(), torch.randn(10, 8)
    expert = torch.tensor([0, 0, 3, 3, 1, 1, 1, 3, 0, 0])
    path = export(model, tmp_path / "m.onnx", (x, expert))
    for rows in (x, x.flip(0)):
        (found,) = OnnxSession(path)((rows, expert))
        wanted = torch.stack(
            [
                r @ model.weight[e]
                for e, r in sorted(
                    zip(expert.tolist(), rows, strict=True), key=lambda pair: pair[0]
                )
            ]
        )
        assert (found - wanted).abs().max() < 1e-5
