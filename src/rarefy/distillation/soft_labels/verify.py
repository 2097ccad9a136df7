"""Recomputing some of a store's records, to see that it still says what the teacher says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.batches import device_of
from rarefy.distillation.soft_labels.answers import answer, answering, require_usable
from rarefy.distillation.soft_labels.manifest import Manifest
from rarefy.distillation.soft_labels.records import Array, Outputs
from rarefy.distillation.soft_labels.sequences import packed
from rarefy.distillation.soft_labels.source import Source
from rarefy.errors import DataError


def largest_error(
    store: Manifest,
    stored: Callable[[Array], tuple[Tensor, Array]],
    teacher: nn.Module,
    data: Source,
    samples: int,
) -> float:
    """The largest difference between what is stored and what the teacher says now.

    Args:
        store: the manifest.
        stored: rows to what is stored of them, and to the hashes of their inputs.
        teacher: the network that wrote the store.
        data: what it was written from.
        samples: how many records to recompute, evenly spread over all.

    Returns:
        The largest difference of a probability (at the form's own temperature), or of a value for
        outputs that are kept as they are, after both went through the form of the store.

    Raises:
        DataError: inputs are others.
    """
    where = "SoftLabels.verify"
    chosen = np.unique(np.linspace(0, store.rows - 1, min(samples, store.rows)).astype(np.int64))
    largest, device = 0.0, device_of(teacher)
    with answering(teacher, device) as model:
        for rows, inputs, hashes in data.rows(_spans(chosen)):
            outputs = answer(model, inputs, device, where)
            if store.sequences:
                outputs = packed(outputs, inputs, store.shape[0], where)
            require_usable(outputs, store.layout, rows % store.data.samples, where)
            fresh = store.layout.pack(outputs, rows, hashes, store.seed, store.salt)
            kept, expected = stored(rows)
            wrong = rows[hashes != expected]
            if len(wrong):
                raise DataError(
                    where,
                    f"the input with id {wrong[0] % store.data.samples} is another than the one "
                    "that the teacher answered",
                    "Give the data in the order and with the preprocessing of the store",
                )
            pair = [_compared(store, values) for values in (store.layout.unpack(fresh), kept)]
            largest = max(largest, float((pair[0] - pair[1]).abs().max()))
    return largest


def _spans(rows: Array) -> list[tuple[int, int]]:
    """Ascending rows as spans."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


def _compared(store: Manifest, values: Tensor) -> Tensor:
    """Outputs as they are compared: as probabilities where they are log-probabilities."""
    form = store.layout.form
    if isinstance(form, Outputs):
        return values
    temperature = getattr(form, "temperature", 1.0)
    return torch.softmax(store.layout.flat(values) / temperature, dim=-1)
