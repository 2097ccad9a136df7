"""The optimal brain surgeon for units: which go first, and how the layers that read them adapt.

A layer that gives ``y = W x`` loses the columns of ``W`` that read a unit. With ``H`` the Gram
matrix of its inputs, the error of ``y`` grows by ``w_S^T ([H^-1]_SS)^-1 w_S``, summed over outputs,
where the columns ``S`` go and all others are adapted at best. Hassibi and Stork 1992, "Second order
derivatives for network pruning: optimal brain surgeon"; for blocks of weights Frantar and Alistarh
2022, https://arxiv.org/abs/2208.11580.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RIDGE = 1e-3
"""Regularization of a Gram matrix, relative to the mean of its diagonal."""

EXACT = 1024
"""Unknowns up to which units go one by one; beyond, a sixteenth of them at a time."""

ROUNDS = 16


@dataclass(frozen=True)
class Columns:
    """Which columns of a layer's weight read which units.

    Attributes:
        units: units of the group, shape (read,).
        index: the columns of each, shape (read, columns of one).
    """

    units: Tensor
    index: Tensor


@dataclass(frozen=True)
class Reader:
    """A layer, or one group of a grouped layer, that reads units.

    Attributes:
        weight: (outputs, unknowns), float64.
        gram: second moments of its inputs, (unknowns, unknowns); about their means where a bias or
            a normalization takes those up.
        columns: number of a group -> columns that read its units.
    """

    weight: Tensor
    gram: Tensor
    columns: Mapping[int, Columns]


class _State:
    """A layer some of whose columns are gone, all others adapted."""

    def __init__(self, reader: Reader, columns: Columns, units: int) -> None:
        self.weight = reader.weight.clone()
        self.inverse = torch.linalg.inv(regular(reader.gram))
        self.place = torch.full((units,), -1)
        self.place[columns.units] = torch.arange(len(columns.units))
        self.index = columns.index

    def add_costs(self, alive: Tensor, costs: Tensor) -> None:
        """Add what the removal of each of the units that are left would cost."""
        here = alive[self.place[alive] >= 0]
        if not len(here):
            return
        index = self.index[self.place[here]]
        weights = self.weight[:, index].permute(1, 2, 0)
        solved = torch.linalg.solve(self._block(index), weights)
        costs[here] += (weights * solved).sum((1, 2)).clamp_min(0)

    def remove(self, units: Tensor) -> None:
        """Take units out, and adapt what is left."""
        held = self.place[units]
        gone = self.index[held[held >= 0]].flatten()
        if not len(gone):
            return
        block = self.inverse[gone][:, gone]
        across = self.inverse[:, gone]
        self.weight -= (across @ torch.linalg.solve(block, self.weight[:, gone].T)).T
        self.inverse -= across @ torch.linalg.solve(block, across.T)
        self.weight[:, gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1

    def _block(self, index: Tensor) -> Tensor:
        block: Tensor = self.inverse[index[:, :, None], index[:, None, :]]
        return block


def order(readers: Sequence[tuple[Reader, Columns]], units: int) -> NDArray[np.int64]:
    """Units in the order in which they go, those first whose removal costs least.

    Args:
        readers: the layers that read the units, and with which columns.
        units: how many there are; those that no layer reads go first.

    Example:
        >>> reader = Reader(torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.eye(3).double(), {})
        >>> order([(reader, Columns(torch.arange(3), torch.arange(3)[:, None]))], 3).tolist()
        [1, 2, 0]
    """
    states = [_State(reader, columns, units) for reader, columns in readers]
    largest = max(len(reader.gram) for reader, _ in readers)
    step = 1 if largest <= EXACT else ceil(units / ROUNDS)
    alive = torch.arange(units)
    found: list[Tensor] = []
    while len(alive):
        costs = torch.zeros(units, dtype=torch.float64)
        for state in states:
            state.add_costs(alive, costs)
        first = alive[torch.argsort(costs[alive], stable=True)[:step]]
        for state in states:
            state.remove(first)
        found.append(first)
        alive = alive[~torch.isin(alive, first)]
    return torch.cat(found).numpy()


def adapted(reader: Reader, columns: Columns, gone: NDArray[np.int64]) -> Tensor:
    """The layer's weight without the columns that read some units, all others adapted at best.

    Args:
        reader: the layer.
        columns: those that read the group's units.
        gone: units that go.

    Returns:
        (outputs, unknowns), with zeros in the columns that go.
    """
    lost = columns.index[torch.isin(columns.units, torch.from_numpy(gone))].flatten()
    keep = torch.ones(len(reader.gram), dtype=torch.bool)
    keep[lost] = False
    found = torch.zeros_like(reader.weight)
    if keep.any():
        gram, cross = reader.gram[keep][:, keep], reader.gram[keep][:, lost]
        step = solved(regular(gram), cross.double() @ reader.weight[:, lost].T)
        found[:, keep] = reader.weight[:, keep] + step.T
    return found


def regular(gram: Tensor) -> Tensor:
    """A Gram matrix (n, n) that has an inverse, in float64."""
    exact = gram.double()
    scale = exact.diagonal().mean().clamp_min(1e-12)
    return exact + RIDGE * scale * torch.eye(len(exact), dtype=torch.float64)


def solved(gram: Tensor, right: Tensor) -> Tensor:
    """``x`` with ``gram x = right``, by Cholesky's factors unless rounding made it indefinite."""
    factor, fault = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve(gram, right) if fault else torch.cholesky_solve(right, factor)
