"""Rows of layers of every kind, and sums over them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.pruning import running
from rarefy.pruning.running.inputs import results, rows
from rarefy.pruning.running.lockstep import Run
from rarefy.pruning.running.origins import Origins
from rarefy.pruning.running.products import positions
from rarefy.pruning.running.solvable import Layers, picked
from rarefy.pruning.sparsity.gram import Sums, add_rows

CASES = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear over positions": (nn.Linear(5, 3), (7, 4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, dilation=2), (5, 4, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding="valid"), (5, 3, 8, 7)),
    "conv2d same": (nn.Conv2d(3, 4, 4, padding="same", dilation=(1, 2)), (2, 3, 8, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=(1, 0)), (3, 6, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (3, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 6, 5)),
}


class Transposed(nn.Module):
    """GPT-2's Conv1D: a linear layer whose weight has its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = (*x.shape[:-1], 3)
        return torch.addmm(self.bias, x.view(-1, 5), self.weight).view(size)


CASES["transposed"] = (Transposed(), (7, 4, 5))
CASES |= {
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, padding=1, dilation=2), (5, 4, 11)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), output_padding=(1, 2)),
        (5, 3, 4, 3),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1), (2, 2, 3, 4, 2)),
}


CASES |= {
    "conv_transpose1d grouped": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (5, 4, 9)),
    "conv_transpose2d depthwise": (nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4), (3, 4, 5, 4)),
}


def prepared(layer, inputs):
    """Its only product, the run up to it, and its result."""
    model = graph_model(layer, capture(layer, inputs))
    (product,) = Layers(model.graph).products.values()
    run = Run(model, inputs)
    with torch.no_grad():
        run.through(product.node)
    operands = run.values[product.x], run.values[product.weight].detach()
    return product, operands, run.values[product.node.name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rows_times_the_weight_are_the_outputs(name, share, monkeypatch) -> None:
    monkeypatch.setattr(running.inputs, "CHUNK", 1 << 12)  # several slices
    layer, shape = CASES[name]
    layer = layer.double()
    product, operands, y = prepared(layer, torch.randn(shape, dtype=torch.float64))
    w = picked(layer.weight.detach(), positions(product)).transpose(1, 2)
    bias = layer.bias.detach().view(len(w), 1, -1)
    generator, numbers = torch.Generator().manual_seed(0), []
    every = results(product, y)
    for part in rows(product, *operands, lambda n: round(share * n), generator):
        torch.testing.assert_close(part.inputs @ w + bias, every[:, part.index])
        numbers += part.index.tolist()
    assert len(set(numbers)) == len(numbers)
    total = y.numel() // layer.bias.numel()
    assert len(numbers) == total if share == 1 else 0 < len(numbers) < total
    assert max(numbers) < total


@pytest.mark.parametrize("level", [0, 1, 1000])
def test_sums_tell_the_error_of_the_rows(level) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 50, 4).double() + level, torch.randn(2, 50, 3).double() - 2 * level
    w, offset = torch.randn(2, 4, 3).double(), torch.randn(2, 1, 3).double()
    sums = Sums.empty(2, 4, 3)
    for part in range(0, 50, 20):
        sums.add(x[:, part : part + 20], y[:, part : part + 20])
    expected = (x @ w + offset - y).square().sum() / (y - y.mean(1, keepdim=True)).square().sum()
    assert sums.error(w, offset) == pytest.approx(float(expected))
    expected = (x @ w + offset - y).square().sum() / y.square().sum()
    assert sums.error(w, offset, about_mean=False) == pytest.approx(float(expected))
    centered, x0, y0 = sums.centered(), x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    torch.testing.assert_close(centered.xx, x0.transpose(1, 2) @ x0)
    torch.testing.assert_close(centered.xy, x0.transpose(1, 2) @ y0)
    raw = sums.raw()
    torch.testing.assert_close(raw.xx, x.transpose(1, 2) @ x)
    torch.testing.assert_close(raw.xy, x.transpose(1, 2) @ y)
    torch.testing.assert_close(raw.yy, y.square().sum(1, keepdim=True))
    torch.testing.assert_close(raw.x, x.sum(1, keepdim=True))
    torch.testing.assert_close(raw.y, y.sum(1, keepdim=True))
    torch.testing.assert_close(sums.squares, x.square().sum(1))
    torch.testing.assert_close(sums.mean_x, x.mean(1, keepdim=True))
    torch.testing.assert_close(sums.mean_y, y.mean(1, keepdim=True))
    for same in (raw, centered):
        torch.testing.assert_close(same.centered().xx, centered.xx, rtol=1e-6, atol=1e-6)
    assert raw.error(w, offset) == pytest.approx(sums.error(w, offset))


@pytest.mark.parametrize("level", [0.0, 300.0, -30_000.0])
def test_rows_far_from_zero_lose_nothing_in_single_precision(level) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 500, 4) + level, torch.randn(2, 500, 3) - level
    y[:, :300] += 2  # the first rows are not the mean of all
    sums = Sums.empty(2, 4, 3)
    for part in range(0, 500, 100):
        sums.add(x[:, part : part + 100], y[:, part : part + 100])
    x, y = x.double(), y.double()
    x0, y0 = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    found = sums.centered()
    torch.testing.assert_close(found.xx, x0.transpose(1, 2) @ x0, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.xy, x0.transpose(1, 2) @ y0, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.yy, y0.square().sum(1, keepdim=True), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.raw().xx, x.transpose(1, 2) @ x, rtol=1e-9, atol=1e-2)
    w = torch.randn(2, 4, 3).double()
    offset = (y - x @ w).mean(1, keepdim=True)
    expected = (x @ w + offset - y).square().sum() / y0.square().sum()
    assert sums.error(w, offset) == pytest.approx(float(expected), rel=1e-5)


def test_rows_that_are_alike_have_no_spread_at_all() -> None:
    sums = Sums.empty(1, 7, 2)
    x, y = torch.randn(1, 1, 7).expand(1, 300, 7), torch.randn(1, 1, 2).expand(1, 300, 2)
    for part in range(0, 300, 70):
        sums.add(x[:, part : part + 70], y[:, part : part + 70])
    sums.add(x[:, :0], y[:, :0])
    assert sums.count == 300
    for spread in (sums.xx, sums.xy, sums.yy, sums.centered().xx):
        assert not spread.any()
    torch.testing.assert_close(sums.mean_x, x[:, :1].double())


@pytest.mark.parametrize("name", CASES)
def test_sums_of_parts_are_the_sums_of_all_and_nothing_is_lost(name) -> None:
    layer, shape = CASES[name]
    layer = layer.double()
    examples = 6
    x = torch.randn(examples, *shape[1:], dtype=torch.float64)
    product, (given, weight), y = prepared(layer, x)
    groups, outputs, unknowns = positions(product).shape
    sizes = (groups, unknowns, outputs)
    held = torch.tensor([False, True, False, False, True, False])
    found = []
    for step in (1, 2, examples):
        sums = Sums.empty(*sizes), Sums.empty(*sizes)
        each = len(given) // examples
        for i in range(0, examples, step):
            part, wanted = (t[i * each : (i + step) * each] for t in (given, y))
            operands, seen = (part, weight), held[i : i + step]
            origins = Origins(len(seen))
            add_rows(sums, product, operands, wanted, origins, seen, 0, torch.Generator())
        found.append(sums)
    for sums in found[1:]:
        for one, other in zip(found[0], sums, strict=True):
            assert one.count == other.count
            for field in ("xx", "xy", "yy", "x", "y"):
                torch.testing.assert_close(getattr(one.raw(), field), getattr(other.raw(), field))
                about = (sums.centered() for sums in (one, other))
                torch.testing.assert_close(*(getattr(sums, field) for sums in about))
    assert found[0][0].count == 2 * found[0][1].count
