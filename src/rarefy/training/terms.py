"""A loss as what distillation evaluates: a part of outputs, and terms of features with heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.batches import call, evaluating, seeded, unchanged
from rarefy.distillation.losses import At, AttentionMaps, Loss, Weighted
from rarefy.distillation.pairing import Pair, pairs
from rarefy.distillation.taps import Taps, taps
from rarefy.types import Inputs

ANY = "*"
"""The path that leaves the pairing of features to rarefy: ``FitNet().at("*")``."""


@dataclass(frozen=True)
class Batch:
    """What the terms of a loss may look at besides features.

    Attributes:
        student, teacher: logits.
        options: ``mask=`` of the logits, where there is one.
        labels: on the device of the logits; None where there are none.
        padding: ``(B, L)``, 0 where the inputs are padding; None where they do not say.
    """

    student: Tensor
    teacher: Tensor
    options: Mapping[str, Tensor]
    labels: Any
    padding: Tensor | None

    def swapped(self) -> Batch:
        """The same with the teacher in the place of the student."""
        return replace(self, student=self.teacher, teacher=self.student)

    def apart(self) -> Batch:
        """The same with a teacher that no gradient reaches: one that learns along would follow."""
        return replace(self, teacher=self.teacher.detach())


def bindings(loss: Any) -> tuple[At, ...]:
    """The terms of features, in order."""
    terms = loss.terms if isinstance(loss, Loss) else ()
    return tuple(term for _, term in terms if isinstance(term, At))


def paths_of(path: str | tuple[str, ...]) -> tuple[str, ...]:
    """One path or several as a tuple."""
    return (path,) if isinstance(path, str) else path


def of_outputs(loss: Any, batch: Batch) -> Tensor:
    """The part of a loss that compares outputs; 0 where there is none."""
    if not bindings(loss):
        return _of_outputs(loss, batch)
    parts = [w * _of_outputs(t, batch) for w, t in loss.terms if not isinstance(t, At)]
    return torch.stack(parts).sum() if parts else batch.student.new_zeros(())


def _of_outputs(loss: Any, batch: Batch) -> Tensor:
    extra = {"labels": batch.labels} if getattr(loss, "needs_labels", False) else {}
    value: Tensor = loss(batch.student, batch.teacher, **batch.options, **extra)
    return value


def of_features(
    loss: Any, heads: nn.ModuleDict, ours: Taps, theirs: Taps, padding: Tensor | None
) -> Tensor:
    """The terms of features, with the heads that belong to them by their number."""
    places = ((w, term) for w, term in loss.terms if isinstance(term, At))
    values = []
    for number, (weight, term) in enumerate(places):
        features = _feature(ours, term.student), _feature(theirs, term.teacher)
        name = str(number)
        own, its = heads[name](*features) if name in heads else features
        value = term(own, its, _fitting(padding, features[0], term))
        values.append(weight * value)
    return torch.stack(values).sum()


def _feature(found: Taps, path: str | tuple[str, ...]) -> Any:
    return found[path] if isinstance(path, str) else [found[p] for p in path]


def _fitting(padding: Tensor | None, feature: Any, term: At) -> Tensor | None:
    """The padding, where a feature is of the sequence that it is of: (B, L, C), or attention."""
    first = feature if isinstance(feature, Tensor) else feature[0]
    attention = isinstance(term.loss, AttentionMaps)
    length = first.shape[-1] if attention else first.shape[1]
    if padding is None or not (attention or first.ndim == 3):
        return None
    return padding if tuple(padding.shape) == (len(first), length) else None


# --- before the first step -----------------------------------------------------------------------


def paired(
    loss: Any, student: nn.Module, teacher: nn.Module, inputs: Inputs
) -> tuple[Any, tuple[Pair, ...]]:
    """The loss with every term at ``"*"`` in the places that :func:`pairs` finds, and these.

    A term of one feature becomes the mean of such terms, one for each pair.
    """
    if not any(ANY in paths_of(place.student) for place in bindings(loss)):
        return loss, ()
    found = pairs(student, teacher, inputs)
    parts = [part for weight, term in loss.terms for part in _placed(weight, term, found)]
    return Weighted(tuple(parts)), found


def _placed(weight: Any, term: Loss, found: tuple[Pair, ...]) -> Iterator[tuple[Any, Loss]]:
    if not isinstance(term, At) or ANY not in paths_of(term.student):
        yield weight, term
        return
    if term.loss.several:
        yield weight, term.loss.at(tuple(p.student for p in found), tuple(p.teacher for p in found))
        return
    for pair in found:
        share = term.loss.at(pair.student, pair.teacher) * (1 / len(found))
        yield from (share * weight).terms


def heads_for(loss: Any, student: nn.Module, teacher: nn.Module, inputs: Inputs) -> nn.ModuleDict:
    """What the terms of features train along, by the number of the term.

    Both networks are run once in eval mode, and are the same afterwards.

    Raises:
        InputError: a path is no module's, or shapes cannot be bridged.
    """
    places, heads = bindings(loss), nn.ModuleDict()
    if not places:
        return heads
    where = "distill(loss)"
    ours = [path for place in places for path in paths_of(place.student)]
    theirs = [path for place in places for path in paths_of(place.teacher)]
    with (
        taps(student, ours, where=f"{where}, student") as found,
        taps(teacher, theirs, where=f"{where}, teacher") as wanted,
        evaluating(student, teacher),
        unchanged(student),
        seeded(0),
    ):
        call(student, inputs)
        call(teacher, inputs)
    for number, place in enumerate(places):
        features = _feature(found, place.student), _feature(wanted, place.teacher)
        head = place.loss.head(*features)
        if head is not None:
            heads[str(number)] = head.train()
    return heads
