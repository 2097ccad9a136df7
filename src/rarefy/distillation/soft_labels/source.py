"""Data with the id of every example: the index in its data set, or its running position.

A ``DataLoader`` over a map-style data set keeps its batch size, workers and collation; whether and
how it shuffles makes no difference to ids. Any other iterable of batches is read in its order, and
an id is the number of examples before.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rarefy.batches import batch_size, batches, check_rereadable, split_batch, take
from rarefy.distillation.soft_labels.hashes import input_hashes, item_hash
from rarefy.distillation.soft_labels.records import Array
from rarefy.distillation.soft_labels.views import Key, Replay, origin, replays
from rarefy.errors import DataError
from rarefy.types import Batch, Data, Inputs

Spans: TypeAlias = Sequence[tuple[int, int]]
"""First row, and the one after the last, of rows that are asked for; ascending."""

PROBED = 16
"""Examples whose hashes tell data sets apart."""


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
    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs, Array]]:
        """Inputs with their rows and hashes, batch by batch; batches may hold rows that were not
        asked for."""

    @abstractmethod
    def probe(self, count: int) -> tuple[Array, Inputs]:
        """About as many examples of the first view, by row: spread over all where that is cheap."""

    @abstractmethod
    def known(self) -> dict[str, str]:
        """Id to hash of some inputs of the first view, as they are batched."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of a pass, or 0 where that is not known."""

    @abstractmethod
    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch, int]]:
        """One pass in the order of the data: the ids of a batch, it, and its first input's hash."""


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
    if views > 1 and not found.transform:
        raise DataError(
            where,
            f"{views} views were asked for, and these data have no augmentation to replay",
            "Give a DataLoader over rf.soft_labels.Replay(dataset, transform), or a Subset of one",
        )
    return found


class Indexed(Source):
    """A ``DataLoader`` over a map-style data set."""

    ids = "dataset"

    def __init__(self, loader: DataLoader[Any], where: str) -> None:
        self.loader, self.where = loader, where
        self.samples = len(loader.dataset)  # type: ignore[arg-type]
        self.transform = "; ".join(found.description for found in replays(loader.dataset))
        if not self.samples:
            raise DataError(where, "the data set is empty", "Check how it is made")
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self.chunk = size if isinstance(size, int) else 32
        self.order = _Order(loader.batch_sampler)
        self.keyed = _keyed(loader, self.order, hashed=1)

    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs, Array]]:
        """Batches of exactly the rows asked for."""
        keys = [
            [divmod(row, self.samples) for row in range(begin, min(begin + self.chunk, stop))]
            for start, stop in spans
            for begin in range(start, stop, self.chunk)
        ]
        for indices, hashes, batch in _keyed(self.loader, keys):
            view, index = indices.T.numpy()
            yield view * self.samples + index, split_batch(batch)[0], np.array(hashes, np.uint32)

    def probe(self, count: int) -> tuple[Array, Inputs]:
        """A batch of ids evenly spread over the data set."""
        rows = np.linspace(0, self.samples - 1, min(count, self.samples)).astype(np.int64)
        keys = [[(0, int(row)) for row in rows]]
        ((_, _, batch),) = _keyed(self.loader, keys, hashed=0, workers=0)
        return rows, split_batch(batch)[0]

    def known(self) -> dict[str, str]:
        """Of one batch, which is the same whatever the size of the loader's."""
        rows, inputs = self.probe(PROBED)
        return _named(rows, input_hashes(inputs))

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch, int]]:
        """One pass in the order of the user's sampler."""
        self.order.view = view
        for indices, (first,), batch in self.keyed:
            yield indices[:, 1], batch, first


class Running(Source):
    """Batches in their order; counted once, which also shows that they can be read again."""

    ids = "position"
    chunk = 1
    transform = ""

    def __init__(self, data: Data, where: str) -> None:
        self.data, self.where = data, where
        self.samples = sum(batch_size(inputs) for inputs, _ in batches(data, where))

    def rows(self, spans: Spans) -> Iterator[tuple[Array, Inputs, Array]]:
        """Every batch that holds a row asked for, whole."""
        last = max((stop for _, stop in spans), default=0)
        begin = 0
        for inputs, _ in batches(self.data, self.where) if spans else ():
            end = begin + batch_size(inputs)
            if any(start < end and begin < stop for start, stop in spans):
                yield np.arange(begin, end), inputs, input_hashes(inputs)
            begin = end
            if begin >= last:
                return
        if begin < last:
            raise DataError(
                self.where,
                f"the data yielded {begin} examples, and {self.samples} when they were counted",
                "Give data that yield the same every time",
            )

    def probe(self, count: int) -> tuple[Array, Inputs]:
        """The first batch."""
        rows, inputs, _ = next(self.rows([(0, 1)]))
        return rows, inputs

    def known(self) -> dict[str, str]:
        """Of the first batches."""
        stop = min(PROBED, self.samples)
        rows, _, hashes = zip(*self.rows([(0, stop)]), strict=True)
        return _named(np.concatenate(rows)[:stop], np.concatenate(hashes)[:stop])

    def __len__(self) -> int:
        return operator.length_hint(self.data, 0)

    def epoch(self, view: int) -> Iterator[tuple[Tensor, Batch, int]]:
        """One pass."""
        begin = 0
        for batch in self.data:
            inputs, _ = split_batch(batch)
            size = batch_size(inputs)
            yield torch.arange(begin, begin + size), batch, int(input_hashes(take(inputs, 1))[0])
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
        self.dataset = dataset
        self.whole, self.nested = isinstance(dataset, Replay), bool(replays(dataset))

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        if self.nested and not self.whole:
            return [(key, self._nested(*key)) for key in keys]
        wanted = list(keys) if self.whole else [index for _, index in keys]
        many = getattr(self.dataset, "__getitems__", None)
        items = many(wanted) if many is not None else [self.dataset[key] for key in wanted]
        return list(zip(keys, items, strict=True))

    def _nested(self, view: int, index: int) -> Any:
        dataset, place = origin(self.dataset, index)
        return dataset[(view, place) if isinstance(dataset, Replay) else place]

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        return self.__getitems__([key])[0]


class _Collate:
    """The user's collation, beside the keys as a tensor ``(N, 2)`` and the hashes of the first."""

    def __init__(self, collate: Callable[[list[Any]], Any], hashed: int | None) -> None:
        self.collate, self.hashed = collate, hashed

    def __call__(self, items: list[tuple[Key, Any]]) -> tuple[Tensor, list[int], Any]:
        hashes = [item_hash(item) for _, item in items[: self.hashed]]
        keys = torch.tensor([key for key, _ in items])
        return keys, hashes, self.collate([item for _, item in items])


def _keyed(
    loader: DataLoader[Any],
    order: Iterable[list[Key]],
    hashed: int | None = None,
    workers: int | None = None,
) -> DataLoader[Any]:
    """The user's loader in another order, whose batches are ``(keys, hashes, batch)``.

    Args:
        loader: the user's.
        order: keys of every batch.
        hashed: how many examples of a batch, None for all.
        workers: None for as many as the user's.
    """
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
        collate_fn=_Collate(loader.collate_fn, hashed),
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **processes if count else {},
    )


def _named(rows: Array, hashes: Array) -> dict[str, str]:
    return {str(row): f"{found:08x}" for row, found in zip(rows, hashes, strict=True)}


def probed_hashes(data: Source) -> dict[str, str]:
    """Id to hash of the input as it is batched, for some ids of the first view.

    Raises:
        DataError: an id has another input when it is read again.
    """
    once, again = data.known(), data.known()
    if once != again:
        raise DataError(
            getattr(data, "where", "data"),
            "the same examples are others when they are read again",
            "Give random transforms to rf.soft_labels.Replay(dataset, transform), and batches "
            "in an order that does not change",
        )
    return once
