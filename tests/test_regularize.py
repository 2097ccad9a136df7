"""Penalties against NumPy, and their slopes against finite differences."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.errors import InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.trace import trace
from rarefy.pruning.sparsity.masks import Masks
from rarefy.pruning.sparsity.regularize import L1, GroupLasso, GrowingL2, Slimming
from rarefy.schedules import Linear

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1),
        nn.Flatten(), nn.Linear(16, 2),
    ).double()  # fmt: skip
    nn.init.uniform_(NET[1].weight)
    X = torch.randn(8, 2, 2, 2).double()
    Y = torch.randint(2, (8,))

NETWORK = trace(NET, X)
MASKS = Masks({"0.weight": torch.rand(3, 2, 3, 3) > 0.5})


def array(path: str) -> np.ndarray:
    return NET.get_parameter(path).detach().numpy()


def lasso() -> float:
    """Written out for this network: a unit's filter, bias, scale, shift and what reads it."""
    total = 0.0
    first = [array(p) for p in ("0.weight", "0.bias", "1.weight", "1.bias")]
    for unit in range(3):
        parts = [a[unit].ravel() for a in first] + [array("3.weight")[:, unit].ravel()]
        joined = np.concatenate(parts)
        total += np.sqrt(joined.size) * np.linalg.norm(joined)
    for unit in range(4):
        read = array("5.weight")[:, 4 * unit : 4 * unit + 4].ravel()
        joined = np.concatenate([array("3.weight")[unit].ravel(), array("3.bias")[[unit]], read])
        total += np.sqrt(joined.size) * np.linalg.norm(joined)
    return total


CASES = {
    "l1": (L1(0.1), lambda: 0.1 * sum(np.abs(array(f"{i}.weight")).sum() for i in (0, 3, 5))),
    "slimming": (Slimming(0.2), lambda: 0.2 * np.abs(array("1.weight")).sum()),
    "lasso": (GroupLasso(NETWORK, 0.3), lambda: 0.3 * lasso()),
    "growing": (
        GrowingL2(MASKS, 0.4),
        lambda: 0.2 * (array("0.weight")[~MASKS["0.weight"].numpy()] ** 2).sum(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_penalty_is_its_formula(name) -> None:
    penalty, expected = CASES[name]
    found = penalty(NET)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected(), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_slopes_are_those_of_the_formula(name) -> None:
    penalty, expected = CASES[name]
    for path in ("0.weight", "1.weight", "3.weight"):
        parameter = NET.get_parameter(path)
        (slope,) = torch.autograd.grad(penalty(NET), parameter, allow_unused=True)
        slope = torch.zeros_like(parameter) if slope is None else slope
        for index in (0, parameter.numel() - 1):
            flat = parameter.data.view(-1)
            value, sides = float(flat[index]), []
            for step in (1e-6, -1e-6):
                flat[index] = value + step
                sides.append(expected())
            flat[index] = value
            estimate = (sides[0] - sides[1]) / 2e-6
            assert float(slope.view(-1)[index]) == pytest.approx(estimate, abs=1e-5)


def test_a_unit_at_zero_has_no_slope() -> None:
    model = copy.deepcopy(NET)
    for group in NETWORK.groups:
        for member in group.members:
            if member.path in dict(model.named_parameters()):
                model.get_parameter(member.path).data.zero_()
    value = GroupLasso(NETWORK, 1.0)(model)
    value.backward()
    assert value.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_strengths_may_change_with_the_step() -> None:
    penalty = L1(Linear(0.0, 1.0, steps=10))
    assert penalty(NET, 0).item() == 0
    assert penalty(NET, 5).item() == pytest.approx(L1(0.5)(NET).item())


def test_a_rewritten_graph_has_the_same_scales() -> None:
    model = graph_model(copy.deepcopy(NET), capture(NET, X))
    assert Slimming(1.0)(model).item() == pytest.approx(Slimming(1.0)(NET).item())


def test_rarefys_loop_adds_it_to_the_loss() -> None:
    options = {"epochs": 60, "lr": 0.05, "progress": False, "weight_decay": 0.0}
    free = rf.train(NET, [(X, Y)], **options)
    held = rf.train(NET, [(X, Y)], regularizer=L1(0.05), **options)
    assert L1(1.0)(held) < 0.5 * L1(1.0)(free)
    seen: list[int] = []

    def noted(model: nn.Module, step: int) -> torch.Tensor:
        seen.append(step)
        return L1(0.0)(model)

    same = rf.distill(NET, NET, [X, X], regularizer=noted, epochs=2, progress=False)
    assert seen == [0, 1, 2, 3]
    assert isinstance(same, nn.Module)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="strength"):
        L1(-1.0)
    with pytest.raises(InputError, match="strength"):
        Slimming(float("nan"))
    with pytest.raises(InputError, match="nothing that it concerns"):
        Slimming(0.1)(nn.Linear(2, 2))
    with pytest.raises(InputError, match="nothing that it concerns"):
        GroupLasso(NETWORK, 0.1)(nn.ReLU())
    with pytest.raises(InputError, match="strength"):
        L1("1e-5")
    with pytest.raises(InputError, match="trace"):
        GroupLasso(NET, 0.1)
    with pytest.raises(InputError, match="masks"):
        GrowingL2({"0.weight": 0.5}, 0.1)


def test_penalties_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"another network: 0\.weight had shape"):
        GroupLasso(trace(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), torch.zeros(2, 3)), 0.1)(
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        )
    with pytest.raises(InputError, match=r"masks\['weight'\].*shape"):
        GrowingL2({"weight": torch.ones(2, 2)}, 0.1)(nn.Linear(3, 2))
