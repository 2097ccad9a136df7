"""The teacher's side: a network that answers, and is the same afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, call, evaluating, logits, moved, tensors, unchanged
from rarefy.copies import copied
from rarefy.distillation.soft_labels.records import Array, Layout
from rarefy.errors import DataError, InputError, RarefyError, first_line
from rarefy.types import Inputs


@contextmanager
def answering(teacher: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The teacher in eval mode without gradients on a device: itself, or a copy where it is not.

    Its training flags, buffers and attributes are as before afterwards.
    """
    places = {tensor.device for tensor in (*teacher.parameters(), *teacher.buffers())}
    here = copied(teacher).to(device) if places - {device} else teacher
    with evaluating(here), unchanged(here):
        yield here


def answer(teacher: nn.Module, inputs: Inputs, device: torch.device, where: str) -> Tensor:
    """Outputs of the teacher for a batch.

    Raises:
        InputError: it does not run, or its outputs are not of one row for each example.
    """
    try:
        outputs = logits(call(teacher, moved(inputs, device)))
    except RarefyError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(inputs))
        raise InputError(
            where,
            f"it does not run on a batch ({shapes.replace('torch.', '')}): {first_line(error)}",
            "Give a network that takes what the data yield",
        ) from error
    size = batch_size(inputs)
    if not outputs.ndim or len(outputs) != size:
        raise InputError(
            where,
            f"outputs of shape {tuple(outputs.shape)} for a batch of {size}",
            "The first dimension of outputs must be the batch",
        )
    return outputs.detach()


def require_usable(outputs: Tensor, layout: Layout, ids: Array, where: str) -> None:
    """Refuse outputs of another shape than before, or without a distribution.

    Raises:
        InputError: the shape is another.
        DataError: there is NaN or infinity; the message names the ids.
    """
    if tuple(outputs.shape[1:]) != layout.shape:
        raise InputError(
            where,
            f"the outputs of the batch with ids {_shown(ids)} are of shape "
            f"{tuple(outputs.shape[1:])} for one example, and were {layout.shape}",
            "Records have one size: pad all inputs to one length",
        )
    bad = ~layout.form.usable(layout.flat(outputs)).all(dim=-1).cpu().numpy()
    if bad.any():
        raise DataError(
            where,
            f"the answers to the examples with ids {_shown(ids[bad])}, in the batch with ids "
            f"{_shown(ids)}, hold NaN or infinity",
            "Check these inputs, and the teacher in this precision; nothing of them was stored",
        )


def _shown(ids: Array) -> str:
    if len(ids) > 1 and len(ids) == ids[-1] - ids[0] + 1:
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids[:8].tolist())) + (", ..." if len(ids) > 8 else "")
