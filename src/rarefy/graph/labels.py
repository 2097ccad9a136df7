"""Labels per index of every dimension: which entries of which tensors are the same unit.

Each dimension of each tensor carries an integer array, one *atom* per index, or None where the
dimension cannot change. Operators tie atoms together (they can only go at once), fix them (they
cannot go), or relate them as products: where a dimension is merged from, or split into, two
labelled ones, an entry is removed if and only if any of its factors' entries is. Views are exact
arithmetic on these small arrays. Nothing is resolved while the graph is walked: ties are edges,
and :mod:`rarefy.graph.groups` finds the connected components once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Atoms: TypeAlias = NDArray[np.int64]
Labels: TypeAlias = "tuple[Atoms | None, ...]"
"""One array or None per dimension of a tensor."""

FIXED = 0
"""The atom of entries that can never go."""


@dataclass(frozen=True)
class Relation:
    """Entry ``product[e]`` is removed iff any ``factors[k][e]`` is; all arrays have one length.

    ``sizes[k]`` is the number of entries of the dimension that factor ``k`` belongs to.
    """

    product: Atoms
    sizes: tuple[int, ...]
    factors: tuple[Atoms, ...]


@dataclass(frozen=True)
class Fixing:
    """Why some atoms cannot be removed."""

    atoms: Atoms
    node: str
    reason: str


@dataclass
class Ledger:
    """Everything that a walk over the graph found out about atoms."""

    size: int = 1
    ties: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    fixings: list[Fixing] = field(default_factory=list)

    def fresh(self, n: int) -> Atoms:
        """``n`` new atoms."""
        start = self.size
        self.size += n
        return np.arange(start, start + n, dtype=np.int64)

    def tie(self, first: Atoms, second: Atoms) -> None:
        """Entries at equal positions go together."""
        self.ties.append((first, second))

    def fix(self, atoms: Atoms, node: str, reason: str) -> None:
        """These atoms cannot go."""
        self.fixings.append(Fixing(np.unique(atoms), node, reason))

    def merge(self, labels: Sequence[Atoms | None], sizes: Sequence[int]) -> Atoms | None:
        """Labels of one dimension that flattens several, row-major."""
        if all(label is None for label in labels):
            return None
        factors = [
            np.broadcast_to(_along(label, axis, len(sizes)), sizes).ravel()
            for axis, label in enumerate(labels)
            if label is not None
        ]
        if len(factors) == 1:
            return factors[0]
        product = self.fresh(prod(sizes))
        labelled = [n for n, label in zip(sizes, labels, strict=True) if label is not None]
        self.relations.append(Relation(product, tuple(labelled), tuple(factors)))
        return product

    def split(self, atoms: Atoms | None, sizes: Sequence[int]) -> Labels:
        """Labels of the dimensions into which one dimension is unflattened, row-major.

        Where the labels vary along one of the new dimensions only, they move there: this undoes
        the merging of batch and heads, windows, tiles. Otherwise each varying dimension gets new
        atoms, related to the old ones as factors.
        """
        if atoms is None:
            return (None,) * len(sizes)
        grid = atoms.reshape(sizes)
        varying = [
            axis
            for axis, size in enumerate(sizes)
            if size > 1 and bool((grid != grid.take([0], axis)).any())
        ]
        if not varying:
            return (None,) * len(sizes)
        found: list[Atoms | None] = [None] * len(sizes)
        if len(varying) == 1:
            line = np.moveaxis(grid, varying[0], 0).reshape(sizes[varying[0]], -1)
            found[varying[0]] = line[:, 0]
            return tuple(found)
        for axis in varying:
            found[axis] = self.fresh(sizes[axis])
        factors = tuple(
            np.broadcast_to(_along(found[axis], axis, len(sizes)), sizes).ravel()
            for axis in varying
        )
        self.relations.append(Relation(atoms, tuple(sizes[axis] for axis in varying), factors))
        return tuple(found)

    def reshape(self, labels: Labels, before: Sequence[int], after: Sequence[int]) -> Labels:
        """Labels of a tensor of shape ``before`` viewed as ``after``."""
        found: list[Atoms | None] = [None] * len(after)
        for old, new in blocks(before, after):
            if all(labels[d] is None for d in old):
                continue
            if len(old) == len(new) == 1:
                found[new[0]] = labels[old[0]]
                continue
            merged = self.merge([labels[d] for d in old], [before[d] for d in old])
            for d, label in zip(new, self.split(merged, [after[d] for d in new]), strict=True):
                found[d] = label
        return tuple(found)


def _along(label: Atoms | None, axis: int, ndim: int) -> Atoms:
    assert label is not None
    shape = [1] * ndim
    shape[axis] = -1
    return label.reshape(shape)


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair dimensions of two shapes of equal size into minimal blocks of equal product.

    Dimensions of size 1 carry no label and belong to no block.

    Example:
        >>> blocks((2, 3, 4), (6, 1, 2, 2))
        [([0, 1], [0]), ([2], [2, 3])]
    """
    old = [d for d, n in enumerate(before) if n != 1]
    new = [d for d, n in enumerate(after) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [old[i]], [new[j]]
        a, b = before[old[i]], after[new[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                left.append(old[i])
                a *= before[old[i]]
                i += 1
            else:
                right.append(new[j])
                b *= after[new[j]]
                j += 1
        found.append((left, right))
    return found
