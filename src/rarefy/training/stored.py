"""Stored answers in the place of a teacher: they come with the batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.batches import split_batch
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.process import set_epoch
from rarefy.types import Data, Inputs


@dataclass(frozen=True)
class Answered:
    """In the place of a batch's labels: these, and what the teacher said of its inputs.

    Attributes:
        labels: of the batch; None where there are none.
        answers: the teacher's logits, or log-probabilities.
    """

    labels: Any
    answers: Tensor


def labels_of(labels: Any) -> Any:
    """The labels of a batch, whether answers come with them or not."""
    return labels.labels if isinstance(labels, Answered) else labels


class Joined:
    """Data with a store's answers to every batch; epoch ``e`` has the view ``e % views``.

    Args:
        store: the answers.
        data: those that it was written from, in any order that their loader gives.

    Attributes:
        origin: these data.

    Raises:
        DataError: the data are others.
    """

    def __init__(self, store: SoftLabels, data: Data) -> None:
        self.store, self.found, self.epoch = store, store.identified(data), 0
        self.origin = data

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is read next; without this, it is the one after the last."""
        self.epoch = epoch
        set_epoch(self.origin, epoch)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[tuple[Inputs, Answered]]:
        self.found.set_epoch(self.epoch)
        self.epoch += 1
        for ids, batch in self.found:
            inputs, labels = split_batch(batch)
            yield inputs, Answered(labels, self.store.answers(ids, self.found.view))
