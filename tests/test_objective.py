"""The objective: what is trained, what only answers, and gradients under several processes."""

import copy

import torch
from torch import nn

from rarefy.distillation.losses import KD
from rarefy.training.objective import Objective
from rarefy.training.teachers import Aside, One

torch.set_num_threads(1)


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def tutor():
    return One(net()).start(net(), "distill(teacher)")


def test_what_is_trained_is_what_is_registered() -> None:
    objective = Objective("distill", net(), nn.MSELoss(), tutor())
    student = {f"network.{name}" for name, _ in objective.network.named_parameters()}
    assert {name for name, _ in objective.named_parameters()} == student
    assert not any("teacher" in key or "loss" in key for key in objective.state_dict())


def test_modes_are_right_after_train() -> None:
    objective = Objective("distill", net(), KD(), tutor())
    for mode in (True, False, True):
        objective.train(mode)
        assert all(m.training == mode for m in objective.network.modules())
        assert not any(m.training for m in objective.teachers["teacher"].modules())


def test_what_is_aside_moves_along_and_lets_gradients_pass() -> None:
    held = net()
    aside = nn.ModuleList([Aside(held)])
    aside.double()
    assert {p.dtype for p in held.parameters()} == {torch.float64}
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    aside[0](x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in held.parameters())


def test_a_loss_that_is_a_module_is_neither_changed_nor_trained() -> None:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        def forward(self, student, teacher):
            return (self.net(student) - self.net(teacher)).square().mean()

    loss = Perceptual()
    kept = copy.deepcopy(loss.state_dict())
    objective = Objective("distill", net(), loss, tutor()).train()
    objective(torch.randn(5, 4), None).backward()
    assert all(torch.equal(v, kept[k]) for k, v in loss.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in objective.loss.module.state_dict().items())
    assert all(p.grad is not None for p in objective.parameters())
    assert loss.training
