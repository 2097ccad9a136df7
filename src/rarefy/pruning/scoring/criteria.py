"""How important a unit or a weight is: formulas, each with its paper.

A criterion receives a :class:`~rarefy.graph.groups.Group` and the :class:`Evidence` on the network,
and returns one score per unit; the smallest go first. Its attribute ``needs``, where it has one,
names the evidence that it needs gathered on data. Scores should be comparable between groups, since
a global budget ranks them together.

Element criteria score every single weight of a parameter; :class:`Coupled` makes a criterion for
units of any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.errors import InputError, RarefyError, first_line
from rarefy.graph.groups import Group, Member
from rarefy.pruning.scoring.aggregation import (
    SCALE,
    TINY,
    Aggregated,
    Scaled,
    plain,
    share_of_the_rest,
    slices,
    weights,
)
from rarefy.pruning.scoring.evidence import LABELS, Evidence, Gates, Gram

Criterion: TypeAlias = Callable[[Group, Evidence], Tensor]
"""(group, evidence) -> scores, float64, shape (units,)."""

RIDGE = 1e-2
"""Regularization of a Gram matrix before it is inverted, relative to the mean of its diagonal."""


# --- single weights: tensors of the weight's shape ---------------------------------------------


def lamp(weight: Tensor) -> Tensor:
    """``w_i^2 / sum of w_j^2 over all j with |w_j| >= |w_i|``: the share of what is left.

    Layer-adaptive magnitude, Lee et al. 2021, https://arxiv.org/abs/2010.07611.
    """
    return share_of_the_rest(weight.double().square())


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|g w|``: first-order change of the loss without the weight.

    Molchanov et al. 2019, https://arxiv.org/abs/1906.10771. ``g`` is the mean gradient.
    """
    return (gradient * weight).abs()


def taylor_second(weight: Tensor, gradient: Tensor, square: Tensor) -> Tensor:
    """``|-g w + E[g^2] w^2 / 2|``: second-order change of the loss without the weight.

    The Taylor expansion of the loss for a step of ``-w``, its Hessian approximated by the diagonal
    Fisher information. LeCun et al. 1990, "Optimal brain damage", without the assumption that the
    gradient is zero.
    """
    return (square * weight.square() / 2 - gradient * weight).abs()


def obd(weight: Tensor, square: Tensor) -> Tensor:
    """``E[g^2] w^2 / 2``: optimal brain damage with the diagonal Fisher information as Hessian.

    LeCun et al. 1990, "Optimal brain damage"; Theis et al. 2018,
    https://arxiv.org/abs/1801.05787. The mean is over samples, each with its own gradient.
    """
    return square * weight.square() / 2


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """``|w| ||x||``: ``x`` are all inputs that the weight is multiplied by.

    Sun et al. 2023, https://arxiv.org/abs/2306.11695. ``norm`` holds ``||x||^2`` for each weight.
    """
    return weight.abs() * norm.sqrt()


def obs(weight: Tensor, grams: Sequence[Gram]) -> Tensor:
    """``w_j^2 / [H^-1]_jj``: error of a layer's output, all its other weights adapted at best.

    Optimal brain surgeon for the squared error of a layer's outputs, ``H`` the Gram matrix of its
    inputs. Hassibi and Stork 1992; Frantar and Alistarh 2022, https://arxiv.org/abs/2208.11580.
    """
    scores = torch.zeros(weight.numel(), dtype=torch.float64)
    for gram in grams:
        alive = gram.matrix.diagonal(dim1=1, dim2=2).any(1)[:, None, None]
        diagonal = inverse(gram.matrix).diagonal(dim1=1, dim2=2)[:, None]
        entries = weight.detach().cpu().double().flatten()[gram.index]
        scores.index_add_(0, gram.index.flatten(), (entries.square() / diagonal * alive).flatten())
    return scores.view(weight.shape)


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """``-g w``: positive where a step of training moves the weight away from zero.

    Sanh et al. 2020, https://arxiv.org/abs/2005.07683, who sum it over the steps of a fine-tuning;
    :class:`~rarefy.pruning.scoring.movement.Movement` does.
    """
    return -gradient * weight


def inverse(gram: Tensor) -> Tensor:
    """Inverse of Gram matrices (..., n, n), regularized relative to the mean of their diagonals."""
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.inv(gram + eye * (RIDGE * scale)[..., None, None])
    return found


def _uniform(name: str, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Element:
    """A criterion for single weights: ``(path, evidence) -> scores`` of the parameter's shape.

    Attributes:
        score: the formula.
        needs: evidence that it needs gathered on data.
        energy: power of the scores that is an error of the layer's outputs; None where scores of
            all layers are alike. Such errors are ranked together as shares of what is left.
    """

    score: Callable[[str, Evidence], Tensor]
    needs: frozenset[str] = frozenset()
    energy: float | None = None

    def __call__(self, path: str, evidence: Evidence) -> Tensor:
        """Scores of all weights of a parameter, float64, on the CPU.

        Raises:
            InputError: nothing is known of it, such as of the inputs of an embedding.
        """
        if not evidence.covers(path, self.needs):
            raise InputError(
                f"parameter {path}",
                f"there is no evidence on it ({', '.join(sorted(self.needs - {LABELS}))})",
                "Gather it on data, or score this parameter by magnitude",
            )
        return self.score(path, evidence).detach().to("cpu", torch.float64)


def _needs(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENT: Mapping[str, Element] = {
    "magnitude": Element(lambda p, e: e.tensors[p].abs()),
    "square": Element(lambda p, e: e.tensors[p].double().square()),
    "random": Element(lambda p, e: _uniform(p, e.tensors[p].shape)),
    "lamp": Element(lambda p, e: lamp(e.tensors[p].detach())),
    "gradient": Element(lambda p, e: e.gradients[p].abs(), _needs("gradients labels")),
    "taylor": Element(
        lambda p, e: taylor(e.tensors[p], e.gradients[p]), _needs("gradients labels")
    ),
    "taylor2": Element(
        lambda p, e: taylor_second(e.tensors[p], e.gradients[p], e.squares[p]),
        _needs("gradients squares labels"),
    ),
    "obd": Element(lambda p, e: obd(e.tensors[p], e.squares[p]), _needs("squares")),
    "wanda": Element(lambda p, e: wanda(e.tensors[p], e.norms[p]), _needs("norms"), energy=2),
    "obs": Element(lambda p, e: obs(e.tensors[p], e.grams[p]), _needs("grams"), energy=1),
}
"""Shorthand -> criterion for single weights; all scores are at least 0."""


# --- units -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coupled(Aggregated):
    """Scores of single weights, summed over what goes with a unit.

    ``score(u) = over W: (sum of element scores over W[u]) / (their sum over all of W)``, ``over``
    the weight matrices and kernels that shrink with the unit (Fang et al. 2023,
    https://arxiv.org/abs/2301.12900); all parameters where there are none. Parameters that there
    is no evidence on, such as the inputs of an embedding, count for nothing; where that leaves
    none, shares of squared magnitudes stand in.

    Args:
        element: a name in :data:`ELEMENT`, or an element criterion.
        over, scale: see :class:`~rarefy.pruning.scoring.aggregation.Aggregated`.

    Raises:
        InputError: there is no such element criterion or option.

    Example:
        >>> Coupled("wanda", over="mean").needs
        frozenset({'norms'})
    """

    element: str | Element = "square"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.element, Element) and self.element not in ELEMENT:
            raise InputError(
                f"Coupled({self.element!r})",
                "no element criterion has that name",
                f"Use one of {', '.join(ELEMENT)}, or an Element",
            )

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that is to be gathered on data."""
        return self._element.needs

    @property
    def _element(self) -> Element:
        return self.element if isinstance(self.element, Element) else ELEMENT[self.element]

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        element, scale = self._element, self.scale
        members = list(weights(group, evidence.tensors))
        known = [m for m, _ in members if evidence.covers(m.path, element.needs)]
        if not known:
            element, known, scale = ELEMENT["square"], [m for m, _ in members], "share"
        parts = [slices(element(m.path, evidence), m, share=scale == "share") for m in known]
        return self.combined(parts, len(group))


def random(group: Group, evidence: Evidence) -> Tensor:
    """Uniform scores, the control; equal for equal groups."""
    return _uniform(group.name, (len(group),))


@dataclass(frozen=True, kw_only=True)
class NormScale(Aggregated):
    """``|gamma|``, the scale of the normalization that a unit goes through (network slimming).

    Liu et al. 2017, https://arxiv.org/abs/1708.06519. A unit that no normalization scales counts
    as scaled by 1. Meant for networks trained with a penalty on these scales.

    Options are those of :class:`~rarefy.pruning.scoring.aggregation.Aggregated`.
    """

    over: str = "mean"
    scale: str = "none"

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        parts = [
            slices(plain(evidence.tensors[m.path]).abs(), m, share=self.scale == "share")
            / m.indices.shape[1]
            for m in group.members
            if m.path in evidence.scales
        ]
        ones = torch.ones(len(group), dtype=torch.float64)
        return self.combined(parts or [ones], len(group))


@dataclass(frozen=True)
class FPGM(Aggregated):
    """``sum over v of ||W[u] - W[v]||``: units near the geometric median of all are replaceable.

    He et al. 2019, https://arxiv.org/abs/1811.00250, over the units of a group. ``W[u]`` is what of
    a parameter goes with the unit.

    Options are those of :class:`~rarefy.pruning.scoring.aggregation.Aggregated`.
    """

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        parts = []
        for member, weight in weights(group, evidence.tensors):
            entries = plain(weight).movedim(member.dim, 0)[torch.from_numpy(member.indices)]
            flat = entries.flatten(1)
            distances = torch.cdist(flat, flat).sum(1)
            parts.append(SCALE["sum"](distances) if self.scale == "share" else distances)
        return self.combined(parts, len(group))


MOMENTS: Mapping[str, Callable[[Gates], Tensor]] = {
    "taylor": lambda gates: gates.absolute,
    "taylor2": lambda gates: (gates.square / 2 - gates.mean).abs(),
    "fisher": lambda gates: gates.square / 2,
}
"""Change of the loss without a unit, of the moments of its gate's gradient."""


@dataclass(frozen=True)
class Gate(Scaled):
    """The change of the loss when a gate on the unit closes, by a Taylor expansion.

    With ``s_n`` the derivative of the loss of sample ``n`` by the gate (the sum of weight times
    gradient over the weights that read the unit, in all coupled layers):

    * ``"taylor"``: ``E|s_n|``, first order, Molchanov et al. 2017,
      https://arxiv.org/abs/1611.06440;
    * ``"fisher"``: ``E[s_n^2] / 2``, second order at a minimum, the Hessian approximated by the
      Fisher information, Theis et al. 2018, https://arxiv.org/abs/1801.05787; with coupled layers
      summed before squaring, Liu et al. 2021, https://arxiv.org/abs/2108.00708. Of unlabelled data
      it is the true Fisher information, with labels drawn from the network's own probabilities, or
      of a normal distribution around outputs that are no logits ``(B, C)`` or ``(B, L, C)``;
    * ``"taylor2"``: ``|-E[s_n] + E[s_n^2] / 2|``, both orders.

    All are changes of the same loss, so that groups are comparable as they are.

    Args:
        moment: one of :data:`MOMENTS`.
        scale: see :class:`~rarefy.pruning.scoring.aggregation.Scaled`.
    """

    moment: str = "fisher"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moment not in MOMENTS:
            raise InputError(
                f"Gate({self.moment!r})", "unknown moment", f"Use one of {', '.join(MOMENTS)}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that is to be gathered on data."""
        return _needs("gates" if self.moment == "fisher" else "gates labels")

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        gates, units = evidence.gates, torch.from_numpy(group.units)
        if gates is None or not bool(gates.seen[units].all()):
            raise InputError(
                f"Gate({self.moment!r}), group {group.name}",
                "nothing that is computed on the data reads its units",
                "Give data, or use another criterion",
            )
        return SCALE[self.scale](MOMENTS[self.moment](gates)[units])


@dataclass(frozen=True, kw_only=True)
class Activation(Scaled):
    """``E|x|``, the mean absolute value of what is read of a unit.

    Molchanov et al. 2017, https://arxiv.org/abs/1611.06440, section 2.2.

    Options are those of :class:`~rarefy.pruning.scoring.aggregation.Scaled`.
    """

    scale: str = "mean"
    needs: frozenset[str] = field(default=frozenset({"activations"}), init=False)

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        if evidence.activations is None:
            raise InputError("Activation()", "no activations were gathered", "Give data")
        return SCALE[self.scale](evidence.activations[torch.from_numpy(group.units)])


@dataclass(frozen=True)
class Reconstruction(Aggregated):
    """How far the outputs of the layers that read a unit move when it goes.

    With ``S`` the columns of a layer's weight that read the unit, and ``H`` the Gram matrix of the
    layer's inputs, summed over its outputs:

    * as they are: ``w_S^T H_SS w_S`` (as in ThiNet, Luo et al. 2017,
      https://arxiv.org/abs/1707.06342);
    * adapted: ``w_S^T ([H^-1]_SS)^-1 w_S``, the error that remains when all other weights of the
      layer are solved anew, optimal brain surgeon for whole structures (Frantar and Alistarh 2022,
      https://arxiv.org/abs/2208.11580; Kurtic et al. 2023, https://arxiv.org/abs/2302.04089).

    A unit that no layer with weights reads, such as the dimension along which queries meet keys,
    is scored by the energy of the outputs that compute it, ``w H w^T``; without Gram matrices for
    either, by its share of squared weights.

    Args:
        adapted: whether the other weights are thought to be solved anew.
        over, scale: see :class:`~Aggregated`; ``"share"`` divides by
            the energy of all outputs of a layer, which makes it a relative error.
    """

    adapted: bool = True
    needs: frozenset[str] = field(default=frozenset({"grams"}), init=False)

    def __call__(self, group: Group, evidence: Evidence) -> Tensor:
        """Scores of all units, shape (units,), float64."""
        readers, makers = list[Tensor](), list[Tensor]()
        for member in group.members:
            for gram in evidence.grams.get(member.path, ()):
                weight = plain(evidence.tensors[member.path])
                reads, moved = _moved(gram, weight, member, adapted=self.adapted)
                if self.scale == "share":
                    moved = moved / _energies(gram, weight).sum().clamp_min(TINY)
                (readers if reads else makers).append(moved)
        if not readers and not makers:
            return Coupled("square", over=self.over)(group, evidence)
        return self.combined(readers or makers, len(group))


def _energies(gram: Gram, weight: Tensor) -> Tensor:
    """Mean square of each output times positions, ``w^T H w``: (groups, outputs)."""
    entries = weight.flatten()[gram.index]
    return ((entries @ gram.matrix) * entries).sum(-1)


def _moved(gram: Gram, weight: Tensor, member: Member, *, adapted: bool) -> tuple[bool, Tensor]:
    """Whether units are columns of the layer, and the squared error without each: (units,)."""
    shape, dim = weight.shape, member.dim
    place = gram.index // prod(shape[dim + 1 :]) % shape[dim]  # along the dimension that shrinks
    indices = torch.from_numpy(member.indices)
    scores = torch.zeros(len(indices), dtype=torch.float64)
    if not bool((place != place[..., :1]).any()):  # units are whole outputs
        energies, rows = _energies(gram, weight), place[..., 0]
        for u, own in enumerate(indices):
            scores[u] = energies[torch.isin(rows, own)].sum()
        return False, scores
    entries = weight.flatten()[gram.index]
    metric = inverse(gram.matrix) if adapted else gram.matrix
    for u, own in enumerate(indices):
        for g in torch.isin(place[:, 0], own).any(1).nonzero().flatten().tolist():
            columns = torch.isin(place[g, 0], own).nonzero().flatten()
            block = metric[g][columns[:, None], columns]
            w = entries[g][:, columns].T
            scores[u] += (w * (torch.linalg.solve(block, w) if adapted else block @ w)).sum()
    return True, scores


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": Coupled("square"),
    "l1": Coupled("magnitude"),
    "random": random,
    "norm_scale": NormScale(),
    "lamp": Coupled("square", scale="lamp"),
    "fpgm": FPGM(),
    "gradient": Coupled("gradient"),
    "taylor": Gate("taylor"),
    "taylor2": Gate("taylor2"),
    "fisher": Gate("fisher"),
    "obd": Coupled("obd", scale="none"),
    "obs": Reconstruction(adapted=True),
    "reconstruction": Reconstruction(adapted=False),
    "wanda": Coupled("wanda"),
    "activation": Activation(),
}
"""Shorthand -> criterion. The default, ``"magnitude"``, is ``sum over weights W of ||W[u]||^2 /
||W||^2`` (Li et al. 2017, https://arxiv.org/abs/1608.08710; Fang et al. 2023): dividing by the
layer's norm makes layers of different scale count alike. ``"l1"`` has absolute values instead."""


# --- use ---------------------------------------------------------------------------------------


def named(criterion: str | Criterion, others: Sequence[str] = (), call: str = "prune") -> Criterion:
    """A criterion from its shorthand, or itself.

    Args:
        criterion: either.
        others: names that the caller knows besides, for the error.
        call: the function that errors name.

    Raises:
        InputError: no criterion has that name.
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise InputError(
            f"{call}(criterion={criterion!r})",
            "no criterion has that name here",
            f"Use one of {', '.join([*CRITERIA, *others])}, or a function (group, evidence) -> "
            "scores",
        )
    return CRITERIA[criterion]


def needs(criterion: Criterion) -> frozenset[str]:
    """Evidence that a criterion needs gathered on data: its attribute ``needs``, if it has one."""
    return frozenset(getattr(criterion, "needs", ()))


def scored(group: Group, evidence: Evidence, criterion: Criterion) -> NDArray[np.float64]:
    """The scores of a group, held against what a criterion promises.

    Raises:
        InputError: it raised, or the scores are not one finite number for each unit.
    """
    where = f"criterion {getattr(criterion, '__name__', criterion)!r}"
    remedy = f"Return one finite score for each of the {len(group)} units"
    try:
        scores = torch.as_tensor(criterion(group, evidence)).detach().to("cpu", torch.float64)
    except RarefyError:
        raise
    except Exception as error:
        raise InputError(where, f"for group {group.name}: {first_line(error)}", remedy) from error
    if tuple(scores.shape) != (len(group),) or not bool(torch.isfinite(scores).all()):
        raise InputError(
            where,
            f"for group {group.name} it returned shape {tuple(scores.shape)} with "
            f"{int((~torch.isfinite(scores)).sum())} values that are not finite",
            remedy,
        )
    found: NDArray[np.float64] = scores.numpy().copy()  # what a criterion keeps is its own
    return found
