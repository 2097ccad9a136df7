"""Teachers: what they answer, who learns, who follows, and who must not change."""

import copy
import math

import pytest
import torch
from torch import nn

from rarefy.copies import fingerprint
from rarefy.errors import InputError, TrainingError
from rarefy.training.teachers import Aside, Earlier, Ensemble, One, Peer, as_teacher

torch.set_num_threads(1)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, classes)
        )


def start(teacher, student=None):
    return as_teacher(teacher, "distill(teacher)").start(student or net(9), "distill(teacher)")


def test_a_network_answers_in_eval_mode_without_gradients() -> None:
    given = net().train()
    tutor = start(given).train()
    answers = tutor(X)
    assert torch.equal(answers, copy.deepcopy(given).eval()(X))
    assert not answers.requires_grad
    assert given.training
    assert all(p.requires_grad for p in given.parameters())
    assert tutor.network is not given
    assert not list(tutor.parameters())
    assert not tutor.state_dict()
    assert next(tutor.double().network.parameters()).dtype == torch.float64


def test_what_is_no_teacher() -> None:
    with pytest.raises(InputError, match="a function is no teacher"):
        as_teacher(test_what_is_no_teacher, "distill(teacher)")


def test_a_network_that_changed_is_named() -> None:
    tutor = start(net())
    tutor.finish("distill(teacher)")
    with torch.no_grad():
        next(tutor.network.buffers()).add_(1)
    with pytest.raises(TrainingError, match=r"the teacher's .* changed while it only answered"):
        tutor.finish("distill(teacher)")


def test_an_earlier_student_is_a_copy() -> None:
    student = net(3)
    tutor = start(Earlier(), student)
    assert fingerprint(tutor.network) == fingerprint(student)
    with torch.no_grad():
        student[0].weight.add_(1)
    assert fingerprint(tutor.network) != fingerprint(student)


def test_a_mean_teacher_is_the_moving_average() -> None:
    student, decay = net(3), 0.6
    tutor = start(Earlier(decay), student)
    wanted = student[0].weight.detach().double()
    mean = student[1].running_mean.double()
    for step in range(1, 6):
        with torch.no_grad():
            student[0].weight.add_(step)
            student[1].running_mean.add_(1.0)
            student[1].num_batches_tracked.add_(1)
        tutor.after_step(student)
        d = min(decay, 1 - 1 / (step + 1))
        wanted = d * wanted + (1 - d) * student[0].weight.detach().double()
        mean = d * mean + (1 - d) * student[1].running_mean.double()
    assert torch.allclose(tutor.network[0].weight.double(), wanted, atol=1e-5)
    assert torch.allclose(tutor.network[1].running_mean.double(), mean, atol=1e-5)
    assert tutor.network[1].num_batches_tracked == 5
    assert tutor.state_dict()["steps"] == 5  # goes on after it is saved and loaded
    assert not tutor.train()(X).requires_grad
    assert not tutor.network.training
    tutor.finish("distill(teacher)")
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="decay"):
            Earlier(wrong)


def test_a_peer_learns() -> None:
    given = net(4).train()
    tutor = start(Peer(given)).train()
    assert tutor.network.training
    assert tutor(X).requires_grad
    assert len(list(tutor.parameters())) == len(list(given.parameters()))
    with torch.no_grad():
        assert not tutor(X).requires_grad
    tutor.finish("distill(teacher)")
    assert not tutor.network.training


def test_nan_in_any_network_is_named() -> None:
    bad = net()
    with torch.no_grad():
        bad[3].bias[0] = math.nan
    for teacher in (bad, Ensemble([bad]), Peer(bad)):
        with pytest.raises(InputError, match=r"distill\(teacher\).*3\.bias' holds NaN"):
            start(teacher)


def test_aside_is_hidden_but_moves() -> None:
    held = net()
    holder = nn.Sequential(Aside(held)).train()
    assert not list(holder.parameters())
    assert not held.training
    assert One(held).network is held
    holder.double()
    assert held[0].weight.dtype == torch.float64
