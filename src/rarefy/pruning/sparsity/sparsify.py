"""Weights set to zero: the shapes stay, the file shrinks.

Arguments are checked here. Scores of all weights at once are gathered and ranked; what goes layer
by layer, in the network as pruned so far, is chosen in :mod:`rarefy.pruning.sparsity.calibrated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from rarefy.batches import answering, batch_size, take
from rarefy.copies import successor
from rarefy.errors import BudgetError, InputError
from rarefy.graph.capture import capture, check_runs, graph_model
from rarefy.graph.trace import trace
from rarefy.paths import within_wrappers
from rarefy.pruning.running.examples import alike, leading
from rarefy.pruning.scoring.criteria import ELEMENT, Element
from rarefy.pruning.scoring.evidence import LABELS, Evidence
from rarefy.pruning.scoring.gather import gather
from rarefy.pruning.scoring.passes import LossFunction
from rarefy.pruning.sparsity import elements
from rarefy.pruning.sparsity.calibrated import WHERE, Calibration
from rarefy.pruning.sparsity.elements import ElementCriterion, SparseGPT
from rarefy.pruning.sparsity.patterns import Pattern, Unstructured, named, resolved_share, shorthand
from rarefy.pruning.sparsity.weights import (
    Layer,
    choose,
    oriented,
    prunable,
    warn_of_emptied,
    zero,
)
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
        samples: examples used, of calibration or of evidence.
    """

    structure: str
    zeros: Mapping[str, tuple[int, int]]
    dense: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0

    @property
    def emptied(self) -> tuple[str, ...]:
        """Paths of weights of which nothing is left: what follows sees a constant."""
        return tuple(path for path, (gone, size) in self.zeros.items() if gone == size > 0)

    def of(self, small: nn.Module) -> Sparsified:
        """The record of what is left of the network after units went: zeros are counted anew.

        Where weights are fewer, patterns of several need not fit together any more, and what was
        measured was of other layers.
        """
        known = {within_wrappers(path) for path in self.zeros}
        dense = {within_wrappers(path): why for path, why in self.dense.items()}
        own = dict(small.named_parameters(remove_duplicate=False))
        sizes = {p: t.numel() for p, t in own.items() if within_wrappers(p) in known}
        if sizes == {path: size for path, (_, size) in self.zeros.items()}:
            return self
        zeros = {path: (int((own[path] == 0).sum()), size) for path, size in sizes.items()}
        why = {p: dense[within_wrappers(p)] for p in own if within_wrappers(p) in dense}
        return Sparsified("weight", zeros, why)


def sparsify(
    model: nn.Module,
    budget: Budget | None,
    structure: str | Pattern = "weight",
    *,
    example_inputs: Inputs | None = None,
    criterion: str | ElementCriterion | None = None,
    data: Data | None = None,
    loss: LossFunction | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Set the least important weights to zero, in a copy of the model.

    Concerns weights of two or more dimensions; biases and normalization stay. N:M and blocks are
    for the matrices of products: not for embeddings, and not for weights that are computed in the
    forward or too small for one unit, which stay dense. What weight norm or spectral norm divides
    by its length keeps its best entry. Where data choose, weights that they say nothing of, or that
    cannot be solved for, go by magnitude. The record names both.

    The share is exact: ``floor(sparsity * n)`` of the ``n`` units (weights or blocks), of every
    tensor (``scope="local"``) or of all together (``scope="global"``). Weights that evidence says
    nothing of are ranked apart from the others under ``scope="global"``, to the same share. What
    goes layer by layer (SparseGPT) takes each layer's share from a ranking by magnitude.

    Args:
        model: any network.
        budget: ``Budget(sparsity=...)``; may be left out for N:M, which fixes the share.
        structure: a :data:`~rarefy.pruning.sparsity.patterns.Pattern` or its shorthand.
        example_inputs: needed except for single weights chosen without data.
        criterion: an :data:`~rarefy.pruning.sparsity.elements.ElementCriterion` or its shorthand;
            None for SparseGPT where data are given, else magnitude.
        data: batches, where the criterion needs them: all of them for evidence
            (:func:`~gather`), labelled where it asks for gradients of the
            loss; some hundred examples for SparseGPT.
        loss: (logits, targets) -> mean loss of a batch, for criteria that need gradients; cross
            entropy if not given.
        exclude: module or parameter paths that stay dense.

    Returns:
        A new network in eval mode; its attribute ``sparsified`` is a :class:`Sparsified` record.

    Raises:
        BudgetError: the budget is not a sparsity, or not the one of N:M, or leaves no length to
            divide by.
        InputError: an excluded name matches nothing, no weight is left to prune, or data or a
            loss are missing or without use.
        DataError: the data yield nothing, are not finite or not labelled where labels are needed,
            or the network does not run on them.
    """
    if criterion is None:
        criterion = "magnitude" if data is None else "sparsegpt"
    pattern, rule = named(structure), elements.named(criterion)
    share = _share(pattern, budget)
    _check_evidence(rule, criterion, data, loss)
    sparse = successor(model)
    layers = prunable(sparse, exclude)
    choice = _Choice(pattern, share, budget is None or budget.scope == "global")
    dense: dict[str, str] = {}
    evidence = Evidence(dict(model.named_parameters(remove_duplicate=False)))
    if isinstance(rule, Element) and rule.needs:
        network = trace(model, _required(example_inputs))
        layers, dense = oriented(layers, sparse, network.captured.graph, pattern)
        evidence = gather(model, network, rule.needs, data, loss)
    elif not isinstance(rule, Element) or not isinstance(pattern, Unstructured):
        shown, given = _required(example_inputs), list[Inputs]()
        if not isinstance(rule, Element) and data is not None:
            given = alike(leading(data, rule.samples, WHERE), WHERE)
            shown = take(given[0], batch_size(shown))
            with answering(WHERE):
                check_runs(model, shown)
        captured = capture(model, shown)
        layers, dense = oriented(layers, sparse, captured.graph, pattern)
    if isinstance(rule, Element):
        gone, fallback = choice.ranked(rule, evidence, layers)
        errors, samples = dict[str, tuple[float, float]](), evidence.samples
        zero(layers, gone)
    else:
        plain, _ = choice.ranked(ELEMENT["magnitude"], evidence, layers)
        pair = (graph_model(model, captured), graph_model(sparse, captured))
        walk = Calibration(pair, layers, plain, pattern, rule)
        walk.run(given)
        gone = [walk.gone[layer.path] for layer in layers]
        fallback, errors, samples = walk.fallback, walk.errors, walk.samples
    zeros = {x.path: (int(m.sum()), m.numel()) for x, m in zip(layers, gone, strict=True)}
    record = Sparsified(shorthand(pattern), zeros, dense, errors, fallback, samples)
    sparse.sparsified = record  # type: ignore[assignment]
    emptied = [path for path in record.emptied if model.get_parameter(path).any()]
    warn_of_emptied(f"prune(structure={record.structure!r})", emptied)
    return sparse.eval()


@dataclass(frozen=True)
class _Choice:
    """How many weights go, and what is ranked together."""

    pattern: Pattern
    share: float
    together: bool

    def ranked(
        self, rule: Element, evidence: Evidence, layers: Sequence[Layer]
    ) -> tuple[list[Tensor], dict[str, str]]:
        """What goes of every weight, and which ones go by magnitude for want of evidence, why."""
        known = [evidence.covers(layer.path, rule.needs) for layer in layers]
        found: dict[str, Tensor] = {}
        for judge, side in ((rule, True), (ELEMENT["magnitude"], False)):
            own = [layer for layer, is_known in zip(layers, known, strict=True) if is_known is side]
            if not own:
                continue
            scores = [elements.scored(judge, layer.path, evidence) for layer in own]
            how = (self.pattern, self.share)
            gone = choose(own, scores, *how, together=self.together, energy=judge.energy)
            found |= {layer.path: mask for layer, mask in zip(own, gone, strict=True)}
        paths = [layer.path for layer in layers]
        unknown = [path for path, is_known in zip(paths, known, strict=True) if not is_known]
        reason = f"there is no evidence on it ({', '.join(sorted(rule.needs - {LABELS}))})"
        return [found[path] for path in paths], dict.fromkeys(unknown, reason)


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
    for name, value in budget.of_units.items():
        raise BudgetError(
            f"Budget({name}={value!r})",
            "it concerns units, and single weights are to be removed",
            f"Leave {name} out",
        )
    return resolved_share(pattern, budget.sparsity, where)


def _check_evidence(
    rule: Element | SparseGPT, criterion: object, data: Data | None, loss: LossFunction | None
) -> None:
    asks = rule.needs if isinstance(rule, Element) else frozenset({"inputs"})
    if asks and data is None:
        labels = "labelled" if LABELS in asks else "labels are not needed"
        raise InputError(
            f"prune(criterion={criterion!r})",
            "it needs calibration data, and none are given",
            f"Give data=loader; a few hundred examples do, {labels}",
        )
    if not asks and data is not None:
        raise InputError(
            f"prune(criterion={criterion!r}, data=...)",
            "this criterion of single weights makes no use of data",
            "Leave data out, or write criterion='sparsegpt', which reconstructs with them",
        )
    if loss is not None and not asks & {"gradients", "squares", "gates"}:
        raise InputError(
            f"prune(criterion={criterion!r}, loss=...)",
            "this criterion of single weights makes no use of a loss",
            "Leave loss out, or write criterion='taylor', which takes its gradient",
        )


def _required(example_inputs: Inputs | None) -> Inputs:
    if example_inputs is None:
        raise InputError(
            "sparsify(example_inputs=None)",
            "N:M, blocks and criteria that take data need the network's graph",
            "Give example inputs",
        )
    return example_inputs
