"""What training shares with its process: devices, other processes, generators, the environment.

Everything here leaves the process as it was: Accelerate's state, environment variables, warning
filters and the generators of data loaders are put back.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from rarefy.types import Data

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def quiet_setup() -> Iterator[None]:
    """Imports below may set environment variables and warning filters; put both back."""
    environment = dict(os.environ)
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def own_accelerator() -> Iterator[Accelerator]:
    """An Accelerator of our own; the process-wide state of others is put back afterwards."""
    with quiet_setup():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    GradientState._shared_state.clear()  # a gradient accumulation of the caller's is not ours
    try:
        with quiet_setup():
            accelerator = Accelerator()
        yield accelerator
    finally:
        for state, values in zip(states, kept, strict=True):
            state.clear()
            state.update(values)


@contextmanager
def replayable(*data: Data | None) -> Iterator[None]:
    """The generators of data loaders have the same state afterwards, so that runs repeat."""
    loaders = [d for d in data if isinstance(d, DataLoader)]
    found = [g for d in loaders for g in (d.generator, getattr(d.sampler, "generator", None))]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def set_epoch(data: Data, epoch: int) -> None:
    """Tell data which epoch begins, from 0, where they want to know it.

    The convention of PyTorch's ``DistributedSampler``: a method ``set_epoch`` of the data, or of a
    loader's samplers or data set.
    """
    parts = (data, *(getattr(data, n, None) for n in ("batch_sampler", "sampler", "dataset")))
    for part in parts:
        method = getattr(part, "set_epoch", None)
        if callable(method):
            method(epoch)


class _Share:
    """Every n-th batch of an iterable, for one of n processes; all get equally many."""

    def __init__(self, data: Data, index: int, count: int) -> None:
        self.data, self.index, self.count = data, index, count

    def __length_hint__(self) -> int:
        return operator.length_hint(self.data, 0) // self.count

    def __iter__(self) -> Iterator[Any]:
        rounds = zip(*[iter(self.data)] * self.count, strict=False)
        return (batches[self.index] for batches in rounds)


def local_share(data: Data, accelerator: Accelerator) -> Data:
    """This process's part of the data; all of it where there is one process."""
    if accelerator.num_processes == 1:
        return data
    if isinstance(data, DataLoader):
        prepared: Data = accelerator.prepare_data_loader(data, device_placement=False)
        return prepared
    return _Share(data, accelerator.process_index, accelerator.num_processes)
