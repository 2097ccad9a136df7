"""Learned rounding, against every rounding of small layers and against its own formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy as rf
from rarefy import schemes
from rarefy.errors import InputError
from rarefy.pruning.repairing import rounding
from rarefy.pruning.repairing.grids import Grid
from rarefy.pruning.repairing.rounding import ROUNDINGS, descended, on_grid, relaxed

torch.set_num_threads(1)


def case(outputs: int, unknowns: int, seed: int, group: int = 0) -> tuple[Tensor, Tensor, Grid]:
    """Weights, the Gram matrix of inputs that depend on one another, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, unknowns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(unknowns, unknowns, generator=generator, dtype=torch.float64)
    x = x + 2 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    w = torch.randn(1, outputs, unknowns, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.3, 0.6, outputs, dtype=torch.float64)[None, :, None]
    if group:
        scale = scale * (1 + torch.arange(unknowns) // group)
    return w, (x.T @ x)[None], Grid(scale, torch.zeros_like(scale), -7, 7)


def cost(w: Tensor, optimum: Tensor, hessian: Tensor) -> Tensor:
    return (((w - optimum) @ hessian) * (w - optimum)).sum(2)


def all_roundings(w: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """The least error of each output over every choice of up and down."""
    steps = w / grid.scale
    choices = torch.tensor(list(itertools.product((0, 1), repeat=w.shape[2])), dtype=w.dtype)
    every = (steps.floor()[0] + choices[:, None]).clamp(grid.low, grid.high) * grid.scale[0]
    return cost(every, w, hessian[0]).amin(0)


def test_the_names_are_those_of_the_options() -> None:
    assert tuple(ROUNDINGS) == schemes.ROUNDINGS


def test_near_the_best_of_all_ups_and_downs_and_nearer_than_the_others() -> None:
    totals = {"best": 0.0, "learned": 0.0, "gptq": 0.0, "nearest": 0.0}
    for seed in range(12):
        w, hessian, grid = case(4, 8, seed, group=4 * (seed % 2))
        best = all_roundings(w, hessian, grid)
        found = {
            name: cost(on_grid(w, hessian, grid, None, name), w, hessian) for name in ROUNDINGS
        }
        nearest = cost(grid.nearest(w), w, hessian)
        for error in found.values():
            assert bool((error <= nearest * (1 + 1e-9)).all())
        totals["best"] += float((best / nearest).sum())
        totals["nearest"] += float(nearest.numel())
        for name, error in found.items():
            totals[name] += float((error / nearest).sum())
    assert totals["learned"] < 1.1 * totals["best"]
    assert totals["learned"] < 0.9 * totals["gptq"] < totals["nearest"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0, 3]))
def test_on_the_grid_and_never_worse_than_the_start(seed, outputs, unknowns, group) -> None:
    w, hessian, grid = case(outputs, unknowns, seed, group)
    nothing = torch.zeros_like(w, dtype=torch.bool)
    start = grid.nearest(w)
    found = descended(start, w, hessian, grid, nothing)
    assert bool((cost(found, w, hessian) <= cost(start, w, hessian) * (1 + 1e-9)).all())
    assert torch.equal(grid.nearest(found), found)


def test_blocks_of_columns_change_nothing(monkeypatch) -> None:
    w, hessian, grid = case(5, 20, 0)
    nothing = torch.zeros_like(w, dtype=torch.bool)
    found = []
    for block in (1, 7, 128):
        monkeypatch.setattr(rounding, "BLOCK", block)
        found.append(descended(grid.nearest(w), w, hessian, grid, nothing))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_choices_are_the_two_neighbors_and_zeros_stay() -> None:
    w, hessian, grid = case(4, 12, 3)
    gone = torch.zeros_like(w, dtype=torch.bool)
    gone[:, :, 1::3] = True
    found = relaxed(w.masked_fill(gone, 0.0), hessian, grid, gone)
    steps = (found / grid.scale)[~gone]
    assert not found[gone].any()
    torch.testing.assert_close(steps, steps.round())
    assert bool(((steps - (w / grid.scale)[~gone]).abs() < 1).all())
    assert not on_grid(w.masked_fill(gone, 0.0), hessian, grid, gone, "learned")[gone].any()


def test_inputs_that_do_not_depend_on_one_another_leave_the_nearest() -> None:
    w, _, grid = case(3, 6, 1)
    hessian = torch.diag(torch.linspace(1, 3, 6, dtype=torch.float64))[None]
    torch.testing.assert_close(on_grid(w, hessian, grid, None, "learned"), grid.nearest(w))


def test_a_grid_with_a_zero_point_and_weights_beyond_it() -> None:
    w, hessian, _ = case(2, 5, 2)
    scale = torch.full((1, 2, 1), 0.2, dtype=torch.float64)
    grid = Grid(scale, torch.full_like(scale, 5), 0, 15)
    found = on_grid(3 * w, hessian, grid, None, "learned")
    steps = found / scale
    assert float(steps.min()) >= -5 - 1e-9
    assert float(steps.max()) <= 10 + 1e-9


# --- in networks ---------------------------------------------------------------------------------


def net_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    base = torch.randn(160, 3, 1, 1)
    return net.eval(), base + 0.5 * torch.randn(160, 3, 6, 6)


def error(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - other(x)).square().mean())


def test_weights_alone() -> None:
    net, x = net_and_data()
    found = {
        method: rf.quantize(net, [x[:96]], rf.WeightOnly(bits=3, method=method))
        for method in ("rtn", "learned")
    }
    again = rf.quantize(net, [x[:96]], rf.WeightOnly(bits=3, method="learned"))
    for path, tensor in again.state_dict().items():
        assert torch.equal(tensor, found["learned"].state_dict()[path])
    errors = found["learned"].quantization.rounding
    assert errors.keys() == {"0", "3", "6"}
    assert all(after <= before for before, after in errors.values())
    assert error(net, found["learned"], x[96:]) < 0.5 * error(net, found["rtn"], x[96:])
    assert found["rtn"].quantization.rounding == {}
    with pytest.raises(InputError, match="needs calibration data"):
        rf.quantize(net, None, rf.WeightOnly(method="learned"))


@pytest.mark.parametrize("method", schemes.ROUNDINGS)
def test_static_int8(method) -> None:
    net, x = net_and_data()
    plain, solved = (
        rf.quantize(net, [x[:96]], rf.Int8(rounding=name)) for name in ("nearest", method)
    )
    assert solved.quantization.layers.keys() == plain.quantization.layers.keys()
    errors = solved.quantization.rounding
    assert errors.keys() == {"0", "3", "6"}
    assert any(after < before for before, after in errors.values())
    assert all(after <= before for before, after in errors.values())
    assert error(net, solved, x[:96]) <= error(net, plain, x[:96])
    for node in solved.graph.calls:
        if node.kind == "fake_quantize_per_channel_affine":
            weight, scale, _ = (solved.tensor(solved.graph.by_name[n].path) for n in node.inputs)
            steps = weight.detach() / scale.view(-1, *[1] * (weight.ndim - 1))
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_the_metric_is_that_of_the_network_returned() -> None:
    net, x = net_and_data()
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(error(net, model, x))
        return -seen[-1]

    q = rf.quantize(net, [x[:96]], rf.Int8(rounding="gptq"), evaluate=evaluate, max_drop=1.0)
    assert seen[-1] == pytest.approx(error(net, q, x))


def test_unknown_roundings_are_refused() -> None:
    net, x = net_and_data()
    q = rf.quantize(net, [x])
    with pytest.raises(InputError, match="'gptq' or 'learned'"):
        rf.repair(net, q, [x], rounding="up")
    with pytest.raises(InputError, match="unknown rounding"):
        rf.Int8(rounding="up")
