"""Data with the id of every example: the index in its data set, or its running position.

A ``DataLoader`` over a map-style data set keeps its batch size, workers and collation; whether and
how it shuffles makes no difference to ids. Any other iterable of batches is read in its order, and
an id is the number of examples before.
"""

from __future__ import annotations

import operator
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rarefy.batches import batch_size, batches, check_rereadable, split_batch, tensors
from rarefy.distillation.soft_labels.records import Array
from rarefy.distillation.soft_labels.views import Key, Replay
from rarefy.errors import DataError
from rarefy.types import Batch, Data, Inputs

Spans: TypeAlias = Sequence[tuple[int, int]]
"""First row, and the one after the last, of rows that are asked for; ascending."""

PROBED = 16
"""Examples whose hashes tell data sets apart."""

HASHED = 1024
"""Numbers of a tensor, evenly spread, that its hash covers: at least these, and fewer than twice
as many."""


class Source(ABC):
    """Examples by row: ``view * samples + id``.

    Attributes:
        ids: what an id is, see :class:`~rarefy.distillation.soft_labels.manifest.DataFacts`.
        samples: examples of one view.
        chunk: examples that are best asked for together.
        transform: what replays the views, in words.
    """

    ids: str
    samples: int
    chunk: int
    transform: str

    @abstractmethod
    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs]]:
        """Inputs with their rows, batch by batch; batches may hold rows that were not asked for."""

    @abstractmethod
    def probe(self) -> tuple[Array, Inputs]:
        """Some examples of the first view, spread over all where that is cheap, by row."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of a pass, or 0 where that is not known."""

    @abstractmethod
    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch]]:
        """One pass in the order of the data, with the ids of every batch."""


def source(data: Data, views: int, where: str) -> Source:
    """Examples with ids of any data.

    Raises:
        DataError: the data are empty, can be read only once, or have no views to replay.
    """
    check_rereadable(data, where)
    mapped = (
        isinstance(data, DataLoader)
        and data.batch_sampler is not None
        and not isinstance(data.dataset, IterableDataset)
        and hasattr(data.dataset, "__len__")
    )
    found: Source = Indexed(data, where) if mapped else Running(data, where)  # type: ignore[arg-type]
    if views > 1 and not (isinstance(found, Indexed) and found.replay):
        raise DataError(
            where,
            f"{views} views were asked for, and these data have no augmentation to replay",
            "Give a DataLoader over rf.soft_labels.Replay(dataset, transform), in no Subset",
        )
    return found


class Indexed(Source):
    """A ``DataLoader`` over a map-style data set."""

    ids = "dataset"

    def __init__(self, loader: DataLoader[Any], where: str) -> None:
        self.loader, self.where = loader, where
        self.samples = len(loader.dataset)  # type: ignore[arg-type]
        self.replay = isinstance(loader.dataset, Replay)
        self.transform = loader.dataset.description if isinstance(loader.dataset, Replay) else ""
        if not self.samples:
            raise DataError(where, "the data set is empty", "Check how it is made")
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self.chunk = size if isinstance(size, int) else 32
        self.order = _Order(loader.batch_sampler)
        self.keyed = _keyed(loader, self.order)

    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs]]:
        """Batches of exactly the rows asked for."""
        keys = [
            [divmod(row, self.samples) for row in range(begin, min(begin + self.chunk, stop))]
            for start, stop in spans
            for begin in range(start, stop, self.chunk)
        ]
        for indices, batch in _keyed(self.loader, keys):
            view, index = indices.T.numpy()
            yield view * self.samples + index, split_batch(batch)[0]

    def probe(self) -> tuple[Array, Inputs]:
        """A batch of ids evenly spread over the data set."""
        count = min(max(self.chunk, PROBED), self.samples)
        rows = np.linspace(0, self.samples - 1, count).astype(np.int64)
        ((_, batch),) = _keyed(self.loader, [[(0, int(row)) for row in rows]], workers=0)
        return rows, split_batch(batch)[0]

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch]]:
        """One pass in the order of the user's sampler."""
        self.order.view = view
        for indices, batch in self.keyed:
            yield indices[:, 1], batch


class Running(Source):
    """Batches in their order; counted once, which also shows that they can be read again."""

    ids = "position"
    chunk = 1
    transform = ""

    def __init__(self, data: Data, where: str) -> None:
        self.data, self.where = data, where
        self.samples = sum(batch_size(inputs) for inputs, _ in batches(data, where))

    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs]]:
        """Every batch that holds a row asked for, whole."""
        last = max((stop for _, stop in spans), default=0)
        begin = 0
        for inputs, _ in batches(self.data, self.where) if spans else ():
            end = begin + batch_size(inputs)
            if any(start < end and begin < stop for start, stop in spans):
                yield np.arange(begin, end), inputs
            begin = end
            if begin >= last:
                return
        if begin < last:
            raise DataError(
                self.where,
                f"the data yielded {begin} examples, and {self.samples} when they were counted",
                "Give data that yield the same every time",
            )

    def probe(self) -> tuple[Array, Inputs]:
        """The first batch."""
        return next(self.rows([(0, 1)]))

    def __len__(self) -> int:
        return operator.length_hint(self.data, 0)

    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch]]:
        """One pass."""
        begin = 0
        for batch in self.data:
            size = batch_size(split_batch(batch)[0])
            yield torch.arange(begin, begin + size), batch
            begin += size


class _Order:
    """The user's batches of indices, as keys of the view of the epoch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.view = sampler, 0
        self.batch_size = getattr(sampler, "batch_size", None)
        self.drop_last = getattr(sampler, "drop_last", False)

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self.sampler:
            yield [(self.view, int(index)) for index in indices]

    def __len__(self) -> int:
        return len(self.sampler)


class _Keyed:
    """A data set by (view, id), whose items carry their keys."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.replay = dataset, isinstance(dataset, Replay)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        wanted = list(keys) if self.replay else [index for _, index in keys]
        many = getattr(self.dataset, "__getitems__", None)
        items = many(wanted) if many is not None else [self.dataset[key] for key in wanted]
        return list(zip(keys, items, strict=True))

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        return self.__getitems__([key])[0]


class _Collate:
    """The user's collation, beside the keys as a tensor ``(N, 2)``."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Key, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([key for key, _ in items]), self.collate([item for _, item in items])


def _keyed(
    loader: DataLoader[Any], order: Iterable[list[Key]], workers: int | None = None
) -> DataLoader[Any]:
    """The user's loader in another order, whose batches are ``(keys, batch)``."""
    count = loader.num_workers if workers is None else workers
    processes = {
        "num_workers": count,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    return DataLoader(
        _Keyed(loader.dataset),  # type: ignore[arg-type]
        batch_sampler=order,
        collate_fn=_Collate(loader.collate_fn),
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **processes if count else {},
    )


def input_hashes(inputs: Inputs, first: int | None = None) -> Array:
    """CRC-32 of each example's tensors: shapes, types, and evenly spread numbers.

    Args:
        inputs: a batch.
        first: how many examples; None for all.
    """
    count = batch_size(inputs)
    found = [0] * count if first is None else [0] * min(count, first)
    for tensor in tensors(inputs):
        if not tensor.ndim or len(tensor) != count or not tensor.numel():
            continue
        rows = tensor[: len(found)].detach().reshape(len(found), -1)
        picked = rows[:, :: max(1, rows.shape[1] // HASHED)].cpu().contiguous()
        lines = picked.view(torch.uint8).numpy()
        head = f"{tuple(tensor.shape[1:])} {tensor.dtype}".encode()
        found = [
            zlib.crc32(line.data, zlib.crc32(head, before))
            for before, line in zip(found, lines, strict=True)
        ]
    return np.array(found, np.uint32)


def probed_hashes(data: Source) -> dict[str, str]:
    """Id to hash of the input, for some ids of the first view.

    Raises:
        DataError: an id has another input when it is read again.
    """
    once, again = ({}, {})  # type: dict[str, str], dict[str, str]
    for found in (once, again):
        rows, inputs = data.probe()
        hashes = input_hashes(inputs)
        picked = np.unique(np.linspace(0, len(rows) - 1, min(PROBED, len(rows))).astype(int))
        found.update((str(rows[i]), f"{hashes[i]:08x}") for i in picked)
    if once != again:
        raise DataError(
            getattr(data, "where", "data"),
            "the same examples are others when they are read again",
            "Give random transforms to rf.soft_labels.Replay(dataset, transform), and batches "
            "in an order that does not change",
        )
    return once
