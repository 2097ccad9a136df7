"""Top-1, of a network and of anything else that computes logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import DataError, InputError
from rarefy.metrics import top1
from rarefy.training.evaluate import evaluate


def same(x: Any) -> Any:
    return x


def examples(n: int, right: int) -> tuple[Tensor, Tensor]:
    """So many examples of 8 classes, of which so many are right."""
    classes = torch.arange(n)
    return torch.eye(8)[:n], torch.where(classes < right, classes, 7 - classes)


def test_examples_weigh_the_same_in_batches_of_any_size() -> None:
    assert top1(same, [examples(8, 8), examples(2, 1)]) == 0.9
    assert top1(lambda x: {"logits": x}, [examples(8, 2)]) == 0.25


@pytest.mark.parametrize("shape", [(40, 6), (8, 5, 6), (2, 6, 4, 5)])
def test_every_position_counts_but_those_without_a_label(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dim = 1 if len(shape) == 4 else -1
    labels = x.argmax(dim)
    flat = labels.view(-1)
    flat[:10] = -100
    flat[10:16] = (flat[10:16] + 1) % 6
    assert labels.numel() == 40
    assert top1(same, [(x, labels)]) == pytest.approx(24 / 30)
    assert evaluate(nn.Identity(), [(x, labels)]) == top1(same, [(x, labels)])


def test_labels_are_compared_without_gradients() -> None:
    weight = torch.ones(8, requires_grad=True)
    seen = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x * weight)
        return seen[-1]

    assert top1(predict, [examples(8, 4)]) == 0.5
    assert not seen[0].requires_grad


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "error", "what"),
    [
        (X, DataError, r"top1\(data\): a batch is unlabelled"),
        ((X, [0, 1]), DataError, "labels are a list"),
        ((X, torch.zeros(2, 3)), DataError, "do not fit"),
        ((torch.ones(2), torch.zeros(2)), DataError, "do not fit"),
        ((X, torch.full((2,), -100)), DataError, "no position has a label"),
        ((X * torch.nan, torch.zeros(2)), InputError, "hold NaN"),
    ],
)
def test_data_without_an_accuracy_are_refused(
    batch: Any, error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        top1(same, [batch])


def test_outputs_without_logits_are_refused() -> None:
    with pytest.raises(InputError, match="a list holds no logits"):
        top1(lambda x: [x], [examples(8, 8)])


def test_labels_of_no_class_are_refused_in_any_batch() -> None:
    right = (torch.eye(4), torch.arange(4))
    for label in (4, -1):
        wrong = (torch.eye(4), torch.tensor([0, 1, 2, label]))
        with pytest.raises(DataError, match=f"label {label} is none of the network's 4 classes"):
            top1(lambda x: x, [right, wrong])
