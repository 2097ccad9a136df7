"""Units that a budget takes, removed with proof: on the user's class where that holds, else on the
graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rarefy.batches import doubled, tensors
from rarefy.errors import BudgetError, InputError, shortened
from rarefy.graph.capture import check_runs
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Spec
from rarefy.graph.resting import resting
from rarefy.graph.trace import Frozen, Network
from rarefy.paths import unwrapped
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.scoring.compensated import Response
from rarefy.pruning.selection.costs import Costs
from rarefy.pruning.selection.landing import is_close
from rarefy.pruning.selection.select import select
from rarefy.pruning.sparsity.sparsify import Sparsified
from rarefy.pruning.structure.expressions import Equation
from rarefy.pruning.structure.proof import Build, ClassError, Comparison, Masking, breaking, prove
from rarefy.pruning.structure.provenance import equations
from rarefy.pruning.structure.sizes import Sizes
from rarefy.pruning.structure.surgery import Kept, cut, kept_entries, rewrite
from rarefy.types import Budget, Inputs, Width


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
        left: the share that remains of what the budget is about; None where that is a number of
            units or of blocks.
        missed: how far the budget was missed, and what leaps over it or holds it, or empty.
        earlier: the record of what was pruned, where that had been pruned itself.
    """

    kind: str
    reason: str
    widths: tuple[Width, ...]
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    frozen: tuple[Frozen, ...]
    error: float
    blocks: tuple[str, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)
    left: float | None = None
    missed: str = ""
    earlier: Pruned | None = None

    def kept_of(self, original: nn.Module) -> Mapping[tuple[str, int], NDArray[np.int64]] | None:
        """(path, dimension) -> entries that stay of what was pruned, or pruned before that.

        Args:
            original: any of these networks, or the pruned one itself before it was quantized; the
                first whose widths are those that a record tells of, from the last pruning on.

        Returns:
            None where no record tells of it.
        """
        shapes = {path: tensor.shape for path, tensor in original.state_dict().items()}
        held = [
            shapes[path][dim] == len(entries)
            for (path, dim), entries in self.kept.items()
            if path in shapes
        ]
        if held and all(held):
            return {}
        record, kept, own = self, self.kept, _before(widths(original, {}))
        while not _agree(own, _before(record.widths)):
            if record.earlier is None:
                return None
            record = record.earlier
            kept = {
                **record.kept,
                **{at: record.kept[at][i] if at in record.kept else i for at, i in kept.items()},
            }
        return kept


def narrow(
    model: nn.Module,
    example_inputs: Inputs,
    network: Network,
    budget: Budget,
    judged: Response,
    *,
    costs: Costs | None = None,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
) -> nn.Module:
    """The network without the units that a budget takes, proven.

    Args:
        model: the network, which is left as it is.
        example_inputs: what it was traced with.
        network: its trace.
        budget: how much may remain.
        judged: importance of all units.
        costs: latencies of the layers, for a budget of latency.
        exclude: paths or patterns whose own outputs keep their width.
        keep_class: never return a rewritten graph.

    Raises:
        InputError, BudgetError: see :func:`~rarefy.pruning.selection.select.select`.
        ProofError: the smaller network differs from masking.
    """
    scores, closed = judged.scores, dict(judged.unmeasured)
    sizes = Sizes(network, stated(model, network, example_inputs))
    options: dict[str, Any] = {"losses": judged.losses, "costs": costs}
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
    options: Mapping[str, Any],
) -> Plan:
    """A plan that the user's forward can carry out; where that takes less, one for the graph.

    Where every group is to lose the same share, those that the forward holds are named instead.

    Raises:
        ClassError: the class has to be kept, and nothing can go then.
        BudgetError, InputError: see :func:`~rarefy.pruning.selection.select.select`.
    """
    held: dict[str, Any] = {**options, "closed": closed, "keep_class": keep_class}
    try:
        plan = select(network, model, scores, budget, exclude, sizes, **held)
    except BudgetError:
        if keep_class:
            raise
        return select(network, model, scores, budget, exclude, **options)
    shared = budget.scope == "local" and all(limit.sparsity is None for _, limit in budget.limits)
    if not plan.whole or (plan.removed.any() and (keep_class or shared or not plan.missed)):
        return plan
    if keep_class:
        raise ClassError(
            f"prune({type(model).__name__}, keep_class=True)",
            f"its forward holds all units in place: {next(iter(plan.whole.values()))}",
            "Write sizes in forward as x.shape[...] or module attributes, or accept a rewritten "
            "graph (keep_class=False)",
        )
    free = select(network, model, scores, budget, exclude, **options)
    return plan if plan.removed.any() and free.missed else free


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
    carry(model, small)
    small.pruned = Pruned(  # type: ignore[assignment]
        kind,
        reason,
        widths(model, kept),
        kept,
        frozen,
        error,
        left=plan.left,
        missed=plan.missed,
        earlier=getattr(model, "pruned", None),
    )
    return small


def carry(model: nn.Module, small: nn.Module) -> None:
    """Hand on which weights of a network are zero, to what is left of it."""
    record = getattr(model, "sparsified", getattr(unwrapped(model), "sparsified", None))
    if isinstance(record, Sparsified):
        for holder in (unwrapped(small), small):
            holder.sparsified = record.of(holder)  # type: ignore[assignment]


def noted(small: nn.Module, budget: Budget, left: float | None = None) -> nn.Module:
    """Note on the record what remains of what a budget is about, and whether that is far below.

    Args:
        small: the network.
        budget: what was asked for.
        left: the share that was measured; what the record counts where nothing was.
    """
    record: Any = small.pruned
    missed, left = record.missed, record.left if left is None else left
    if left is not None and budget.kind in SHARES and not is_close(left, budget.share):
        reasons = ["units and blocks that go in one piece"]
        if budget.round_to != 1:
            reasons.insert(0, f"rounding widths to multiples of {budget.round_to}")
        if any(limit.sparsity is not None for _, limit in budget.limits):
            reasons.insert(0, "what layers= takes whatever the budget")
        far = (
            f"{budget.kind}={budget.share:g} was asked for and {left:.3f} remain, the most that "
            f"was found with {', and '.join(reasons)}"
        )
        missed = "; ".join(filter(None, (far, missed)))
    small.pruned = replace(record, left=left, missed=missed)
    return small


SHARES = ("macs", "params", "bytes", "latency")
"""Kinds of budgets that say which share of a cost may remain."""


def _reason(broken: Sequence[Equation], fault: str) -> str:
    """Why the class was not kept: the line that states a size, or else what went wrong."""
    lines = [*dict.fromkeys(e.source for e in broken if e.source)]
    if not lines:
        return fault
    return f"its forward states sizes that cannot follow: {shortened(lines, 1)}"


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


def _before(found: Iterable[Width]) -> dict[str, tuple[int, ...]]:
    """Layer -> the widths before pruning of all kernels that it holds."""
    sizes: dict[str, tuple[int, ...]] = {}
    for width in found:
        sizes[width.layer] = (*sizes.get(width.layer, ()), width.before)
    return sizes


def _agree(first: Mapping[str, tuple[int, ...]], second: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the layers that both tell of are as wide."""
    return all(first[layer] == second[layer] for layer in first.keys() & second.keys())


def widths(
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
