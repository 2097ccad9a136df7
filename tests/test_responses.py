"""Losses of outputs against an independent float64 reference in NumPy and SciPy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import pearsonr

from loss_cases import float32_inside, gradients_agree, mask_for, pair, rows
from rarefy.distillation.losses import (
    DIST,
    DKD,
    JSD,
    KD,
    MSE,
    NKD,
    SP,
    CrossEntropy,
    ReverseKL,
    Standardized,
)
from rarefy.errors import DataError, InputError
from rarefy.schedules import Linear

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


def test_the_number_of_classes_does_not_scale_kd() -> None:
    """``kl_div(reduction="mean")`` divides by it."""
    student, teacher = pair((4, 5))
    for dead in (0, 1000):
        wide = [torch.cat([x, torch.full((4, dead), -1e4)], 1) for x in (student, teacher)]
        assert KD(2)(*wide).item() == pytest.approx(KD(2)(student, teacher).item())


@pytest.mark.parametrize("loss", [KD(), MSE(), DKD(), NKD(), DIST(), Standardized()])
def test_sequences_are_rows_like_any_other(loss) -> None:
    """The length is no factor, and classes are not taken for positions."""
    student, teacher = pair((2, 7, 5))
    wanted = loss(student.flatten(0, 1), teacher.flatten(0, 1)).item()
    assert loss(student, teacher).item() == pytest.approx(wanted)
    maps = [x.view(2, 7, 1, 5).permute(0, 3, 1, 2) for x in (student, teacher)]
    assert replace(loss, dim=1)(*maps).item() == pytest.approx(wanted)
    mask = mask_for((2, 7, 5), None)
    picked = loss(student[mask], teacher[mask]).item()
    assert loss(student, teacher, mask).item() == pytest.approx(picked)


@pytest.mark.parametrize("loss", [KD(1), MSE(), DKD(temperature=1), NKD(), DIST(), Standardized()])
def test_large_half_precision_logits_stay_finite(loss) -> None:
    """``log(softmax(x))`` and squares in half precision do not."""
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = (torch.tensor(x, dtype=dtype) for x in ([[3e4, -3e4, 0]], [[0, 3e4, 1]]))
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


# --- standardized logits -------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_standardization_follows_sun(shape, dim) -> None:
    student, teacher = pair(shape)
    scaled = [
        [(r - r.mean()) / math.sqrt(np.mean((r - r.mean()) ** 2)) for r in rows(x, dim)]
        for x in (student, teacher)
    ]
    both = [torch.from_numpy(np.array(x)) for x in scaled]
    wanted = kd_reference(*both, 3.0, None)
    assert Standardized(KD(3), dim)(student, teacher).item() == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 9))
def test_scale_and_shift_are_left_to_the_student(scale, shift, seed) -> None:
    student, teacher = pair((4, 6), seed)
    wanted = Standardized()(student, teacher).item()
    found = Standardized()(scale * student + shift, teacher).item()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_standardized_sums_schedules_and_labels() -> None:
    student, teacher = pair((2, 3, 4))
    loss = Standardized(KD(Linear(8, 2, 10)) + 2 * DKD())
    assert loss.needs_labels
    assert not Standardized().needs_labels
    labels = torch.tensor([[0, 1, -100], [3, 2, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    z = [(x - x.mean(-1, True)) / x.std(-1, correction=0, keepdim=True) for x in (student, teacher)]
    wanted = KD(5)(*z, mask) + 2 * DKD()(*z, mask, labels=labels)
    found = loss.at_step(5)(student, teacher, mask, labels)
    assert found.item() == pytest.approx(wanted.item())
    assert gradients_agree(Standardized(DKD()), student, teacher, mask, labels=labels)


def test_equal_logits_have_no_direction() -> None:
    student = torch.full((2, 5), 0.1, requires_grad=True)
    value = Standardized()(student, pair((2, 5))[1].float())
    value.backward()
    assert value.isfinite()
    assert (student.grad == 0).all()


def test_what_cannot_be_standardized() -> None:
    with pytest.raises(InputError, match="logits of student and teacher"):
        Standardized(CrossEntropy())
    with pytest.raises(InputError, match="logits of student and teacher"):
        Standardized(SP())


# --- the true class and the others ---------------------------------------------------------------


def softmax(row, t):
    e = np.exp(row / t - np.max(row / t))
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dkd_reference(student, teacher, labels, alpha, beta, t, dim=None):
    total = []
    for s, z, y in zip(rows(student, dim), rows(teacher, dim), labels, strict=True):
        q, p = softmax(s, t), softmax(z, t)
        tckd = kl((p[y], 1 - p[y]), (q[y], 1 - q[y]))
        nckd = kl(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y]))
        total.append(alpha * tckd + beta * nckd)
    return t * t * float(np.mean(total))


def nkd_reference(student, teacher, labels, gamma, t):
    total = []
    for s, z, y in zip(rows(student, None), rows(teacher, None), labels, strict=True):
        others = softmax(np.delete(s, y), t), softmax(np.delete(z, y), t)
        distributed = sum(b * math.log(a) for a, b in zip(*others, strict=True))
        target = softmax(z, 1)[y] * math.log(softmax(s, 1)[y])
        total.append(-target - gamma * t * t * distributed)
    return float(np.mean(total))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_and_nkd_equal_their_papers(temperature) -> None:
    student, teacher = pair((6, 5))
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    wanted = dkd_reference(student, teacher, labels, 1.5, 6.0, temperature)
    found = DKD(1.5, 6.0, temperature)(student, teacher, labels=labels)
    assert found.item() == pytest.approx(wanted, rel=1e-10)
    wanted = nkd_reference(student, teacher, labels, 1.5, temperature)
    found = NKD(1.5, temperature)(student, teacher, labels=labels.int())
    assert found.item() == pytest.approx(wanted, rel=1e-10)


def test_dkd_in_every_layout() -> None:
    for shape, dim in LAYOUTS:
        student, teacher = pair(shape)
        mask = mask_for(shape, dim)
        labels = torch.randint(0, 7, mask.shape, generator=torch.Generator().manual_seed(3))
        flat = labels.flatten().tolist()
        wanted = dkd_reference(student, teacher, flat, 1.0, 8.0, 4.0, dim)
        assert DKD(dim=dim)(student, teacher, None, labels).item() == pytest.approx(wanted)
        ignored = labels.masked_fill(~mask, -100)
        for found in (
            DKD(dim=dim)(student, teacher, mask, labels),
            DKD(dim=dim)(student, teacher, labels=ignored),
        ):
            moved = [x.movedim(-1 if dim is None else dim, -1)[mask] for x in (student, teacher)]
            wanted = dkd_reference(*moved, labels[mask].tolist(), 1.0, 8.0, 4.0)
            assert found.item() == pytest.approx(wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.floats(0.5, 8), st.integers(0, 9))
def test_dkd_decomposes_hintons_loss(classes, temperature, seed) -> None:
    """Equation 5: KD = TCKD + (1 - p_target) * NCKD, example by example."""
    student, teacher = pair((1, classes), seed)
    labels = torch.tensor([seed % classes])
    tckd = DKD(1, 0, temperature)(student, teacher, labels=labels)
    nckd = DKD(0, 1, temperature)(student, teacher, labels=labels)
    p = torch.softmax(teacher / temperature, 1)[0, labels]
    wanted = KD(temperature)(student, teacher).item()
    assert (tckd + (1 - p) * nckd).item() == pytest.approx(wanted, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("loss", [DKD(), NKD(temperature=2)])
def test_losses_of_a_target_class(loss) -> None:
    student, teacher = pair((5, 4))
    labels = torch.tensor([0, 1, 2, 3, -100])
    assert loss.needs_labels
    assert gradients_agree(loss, student, teacher, labels=labels)
    assert gradients_agree(loss, *pair((2, 2, 3)), mask_for((2, 2, 3), None))
    assert float32_inside(loss, *pair((8, 64, 10)), labels=torch.zeros(8, 64).long())
    stand_in = loss(student, teacher, labels=teacher.argmax(1)).item()
    assert loss(student, teacher).item() == stand_in
    nothing = loss(student.requires_grad_(), teacher, labels=torch.full((5,), -100))
    nothing.backward()
    assert nothing.item() == 0
    with pytest.raises(DataError, match="label 4 is none of the 4"):
        loss(student, teacher, labels=labels + 1)
    with pytest.raises(DataError, match=r"class indices of shape \(5,\)"):
        loss(student, teacher, labels=teacher.softmax(1))
    with pytest.raises(DataError, match=r"class indices of shape \(5,\)"):
        loss(student, teacher, labels=labels[:4])
    with pytest.raises(InputError, match="one class"):
        loss(student[:, :1], teacher[:, :1])


# --- relations of classes ------------------------------------------------------------------------


def dist_reference(student, teacher, beta, gamma, t):
    q, p = (np.array([softmax(r, t) for r in rows(x, None)]) for x in (student, teacher))
    inter = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(q.T, p.T, strict=True)])
    return t * t * (beta * inter + gamma * intra)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_equals_the_paper(temperature) -> None:
    student, teacher = pair((6, 5), scale=1.0)
    wanted = dist_reference(student, teacher, 2.0, 0.5, temperature)
    found = DIST(2.0, 0.5, temperature)(student, teacher)
    assert found.item() == pytest.approx(wanted, rel=1e-9)
    assert gradients_agree(DIST(2.0, 0.5, temperature), student, teacher)
    assert float32_inside(DIST(), *pair((32, 10), scale=1.0), rel=1e-3)


def test_dist_of_classes_that_nobody_expects() -> None:
    """Probabilities near 0 correlate too, and their squares do not underflow."""
    student, teacher = pair((16, 4), dtype=torch.float32)
    wide = [torch.cat([x, x[:, :1] - 70], 1) for x in (student, teacher)]
    double = DIST(0, 1)(*(x.double() for x in wide)).item()
    assert DIST(0, 1)(*wide).item() == pytest.approx(double, rel=1e-4)


def test_dist_where_nothing_varies() -> None:
    teacher = pair((1, 5))[1].float()
    for student in (torch.full((1, 5), 0.1), pair((1, 5))[0].float()):
        student.requires_grad_()
        value = DIST(0, 1)(student, teacher)
        value.backward()
        assert value.item() == 1
        assert student.grad.isfinite().all()
    none = torch.zeros(1, 0, 5, requires_grad=True)
    DIST()(none, none.detach()).backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda v: DKD(alpha=v),
        lambda v: DKD(beta=v),
        lambda v: DKD(temperature=v),
        lambda v: NKD(gamma=v),
        lambda v: NKD(temperature=v),
        lambda v: DIST(beta=v),
        lambda v: DIST(gamma=v),
        lambda v: DIST(temperature=v),
    ],
)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "4"])
def test_numbers_of_losses_are_checked(make, value) -> None:
    with pytest.raises(InputError, match=r"must be a number.*Write "):
        make(value)


@pytest.mark.parametrize(
    "loss", [KD(), DKD(), NKD(), DIST(), ReverseKL(), JSD(), Standardized(KD(2))]
)
def test_one_class_teaches_nothing(loss) -> None:
    """The softmax of one logit is 1: such a loss is 0, and so is its gradient."""
    with pytest.raises(InputError, match=r"one class.*Binary"):
        loss(*pair((4, 1)))
