"""Losses of single features against independent float64 references."""

import math

import numpy as np
import pytest
import torch

from loss_cases import float32_inside, gradients_agree, mask_for, pair, rows
from rarefy.distillation.losses import AT, VID, Cosine, FitNet
from rarefy.errors import InputError

LAYOUTS = [((5, 7), None), ((3, 4, 7), None), ((2, 7, 3, 4), None), ((2, 3, 4, 7), -1)]


def channels(shape, dim):
    return (1 if len(shape) == 4 else -1) if dim is None else dim


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_fitnet_and_cosine_equal_their_formulas(shape, dim) -> None:
    student, teacher = pair(shape)
    place = channels(shape, dim)
    mask = mask_for(shape, place)
    a, b = rows(student, place), rows(teacher, place)
    for keep, given in ((slice(None), None), (mask.flatten().numpy(), mask)):
        squared = [(x - y) ** 2 for x, y in zip(a[keep], b[keep], strict=True)]
        assert FitNet(dim)(student, teacher, given).item() == pytest.approx(np.mean(squared))
        cosines = [
            x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(a[keep], b[keep], strict=True)
        ]
        found = Cosine(dim)(student, teacher, given)
        assert found.item() == pytest.approx(np.mean([1 - c for c in cosines]))


def at_reference(student, teacher, power):
    """Example by example, ``(B, C, P)`` arrays."""
    total = []
    for s, t in zip(student, teacher, strict=True):
        maps = [(np.abs(x) ** power).sum(0) for x in (s, t)]
        a, b = (m / math.sqrt((m * m).sum()) for m in maps)
        total.append(((a - b) ** 2).sum())
    return np.mean(total)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_attention_transfer_equals_the_paper(power) -> None:
    student, teacher = pair((3, 4, 2, 5), teacher=(3, 6, 2, 5))
    wanted = at_reference(student.flatten(2).numpy(), teacher.flatten(2).numpy(), power)
    assert AT(power)(student, teacher).item() == pytest.approx(wanted)
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    assert AT(power)(*tokens).item() == pytest.approx(wanted)
    last = [x.permute(0, 2, 3, 1) for x in (student, teacher)]
    assert AT(power, dim=-1)(*last).item() == pytest.approx(wanted)


def test_attention_of_maps_of_two_sizes() -> None:
    student, teacher = pair((2, 3, 2, 2), teacher=(2, 5, 4, 6))
    strength = (teacher**2).sum(1).view(2, 2, 2, 2, 3).mean((2, 4))
    pooled = strength.sqrt().flatten(1)[:, None]
    wanted = at_reference(student.flatten(2).numpy(), pooled.numpy(), 2)
    assert AT()(student, teacher).item() == pytest.approx(wanted)
    assert AT()(teacher, student).item() == pytest.approx(wanted)


def test_attention_counts_no_padding() -> None:
    student, teacher = pair((2, 5, 3), teacher=(2, 5, 4))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    wanted = AT()(student[:, :3], teacher[:, :3]).item()
    student[:, 3:] = math.nan
    assert AT()(student, teacher, mask).item() == pytest.approx(wanted)


def test_vid_equals_the_gaussian() -> None:
    mean, teacher = pair((3, 4, 2, 5))
    variance = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    total = [
        -torch.distributions.Normal(mean[:, c], math.sqrt(variance[c])).log_prob(teacher[:, c])
        for c in range(4)
    ]
    wanted = torch.stack(total).mean().item() - math.log(2 * math.pi) / 2
    assert VID()((mean, variance), teacher).item() == pytest.approx(wanted)


def test_the_head_of_vid_learns_mean_and_variance() -> None:
    student, teacher = pair((2, 3, 8, 8), teacher=(2, 5, 4, 4), dtype=torch.float32)
    head = VID(variance=2.0).head(student, teacher)
    (mean, variance), passed = head(student, teacher)
    assert mean.shape == teacher.shape
    assert variance.tolist() == pytest.approx([2.0] * 5)
    VID()((mean, variance), passed).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("loss", [FitNet(), Cosine(), AT()])
def test_gradients_and_precision(loss) -> None:
    assert gradients_agree(loss, *pair((2, 3, 4)), mask_for((2, 3, 4), None))
    assert gradients_agree(loss, *pair((2, 3, 2, 2)))
    assert float32_inside(loss, *pair((4, 16, 8, 8)))
    huge = [torch.full((1, 4, 2, 2), x, dtype=torch.float16).requires_grad_() for x in (6e4, -5e4)]
    value = loss(*huge)
    value.backward()
    assert value.isfinite()
    assert huge[0].grad.isfinite().all()


@pytest.mark.parametrize("loss", [FitNet(), Cosine(), AT()])
def test_dead_features_and_empty_masks(loss) -> None:
    dead, teacher = torch.zeros(2, 3, 4, requires_grad=True), pair((2, 3, 4))[1].float()
    value = loss(dead, teacher)
    value.backward()
    assert value.isfinite()
    assert dead.grad.abs().max() < 100
    assert loss(dead, teacher, torch.zeros(2, 3)).item() == 0


def test_vid_gradients_and_precision() -> None:
    mean, teacher = pair((2, 3, 4))
    variance = torch.ones(4, dtype=torch.float64, requires_grad=True)
    mean.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: VID()((m, v), teacher), (mean, variance))
    with torch.autocast("cpu", torch.bfloat16):
        found = VID()((mean.detach().half(), variance.float()), teacher.half())
    assert found.dtype == torch.float32


@pytest.mark.parametrize("loss", [FitNet(), Cosine()])
def test_heads_bridge_shapes(loss) -> None:
    student, teacher = pair((2, 3, 8, 8), teacher=(2, 5, 4, 4), dtype=torch.float32)
    with pytest.raises(InputError, match="head"):
        loss(student, teacher)
    head = loss.head(student, teacher)
    loss(*head(student, teacher)).backward()
    assert all(p.grad is not None for p in head.parameters())
    assert loss.head(teacher, teacher) is None
    with pytest.raises(InputError, match="no projector"):
        loss.head(student, torch.zeros(2, 4, 5))


def test_errors() -> None:
    assert AT().head(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 8, 8)) is None
    with pytest.raises(InputError, match="positions to attend to"):
        AT()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="2 and 3 examples"):
        AT()(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4))
    with pytest.raises(InputError, match="same length"):
        AT()(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(InputError, match="power"):
        AT(0)
    with pytest.raises(InputError, match="variance"):
        VID(math.nan)
    with pytest.raises(InputError, match="mean, variance"):
        VID()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"mask of shape \(2, 4\)"):
        FitNet()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 4))
