"""``prune``: trace, score, select, cut, prove, and repair where data are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.batches import doubled, evaluating, tensors
from rarefy.copies import computed
from rarefy.errors import BudgetError, InputError, ProofError, first_line
from rarefy.graph.capture import check_runs
from rarefy.graph.program import GraphModel, Spec
from rarefy.graph.resting import resting
from rarefy.graph.trace import Frozen, Network, trace
from rarefy.pruning.compensated import Compensated, Response, respond
from rarefy.pruning.costs import Costs
from rarefy.pruning.criteria import Criterion, named, needs, scored
from rarefy.pruning.curves import Sensitivity
from rarefy.pruning.elements import ElementCriterion
from rarefy.pruning.expressions import Equation
from rarefy.pruning.gather import LossFunction, gather
from rarefy.pruning.patterns import Pattern
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.proof import Build, Comparison, Masking, breaking, prove
from rarefy.pruning.provenance import equations
from rarefy.pruning.repair import repair
from rarefy.pruning.select import select
from rarefy.pruning.sizes import Sizes
from rarefy.pruning.sparsify import sparsify
from rarefy.pruning.surgery import Kept, cut, kept_entries, rewrite
from rarefy.types import Budget, Data, Inputs, Width

Timing = Callable[[Network], Costs]
"""A traced network -> the latencies of its layers."""


@dataclass(frozen=True)
class Pruned:
    """What a pruning did; the attribute ``pruned`` of its result.

    Attributes:
        kind: ``"module"`` where the user's class was kept, ``"graph"`` where its forward works
            with sizes that cannot be changed and the captured graph was rewritten instead.
        reason: why the class was not kept, or empty.
        widths: width of every layer that changed, before and after.
        kept: (path, dimension) -> entries of the original that stay.
        frozen: what could not be pruned, and why.
        error: largest difference from masking, relative to the outputs' sensitivity.
    """

    kind: str
    reason: str
    widths: tuple[Width, ...]
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    frozen: tuple[Frozen, ...]
    error: float


class PruneOptions(TypedDict, total=False):
    """Options of :func:`prune` that every kind of budget leaves to the user."""

    criterion: str | Criterion | Compensated | ElementCriterion
    structure: str | Pattern
    data: Data | None
    loss: LossFunction | None
    heal: bool
    exclude: Sequence[str]
    keep_class: bool
    sensitivity: Sensitivity | None


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None = None,
    *,
    criterion: str | Criterion | Compensated | ElementCriterion = "magnitude",
    structure: str | Pattern = "channel",
    data: Data | None = None,
    loss: LossFunction | None = None,
    heal: bool = True,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
    costs: Timing | None = None,
    sensitivity: Sensitivity | None = None,
) -> nn.Module:
    """Remove the least important units of a network, with proof.

    The result is compared with the original whose removed units are zeroed at every coupled slice
    (see :mod:`rarefy.pruning.proof`) before it is returned. The model itself is untouched.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        budget: how much may remain, e.g. ``Budget(macs=0.5)``; ``Budget(sparsity=0.9)`` for all
            structures that set weights to zero, and nothing for N:M, which fixes the share.
        criterion: how important a unit is: a name in :data:`~rarefy.pruning.criteria.CRITERIA`
            (``"magnitude"``, ``"l1"``, ``"random"``, ``"norm_scale"``, ``"lamp"``, ``"fpgm"``; on
            data ``"gradient"``, ``"taylor"``, ``"taylor2"``, ``"fisher"``, ``"obd"``, ``"obs"``,
            ``"reconstruction"``, ``"wanda"``, ``"activation"``), one of the frozen values there
            with other options, or a function (:data:`~rarefy.pruning.criteria.Criterion`).
            ``"compensated"`` (:class:`~rarefy.pruning.compensated.Compensated`) measures on data
            how much each group may lose. Of weights: a name in
            :data:`~rarefy.pruning.elements.ELEMENT_CRITERIA` (``"magnitude"``, ``"square"``,
            ``"random"``, ``"lamp"``; on data ``"gradient"``, ``"taylor"``, ``"taylor2"``,
            ``"obd"``, ``"obs"``, ``"wanda"``, ``"sparsegpt"``), or a function weight -> scores
            (:data:`~rarefy.pruning.elements.ElementCriterion`).
        structure: ``"channel"`` removes channels, heads and hidden units. All others set weights to
            zero, which makes files smaller, and faster what a runtime has kernels for:
            ``"weight"`` single ones, ``"2:4"`` two of every four, ``"1x4"`` blocks; or a value
            such as ``Block(8, 8)`` (:mod:`rarefy.pruning.patterns`,
            :func:`~rarefy.pruning.sparsify.sparsify`).
        data: batches with which units are scored, all of them, where the criterion asks for it
            (labelled where it needs gradients), and with which the smaller network is repaired by
            least squares, its BatchNorm statistics moved along
            (:func:`~rarefy.pruning.repair.repair`); or with which weights are chosen.
        loss: (logits, targets) -> mean loss of a batch, for criteria that need gradients; cross
            entropy if not given.
        heal: whether the smaller network is repaired where data are given.
        exclude: paths of modules or parameters, or patterns with ``*?[]``, whose own outputs keep
            their width.
        keep_class: never return a rewritten graph: units that the forward holds in place with
            numbers of its own stay, and are named in ``pruned.frozen``.
        costs: times the layers of the traced network, for a budget of latency.
        sensitivity: what the removal of each group's units costs, as measured by
            :func:`rarefy.sensitivity`: groups that hurt are cut less, those that were not measured
            stay whole. Units within a group are chosen by the criterion.

    Returns:
        A new network in eval mode. Where units were removed, its attribute ``pruned`` is a
        :class:`Pruned` record; where weights were set to zero, ``sparsified`` is a
        :class:`~rarefy.pruning.sparsify.Sparsified` record.

    Raises:
        InputError: weights are not finite, nothing can be pruned, a name matches nothing, the
            criterion needs data that are not given or returns no scores.
        DataError: the data are empty, unlabelled where labels are needed, or not finite.
        BudgetError: the budget cannot be reached.
        CaptureError: the network cannot be captured.
        ProofError: the smaller network differs from masking; nothing is returned.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune(net, torch.randn(2, 4), Budget(sparsity=0.5))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    zeros = structure != "channel"
    _check_arguments(model, budget, exclude, Budget | None if zeros else Budget)
    check_finite(model)
    check_copies(model)
    if zeros:
        if sensitivity is not None:
            raise InputError(
                f"prune(structure={structure!r}, sensitivity=...)",
                "sensitivity was measured for units, and weights are to be removed",
                "Leave sensitivity out",
            )
        given: dict[str, Any] = {"criterion": criterion, "data": data, "loss": loss}
        given |= {"example_inputs": example_inputs, "exclude": exclude}
        return sparsify(model, budget, structure, **given)
    assert budget is not None
    network = trace(model, example_inputs)
    check_runs(model, example_inputs)
    judged = _judged(model, network, criterion, data, loss)
    scores, closed = judged.scores, dict(judged.unmeasured)
    sizes = Sizes(network, stated(model, network, example_inputs))
    losses = judged.losses if sensitivity is None else sensitivity.losses(network.groups)
    options: dict[str, Any] = {"losses": losses}
    if costs is not None:
        options["costs"] = costs(network)
    while True:
        plan = _plan(network, model, scores, budget, exclude, sizes, closed, keep_class, options)
        try:
            small = operate(model, example_inputs, network, plan, sizes, keep_class=keep_class)
        except ClassError as error:
            if not error.groups:
                raise
            closed |= dict.fromkeys(error.groups, "the class does not work with fewer of them")
        else:
            break
    record: Any = small.pruned
    if record.kind == "graph" and plan.whole:  # a graph need not fit the forward
        plan = select(network, model, scores, budget, exclude, **options)
        small = operate(model, example_inputs, network, plan, sizes, fault=record.reason)
    return small if data is None or not heal else repair(model, small, data)


def _judged(
    model: nn.Module,
    network: Network,
    criterion: str | Criterion | Compensated | ElementCriterion,
    data: Data | None,
    loss: LossFunction | None,
) -> Response:
    """The importance of all units, and what their removal costs where that is measured."""
    if criterion == "compensated":
        criterion = Compensated()
    if isinstance(criterion, Compensated):
        if data is None:
            raise InputError(
                f"prune(criterion={criterion!r})",
                "it measures what the outputs lose, and no data are given",
                "Give data=, batches of examples; labels are not needed",
            )
        with evaluating(model):
            return respond(model, network, data, criterion)
    judge = named(cast("str | Criterion", criterion))
    evidence = gather(model, network, needs(judge), data, loss)
    return Response(tuple(scored(group, evidence, judge) for group in network.groups))


def _plan(
    network: Network,
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    exclude: Sequence[str],
    sizes: Sizes,
    closed: Mapping[int, str],
    keep_class: bool,
    options: Mapping[str, Any],
) -> Plan:
    """A plan that the user's forward can carry out; where none does it, one for the graph.

    Raises:
        ClassError: the class has to be kept, and nothing can go then.
        BudgetError, InputError: see :func:`~rarefy.pruning.select.select`.
    """
    held: dict[str, Any] = {**options, "closed": closed, "keep_class": keep_class}
    try:
        plan = select(network, model, scores, budget, exclude, sizes, **held)
    except BudgetError:
        if keep_class:
            raise
        return select(network, model, scores, budget, exclude, **options)
    if plan.removed.any() or not plan.whole:
        return plan
    if keep_class:
        raise ClassError(
            f"prune({type(model).__name__}, keep_class=True)",
            f"its forward holds all units in place: {next(iter(plan.whole.values()))}",
            "Write sizes in forward as x.shape[...] or module attributes, or accept a rewritten "
            "graph (keep_class=False)",
        )
    return select(network, model, scores, budget, exclude, **options)


def stated(model: nn.Module, network: Network, example_inputs: Inputs) -> tuple[Equation, ...]:
    """What the user's forward states of its sizes; nothing for a graph, which states its own."""
    if isinstance(model, GraphModel):
        return ()
    graph = network.captured.graph
    specs = [n.value for n in graph.nodes if n.op == "input" and isinstance(n.value, Spec)]
    for given in (example_inputs, doubled(example_inputs)):
        if [s.shape for s in specs] == [tuple(t.shape) for t in tensors(given)]:
            return equations(model, graph, given)
    return ()


class ClassError(ProofError):
    """The user's class cannot be kept with these units gone.

    Attributes:
        groups: numbers of the groups because of which it cannot, where they could be found.
    """

    groups: frozenset[int] = frozenset()


def _check_arguments(model: object, budget: object, exclude: object, accepted: Any) -> None:
    """Refuse what is of another kind than it should be."""
    for name, value, kind, remedy in (
        ("model", model, nn.Module, "Give the network itself, an instance of nn.Module"),
        ("budget", budget, accepted, "Write for example rarefy.Budget(macs=0.5)"),
        ("exclude", exclude, list | tuple | set | frozenset, "Give a list of module paths"),
    ):
        if not isinstance(value, kind):
            raise InputError(f"prune({name}=...)", f"a {type(value).__name__} was given", remedy)
    assert isinstance(exclude, list | tuple | set | frozenset)
    for path in exclude:
        if not isinstance(path, str):
            raise InputError(
                "prune(exclude=...)",
                f"it holds a {type(path).__name__}",
                "Give paths, as model.named_modules() has them",
            )


def operate(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    plan: Plan,
    sizes: Sizes | None = None,
    *,
    keep_class: bool = False,
    fault: str = "",
) -> nn.Module:
    """Carry out a plan with proof: on the user's class where that holds, else on the graph.

    With ``fault``, the reason why the class cannot be kept, only the graph is tried.

    Raises:
        ProofError: neither way equals masking.
        ClassError: the class cannot be kept though it must be.
    """
    kind, reason = "module", ""
    sizes = sizes or Sizes(network, ())
    build: Build = lambda m, p: cut(m, network, p, sizes.solve(p).values)  # noqa: E731 - two ways
    found = Comparison(inf, fault or "it is a graph already")
    masking = Masking(model, example_inputs, network, plan)
    if not isinstance(model, GraphModel) and not fault:
        found = masking.compare(build)
    error = found.error
    if found.fault:
        if keep_class:
            lost = ClassError(
                f"prune({type(model).__name__}, keep_class=True)",
                f"its forward does not work with other widths: {found.fault}",
                "Write sizes in forward as x.shape[...] or module attributes, exclude that layer, "
                "or accept a rewritten graph (keep_class=False)",
            )
            lost.groups = breaking(model, example_inputs, network, plan, build, sizes.parts)
            raise lost
        kind, reason = "graph", fault or _reason(sizes.solve(plan).broken, found.fault)
        build = lambda m, p: rewrite(m, network, p)  # noqa: E731
        error = prove(model, example_inputs, network, plan, build, masking)
    del masking  # it holds a copy of the network
    small = build(model, plan)
    small.eval()
    kept = kept_entries(network, plan)
    frozen = (
        *network.frozen,
        *_left_whole(model, network, plan),
        *_untrained(model, small, example_inputs, network, kept),
    )
    small.pruned = Pruned(  # type: ignore[assignment]
        kind, reason, _widths(model, kept), kept, frozen, error
    )
    return small


def _reason(broken: Sequence[Equation], fault: str) -> str:
    """Why the class was not kept: the line that states a size, or else what went wrong."""
    lines = dict.fromkeys(e.source for e in broken if e.source)
    if not lines:
        return fault
    more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
    return f"its forward states sizes that cannot follow: {next(iter(lines))}{more}"


def _left_whole(model: nn.Module, network: Network, plan: Plan) -> Iterator[Frozen]:
    """Groups that stay for the sake of the class, as frozen entries of their first tensors."""
    held: dict[tuple[str, int, str], set[int]] = {}
    for number, reason in plan.whole.items():
        first = network.groups[number].members[0]
        held.setdefault((first.path, first.dim, reason), set()).update(first.indices.ravel())
    shapes = {path: t.shape for path, t in [*model.named_parameters(), *model.named_buffers()]}
    for (path, dim, reason), entries in held.items():
        yield Frozen(path, dim, len(entries), shapes[path][dim], "forward", reason, "")


def _untrained(
    model: nn.Module, small: nn.Module, example_inputs: Inputs, network: Network, kept: Kept
) -> Iterator[Frozen]:
    """What training mode alone reads, where that does not run any more since it kept its size."""
    idle = resting(model, network.captured.graph.live)
    whole = [path for path in idle if not any(path == cut for cut, _ in kept)]
    if isinstance(small, GraphModel) or not whole:
        return
    fault = _fault_in_training(small, example_inputs)
    if fault and not _fault_in_training(model, example_inputs):
        sizes = idle[whole[0]].shape or (1,)
        reason = f"kept its size, since eval mode does not read it, and in training mode {fault}"
        yield Frozen(whole[0], 0, sizes[0], sizes[0], "forward", reason, "")


def _fault_in_training(model: nn.Module, example_inputs: Inputs) -> str:
    try:
        check_runs(model, example_inputs, training=True)
    except InputError as error:
        return error.what
    return ""


def check_copies(model: nn.Module) -> None:
    """Refuse a network that holds what cannot be copied, since the result is a copy.

    Raises:
        InputError: names what Python says.
    """
    kept = [*model.parameters(), *model.buffers()]  # these can, and would take memory
    try:
        copy.deepcopy(model, computed(model) | {id(tensor): tensor for tensor in kept})
    except Exception as error:
        raise InputError(
            f"prune({type(model).__name__})",
            f"it cannot be copied: {first_line(error)}",
            "Keep open files, locks, generators and computed tensors out of the attributes of "
            "modules, or define __deepcopy__",
        ) from error


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, or that hold no values at all, and NaN in buffers.

    Infinities in buffers are let through: attention masks hold them.

    Raises:
        InputError: names the first such parameter or buffer.
    """
    for path, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and bool(buffer.isnan().any()):
            raise InputError(
                f"buffer {path}", "it holds NaN", "Load a checkpoint from before training diverged"
            )
    for path, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise InputError(
                f"parameter {path}",
                "it holds no values",
                "Load a checkpoint into the model, or run it once, before pruning",
            )
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"parameter {path}",
                "it holds NaN or infinite values",
                "Load a checkpoint from before training diverged",
            )


def _widths(
    model: nn.Module, kept: Mapping[tuple[str, int], NDArray[np.int64]]
) -> tuple[Width, ...]:
    """Output width of every layer with a kernel, before and after."""
    found = []
    for path, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        owner = path.rpartition(".")[0]
        transposed = isinstance(model.get_submodule(owner), nn.modules.conv._ConvTransposeNd)
        dim = 1 if transposed else 0
        after = len(kept.get((path, dim), range(parameter.shape[dim])))
        found.append(Width(owner or path, parameter.shape[dim], after))
    return tuple(found)
