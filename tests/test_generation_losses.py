"""Losses of generators against an independent float64 reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from loss_cases import float32_inside, gradients_agree, mask_for, pair, rows
from rarefy.distillation.losses import JSD, KD, ReverseKL
from rarefy.errors import InputError

LAYOUTS = [((5, 7), None), ((3, 4, 7), None), ((2, 7, 3, 4), 1)]


def jsd_reference(student, teacher, beta, t, dim):
    q, p = (softmax(rows(x, dim) / t, axis=1) for x in (student, teacher))
    m = beta * p + (1 - beta) * q
    each = beta * rel_entr(p, m).sum(1) + (1 - beta) * rel_entr(q, m).sum(1)
    return t * t * np.mean(each)


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_both_equal_their_papers(shape, dim, temperature) -> None:
    student, teacher = pair(shape)
    q, p = (softmax(rows(x, dim) / temperature, axis=1) for x in (student, teacher))
    wanted = temperature**2 * rel_entr(q, p).sum(1).mean()
    assert ReverseKL(temperature, dim)(student, teacher).item() == pytest.approx(wanted, rel=1e-10)
    for beta in (0.1, 0.5, 0.9):
        wanted = jsd_reference(student, teacher, beta, temperature, dim)
        found = JSD(beta, temperature, dim)(student, teacher)
        assert found.item() == pytest.approx(wanted, rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.floats(0.01, 0.99), st.integers(0, 9))
def test_the_generalized_divergence_is_bounded_and_has_two_limits(classes, beta, seed) -> None:
    student, teacher = pair((3, classes), seed, scale=1.0)
    value = JSD(beta)(student, teacher).item()
    assert -1e-12 <= value <= math.log(2) + 1e-12
    assert JSD(1 - beta)(teacher, student).item() == pytest.approx(value, abs=1e-12)
    small = 1e-7
    forward, backward = KD(1)(student, teacher).item(), ReverseKL(1)(student, teacher).item()
    assert JSD(small)(student, teacher).item() / small == pytest.approx(forward, rel=1e-3)
    assert JSD(1 - small)(student, teacher).item() / small == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("loss", [ReverseKL(2.0), JSD(0.3, 2.0)])
def test_gradients_precision_and_masks(loss) -> None:
    student, teacher = pair((2, 3, 4))
    mask = mask_for((2, 3, 4), None)
    assert gradients_agree(loss, student, teacher, mask)
    assert float32_inside(loss, *pair((4, 64, 50)))
    wanted = loss(student[mask], teacher[mask]).item()
    student[~mask], teacher[~mask] = math.nan, math.inf
    assert loss(student.requires_grad_(), teacher, mask).item() == pytest.approx(wanted)
    loss(student, teacher, mask).backward()
    assert student.grad.isfinite().all()
    none = loss(student, teacher, torch.zeros(2, 3))
    assert none.item() == 0


@pytest.mark.parametrize("loss", [ReverseKL(), JSD()])
def test_classes_that_both_rule_out_count_for_nothing(loss) -> None:
    student, teacher = pair((4, 5))
    wide = [torch.cat([x, torch.full((4, 2), -math.inf)], 1) for x in (student, teacher)]
    wide[0].requires_grad_()
    value = loss(*wide)
    value.backward()
    assert value.item() == pytest.approx(loss(student, teacher).item())
    assert wide[0].grad.isfinite().all()


def test_what_only_one_rules_out() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    assert ReverseKL()(student, teacher).item() == math.inf
    assert ReverseKL()(teacher, student).item() == pytest.approx(math.log(2))
    assert JSD()(student, teacher).isfinite()
    leaf = student.clone().requires_grad_()
    JSD()(leaf, teacher).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0, 1, -0.1, math.nan])
def test_numbers_out_of_range(beta) -> None:
    with pytest.raises(InputError, match="beta"):
        JSD(beta)
    with pytest.raises(InputError, match="temperature"):
        ReverseKL(-1 if beta == 1 else beta)
    with pytest.raises(InputError, match="temperature"):
        JSD(temperature=0)
