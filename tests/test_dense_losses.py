"""Losses of dense prediction against independent float64 references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax

from loss_cases import float32_inside, gradients_agree, pair
from rarefy.distillation.losses import CWD, MGD, ReviewKD
from rarefy.errors import InputError


def cwd_reference(student, teacher, t):
    """``(B, C, P)`` arrays, channel by channel."""
    total = [
        rel_entr(softmax(y / t), softmax(x / t)).sum()
        for x, y in zip(*(v.reshape(-1, v.shape[-1]) for v in (student, teacher)), strict=True)
    ]
    return t * t * np.mean(total)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_equals_the_paper(temperature) -> None:
    student, teacher = pair((2, 3, 4, 5))
    wanted = cwd_reference(student.flatten(2).numpy(), teacher.flatten(2).numpy(), temperature)
    loss = CWD(temperature)
    assert loss(student, teacher).item() == pytest.approx(wanted)
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    assert loss(*tokens).item() == pytest.approx(wanted)
    last = [x.permute(0, 2, 3, 1) for x in (student, teacher)]
    assert CWD(temperature, dim=-1)(*last).item() == pytest.approx(wanted)


def test_cwd_counts_no_padding() -> None:
    student, teacher = pair((3, 5, 4))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    wanted = CWD()(student[:2, :3], teacher[:2, :3]).item()
    student[~mask.bool()], teacher[~mask.bool()] = math.nan, math.inf
    student.requires_grad_()
    value = CWD()(student, teacher, mask)
    value.backward()
    assert value.item() == pytest.approx(wanted)
    assert student.grad.isfinite().all()
    assert CWD()(student, teacher, torch.zeros(3, 5)).item() == 0


def test_cwd_is_sound() -> None:
    student, teacher = pair((2, 3, 2, 2))
    assert gradients_agree(CWD(2.0), student, teacher)
    assert float32_inside(CWD(), *pair((4, 8, 16, 16)))
    assert CWD()(student + 7, student).item() == pytest.approx(0, abs=1e-12)
    huge = [torch.tensor([[[[6e4, -6e4]]]], dtype=torch.float16).requires_grad_() for _ in "st"]
    value = CWD(1)(huge[0], huge[1].flip(-1))
    value.backward()
    assert value.item() == pytest.approx(1.2e5, rel=1e-3)
    head = CWD().head(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2))
    assert head(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2))[0].shape == (2, 5, 2, 2)


def test_mgd_is_the_mean_squared_difference_of_what_its_head_generates() -> None:
    student, teacher = pair((4, 3, 16, 16), teacher=(4, 5, 8, 8), dtype=torch.float32)
    loss = MGD(masked=0.5)
    head = loss.head(student, teacher)
    found, wanted = head(student.requires_grad_(), teacher.requires_grad_())
    value = loss(found, wanted)
    assert value.item() == pytest.approx(np.mean((found - wanted).detach().numpy() ** 2))
    value.backward()
    assert teacher.grad is None
    assert all(p.grad is not None for p in head.parameters())
    assert gradients_agree(loss, *pair((2, 3, 2, 2)))
    assert float32_inside(loss, *pair((4, 3, 16, 16)))


def test_mgd_masks_so_many_positions_anew_at_every_step() -> None:
    student = torch.ones(8, 1, 32, 32)
    head = MGD(masked=0.75).head(student, student)
    with torch.no_grad():
        for layer in (head.generate[0], head.generate[2]):
            layer.weight.zero_()[0, 0, 1, 1] = 1
            layer.bias.zero_()
        first, second = (head(student, student)[0] for _ in range(2))
    assert set(first.unique().tolist()) == {0, 1}
    assert first.mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(first, second)


def hcl_reference(found, wanted):
    total, weights, weight = ((found - wanted) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < found.shape[-1]:
            weight /= 2
            step = found.shape[-1] // size
            cut = [x.reshape(*x.shape[:2], size, step, size, step) for x in (found, wanted)]
            pooled = [x.mean((3, 5)) for x in cut]
            total += weight * ((pooled[0] - pooled[1]) ** 2).mean()
            weights += weight
    return total / weights


def stages(dtype=torch.float64, widths=(3, 4, 5)):
    sizes = (8, 4, 2)
    shapes = [(2, c, s, s) for c, s in zip(widths, sizes, strict=True)]
    return [pair(shape, seed)[0].to(dtype) for seed, shape in enumerate(shapes)]


def test_review_compares_at_every_size() -> None:
    student, teacher = stages(), [x + pair(x.shape, 9)[1] for x in stages()]
    wanted = sum(hcl_reference(s.numpy(), t.numpy()) for s, t in zip(student, teacher, strict=True))
    assert ReviewKD()(student, teacher).item() == pytest.approx(wanted)
    for leaf in (*student, *teacher):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda *s: ReviewKD()(s, teacher[1:]), student[1:])
    ReviewKD()(student, teacher).backward()
    assert all(t.grad is None for t in teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = ReviewKD()([s.half() for s in student], [t.half() for t in teacher])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted, rel=2e-3)


def test_the_head_of_review_fuses_from_the_last_stage_to_the_first() -> None:
    student, teacher = stages(torch.float32), stages(torch.float32, widths=(6, 7, 8))
    teacher[0] = F.interpolate(teacher[0], size=(16, 16))
    head = ReviewKD(width=4).head(student, teacher)
    for x in student:
        x.requires_grad_()
    found, wanted = head(student, teacher)
    assert [x.shape for x in found] == [x.shape for x in teacher]
    assert ReviewKD()(found, wanted).isfinite()
    for leaf, seen in ((0, (0,)), (1, (0, 1)), (2, (0, 1, 2))):
        totals = [x.square().sum() for x in found]
        options = {"retain_graph": True, "allow_unused": True}
        gradients = [torch.autograd.grad(t, student[leaf], **options)[0] for t in totals]
        reached = [i for i, g in enumerate(gradients) if g is not None]
        assert tuple(reached) == seen
    ReviewKD()(found, wanted).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_errors() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    for value in (0, -1, math.nan):
        with pytest.raises(InputError, match="temperature"):
            CWD(value)
        with pytest.raises(InputError, match="masked"):
            MGD(value)
    with pytest.raises(InputError, match="head"):
        CWD()(maps, torch.zeros(2, 5, 4, 4))
    with pytest.raises(InputError, match="no positions"):
        CWD()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="no map"):
        MGD().head(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="1 features of the student"):
        ReviewKD()(maps, [maps])
    with pytest.raises(InputError, match="2 features of the student, 1"):
        ReviewKD().head([maps, maps], [maps])
    with pytest.raises(InputError, match="no feature"):
        ReviewKD()([], [])
    with pytest.raises(InputError, match="no map"):
        ReviewKD()([maps[0]], [maps[0]])
    with pytest.raises(InputError, match="head"):
        ReviewKD()([maps], [torch.zeros(2, 3, 2, 2)])
    with pytest.raises(InputError, match="no mask"):
        ReviewKD()([maps], [maps], torch.ones(2, 4, 4))
    with pytest.raises(InputError, match="width"):
        ReviewKD(width=0)
