"""What all losses share: they are frozen values that add, scale, follow schedules, and bind.

A loss against outputs is called as ``loss(logits, reference, mask=None)``; a loss of features as
``loss(student, teacher, mask=None)``, and ``loss.at("layer3")`` binds it to a place in the network,
which makes it a term of a sum. Weights and numbers of a loss may be schedules, which
:meth:`Loss.at_step` turns into numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias

from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.schedules import Product, Schedule

Against: TypeAlias = Literal["teacher", "labels", "features"]
"""What a loss compares with: the teacher's outputs, true labels, or the teacher's features."""

Number: TypeAlias = float | Schedule
"""A number, or a schedule of one: step (0, 1, 2, ...) to number, see :mod:`rarefy.schedules`."""

Path: TypeAlias = str | tuple[str, ...]
"""The name of a module in a network, or of several whose outputs go into one call."""


class Loss(ABC):
    """Base of all losses: what makes them add, scale and follow schedules.

    Subclasses are frozen dataclasses. A field that holds a callable other than a loss or a module
    is a schedule of the number that it stands for.

    Attributes:
        against: what the second argument is: the ``"teacher"``'s outputs, true ``"labels"``, or the
            teacher's ``"features"``.
        needs_labels: whether the call takes ``labels=`` beside the teacher's outputs.
        needs_outputs: whether it compares the outputs themselves: log-probabilities, which are
            logits less a constant, give another value.

    Example:
        >>> loss = KD(temperature=Linear(8, 2, 1000)) + Linear(1, 0, 1000) * SP().at("layer3")
        >>> loss.at_step(500).terms[0]
        (1.0, KD(temperature=5.0, dim=None))
    """

    against: ClassVar[Against]
    needs_labels: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logits: Any, reference: Any, mask: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` against ``reference``, a scalar."""

    @property
    def terms(self) -> tuple[tuple[Number, Loss], ...]:
        """The ``(weight, loss)`` pairs that this is the sum of; none of them is a sum itself."""
        return ((1.0, self),)

    def at_step(self, step: float) -> Self:
        """The loss at a step of training: every schedule, however deep, is the number it gives.

        Raises:
            InputError: a schedule gave a number that the loss refuses.
        """
        if not is_dataclass(self):
            return self
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        found = {name: _at_step(value, step) for name, value in held.items()}
        changes = {name: value for name, value in found.items() if value is not held[name]}
        return replace(self, **changes) if changes else self

    def number(self, name: str) -> float:
        """The value of a field that may hold a schedule.

        Raises:
            InputError: it does hold one, and no step was named.
        """
        return _resolved(type(self).__name__, name, getattr(self, name))

    def __add__(self, other: Loss) -> Weighted:
        if not isinstance(other, Loss):
            return NotImplemented
        return Weighted((*self.terms, *other.terms))

    def __radd__(self, other: Literal[0]) -> Self:
        """``0 + loss`` is the loss, so that ``sum`` adds up terms."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: Number) -> Weighted:
        if isinstance(factor, Loss) or not (isinstance(factor, int | float) or callable(factor)):
            return NotImplemented
        return Weighted(tuple((_times(factor, weight), loss) for weight, loss in self.terms))

    __rmul__ = __mul__


def _at_step(value: Any, step: float) -> Any:
    """A field's value at a step; the very same object where nothing depends on the step."""
    if isinstance(value, Loss):
        return value.at_step(step)
    if isinstance(value, tuple):
        found = tuple(_at_step(item, step) for item in value)
        return value if all(a is b for a, b in zip(found, value, strict=True)) else found
    return value(step) if callable(value) and not isinstance(value, nn.Module) else value


def _times(factor: Number, weight: Number) -> Number:
    if not (callable(factor) or callable(weight)):
        return factor * weight
    if weight == 1:
        return factor
    return weight if factor == 1 else Product((factor, weight))


def _resolved(where: str, name: str, value: Number) -> float:
    if callable(value):
        raise InputError(
            f"{where}({name}={value!r})",
            f"the {name} is a schedule, and a call names no step",
            "Call loss.at_step(step)(...)",
        )
    return value


@dataclass(frozen=True)
class Rule:
    """What a number of a loss must be.

    Attributes:
        holds: whether a number is so.
        says: the same in words.
        example: one that is.
    """

    holds: Callable[[float], bool]
    says: str
    example: float


POSITIVE = Rule(lambda v: 0 < v < math.inf, "a number above 0", 4.0)
NOT_NEGATIVE = Rule(lambda v: 0 <= v < math.inf, "a number, at least 0", 1.0)
INNER_SHARE = Rule(lambda v: 0 < v < 1, "a share above 0 and below 1", 0.5)
POSITIVE_SHARE = Rule(lambda v: 0 < v <= 1, "a share above 0, at most 1", 0.9)
SHARE_BELOW_ONE = Rule(lambda v: 0 <= v < 1, "a share, at least 0 and below 1", 0.1)


def require(loss: Loss, rule: Rule, *names: str) -> None:
    """Refuse numbers that break a rule; schedules are judged by the numbers that they give.

    Raises:
        InputError: a field holds no number, or one that the rule excludes, such as NaN.
    """
    for name in names:
        value = getattr(loss, name)
        if callable(value) or (isinstance(value, int | float) and rule.holds(value)):
            continue
        raise InputError(
            f"{type(loss).__name__}({name}={value!r})",
            f"the {name} must be {rule.says}",
            f"Write {name}={rule.example}",
        )


@dataclass(frozen=True)
class Weighted(Loss):
    """A weighted sum of losses; made by ``+`` and ``*``.

    A sum of losses against the teacher's outputs, or of losses against labels, is called as its
    terms are. Terms that are bound to features (:class:`At`) need more than outputs: such a sum is
    evaluated by its :attr:`terms`, as ``distill`` does.

    Args:
        parts: ``(weight, loss)`` pairs, at least one; a weight is a number or a schedule.

    Raises:
        InputError: there is no part, a weight is not finite, a loss against labels is added to one
            against the teacher, or a loss of features does not say of which; when called, a weight
            is still a schedule, or a term is bound to features.

    Example:
        >>> 0.9 * KD(temperature=2) + 0.1 * MSE()
        Weighted(parts=((0.9, KD(temperature=2, dim=None)), (0.1, MSE(dim=None))))
    """

    parts: tuple[tuple[Number, Loss], ...]

    def __post_init__(self) -> None:
        if not all(callable(w) or math.isfinite(w) for w, _ in self.parts) or not self.parts:
            raise InputError("Weighted(...)", f"{self.parts!r} is no sum", "Give finite weights")
        losses = [loss for _, loss in self.terms]
        for loss in losses:
            if isinstance(loss, FeatureLoss):
                name = type(loss).__name__
                raise InputError(
                    f"{name}(...)",
                    "a term of a sum must say which features it compares",
                    f"Name the module: {name}(...).at('layer3')",
                )
        if len({loss.against == "labels" for loss in losses}) > 1:
            raise InputError(
                " + ".join(type(loss).__name__ for loss in losses),
                "one compares with the teacher, the other with labels",
                "Use the label_weight of distill(...) to mix in the labels",
            )

    @property
    def terms(self) -> tuple[tuple[Number, Loss], ...]:
        """The ``(weight, loss)`` pairs, those of sums among the parts in their place."""
        return tuple(
            (_times(weight, inner), term)
            for weight, loss in self.parts
            for inner, term in loss.terms
        )

    @property
    def against(self) -> Against:  # type: ignore[override]
        """``"teacher"`` where a term compares outputs, else what all terms compare with."""
        kinds = [loss.against for _, loss in self.terms]
        return "teacher" if "teacher" in kinds else kinds[0]

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Whether a term does."""
        return any(loss.needs_labels for _, loss in self.terms)

    @property
    def needs_outputs(self) -> bool:  # type: ignore[override]
        """Whether a term does."""
        return any(loss.needs_outputs for _, loss in self.terms)

    def __call__(
        self,
        logits: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        total: Tensor | None = None
        for weight, loss in self.terms:
            if isinstance(loss, At):
                raise InputError(
                    "Weighted(...)",
                    f"the outputs do not hold the features at {loss.student!r}",
                    "Use distill(loss=...), or evaluate the terms of loss.terms one by one",
                )
            extra = {"labels": labels} if loss.needs_labels else {}
            value = loss(logits, reference, mask, **extra)
            value = _resolved("Weighted", "weight", weight) * value
            total = value if total is None else total + value
        assert total is not None
        return total


class FeatureLoss(Loss):
    """Base of the losses of intermediate features.

    ``loss(student, teacher, mask=None)`` is a pure function of the two features: tensors, or lists
    of tensors where :attr:`several` is true. Where student and teacher have other shapes, or the
    method learns something along, :meth:`head` makes the part to be trained::

        head = loss.head(student, teacher)                          # from the features of one batch
        value = loss(*(head(student, teacher) if head else (student, teacher)), mask)

    ``mask``, ``(B, L)``, says which positions of sequences ``(B, L, C)`` count; other features go
    without, or with one of their shape less the channels.

    Attributes:
        several: whether a feature is a sequence of tensors, the outputs of several modules.
    """

    against: ClassVar[Against] = "features"
    several: ClassVar[bool] = False

    def head(self, student: Any, teacher: Any) -> nn.Module | None:
        """What is trained along with the student and dropped afterwards.

        Args:
            student: the student's feature of one batch; shapes, dtype and device count.
            teacher: the teacher's.

        Returns:
            A module that turns (student, teacher) into the arguments of the loss; None where there
            is nothing to learn. Its parameters are float32, or float64 for features of float64,
            on the device of the student's feature.

        Raises:
            InputError: the shapes cannot be bridged.
        """
        return None

    def at(self, student: Path, teacher: Path | None = None) -> At:
        """The loss of the outputs of named modules, as a term that adds and scales.

        Args:
            student: the path of a module in the student, such as ``"layer3"`` or
                ``"encoder.layers.2"``; a tuple of paths where the loss takes several features.
            teacher: the path in the teacher; None for the same.

        Raises:
            InputError: the number of paths does not fit the loss, or student and teacher have other
                numbers of paths.

        Example:
            >>> FitNet().at("layer2", teacher="layer4").teacher
            'layer4'
        """
        return At(self, student, student if teacher is None else teacher)


@dataclass(frozen=True)
class At(Loss):
    """A loss of features, bound to the modules whose outputs they are; made by ``loss.at(...)``.

    Args:
        loss: the loss.
        student: the module's path in the student, or a tuple of paths.
        teacher: the module's path in the teacher, or a tuple of as many paths.

    Raises:
        InputError: a path is no text, or the numbers of paths do not fit.

    Example:
        >>> (KD(4) + 100 * SP().at("layer3")).terms[1]
        (100.0, At(loss=SP(), student='layer3', teacher='layer3'))
    """

    loss: FeatureLoss
    student: Path
    teacher: Path
    against: ClassVar[Against] = "features"

    def __post_init__(self) -> None:
        own = type(self.loss).__name__
        for path in (self.student, self.teacher):
            names = path if isinstance(path, tuple) else (path,)
            right = isinstance(path, tuple) == self.loss.several and len(names) > 0
            if right and all(isinstance(name, str) for name in names):
                continue
            raise InputError(
                f"{own}(...).at({path!r})",
                "it compares the outputs of several modules together"
                if self.loss.several
                else "it compares the outputs of one module",
                f"Write {own}(...).at(('layer1', 'layer2'))"
                if self.loss.several
                else f"Write {own}(...).at('layer3'), and add such terms for several layers",
            )
        if self.loss.several and len(self.student) != len(self.teacher):
            raise InputError(
                f"{own}(...).at({self.student!r}, {self.teacher!r})",
                f"{len(self.student)} modules of the student, {len(self.teacher)} of the teacher",
                "Name as many of both",
            )

    def __call__(self, logits: Any, reference: Any, mask: Tensor | None = None) -> Tensor:
        """The loss of the two features, as they come from the head where there is one."""
        return self.loss(logits, reference, mask)
