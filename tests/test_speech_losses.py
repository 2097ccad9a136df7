"""Losses of speech recognizers against independent references."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from loss_cases import float32_inside, gradients_agree, pair
from rarefy.distillation.losses import CTC, KD, CTCPosteriors, greedy_labels
from rarefy.errors import DataError, InputError

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_all_frames_are_kd() -> None:
    student, teacher = pair((2, 5, 4))
    for mask in (None, MASK):
        wanted = KD(3)(student, teacher, mask).item()
        assert CTCPosteriors(3)(student, teacher, mask).item() == pytest.approx(wanted)


def test_blank_frames_are_left_out() -> None:
    student, teacher = pair((2, 5, 4))
    blank = softmax(teacher.numpy(), axis=-1)[..., 2]
    limit = float(np.median(blank))
    each = [
        rel_entr(softmax(t / 2), softmax(s / 2)).sum()
        for s, t, b in zip(
            student.flatten(0, 1).numpy(), teacher.flatten(0, 1).numpy(), blank.ravel(), strict=True
        )
        if b <= limit
    ]
    found = CTCPosteriors(2.0, blank=2, blank_below=limit)(student, teacher)
    assert found.item() == pytest.approx(4 * np.mean(each))
    everywhere = teacher.clone()
    everywhere[..., 0] = 50
    assert CTCPosteriors(blank_below=0.9)(student, everywhere).item() == 0


def shifted_reference(student, teacher, delay):
    """Utterance by utterance: the mean of the best shift, weighted by its frames."""
    total, frames = 0.0, 0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        best = None
        for shift in range(-delay, delay + 1):
            pairs = [(i + shift, i) for i in range(len(t)) if 0 <= i + shift < len(s)]
            if 2 * len(pairs) < len(t):
                continue
            each = [rel_entr(softmax(t[j]), softmax(s[i])).sum() for i, j in pairs]
            if best is None or np.mean(each) < np.mean(best):
                best = each
        total, frames = total + sum(best), frames + len(best)
    return total / frames


@pytest.mark.parametrize("delay", [0, 1, 2, 9])
def test_utterances_are_compared_at_their_best_shift(delay) -> None:
    student, teacher = pair((3, 6, 4), scale=1.0)
    student[1, 1:] = teacher[1, :-1]
    student[2, :-2] = teacher[2, 2:]
    wanted = shifted_reference(student, teacher, delay)
    assert CTCPosteriors(delay=delay)(student, teacher).item() == pytest.approx(wanted)


def test_posteriors_are_sound() -> None:
    student, teacher = pair((2, 5, 4))
    for loss in (CTCPosteriors(2.0), CTCPosteriors(blank_below=0.9, delay=1)):
        assert gradients_agree(loss, student, teacher, MASK)
        assert float32_inside(loss, *pair((4, 50, 10)))
        wanted = loss(student, teacher, MASK).item()
        padding = ~MASK.bool()[..., None]
        bad = student.masked_fill(padding, math.nan), teacher.masked_fill(padding, math.inf)
        leaf = bad[0].requires_grad_()
        value = loss(leaf, bad[1], MASK)
        value.backward()
        assert value.item() == pytest.approx(wanted)
        assert leaf.grad.isfinite().all()
        assert loss(student, teacher, torch.zeros(2, 5)).item() == 0


def ctc_reference(logits, labels, blank):
    """The sum over every path, spelled out."""
    logp = log_softmax(logits, axis=1)
    total = -math.inf
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        spoken = [c for c, before in zip(path, (None, *path), strict=False) if c != before]
        if [c for c in spoken if c != blank] == list(labels):
            total = np.logaddexp(total, sum(logp[i, c] for i, c in enumerate(path)))
    return -total / len(labels)


@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_equals_the_sum_over_paths(blank) -> None:
    logits = pair((2, 5, 3))[0]
    first, second = [c for c in range(3) if c != blank]
    labels = torch.tensor([[first, second, second], [second, -100, -100]])
    lengths = (5, 3)
    wanted = np.mean(
        [
            ctc_reference(logits[b, :n].numpy(), [c for c in labels[b].tolist() if c >= 0], blank)
            for b, n in enumerate(lengths)
        ]
    )
    found = CTC(blank)(logits, labels, MASK)
    assert found.item() == pytest.approx(wanted)
    assert CTC(blank).against == "labels"
    assert torch.autograd.gradcheck(lambda x: CTC(blank)(x, labels, MASK), logits.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        half = CTC(blank)(logits.half(), labels.to(torch.int16), MASK)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(wanted, rel=1e-2)


def test_labels_that_cannot_be_said_in_time_count_as_nothing() -> None:
    logits = torch.zeros(2, 2, 3, requires_grad=True)
    value = CTC()(logits, torch.tensor([[1, 1], [1, 2]]))
    value.backward()
    assert value.item() == pytest.approx(math.log(9) / 2 / 2)
    assert logits.grad.isfinite().all()


def test_greedy_labels_are_merged_and_without_blanks() -> None:
    frames = torch.tensor([[1, 1, 0, 1, 2], [0, 2, 2, 1, 1], [0, 0, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(frames, 3).half()
    assert greedy_labels(logits).tolist() == [[1, 1, 2], [2, 1, -100], [-100] * 3]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert greedy_labels(logits, mask).tolist() == [[1], [2], [-100]]
    assert greedy_labels(logits, blank=1).tolist() == [[0, 2], [0, 2], [0, -100]]
    assert greedy_labels(logits[:0]).shape == (0, 0)


def test_a_student_learns_the_teachers_sequences() -> None:
    teacher = pair((2, 6, 4), seed=3)[0]
    student = torch.zeros(2, 6, 4, dtype=torch.float64, requires_grad=True)
    labels = greedy_labels(teacher)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(CTC()(student, labels), student)
        with torch.no_grad():
            student -= 3 * gradient
    assert torch.equal(greedy_labels(student), labels)


def test_errors() -> None:
    logits = torch.zeros(2, 5, 4)
    with pytest.raises(InputError, match="4 and 5 classes"):
        CTCPosteriors()(logits, torch.zeros(2, 5, 5))
    with pytest.raises(InputError, match="no frames"):
        CTCPosteriors()(logits[0], logits[0])
    with pytest.raises(InputError, match="there are 4 classes"):
        CTCPosteriors(blank=4)(logits, logits)
    with pytest.raises(InputError, match="mask of shape"):
        CTCPosteriors()(logits, logits, torch.ones(2, 4))
    for bad in ({"blank": -1}, {"delay": -1}, {"blank_below": 0}, {"blank_below": math.nan}):
        with pytest.raises(InputError, match=next(iter(bad))):
            CTCPosteriors(**bad)
    with pytest.raises(InputError, match="blank"):
        CTC(-1)
    labels = torch.tensor([[1, 2], [3, -100]])
    with pytest.raises(InputError, match="padding at the end"):
        CTC()(logits, labels, torch.tensor([[1, 1, 0, 1, 1]] * 2))
    with pytest.raises(DataError, match="label 4 is none"):
        CTC()(logits, labels + 1)
    with pytest.raises(DataError, match="or is the blank"):
        CTC(blank=3)(logits, labels)
    with pytest.raises(DataError, match="-100 before a label"):
        CTC()(logits, labels.flip(1))
    for bad in (labels[:1], labels.float(), labels[0]):
        with pytest.raises(DataError, match="no sequences"):
            CTC()(logits, bad)
