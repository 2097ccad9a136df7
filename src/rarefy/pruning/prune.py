"""``prune``: trace, score, select, cut, prove, and repair where data are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

from torch import nn

from rarefy.batches import Leading, check_rereadable
from rarefy.copies import ordinary
from rarefy.errors import InputError
from rarefy.paths import excluded, paths
from rarefy.pruning.checks import check_arguments, check_copies, check_finite
from rarefy.pruning.request import Request, check_fit, removes
from rarefy.pruning.scoring.compensated import Compensated
from rarefy.pruning.scoring.criteria import Criterion
from rarefy.pruning.scoring.curves import Sensitivity
from rarefy.pruning.scoring.passes import LossFunction
from rarefy.pruning.sparsity.elements import ElementCriterion
from rarefy.pruning.sparsity.patterns import Pattern
from rarefy.types import Budget, Data, Inputs, is_count


class PruneOptions(TypedDict, total=False):
    """Options of :func:`prune` that every kind of budget leaves to the user."""

    criterion: str | Criterion | Compensated | ElementCriterion | None
    structure: str | Pattern | Sequence[str]
    data: Data | None
    samples: int | None
    loss: LossFunction | None
    heal: bool
    exclude: Sequence[str]
    keep_class: bool
    sensitivity: Sensitivity | None


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None = None,
    **options: Unpack[PruneOptions],
) -> nn.Module:
    """Remove the least important units of a network, with proof.

    What :func:`rarefy.prune` does where a budget is counted rather than measured; see there for the
    options, and for what it raises.

    Args:
        model: a trained network; left as it is.
        example_inputs: what it is called with.
        budget: how much may remain.
        options: how it is done.

    Returns:
        A new network in eval mode. Where units were removed, its attribute ``pruned`` is a
        :class:`~rarefy.pruning.narrow.Pruned` record; where weights were set to zero,
        ``sparsified`` is a :class:`~rarefy.pruning.sparsity.sparsify.Sparsified` record.
    """
    return request(model, example_inputs, budget, **options).done(budget)


def request(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None = None,
    *,
    criterion: str | Criterion | Compensated | ElementCriterion | None = None,
    structure: str | Pattern | Sequence[str] = "channel",
    data: Data | None = None,
    samples: int | None = 1024,
    loss: LossFunction | None = None,
    heal: bool = True,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
    sensitivity: Sensitivity | None = None,
) -> Request:
    """What :func:`prune` is asked to do, checked.

    Args:
        model: a trained network.
        example_inputs: what it is called with.
        budget: how much may remain, in this or another number.
        criterion: how important a unit or weight is.
        structure: what is removed.
        data: batches to score and to repair with.
        samples: how many of their first examples; None for all.
        loss: (logits, targets) -> mean loss of a batch.
        heal: whether the smaller network is repaired where data are given.
        exclude: paths or patterns of what keeps its width.
        keep_class: never return a rewritten graph.
        sensitivity: what the removal of each group's units costs.
    """
    removed = removes(structure)
    check_arguments(model, budget, Budget if removed else Budget | None)
    model = ordinary(model)
    excluded(exclude, paths(model))
    check_finite(model)
    check_copies(model)
    _check_sensitivity(structure, sensitivity)
    data = _leading(data, samples)
    if removed and budget is not None:
        check_fit(structure, budget)
    return Request(
        model,
        example_inputs,
        structure,
        criterion,
        data,
        loss,
        heal=heal,
        sensitivity=sensitivity,
        exclude=exclude,
        keep_class=keep_class,
    )


def _leading(data: Data | None, samples: int | None) -> Data | None:
    if samples is not None and not is_count(samples):
        raise InputError(
            f"prune(samples={samples!r})",
            "it is the number of examples that data give, at least 1",
            "Use a few hundred, or None for all of them",
        )
    if data is None:
        return None
    check_rereadable(data, "prune(data)")
    return Leading(data, samples, "prune(data)")


def _check_sensitivity(structure: object, sensitivity: object) -> None:
    if sensitivity is None:
        return
    if removes(structure) != {"channel"}:
        raise InputError(
            f"prune(structure={structure!r}, sensitivity=...)",
            "sensitivity was measured for units, and others than units are to be removed",
            "Leave sensitivity out",
        )
    if not isinstance(sensitivity, Sensitivity):
        raise InputError(
            f"prune(sensitivity={sensitivity!r})",
            f"it is a {type(sensitivity).__name__}",
            "Give what rarefy.sensitivity returned, or rarefy.Sensitivity.load(path)",
        )
