"""Stored answers in the place of a teacher: they come with the batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.batches import split_batch
from rarefy.distillation.losses import KD, CTCPosteriors, Loss
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Outputs, Sampled
from rarefy.errors import InputError
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
            yield inputs, Answered(labels, self.store.answers_to(inputs, ids, self.found.view))


def require_answerable(loss: Any, store: SoftLabels) -> None:
    """Refuse a loss that means something else of what a store holds than of the teacher's outputs.

    Raises:
        InputError: a term compares outputs, and log-probabilities are stored; or classes were
            drawn, of which only a term that is linear in their probabilities at this temperature
            is right on average.
    """
    form = store.manifest.layout.form
    if not isinstance(loss, Loss) or isinstance(form, Outputs):
        return
    temperature = form.temperature if isinstance(form, Sampled) else None
    for _, term in loss.terms:
        name = type(term).__name__
        if term.needs_outputs:
            raise InputError(
                f"distill(loss={loss!r})",
                f"{name} compares the outputs themselves, and the store holds log-probabilities",
                "Write the store with form=rf.soft_labels.Outputs(), or give a loss of "
                "probabilities, such as KD()",
            )
        fair = isinstance(term, KD | CTCPosteriors) and term.temperature == temperature
        if temperature is not None and not fair:
            raise InputError(
                f"distill(loss={loss!r})",
                f"the classes of the store were drawn for KD at temperature {temperature:g}, "
                f"and are no fair sample for {term!r}",
                f"Give loss=KD(temperature={temperature:g}), or write the store with "
                "form=TopK(k), Dense() or draws at the temperature of KD",
            )
