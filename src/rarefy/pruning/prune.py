"""``prune``: trace, score, select, cut, prove, and repair where data are given."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.batches import doubled, tensors
from rarefy.copies import computed, copied
from rarefy.errors import BudgetError, InputError, first_line
from rarefy.graph.capture import check_runs
from rarefy.graph.program import GraphModel, Spec
from rarefy.graph.trace import Frozen, Network, trace
from rarefy.pruning.criteria import Criterion, named, scored
from rarefy.pruning.expressions import Equation
from rarefy.pruning.masks import sparsify
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.proof import Build, ClassError, Comparison, Masking, breaking, prove
from rarefy.pruning.provenance import equations
from rarefy.pruning.repair import repair
from rarefy.pruning.select import Accountant, select
from rarefy.pruning.shorten import Shortened, shorten
from rarefy.pruning.sizes import Sizes
from rarefy.pruning.surgery import cut, kept_entries, rewrite
from rarefy.types import Budget, Data, Inputs, Width


@dataclass(frozen=True)
class Pruned:
    """What a pruning did; the attribute ``pruned`` of its result.

    Attributes:
        kind: ``"module"`` where the user's class was kept, ``"graph"`` where its forward works
            with sizes that cannot be changed and the captured graph was rewritten instead.
        reason: why the class was not kept, or empty.
        widths: width of every layer, before and after; 0 after where the layer is gone.
        kept: (path, dimension) -> entries of the original that stay.
        frozen: what could not be pruned, and why.
        error: largest difference from masking, relative to the outputs' sensitivity.
        blocks: residual blocks that were removed, by name.
        held: blocks that stay since the class does not work without them, each with the reason.
    """

    kind: str
    reason: str
    widths: tuple[Width, ...]
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    frozen: tuple[Frozen, ...]
    error: float
    blocks: tuple[str, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    *,
    criterion: str | Criterion = "magnitude",
    structure: str | Sequence[str] = "channel",
    data: Data | None = None,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
) -> nn.Module:
    """Remove the least important units of a network, with proof.

    The result is compared with the original whose removed units are zeroed at every coupled slice
    (see :mod:`rarefy.pruning.proof`) before it is returned. The model itself is untouched.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        budget: how much may remain, e.g. ``Budget(macs=0.5)``.
        criterion: ``"magnitude"``, ``"l1"``, ``"random"``, or a function
            (:data:`~rarefy.pruning.criteria.Criterion`).
        structure: ``"channel"`` removes channels, heads and hidden units; ``"depth"`` removes whole
            residual blocks (:attr:`~rarefy.graph.trace.Network.blocks`), ``Budget(blocks=2)`` of
            them or what a share takes; with ``("channel", "depth")`` both compete for one budget,
            by importance per saved cost. ``"weight"`` sets single weights to zero, which makes
            files smaller but nothing faster.
        data: batches (labels are not needed) with which the smaller network is repaired by least
            squares, its BatchNorm statistics moved along (:func:`~rarefy.pruning.repair.repair`);
            they also tell how much each block does (:mod:`~rarefy.pruning.influence`).
        exclude: paths of modules or parameters whose own outputs keep their width; blocks that
            hold any of them stay.
        keep_class: never return a rewritten graph: units that the forward holds in place with
            numbers of its own stay, and are named in ``pruned.frozen``; blocks in ``pruned.held``.

    Returns:
        A new network in eval mode. Where units were removed, its attribute ``pruned`` is a
        :class:`Pruned` record.

    Raises:
        InputError: weights are not finite, nothing can be pruned, a name matches nothing.
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
    _check_arguments(model, budget, exclude)
    kinds = _structures(structure, budget)
    check_finite(model)
    check_copies(model)
    if kinds == {"weight"}:
        if data is not None or criterion != "magnitude":
            raise InputError(
                "prune(structure='weight')",
                "single weights are removed by magnitude, without data",
                "Leave criterion and data out, and train on with after_step=hold(pruned)",
            )
        return sparsify(model, budget, exclude=exclude)
    network = trace(model, example_inputs)
    check_runs(model, example_inputs)
    score = named(criterion)
    if kinds == {"channel"}:
        small = _narrowed(
            model, example_inputs, network, budget, score, exclude=exclude, keep_class=keep_class
        )
        return small if data is None else repair(model, small, data)
    short = shorten(
        model,
        example_inputs,
        network,
        _scores(model, network, score),
        budget,
        width="channel" in kinds,
        data=data,
        exclude=exclude,
        keep_class=keep_class,
    )
    small = short.model
    if "channel" in kinds:
        small = _narrowed_further(
            model, short, example_inputs, network, budget, score, exclude, keep_class
        )
    small = _recorded(model, network, short, small)
    return small if data is None else repair(model, small, data)


STRUCTURES = ("channel", "weight", "depth")
"""What can be removed: units, single weights, residual blocks."""


def _structures(structure: str | Sequence[str], budget: Budget) -> frozenset[str]:
    """What is to be removed.

    Raises:
        InputError: that is unknown, or single weights and something else.
        BudgetError: the budget does not fit it.
    """
    several = isinstance(structure, tuple | list | set | frozenset)
    kinds: set[Any] = set(structure) if several else {structure}
    if not kinds or not kinds <= set(STRUCTURES) or ("weight" in kinds and len(kinds) > 1):
        raise InputError(
            f"prune(structure={structure!r})",
            "unknown structure",
            "Use 'channel' (units really removed), 'depth' (whole residual blocks), both as "
            "('channel', 'depth'), or 'weight' (single weights set to zero)",
        )
    if budget.blocks is not None and kinds != {"depth"}:
        raise BudgetError(
            f"prune(structure={structure!r}, budget=Budget(blocks={budget.blocks}))",
            "a number of blocks can be removed only where nothing else is",
            "Use structure='depth', or give the share of macs or params that may remain",
        )
    shares = ("macs", "params") if len(kinds) > 1 else ("macs", "params", "sparsity", "blocks")
    fits = any(getattr(budget, name) is not None for name in shares)
    if "depth" in kinds and (not fits or (len(kinds) > 1 and budget.scope != "global")):
        raise BudgetError(
            f"prune(structure={structure!r})",
            "blocks go by what they save, together with units over the whole network",
            f"Give a budget of {' or '.join(shares)} with scope='global'",
        )
    return frozenset(kinds)


def _scores(model: nn.Module, network: Network, criterion: Criterion) -> Scores:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [scored(group, parameters, criterion) for group in network.groups]


def _narrowed_further(
    model: nn.Module,
    short: Shortened,
    example_inputs: Inputs,
    network: Network,
    budget: Budget,
    criterion: Criterion,
    exclude: Sequence[str],
    keep_class: bool,
) -> nn.Module:
    """The network without some blocks, narrower by what is left of the budget.

    Raises:
        BudgetError: units do not reach it; the message says what is reachable.
    """
    options: dict[str, Any] = {"exclude": exclude, "keep_class": keep_class}
    small = short.model
    if not short.blocks:
        return _narrowed(small, example_inputs, network, budget, criterion, **options)
    if next(small.parameters(), None) is None:
        return small
    rest = trace(small, example_inputs)
    name = "macs" if budget.macs is not None else "params"
    before, after = Accountant(network, model), Accountant(rest, small)
    share = getattr(after, f"{name}_before") / max(getattr(before, f"{name}_before"), 1)
    wanted = getattr(budget, name)
    if wanted >= share:
        return small
    options["exclude"] = [path for path in exclude if path in _paths(small)]
    left = replace(budget, **{name: wanted / share})
    try:
        return _narrowed(small, example_inputs, rest, left, criterion, **options)
    except BudgetError as error:
        raise BudgetError(
            f"prune(budget=Budget({name}={wanted:g}))",
            f"without {len(short.blocks)} blocks {share:.3f} remain, and of these {error.what}",
            f"Ask for more {name}, or relax min_keep, max_drop, round_to and exclude",
        ) from error


def _paths(model: nn.Module) -> set[str]:
    """Paths of all modules and parameters."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {path for path, _ in [*model.named_modules(), *parameters]}


def _recorded(model: nn.Module, network: Network, short: Shortened, small: nn.Module) -> nn.Module:
    """The result with the record of what went from ``model``, blocks and units."""
    held: Any = small.pruned if small is not short.model else None
    small = copied(model).eval() if small is model else small  # nothing went
    kept = held.kept if held else {}
    kind = "graph" if isinstance(small, GraphModel) else "module"
    small.pruned = Pruned(  # type: ignore[assignment]
        kind=kind,
        reason=short.reason or (held.reason if held else ""),
        widths=_widths(model, kept, _paths(small)),
        kept=kept,
        frozen=held.frozen if held else network.frozen,
        error=max(short.error, held.error if held else 0.0),
        blocks=tuple(block.name for block in short.blocks),
        held=short.held,
    )
    return small


def _narrowed(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    budget: Budget,
    criterion: Criterion,
    *,
    exclude: Sequence[str],
    keep_class: bool,
) -> nn.Module:
    """The network without the units that a budget takes, proven."""
    scores = _scores(model, network, criterion)
    sizes = Sizes(network, stated(model, network, example_inputs))
    closed: dict[int, str] = {}
    while True:
        plan = _plan(network, model, scores, budget, exclude, sizes, closed, keep_class)
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
        plan = select(network, model, scores, budget, exclude)
        small = operate(model, example_inputs, network, plan, sizes, fault=record.reason)
    return small


def _plan(
    network: Network,
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    exclude: Sequence[str],
    sizes: Sizes,
    closed: Mapping[int, str],
    keep_class: bool,
) -> Plan:
    """A plan that the user's forward can carry out; where none does it, one for the graph.

    Raises:
        ClassError: the class has to be kept, and nothing can go then.
        BudgetError, InputError: see :func:`~rarefy.pruning.select.select`.
    """
    options: dict[str, Any] = {"closed": closed, "keep_class": keep_class}
    try:
        plan = select(network, model, scores, budget, exclude, sizes, **options)
    except BudgetError:
        if keep_class:
            raise
        return select(network, model, scores, budget, exclude)
    if plan.removed.any() or not plan.whole:
        return plan
    if keep_class:
        raise ClassError(
            f"prune({type(model).__name__}, keep_class=True)",
            f"its forward holds all units in place: {next(iter(plan.whole.values()))}",
            "Write sizes in forward as x.shape[...] or module attributes, or accept a rewritten "
            "graph (keep_class=False)",
        )
    return select(network, model, scores, budget, exclude)


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


def _check_arguments(model: object, budget: object, exclude: object) -> None:
    """Refuse what is of another kind than it should be."""
    for name, value, kind, remedy in (
        ("model", model, nn.Module, "Give the network itself, an instance of nn.Module"),
        ("budget", budget, Budget, "Write for example rarefy.Budget(macs=0.5)"),
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
    frozen = (*network.frozen, *_left_whole(model, network, plan))
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
    model: nn.Module,
    kept: Mapping[tuple[str, int], NDArray[np.int64]],
    left: Collection[str] | None = None,
) -> tuple[Width, ...]:
    """Output width of every layer with a kernel, before and after; of those left, where given."""
    found = []
    for path, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        owner = path.rpartition(".")[0]
        transposed = isinstance(model.get_submodule(owner), nn.modules.conv._ConvTransposeNd)
        dim = 1 if transposed else 0
        after = len(kept.get((path, dim), range(parameter.shape[dim])))
        after = after if left is None or path in left else 0
        found.append(Width(owner or path, parameter.shape[dim], after))
    return tuple(found)
