"""Each process's part of the data: of equal length on all of them, in a common order."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from rarefy.batches import seeded
from rarefy.process import set_epoch
from rarefy.types import Data

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Share:
    """Every n-th batch of an iterable, for one of n processes; all get equally many."""

    def __init__(self, data: Data, index: int, count: int) -> None:
        self.data, self.index, self.count = data, index, count

    def set_epoch(self, epoch: int) -> None:
        set_epoch(self.data, epoch)

    def __length_hint__(self) -> int:
        return operator.length_hint(self.data, 0) // self.count

    def __iter__(self) -> Iterator[Any]:
        rounds = zip(*[iter(self.data)] * self.count, strict=False)
        return (batches[self.index] for batches in rounds)


class _Rounds:
    """Every n-th batch of a batch sampler, for one of n processes; all get equally many.

    The order is drawn from a seed of its own, so that it is the same on all of them, whatever else
    they draw.
    """

    def __init__(self, sampler: Any, seed: int, index: int, count: int) -> None:
        self.sampler, self.seed, self.index, self.count = sampler, seed, index, count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        set_epoch(self.sampler, epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.count

    def __iter__(self) -> Iterator[Any]:
        with seeded(self.seed + self.epoch):
            drawn = list(self.sampler)
        whole = len(drawn) // self.count * self.count
        yield from drawn[self.index : whole : self.count]


KEPT = (
    "dataset num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context "
    "generator prefetch_factor persistent_workers"
).split()
"""Arguments of a loader that stay when its batches are shared."""


def divided(data: Data) -> bool:
    """Whether every process has its own part of the data already.

    So it is with a ``DistributedSampler``, and a loader that Accelerate prepared.
    """
    from accelerate.data_loader import DataLoaderAdapter

    data = getattr(data, "origin", data)
    batched = getattr(data, "batch_sampler", None)
    samplers = (getattr(data, "sampler", None), getattr(batched, "sampler", None))
    return isinstance(data, DataLoaderAdapter) or any(
        isinstance(sampler, DistributedSampler) for sampler in samplers
    )


def local_share(data: Data, seed: int, accelerator: Accelerator) -> Data:
    """This process's part of the data; all of it where there is one process.

    Of data that can only be read one batch after the other, every process reads all batches and
    uses its own.
    """
    index, count = accelerator.process_index, accelerator.num_processes
    if count == 1 or divided(data):
        return data
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return _Share(data, index, count)
    if data.batch_sampler is None:
        return _Share(data, index, count)
    rounds: Any = _Rounds(data.batch_sampler, seed, index, count)
    options = {name: getattr(data, name) for name in KEPT}
    return DataLoader(batch_sampler=rounds, **options)
