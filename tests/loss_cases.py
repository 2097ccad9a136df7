"""Tensors that losses are tested on, and checks that hold of every loss."""

import numpy as np
import torch


def pair(shape, seed=0, scale=3.0, dtype=torch.float64, teacher=None):
    """Student and teacher, of one shape or of two."""
    made = torch.Generator().manual_seed(seed)
    shapes = (shape, shape if teacher is None else teacher)
    draw = [scale * torch.randn(s, generator=made, dtype=torch.float64) for s in shapes]
    return [d.to(dtype) for d in draw]


def rows(logits, dim):
    """NumPy rows ``(N, C)``."""
    dim = -1 if dim is None else dim
    moved = np.moveaxis(logits.detach().double().numpy(), dim, -1)
    return moved.reshape(-1, moved.shape[-1])


def mask_for(shape, dim, seed=1):
    """A random mask of the shape without a dimension; something counts."""
    left = list(shape)
    del left[-1 if dim is None else dim]
    mask = torch.rand(left, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask.view(-1)[0] = True
    return mask


def gradients_agree(loss, student, teacher, mask=None, **options):
    """Gradients of the student are right, and the teacher receives none."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    loss(student, teacher, mask, **options).backward()
    assert teacher.grad is None
    assert student.grad is not None
    return torch.autograd.gradcheck(lambda s: loss(s, teacher, mask, **options), (student,))


def float32_inside(loss, student, teacher, mask=None, rel=1e-4, **options):
    """Half-precision inputs give what float64 gives for the same numbers, autocast or not."""
    for dtype in (torch.float16, torch.bfloat16):
        s, t = student.to(dtype).requires_grad_(), teacher.to(dtype)
        wanted = loss(s.detach().double(), t.double(), mask, **options).item()
        plain = loss(s, t, mask, **options)
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss(s, t, mask, **options)
        for found in (plain, cast):
            assert found.dtype == torch.float32
            assert abs(found.item() - wanted) <= rel * abs(wanted), (found.item(), wanted)
        plain.backward()
        assert s.grad.dtype == dtype
        assert s.grad.isfinite().all()
    return True
