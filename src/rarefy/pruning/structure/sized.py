"""Whole numbers that remember where they come from, through arithmetic and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rarefy.pruning.structure.expressions import TESTS, Apply, Expression, Number


class Recorder(Protocol):
    """Who is told what a forward does with its numbers."""

    def compared(self, name: str, first: int, second: int, outcome: bool) -> None:
        """Two numbers were compared."""

    def value_matters(self, number: Sized) -> None:
        """A number was used as such, and not only as a size."""


class Sized(int):
    """A whole number that remembers where it comes from."""

    origin: Expression
    recorder: Recorder | None

    @classmethod
    def of(cls, value: int, origin: Expression, recorder: Recorder | None = None) -> Sized:
        """A number with its origin; equalities that hold are told to ``recorder``."""
        made = cls(value)
        made.origin, made.recorder = origin, recorder
        return made

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __float__(self) -> float:
        self.used()
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        self.used()
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.used()
        return other / int(self)

    def __pow__(self, exponent: Any, modulus: Any = None) -> Any:
        self.used()
        return pow(int(self), exponent, modulus)

    def used(self) -> None:
        """Tell the recorder that the value itself matters, not only as a size."""
        if self.recorder is not None:
            self.recorder.value_matters(self)


def _arithmetic(name: str, reflected: bool) -> Callable[[Sized, Any], Any]:
    plain = getattr(int, f"__{'r' if reflected else ''}{name}__")

    def compute(self: Sized, other: Any) -> Any:
        value = plain(self, other)
        if type(value) is not int:
            return value
        sides = (origin(other), self.origin) if reflected else (self.origin, origin(other))
        return Sized.of(value, Apply(name, *sides), self.recorder)

    return compute


for _name in "add sub mul floordiv mod".split():
    setattr(Sized, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(Sized, f"__r{_name}__", _arithmetic(_name, reflected=True))


def _comparison(name: str) -> Callable[[Sized, Any], Any]:
    plain = getattr(int, f"__{name}__")

    def compare(self: Sized, other: Any) -> Any:
        outcome = plain(self, other)
        if self.recorder is not None and isinstance(outcome, bool):
            self.recorder.compared(name, self, other, outcome)
        return outcome

    return compare


for _name in TESTS:
    setattr(Sized, f"__{_name}__", _comparison(_name))


def origin(number: int) -> Expression:
    """Where a whole number comes from."""
    return number.origin if isinstance(number, Sized) else Number(int(number))
