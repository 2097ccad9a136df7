"""Reading: answers by (view, id), from memory maps, checked when they are first touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from rarefy.batches import seeded, split_batch
from rarefy.copies import fingerprint
from rarefy.distillation.soft_labels import manifest as manifests
from rarefy.distillation.soft_labels.manifest import Manifest
from rarefy.distillation.soft_labels.records import Array, checksums
from rarefy.distillation.soft_labels.sequences import spread
from rarefy.distillation.soft_labels.shards import opened, shards_of
from rarefy.distillation.soft_labels.source import Source, probed_hashes, source
from rarefy.distillation.soft_labels.verify import largest_error
from rarefy.errors import DataError, FormatError, InputError, OutputError
from rarefy.process import replayable
from rarefy.types import Batch, Data, Inputs


class SoftLabels:
    """A teacher's stored answers, in the place of the teacher.

    Opening reads the manifest and looks at the size of every shard. Records are read from memory
    maps when they are asked for; each is checked the first time, and a damaged one is an error,
    never an answer. The object can be sent to other processes.

    Args:
        path: a folder that :func:`write_soft_labels` wrote.

    Attributes:
        path: the folder.
        manifest: what the store holds.

    Raises:
        InputError: the folder holds no store.
        OutputError: the store is not complete.
        FormatError: a file is damaged, missing, or of another version.

    Example:
        >>> import tempfile, torch
        >>> from rarefy.distillation.soft_labels.write import write_soft_labels
        >>> teacher, data = nn.Linear(4, 3), [torch.randn(8, 4), torch.randn(8, 4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = write_soft_labels(teacher, data, folder, progress=False)
        ...     soft = SoftLabels(folder).answers(torch.tensor([0, 9]))
        >>> soft.shape
        torch.Size([2, 3])
    """

    path: Path
    manifest: Manifest

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = manifests.load(self.path)
        missing = self.manifest.missing(self.path)
        if missing:
            raise OutputError(
                str(self.path),
                f"{missing:,} of {self.manifest.rows:,} records are not written yet",
                "Call write_soft_labels again as before: it continues where it was",
            )
        self._open()

    def __len__(self) -> int:
        return self.manifest.data.samples

    def __repr__(self) -> str:
        return f"SoftLabels({str(self.path)!r})\n{self.manifest}"

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

    @property
    def views(self) -> int:
        """Answers to each example; epoch e is to see view ``e % views``."""
        return self.manifest.views

    def answers(self, ids: Tensor | None = None, view: int = 0) -> Tensor:
        """What the teacher said of some examples.

        Args:
            ids: ``(N,)`` whole numbers; None for all examples in order.
            view: which augmentation of them.

        Returns:
            Float32 ``(N, *shape)`` on the CPU: log-probabilities over the classes, whose softmax at
            any temperature is that of the teacher's logits, up to what the form left out (see
            :class:`TopK` and :class:`Sampled`); for :class:`Outputs` the outputs themselves. Of
            sequences with an ``attention_mask`` the positions that it counts come first.

        Raises:
            DataError: an id or view is not in the store.
            FormatError: a record is damaged.
        """
        count = len(self)
        wanted = np.arange(count) if ids is None else ids.detach().cpu().numpy()
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < count):
            self._refuse(f"id {wanted.max() if wanted.max() >= count else wanted.min()}", count)
        if not 0 <= view < self.views:
            self._refuse(f"view {view}", self.views)
        return self.manifest.layout.unpack(self._records(view * count + wanted))

    def answers_to(self, inputs: Inputs, ids: Tensor, view: int = 0) -> Tensor:
        """What the teacher said of the examples of a batch, as it would say it of this batch.

        Args:
            inputs: of the batch: records of sequences have the positions that ``attention_mask``
                counts, which are put where it has them; what stands at padding has no meaning.
            ids: ``(N,)``, of its examples.
            view: which augmentation of them.

        Raises:
            DataError: as :meth:`answers`, or the inputs have no mask or longer sequences.
        """
        found = self.answers(ids, view)
        if not self.manifest.sequences:
            return found
        return spread(found, inputs, f"SoftLabels({str(self.path)!r})")

    def identified(self, data: Data) -> Identified:
        """The data with the id of every example, after a check that they are those of the store.

        Raises:
            DataError: the data are others, in another order, or without the views of the store.
        """
        return Identified(self, data)

    def join(
        self, data: Data | Identified, epoch: int = 0
    ) -> Iterator[tuple[Inputs, Tensor | None, Tensor]]:
        """Batches of ``(inputs, targets, answers)`` for one epoch, in the order of the data.

        Args:
            data: what the store was written from; a ``DataLoader`` may shuffle and use workers.
                With :meth:`identified` around them they are checked once for many epochs.
            epoch: which decides the view: ``epoch % views``.

        Raises:
            DataError: the data are others than those that the teacher saw.
        """
        found = data if isinstance(data, Identified) else self.identified(data)
        found.set_epoch(epoch)
        for ids, batch in found:
            inputs, targets = split_batch(batch)
            yield inputs, targets, self.answers_to(inputs, ids, found.view)

    def check(self, teacher: nn.Module) -> None:
        """Make sure that this teacher wrote the store.

        Raises:
            InputError: its weights are others.
        """
        found = fingerprint(teacher)
        if found != self.manifest.teacher.fingerprint:
            raise InputError(
                f"SoftLabels({str(self.path)!r})",
                f"the store was written by a {self.manifest.teacher.class_name} with the weights "
                f"{self.manifest.teacher.fingerprint[:16]}, and this {type(teacher).__name__} has "
                f"{found[:16]}",
                "Give the teacher that wrote it, or write the store again",
            )

    def verify(self, teacher: nn.Module, data: Data, samples: int = 64) -> float:
        """Recompute some records, and return the largest error.

        Args:
            teacher: the network that wrote the store; it is not changed.
            data: what it was written from.
            samples: how many records, evenly spread over all, at least 1.

        Returns:
            The largest difference of a probability between the record and what would be stored
            now; for :class:`Outputs`, of a value. On the machine that wrote it, 0 or a rounding of
            half precision (5e-4).

        Raises:
            InputError: the teacher is another, or ``samples`` is below 1.
            DataError: the data are others.
            FormatError: a record is damaged.
        """
        if samples < 1:
            raise InputError(f"SoftLabels.verify(samples={samples})", "at least 1", "Write 64")
        self.check(teacher)
        with seeded(0), replayable(data):
            found = self.identified(data).source
            return largest_error(self.manifest, self._stored, teacher, found, samples)

    def _open(self) -> None:
        store = self.manifest
        self._layout = store.layout
        shards = shards_of(self.path, store.rows, store.shard_rows)
        self._maps = [opened(shard, self._layout) for shard in shards]
        self._checked = np.zeros(store.rows, bool)

    def _records(self, rows: Array) -> Array:
        """The records of some rows, each checked when it is first read."""
        each = self.manifest.shard_rows
        if len(self._maps) == 1:
            records = self._maps[0][rows]
        else:
            shard, place = np.divmod(rows, each)
            records = np.empty(len(rows), self._layout.dtype)
            for index in np.unique(shard):
                here = shard == index
                records[here] = self._maps[index][place[here]]
        new = ~self._checked[rows]
        if new.any():
            self._check(records[new], rows[new])
        return records

    def _check(self, records: Array, rows: Array) -> None:
        bad = rows[checksums(records, rows, self.manifest.salt) != records["checksum"]]
        if len(bad):
            shard = bad[0] // self.manifest.shard_rows
            view, index = divmod(int(bad[0]), len(self))
            raise FormatError(
                str(self.path / f"shard-{shard:05d}.records"),
                f"the record of id {index}, view {view} is damaged, or of another store",
                "Delete this file and call write_soft_labels again: it is written anew",
            )
        self._checked[rows] = True

    def _stored(self, rows: Array) -> tuple[Tensor, Array]:
        records = self._records(rows)
        return self._layout.unpack(records), records["input"]

    def require_aligned(self, index: int, view: int, found: int) -> None:
        """Make sure that the teacher answered the input with this hash.

        Raises:
            DataError: it was another.
        """
        (record,) = self._records(np.array([view * len(self) + index]))
        if record["input"] != found:
            raise DataError(
                f"SoftLabels({str(self.path)!r})",
                f"the input with id {index}, view {view} is another than the one that the teacher "
                f"answered ({self.manifest.data.transform or 'without a transform'})",
                "Give the data in the order and with the preprocessing of the store; random "
                "transforms belong into rf.soft_labels.Replay(dataset, transform)",
            )

    def _refuse(self, what: str, count: int) -> None:
        raise DataError(
            f"SoftLabels({str(self.path)!r})",
            f"{what} was asked for, and there are {count}, from 0",
            "Write the store again with these data and views",
        )


class Identified:
    """Data of a store, whose batches are ``(ids, batch)``; made by :meth:`SoftLabels.identified`.

    Attributes:
        view: of the epoch that is read next.
        source: the data by row.
    """

    view: int
    source: Source

    def __init__(self, labels: SoftLabels, data: Data) -> None:
        where = f"SoftLabels({str(labels.path)!r})"
        self.labels, self.view = labels, 0
        with seeded(0), replayable(data):
            self.source = source(data, labels.views, where)
            hashes = probed_hashes(self.source)
        store = labels.manifest
        facts = store.data.model_copy(
            update={
                "ids": self.source.ids,
                "samples": self.source.samples,
                "inputs": hashes,
                "transform": self.source.transform,
            }
        )
        found = manifests.differences(store, store.model_copy(update={"data": facts}))
        if found:
            what, remedies = zip(*found, strict=True)
            raise DataError(
                where,
                "the data are not those that it was written from: " + "; ".join(what),
                f"Go on like this: {'; '.join(dict.fromkeys(remedies))}; or write the store again",
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the view that the next pass sees."""
        self.view = epoch % self.labels.views

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        view = self.view
        for ids, batch, first in self.source.epoch(view):
            self.labels.require_aligned(int(ids[0]), view, first)
            yield ids, batch
