"""Rounding with reconstruction, against all roundings of small layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.graph.capture import capture
from rarefy.grid import Grid as WeightGrid
from rarefy.pruning.repairing import rounding
from rarefy.pruning.repairing.grids import Grid, of_quantizer, of_rounded
from rarefy.pruning.repairing.rounding import on_grid
from rarefy.pruning.running.products import Product, positions
from rarefy.pruning.running.solvable import Layers, picked

torch.set_num_threads(1)


def case(outputs: int, unknowns: int, seed: int = 0) -> tuple[Tensor, Tensor, Grid]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, unknowns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(unknowns, unknowns, generator=generator, dtype=torch.float64)
    w = torch.randn(1, outputs, unknowns, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.3, 0.6, outputs, dtype=torch.float64)[None, :, None]
    return w, (x.T @ x)[None], Grid(scale, torch.zeros_like(scale), -3, 3)


def cost(w: Tensor, optimum: Tensor, hessian: Tensor) -> Tensor:
    return (((w - optimum) @ hessian) * (w - optimum)).sum(2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [3, 128])
def test_between_the_nearest_values_and_the_best_of_all(seed, block, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "BLOCK", block)
    w, hessian, grid = case(3, 4, seed)
    found = on_grid(w, hessian, grid)
    ticks = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64)
    every = ticks[:, None, :] * grid.scale[0][None]  # (roundings, outputs, unknowns)
    best = cost(every, w, hessian[0]).amin(0)
    nearest = cost(grid.nearest(w), w, hessian)[0]
    own = cost(found, w, hessian)[0]
    assert bool((best <= own * (1 + 1e-9)).all())
    assert bool((own <= nearest * (1 + 1e-9)).all())
    q = found / grid.scale
    torch.testing.assert_close(q, q.round())
    assert float(q.abs().max()) <= 3


def test_blocks_of_columns_change_nothing(monkeypatch) -> None:
    w, hessian, grid = case(5, 20)
    found = []
    for block in (1, 7, 128):
        monkeypatch.setattr(rounding, "BLOCK", block)
        found.append(on_grid(w, hessian, grid))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert bool((cost(found[0], w, hessian) < cost(grid.nearest(w), w, hessian)).any())


def test_zeros_stay() -> None:
    w, hessian, grid = case(4, 8)
    gone = torch.zeros_like(w, dtype=torch.bool)
    gone[:, :, 1::3] = True
    assert not on_grid(w, hessian, grid, gone)[gone].any()


def test_a_grid_with_a_zero_point() -> None:
    scale = torch.tensor([[[0.5]]], dtype=torch.float64)
    grid = Grid(scale, torch.full_like(scale, 2), 0, 7)
    row = torch.tensor([[[-3.0, -0.9, 0.3, 9.0]]], dtype=torch.float64)
    assert grid.nearest(row).tolist() == [[[-1.0, -1.0, 0.5, 2.5]]]
    assert grid.column(1) is grid


def test_every_block_of_columns_has_a_range_of_its_own() -> None:
    w, hessian, _ = case(4, 10)
    scale = torch.tensor([[0.25, 0.5, 1.0]] * 4)
    weight = WeightGrid(scale, torch.tensor(0), 0, -3, 3, 4)
    (layer,) = products_of(nn.Linear(10, 4), torch.zeros(2, 10))
    grid = of_rounded(weight, layer)
    assert grid is not None
    expected = weight.nearest(w[0].float()).double()
    torch.testing.assert_close(grid.nearest(w)[0], expected)
    found = on_grid(w, hessian, grid)
    assert bool((cost(found, w, hessian) <= cost(grid.nearest(w), w, hessian)).all())
    assert torch.equal(weight.nearest(found[0].float()), found[0].float())
    (other,) = products_of(nn.Linear(13, 4), torch.zeros(2, 13))
    assert of_rounded(weight, other) is None


def products_of(net: nn.Module, *inputs: Tensor) -> list[Product]:
    return list(Layers(capture(net.eval(), inputs).graph).products.values())


LAYERS = {
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.zeros(2, 4, 5, 5), 0),
    "transposed": (nn.ConvTranspose2d(4, 6, (3, 2)), torch.zeros(2, 4, 5, 5), 1),
    "transposed in groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.zeros(2, 4, 5), 1),
    "by inputs": (nn.Linear(5, 4), torch.zeros(2, 5), 1),
}


@pytest.mark.parametrize("group", [None, 2, 5])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_rows_of_a_rounded_layer_are_rounded_as_it_is(name, is_symmetric, group) -> None:
    net, x, axis = LAYERS[name]
    (layer,) = products_of(net, x)
    weight = torch.randn_like(net.weight)
    like = WeightGrid(torch.ones(()), torch.tensor(0), axis, -7, 7, group)
    size = like.shape_for(tuple(weight.shape))
    scale = torch.rand(size) / 3 + 0.1
    zero = torch.tensor(0) if is_symmetric else torch.randint(-3, 4, size)
    grid = WeightGrid(scale, zero, axis, -7, 7, group)
    rows = of_rounded(grid, layer)
    assert rows is not None
    found = rows.nearest(picked(weight, positions(layer)).double())
    expected = picked(grid.nearest(weight), positions(layer)).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_grid_of_a_quantized_layer_is_what_its_quantizer_rounds_to() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    q = rf.quantize(net.eval(), [torch.randn(16, 4, 5, 5)])
    layers = Layers(q.graph).products.values()
    assert [layer.path[0] for layer in layers] == ["0", "3"]
    for layer in layers:
        weight = torch.randn_like(q.tensor(layer.path)) / 5
        grid = of_quantizer(q, layer)
        assert grid is not None
        names = layer.entries.quantizer.inputs[1:]
        scale, zero = (q.tensor(q.graph.by_name[name].path) for name in names)
        expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
        found = grid.nearest(picked(weight, positions(layer)).double())
        torch.testing.assert_close(found.float(), picked(expected, positions(layer)))
