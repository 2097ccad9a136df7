"""A criterion in any form -> how important all units of a network are."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from rarefy.batches import evaluating
from rarefy.errors import DataError, InputError, warn
from rarefy.graph.trace import Network
from rarefy.pruning.scoring import criteria
from rarefy.pruning.scoring.compensated import Compensated, Response, respond
from rarefy.pruning.scoring.criteria import Criterion, needs, scored
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.gather import gather
from rarefy.pruning.scoring.passes import LossFunction
from rarefy.types import Data

COMPENSATED = "compensated"
"""Shorthand of :class:`~rarefy.pruning.scoring.compensated.Compensated`."""


Rule: TypeAlias = str | Criterion | Compensated
"""A criterion in any form."""


def named(criterion: Rule) -> Criterion | Compensated:
    """A criterion from its shorthand, or itself.

    Raises:
        InputError: no criterion has that name.
    """
    if isinstance(criterion, Compensated):
        return criterion
    if criterion == COMPENSATED:
        return Compensated()
    return criteria.named(criterion, (COMPENSATED,))


def on_data(criterion: Rule) -> bool:
    """Whether a criterion asks for data.

    Example:
        >>> on_data("magnitude"), on_data("fisher"), on_data("compensated")
        (False, True, True)
    """
    chosen = named(criterion)
    return isinstance(chosen, Compensated) or bool(needs(chosen))


def judged(
    model: nn.Module,
    network: Network,
    criterion: Rule | None = None,
    data: Data | None = None,
    loss: LossFunction | None = None,
) -> Response:
    """The importance of all units, and what their removal costs where that is measured.

    Args:
        model: the network.
        network: its trace.
        criterion: in any form; None for ``"fisher"`` on unlabelled data and, where there are none
            or that cannot be had (with a warning), ``"magnitude"``.
        data: batches, where the criterion asks for them.
        loss: (logits, targets) -> mean loss of a batch; cross entropy if not given.

    Raises:
        InputError: the name is none, or data are needed and not given.
        DataError: the data cannot be used.
    """
    if criterion is None:
        return _by_default(model, network, data, loss)
    chosen = named(criterion)
    if not isinstance(chosen, Compensated):
        return _response(network, gather(model, network, needs(chosen), data, loss), chosen)
    if data is None:
        raise InputError(
            "prune(criterion='compensated')",
            "it measures what the outputs lose, and no data are given",
            "Give data=, batches of examples; labels are not needed",
        )
    with evaluating(model):
        return respond(model, network, data, chosen)


def _response(network: Network, evidence: Evidence, criterion: Criterion) -> Response:
    """The importance of all units by a criterion."""
    return Response(tuple(scored(group, evidence, criterion) for group in network.groups))


def _by_default(
    model: nn.Module, network: Network, data: Data | None, loss: LossFunction | None
) -> Response:
    """Units by the Fisher information where there are data, by magnitude where there are none."""
    if data is None:
        return judged(model, network, "magnitude")
    if loss is not None:
        return judged(model, network, "fisher", data, loss)
    fisher = criteria.named("fisher")
    try:
        evidence = gather(model, network, needs(fisher), data, drawn=True)
        return _response(network, evidence, fisher)
    except DataError:
        raise
    except InputError as error:
        warn(f"units are scored by magnitude, since data tell nothing: {error.where}: {error.what}")
        return judged(model, network, "magnitude")
