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
