"""Ids: the index in a data set whatever the loader does, or the running position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from rarefy.distillation.soft_labels.source import input_hashes, probed_hashes, source
from rarefy.distillation.soft_labels.views import Replay
from rarefy.errors import DataError

VALUES = torch.arange(50.0)[:, None]


def doubled(items: list[Any]) -> Tensor:
    return 2 * torch.stack([x for (x,) in items])


class Listed(Dataset[Any]):
    """A data set that is asked for several items at once."""

    def __len__(self) -> int:
        return 50

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(VALUES[i],) for i in indices]


LOADERS = {
    "plain": lambda: DataLoader(TensorDataset(VALUES), batch_size=8),
    "shuffled": lambda: DataLoader(TensorDataset(VALUES), batch_size=8, shuffle=True),
    "workers": lambda: DataLoader(
        TensorDataset(VALUES),
        batch_size=8,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=1,
    ),
    "dropping": lambda: DataLoader(TensorDataset(VALUES), batch_size=8, drop_last=True),
    "batch sampler": lambda: DataLoader(
        TensorDataset(VALUES), batch_sampler=BatchSampler(RandomSampler(VALUES), 8, False)
    ),
    "items together": lambda: DataLoader(Listed(), batch_size=8, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_ids_are_indices_of_the_data_set(name: str) -> None:
    found = source(LOADERS[name](), 1, "test")
    assert (found.ids, found.samples) == ("dataset", 50)
    rows = []
    for got, values in found.rows([(3, 20), (40, 50)]):
        assert got.tolist() == values[:, 0].tolist()
        rows += got.tolist()
    assert rows == [*range(3, 20), *range(40, 50)]
    for _ in range(2):
        seen = []
        for ids, batch in found.epoch(0):
            assert ids.tolist() == batch[0][:, 0].tolist()
            seen += ids.tolist()
        assert len(seen) == (48 if name == "dropping" else 50)
        assert len(set(seen)) == len(seen)


def test_the_order_is_that_of_the_loader_itself() -> None:
    def one() -> DataLoader[Any]:
        return DataLoader(
            TensorDataset(VALUES),
            batch_size=8,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
        )

    plain, ours = one(), source(one(), 1, "test")
    for _ in range(2):
        expected = [batch[0][:, 0].tolist() for batch in plain]
        assert [ids.tolist() for ids, _ in ours.epoch(0)] == expected


def test_collation_is_the_users() -> None:
    found = source(DataLoader(TensorDataset(VALUES), batch_size=8, collate_fn=doubled), 1, "test")
    assert all((2 * ids == batch[:, 0]).all() for ids, batch in found.epoch(0))


def test_views_reach_workers_that_stay() -> None:
    replay = Replay(TensorDataset(VALUES), lambda x: x + torch.rand(()))
    loader = DataLoader(replay, batch_size=8, num_workers=1, persistent_workers=True, shuffle=True)
    found = source(loader, 3, "test")
    for view in (0, 2, 1):
        for ids, values in found.epoch(view):
            assert values.tolist() == [replay[view, int(i)].tolist() for i in ids]
    rows = [r for got, _ in found.rows([(40, 60)]) for r in got.tolist()]
    assert rows == list(range(40, 60))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(VALUES)


@pytest.mark.parametrize(
    "data",
    [list(VALUES.split(7)), [(x, x[:, 0]) for x in VALUES.split(7)], DataLoader(Stream(), 7)],
    ids=["inputs", "labelled", "stream"],
)
def test_other_batches_are_numbered_as_they_come(data) -> None:
    found = source(data, 1, "test")
    assert (found.ids, found.samples) == ("position", 50)
    for ids, batch in found.epoch(0):
        values = batch[0] if isinstance(batch, tuple) else batch
        assert ids.tolist() == values[:, 0].tolist()
    rows = [got.tolist() for got, values in found.rows([(10, 12), (30, 36)])]
    assert rows == [list(range(7, 14)), list(range(28, 35)), list(range(35, 42))]
    assert not list(found.rows([]))


@pytest.mark.parametrize(
    ("data", "views", "words"),
    [
        (iter([VALUES]), 1, "only once"),
        ((x for x in [VALUES]), 1, "only once"),
        ([], 1, "no example"),
        (DataLoader(TensorDataset(VALUES[:0])), 1, "empty"),
        ([VALUES], 2, "no augmentation to replay"),
        (DataLoader(TensorDataset(VALUES)), 2, "Replay"),
        (DataLoader(Subset(Replay(TensorDataset(VALUES)), [1])), 2, "in no Subset"),
        (VALUES, 1, "not an iterable"),
    ],
)
def test_data_without_ids_are_refused(data, views: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        source(data, views, "test")


def test_data_that_end_early_are_an_error() -> None:
    class Shrinking:
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter([VALUES[: 20 // self.times]])

    with pytest.raises(DataError, match="10 examples, and 20"):
        list(source(Shrinking(), 1, "test").rows([(0, 20)]))


def test_hashes_tell_inputs_apart() -> None:
    x = torch.randn(6, 3, 8, 8)
    base = input_hashes(x)
    assert len(set(base.tolist())) == 6
    assert (input_hashes(x.clone()) == base).all()
    assert (input_hashes(x.contiguous(memory_format=torch.channels_last)) == base).all()
    assert (input_hashes(x, first=2) == base[:2]).all()
    assert (input_hashes(x[2:3]) == base[2:3]).all()
    assert (input_hashes(x.flip(-1)) != base).all()
    assert (input_hashes(x.double()) != base).all()
    assert (input_hashes(x.reshape(6, 3, 64)) != base).all()
    assert (input_hashes({"x": x, "mask": torch.ones(6, 2)}) != base).all()
    assert len(input_hashes((torch.zeros(2, 0), torch.ones(2)))) == 2
    for kind in (torch.bool, torch.bfloat16, torch.int64, torch.complex64):
        assert len(set(input_hashes(torch.tensor([0, 1]).to(kind)).tolist())) == 2


def test_a_large_input_is_hashed_in_part_everywhere() -> None:
    x = torch.zeros(1, 3, 64, 64)
    changed = x.clone()
    changed[:, :, 32:, :] = 1
    assert input_hashes(x) != input_hashes(changed)


def test_random_transforms_in_the_data_set_are_noticed() -> None:
    class Noisy(Dataset[Tensor]):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> Tensor:
            return torch.randn(3)

    with pytest.raises(DataError, match=r"rf\.soft_labels\.Replay"):
        probed_hashes(source(DataLoader(Noisy(), batch_size=4), 1, "test"))
    hashes = probed_hashes(source(LOADERS["shuffled"](), 1, "test"))
    assert len(hashes) == 16
    assert np.array([*map(int, hashes)])[[0, -1]].tolist() == [0, 49]
