"""What makes a training this one, so that no other goes on from its checkpoints."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rarefy.batches import tensors
from rarefy.copies import fingerprint
from rarefy.training.job import Job
from rarefy.training.networks import require_dense
from rarefy.training.objective import Objective
from rarefy.training.options import TrainOptions
from rarefy.training.teachers import Aside


def identity_of(objective: Objective, length: int, job: Job, processes: int) -> dict[str, str]:
    """Names and values of all that a training depends on, beside the data themselves."""
    networks = {"network": objective.network, **objective.teachers}
    for network in networks.values():
        require_dense(network, f"{job.where}(checkpoint=...)")
    return {
        "call": job.where,
        "seed": str(job.seed),
        "processes": str(processes),
        "batches": str(length),
        **{name: fingerprint(network)[:16] for name, network in networks.items()},
        "loss": described(objective.loss),
        "label_weight": str(objective.label_weight),
        "label_loss": described(objective.label_loss),
        "metric": described(job.metric),
        "after_step": described(job.after_step),
        "regularizer": described(job.regularizer),
        **{name: str(value) for name, value in plain(job.options).items()},
    }


def plain(options: TrainOptions) -> dict[str, Any]:
    """Options by name; what makes an optimizer as a text."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: described(v) if callable(v) else v for name, v in given.items()}


def _given(value: Any) -> str:
    return described(value) if callable(value) else _anywhere(str(value))


def _anywhere(text: str) -> str:
    """A text without the addresses in memory of what it names."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def described(value: Any) -> str:
    """A text that is the same for equal values, also in another process."""
    if isinstance(value, Aside):
        value = value.module
    if isinstance(value, partial):
        given = [*map(_given, value.args)]
        given += [f"{name}={_given(v)}" for name, v in value.keywords.items()]
        return f"{described(value.func)}({', '.join(given)})"
    if value is None or isinstance(value, nn.Module) or is_dataclass(value):
        return _anywhere(repr(value))
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def digest(batch: Any) -> str:
    """A hash of the shapes, types and bytes of all tensors of a batch."""
    found = hashlib.sha256()
    for tensor in tensors(batch):
        found.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
        flat = dense.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
