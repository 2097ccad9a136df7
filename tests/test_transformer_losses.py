"""Losses of transformers against independent float64 references in loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from loss_cases import float32_inside, gradients_agree, pair
from rarefy.distillation.losses import AttentionMaps, MiniLM, layer_map
from rarefy.errors import InputError

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_attention_maps_equal_tinybert() -> None:
    student, teacher = pair((2, 3, 4, 4))
    s, t = student.numpy(), teacher.numpy()
    heads = [np.mean((s[:, h] - t[:, h]) ** 2) for h in range(3)]
    assert AttentionMaps()(student, teacher).item() == pytest.approx(np.mean(heads))
    real = [
        (s[b, :, i, j] - t[b, :, i, j]) ** 2
        for b in range(2)
        for i in range(4)
        for j in range(4)
        if MASK[b, i] and MASK[b, j]
    ]
    student[0, :, :, 3] = -math.inf
    student.requires_grad_()
    value = AttentionMaps()(student, teacher, MASK)
    value.backward()
    assert value.item() == pytest.approx(np.mean(real))
    assert student.grad.isfinite().all()
    assert gradients_agree(AttentionMaps(), *pair((2, 2, 4, 4)), MASK)
    assert float32_inside(AttentionMaps(), *pair((2, 3, 32, 32)))
    assert AttentionMaps()(teacher, teacher, torch.zeros(2, 4)).item() == 0


def test_other_numbers_of_heads_are_mixed() -> None:
    student, teacher = pair((2, 3, 4, 4), teacher=(2, 6, 4, 4), dtype=torch.float32)
    head = AttentionMaps().head(student, teacher)
    assert head(student, teacher)[0].shape == teacher.shape
    AttentionMaps()(*head(student, teacher), MASK).backward()
    assert AttentionMaps().head(teacher, teacher) is None
    with pytest.raises(InputError, match="head"):
        AttentionMaps()(student, teacher)


def minilm_reference(student, teacher, heads, relations, mask):
    total = 0.0
    for relation in relations:
        each = []
        for b in range(len(mask)):
            real = mask[b].bool().numpy()
            for h in range(heads):
                both = []
                for qkv in (student, teacher):
                    parts = {}
                    for name, x in zip("qkv", qkv, strict=True):
                        d = x.shape[-1] // heads
                        parts[name] = x[b].numpy()[real][:, h * d : (h + 1) * d]
                    scores = parts[relation[0]] @ parts[relation[1]].T / math.sqrt(d)
                    both.append(softmax(scores, axis=1))
                each.extend(rel_entr(both[1], both[0]).sum(1))
        total += np.mean(each)
    return total


def qkv(width, seed=0, dtype=torch.float64):
    return [pair((2, 4, width), seed + i, 1.0, dtype)[0] for i in range(3)]


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("qk", "vv"), ("kq",)])
@pytest.mark.parametrize("mask", [MASK, torch.ones(2, 4)])
def test_minilm_equals_its_papers(relations, mask) -> None:
    student, teacher = qkv(6), qkv(12, seed=5)
    wanted = minilm_reference(student, teacher, 3, relations, mask)
    loss = MiniLM(3, relations)
    assert loss(student, teacher, mask).item() == pytest.approx(wanted)
    if mask.all():
        assert loss(student, teacher).item() == pytest.approx(wanted)


def test_minilm_is_sound() -> None:
    student, teacher = qkv(4), qkv(8, seed=5)
    loss = MiniLM(2)
    for x in (*student, *teacher):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *s: loss(s, teacher, MASK), student)
    loss(student, teacher).backward()
    assert all(t.grad is None for t in teacher)
    wanted = loss(*[[x.detach().half().double() for x in y] for y in (student, teacher)]).item()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = loss([x.half() for x in student], [x.half() for x in teacher])
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_minilm_counts_no_padding() -> None:
    student, teacher = qkv(4), qkv(8, seed=5)
    wanted = MiniLM(2)(student, teacher, MASK).item()
    for x, bad in [*((x, math.nan) for x in student), *((x, math.inf) for x in teacher)]:
        x[~MASK.bool()] = bad
    leaves = [x.requires_grad_() for x in student]
    value = MiniLM(2)(leaves, teacher, MASK)
    value.backward()
    assert value.item() == pytest.approx(wanted)
    assert all(x.grad.isfinite().all() for x in leaves)
    assert MiniLM(2)(leaves, teacher, torch.zeros(2, 4)).item() == 0


@given(st.integers(1, 24), st.integers(1, 24))
def test_layer_maps_are_even(students, teachers) -> None:
    if students > teachers:
        with pytest.raises(InputError, match="layer_map"):
            layer_map(students, teachers)
        return
    found = layer_map(students, teachers)
    assert len(found) == students
    assert found[-1] == teachers - 1
    gaps = np.diff([-1, *found])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_errors() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    for bad in (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 4)):
        with pytest.raises(InputError, match="attention of the same tokens"):
            AttentionMaps()(maps, bad)
        with pytest.raises(InputError, match="attention of the same tokens"):
            AttentionMaps().head(maps, bad)
    with pytest.raises(InputError, match=r"mask of shape \(2, 5\)"):
        AttentionMaps()(maps, maps, torch.ones(2, 5))
    three = qkv(4)
    for heads in (0, -1, 1.5):
        with pytest.raises(InputError, match="heads"):
            MiniLM(heads)
    for relations in ((), "qq", ("qx",)):
        with pytest.raises(InputError, match="relations"):
            MiniLM(2, relations)
    with pytest.raises(InputError, match="4 channels cannot be split into 3"):
        MiniLM(3)(three, three)
    for bad in (three[:2], three[0], [*three[:2], torch.zeros(2, 5, 4)]):
        with pytest.raises(InputError, match="queries, keys and values"):
            MiniLM(2)(bad, three)
    with pytest.raises(InputError, match="batch and length differ"):
        MiniLM(2)(three, [torch.zeros(2, 5, 4)] * 3)
    with pytest.raises(InputError, match="mask of shape"):
        MiniLM(2)(three, three, torch.ones(2, 5))
