"""Augmentation that can be replayed: an input is a function of its view and its id alone.

Random transforms draw from global generators. :class:`Replay` seeds these anew for every example
from (seed, view, id), so that the crop, the flip and the partner of a mixture are the same in every
epoch with that view, in every order, in every worker.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from rarefy.distillation.soft_labels.seeds import seeds
from rarefy.errors import DataError, InputError

Key: TypeAlias = tuple[int, int]
"""View and id."""


class Mix(Protocol):
    """Two inputs to one: ``mix(own, other, generator) -> (mixture, share of its own)``."""

    classes: int | None

    def __call__(
        self, own: Tensor, other: Tensor, generator: random.Random
    ) -> tuple[Tensor, float]: ...


@dataclass(frozen=True)
class Mixup:
    """``share * own + (1 - share) * other`` (Zhang et al. 2018, "mixup: Beyond Empirical Risk
    Minimization"), with the share drawn from Beta(alpha, alpha), and at least a half.

    Args:
        alpha: of the Beta distribution, above 0.
        classes: with it, targets become probabilities ``(classes,)``; without, the target is the
            example's own, whose share is the larger one.

    Raises:
        InputError: alpha is not above 0.

    Example:
        >>> mixed, share = Mixup(1.0)(torch.ones(2), torch.zeros(2), random.Random(0))
        >>> bool((mixed == share).all()) and share >= 0.5
        True
    """

    alpha: float = 0.2
    classes: int | None = None

    def __post_init__(self) -> None:
        _require_alpha("Mixup", self.alpha)

    def __call__(
        self, own: Tensor, other: Tensor, generator: random.Random
    ) -> tuple[Tensor, float]:
        drawn = generator.betavariate(self.alpha, self.alpha)
        share = max(drawn, 1 - drawn)
        return share * own + (1 - share) * other, share


@dataclass(frozen=True)
class CutMix:
    """A box of the other image in one's own (Yun et al. 2019, "CutMix: Regularization Strategy to
    Train Strong Classifiers"), of a share drawn from Beta(alpha, alpha), at most a half.

    Args:
        alpha: of the Beta distribution, above 0.
        classes: as of :class:`Mixup`.

    Raises:
        InputError: alpha is not above 0.

    Example:
        >>> mixed, share = CutMix()(torch.ones(1, 8, 8), torch.zeros(1, 8, 8), random.Random(0))
        >>> bool(mixed.mean() == share)
        True
    """

    alpha: float = 1.0
    classes: int | None = None

    def __post_init__(self) -> None:
        _require_alpha("CutMix", self.alpha)

    def __call__(
        self, own: Tensor, other: Tensor, generator: random.Random
    ) -> tuple[Tensor, float]:
        drawn = generator.betavariate(self.alpha, self.alpha)
        side = min(drawn, 1 - drawn) ** 0.5
        height, width = own.shape[-2:]
        rows, columns = int(side * height), int(side * width)
        top, left = generator.randint(0, height - rows), generator.randint(0, width - columns)
        mixed = own.clone()
        box = (..., slice(top, top + rows), slice(left, left + columns))
        mixed[box] = other[box]
        return mixed, 1 - rows * columns / (height * width)


def _require_alpha(owner: str, alpha: float) -> None:
    if not alpha > 0:
        raise InputError(f"{owner}(alpha={alpha!r})", "alpha is a number above 0", "Write 0.2")


class Replay(Dataset[Any]):
    """A map-style data set whose random transform gives the same for the same view and id.

    An item of ``dataset`` is an input, or a tuple of an input and more; the transform is applied
    to the input. ``replay[view, i]`` is that of any view, ``replay[i]`` that of view 0, and once
    :meth:`set_epoch` was told of another epoch, as ``rf.train`` and ``rf.distill`` do, that of the
    view of this number, in the workers of a loader, too. The transform may draw from the global
    generators of Python, NumPy and torch (CPU), whose states are restored after.

    With ``mix`` an example is mixed with a partner that (seed, view, id) decides, transformed with
    a seed of its own; so a mixture, too, has one soft label, in whatever batch it is.

    Args:
        dataset: map-style, with a length; it may transform, too, with the same seeds.
        transform: input to input; None to leave it.
        seed: of the transform and the mixtures.
        mix: :class:`Mixup`, :class:`CutMix` or the like; None for none.

    Raises:
        InputError: the data set has no length or no items.

    Example:
        >>> noisy = Replay([torch.zeros(2)] * 4, lambda x: x + torch.randn(2))
        >>> bool((noisy[1, 3] == noisy[1, 3]).all()), bool((noisy[0, 3] == noisy[1, 3]).any())
        (True, False)
    """

    dataset: Any
    transform: Callable[[Any], Any] | None
    seed: int
    mix: Mix | None

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any] | None = None,
        *,
        seed: int = 0,
        mix: Mix | None = None,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise InputError(
                f"Replay({type(dataset).__name__})",
                "it has no length and no items by index",
                "Give a map-style data set; views cannot be replayed on a stream",
            )
        self.dataset, self.transform, self.seed, self.mix = dataset, transform, seed, mix
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The view of items by index alone; workers that persist over epochs see it change."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def set_epoch(self, epoch: int) -> None:
        """From now on, items by index alone are of the view of this number."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | Key) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | Key]) -> list[Any]:
        pairs = [key if isinstance(key, tuple) else (self.epoch, int(key)) for key in keys]
        with _restored():  # once a batch: it takes longer than to seed
            return [self._item(view, index) for view, index in pairs]

    @property
    def description(self) -> str:
        """What must be equal for the views to be equal, as far as its parts describe themselves."""
        text = f"Replay({self.transform!r}, seed={self.seed}, mix={self.mix!r})"
        return re.sub(r" at 0x[0-9a-fA-F]+", "", text)

    def _item(self, view: int, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        own, partner, drawn = (int(s) for s in seeds(self.seed, view, index, range(3)))
        value, *others = _parts(self._transformed(index, own))
        if self.mix is not None:
            generator = random.Random(drawn)
            second = generator.randrange(len(self))
            with_value, *with_others = _parts(self._transformed(second, partner))
            value, share = self.mix(*_tensors(value, with_value), generator)
            if self.mix.classes is not None and others:
                others[0] = _shares(others[0], with_others[0], share, self.mix.classes)
        return (value, *others) if others else value

    def _transformed(self, index: int, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - transforms draw from it
        torch.default_generator.manual_seed(seed)
        value, *others = _parts(self.dataset[index])
        if self.transform is not None:
            value = self.transform(value)
        return (value, *others) if others else value


def origin(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that an item of a ``Subset`` or ``ConcatDataset`` comes from, and its index."""
    while type(dataset) in (Subset, ConcatDataset):
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            place = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[place - 1] if place else 0
            dataset = dataset.datasets[place]
    return dataset, index


def replays(dataset: Any) -> list[Replay]:
    """What a data set replays: itself, or those that it is a subset or concatenation of."""
    if isinstance(dataset, Replay):
        return [dataset]
    if type(dataset) is Subset:
        return replays(dataset.dataset)
    parts = dataset.datasets if type(dataset) is ConcatDataset else []
    return [found for part in parts for found in replays(part)]


@contextmanager
def _restored() -> Iterator[None]:
    """The states of the global generators of the CPU are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(state)


def _parts(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, tuple | list) else (item,)


def _tensors(own: Any, other: Any) -> tuple[Tensor, Tensor]:
    fits = isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape
    if not fits:
        raise DataError(
            "Replay(mix=...)",
            "inputs that are mixed are tensors of one shape after the transform",
            "Let the transform return such tensors",
        )
    return own, other


def _shares(own: Any, other: Any, share: float, classes: int) -> Tensor:
    """Targets of a mixture as probabilities."""
    target = torch.zeros(classes)
    target[int(own)] += share
    target[int(other)] += 1 - share
    return target
