"""``prune`` under every kind of budget: what is counted goes straight to the pruning; bytes and
latency are reached by pruning, measuring what would be shipped, and correcting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

from torch import nn

from rarefy.batches import batch_size
from rarefy.deployment.cache import Cache
from rarefy.deployment.export import export
from rarefy.deployment.measure import check_runtime, measure, relative
from rarefy.deployment.runtimes import WIDTHS
from rarefy.deployment.timing import layer_costs
from rarefy.errors import BudgetError
from rarefy.graph.trace import Network
from rarefy.pruning import prune as pruning
from rarefy.pruning.prune import PruneOptions, removes
from rarefy.pruning.selection.costs import Costs
from rarefy.storage.format import save
from rarefy.types import Budget, Inputs, Measurement

CLOSE = 0.02
"""How far from its budget a measured share may end."""

ROUNDS = 5
"""How often a budget that has to be measured is corrected, at most."""

SECONDS = 20.0
"""Wall time of each comparison, at most."""

DEFAULT_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Served:
    """How the smaller network runs where it is served, beside the original.

    Attributes:
        before: the original, exported.
        after: the smaller network, exported; the two were called in turn.
        share: latency that is left, as a share of the original's
            (:func:`~rarefy.deployment.measure.relative`).
        faster: whether it is faster at all.
    """

    before: Measurement
    after: Measurement
    share: float
    faster: bool


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None = None,
    *,
    runtime: str | None = None,
    threads: int = 1,
    **options: Unpack[PruneOptions],
) -> nn.Module:
    """Remove the least important units of a network, with proof.

    The result is compared with the original whose removed units are zeroed at every coupled slice
    (:mod:`rarefy.pruning.structure.proof`) before it is returned. The model itself is untouched.

    A budget of ``bytes`` is reached by saving what was pruned, one of ``latency`` by exporting and
    timing it beside the original on ``example_inputs``, each with corrections. Units are then
    chosen by their importance per millisecond, from latencies of single layers that are measured
    once and kept in the user's cache folder (``$RAREFY_CACHE``), and widths are multiples of what
    the runtime computes fast, unless the budget says otherwise.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        budget: how much may remain, e.g. ``Budget(macs=0.5)``; ``Budget(sparsity=0.9)`` for all
            structures that set weights to zero, and nothing for N:M, which fixes the share.
        runtime: where the result is timed beside the original, whatever the budget; its attribute
            ``served`` then is a :class:`Served` record, and a result that is not faster is warned
            of. ``"onnxruntime"`` where the budget is latency.
        threads: intra-op threads of the runtime.
        criterion: how important a unit is; None for ``"fisher"`` on unlabelled data where data are
            given (``"sparsegpt"`` where single weights go), else ``"magnitude"``. By the weights
            alone: ``"magnitude"``, ``"l1"``, ``"random"``, ``"norm_scale"``, ``"lamp"``,
            ``"fpgm"``. On data: ``"gradient"``, ``"taylor"``, ``"taylor2"``, ``"fisher"``,
            ``"obd"``, ``"obs"``, ``"reconstruction"``, ``"wanda"``, ``"activation"``. Or one of the
            frozen values of ``rarefy.criteria`` with other options, or a function
            (:data:`~rarefy.pruning.scoring.criteria.Criterion`). ``"compensated"`` measures on
            data how much each group may lose
            (:class:`~rarefy.pruning.scoring.compensated.Compensated`).
            Of single weights: ``"magnitude"``, ``"square"``, ``"random"``, ``"lamp"``; on data
            ``"gradient"``, ``"taylor"``, ``"taylor2"``, ``"obd"``, ``"obs"``, ``"wanda"``,
            ``"sparsegpt"``; or a function weight -> scores
            (:data:`~rarefy.pruning.sparsity.elements.ElementCriterion`).
        structure: ``"channel"`` removes channels, heads and hidden units; ``"depth"`` removes whole
            residual blocks (:attr:`~rarefy.graph.trace.Network.blocks`), ``Budget(blocks=2)`` of
            them or what a share takes; with ``("channel", "depth")`` both compete for one budget of
            macs, params or bytes, by importance per saved cost. All others set weights to zero,
            which makes files smaller, and faster what a runtime has kernels for: ``"weight"``
            single ones, ``"2:4"`` two of every four, ``"1x4"`` blocks of them; or a value such as
            ``Block(8, 8)`` (:mod:`rarefy.pruning.sparsity.patterns`,
            :func:`~rarefy.pruning.sparsity.sparsify.sparsify`).
        data: batches with which units are scored where the criterion asks for it
            (labelled where it needs gradients), and with which the smaller network is repaired by
            least squares, its BatchNorm statistics moved along
            (:func:`~rarefy.pruning.repair.repair`); they also tell how much each block does
            (:mod:`~rarefy.pruning.scoring.influence`). Or with which weights are chosen.
        samples: how many of the first examples of ``data`` are used; None for all.
        loss: (logits, targets) -> mean loss of a batch, for criteria that need gradients; cross
            entropy if not given.
        heal: whether the smaller network is repaired where data are given.
        exclude: paths of modules or parameters, or patterns with ``*?[]``, whose own outputs keep
            their width; blocks that hold any of them stay.
        keep_class: never return a rewritten graph: units that the forward holds in place with
            numbers of its own stay, and are named in ``pruned.frozen``; blocks in ``pruned.held``.
        sensitivity: what the removal of each group's units costs (:func:`rarefy.sensitivity`).

    Returns:
        A new network in eval mode. Where units or blocks were removed, its attribute
        ``pruned`` is a :class:`~rarefy.pruning.narrow.Pruned` record.

    Raises:
        InputError: weights are not finite, nothing can be pruned, a name matches nothing.
        BudgetError: the budget cannot be reached; the message says what can.
        CaptureError: the network cannot be captured.
        ProofError: the smaller network differs from masking; nothing is returned.
        ExportError: the network has to be timed and cannot be exported.
        MissingExtraError: it has to be timed and the runtime is not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune(net, torch.randn(2, 4), Budget(sparsity=0.5))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    if not isinstance(budget, Budget) or not removes(options.get("structure", "channel")):
        return pruning.prune(model, example_inputs, budget, **options)
    if runtime is not None or budget.latency is not None:
        check_runtime(runtime or DEFAULT_RUNTIME)
    budget = _with_widths(budget, runtime or DEFAULT_RUNTIME)
    if budget.kind not in ("bytes", "latency"):
        small = pruning.prune(model, example_inputs, budget, **options)
    else:
        with _workplace(model, example_inputs, runtime or DEFAULT_RUNTIME, threads) as place:
            make = _maker(model, example_inputs, budget, place, options)
            small = reach(budget, make)
    if runtime is not None and budget.latency is None:
        with _workplace(model, example_inputs, runtime, threads) as place:
            place.note(small)
    _warn_where_slower(small)
    return small


def _warn_where_slower(small: nn.Module) -> None:
    served = getattr(small, "served", None)
    if isinstance(served, Served) and not served.faster:
        before, after = served.before.latency_ms.median, served.after.latency_ms.median
        warnings.warn(
            f"the smaller network is not faster in {served.after.runtime}: {after:.3g} ms a call, "
            f"the original {before:.3g} ms",
            RuntimeWarning,
            stacklevel=3,
        )


def _with_widths(budget: Budget, runtime: str) -> Budget:
    """The budget with a multiple for its widths: the runtime's where it is to decide."""
    unset = budget.latency is not None and budget.round_to == 1
    return (
        replace(budget, round_to=WIDTHS[runtime]) if unset or budget.round_to == "auto" else budget
    )


Make = Callable[[float], tuple[nn.Module, float]]
"""A share to ask for -> a network, and the share that was measured on it."""


def reach(budget: Budget, make: Make) -> nn.Module:
    """The largest network whose measured share is within its budget, or close above it.

    The share asked for is corrected by what was measured, between the shares that were too large
    and those that were too small.

    Raises:
        BudgetError: none is; the message says what was measured.
    """
    wanted, slack = budget.share, NOISE[budget.kind]
    asked, low, high = wanted, 0.0, 1.0
    tried: list[tuple[float, nn.Module]] = []
    refusal: BudgetError | None = None
    for _ in range(ROUNDS):
        found: float | None = None
        try:
            small, found = make(asked)
        except BudgetError as error:
            refusal = error
        else:
            tried.append((found, small))
            if wanted - CLOSE <= found <= wanted + slack:
                break
        if found is None or found < wanted:
            low = asked
        else:
            high = asked
        if high - low < LEAST_STEP:
            break
        asked = _corrected(asked, wanted, found, low, high)
    fitting = [pair for pair in tried if pair[0] <= wanted + slack]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]
    raise _missed(budget, [measured for measured, _ in tried], refusal)


NOISE = {"bytes": 0.0, "latency": CLOSE}
"""How far above its budget a measured share may end."""

LEAST_STEP = 1e-3
"""Difference of shares below which no correction is tried."""


def _corrected(
    asked: float, wanted: float, measured: float | None, low: float, high: float
) -> float:
    """What to ask for next: in proportion, or the middle where that was tried."""
    found = (low + high) / 2
    if measured is not None and measured < 1:
        found = 1 - (1 - asked) * (1 - wanted) / (1 - measured)
    margin = (high - low) / 10
    return min(max(found, low + margin), high - margin)


def _missed(budget: Budget, measured: list[float], refusal: BudgetError | None) -> BudgetError:
    where = f"prune(budget=Budget({budget.kind}={budget.share:g}))"
    least = f"the smallest share that was measured is {min(measured):.3f}" if measured else ""
    reason = f"{refusal.where}: {refusal.what}" if refusal is not None else ""
    slower = budget.kind == "latency" and measured and min(measured) >= 1
    return BudgetError(
        where,
        "; ".join(filter(None, (least, "no smaller network is faster" if slower else "", reason))),
        "Ask for a larger share, or relax min_keep, max_drop, round_to, layers and exclude",
    )


def _maker(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    place: _Workplace,
    options: PruneOptions,
) -> Make:
    """How networks are made and measured under a budget of bytes or latency."""
    if budget.bytes is not None:
        whole = place.saved(model)

        def by_bytes(share: float) -> tuple[nn.Module, float]:
            counted = replace(budget, bytes=None, params=share)
            small = pruning.prune(model, example_inputs, counted, **options)
            return small, place.saved(small) / whole

        return by_bytes

    def by_latency(share: float) -> tuple[nn.Module, float]:
        asked = replace(budget, latency=share)
        small = pruning.prune(model, example_inputs, asked, costs=place.costs, **options)
        return small, place.note(small).share

    return by_latency


class _Workplace:
    """A folder with the original's files, and what was measured on them."""

    def __init__(
        self, folder: Path, model: nn.Module, example_inputs: Inputs, runtime: str, threads: int
    ) -> None:
        self.folder, self.model, self.inputs = folder, model, example_inputs
        self.runtime, self.threads = runtime, threads
        self._before: Path | None = None
        self._costs: Costs | None = None

    def saved(self, model: nn.Module) -> int:
        """Bytes of the network's file."""
        return save(model, self.folder / "saved.safetensors").stat().st_size

    def note(self, small: nn.Module) -> Served:
        """Time a smaller network beside the original; it carries the record from then on."""
        after = export(small, self.folder / "after.onnx", self.inputs)
        measured = relative(
            self._original(),
            after,
            self.inputs,
            runtime=self.runtime,
            threads=self.threads,
            max_seconds=SECONDS,
        )
        found = Served(*measured, faster=measured[-1] < 1)
        small.served = found  # type: ignore[assignment]
        return found

    def costs(self, network: Network) -> Costs:
        """Latencies of the layers, timed once."""
        if self._costs is None:
            whole = measure(
                self._original(), self.inputs, runtime=self.runtime, threads=self.threads
            )
            self._costs = layer_costs(
                network,
                whole.latency_ms.p10,
                runtime=self.runtime,
                threads=self.threads,
                batch=batch_size(self.inputs),
                step=WIDTHS[self.runtime],
                cache=Cache.of(whole.runtime, self.threads),
            )
        return self._costs

    def _original(self) -> Path:
        if self._before is None:
            self._before = export(self.model, self.folder / "before.onnx", self.inputs)
        return self._before


@contextmanager
def _workplace(
    model: nn.Module, example_inputs: Inputs, runtime: str, threads: int
) -> Iterator[_Workplace]:
    with TemporaryDirectory(prefix="rarefy-") as folder:
        yield _Workplace(Path(folder), model, example_inputs, runtime, threads)
