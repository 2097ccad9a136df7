"""Weights set to zero: the shapes stay, the file shrinks.

Arguments are checked here; what goes is chosen by tensors in :mod:`rarefy.pruning.weights`, by
calibration data in :mod:`rarefy.pruning.calibrated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from rarefy.copies import copied
from rarefy.errors import BudgetError, InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.pruning import elements
from rarefy.pruning.calibrated import Calibration
from rarefy.pruning.elements import ElementCriterion, SparseGPT, Wanda
from rarefy.pruning.patterns import Pattern, Unstructured, named, resolved_share, shorthand
from rarefy.pruning.weights import Layer, choose, oriented, prunable, zero
from rarefy.types import Budget, Data, Inputs


@dataclass(frozen=True)
class Sparsified:
    """What was set to zero; the attribute ``sparsified`` of the result.

    Attributes:
        structure: shorthand of the pattern, e.g. ``"2:4"``.
        zeros: path of a weight -> (weights chosen to be zero, all its weights).
        dense: path -> why a weight was left as it was.
        errors: path -> relative error of the layer's outputs on held-out calibration rows, of
            plain magnitude and of what was taken instead; empty without reconstruction.
        fallback: path -> why the weight was pruned by plain magnitude though data were given.
        samples: calibration examples used.
    """

    structure: str
    zeros: Mapping[str, tuple[int, int]]
    dense: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0


def sparsify(
    model: nn.Module,
    budget: Budget | None,
    structure: str | Pattern = "weight",
    *,
    example_inputs: Inputs | None = None,
    criterion: str | ElementCriterion = "magnitude",
    data: Data | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Set the least important weights to zero, in a copy of the model.

    Concerns weights of two or more dimensions; biases and normalization stay. N:M and blocks are
    for the matrices of products: not for embeddings, and not for weights that are computed in the
    forward or too small for one unit, which stay dense. Where data choose, weights that cannot be
    solved for go by magnitude. The record names both.

    The share is exact: ``floor(sparsity * n)`` of the ``n`` units (weights or blocks), of every
    tensor (``scope="local"``) or of all together (``scope="global"``). Where data choose, each
    layer's share under ``scope="global"`` is the one that ranking by magnitude gives it.

    Args:
        model: any network.
        budget: ``Budget(sparsity=...)``; may be left out for N:M, which fixes the share.
        structure: a :data:`~rarefy.pruning.patterns.Pattern` or its shorthand.
        example_inputs: needed except for single weights chosen without data.
        criterion: an :data:`~rarefy.pruning.elements.ElementCriterion` or its shorthand.
        data: calibration batches, needed by ``"wanda"`` and ``"sparsegpt"``.
        exclude: module or parameter paths that stay dense.

    Returns:
        A new network in eval mode; its attribute ``sparsified`` is a :class:`Sparsified` record.

    Raises:
        BudgetError: the budget is not a sparsity, or not the one of N:M.
        InputError: an excluded name matches nothing, no weight is left to prune, or data are
            missing or without use.
        DataError: the data yield nothing, are not finite, or the network does not run on them.
    """
    pattern, rule = named(structure), elements.named(criterion)
    share = _share(pattern, budget)
    _check_data(rule, criterion, data)
    sparse = copied(model)
    layers = [Layer(path, weight) for path, weight in prunable(sparse, exclude)]
    together = budget is None or budget.scope == "global"
    dense: dict[str, str] = {}
    if data is not None or not isinstance(pattern, Unstructured):
        captured = capture(model, _required(example_inputs))
        layers, dense = oriented(layers, sparse, captured.graph, pattern)
    scores = [(rule if callable(rule) else elements.magnitude)(x.weight) for x in layers]
    plain = choose(layers, scores, pattern, share, together=together)
    walk = None
    if callable(rule):
        zero(layers, plain)
    else:
        assert data is not None
        pair = (graph_model(model, captured), graph_model(sparse, captured))
        walk = Calibration(pair, layers, plain, pattern, rule)
        walk.run(data)
    gone = plain if walk is None else [walk.gone[layer.path] for layer in layers]
    sparse.sparsified = Sparsified(  # type: ignore[assignment]
        shorthand(pattern),
        {x.path: (int(m.sum()), m.numel()) for x, m in zip(layers, gone, strict=True)},
        dense,
        {} if walk is None else walk.errors,
        {} if walk is None else walk.fallback,
        0 if walk is None else walk.samples,
    )
    return sparse.eval()


# --- arguments -----------------------------------------------------------------------------------


def _share(pattern: Pattern, budget: Budget | None) -> float:
    where = f"prune(structure={shorthand(pattern)!r})"
    if budget is None:
        return resolved_share(pattern, None, where)
    if budget.sparsity is None:
        raise BudgetError(
            where,
            "zeros save neither MACs nor parameters",
            "Give Budget(sparsity=0.9), the share of weights to set to zero",
        )
    for name in ("min_keep", "max_drop", "round_to", "layers"):
        if getattr(budget, name) != Budget.__dataclass_fields__[name].default:
            raise BudgetError(
                f"Budget({name}={getattr(budget, name)!r})",
                "it concerns units, and single weights are to be removed",
                f"Leave {name} out",
            )
    return resolved_share(pattern, budget.sparsity, where)


def _check_data(rule: ElementCriterion, criterion: object, data: Data | None) -> None:
    needs = isinstance(rule, Wanda | SparseGPT)
    if needs and data is None:
        raise InputError(
            f"prune(criterion={criterion!r})",
            "it needs calibration data, and none are given",
            "Give data=loader; a few hundred examples do, labels are not needed",
        )
    if not needs and data is not None:
        raise InputError(
            f"prune(criterion={criterion!r}, data=...)",
            "this criterion of single weights makes no use of data",
            "Leave data out, or write criterion='sparsegpt', which reconstructs with them",
        )
    if not callable(rule) and not needs:
        raise InputError(
            f"prune(criterion={criterion!r})",
            "it is no criterion of single weights",
            f"Use one of {', '.join(elements.ELEMENT_CRITERIA)}, or a function weight -> scores",
        )


def _required(example_inputs: Inputs | None) -> Inputs:
    if example_inputs is None:
        raise InputError(
            "sparsify(example_inputs=None)",
            "N:M, blocks and reconstruction need the network's graph",
            "Give example inputs",
        )
    return example_inputs
