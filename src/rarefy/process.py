"""What training shares with its process: devices, other processes, generators, the environment.

Everything here leaves the process as it was: Accelerate's state, environment variables, warning
filters, numbers of threads, signal handlers and the generators of data loaders are put back.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from rarefy.errors import InputError, RarefyError, first_line
from rarefy.types import Data

if TYPE_CHECKING:
    from types import FrameType

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
def own_accelerator(precision: str | None = None, **options: Any) -> Iterator[Accelerator]:
    """An Accelerator of our own; the process-wide state of others is put back afterwards.

    Args:
        precision: mixed precision, whatever an Accelerator of the caller's has; None for that.
        **options: more of Accelerate's own.
    """
    with quiet_setup():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    states = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    kept, threads = [dict(state) for state in states], torch.get_num_threads()
    GradientState._shared_state.clear()  # a gradient accumulation of the caller's is not ours
    if precision is not None and AcceleratorState._shared_state:
        AcceleratorState._shared_state["_mixed_precision"] = precision
    try:
        with quiet_setup():
            accelerator = Accelerator(
                mixed_precision=precision,
                # Networks are moved before; else it loads an optimizer's own state into it, which
                # parts it from optimizers within that share its groups.
                device_placement=False,
                # Without this, processes on CPUs would not find each other.
                cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                # A loss of inner features alone, or a pooler that nobody reads, leaves some out.
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
                **options,
            )
        torch.set_num_threads(threads)
        yield accelerator
    finally:
        for state, values in zip(states, kept, strict=True):
            state.clear()
            state.update(values)


def generators(*data: Data | None) -> Sequence[torch.Generator]:
    """The generators that data loaders have of their own, also those that others read from."""
    origins = [getattr(d, "origin", d) for d in data]
    loaders = [d for d in origins if isinstance(d, DataLoader)]
    found = [g for d in loaders for g in (d.generator, getattr(d.sampler, "generator", None))]
    return [g for g in found if isinstance(g, torch.Generator)]


@contextmanager
def replayable(*data: Data | None) -> Iterator[None]:
    """The generators of data loaders, and what knows of epochs, are as before afterwards, so that
    runs repeat."""
    states = [(g, g.get_state()) for g in generators(*data)]
    told = [part for one in data for part in _epochs(one)]
    epochs = [(p, p.epoch) for p in told if isinstance(getattr(p, "epoch", None), int)]
    try:
        yield
    finally:
        for part, epoch in epochs:
            part.set_epoch(epoch)
        for generator, state in states:
            generator.set_state(state)


def set_epoch(data: Data, epoch: int) -> None:
    """Tell data which epoch begins, from 0, where they want to know it.

    The convention of PyTorch's ``DistributedSampler``: a method ``set_epoch`` of the data, or of a
    loader's samplers or data set, or of those that this is a subset or concatenation of.
    """
    for part in _epochs(data):
        part.set_epoch(epoch)


def _epochs(data: Data | None) -> list[Any]:
    """Data and their parts that can be told of an epoch."""
    if not callable(getattr(data, "set_epoch", None)):
        data = getattr(data, "origin", data)
    batched = getattr(data, "batch_sampler", None)
    parts = [data, batched, getattr(data, "sampler", None), getattr(batched, "sampler", None)]
    waiting = [getattr(data, "dataset", None)]
    while waiting:
        part = waiting.pop()
        parts.append(part)
        if isinstance(part, Subset):
            waiting.append(part.dataset)
        elif isinstance(part, ConcatDataset):
            waiting += part.datasets
    return [part for part in parts if callable(getattr(part, "set_epoch", None))]


def random_states(own: Sequence[torch.Generator]) -> dict[str, Any]:
    """The states of all global generators, and of some others, as tensors and numbers."""
    version, python, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, torch.tensor(python), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "own": [generator.get_state() for generator in own],
    }


def set_random_states(states: Mapping[str, Any], own: Sequence[torch.Generator]) -> None:
    """Put generators into the states that :func:`random_states` found."""
    version, python, gauss = states["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    for generator, state in zip(own, states["own"], strict=True):
        generator.set_state(state)


def on_all(value: Any, accelerator: Accelerator) -> list[Any]:
    """A plain value of every process, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found


@contextmanager
def together(accelerator: Accelerator | None) -> Iterator[None]:
    """All processes leave this together: where one fails, all of them raise an error.

    What is done within waits for no other process.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
        own = error
    told = _told(own) if own is not None else None
    every = [told] if accelerator is None else on_all(told, accelerator)
    if own is not None:
        raise own
    for process, other in enumerate(every):
        if other is not None:
            kind, where, what, remedy = other
            raise kind(f"process {process}: {where}", what, remedy)


def _told(error: Exception) -> tuple[type[RarefyError], str, str, str]:
    """An error as other processes can raise it."""
    if isinstance(error, RarefyError):
        plain = type(error).__init__ is RarefyError.__init__
        return type(error) if plain else InputError, error.where, error.what, error.remedy
    return InputError, "failed", first_line(error), "Look at what that process shows"


@torch.no_grad()
def of_the_first(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Tensors, whatever their types, get the values that they have in the first process."""
    from accelerate.utils import broadcast

    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    if accelerator.num_processes == 1 or not held:
        return
    sizes = [tensor.numel() * tensor.element_size() for tensor in held]
    flat = [tensor.to(accelerator.device).reshape(-1).view(torch.uint8) for tensor in held]
    shared = broadcast(torch.cat(flat)).split(sizes)
    if not accelerator.is_main_process:
        for tensor, values in zip(held, shared, strict=True):
            tensor.copy_(values.clone().view(tensor.dtype).view(tensor.shape))


def shared_mean(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The mean over all processes."""
    if accelerator.num_processes == 1:
        return values
    found: Tensor = accelerator.reduce(values, "mean")
    return found


@dataclass
class Interrupt:
    """Whether the user asked to stop."""

    asked: bool = False


@contextmanager
def deferred_interrupt(active: bool) -> Iterator[Interrupt]:
    """The first Ctrl-C is only noted, so that a step can be completed; the second one acts.

    Nothing is deferred where the caller handles the signal, or in another thread than the first.
    """
    noted, own = Interrupt(), signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not active or not main or own is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.asked:
            raise KeyboardInterrupt
        noted.asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, own)
