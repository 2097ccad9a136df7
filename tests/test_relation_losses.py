"""Losses of relations between examples against independent float64 references in loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from loss_cases import float32_inside, gradients_agree, pair
from rarefy.distillation.losses import CRD, PKT, RKD, SP
from rarefy.errors import InputError

LOSSES = [SP(), RKD(), PKT(), CRD()]


def sp_reference(student, teacher):
    grams = []
    for x in (student, teacher):
        flat = x.flatten(1).numpy()
        gram = np.array([[float(np.dot(a, b)) for b in flat] for a in flat])
        grams.append([row / math.sqrt(sum(v * v for v in row)) for row in gram])
    return float(np.square(np.array(grams[0]) - np.array(grams[1])).sum()) / len(student) ** 2


def huber(a, b):
    d = abs(a - b)
    return d * d / 2 if d <= 1 else d - 0.5


def rkd_reference(student, teacher, distance, angle):
    s, t = student.numpy(), teacher.numpy()
    pairs = list(itertools.permutations(range(len(s)), 2))
    lengths = [{p: math.dist(x[p[0]], x[p[1]]) for p in pairs} for x in (s, t)]
    mean = [sum(d.values()) / len(pairs) for d in lengths]
    near = [huber(lengths[0][p] / mean[0], lengths[1][p] / mean[1]) for p in pairs]

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / math.sqrt((a @ a) * (b @ b))

    triples = itertools.permutations(range(len(s)), 3)
    seen = [huber(cosine(s, *x), cosine(t, *x)) for x in triples]
    return distance * np.mean(near) + angle * np.mean(seen)


def pkt_reference(student, teacher):
    def choices(x):
        x = x.numpy()
        found = []
        for i, a in enumerate(x):
            kernel = {
                j: (a @ b / math.sqrt((a @ a) * (b @ b)) + 1) / 2 for j, b in enumerate(x) if j != i
            }
            found.append({j: v / sum(kernel.values()) for j, v in kernel.items()})
        return found

    total = 0.0
    for p, q in zip(choices(teacher), choices(student), strict=True):
        total += sum(p[j] * math.log(p[j] / q[j]) for j in p)
    return total / len(student)


def crd_reference(student, teacher, t):
    s, z = (
        x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (student, teacher)
    )
    total = 0.0
    for a, b in ((s, z), (z, s)):
        for i in range(len(a)):
            scores = [math.exp(a[i] @ b[j] / t) for j in range(len(b))]
            total -= math.log(scores[i] / sum(scores))
    return total / (2 * len(s))


def test_relations_equal_their_papers() -> None:
    student, teacher = pair((6, 3), teacher=(6, 5))
    assert SP()(student, teacher).item() == pytest.approx(sp_reference(student, teacher))
    wanted = rkd_reference(student, teacher, 0.7, 1.3)
    assert RKD(0.7, 1.3)(student, teacher).item() == pytest.approx(wanted)
    assert PKT()(student, teacher).item() == pytest.approx(pkt_reference(student, teacher))
    student, teacher = pair((6, 5))
    wanted = crd_reference(student, teacher, 0.5)
    assert CRD(0.5)(student, teacher).item() == pytest.approx(wanted)


def test_maps_and_sequences() -> None:
    student, teacher = pair((4, 3, 2, 2), teacher=(4, 5, 4, 4))
    assert SP()(student, teacher).item() == pytest.approx(sp_reference(student, teacher))
    means = [x.mean((2, 3)) for x in (student, teacher)]
    assert RKD()(student, teacher).item() == pytest.approx(RKD()(*means).item())
    assert PKT()(student, teacher).item() == pytest.approx(PKT()(*means).item())
    last = [x.permute(0, 2, 3, 1) for x in (student, teacher)]
    assert PKT(dim=-1)(*last).item() == pytest.approx(PKT()(*means).item())


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_counts_for_nothing(loss) -> None:
    student, teacher = pair((3, 4, 5))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    real = [x.masked_fill(~mask.bool()[..., None], 0) for x in (student, teacher)]
    if not isinstance(loss, SP):
        real = [x.sum(1) / mask.sum(1, keepdim=True) for x in real]
    wanted = loss(*real).item()
    student[~mask.bool()], teacher[~mask.bool()] = math.nan, math.inf
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.item() == pytest.approx(wanted)
    assert student.grad.isfinite().all()
    with pytest.raises(InputError, match="mask of shape"):
        loss(student, teacher, mask[:, :3])


@pytest.mark.parametrize("loss", [SP(), RKD(), PKT()])
def test_only_relations_count(loss) -> None:
    student, _ = pair((5, 4))
    turn = torch.linalg.qr(pair((4, 4))[0])[0]
    assert loss(student, student).item() == pytest.approx(0, abs=1e-12)
    assert loss(3 * student @ turn, student).item() == pytest.approx(0, abs=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = [x[order] for x in pair((5, 4))]
    assert loss(*found).item() == pytest.approx(loss(*pair((5, 4))).item())


@pytest.mark.parametrize("loss", [SP(), RKD(), PKT()])
def test_gradients(loss) -> None:
    assert gradients_agree(loss, *pair((4, 3), teacher=(4, 5)))
    assert gradients_agree(loss, *pair((4, 2, 2, 2)))


@pytest.mark.parametrize(
    ("loss", "rel"), [(SP(), 1e-4), (RKD(), 1e-4), (PKT(), 1e-3), (CRD(), 1e-4)]
)
def test_precision(loss, rel) -> None:
    """Products are not taken in half precision, also under autocast."""
    assert float32_inside(loss, *pair((16, 64)), rel=rel)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_small_batches(loss, batch) -> None:
    student, teacher = (x.float() for x in pair((batch, 4)))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is None or student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_examples_that_are_equal_or_dead(loss) -> None:
    teacher = pair((4, 3))[1].float()
    for student in (torch.zeros(4, 3), torch.ones(4, 3)):
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 1e3
    assert loss(teacher, torch.zeros(4, 3)).isfinite()


def test_crd_learns_both_embeddings_and_leaves_the_teacher_alone() -> None:
    student, teacher = pair((4, 3, 2, 2), teacher=(4, 5), dtype=torch.float32)
    student.requires_grad_()
    teacher.requires_grad_()
    head = CRD(width=6).head(student, teacher)
    embedded = head(student, teacher)
    assert embedded[0].shape == (4, 6, 2, 2)
    assert embedded[1].shape == (4, 6)
    CRD()(*embedded).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    leaves = [x.requires_grad_() for x in pair((3, 4))]
    assert torch.autograd.gradcheck(CRD(0.5), leaves)


def test_errors() -> None:
    for loss in LOSSES:
        with pytest.raises(InputError, match="2 and 3 examples"):
            loss(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="head"):
        CRD()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="width"):
        CRD(width=0)
    for value in (-1, math.nan):
        with pytest.raises(InputError, match="distance"):
            RKD(distance=value)
        with pytest.raises(InputError, match="angle"):
            RKD(angle=value)
        with pytest.raises(InputError, match="temperature"):
            CRD(temperature=value)
