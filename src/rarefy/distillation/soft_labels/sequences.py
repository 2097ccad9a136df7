"""Answers to sequences in records of one size, whatever the length that their batch was padded to.

A record has the positions that the ``attention_mask`` of the inputs counts, first to last, and
after them nothing that is read. So padding to the longest of a batch, on either side, and batches
of another size make no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.batches import padding_of
from rarefy.distillation.soft_labels.source import Source
from rarefy.errors import DataError
from rarefy.types import Inputs


def counted(inputs: Inputs) -> Tensor | None:
    """``(N, L)``, True at positions that are no padding; None where the inputs do not say."""
    mask = padding_of(inputs)
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def are_sequences(outputs: Tensor, inputs: Inputs, dim: int) -> bool:
    """Whether outputs ``(N, L, C)`` are of the positions of the inputs."""
    mask = counted(inputs)
    return mask is not None and outputs.ndim == 3 and dim != 1 and outputs.shape[:2] == mask.shape


def longest(data: Source) -> int:
    """The most positions that an example of the first view has; all of them are read."""
    masks = (counted(inputs) for _, inputs, _ in data.rows([(0, data.samples)]))
    return max((int(m.sum(1).max()) for m in masks if m is not None), default=0)


def packed(outputs: Tensor, inputs: Inputs, length: int, where: str) -> Tensor:
    """Outputs ``(N, L, C)`` as ``(N, length, C)``: positions that count, then zeros.

    Outputs of other positions than those of the inputs are returned as they are.

    Raises:
        DataError: an example has more positions.
    """
    mask = counted(inputs)
    if mask is None or outputs.shape[:2] != mask.shape:
        return outputs
    mask = mask.to(outputs.device)
    counts = _counts(mask, length, where)
    first = (~mask).int().argsort(dim=1, stable=True)[:, :length]
    found = outputs.gather(1, first[..., None].expand(-1, -1, outputs.shape[-1]))
    real = torch.arange(first.shape[1], device=mask.device) < counts[:, None]
    result = outputs.new_zeros(len(outputs), length, outputs.shape[-1])
    result[:, : first.shape[1]] = found.masked_fill(~real[..., None], 0)
    return result


def spread(answers: Tensor, inputs: Inputs, where: str) -> Tensor:
    """Answers ``(N, length, C)`` of records at the positions of the inputs, ``(N, L, C)``.

    What stands at padding is without meaning, and finite where the answers are.

    Raises:
        DataError: the inputs have no mask, or more positions.
    """
    mask = counted(inputs)
    if mask is None or len(mask) != len(answers):
        raise DataError(
            where,
            "it holds the positions of sequences that attention_mask counts, and these inputs have "
            "none",
            "Yield mappings with the attention_mask that the teacher was given",
        )
    mask = mask.to(answers.device)
    _counts(mask, answers.shape[1], where)
    place = (mask.cumsum(1) - 1).clamp(0, answers.shape[1] - 1)
    return answers.gather(1, place[..., None].expand(-1, -1, answers.shape[-1]))


def _counts(mask: Tensor, length: int, where: str) -> Tensor:
    counts = mask.sum(1)
    if len(counts) and int(counts.max()) > length:
        raise DataError(
            where,
            f"a sequence has {int(counts.max())} positions, and the longest of the first view "
            f"had {length}",
            "Give the data as they were when the store was begun, and cut them to one longest "
            "length where transforms change it",
        )
    return counts
