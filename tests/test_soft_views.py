"""Augmentation that is replayed: the same for one view and id, whatever was drawn before."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from rarefy.distillation.soft_labels.views import CutMix, Mixup, Replay
from rarefy.errors import DataError, InputError
from rarefy.training.train import train

IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(20) % 5)
TRANSFORM = Compose([RandomCrop(8, padding=2), RandomHorizontalFlip()])


def of_all_generators(x: Tensor) -> Tensor:
    return x + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("transform", [TRANSFORM, of_all_generators])
def test_an_input_depends_on_view_and_id_alone(transform) -> None:
    replay = Replay(DATA, transform, seed=3)
    found = {(v, i): replay[v, i][0] for v in range(3) for i in range(20)}
    order = list(found)
    random.shuffle(order)
    for key in order:
        assert (replay[key][0] == found[key]).all()
    assert (replay[4][0] == found[0, 4]).all()
    views = [torch.stack([found[v, i] for i in range(20)]) for v in range(3)]
    assert not (views[0] == views[1]).all()
    others = [Replay(DATA, transform, seed=4)[0, i][0] for i in range(20)]
    assert not (torch.stack(others) == views[0]).all()


def test_every_epoch_of_a_training_has_a_view_of_its_own() -> None:
    replay, seen = Replay(DATA, TRANSFORM), []

    class Net(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x.flatten(1))

    train(Net(192, 5), DataLoader(replay, batch_size=20), epochs=3, progress=False)
    for epoch, found in enumerate(seen[-3:]):
        assert (found == torch.stack([replay[epoch, i][0] for i in range(20)])).all()
    assert (replay[4][0] == replay[0, 4][0]).all()


def test_workers_and_batches_make_no_difference() -> None:
    replay = Replay(DATA, of_all_generators)
    plain = torch.cat([x for x, _ in DataLoader(replay, batch_size=7)])
    spread = torch.cat([x for x, _ in DataLoader(replay, batch_size=3, num_workers=2)])
    assert (plain == spread).all()
    assert (plain == torch.stack([replay[i][0] for i in range(20)])).all()


def test_workers_that_persist_see_every_view() -> None:
    replay = Replay(DATA, of_all_generators)
    loader = DataLoader(replay, batch_size=10, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        replay.set_epoch(epoch)
        found = torch.cat([x for x, _ in loader])
        assert (found == torch.stack([replay[epoch, i][0] for i in range(20)])).all()


def test_training_sees_every_view_of_a_part_of_it() -> None:
    replay = Replay(DATA, of_all_generators)
    seen = []

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x.flatten(1))

    part = ConcatDataset([Subset(replay, [4, 2]), Subset(replay, [0])])
    train(Watching(192, 5), DataLoader(part, 3), epochs=2, progress=False)
    for epoch in range(2):
        assert torch.equal(seen[epoch], torch.stack([replay[epoch, i][0] for i in (4, 2, 0)]))
    assert replay.epoch == 0


def test_a_part_to_validate_on_keeps_its_view() -> None:
    replay = Replay(DATA, of_all_generators)
    data, val = (DataLoader(Subset(replay, part), 4) for part in (range(8), range(8, 12)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    options = {"epochs": 3, "progress": False, "metric": _content}
    values = [epoch.val for epoch in train(model, data, val=val, **options).trained.epochs]
    assert values == [_content(model, val)] * 3


def _content(model: nn.Module, data: Any) -> float:
    return float(sum(x.sum() for x, _ in data))


def test_the_states_of_all_generators_are_restored() -> None:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])  # noqa: NPY002
    Replay(DATA, of_all_generators, mix=Mixup())[2, 3]
    with pytest.raises(ZeroDivisionError):
        Replay(DATA, lambda x: torch.rand(3) / (1 // 0))[0]
    assert (torch.get_rng_state() == states[0]).all()
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_a_random_data_set_is_replayed_too() -> None:
    class Noisy:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return torch.randn(2)

    replay = Replay(Noisy())
    assert (replay[1, 2] == replay[1, 2]).all()
    assert (replay[1, 2] != replay[0, 2]).all()


def test_targets_are_left_alone_and_single_inputs_stay_single() -> None:
    assert int(Replay(DATA, TRANSFORM)[1, 7][1]) == 2
    assert isinstance(Replay(IMAGES, TRANSFORM)[1, 7], Tensor)


@given(st.integers(0, 9999), st.floats(0.1, 4))
@settings(max_examples=40, deadline=None)
def test_mixup_is_a_weighted_sum_with_the_larger_share_its_own(seed, alpha) -> None:
    own, other = torch.ones(3, 4, 4), torch.zeros(3, 4, 4)
    mixed, share = Mixup(alpha)(own, other, random.Random(seed))
    assert 0.5 <= share <= 1
    assert torch.allclose(mixed, torch.full_like(own, share))


@given(st.integers(0, 9999), st.floats(0.1, 4), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_cutmix_keeps_the_share_it_says_outside_of_one_box(seed, alpha, height, width) -> None:
    own, other = torch.ones(2, height, width), torch.zeros(2, height, width)
    mixed, share = CutMix(alpha)(own, other, random.Random(seed))
    assert mixed.mean().item() == pytest.approx(share, abs=1e-6)
    assert share >= 0.5 - 1e-9
    cut = (mixed[0] == 0).nonzero()
    if len(cut):
        box = mixed[:, cut[:, 0].min() : cut[:, 0].max() + 1, cut[:, 1].min() : cut[:, 1].max() + 1]
        assert not box.any()
    assert own.all()


def test_shares_follow_the_beta_distribution() -> None:
    shares = [Mixup(1.0)(torch.ones(1), torch.zeros(1), random.Random(s))[1] for s in range(2000)]
    assert np.mean(shares) == pytest.approx(0.75, abs=0.02)  # of max(u, 1 - u), u uniform


@pytest.mark.parametrize("mix", [Mixup(1.0, classes=5), CutMix(1.0, classes=5)])
def test_a_mixture_has_the_labels_of_two_items(mix: Any) -> None:
    replay = Replay(DATA, seed=1, mix=mix)
    partners = set()
    for view, index in ((v, i) for v in range(2) for i in range(20)):
        value, target = replay[view, index]
        assert target.sum().item() == pytest.approx(1)
        assert target[index % 5] >= 0.5 - 1e-6
        partners.add(tuple(target.nonzero().flatten().tolist()))
        assert (replay[view, index][0] == value).all()
    assert len(partners) > 5


def test_without_classes_the_target_is_its_own() -> None:
    assert int(Replay(DATA, mix=Mixup())[1, 8][1]) == 3


def test_it_describes_itself_without_addresses() -> None:
    assert " at 0x" not in Replay(DATA, lambda x: x).description
    assert "RandomCrop" in Replay(DATA, TRANSFORM, seed=3).description
    assert "seed=3" in Replay(DATA, TRANSFORM, seed=3).description
    assert "Mixup(alpha=0.2" in Replay(DATA, mix=Mixup()).description


@pytest.mark.parametrize("make", [lambda: Mixup(0), lambda: CutMix(-1), lambda: Mixup(math.nan)])
def test_alpha_is_above_zero(make) -> None:
    with pytest.raises(InputError):
        make()


def test_a_stream_and_unequal_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="map-style"):
        Replay(iter([1]))
    with pytest.raises(DataError, match="one shape"):
        [Replay([torch.zeros(2), torch.zeros(3)], mix=Mixup())[v, 0] for v in range(20)]
    with pytest.raises(IndexError):
        Replay(DATA)[20]
