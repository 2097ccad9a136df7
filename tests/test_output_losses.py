"""Losses of yes-or-no outputs and of real numbers against an independent float64 reference."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, huber, rel_entr

from loss_cases import float32_inside, gradients_agree, mask_for, pair, rows
from rarefy.distillation.losses import L1, L2, Binary, Huber
from rarefy.errors import InputError

REGRESSION = [L1(), L2(), Huber(0.7)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), None), ((3, 4, 2), None), ((2, 3, 4, 4), 1)])
def test_binary_equals_its_formula(shape, dim, temperature) -> None:
    student, teacher = pair(shape)
    q, p = (expit(rows(x, dim) / temperature) for x in (student, teacher))
    each = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(1)
    found = Binary(temperature, dim)(student, teacher)
    assert found.item() == pytest.approx(temperature**2 * each.mean(), rel=1e-9)
    mask = mask_for(shape, dim)
    found = Binary(temperature, dim)(student, teacher, mask).item()
    wanted = temperature**2 * each[mask.flatten().numpy()].mean()
    assert found == pytest.approx(wanted, rel=1e-9)


def test_binary_is_sound() -> None:
    assert gradients_agree(Binary(2.0), *pair((3, 4)))
    assert float32_inside(Binary(), *pair((32, 20)))
    student, teacher = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([[-1e4, 1e4]])
    value = Binary()(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()
    certain = torch.tensor([[math.inf, -math.inf]])
    assert Binary()(certain, certain).item() == 0
    with pytest.raises(InputError, match="temperature"):
        Binary(0)
    with pytest.raises(InputError, match="3 and 4 classes"):
        Binary()(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(6,), (5, 3), (2, 3, 4, 5), (2, 2, 2, 2, 2)])
def test_regression_equals_its_formula(shape) -> None:
    student, teacher = pair(shape)
    d = (student - teacher).flatten().numpy()
    assert L1()(student, teacher).item() == pytest.approx(np.abs(d).mean())
    assert L2()(student, teacher).item() == pytest.approx((d * d).mean())
    assert Huber(0.7)(student, teacher).item() == pytest.approx(huber(0.7, d).mean())


@pytest.mark.parametrize("loss", REGRESSION)
def test_regression_is_sound(loss) -> None:
    student, teacher = pair((2, 3, 4))
    assert gradients_agree(loss, student, teacher)
    assert float32_inside(loss, *pair((4, 3, 32, 32)))
    huge = [torch.tensor([x], dtype=torch.float16) for x in (6e4, -6e4)]
    assert loss(*huge).isfinite()


@pytest.mark.parametrize("loss", REGRESSION)
@pytest.mark.parametrize("of_mask", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3), (2,), (2, 1, 1, 1)])
def test_masks_of_regression(loss, of_mask) -> None:
    student, teacher = pair((2, 3, 4, 5))
    mask = torch.rand(of_mask, generator=torch.Generator().manual_seed(1)) < 0.6
    mask.view(-1)[0] = True
    counts = mask.view(*of_mask, *[1] * (4 - len(of_mask))).expand(2, 3, 4, 5)
    wanted = loss(student[counts], teacher[counts]).item()
    student[~counts], teacher[~counts] = math.nan, math.inf
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.item() == pytest.approx(wanted)
    assert student.grad.isfinite().all()
    assert loss(student, teacher, torch.zeros(of_mask)).item() == 0


def test_what_regression_refuses() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 4\)"):
        L2()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="int64"):
        L1()(torch.zeros(2).long(), torch.zeros(2).long())
    with pytest.raises(InputError, match=r"mask of shape \(3,\)"):
        L2()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))
    for delta in (0, -1, math.nan):
        with pytest.raises(InputError, match="delta"):
            Huber(delta)
