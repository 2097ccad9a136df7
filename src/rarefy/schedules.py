"""Schedules: pure functions of the step, as small frozen callables.

A schedule maps a step (0, 1, 2, ...) to a number: a learning rate, a factor on one, a sparsity, a
temperature. It keeps no state, so that any step can be asked for at any time. :class:`Warmup` puts
a linear rise in front of any other schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from rarefy.errors import InputError

Schedule: TypeAlias = Callable[[float], float]
"""Step (0, 1, 2, ...) to value."""


def _at_least(owner: object, low: int, **values: float) -> None:
    for name, value in values.items():
        if not low <= value < math.inf:
            raise InputError(
                f"{type(owner).__name__}({name}={value!r})",
                f"{name} counts steps and must be at least {low}",
                f"Write {name}={max(low, 100)}",
            )


def _finite(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"{type(owner).__name__}({name}={value!r})",
                f"{name} is not a finite number",
                f"Write for example {name}=0.1",
            )


def _share(step: float, begin: float, steps: float) -> float:
    """The share of ``steps`` that has passed since ``begin``, from 0 to 1."""
    return min(max((step - begin) / steps, 0.0), 1.0)


@dataclass(frozen=True)
class Constant:
    """The same value at every step.

    Args:
        value: that value.

    Example:
        >>> Constant(0.1)(1000)
        0.1
    """

    value: float

    def __post_init__(self) -> None:
        _finite(self, value=self.value)

    def __call__(self, step: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, constant after.

    Args:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: length in steps, at least 1.

    Raises:
        InputError: ``steps`` is below 1, or a value is not finite.

    Example:
        >>> Linear(1.0, 0.0, steps=10)(5)
        0.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _finite(self, start=self.start, end=self.end)
        _at_least(self, 1, steps=self.steps)

    def __call__(self, step: float) -> float:
        share = _share(step, 0, self.steps)
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``peak`` at step 0 to ``end`` at step ``steps``, constant after.

    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5,
    without restarts. For a warmup write ``Warmup(Cosine(...), steps)``.

    Args:
        peak: value at step 0.
        steps: length in steps, at least 1.
        end: value from step ``steps`` on.

    Raises:
        InputError: ``steps`` is below 1, or a value is not finite.

    Example:
        >>> round(Cosine(0.1, steps=10)(5), 6)
        0.05
    """

    peak: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, peak=self.peak, end=self.end)
        _at_least(self, 1, steps=self.steps)

    def __call__(self, step: float) -> float:
        height = (1 + math.cos(math.pi * _share(step, 0, self.steps))) / 2
        return self.end + (self.peak - self.end) * height


@dataclass(frozen=True)
class Warmup:
    """A linear rise over ``steps`` steps, then another schedule from its step 0.

    The rise is never 0: at step ``s`` it is ``(s + 1) / (steps + 1)`` of ``then(0)``, so that the
    step ``steps`` is the first at the full value (Goyal et al. 2017, "Accurate, Large Minibatch
    SGD", section 2.2; counting from 1 instead of 0 is ours).

    Args:
        then: the schedule that follows.
        steps: length of the rise in steps; 0 for none.

    Raises:
        InputError: ``steps`` is negative.

    Example:
        >>> [round(Warmup(Constant(1.0), steps=3)(s), 2) for s in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    then: Schedule
    steps: int

    def __post_init__(self) -> None:
        _at_least(self, 0, steps=self.steps)

    def __call__(self, step: float) -> float:
        if step < self.steps:
            return self.then(0) * (max(step, 0) + 1) / (self.steps + 1)
        return self.then(step - self.steps)


@dataclass(frozen=True)
class Cubic:
    """Sparsity that rises fast at first and slowly near the end: automated gradual pruning (AGP).

    Zhu and Gupta 2017, "To prune, or not to prune", equation 1::

        s(t) = final + (initial - final) * (1 - (t - begin) / steps) ** 3

    for ``begin <= t <= begin + steps``; ``initial`` before, ``final`` after. With ``every`` the
    value changes only each so many steps, the paper's delta t.

    Args:
        final: sparsity at the end, the share of zeros: at least 0 and below 1.
        steps: length of the rise in steps, at least 1 (the paper's n times delta t).
        begin: step at which the rise begins.
        initial: sparsity at the beginning, likewise.
        every: steps between two changes, at least 1.

    Raises:
        InputError: a sparsity or a number of steps is out of range.

    Example:
        >>> round(Cubic(final=0.8, steps=100)(50), 6)
        0.7
    """

    final: float
    steps: int
    begin: int = 0
    initial: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("final", "initial"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(
                    f"Cubic({name}={value!r})",
                    "a sparsity is the share of zeros, at least 0 and below 1",
                    f"Write {name}=0.9 for 90 %",
                )
        _at_least(self, 1, steps=self.steps, every=self.every)
        _at_least(self, 0, begin=self.begin)

    def __call__(self, step: float) -> float:
        passed = step - self.begin
        if passed < self.steps:
            passed = passed // self.every * self.every
        return self.final + (self.initial - self.final) * (1 - _share(passed, 0, self.steps)) ** 3


@dataclass(frozen=True)
class Iterative:
    """Sparsity in rounds, each of which removes the same share of what is left.

    After ``r`` of ``rounds`` rounds ``1 - (1 - final) ** (r / rounds)`` is zero (Han et al. 2015,
    "Learning both Weights and Connections"; with rewinding Frankle and Carbin 2019, "The Lottery
    Ticket Hypothesis"). One round is one-shot pruning at step ``begin``.

    Args:
        final: sparsity after the last round, at least 0 and below 1.
        rounds: number of rounds, at least 1.
        every: steps from one round to the next, at least 1.
        begin: step of the first round.

    Raises:
        InputError: the sparsity or a number of steps is out of range.

    Example:
        >>> [round(Iterative(0.75, rounds=2)(r), 2) for r in range(3)]
        [0.5, 0.75, 0.75]
    """

    final: float
    rounds: int
    every: int = 1
    begin: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.final < 1:
            raise InputError(
                f"Iterative(final={self.final!r})",
                "a sparsity is the share of zeros, at least 0 and below 1",
                "Write final=0.9 for 90 %",
            )
        _at_least(self, 1, rounds=self.rounds, every=self.every)
        _at_least(self, 0, begin=self.begin)

    def __call__(self, step: float) -> float:
        if step < self.begin:
            return 0.0
        done = min((step - self.begin) // self.every + 1, self.rounds)
        left: float = (1 - self.final) ** (done / self.rounds)
        return 1 - left


@dataclass(frozen=True)
class Product:
    """The product of several schedules and numbers at every step.

    Args:
        factors: schedules or numbers, at least one.

    Raises:
        InputError: there is none, or a number is not finite.

    Example:
        >>> Product((0.5, Linear(1.0, 0.0, steps=10)))(5)
        0.25
    """

    factors: tuple[float | Schedule, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise InputError("Product(())", "there is no factor", "Give at least one")
        _finite(self, **{f"factors[{i}]": f for i, f in enumerate(self.factors) if not callable(f)})

    def __call__(self, step: float) -> float:
        return math.prod(f(step) if callable(f) else f for f in self.factors)
