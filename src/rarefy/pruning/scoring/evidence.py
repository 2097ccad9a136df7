"""What criteria judge by: a network's weights, and what was found out about them on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

LABELS = "labels"
"""The need of criteria for which labels that the network itself would give say nothing."""


@dataclass(frozen=True)
class Gates:
    """The derivative of each sample's loss by a gate on each unit: its moments over the samples.

    A gate multiplies a unit wherever the network reads it; it is 1, and 0 where the unit is gone.
    The derivative is the sum of entry times gradient over what the network reads of the unit,
    which equals the sum of weight times gradient over the weights that read it.

    Attributes:
        mean: mean derivative, shape (units,), float64.
        absolute: mean absolute derivative.
        square: mean squared derivative.
        seen: whether anything reads the unit.
    """

    mean: Tensor
    absolute: Tensor
    square: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Gram:
    """Second moments of what some entries of a parameter are multiplied by.

    Attributes:
        matrix: sum over positions, mean over samples, of the inputs' products: (groups, unknowns,
            unknowns), float64.
        index: positions in the flattened parameter: (groups, outputs, unknowns).
    """

    matrix: Tensor
    index: Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known of a network. What no criterion asked for is empty.

    Attributes:
        tensors: parameters by path.
        scales: paths of those that scale the result of a normalization.
        samples: number of examples seen.
        gradients: mean gradient of the loss, by path (need ``"gradients"``).
        squares: mean over samples of the squared gradient of each sample's loss, the diagonal of
            the empirical Fisher information, by path (need ``"squares"``).
        norms: for each weight the sum over positions, mean over samples, of the squared input
            that it is multiplied by, of the weight's shape, by path (need ``"norms"``).
        grams: Gram matrices of the inputs of the layers that use a parameter, by path (need
            ``"grams"``).
        gates: moments of the gradients of gates (need ``"gates"``). Units are numbered as in
            ``group.units``.
        activations: mean absolute value of what is read of each unit (need ``"activations"``).
    """

    tensors: Mapping[str, Tensor]
    scales: frozenset[str] = frozenset()
    samples: int = 0
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    grams: Mapping[str, tuple[Gram, ...]] = field(default_factory=dict)
    gates: Gates | None = None
    activations: Tensor | None = None

    def covers(self, path: str, needs: frozenset[str]) -> bool:
        """Whether what was gathered by parameter is there for this one."""
        by_path = needs & {"gradients", "squares", "norms", "grams"}
        return all(path in getattr(self, need) for need in by_path)
