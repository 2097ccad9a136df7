"""Top-1, of a network and of anything else that computes logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import DataError, InputError
from rarefy.metrics import F1, PSNR, MeanError, Perplexity, Ratio, show, title, top1
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


# --- other metrics -------------------------------------------------------------------------------

SIZES = (5, 1, 6)
"""Of batches, which must weigh by their size."""


def parts(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 4), (12, 5, 4), (12, 4, 3, 2)])
def test_perplexity(shape: tuple[int, ...]) -> None:
    x, dim = drawn(*shape), 1 if len(shape) == 4 else -1
    labels = drawn(*shape, seed=1).argmax(dim)
    labels.view(-1)[::3] = -100
    scores = x.movedim(dim, -1).reshape(-1, 4).double().numpy()
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    known = labels.view(-1).numpy() >= 0
    right = chances[known, labels.view(-1).numpy()[known]]
    found = evaluate(nn.Identity(), parts(x, labels), metric=Perplexity())
    assert found == pytest.approx(np.prod(1 / right) ** (1 / known.sum()), rel=1e-6)
    uniform = evaluate(nn.Identity(), [(torch.zeros(shape), labels)], metric=Perplexity())
    assert uniform == pytest.approx(4.0)


def test_f1() -> None:
    from sklearn.metrics import f1_score

    x, labels = drawn(12, 6), (drawn(12, 6, seed=1) > 0.5).long()
    for threshold in (0.5, 0.3):
        decided = x.sigmoid() >= threshold
        wanted = f1_score(labels.numpy(), decided.numpy(), average="micro")
        found = evaluate(nn.Identity(), parts(x, labels), metric=F1(threshold))
        assert found == pytest.approx(wanted)
    assert evaluate(nn.Identity(), parts(x, labels.float()), metric=F1()) > 0
    nothing = [(torch.full((2, 3), -9.0), torch.zeros(2, 3).long())]
    assert evaluate(nn.Identity(), nothing, metric=F1()) == 1.0


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_psnr_is_a_mean_over_images(peak: float) -> None:
    x, y = peak * drawn(12, 1, 4, 4), peak * drawn(12, 1, 4, 4, seed=1)
    wanted = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        wanted.append(20 * np.log10(peak) - 10 * np.log10(((a - b) ** 2).mean()))
    found = evaluate(nn.Identity(), parts(x, y), metric=PSNR(peak))
    assert found == pytest.approx(np.mean(wanted))
    assert evaluate(nn.Identity(), parts(x, x), metric=PSNR(peak)) == 100.0


def test_mean_error() -> None:
    x, y = drawn(12, 3), drawn(12, 3, seed=1)
    wanted = np.abs(x.double().numpy() - y.double().numpy()).mean()
    assert evaluate(nn.Identity(), parts(x, y), metric=MeanError()) == pytest.approx(wanted)


@pytest.mark.parametrize("metric", [F1(), PSNR(), MeanError()], ids=title)
def test_outputs_and_targets_fit(metric: Ratio) -> None:
    with pytest.raises(DataError, match="differ in shape"):
        evaluate(nn.Identity(), [(drawn(4, 3), drawn(4, 1))], metric=metric)
    with pytest.raises(InputError, match="hold NaN"):
        evaluate(nn.Identity(), [(drawn(4, 3) * torch.nan, drawn(4, 3))], metric=metric)


def test_metrics_say_what_they_are() -> None:
    for make in (lambda: F1(0.0), lambda: PSNR(0.0)):
        with pytest.raises(InputError, match="above 0"):
            make()
    assert (title(PSNR()), show(PSNR(), 31.234)) == ("PSNR", "31.23 dB")
    assert (title(len), show(len, 3.0)) == ("len", "3")


def test_any_function_is_a_metric() -> None:
    net = nn.Linear(3, 2).train()
    seen = []

    def count(model: nn.Module, data: Any) -> int:
        seen.append((model, model.training, torch.is_grad_enabled()))
        return sum(len(x) for x, _ in data)

    assert evaluate(net, parts(drawn(12, 3), drawn(12, 3)), metric=count) == 12
    assert seen == [(net, False, False)]
    assert net.training
