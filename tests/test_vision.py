"""The demo's data set and network."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from rarefy.errors import InputError, MissingExtraError
from rarefy.tasks.vision import Splits, digits, resnet20


@pytest.fixture(scope="module")
def splits() -> Splits:
    return digits(size=16)


def together(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_the_split_is_fixed(splits: Splits) -> None:
    labels = [together(loader)[1] for loader in splits]
    assert [len(part) for part in labels] == [1257, 180, 360]
    for part in labels[1:]:
        counts = part.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.02 * len(part) + 1
    again = digits(size=16)
    for one, other in zip((splits.val, splits.test), (again.val, again.test), strict=True):
        assert all(map(torch.equal, together(one), together(other)))


def test_no_image_is_in_two_splits(splits: Splits) -> None:
    parts = [loader.dataset.images.flatten(1) for loader in splits]  # type: ignore[attr-defined]
    rows = [tuple(row.tolist()) for part in parts for row in part]
    assert len(rows) == len(set(rows)) == 1797


def test_another_seed_is_another_split(splits: Splits) -> None:
    other = digits(size=16, seed=1)
    assert not torch.equal(together(splits.test)[0], together(other.test)[0])


def test_images_are_normalized_and_of_the_size_asked_for() -> None:
    images, labels = next(iter(digits(batch_size=8).train))
    assert images.shape == (8, 1, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    stored = digits().train.dataset.images  # type: ignore[attr-defined]
    assert abs(float(stored.mean())) < 1e-4
    assert abs(float(stored.std()) - 1) < 1e-4


def test_training_images_differ_per_pass_and_follow_the_global_generator(splits: Splits) -> None:
    torch.manual_seed(0)
    first, second = together(splits.train), together(splits.train)
    torch.manual_seed(0)
    again = together(splits.train)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[0], again[0])


def test_making_the_data_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    digits(size=8)
    assert torch.equal(state, torch.get_rng_state())


def test_single_examples_can_be_read(splits: Splits) -> None:
    image, label = splits.test.dataset[0]
    assert image.shape == (1, 16, 16)
    assert label.ndim == 0


def test_scikit_learn_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"rarefy\[demo\]"):
        digits()


def test_resnet20_has_the_size_of_the_paper_and_learns() -> None:
    paper, projections = 269_722, (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    model = resnet20(in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == paper + projections
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    narrow = resnet20(width=4)
    narrow(torch.randn(2, 1, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in narrow.parameters())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        digits(batch_size=0)
    with pytest.raises(InputError, match="width"):
        resnet20(width=0)
