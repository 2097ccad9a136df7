"""How single weights are chosen: by a formula, or layer by layer with reconstruction.

The formulas are those of :data:`~ELEMENT`, the same that criteria for units
sum up. What reconstructs is a frozen value (:mod:`rarefy.pruning.sparsity.calibrated`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from rarefy.errors import InputError, RarefyError, first_line
from rarefy.pruning.scoring.criteria import ELEMENT, Element
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.types import check_counts


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with reconstruction on calibration data.

    Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774: the columns of a layer are swept
    once; of every ``block`` of them the weights go whose removal costs least to second order,
    ``w^2 / [H^-1]_jj`` by the Cholesky factor of the inverse Hessian ``H = X^T X``, and the
    weights to the right make up for them. ``X`` are the layer's inputs in the network as pruned so
    far. Added to the paper: before the sweep the weights are moved to reproduce the dense
    network's outputs from those inputs; after it the surviving weights of each row are solved
    exactly where that is cheap, and so are those that magnitude would leave, should they be better;
    and the layer's bias, or the running mean of a BatchNorm that alone reads it, takes up what the
    mean of the outputs moved.

    A fifth of the examples is kept from all this. A layer that is not nearer to the original on
    them than by plain magnitude is pruned by that, and named in the record.

    Args:
        samples: number of examples to use.
        damp: added to the diagonal of the Hessian, relative to its mean, above 0.
        block: columns of one selection, at least 1.

    Raises:
        InputError: a value is out of range.
    """

    samples: int = 512
    damp: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "samples", 512)
        check_counts(self, "block", 128)
        if not 0 < self.damp < float("inf"):
            raise InputError(f"SparseGPT(damp={self.damp!r})", "must be above 0", "Write damp=0.01")


ElementCriterion: TypeAlias = Callable[[Tensor], Tensor] | Element | SparseGPT
"""How single weights are chosen: a function weight -> scores of its shape, the smallest of which
go first; an element criterion, which may need evidence on data; or reconstruction."""

ELEMENT_CRITERIA: Mapping[str, Element | SparseGPT] = {**ELEMENT, "sparsegpt": SparseGPT()}
"""Shorthand -> criterion."""


def named(criterion: str | ElementCriterion) -> Element | SparseGPT:
    """A criterion from its shorthand or from a function of the weight, or itself.

    Raises:
        InputError: it is none, or none has that name.
    """
    if isinstance(criterion, Element | SparseGPT):
        return criterion
    if callable(criterion):
        return Element(lambda path, evidence: criterion(evidence.tensors[path]))
    if isinstance(criterion, str) and criterion in ELEMENT_CRITERIA:
        return ELEMENT_CRITERIA[criterion]
    raise InputError(
        f"prune(criterion={criterion!r})",
        "it is no criterion of single weights",
        f"Use one of {', '.join(ELEMENT_CRITERIA)}, or a function weight -> scores",
    )


def scored(rule: Element, path: str, evidence: Evidence) -> Tensor:
    """The scores of a weight, float64, on its device.

    Raises:
        InputError: the criterion raised.
    """
    try:
        return rule(path, evidence).to(evidence.tensors[path].device)
    except RarefyError:
        raise
    except Exception as error:
        raise InputError(
            f"criterion, weight {path!r}",
            f"it raised {first_line(error)}",
            "Give a function weight -> one finite score for every entry of it",
        ) from error
