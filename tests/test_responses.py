"""Losses of outputs against an independent float64 reference in NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from loss_cases import float32_inside, gradients_agree, mask_for, pair, rows
from rarefy.distillation.losses import KD, MSE
from rarefy.errors import InputError

LAYOUTS = [((5, 7), None), ((3, 4, 7), None), ((2, 7, 3, 4), 1), ((2, 3, 4, 7), -1), ((3, 7, 4), 1)]


SMALL = [((3, 4), None), ((2, 2, 3), None), ((1, 3, 2, 2), 1), ((2, 3, 2), 1)]


def kd_reference(student, teacher, t, dim, keep=slice(None)):
    p = log_softmax(rows(teacher, dim) / t, axis=1)
    q = log_softmax(rows(student, dim) / t, axis=1)
    each = [
        sum(np.exp(a) * (a - b) for a, b in zip(*r, strict=True)) for r in zip(p, q, strict=True)
    ]
    return t * t * float(np.mean(np.array(each)[keep]))


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20.0])
def test_kd_equals_the_paper(shape, dim, temperature) -> None:
    student, teacher = pair(shape)
    mask = mask_for(shape, dim)
    loss = KD(temperature, dim)
    wanted = kd_reference(student, teacher, temperature, dim)
    assert loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    wanted = kd_reference(student, teacher, temperature, dim, mask.flatten().numpy())
    assert loss(student, teacher, mask).item() == pytest.approx(wanted, rel=1e-12)
    assert loss(student, teacher, mask.long()).item() == loss(student, teacher, mask).item()


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_mse_equals_its_definition(shape, dim) -> None:
    student, teacher = pair(shape)
    mask = mask_for(shape, dim)
    keep = mask.flatten().numpy()
    squared = (rows(student, dim) - rows(teacher, dim)) ** 2
    assert MSE(dim)(student, teacher).item() == pytest.approx(squared.mean(), rel=1e-12)
    assert MSE(dim)(student, teacher, mask).item() == pytest.approx(squared[keep].mean(), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 9),
    st.floats(0.1, 50),
    st.floats(0.01, 100),
    st.integers(0, 9),
)
def test_kd_properties(b, c, temperature, scale, seed) -> None:
    student, teacher = pair((b, c), seed, scale)
    loss = KD(temperature)
    value = loss(student, teacher).item()
    assert value == pytest.approx(
        kd_reference(student, teacher, temperature, None), rel=1e-6, abs=1e-9
    )
    assert value >= -1e-9
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-9)
    shifted = loss(student + 5, teacher - 3).item()
    assert shifted == pytest.approx(value, rel=1e-6, abs=1e-8 * temperature**2)
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1)).item()
    assert twice == pytest.approx(value, rel=1e-9, abs=1e-12)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    assert loss(student[:, order], teacher[:, order]).item() == pytest.approx(
        value, rel=1e-6, abs=1e-9
    )


def test_kd_at_high_temperature_is_half_the_mse_of_centered_logits() -> None:
    student, teacher = (x - x.mean(1, keepdim=True) for x in pair((6, 10)))
    half = MSE()(student, teacher).item() / 2
    assert KD(1e4)(student, teacher).item() == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize(("shape", "dim"), SMALL)
def test_gradients(shape, dim) -> None:
    student, teacher = pair(shape)
    mask = mask_for(shape, dim)
    assert gradients_agree(KD(2.0, dim), student, teacher, mask)
    assert gradients_agree(MSE(dim), student, teacher)


def test_the_size_of_gradients_does_not_depend_on_the_temperature() -> None:
    student, teacher = pair((64, 10), scale=0.1)
    norms = []
    for temperature in (1.0, 2.0, 8.0):
        leaf = student.clone().requires_grad_()
        KD(temperature)(leaf, teacher).backward()
        norms.append(leaf.grad.norm().item())
    assert max(norms) / min(norms) < 1.1


@pytest.mark.parametrize("loss", [KD(4.0), MSE()])
def test_half_precision_is_accumulated_in_float32(loss) -> None:
    assert float32_inside(loss, *pair((8, 512, 50)), rel=1e-5)


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    value = KD(1.0)(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()


def test_classes_that_both_rule_out_count_for_nothing() -> None:
    student, teacher = pair((4, 5))
    wide = [torch.cat([x, torch.full((4, 2), -math.inf)], 1) for x in (student, teacher)]
    wide[0].requires_grad_()
    value = KD(3.0)(*wide)
    value.backward()
    assert value.item() == pytest.approx(KD(3.0)(student, teacher).item())
    assert wide[0].grad.isfinite().all()


def test_a_class_that_only_the_student_rules_out_is_infinitely_wrong() -> None:
    assert KD()(torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)).item() == math.inf


def test_masked_positions_may_hold_anything() -> None:
    student, teacher = pair((2, 3, 4))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    wanted = KD()(student, teacher, mask).item()
    student[~mask], teacher[~mask] = math.nan, math.inf
    student.requires_grad_()
    value = KD()(student, teacher, mask)
    value.backward()
    assert value.item() == wanted
    assert (student.grad[~mask] == 0).all()
    assert student.grad.isfinite().all()


def test_nothing_that_counts_gives_zero_not_nan() -> None:
    student, teacher = pair((2, 3, 4))
    student.requires_grad_()
    none = torch.zeros(2, 3, dtype=torch.bool)
    for loss in (KD(), MSE()):
        value = loss(student, teacher, none)
        value.backward()
        assert value.item() == 0


def test_nan_is_not_hidden() -> None:
    student, teacher = pair((2, 3))
    teacher[0, 0] = math.nan
    assert math.isnan(KD()(student, teacher).item())


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_is_positive(temperature) -> None:
    with pytest.raises(InputError, match="temperature"):
        KD(temperature)


@pytest.mark.parametrize("loss", [KD(), MSE()])
def test_shapes_that_do_not_fit(loss) -> None:
    with pytest.raises(InputError, match="10 and 100 classes"):
        loss(torch.zeros(2, 10), torch.zeros(2, 100))
    with pytest.raises(InputError, match="same inputs"):
        loss(torch.zeros(2, 10), torch.zeros(3, 10))
    with pytest.raises(InputError, match=r"dim=1"):
        loss(torch.zeros(2, 5, 3, 3), torch.zeros(2, 5, 3, 3))
    with pytest.raises(InputError, match=r"\(B, C\)"):
        loss(torch.zeros(5), torch.zeros(5))
    with pytest.raises(InputError, match=r"mask of shape \(2,\)"):
        loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), torch.ones(2))
    with pytest.raises(InputError, match="floating"):
        loss(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())
