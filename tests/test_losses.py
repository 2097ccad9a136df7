"""Losses against an independent float64 reference in NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from rarefy.distillation.losses import KD, MSE, CrossEntropy, Weighted
from rarefy.errors import DataError, InputError

LAYOUTS = [((5, 7), None), ((3, 4, 7), None), ((2, 7, 3, 4), 1), ((2, 3, 4, 7), -1), ((3, 7, 4), 1)]


SMALL = [((3, 4), None), ((2, 2, 3), None), ((1, 3, 2, 2), 1), ((2, 3, 2), 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(shape, seed=0, scale=3.0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    draw = [scale * torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(2)]
    return [d.to(dtype) for d in draw]


def rows(logits, dim):
    dim = -1 if dim is None else dim
    moved = np.moveaxis(logits.double().numpy(), dim, -1)
    return moved.reshape(-1, moved.shape[-1])


def kd_reference(student, teacher, t, dim, keep=slice(None)):
    p = log_softmax(rows(teacher, dim) / t, axis=1)
    q = log_softmax(rows(student, dim) / t, axis=1)
    each = [sum(np.exp(a) * (a - b) for a, b in zip(*r, strict=True)) for r in zip(p, q)]  # noqa: B905
    return t * t * float(np.mean(np.array(each)[keep]))


def mask_for(shape, dim, seed=1):
    left = list(shape)
    del left[-1 if dim is None else dim]
    mask = torch.rand(left, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask.view(-1)[0] = True
    return mask


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
def test_mse_and_cross_entropy_equal_their_definitions(shape, dim) -> None:
    student, teacher = pair(shape)
    mask = mask_for(shape, dim)
    keep = mask.flatten().numpy()
    squared = (rows(student, dim) - rows(teacher, dim)) ** 2
    assert MSE(dim)(student, teacher).item() == pytest.approx(squared.mean(), rel=1e-12)
    assert MSE(dim)(student, teacher, mask).item() == pytest.approx(squared[keep].mean(), rel=1e-12)

    labels = torch.randint(0, 7, mask.shape, generator=torch.Generator().manual_seed(3))
    logp = log_softmax(rows(student, dim), axis=1)
    chosen = -logp[np.arange(len(logp)), labels.flatten().numpy()]
    smooth = 0.8 * chosen - 0.2 * logp.mean(1)
    found = CrossEntropy(dim=dim)
    assert found(student, labels).item() == pytest.approx(chosen.mean(), rel=1e-12)
    assert found(student, labels, mask).item() == pytest.approx(chosen[keep].mean(), rel=1e-12)
    found = CrossEntropy(label_smoothing=0.2, dim=dim)
    assert found(student, labels).item() == pytest.approx(smooth.mean(), rel=1e-12)


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
    student, teacher = (x.requires_grad_() for x in pair(shape))
    mask = mask_for(shape, dim)
    labels = torch.zeros(mask.shape, dtype=torch.long)
    assert torch.autograd.gradcheck(lambda s, t: KD(2.0, dim)(s, t, mask), (student, teacher))
    assert torch.autograd.gradcheck(MSE(dim), (student, teacher))
    smoothed = CrossEntropy(0.1, dim)
    assert torch.autograd.gradcheck(lambda s: smoothed(s, labels, mask), (student,))


def test_the_size_of_gradients_does_not_depend_on_the_temperature() -> None:
    student, teacher = pair((64, 10), scale=0.1)
    norms = []
    for temperature in (1.0, 2.0, 8.0):
        leaf = student.clone().requires_grad_()
        KD(temperature)(leaf, teacher).backward()
        norms.append(leaf.grad.norm().item())
    assert max(norms) / min(norms) < 1.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype) -> None:
    student, teacher = pair((8, 512, 50), dtype=dtype)
    wanted = KD(4.0)(student.double(), teacher.double())
    leaf = student.clone().requires_grad_()
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad()):
        with context:
            found = KD(4.0)(leaf, teacher)
            assert found.dtype == torch.float32
            assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
            assert MSE()(student, teacher).dtype == torch.float32
            assert CrossEntropy()(student, torch.zeros(8, 512).long()).dtype == torch.float32
    KD(4.0)(leaf, teacher).backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    value = KD(1.0)(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert student.grad.isfinite().all()


def test_classes_that_both_rule_out_count_for_nothing() -> None:
    student, teacher = pair((4, 5))
    wide = [
        torch.cat([x, torch.full((4, 2), -math.inf)], 1).requires_grad_()
        for x in (student, teacher)
    ]
    value = KD(3.0)(*wide)
    value.backward()
    assert value.item() == pytest.approx(KD(3.0)(student, teacher).item())
    assert all(x.grad.isfinite().all() for x in wide)


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
    assert CrossEntropy()(student, torch.full((2, 3), -100)).item() == 0


def test_nan_is_not_hidden() -> None:
    student, teacher = pair((2, 3))
    teacher[0, 0] = math.nan
    assert math.isnan(KD()(student, teacher).item())


def test_cross_entropy_takes_probabilities_narrow_integers_and_ignores() -> None:
    logits, _ = pair((6, 7))
    labels = torch.arange(6)
    wanted = CrossEntropy()(logits, labels).item()
    assert CrossEntropy()(logits, labels.to(torch.uint8)).item() == wanted
    hot = torch.nn.functional.one_hot(labels, 7).double()
    assert CrossEntropy()(logits, hot).item() == pytest.approx(wanted)
    part = labels.clone()
    part[3:] = -100
    assert CrossEntropy()(logits, part).item() == pytest.approx(
        CrossEntropy()(logits[:3], labels[:3]).item()
    )


def test_cross_entropy_finds_the_class_dimension_of_maps() -> None:
    logits, _ = pair((2, 5, 3, 4))
    labels = torch.randint(0, 5, (2, 3, 4))
    assert CrossEntropy()(logits, labels).item() == CrossEntropy(dim=1)(logits, labels).item()


def test_losses_add_and_scale() -> None:
    student, teacher = pair((4, 5))
    mixed = 0.9 * KD(4) + MSE() * 0.1
    wanted = 0.9 * KD(4)(student, teacher) + 0.1 * MSE()(student, teacher)
    assert mixed(student, teacher).item() == pytest.approx(wanted.item())
    assert (2 * mixed)(student, teacher).item() == pytest.approx(2 * wanted.item())
    assert mixed == Weighted(((0.9, KD(4)), (0.1, MSE())))
    assert mixed.against == "teacher"
    assert (CrossEntropy() * 2).against == "labels"


def test_sums_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="label_weight"):
        KD() + CrossEntropy()
    with pytest.raises(InputError, match="finite"):
        math.nan * KD()
    with pytest.raises(TypeError):
        KD() + 1


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_is_positive(temperature) -> None:
    with pytest.raises(InputError, match="temperature"):
        KD(temperature)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_label_smoothing_is_a_share(smoothing) -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        CrossEntropy(smoothing)


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


def test_labels_that_do_not_fit() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(DataError, match="label 3 is none of the 3 classes"):
        CrossEntropy()(logits, torch.tensor([0, 3]))
    with pytest.raises(DataError, match="label -1"):
        CrossEntropy()(logits, torch.tensor([0, -1]))
    with pytest.raises(DataError, match=r"\(3,\) do not fit"):
        CrossEntropy()(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="3 labels for 2"):
        CrossEntropy(dim=1)(logits, torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="float32"):
        CrossEntropy()(logits, torch.tensor([0.0, 1.0]))
