"""Ids: the index in a data set whatever the loader does, or the running position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from rarefy.distillation.soft_labels.source import probed_hashes, source
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
    for got, values, _ in found.rows([(3, 20), (40, 50)]):
        assert got.tolist() == values[:, 0].tolist()
        rows += got.tolist()
    assert rows == [*range(3, 20), *range(40, 50)]
    for _ in range(2):
        seen = []
        for ids, batch, _ in found.epoch(0):
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
        assert [ids.tolist() for ids, _, _ in ours.epoch(0)] == expected


def test_collation_is_the_users() -> None:
    found = source(DataLoader(TensorDataset(VALUES), batch_size=8, collate_fn=doubled), 1, "test")
    assert all((2 * ids == batch[:, 0]).all() for ids, batch, _ in found.epoch(0))


def test_views_reach_workers_that_stay() -> None:
    replay = Replay(TensorDataset(VALUES), lambda x: x + torch.rand(()))
    loader = DataLoader(replay, batch_size=8, num_workers=1, persistent_workers=True, shuffle=True)
    found = source(loader, 3, "test")
    for view in (0, 2, 1):
        for ids, values, _ in found.epoch(view):
            assert values.tolist() == [replay[view, int(i)].tolist() for i in ids]
    rows = [r for got, _, _ in found.rows([(40, 60)]) for r in got.tolist()]
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
    for ids, batch, _ in found.epoch(0):
        values = batch[0] if isinstance(batch, tuple) else batch
        assert ids.tolist() == values[:, 0].tolist()
    rows = [got.tolist() for got, _, _ in found.rows([(10, 12), (30, 36)])]
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
        (DataLoader(Subset(TensorDataset(VALUES), [1])), 2, "or a Subset of one"),
        (VALUES, 1, "not an iterable"),
    ],
)
def test_data_without_ids_are_refused(data, views: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        source(data, views, "test")


def test_subsets_and_concatenations_replay_the_views_of_their_parts() -> None:
    pairs = TensorDataset(VALUES, VALUES)
    noisy, calm = Replay(pairs, torch.rand_like), Replay(pairs)
    parts = ConcatDataset([Subset(noisy, [7, 3]), pairs, Subset(calm, [5])])
    found = source(DataLoader(Subset(parts, [52, 1, 9, 0]), batch_size=4), 2, "test")
    for view, (_, inputs, _) in enumerate(found.rows([(0, 4), (4, 8)])):
        wanted = [VALUES[5], noisy[view, 3][0], VALUES[7], noisy[view, 7][0]]
        assert torch.equal(inputs, torch.stack(wanted))
    assert found.transform.count("Replay") == 2


def test_data_that_end_early_are_an_error() -> None:
    class Shrinking:
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter([VALUES[: 20 // self.times]])

    with pytest.raises(DataError, match="10 examples, and 20"):
        list(source(Shrinking(), 1, "test").rows([(0, 20)]))


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


@pytest.mark.parametrize("size", [1, 5, 16, 50])
def test_what_is_probed_does_not_depend_on_the_size_of_batches(size: int) -> None:
    for data in (DataLoader(TensorDataset(VALUES), batch_size=size), list(VALUES.split(size))):
        found = probed_hashes(source(data, 1, "test"))
        kind = isinstance(data, list)
        whole = [VALUES] if kind else DataLoader(TensorDataset(VALUES), batch_size=50)
        assert found == probed_hashes(source(whole, 1, "test"))
        assert len(found) == 16


def padded(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor(
        [y for _, y in items]
    )


def test_padding_to_the_longest_of_a_batch_changes_no_hash() -> None:
    items = [(torch.arange(1, 2 + n % 7), n) for n in range(20)]
    shapes, hashes = set(), []
    for size in (4, 20):
        found = source(DataLoader(items, size, collate_fn=padded), 1, "test")
        parts = list(found.rows([(0, 20)]))
        shapes |= {tuple(x.shape[1:]) for _, x, _ in parts}
        hashes.append(np.concatenate([h for _, _, h in parts]).tolist())
        assert [first for _, _, first in found.epoch(0)] == hashes[0][::size]
    assert len(shapes) > 1
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 7
