"""``sensitivity``: the user's metric against the share of units removed, one group at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.batches import batches, check_rereadable, forked, seeded, take
from rarefy.copies import copied, fingerprint, ordinary
from rarefy.errors import InputError, first_line
from rarefy.graph.trace import Network, trace
from rarefy.progress import Bar
from rarefy.pruning.checks import check_finite
from rarefy.pruning.journal import Journal
from rarefy.pruning.plan import Plan, Scores
from rarefy.pruning.scoring.criteria import Criterion, named, needs, scored
from rarefy.pruning.scoring.curves import Point, Sensitivity, labels
from rarefy.pruning.scoring.gather import gather
from rarefy.pruning.selection.limits import ranges
from rarefy.pruning.structure.reference import masked
from rarefy.types import Budget, Data, Inputs, check_network, python

RATIOS = (0.1, 0.25, 0.5, 0.75)
"""Shares of a group's units that are removed."""

EXAMPLES = 8
"""Examples of the first batch that the network is traced with."""

Evaluate = Callable[[nn.Module], float | Tensor]
"""(network in eval mode) -> the user's metric, a number or a tensor of one."""


class EvaluationError(InputError):
    """The user's evaluation failed.

    Attributes:
        measured: what was measured before.
    """

    measured: Sensitivity


@torch.inference_mode(False)
@forked()
def sensitivity(
    model: nn.Module,
    data: Data,
    evaluate: Evaluate,
    *,
    example_inputs: Inputs | None = None,
    ratios: Sequence[float] = RATIOS,
    criterion: str | Criterion = "magnitude",
    exclude: Sequence[str] = (),
    higher_is_better: bool = True,
    path: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Measure what the removal of each group's units costs, all other groups whole.

    Removal is by exact masking: every coupled slice of the units is zero in a copy of the network,
    in its own class, which costs no tracing and no proof. Where a layer norm, a softmax or a mean
    runs over the units, the zeros take part in its statistics; a pruned network takes them over
    what remains (Li et al. 2017, https://arxiv.org/abs/1608.08710, draw such curves per layer).

    Args:
        model: a trained network; left as it is.
        data: batches that it takes; the first few examples are what it is traced with.
        evaluate: the metric, e.g. ``lambda m: rarefy.evaluate(m, val)``; it gets a copy in eval
            mode, and the same random numbers every time.
        example_inputs: what the network is traced with instead of examples of ``data``.
        ratios: shares of a group's units to remove, in (0, 1), at least one unit each.
        criterion: by what units are chosen, as for :func:`rarefy.prune`; ``"compensated"``, which
            adapts what is left, is none of masking.
        exclude: paths or patterns of modules and parameters whose outputs are left alone.
        higher_is_better: False where the metric is a loss.
        path: a file of JSON lines that each measurement is appended to; an interrupted call with
            the same path, network and options continues there. Other ratios may be added.
        seed: of the random numbers of every evaluation.
        progress: show progress.

    Returns:
        The curves, for ``print``, ``plot``, ``save`` and ``rarefy.prune(..., sensitivity=...)``.

    Raises:
        InputError: arguments that cannot be used, or a metric that is no finite number.
        EvaluationError (an InputError): the evaluation raised; the error names group and ratio,
            and holds what was measured.
        OutputError: the file is of another network or other options, or cannot be written.

    Example:
        >>> curves = sensitivity(net, loader, lambda m: evaluate(m, val))  # doctest: +SKIP
        >>> small = prune(net, x, Budget(macs=0.5), sensitivity=curves)  # doctest: +SKIP
    """
    check_network(model, "sensitivity(model)")
    _check(ratios, evaluate)
    check_rereadable(data, "sensitivity(data)")
    check_finite(model)
    model = ordinary(model)
    if example_inputs is None:
        example_inputs = take(next(batches(data, "sensitivity(data)"))[0], EXAMPLES)
    network = trace(model, example_inputs)
    chosen = named(criterion, call="sensitivity")
    name = (
        criterion if isinstance(criterion, str) else getattr(chosen, "__qualname__", repr(chosen))
    )
    allowed = ranges(network, model, Budget(sparsity=0.5, max_drop=1), exclude)
    groups = [g for g, r in allowed.items() if r.high]
    evidence = gather(model, network, needs(chosen), data)
    scores = [scored(group, evidence, chosen) for group in network.groups]
    identity = _identity(model, network, scores, name, higher_is_better, seed)
    journal = Journal(None if path is None else Path(path), identity)
    run = _Run(model, network, scores, evaluate, journal, seed)

    def result() -> Sensitivity:
        base = math.nan if journal.base is None else journal.base
        own = {run.labels[g] for g in groups}
        points = tuple(p for p in journal.points if p.group in own)
        return Sensitivity(base, points, name, higher_is_better, identity)

    shares = sorted({float(ratio) for ratio in ratios})
    with Bar("sensitivity", 1 + len(groups) * len(shares), progress) as bar:
        try:
            run.whole()
            bar.step()
            for g in groups:
                for ratio in shares:
                    run.part(g, ratio)
                    bar.step()
        except EvaluationError as error:
            error.measured = result()
            raise
    return result()


def _check(ratios: Sequence[float], evaluate: object) -> None:
    if not callable(evaluate):
        raise InputError(
            "sensitivity(evaluate=...)",
            f"a {type(evaluate).__name__} cannot be called",
            "Give a function of the network, e.g. lambda m: rarefy.evaluate(m, val)",
        )
    given = [python(r) for r in ratios] if isinstance(ratios, Iterable) else [ratios]
    wrong = [r for r in given if not (isinstance(r, float) and 0 < r < 1)]
    if wrong or not given or not isinstance(ratios, Iterable):
        raise InputError(
            f"sensitivity(ratios={ratios!r})",
            f"{wrong[0]!r} is no share between 0 and 1" if wrong else "it holds no shares",
            "Give shares of units to remove, such as (0.25, 0.5)",
        )


def _identity(
    model: nn.Module, network: Network, scores: Scores, name: str, higher: bool, seed: int
) -> str:
    """A hash of all that a measurement depends on, but for the evaluation itself."""
    found = hashlib.sha256(f"{fingerprint(model)} {name} {higher} {seed}".encode())
    for label, score in zip(labels(network.groups), scores, strict=True):
        found.update(f";{label}:".encode())
        found.update(score.tobytes())
    return found.hexdigest()


class _Run:
    """One measurement after the other, each noted before the next begins."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        scores: Scores,
        evaluate: Evaluate,
        journal: Journal,
        seed: int,
    ) -> None:
        self.model, self.network, self.evaluate = model, network, evaluate
        self.journal, self.seed = journal, seed
        self.labels = labels(network.groups)
        self.order = [np.argsort(score, kind="stable") for score in scores]
        self.known = {(p.group, p.removed): p.metric for p in journal.points}
        self.done = {(p.group, p.ratio) for p in journal.points}

    def whole(self) -> None:
        """The metric of the whole network."""
        if self.journal.base is None:
            self.journal.start(self._metric(copied(self.model), "the whole network"))

    def part(self, group: int, ratio: float) -> None:
        """The metric without a share of one group's units, the least important."""
        label, units = self.labels[group], self.network.groups[group].units
        if (label, ratio) in self.done:
            return
        removed = min(max(round(ratio * len(units)), 1), len(units) - 1)
        metric = self.known.get((label, removed))
        if metric is None:
            gone = np.zeros(self.network.coupling.units, np.bool_)
            gone[units[self.order[group][:removed]]] = True
            small = masked(copied(self.model), self.network, Plan.of(self.network, gone))
            metric = self._metric(small, f"group {label} at ratio {ratio:g}")
            self.known[label, removed] = metric
        self.journal.add(Point(label, ratio, removed, len(units), metric))

    def _metric(self, network: nn.Module, what: str) -> float:
        where = f"sensitivity(evaluate=...), {what}"
        kept = (
            ""
            if self.journal.path is None
            else f"; call again with path={str(self.journal.path)!r}"
        )
        remedy = f"Mend the evaluation{kept}; what was measured before is kept"
        try:
            with seeded(self.seed):
                found = self.evaluate(network.eval())
        except Exception as error:
            raise EvaluationError(where, f"it raised {first_line(error)}", remedy) from error
        try:
            metric = float(found.detach() if isinstance(found, Tensor) else found)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"it returned a {type(found).__name__} that is not one number"
            raise EvaluationError(where, what, remedy) from error
        if not math.isfinite(metric):
            raise EvaluationError(where, f"it returned {metric}", remedy)
        return metric
