"""How to train: options as frozen values, and the optimizers and schedules that they name."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rarefy.errors import InputError, first_line
from rarefy.schedules import Constant, Cosine, Linear, Schedule, Warmup
from rarefy.types import is_count, python

SCHEDULES: Mapping[str, Callable[[int, float], Schedule]] = {
    "cosine": lambda steps, end: Cosine(1.0, steps, end),
    "linear": lambda steps, end: Linear(1.0, end, steps),
    "constant": lambda steps, end: Constant(1.0),
}
"""Name to the schedule of the factor on the learning rate, over so many steps to that end."""


PRECISIONS = ("no", "bf16", "fp16")
"""Mixed precisions."""

KEEP = ("last", "best")
"""Which epoch's weights are returned."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer: its learning rates where none is given, and how to build it.

    Attributes:
        lr: to train a network.
        gentle: to distil, where the student often knows much already: it was cut from its teacher.
    """

    lr: float
    gentle: float
    build: Callable[[list[dict[str, Any]], float, float], torch.optim.Optimizer]


MakesOptimizer: TypeAlias = Callable[..., torch.optim.Optimizer]
"""(groups of parameters as ``torch.optim`` takes them, ``lr=`` where one is given) -> optimizer, as
most classes of ``torch.optim`` are. Its steps need no closure, its groups have an ``lr``, and
checkpoints hold what its ``state_dict()`` says."""

WHERE = "optimizer=..."
"""The argument that errors name."""

REMEDY = "Give for example torch.optim.NAdam, or a function like it"

OPTIMIZERS: Mapping[str, Recipe] = {
    "sgd": Recipe(0.1, 0.02, lambda groups, lr, m: torch.optim.SGD(groups, lr=lr, momentum=m)),
    "adamw": Recipe(
        0.001, 0.001, lambda groups, lr, m: torch.optim.AdamW(groups, lr=lr, betas=(m, 0.999))
    ),
}
"""Name to optimizer."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the same for :func:`train` and :func:`distill`.

    Args:
        epochs: how often the data are read, at least 1.
        lr: the highest learning rate; None for the optimizer's own: 0.1 for ``"sgd"``
            (0.02 to distil), 0.001 for ``"adamw"``.
        optimizer: ``"sgd"``, ``"adamw"``, or what makes another of groups of parameters
            (:data:`MakesOptimizer`), such as ``torch.optim.NAdam`` or
            ``functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)``. The schedule
            changes the learning rate of each of its groups alike.
        momentum: of ``"sgd"``, and the first beta of ``"adamw"``, in [0, 1).
        weight_decay: on parameters of two and more dimensions; biases, BatchNorm and other scales
            and vectors are not decayed. At least 0. Optimizers of one's own find it in the groups.
        schedule: ``"cosine"``, ``"linear"`` (both fall to ``min_lr_rate``) or ``"constant"``.
        min_lr_rate: share of ``lr`` at which the learning rate ends, in [0, 1]. Above 0 it suits
            averaged weights (``ema``), which need no small steps at the end.
        warmup: share of the training over which the learning rate rises to ``lr``, in [0, 1).
        clip_norm: the largest norm of all gradients together; None for no limit.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (not on a CPU): mixed precision by autocast,
            the weights stay in float32; None for what Accelerate is configured for.
        accumulate: batches of one optimizer step, at least 1. The last step of an epoch takes what
            is left. Each batch weighs as much as it holds: on labels its labelled positions where
            these are whole numbers, against a teacher the positions that ``attention_mask`` counts
            where logits are sequences of it, else its examples. So the step is that of one large
            batch for every loss that is a mean over those, also where batches, or the shares of
            several processes, differ in size; BatchNorm still sees one batch at a time.
        ema: decay of a moving average of the weights, see
            :class:`~rarefy.training.average.Average`; the average is what ``val`` is evaluated
            with, and what is returned. None for no average.
        patience: epochs without a better metric on ``val`` after which training ends, at least 1;
            None to train all epochs.
        keep: ``"last"`` returns the weights after the last epoch, ``"best"`` those of the epoch
            with the best metric on ``val``.

    The learning rate changes at every step where the data say how many batches they have
    (``len(data)``), and at every epoch where they do not.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> TrainOptions(epochs=30, lr=0.05).optimizer
        'sgd'
    """

    epochs: int = 10
    lr: float | None = None
    optimizer: str | MakesOptimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    min_lr_rate: float = 0.0
    warmup: float = 0.1
    clip_norm: float | None = None
    precision: str | None = None
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = None
    keep: str = "last"

    def __post_init__(self) -> None:
        for name, (valid, rule) in _RULES.items():
            value = python(getattr(self, name))
            object.__setattr__(self, name, value)
            if not valid(value):
                shown = textwrap.shorten(repr(value), 60, placeholder=" ...")
                raise InputError(f"{name}={shown}", f"{name} must be {rule}", f"Give {rule}")


def _number(value: object, holds: Callable[[float], bool]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and holds(value)


def _positive(value: float | None) -> bool:
    return value is None or _number(value, lambda v: 0 < v < math.inf)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (is_count, "a whole number, at least 1"),
    "lr": (_positive, "a number above 0, or None"),
    "optimizer": (
        lambda v: callable(v) or v in tuple(OPTIMIZERS),
        f"one of {', '.join(OPTIMIZERS)}, or a function (groups, lr=...) -> optimizer",
    ),
    "momentum": (lambda v: _number(v, lambda n: 0 <= n < 1), "at least 0 and below 1"),
    "weight_decay": (lambda v: _number(v, lambda n: 0 <= n < math.inf), "a number, at least 0"),
    "schedule": (lambda v: v in tuple(SCHEDULES), f"one of {', '.join(SCHEDULES)}"),
    "min_lr_rate": (
        lambda v: _number(v, lambda n: 0 <= n <= 1),
        "a share of lr, at least 0 and at most 1",
    ),
    "warmup": (
        lambda v: _number(v, lambda n: 0 <= n < 1),
        "a share of the training, at least 0 and below 1",
    ),
    "clip_norm": (_positive, "a number above 0, or None"),
    "precision": (lambda v: v in (None, *PRECISIONS), f"one of {', '.join(PRECISIONS)}, or None"),
    "accumulate": (is_count, "a whole number, at least 1"),
    "ema": (
        lambda v: v is None or _number(v, lambda n: 0 < n < 1),
        "above 0 and below 1, or None",
    ),
    "patience": (lambda v: v is None or is_count(v), "a whole number, at least 1, or None"),
    "keep": (lambda v: v in KEEP, f"one of {', '.join(KEEP)}"),
}


def schedule_of(options: TrainOptions, steps: int) -> Schedule:
    warmup = int(options.warmup * steps)
    fall = SCHEDULES[options.schedule](steps - warmup, options.min_lr_rate)
    return Warmup(fall, warmup)


def optimizer_of(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of what a network learns.

    Raises:
        InputError: what makes it fails, or what it made cannot train.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    split: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in split if group["params"]]
    if not isinstance(options.optimizer, str):
        return _made(options.optimizer, groups, options.lr)
    recipe = OPTIMIZERS[options.optimizer]
    lr = recipe.lr if options.lr is None else options.lr
    return recipe.build(groups, lr, options.momentum)


def _made(
    make: MakesOptimizer, groups: list[dict[str, Any]], lr: float | None
) -> torch.optim.Optimizer:
    """An optimizer of the user's.

    Raises:
        InputError: see :func:`optimizer_of`.
    """
    own = {id(parameter) for group in groups for parameter in group["params"]}
    with blamed():
        found = make(groups) if lr is None else make(groups, lr=lr)
    if not isinstance(found, torch.optim.Optimizer):
        raise InputError(WHERE, f"it made a {type(found).__name__}, no optimizer", REMEDY)
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        what = f"{type(found).__name__} computes the loss several times a step, by a closure"
        raise InputError(WHERE, what, REMEDY)
    if not found.param_groups or any("lr" not in group for group in found.param_groups):
        what = f"the groups of {type(found).__name__} have no lr, which the schedule changes"
        raise InputError(WHERE, what, "Read the learning rate of each group from its lr")
    if not {id(p) for group in found.param_groups for p in group["params"]} <= own:
        raise InputError(
            WHERE,
            "it changes other parameters than those that it was given: a copy of the network is "
            "trained",
            "Write a function (groups, lr=...) that hands its groups on",
        )
    return found


@contextmanager
def blamed() -> Iterator[None]:
    """Whatever an optimizer of the user's raises says so.

    Raises:
        InputError: instead of any other error.
    """
    try:
        yield
    except Exception as error:
        raise InputError(WHERE, f"it raised {first_line(error)}", REMEDY) from error


def require_saved(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what steps by other optimizers and does not say their state: it would be lost.

    Raises:
        InputError: it is such a one.
    """
    within = [v for value in vars(optimizer).values() for v in pytree.tree_leaves(value)]
    inner = next((v for v in within if isinstance(v, torch.optim.Optimizer)), None)
    if inner is not None and type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        raise InputError(
            WHERE,
            f"the state of the {type(inner).__name__} in {type(optimizer).__name__} is not in its "
            "state_dict(), which checkpoints hold",
            "Override state_dict() and load_state_dict(), or leave checkpoint= out",
        )


def with_changes(
    where: str, options: TrainOptions | None, changes: Mapping[str, Any]
) -> TrainOptions:
    known = [field.name for field in fields(TrainOptions)]
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise InputError(
            f"{where}({', '.join(unknown)}=...)", "no such option", f"Use {', '.join(known)}"
        )
    return replace(options or TrainOptions(), **changes)
