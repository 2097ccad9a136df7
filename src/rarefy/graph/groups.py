"""Ledger of ties, relations and fixings -> units that can go, and groups of equal units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from rarefy.graph.labels import FIXED, Atoms, Ledger

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


def resolve(ledger: Ledger) -> Coupling:
    """Find what can go, from everything a walk wrote down."""
    ties = list(ledger.ties)
    conflict = len(ledger.fixings)
    ledger.fix(np.zeros(0, np.int64), "", "is split in two ways that do not fit each other")
    fixed_atoms: dict[int, int] = {FIXED: -1}
    for number, fixing in enumerate(ledger.fixings):
        for atom in fixing.atoms:
            fixed_atoms.setdefault(int(atom), number)
    while True:
        component = _components(ledger.size, ties)
        cause = _causes(component, fixed_atoms)
        more_ties, more_fixed = _constraints(ledger, component, cause, conflict)
        if not more_ties and not more_fixed:
            break
        ties += more_ties
        fixed_atoms |= more_fixed
    fixed = cause != -2
    return Coupling(component, _affects(ledger, component, fixed), fixed, np.maximum(cause, -1))


def _components(size: int, ties: Sequence[tuple[Atoms, Atoms]]) -> NDArray[np.int64]:
    rows = np.concatenate([a for a, _ in ties]) if ties else np.zeros(0, np.int64)
    columns = np.concatenate([b for _, b in ties]) if ties else np.zeros(0, np.int64)
    edges = csr_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _causes(component: NDArray[np.int64], fixed_atoms: Mapping[int, int]) -> NDArray[np.int64]:
    """Per component: the fixing that holds it (-1: an entry that never had a label), or -2."""
    cause = np.full(int(component.max()) + 1, -2, np.int64)
    for atom, number in fixed_atoms.items():
        c = component[atom]
        cause[c] = number if cause[c] < 0 else min(cause[c], number) if number >= 0 else cause[c]
    return cause


def _constraints(
    ledger: Ledger, component: NDArray[np.int64], cause: NDArray[np.int64], conflict: int
) -> tuple[list[tuple[Atoms, Atoms]], dict[int, int]]:
    """What relations imply: new ties between factors, new fixed atoms."""
    ties: list[tuple[Atoms, Atoms]] = []
    fixed: dict[int, int] = {}
    first: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def fix(atom: int, reason: int) -> None:
        if cause[component[atom]] == -2:
            fixed.setdefault(int(atom), int(reason))

    for relation in ledger.relations:
        products = component[relation.product]
        held = cause[products]
        for e in np.flatnonzero(held != -2):
            for factor in relation.factors:
                fix(factor[e], held[e])
        factor_causes = np.stack([cause[component[f]] for f in relation.factors])
        for e in np.flatnonzero((factor_causes != -2).all(0) & (held == -2)):
            fix(relation.product[e], factor_causes[0, e])
        # one product, several places: its factors there go together too
        unique, where = np.unique(products, return_index=True)
        at = where[np.searchsorted(unique, products)]
        for factor in relation.factors:
            differ = component[factor] != component[factor[at]]
            if differ.any():
                ties.append((factor[differ], factor[at[differ]]))
        for c, e in zip(unique.tolist(), where.tolist(), strict=True):
            own = tuple(int(factor[e]) for factor in relation.factors)
            sizes, others = first.setdefault(c, (relation.sizes, own))
            if sizes != relation.sizes:
                fix(int(relation.product[e]), conflict)
                continue
            for a, b in zip(own, others, strict=True):
                if component[a] != component[b]:
                    ties.append((np.array([a]), np.array([b])))
    return ties, fixed


def _affects(ledger: Ledger, component: NDArray[np.int64], fixed: Mask) -> csr_array:
    """(components, units): free components that are no product are units of their own."""
    count = len(fixed)
    is_product = np.zeros(count, np.bool_)
    for relation in ledger.relations:
        is_product[component[relation.product]] = True
    units = np.flatnonzero(~fixed & ~is_product)
    affects = csr_array(
        (np.ones(len(units), np.int8), (units, np.arange(len(units)))), shape=(count, len(units))
    )
    rows = [component[r.product] for r in ledger.relations for _ in r.factors]
    columns = [component[f] for r in ledger.relations for f in r.factors]
    if not rows:
        return affects
    step = csr_array(
        (np.ones(sum(map(len, rows)), np.int8), (np.concatenate(rows), np.concatenate(columns))),
        shape=(count, count),
    )
    kept = np.flatnonzero(~fixed)
    free = csr_array((np.ones(len(kept), np.int8), (kept, kept)), shape=(count, count))
    while True:
        grown = csr_array(affects + free @ (step @ affects))
        grown.data[:] = 1
        if grown.nnz == affects.nnz:
            return affects
        affects = grown


def group(coupling: Coupling, tensors: Mapping[tuple[str, int], Atoms]) -> tuple[Group, ...]:
    """Units with equal footprints, in the order of their first tensors.

    Args:
        coupling: the resolved ledger.
        tensors: (path, dim) -> atoms, of all parameters and buffers in order of use.
    """
    footprint: list[list[tuple[int, int]]] = [[] for _ in range(coupling.units)]
    held: list[tuple[Atoms, Atoms]] = []
    for number, atoms in enumerate(tensors.values()):
        units, positions = coupling.pairs(atoms)
        order = np.argsort(units, kind="stable")
        held.append((units[order], positions[order]))
        for unit, count in zip(*np.unique(units, return_counts=True), strict=True):
            footprint[unit].append((number, int(count)))
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for unit, print_ in enumerate(footprint):
        if print_:
            kinds.setdefault(tuple(print_), []).append(unit)
    keys = list(tensors)
    groups = []
    for kind, members in sorted(kinds.items()):
        units = np.array(members, np.int64)
        dims = tuple(
            Member(*keys[number], _rows(held[number], units, count)) for number, count in kind
        )
        groups.append(Group(_name(dims), units, dims))
    return tuple(groups)


def _rows(held: tuple[Atoms, Atoms], units: Atoms, count: int) -> Atoms:
    """Positions of each unit, shape (units, count)."""
    start = np.searchsorted(held[0], units)
    rows: Atoms = held[1][start[:, None] + np.arange(count)]
    return rows


def _name(members: Sequence[Member]) -> str:
    produced = [m for m in members if m.dim == 0] or list(members)
    return produced[0].path.rpartition(".")[0] or produced[0].path
