"""Arithmetic that stays exact and finite."""

import math

import pytest
import torch

from rarefy.distillation.losses.arithmetic import centered, divergence, exact, precise, unit


def test_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert precise(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert precise(torch.zeros(1).double()).dtype == torch.float64


def test_products_are_exact_under_autocast() -> None:
    a = torch.rand(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exact(a):
            assert torch.equal(a @ a, torch.matmul(a, a))
            assert (a @ a).dtype == torch.float32


def test_divergence_of_what_is_impossible() -> None:
    log_p = torch.tensor([0.0, -math.inf])
    log_q = torch.tensor([-1.0, -math.inf], requires_grad=True)
    found = divergence(log_p, log_q)
    found.sum().backward()
    assert found.tolist() == [1, 0]
    assert log_q.grad.tolist() == [-1, 0]


def test_unit_vectors() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = unit(vectors)
    found.sum().backward()
    assert found[0].tolist() == pytest.approx([0.6, 0.8])
    assert found[1].tolist() == [0, 0]
    assert vectors.grad.abs().max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
def test_what_is_constant_has_no_direction(value) -> None:
    values = torch.full((2, 7), value, requires_grad=True)
    found = centered(values)
    found.sum().backward()
    assert (found == 0).all()
    assert (values.grad == 0).all()


def test_the_cosine_of_centered_values_is_pearsons_r() -> None:
    a, b = torch.rand(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dim, ours, theirs in ((1, a, b), (0, a.T, b.T)):
        found = (centered(a, dim) * centered(b, dim)).sum(dim)
        wanted = [torch.corrcoef(torch.stack(x))[0, 1] for x in zip(ours, theirs, strict=True)]
        assert torch.allclose(found, torch.stack(wanted))
    tiny = (centered(a * 1e-25) * centered(b)).sum(1)
    assert torch.allclose(tiny, (centered(a) * centered(b)).sum(1))
