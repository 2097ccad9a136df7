"""Pruning along a schedule while a network is trained: of weights, and of whole units.

Both are called after every optimizer step. They count steps themselves, so that a loop needs two
lines::

    gradual = GradualPruning(Cubic(0.9, steps=2000), every=100)
    ...
    optimizer.step(); gradual(model)

and ``train(model, data, after_step=gradual)`` in rarefy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.copies import copied
from rarefy.errors import BudgetError, InputError
from rarefy.graph.capture import capture
from rarefy.graph.trace import trace
from rarefy.graph.zeros import directions
from rarefy.paths import excluded, paths, unwrapped
from rarefy.pruning.checks import check_finite
from rarefy.pruning.narrow import operate, stated
from rarefy.pruning.plan import Plan
from rarefy.pruning.scoring import criteria
from rarefy.pruning.scoring.criteria import Criterion, Element, needs, scored
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.gather import gather
from rarefy.pruning.selection.select import select
from rarefy.pruning.sparsity import elements
from rarefy.pruning.sparsity.elements import ElementCriterion
from rarefy.pruning.sparsity.masks import Masks
from rarefy.pruning.sparsity.patterns import NM, Pattern, Unstructured, named, shorthand
from rarefy.pruning.sparsity.weights import (
    Layer,
    checked,
    choose,
    oriented,
    prunable,
    warn_of_emptied,
)
from rarefy.pruning.structure.sizes import Sizes
from rarefy.pruning.structure.surgery import kept_entries
from rarefy.schedules import Schedule
from rarefy.types import Budget, Inputs, is_count


class _Gradual:
    """Counts steps, and holds the zeros between two selections."""

    schedule: Schedule
    every: int
    step: int
    masks: Masks

    def __init__(self, schedule: Schedule, every: int) -> None:
        if not is_count(every):
            raise InputError(
                f"{type(self).__name__}(every={every!r})",
                "it counts optimizer steps and must be at least 1",
                "Write every=100",
            )
        if not callable(schedule):
            raise InputError(
                f"{type(self).__name__}(schedule={schedule!r})",
                "a schedule maps a step to a sparsity",
                "Write for example Cubic(0.9, steps=2000) or Constant(0.9)",
            )
        self.schedule, self.every = schedule, every
        self.step, self.masks = 0, Masks({})

    def _advance(self) -> float | None:
        """Count a step; the sparsity of a selection where one is due."""
        self.step += 1
        if self.step % self.every:
            return None
        given = self.schedule(self.step)
        try:
            share = float(given)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 <= share < 1:
            raise BudgetError(
                f"{type(self).__name__}, step {self.step}",
                f"the schedule gives {given}, and a sparsity is at least 0 and below 1",
                "Correct the schedule",
            )
        return share

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later: the step and the masks."""
        return {"step": self.step, "masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.step, self.masks = int(state["step"]), Masks(state["masks"])

    def resume(self, model: nn.Module, step: int) -> None:
        """Go on without a state: after so many steps, with what is zero in the network now."""
        self.load_state_dict({"step": step, "masks": self._zeros(unwrapped(model))})

    def _zeros(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Where the network's weights that are to be pruned are not zero."""
        raise NotImplementedError


def _no_data(gradual: _Gradual, criterion: object, instead: str) -> InputError:
    """The error of a criterion that a training loop has no data for."""
    return InputError(
        f"{type(gradual).__name__}(criterion={criterion!r})",
        "it needs calibration data, and a training loop selects by the weights alone",
        f"Use {instead}",
    )


class GradualPruning(_Gradual):
    """Sets the least important weights to zero along a schedule, while a network is trained.

    Every ``every`` steps the share that the schedule gives is selected anew; weights that it
    has set to zero go first, whatever the criterion. After every step all of them are set to zero
    again. Zhu and Gupta 2017 (https://arxiv.org/abs/1710.01878) with
    :class:`~rarefy.schedules.Cubic`; one-shot with ``Constant``, in rounds with ``Iterative``.

    Args:
        schedule: number of optimizer steps done -> sparsity.
        structure: ``"weight"``, a block such as ``"1x4"``, or a pattern. N:M fixes its share:
            prune once and hold that.
        criterion: a criterion of single weights without data
            (:data:`~rarefy.pruning.sparsity.elements.ElementCriterion`), or its shorthand.
        scope: ``"global"`` ranks all weights together, ``"local"`` within each tensor.
        every: optimizer steps between two selections.
        exclude: module or parameter paths that stay dense.
        example_inputs: of the network, needed for blocks.

    Raises:
        InputError: an option is out of range.

    Example:
        >>> from rarefy.schedules import Constant
        >>> layer = nn.Linear(4, 4)
        >>> GradualPruning(Constant(0.5))(layer)
        >>> int((layer.weight == 0).sum())
        8
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        structure: str | Pattern = "weight",
        criterion: str | ElementCriterion = "magnitude",
        scope: str = "global",
        every: int = 1,
        exclude: Sequence[str] = (),
        example_inputs: Inputs | None = None,
    ) -> None:
        super().__init__(schedule, every)
        self.pattern, self.exclude = named(structure), exclude
        self.together = Budget(sparsity=0.0, scope=scope).scope == "global"
        rule = elements.named(criterion)
        if isinstance(self.pattern, NM):
            raise InputError(
                f"GradualPruning(structure={shorthand(self.pattern)!r})",
                "N:M fixes the share, which a schedule changes",
                "Prune once with prune(structure=...), and train with after_step=hold(pruned)",
            )
        if not isinstance(rule, Element) or rule.needs:
            raise _no_data(self, criterion, "'magnitude', 'lamp' or a function weight -> scores")
        if not isinstance(self.pattern, Unstructured) and example_inputs is None:
            raise InputError(
                f"GradualPruning(structure={shorthand(self.pattern)!r})",
                "which weights have inputs and outputs is told by the graph",
                "Give example_inputs",
            )
        self._rule, self._inputs = rule, example_inputs
        self._places: dict[str, tuple[int, int]] = {}

    def __call__(self, model: nn.Module) -> None:
        """To be called after every optimizer step; changes the network in place."""
        model = unwrapped(model)
        self.masks.apply(model)
        self._places = self._places or self._oriented(model)
        share = self._advance()
        if share is None:
            return
        check_finite(model)
        layers = self._layers(model)
        evidence = Evidence(dict(model.named_parameters()))
        scores = self._zeros_first(
            layers,
            [checked(elements.scored(self._rule, layer.path, evidence), layer) for layer in layers],
        )
        gone = choose(layers, scores, self.pattern, share, together=self.together)
        pairs = [*zip(layers, gone, strict=True)]
        emptied = [x.path for x, g in pairs if bool(g.all()) and bool(x.weight.any())]
        warn_of_emptied(f"GradualPruning, step {self.step}", emptied)
        self.masks = Masks({x.path: ~g for x, g in pairs})
        self.masks.apply(model)

    def _zeros_first(self, layers: Sequence[Layer], scores: Sequence[Tensor]) -> list[Tensor]:
        """The scores, lower than all others where a weight is zero already."""
        lowest = min((float(s.min()) for s in scores if s.numel()), default=0.0) - 1.0
        return [
            s.masked_fill(~self.masks[x.path].to(s.device), lowest) if x.path in self.masks else s
            for x, s in zip(layers, scores, strict=True)
        ]

    def _zeros(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {x.path: x.weight.detach() != 0 for x in prunable(model, self.exclude)}

    def _oriented(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Path of every weight that is to be pruned -> its dimension of inputs, and groups."""
        layers = prunable(model, self.exclude)
        if self._inputs is not None:
            graph = capture(model, self._inputs).graph
            layers, _ = oriented(layers, model, graph, self.pattern)
        return {layer.path: (layer.input_dim, layer.groups) for layer in layers}

    def _layers(self, model: nn.Module) -> list[Layer]:
        known = {layer.path: layer for layer in prunable(model, self.exclude)}
        return [
            replace(known[path], input_dim=dim, groups=groups)
            for path, (dim, groups) in self._places.items()
        ]


class GradualUnits(_Gradual):
    """Sets whole units to zero along a schedule while a network is trained; then removes them.

    A unit is zeroed at all parameters that go with it (:func:`rarefy.trace`), which is exactly
    what its removal computes; where a normalization or a mean runs over units, removal also takes
    its statistics over those that remain. :meth:`finish` removes the zeroed units, with proof.

    Args:
        model: the network, or an untrained twin with the same paths.
        example_inputs: as for :func:`~rarefy.pruning.prune.prune`.
        schedule: number of optimizer steps done -> share of the units that are zero.
        criterion: a criterion of units without data, or its shorthand.
        scope: ``"global"`` or ``"local"``.
        every: optimizer steps between two selections.
        exclude: module or parameter paths whose outputs keep their width.

    Raises:
        InputError: an option is out of range.

    Example:
        >>> from rarefy.schedules import Constant
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> gradual = GradualUnits(net, torch.zeros(2, 4), Constant(0.5))
        >>> gradual(net)  # after a step of the optimizer
        >>> gradual.finish(net)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        schedule: Schedule,
        *,
        criterion: str | Criterion = "magnitude",
        scope: str = "global",
        every: int = 1,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(schedule, every)
        model, rule = unwrapped(model), criteria.named(criterion)
        if needs(rule):
            raise _no_data(
                self, criterion, "'magnitude', 'lamp' or a function (group, evidence) -> scores"
            )
        excluded(exclude, paths(model))
        self.network = trace(model, example_inputs)
        self.budget = Budget(sparsity=0.0, scope=scope)
        self.exclude, self._inputs = exclude, example_inputs
        self._criterion = rule
        self._sizes = Sizes(self.network, stated(model, self.network, example_inputs))
        self._directions = directions(self.network.captured.graph)
        self._plan = Plan.of(self.network, np.zeros(self.network.coupling.units, np.bool_))
        self._paths = frozenset(path for path, _ in model.named_parameters(remove_duplicate=False))

    def __call__(self, model: nn.Module) -> None:
        """To be called after every optimizer step; changes the network in place."""
        model = unwrapped(model)
        self.masks.apply(model)
        share = self._advance()
        if share is None:
            return
        check_finite(model)
        self._plan = self._selected(model, share)
        self.masks = self._masks(model)
        self.masks.apply(model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        self._plan = self._planned(self.masks)

    def finish(self, model: nn.Module) -> nn.Module:
        """A smaller network without the units that are zero now; ``model`` is not changed.

        Raises:
            ProofError: the smaller network differs from the masked one.
        """
        zeroed = copied(unwrapped(model))
        self.masks.apply(zeroed)
        return operate(zeroed, self._inputs, self.network, self._plan, self._sizes)

    def _zeros(self, model: nn.Module) -> Mapping[str, Tensor]:
        every = model.named_parameters(remove_duplicate=False)
        self._plan = self._planned({path: weight.detach() != 0 for path, weight in every})
        return self._masks(model)

    def _masks(self, model: nn.Module) -> Masks:
        """What a plan leaves of all parameters that it concerns."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        keep: dict[str, Tensor] = {}
        for (path, dim), entries in kept_entries(self.network, self._plan).items():
            if path in parameters and (path, dim) not in self._directions:
                stays = torch.zeros(parameters[path].shape[dim], dtype=torch.bool)
                stays[torch.from_numpy(entries)] = True
                shape = [-1 if d == dim else 1 for d in range(parameters[path].ndim)]
                before = keep.get(path, torch.ones(parameters[path].shape, dtype=torch.bool))
                keep[path] = before & stays.view(shape)
        return Masks(keep)

    def _planned(self, keep: Mapping[str, Tensor]) -> Plan:
        """The plan of all units of which nothing stays; groups of which no unit stays are whole."""
        removed = np.zeros(self.network.coupling.units, np.bool_)
        for group in self.network.groups:
            gone = np.ones(len(group), np.bool_)
            for m in group.members:
                if m.path not in self._paths or (m.path, m.dim) in self._directions:
                    continue
                if m.path not in keep:  # nothing of it is zero
                    gone[:] = False
                    continue
                entries = keep[m.path].cpu().movedim(m.dim, 0)
                stays = entries.reshape(len(entries), -1).any(1).numpy()
                gone &= ~stays[m.indices].any(1)
            removed[group.units] = gone & ~gone.all()
        return Plan.of(self.network, removed)

    def _selected(self, model: nn.Module, share: float) -> Plan:
        """The plan of a share, which holds all units that are zero already."""
        evidence = gather(model, self.network, needs(self._criterion))
        scores = [scored(g, evidence, self._criterion) for g in self.network.groups]
        lowest = min((float(s.min()) for s in scores), default=0.0) - 1.0
        for group, score in zip(self.network.groups, scores, strict=True):
            score[self._plan.removed[group.units]] = lowest
        budget = replace(self.budget, sparsity=share)
        try:
            return select(self.network, model, scores, budget, self.exclude, self._sizes)
        except BudgetError:  # the class cannot follow; a graph can
            return select(self.network, model, scores, budget, self.exclude)
