"""Which entries go when units go, and groups of equal units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rarefy.graph.labels import Atoms

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """Entries ``indices`` along ``dim`` of the parameter or buffer at ``path``."""

    path: str
    dim: int
    indices: Atoms


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor in a group; ``indices[u]`` are the entries of unit ``u``.

    Attributes:
        path: parameter or buffer.
        dim: the dimension that shrinks.
        indices: shape (units, entries per unit).
    """

    path: str
    dim: int
    indices: Atoms


@dataclass(frozen=True)
class Group:
    """Units of one kind: removing any of them takes equally many entries from the same tensors.

    Attributes:
        name: path of the first layer whose outputs these units are.
        units: numbers of the units within their :class:`Coupling`.
        members: every dimension of every tensor that shrinks with a unit.
    """

    name: str
    units: Atoms
    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.units)

    def slices(self, unit: int) -> tuple[Slice, ...]:
        """What goes with the ``unit``-th unit of this group."""
        return tuple(Slice(m.path, m.dim, m.indices[unit]) for m in self.members)


@dataclass(frozen=True)
class Coupling:
    """Which entries go when a set of units goes.

    Attributes:
        component: for each atom, its connected component.
        affects: (components, units), true where removing the unit removes the component.
        fixed: for each component, whether it can never go.
        cause: for each fixed component, the number of the fixing that caused it, else -1.
    """

    component: NDArray[np.int64]
    affects: csr_array
    fixed: Mask
    cause: NDArray[np.int64]

    @property
    def units(self) -> int:
        """Number of removable units."""
        return int(self.affects.shape[1])

    def gone(self, removed: Mask) -> Mask:
        """For each atom, whether it goes when the units marked in ``removed`` go."""
        hit = self.affects @ removed.astype(np.int32) > 0
        return np.asarray(hit[self.component], dtype=np.bool_)

    @cached_property
    def by_component(self) -> tuple[Atoms, Atoms]:
        """CSR arrays of ``affects``: row pointers and unit numbers."""
        return self.affects.indptr.astype(np.int64), self.affects.indices.astype(np.int64)

    def pairs(self, atoms: Atoms) -> tuple[Atoms, Atoms]:
        """All (unit, position) with the entry at that position going with that unit."""
        start, columns = self.by_component
        components = self.component[atoms]
        lengths = start[components + 1] - start[components]
        positions = np.repeat(np.arange(len(atoms)), lengths)
        offsets = np.arange(len(positions)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return columns[np.repeat(start[components], lengths) + offsets], positions


def group(
    coupling: Coupling, tensors: Mapping[tuple[str, int], Atoms], among: Mask | None = None
) -> tuple[Group, ...]:
    """Units with equal footprints, in the order of their first tensors.

    Args:
        coupling: the resolved ledger.
        tensors: (path, dim) -> atoms, of all parameters and buffers in order of use.
        among: which units to group; all where it is not given.
    """
    held = [_by_unit(*coupling.pairs(atoms)) for atoms in tensors.values()]
    kind = _kinds(held, coupling.units)
    order = np.argsort(kind, kind="stable")
    if among is not None:
        order = order[among[order]]
    members = np.split(order, np.flatnonzero(np.diff(kind[order])) + 1)
    footprint: dict[int, list[tuple[int, int]]] = {}
    for number, entries in enumerate(held):
        kinds, first = np.unique(kind[entries.units], return_index=True)
        for k, count in zip(kinds.tolist(), entries.counts[first].tolist(), strict=True):
            footprint.setdefault(k, []).append((number, count))
    keys = list(tensors)
    groups = []
    for units in sorted(
        (u for u in members if len(u)), key=lambda u: footprint.get(kind[u[0]], [])
    ):
        dims = tuple(
            Member(*keys[number], held[number].rows(units, count))
            for number, count in footprint.get(kind[units[0]], [])
        )
        if dims:
            groups.append(Group(_name(dims), units, dims))
    return tuple(groups)


@dataclass(frozen=True)
class _Held:
    """Entries of one dimension of one tensor by unit.

    Attributes:
        units: the units that take entries with them, in order.
        counts: how many entries each takes.
        start: where those of each begin in ``positions``.
        positions: all entries, unit by unit.
    """

    units: Atoms
    counts: Atoms
    start: Atoms
    positions: Atoms

    def rows(self, units: Atoms, count: int) -> Atoms:
        """Positions of each of these units, all of which take ``count``: (units, count)."""
        start = self.start[np.searchsorted(self.units, units)]
        rows: Atoms = self.positions[start[:, None] + np.arange(count)]
        return rows

    def adjacent(self) -> Atoms:
        """For each unit, 1 where its first two entries lie side by side, else 0."""
        second = np.minimum(self.start + 1, len(self.positions) - 1)
        beside = self.positions[second] == self.positions[self.start] + 1
        found: Atoms = (beside & (self.counts > 1)).astype(np.int64)
        return found


def _by_unit(units: Atoms, positions: Atoms) -> _Held:
    order = np.argsort(units, kind="stable")
    found, start, counts = np.unique(units[order], return_index=True, return_counts=True)
    return _Held(found, counts, start, positions[order])


def _kinds(held: Sequence[_Held], units: int) -> Atoms:
    """For each unit, a number that is equal for units with footprints of one form."""
    kind = np.zeros(units, np.int64)
    known = 1
    for entries in held:
        side = 2 * entries.counts + entries.adjacent()  # a head and a position in all heads differ
        key = kind[entries.units] * (2 * len(entries.positions) + 2) + side
        _, new = np.unique(key, return_inverse=True)
        kind[entries.units] = known + new
        known += len(new)
    return kind


def _name(members: Sequence[Member]) -> str:
    produced = [m for m in members if m.dim == 0] or list(members)
    path = produced[0].path.partition(".parametrizations.")[0]  # the layer, not its list of these
    if path != produced[0].path:
        return path
    return path.rpartition(".")[0] or path
