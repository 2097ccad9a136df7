"""Losses against labels, with an independent float64 reference in NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from loss_cases import mask_for, pair, rows
from rarefy.distillation.losses import CrossEntropy
from rarefy.errors import DataError, InputError

LAYOUTS = [((5, 7), None), ((3, 4, 7), None), ((2, 7, 3, 4), 1), ((2, 3, 4, 7), -1), ((3, 7, 4), 1)]


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_cross_entropy_equals_its_definition(shape, dim) -> None:
    student, _ = pair(shape)
    mask = mask_for(shape, dim)
    keep = mask.flatten().numpy()
    labels = torch.randint(0, 7, mask.shape, generator=torch.Generator().manual_seed(3))
    logp = log_softmax(rows(student, dim), axis=1)
    chosen = -logp[np.arange(len(logp)), labels.flatten().numpy()]
    smooth = 0.8 * chosen - 0.2 * logp.mean(1)
    found = CrossEntropy(dim=dim)
    assert found(student, labels).item() == pytest.approx(chosen.mean(), rel=1e-12)
    assert found(student, labels, mask).item() == pytest.approx(chosen[keep].mean(), rel=1e-12)
    found = CrossEntropy(label_smoothing=0.2, dim=dim)
    assert found(student, labels).item() == pytest.approx(smooth.mean(), rel=1e-12)


def test_gradients() -> None:
    student = pair((2, 2, 3))[0].requires_grad_()
    mask = mask_for(student.shape, None)
    smoothed, labels = CrossEntropy(0.1), torch.zeros(2, 2, dtype=torch.long)
    assert torch.autograd.gradcheck(lambda s: smoothed(s, labels, mask), (student,))


def test_half_precision_is_accumulated_in_float32() -> None:
    logits, labels = torch.zeros(8, 512, 50, dtype=torch.float16), torch.zeros(8, 512).long()
    with torch.autocast("cpu", torch.bfloat16):
        found = CrossEntropy()(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(50), rel=1e-6)


def test_labels_beyond_the_range_of_int16() -> None:
    logits, labels = torch.zeros(1, 40_000).double(), torch.tensor([39_999]).int()
    logits[0, 39_999] = 20.0
    wanted = math.log1p(39_999 * math.exp(-20))
    assert CrossEntropy()(logits, labels).item() == pytest.approx(wanted)
    with pytest.raises(DataError, match="label -25537"):
        CrossEntropy()(logits, labels.to(torch.int16))


def test_nothing_that_counts_gives_zero_not_nan() -> None:
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    value = CrossEntropy()(logits, torch.full((2, 3), -100))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


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
    square, _ = pair((2, 5, 5, 5))  # both dimensions fit: maps have their classes in the first
    labels = torch.randint(0, 5, (2, 5, 5))
    assert CrossEntropy()(square, labels).item() == CrossEntropy(dim=1)(square, labels).item()
    last, _ = pair((2, 4, 3, 5))
    labels = torch.randint(0, 5, (2, 4, 3))
    assert CrossEntropy()(last, labels).item() == CrossEntropy(dim=-1)(last, labels).item()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_label_smoothing_is_a_share(smoothing) -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        CrossEntropy(smoothing)


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


@pytest.mark.parametrize(
    "labels", [[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [[1.5, -0.5, 0.0], [0.0, 0.0, 1.0]]]
)
def test_targets_that_are_no_probabilities(labels) -> None:
    """Multi-label targets and real numbers have the shape of probabilities."""
    with pytest.raises(DataError, match=r"sum to.*BCEWithLogitsLoss"):
        CrossEntropy()(torch.zeros(2, 3), torch.tensor(labels))
    half = torch.full((2, 1000), 0.001, dtype=torch.float16)
    assert CrossEntropy()(torch.zeros(2, 1000), half).isfinite()


@pytest.mark.parametrize("labels", [torch.zeros(4).long(), torch.ones(4, 1)])
def test_one_class_teaches_nothing(labels) -> None:
    with pytest.raises(InputError, match="one class"):
        CrossEntropy()(torch.zeros(4, 1), labels)
