"""The data convention in one place: what a batch is, how a network is called, what its logits are.

A batch is ``(inputs, targets)`` (a tuple or list of two) or unlabelled: a tensor, a tuple or list
of one, or a mapping. A mapping with the key ``"labels"`` is labelled. Inputs are a tensor
(``model(x)``), a tuple (``model(*x)``) or a mapping (``model(**x)``).
"""

from __future__ import annotations

import copy
import itertools
import operator
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rarefy.errors import DataError, InputError, first_line
from rarefy.types import Batch, Data, Inputs


def split_batch(batch: Batch) -> tuple[Inputs, Tensor | None]:
    """Return ``(inputs, targets)``; targets are None where the batch is unlabelled.

    Raises:
        DataError: the batch is none of the forms of the data convention.
    """
    if isinstance(batch, Mapping):
        if "labels" in batch:
            return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        return batch, None
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
        return _inputs(inputs), targets
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return _inputs(batch[0]), None
    raise DataError(
        "data",
        f"a batch is a {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, tuple | list) else ""),
        "Yield (inputs, targets), or inputs alone as a tensor or a mapping",
    )


def _inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Tensor | Mapping):
        return inputs
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    raise DataError(
        "data",
        f"inputs are a {type(inputs).__name__}",
        "Give a tensor, a tuple of arguments or a mapping of keyword arguments",
    )


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call ``model`` with inputs of any of the three forms."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that inputs of any of the three forms stand for."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def logits(outputs: Any) -> Tensor:
    """Return the tensor of a network's outputs: the tensor itself, or its ``logits``.

    Raises:
        InputError: the outputs hold no tensor under that name.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]  # type: ignore[no-any-return]
    found = getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise InputError(
        "model outputs",
        f"a {type(outputs).__name__} holds no logits",
        "Return a tensor, or an object or mapping with a tensor named 'logits'",
    )


def mask_of(outputs: Any) -> Tensor | None:
    """The ``mask`` that a network gives beside its ``logits``; None where it gives none."""
    if isinstance(outputs, Tensor):
        return None
    held = outputs.get("mask") if isinstance(outputs, Mapping) else getattr(outputs, "mask", None)
    return held if isinstance(held, Tensor) else None


def padding_of(inputs: Inputs) -> Tensor | None:
    """The ``attention_mask`` of inputs, 0 at padding; None where they have none."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def mask_of_all(inputs: Inputs) -> Tensor | None:
    """The ``attention_mask`` of inputs, shape (B, L), where it tells the padding of all positions.

    It does not where a decoder has a sequence of its own (inputs whose names begin with
    ``decoder_``), which may be as long. Masks that are added to scores (real numbers, none above
    0) and those of pairs of positions tell none.
    """
    mask = padding_of(inputs)
    if mask is None or mask.ndim != 2:
        return None
    others = [t for t in tensors(inputs) if t is not mask and t.ndim]
    if others and not any(is_of(len(mask), tensor) for tensor in others):
        return None
    if isinstance(inputs, Mapping) and any(str(key).startswith("decoder_") for key in inputs):
        return None
    added = mask.is_floating_point() and not bool((mask > 0).any())
    return None if added else mask


def has_tokens(inputs: Inputs) -> bool:
    """Whether a position of a batch is no padding."""
    mask = mask_of_all(inputs)
    return mask is None or bool(mask.any())


def fitting(mask: Tensor | None, answers: Tensor) -> Tensor | None:
    """A mask (B, L) where it says which positions of answers (B, L, C) count; else None."""
    fits = mask is not None and answers.ndim == 3 and mask.shape == answers.shape[:2]
    return mask if fits else None


def lengthened(inputs: Inputs, length: int) -> Inputs:
    """Sequences with an ``attention_mask`` (B, L), padded with zeros to a length; others as are.

    All tensors of shape (B, L, ...) are padded, behind what they hold.
    """
    mask = padding_of(inputs)
    if mask is None or mask.ndim != 2 or mask.shape[1] >= length:
        return inputs

    def pad(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != mask.shape:
            return tensor
        return F.pad(tensor, (*[0, 0] * (tensor.ndim - 2), 0, length - mask.shape[1]))

    padded: Inputs = map_tensors(pad, inputs)
    return padded


def length_of(inputs: Inputs) -> int:
    """Length of sequences with an ``attention_mask`` (B, L); 0 for other inputs."""
    mask = padding_of(inputs)
    return mask.shape[1] if mask is not None and mask.ndim == 2 else 0


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply ``function`` to every tensor of nested tuples, lists, mappings and dataclasses."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if is_dataclass(inputs) and not isinstance(inputs, type):
        given = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.init}
        return type(inputs)(**map_tensors(function, given))
    if isinstance(inputs, Mapping):
        return {k: map_tensors(function, v) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        values = [map_tensors(function, v) for v in inputs]
        if isinstance(inputs, list):
            return values
        return type(inputs)(*values) if hasattr(inputs, "_fields") else tuple(values)
    return inputs


def tensors(inputs: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, mappings and dataclasses, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, inputs)
    return found


def moved(inputs: Any, device: torch.device) -> Any:
    """A copy on a device of inputs of any of the three forms: some networks overwrite theirs."""
    return map_tensors(lambda t: t.to(device, non_blocking=True, copy=True), inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer of a network is; the CPU where it has none."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def batch_size(inputs: Inputs) -> int:
    """Length of the first dimension of the first tensor that has one.

    Raises:
        DataError: no tensor with a dimension is among the inputs.
    """
    for tensor in tensors(inputs):
        if tensor.ndim:
            return tensor.shape[0]
    raise DataError("data", "a batch holds no tensor with a batch dimension", "Yield batches")


def take(inputs: Inputs, n: int) -> Inputs:
    """The first ``n`` examples of a batch."""

    def first(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.sparse_coo:  # has no slices
            return tensor.index_select(0, torch.arange(min(n, len(tensor)), device=tensor.device))
        return tensor[:n] if tensor.ndim else tensor

    return map_tensors(first, inputs)  # type: ignore[no-any-return]


def between(value: Any, start: int, stop: int, size: int) -> Any:
    """Some examples of inputs or targets; tensors that are not of ``size`` examples as they are."""

    def part(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if is_of(size, tensor) else tensor

    return map_tensors(part, value)


def is_of(size: int, tensor: Tensor) -> bool:
    """Whether a tensor holds so many examples; others, such as masks, are the same for all."""
    return bool(tensor.ndim) and tensor.shape[0] == size


def doubled(inputs: Inputs) -> Inputs:
    """The inputs with every tensor of batch size 1 twice; others, such as masks, as they are."""
    twice: Inputs = map_tensors(lambda t: torch.cat([t, t]) if is_single(t) else t, inputs)
    return twice


def is_single(tensor: Tensor) -> bool:
    """Whether a tensor holds one example."""
    return is_of(1, tensor)


def batches(data: Data, where: str) -> Iterator[tuple[Inputs, Tensor | None]]:
    """Iterate over ``(inputs, targets)``, refusing data that yield nothing.

    Raises:
        DataError: ``data`` is not iterable, is exhausted or yields no batch.
    """
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            where,
            f"{type(data).__name__} is not an iterable of batches",
            "Give a DataLoader or a list of batches",
        )
    empty = True
    for batch in data:
        with _located(where):
            inputs, targets = split_batch(batch)
            size = batch_size(inputs)
        if size:
            empty = False
            yield inputs, targets
    if empty:
        raise DataError(
            where,
            "the data yielded no example",
            "Check the data function; a generator can be read only once, a DataLoader any number "
            "of times",
        )


def check_rereadable(data: object, where: str) -> None:
    """Pass where data give the same batches at every reading: a generator is empty after one.

    Raises:
        DataError: they can be read only once.
    """
    if isinstance(data, Iterator):
        raise DataError(
            where,
            f"a {type(data).__name__} can be read only once, and the data are read several times",
            "Give a list of batches, such as list(data), or a DataLoader",
        )


@dataclass(frozen=True)
class Leading:
    """The first examples of some data, batch by batch, anew at every reading.

    Those of batches that are nothing but padding are not counted.

    Args:
        data: batches, labelled or not.
        examples: how many, at most; None for all.
        where: the call that errors name.
        labelled: whether labels are kept, where there are any.

    Example:
        >>> [tuple(x.shape) for x, _ in Leading([torch.zeros(4, 2)] * 3, 6, "f(data)")]
        [(4, 2), (2, 2)]
    """

    data: Data
    examples: int | None
    where: str
    labelled: bool = True

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        missing = self.examples
        for inputs, targets in batches(self.data, self.where):
            size = batch_size(inputs)
            kept = targets if self.labelled else None
            if missing is not None and missing < size:
                inputs, kept = (between(v, 0, missing, size) for v in (inputs, kept))
            yield inputs, kept
            if missing is not None and has_tokens(inputs):
                missing -= size
            if missing is not None and missing <= 0:
                return


@dataclass(frozen=True)
class Lengthened:
    """Data whose sequences with an ``attention_mask`` are padded to one length.

    Args:
        data: batches, labelled or not.
        length: of all sequences.
        where: the call that errors name.
    """

    data: Data
    length: int
    where: str

    @property
    def origin(self) -> Data:
        """The data that are padded."""
        return self.data

    def __length_hint__(self) -> int:
        return operator.length_hint(self.data, 0)

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        for inputs, targets in batches(self.data, self.where):
            yield lengthened(inputs, self.length), targets


def of_one_length(data: Data, where: str) -> Data:
    """The data, with batches of sequences padded to the longest where they have a mask.

    A captured network runs on sequences of the length that it was captured with. Data without an
    ``attention_mask`` are returned as they are, after a look at their first batch.

    Raises:
        DataError: the data yield nothing.
    """
    found = lengths(data, where)
    return Lengthened(data, max(found), where) if len(found) > 1 else data


def lengths(data: Data, where: str) -> set[int]:
    """Lengths of the sequences with an ``attention_mask``; of data without one 0 alone.

    Raises:
        DataError: the data yield nothing.
    """
    if not length_of(next(batches(data, where))[0]):
        return {0}
    return {length_of(inputs) for inputs, _ in batches(data, where)}


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Errors about a batch name the data that it is of."""
    try:
        yield
    except DataError as error:
        raise DataError(where, error.what, error.remedy) from None


LIKE_TRACED = (
    "Yield inputs like those that the network was traced with; of a batch (a, b), a are the inputs "
    "and b the labels: yield ((a, b), labels), or a dictionary, where both are inputs"
)
"""What to do where a network does not run on a batch."""


@contextmanager
def answering(where: str) -> Iterator[None]:
    """Whatever a network raises on data says so: these are not data that it was traced with.

    Raises:
        DataError: instead of any other error; one that was raised already passes.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            where,
            f"the network does not run on a batch: {first_line(error)}",
            LIKE_TRACED,
        ) from error


@contextmanager
def evaluating(*models: nn.Module, training: bool = False) -> Iterator[None]:
    """Eval mode without gradients; the training flag of every submodule is restored after.

    With ``training``, training mode without gradients.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def unchanged(model: nn.Module, *, values: bool = True) -> Iterator[None]:
    """Whatever forward does to the attributes and buffers of its modules is undone after.

    Args:
        model: the network.
        values: whether the numbers in its buffers are kept, too, of which a copy is held.
    """
    held: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _hold(module.__dict__, held)
    numbers = [(b, b.detach().clone()) for b in model.buffers() if values and not is_lazy(b)]
    try:
        yield
    finally:
        for container, before in held.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        for buffer, value in numbers:
            if buffer.shape == value.shape:
                buffer.data.copy_(value)
            else:  # observers of quantization resize theirs
                buffer.data = value


def _hold(value: Any, held: dict[int, tuple[Any, Any]]) -> None:
    """Note what is in a container, and in those within: caches are filled in place."""
    if type(value) in _CONTAINERS and id(value) not in held:
        held[id(value)] = (value, copy.copy(value))
        for item in value.values() if isinstance(value, dict) else value:
            _hold(item, held)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def forked() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's global generators after."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators; their states are restored after."""
    with forked():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        yield
