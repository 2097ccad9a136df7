"""``prune`` under every kind of budget: what is counted goes straight to the pruning; bytes and
latency are reached by pruning, measuring what would be shipped, and correcting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self, Unpack

from torch import nn

from rarefy.batches import batch_size, forked
from rarefy.deployment.cache import Cache
from rarefy.deployment.export import export
from rarefy.deployment.measure import compare, relative
from rarefy.deployment.opening import Served as Form
from rarefy.deployment.ratios import FINE
from rarefy.deployment.runtimes import RUNTIMES, runtime_named
from rarefy.deployment.timing import layer_costs
from rarefy.errors import BudgetError, InputError, OutputError, first_line, warn
from rarefy.graph.trace import Network
from rarefy.pruning.narrow import Pruned, noted
from rarefy.pruning.prune import PruneOptions, request
from rarefy.pruning.request import Request, removes
from rarefy.pruning.selection.costs import Costs
from rarefy.pruning.selection.landing import CLOSE
from rarefy.storage.format import save
from rarefy.types import Budget, Inputs, Measurement, Ratio

ROUNDS = 6
"""How many networks are made and measured for a budget, at most; and how many shares that their
layers' costs rule out are asked for, which takes little."""

SECONDS = 20.0
"""Wall time of each comparison, at most."""

DEFAULT_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Served:
    """How the smaller network runs where it is served, beside the original.

    Attributes:
        before: the original, in the form that the runtime serves.
        after: the smaller network; the two were called in turn.
        share: latency that is left, as a share of the original's
            (:func:`~rarefy.deployment.measure.relative`).
        faster: whether it is faster beyond the noise.
        noise: half the width of the share's 95 % interval.
        tried: all shares that were measured on the way to a budget of latency.
    """

    before: Measurement
    after: Measurement
    share: float
    faster: bool
    noise: float = 0.0
    tried: tuple[Ratio, ...] = ()


@forked()
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

    Where the nearest choice that was found is more than 2 % below a budget of macs, params or
    bytes, or where limits keep more than 2 % of the units that a sparsity takes, a warning and
    ``pruned.missed`` say so.

    A budget of ``bytes`` is reached by saving what was pruned, one of ``latency`` by timing it
    in the runtime, beside the original, on ``example_inputs``, each with corrections. Units and
    blocks are then chosen by their importance per millisecond, from latencies of single layers that
    are measured once and kept in the user's cache folder (``$RAREFY_CACHE``), and widths are
    multiples of what the runtime computes fast, unless the budget says otherwise. Shares of the
    latency are of calls one right after the other, with one thread of the processor's time that
    they take, which other programs do not lengthen; sessions are opened anew until the share's 95 %
    interval is narrow or the time is up.

    Args:
        model: a trained network.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        budget: how much may remain, e.g. ``Budget(macs=0.5)``; ``Budget(sparsity=0.9)`` for all
            structures that set weights to zero, and nothing for N:M, which fixes the share.
        runtime: where the result is timed beside the original, whatever the budget; its attribute
            ``served`` then is a :class:`Served` record, and a result that is not faster is warned
            of. ``"onnxruntime"`` (that where the budget is latency and nothing is given),
            ``"openvino"``, ``"eager"`` (PyTorch) or ``"compile"`` (``torch.compile``).
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
            macs, params, bytes or latency, by importance per saved cost. All others set weights to
            zero, which makes files smaller, and faster what a runtime has kernels for: ``"weight"``
            single ones, ``"2:4"`` two of every four, ``"1x4"`` blocks of them; or a value such as
            ``Block(8, 8)`` (:mod:`rarefy.pruning.sparsity.patterns`,
            :func:`~rarefy.pruning.sparsity.sparsify.sparsify`).
        data: batches with which units are scored where the criterion asks for it
            (labelled where it needs gradients), and with which the smaller network is repaired by
            least squares, its BatchNorm statistics moved along
            (:func:`~rarefy.pruning.repair.repair`); they also tell how much each block does
            (:mod:`~rarefy.pruning.scoring.influence`). Or with which weights are chosen.
        samples: how many of the first examples of ``data`` are used, at most: repair, SparseGPT,
            ``"compensated"`` and the worth of blocks take no more than 512; None for all.
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
    if runtime is not None or (isinstance(budget, Budget) and budget.latency is not None):
        runtime_named(runtime or DEFAULT_RUNTIME)
    if runtime is not None and example_inputs is None:
        raise InputError(
            f"prune(runtime={runtime!r})",
            "it times the network on the example inputs, and none were given",
            "Give example_inputs, or leave runtime out",
        )
    if isinstance(budget, Budget) and "channel" in removes(options.get("structure", "channel")):
        budget = _with_widths(budget, runtime or DEFAULT_RUNTIME)
    for name in options.keys() - PruneOptions.__annotations__.keys():
        raise TypeError(f"prune() got an unexpected keyword argument {name!r}")
    asked = request(model, example_inputs, budget, **options)
    kind = budget.kind if isinstance(budget, Budget) else None
    with _Workplace(asked.model, example_inputs, runtime or DEFAULT_RUNTIME, threads) as place:
        if isinstance(budget, Budget) and asked.removed and kind in ("bytes", "latency"):
            small = reach(budget, _maker(asked, budget, place), asked.structure)
            if kind == "latency":  # files are measured with the values that repair gives
                small = asked.finished(small)
        else:
            small = asked.done(budget)
        if runtime is not None and kind != "latency":
            place.note(small)
    if isinstance(budget, Budget) and asked.removed:
        _warn_where_far(small, budget)
    if runtime is not None or kind == "latency":
        _warn_where_slower(small)
    return small


def _warn_where_far(small: nn.Module, budget: Budget) -> None:
    """Warn of a count far below its budget; a latency is known with its noise, in ``served``."""
    record = small.pruned
    assert isinstance(record, Pruned)
    if record.missed and budget.latency is None:
        warn(record.missed)


def _warn_where_slower(small: nn.Module) -> None:
    served = small.served
    assert isinstance(served, Served)
    if not served.faster:
        before, after = served.before.latency_ms.median, served.after.latency_ms.median
        warn(
            f"the smaller network is not faster in {served.after.runtime}: {after:.3g} ms a call, "
            f"the original {before:.3g} ms; its share of {served.share:.3f} is known to "
            f"{served.noise:.3f}"
        )


def _with_widths(budget: Budget, runtime: str) -> Budget:
    """The budget with a multiple for its widths: the runtime's where it is to decide."""
    unset = budget.latency is not None and budget.round_to == 1
    if not unset and budget.round_to != "auto":
        return budget
    return replace(budget, round_to=runtime_named(runtime).widths["float32"])


Make = Callable[[float], tuple[nn.Module, Ratio]]
"""A share to ask for -> a network, and the share that was measured on it."""


@dataclass(frozen=True)
class _Tried:
    """A share that was asked for, and what came of it."""

    asked: float
    found: Ratio
    model: nn.Module


def reach(budget: Budget, make: Make, structure: object = "channel") -> nn.Module:
    """The largest network whose measured share is within its budget, or close above it.

    Where there is none, the error names what else ``structure`` could take.

    The share asked for is corrected by what was measured. A share that is not known well enough to
    tell on which side of the budget it is bounds nothing, so that noise leads nowhere that could
    not be left again.

    Raises:
        BudgetError: none is; the message says what was measured.
    """
    wanted, slack = budget.share, NOISE[budget.kind]
    tried: list[_Tried] = []
    refused: list[float] = []
    refusal: BudgetError | None = None
    asked = wanted
    while max(len(tried), len(refused)) < ROUNDS:
        try:
            small, found = make(asked)
        except BudgetError as error:
            refusal = error
            refused.append(asked)
        else:
            tried.append(_Tried(asked, found, small))
            if wanted * (1 - CLOSE) <= found.value <= wanted + slack:
                break
        following = _next(tried, refused, wanted)
        if following is None:
            break
        asked = following
    fitting = [one for one in tried if one.found.value <= wanted + slack]
    if fitting:
        return max(fitting, key=lambda one: one.found.value).model
    raise _missed(budget, [one.found for one in tried], refusal, structure)


NOISE = {"bytes": 0.0, "latency": 0.02}
"""How far above its budget a measured share may end."""

LEAST_STEP = 1e-3
"""Difference of shares below which no correction is tried."""


def _next(tried: Sequence[_Tried], refused: Sequence[float], wanted: float) -> float | None:
    """What to ask for next; None where there is nothing in between any more."""
    low = max([0.0, *refused, *(one.asked for one in tried if one.found.high < wanted)])
    high = min([1.0, *(one.asked for one in tried if one.found.low > wanted)])
    if abs(high - low) < LEAST_STEP:
        return None
    low, high = sorted((low, high))  # larger networks may be faster, where widths fit better
    margin = (high - low) / 10
    return min(max(_estimated(tried, wanted, (low + high) / 2), low + margin), high - margin)


def _estimated(tried: Sequence[_Tried], wanted: float, middle: float) -> float:
    """By the line through the nearest on either side, or through 1 and the nearest of all."""
    under = max((o for o in tried if o.found.value <= wanted), key=_asked, default=None)
    over = min((o for o in tried if o.found.value > wanted), key=_asked, default=None)
    if under is not None and over is not None:
        rise = over.found.value - under.found.value
        return under.asked + (over.asked - under.asked) * (wanted - under.found.value) / rise
    nearest = under or over
    if nearest is None or nearest.found.value >= 1:
        return middle
    return 1 - (1 - nearest.asked) * (1 - wanted) / (1 - nearest.found.value)


def _asked(one: _Tried) -> float:
    return one.asked


def _missed(
    budget: Budget, measured: list[Ratio], refusal: BudgetError | None, structure: object
) -> BudgetError:
    where = f"prune(budget=Budget({budget.kind}={budget.share:g}))"
    smallest = min(measured, key=lambda ratio: ratio.value, default=None)
    least = f"the smallest share that was measured is {smallest}" if smallest else ""
    counted = "parameters" if budget.kind == "bytes" else "layers"
    reason = f"by its {counted} alone, {refusal.what}" if refusal is not None else ""
    slower = budget.kind == "latency" and smallest is not None and smallest.high >= 1
    blocks = ""
    if budget.kind == "latency" and removes(structure) == {"channel"}:
        blocks = '; with structure=("channel", "depth") whole blocks may go, too'
    limits = "min_keep, max_drop, round_to, layers and " if "channel" in removes(structure) else ""
    share = "a larger share"
    if smallest is not None and smallest.value < 1 and not slower:
        share = f"{budget.kind}={math.ceil(smallest.value * 1000) / 1000:g} or more"
    return BudgetError(
        where,
        "; ".join(filter(None, (least, "no smaller network is faster" if slower else "", reason))),
        f"Ask for {share}, or relax {limits}exclude{blocks}",
    )


def _maker(asked: Request, budget: Budget, place: _Workplace) -> Make:
    """How networks are made and measured under a budget of bytes or latency."""
    if budget.bytes is not None:
        whole = place.saved(asked.model)

        def by_bytes(share: float) -> tuple[nn.Module, Ratio]:
            counted = replace(budget, bytes=None, params=share)
            small = asked.finished(asked.to(counted))
            found = Ratio.exact(place.saved(small) / whole)
            return noted(small, budget, found.value), found

        return by_bytes

    def by_latency(share: float) -> tuple[nn.Module, Ratio]:
        small = asked.to(replace(budget, latency=share), place.costs)
        found = place.note(small)
        return noted(small, budget, found.value), found

    return by_latency


class _Workplace:
    """A folder with the original in the form that the runtime serves, and what was measured.

    The folder is made when it is needed.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Inputs, runtime: str, threads: int
    ) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self.model, self.inputs = model, example_inputs
        self.runtime, self.threads = runtime, threads
        self._before: Form | None = None
        self._costs: Costs | None = None
        self._whole: Measurement | None = None
        self._known: dict[tuple[object, ...], Served] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """Where files are written."""
        if self._folder is None:
            try:
                self._folder = TemporaryDirectory(prefix="rarefy-")
            except OSError as error:
                raise OutputError(
                    "prune(budget, runtime)",
                    f"no folder for files to measure can be made: {first_line(error)}",
                    "Set TMPDIR to a folder that can be written and has room",
                ) from error
        return Path(self._folder.name)

    def saved(self, model: nn.Module) -> int:
        """Bytes of the network's file."""
        return save(model, self.folder / "saved.safetensors").stat().st_size

    def note(self, small: nn.Module) -> Ratio:
        """Time a smaller network beside the original; it carries the record from then on.

        One of the same sizes was timed already where nothing else fits a share.
        """
        sizes = (type(small), *((n, p.shape) for n, p in small.named_parameters()))
        if sizes not in self._known:
            before, after, share = self._beside(small)
            self._known[sizes] = Served(
                replace(before, share=None),
                replace(after, share=share),
                share.value,
                faster=share.high < 1,
                noise=share.noise,
            )
        found = self._known[sizes]
        tried = tuple(one.after.share for one in self._known.values() if one.after.share)
        small.served = replace(found, tried=tried)  # type: ignore[assignment]
        assert found.after.share is not None
        return found.after.share

    def costs(self, model: nn.Module, network: Network) -> Costs:
        """Latencies of the layers of the original, or of what is left of it, timed once."""
        if self._whole is None:
            (self._whole,) = compare(
                [self._original()], self.inputs, runtime=self.runtime, threads=self.threads
            )
        if model is self.model and self._costs is not None:
            return self._costs
        busy = self._whole.busy_ms if self.threads == 1 and FINE else None
        whole = (busy or self._whole.latency_ms).p10
        found = layer_costs(
            network,
            whole if model is self.model else whole * self._beside(model)[-1].value,
            runtime=self.runtime,
            threads=self.threads,
            batch=batch_size(self.inputs),
            step=RUNTIMES[self.runtime].widths["float32"],
            cache=Cache.of(self._whole.runtime, self.threads),
        )
        if model is self.model:
            self._costs = found
        return found

    def _beside(self, small: nn.Module) -> tuple[Measurement, Measurement, Ratio]:
        """A smaller network and the original, called in turn."""
        return relative(
            self._original(),
            self._form(small, "after"),
            self.inputs,
            runtime=self.runtime,
            threads=self.threads,
            max_seconds=SECONDS,
        )

    def _original(self) -> Form:
        if self._before is None:
            self._before = self._form(self.model, "before")
        return self._before

    def _form(self, model: nn.Module, name: str) -> Form:
        """A network as the runtime serves it."""
        if RUNTIMES[self.runtime].serves == "module":
            return model
        return export(model, self.folder / f"{name}{RUNTIMES[self.runtime].form}", self.inputs)
