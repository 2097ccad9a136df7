"""The objective: what is trained, what only answers, and gradients under several processes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.distillation.losses import CTC, KD
from rarefy.errors import InputError
from rarefy.training.objective import Objective
from rarefy.training.teachers import Aside, One, Peer

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


class Tokens(nn.Module):
    """Logits of every position of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids)


PADDED = {
    "input_ids": torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
}


@pytest.mark.parametrize(
    "label_loss",
    [lambda out, y: F.cross_entropy(out.mT, y), lambda out, y, **given: F.cross_entropy(out.mT, y)],
)
def test_a_loss_of_labels_need_not_take_a_mask(label_loss) -> None:
    labels = torch.tensor([[1, 2, 0, -100], [3, -100, -100, -100]])
    student, teacher = Tokens(), One(Tokens()).start(Tokens(), "distill(teacher)")
    found = [
        Objective("distill", student, KD(), teacher, 0.5, loss)(PADDED, labels)
        for loss in (None, label_loss)
    ]
    assert torch.allclose(*found)


def test_a_loss_against_a_teacher_has_to_know_of_padding() -> None:
    teacher = One(Tokens()).start(Tokens(), "distill(teacher)")
    for loss in (F.mse_loss, nn.MSELoss(), lambda a, b: (a - b).square().mean()):
        with pytest.raises(InputError, match=r"takes no mask=.*padding would count"):
            Objective("distill", Tokens(), loss, teacher)(PADDED, None)


def test_training_on_labels_knows_of_padding_as_distillation_does() -> None:
    network, labels = Tokens(), torch.tensor([[1, 2], [3, -100]])
    found = Objective("train", network, CTC())(PADDED, labels)
    log_q = network(**PADDED).log_softmax(-1).transpose(0, 1)
    wanted = F.ctc_loss(log_q, labels.clamp_min(0), (3, 2), (2, 1))
    assert torch.allclose(found, wanted)
    plain = Objective("train", network, lambda out, y: out.mean())
    assert torch.allclose(plain(PADDED, labels), network(**PADDED).mean())


class Subsampled(Tokens):
    """Every second position, with its mask."""

    def forward(self, input_ids, attention_mask):
        return {"logits": self.embed(input_ids)[:, ::2], "mask": attention_mask[:, ::2]}


def test_a_network_may_give_the_mask_of_its_logits() -> None:
    network, teacher = Subsampled(), One(Subsampled()).start(Subsampled(), "distill(teacher)")
    labels = torch.tensor([[1], [3]])
    found = Objective("distill", network, KD(2), teacher, 0.5, CTC())(PADDED, labels)
    ours, theirs = (n(**PADDED)["logits"] for n in (network, teacher.network))
    real = network(**PADDED)["mask"].bool()
    soft = 4 * F.kl_div(
        (ours / 2).log_softmax(-1)[real], (theirs / 2).softmax(-1)[real], reduction="batchmean"
    )
    hard = F.ctc_loss(ours.log_softmax(-1).transpose(0, 1), labels, (2, 1), (1, 1))
    assert torch.allclose(found, 0.5 * soft + 0.5 * hard)
    assert torch.allclose(Objective("train", network, CTC())(PADDED, labels), hard)


def test_a_peer_gets_no_gradient_as_the_teacher() -> None:
    """Whatever the loss does with its second argument: each learns from its own term alone."""
    student, x = net(), torch.randn(5, 4)
    tutor = Peer(net()).start(student, "distill(teacher)")
    objective = Objective("distill", student, F.mse_loss, tutor).eval()
    objective(x, None).backward()
    for own, its in ((student, tutor.network), (tutor.network, student)):
        wanted = copy.deepcopy(own)
        wanted.zero_grad()
        F.mse_loss(wanted(x), its(x).detach()).backward()
        for p, q in zip(own.parameters(), wanted.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda a, b: (a - b).square(), r"a tensor of shape \(5, 3\)"),
        (lambda a, b: F.mse_loss(a, b).item(), "a float"),
        (lambda a, b: (F.mse_loss(a, b), a), "a tuple"),
    ],
)
def test_a_loss_is_one_number(loss, what) -> None:
    """The label loss must not hide that the teacher's says nothing."""
    x, y = torch.randn(5, 4), torch.zeros(5).long()
    with pytest.raises(InputError, match=rf"distill\(loss\): it gives {what}"):
        Objective("distill", net(), loss, tutor(), 0.1)(x, y)
    with pytest.raises(InputError, match=rf"distill\(label_loss\): it gives {what}"):
        Objective("distill", net(), KD(), tutor(), 0.1, loss)(x, F.one_hot(y, 3).float())


def test_a_loss_without_a_gradient_is_refused_beside_one_of_labels() -> None:
    x, y = torch.randn(5, 4), torch.zeros(5).long()
    objective = Objective("distill", net(), lambda a, b: F.mse_loss(a.detach(), b), tutor(), 0.1)
    with pytest.raises(InputError, match=r"distill\(loss\): no gradient comes from it"):
        objective(x, y)
    with torch.no_grad():
        objective(x, y)
