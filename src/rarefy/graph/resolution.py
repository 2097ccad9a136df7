"""Ledger of ties, relations and fixings -> what can go, and what goes with it.

Ties make entries one component. Then relations are applied until nothing changes:

- a product that is fixed fixes its factors, and fixed factors fix their product;
- a product all but one of whose factors are fixed is that factor;
- one product in several relations of equal sizes ties their factors, in order;
- one product unflattened in two ways, ``(8, 4)`` and ``(4, 8)``, is related to the factors of
  both, ``(4, 2, 4)``; where the two do not fit each other (or only a part of the product is
  common), each keeps its longest factor, and the others are fixed.

Everything is arithmetic on whole arrays; there is no loop over entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from rarefy.graph.groups import Coupling, Mask
from rarefy.graph.labels import FIXED, Atoms, Ledger, Relation

FREE = np.iinfo(np.int64).max
"""The cause of what is not fixed."""

UNNAMED = FREE - 1
"""The cause of entries tied to one that never had a label."""

CONFLICT = "is split in two ways that do not fit each other"
TOGETHER = "its entries can only go all together"

Sizes: TypeAlias = tuple[int, ...]


def resolve(ledger: Ledger, lines: Iterable[Atoms] = ()) -> Coupling:
    """Find what can go, from everything a walk wrote down.

    Args:
        ledger: ties, relations and fixings; two of the latter are added, for what cannot go by
            the structure of the network itself.
        lines: dimensions of tensors, each of which keeps an entry whatever goes.
    """
    conflict, together = len(ledger.fixings), len(ledger.fixings) + 1
    for reason in (CONFLICT, TOGETHER):
        ledger.fix(np.zeros(0, np.int64), "", reason)
    lines = list({id(line): line for line in lines}.values())
    relations = list(ledger.relations)
    state = _begin(ledger)
    entries = _entries(relations)
    while True:
        products = _settled(entries, state)
        clashing = _clashing(products, state)
        if clashing.any():
            finer = _refined(relations, clashing, state, ledger)
            if finer is None:
                state.change(_longest_only(products, clashing, state, conflict))
                continue
            relations = finer
            entries = _entries(relations)
            state.grow(ledger.size)
            continue
        units = _units(products, state)
        coupling = _coupling(units, products, state)
        whole = _of_whole_lines(coupling, lines)
        if not len(whole):
            return coupling
        state.cause[units[whole]] = together


@dataclass(frozen=True)
class _Change:
    """What follows from relations: ties between atoms, and atoms to fix with their causes."""

    ties: tuple[tuple[Atoms, Atoms], ...] = ()
    fixings: tuple[tuple[Atoms, Atoms], ...] = ()


@dataclass
class _State:
    """What is known so far.

    Attributes:
        component: of each atom.
        cause: of each component, the least number of the fixings that hold it, or FREE.
    """

    component: NDArray[np.int64]
    cause: NDArray[np.int64]

    def change(self, change: _Change) -> bool:
        """Take over what follows; whether anything did."""
        before = len(self.cause), int((self.cause == FREE).sum())
        for atoms, causes in change.fixings:
            np.minimum.at(self.cause, self.component[atoms], causes)
        self._tie(change.ties)
        return before != (len(self.cause), int((self.cause == FREE).sum()))

    def _tie(self, ties: Iterable[tuple[Atoms, Atoms]]) -> None:
        pairs = [(self.component[a], self.component[b]) for a, b in ties]
        if not pairs:
            return
        merged = _components(len(self.cause), pairs)
        cause = np.full(int(merged.max()) + 1, FREE)
        np.minimum.at(cause, merged, self.cause)
        self.component, self.cause = merged[self.component], cause

    def grow(self, size: int) -> None:
        """Take in new atoms, each a component of its own."""
        new = size - len(self.component)
        numbers = np.arange(len(self.cause), len(self.cause) + new)
        self.component = np.concatenate([self.component, numbers])
        self.cause = np.concatenate([self.cause, np.full(new, FREE)])


def _begin(ledger: Ledger) -> _State:
    component = _components(ledger.size, ledger.ties)
    state = _State(component, np.full(int(component.max()) + 1, FREE))
    state.cause[component[FIXED]] = UNNAMED
    for number, fixing in enumerate(ledger.fixings):
        np.minimum.at(state.cause, component[fixing.atoms], number)
    return state


def _components(size: int, ties: Sequence[tuple[Atoms, Atoms]]) -> NDArray[np.int64]:
    rows = np.concatenate([a for a, _ in ties]) if ties else np.zeros(0, np.int64)
    columns = np.concatenate([b for _, b in ties]) if ties else np.zeros(0, np.int64)
    edges = csr_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)


# --- relations of equal sizes, as one ----------------------------------------------------------


@dataclass(frozen=True)
class _Entries:
    """The entries of all relations with these sizes, one after another.

    Attributes:
        sizes: of the factors.
        product: atoms, shape (entries,).
        factors: atoms, shape (factors, entries).
    """

    sizes: Sizes
    product: Atoms
    factors: Atoms

    def part(self, rows: Sequence[int] | Mask, columns: Mask) -> _Entries:
        """Some of the factors at some of the entries."""
        chosen = np.arange(len(self.sizes))[np.asarray(rows)]
        sizes = tuple(self.sizes[k] for k in chosen)
        return _Entries(sizes, self.product[columns], self.factors[chosen][:, columns])


def _joined(parts: Sequence[_Entries]) -> _Entries:
    return _Entries(
        parts[0].sizes,
        np.concatenate([part.product for part in parts]),
        np.concatenate([part.factors for part in parts], axis=1),
    )


def _by_sizes(parts: Iterable[_Entries]) -> tuple[_Entries, ...]:
    found: dict[Sizes, list[_Entries]] = {}
    for part in parts:
        found.setdefault(part.sizes, []).append(part)
    return tuple(_joined(same) for same in found.values())


def _entries(relations: Sequence[Relation]) -> tuple[_Entries, ...]:
    return _by_sizes(_Entries(r.sizes, r.product, np.stack(r.factors)) for r in relations)


def _live(entries: _Entries, state: _State) -> tuple[Mask, Mask]:
    """Which products are not fixed, and which factors are not."""
    free = state.cause[state.component[entries.product]] == FREE
    live = state.cause[state.component[entries.factors]] == FREE
    return free, live


def _implied(every: Sequence[_Entries], state: _State) -> _Change:
    """What fixed products and fixed factors imply."""
    ties: list[tuple[Atoms, Atoms]] = []
    fixings: list[tuple[Atoms, Atoms]] = []
    for entries in every:
        free, live = _live(entries, state)
        number = live.sum(0)
        held = live & ~free
        causes = state.cause[state.component[entries.product]]
        fixings.append((entries.factors[held], np.broadcast_to(causes, held.shape)[held]))
        dead = free & (number == 0)
        causes = state.cause[state.component[entries.factors[:, dead]]].min(0)
        fixings.append((entries.product[dead], causes))
        alone = np.flatnonzero(free & (number == 1))
        factor = entries.factors[live[:, alone].argmax(0), alone]
        ties.append(_unlike(entries.product[alone], factor, state))
    return _Change(tuple(pair for pair in ties if len(pair[0])), tuple(fixings))


def _unlike(first: Atoms, second: Atoms, state: _State) -> tuple[Atoms, Atoms]:
    """Those of the pairs that are not in one component yet."""
    differ = state.component[first] != state.component[second]
    return first[differ], second[differ]


def _products(every: Sequence[_Entries], state: _State) -> tuple[_Entries, ...]:
    """Entries that have several factors which are not fixed, with those factors only."""
    found = []
    for entries in every:
        free, live = _live(entries, state)
        pattern = (live << np.arange(len(live))[:, None]).sum(0)
        for bits in np.unique(pattern[free]):
            rows = (bits >> np.arange(len(live)) & 1).astype(np.bool_)
            if rows.sum() > 1:
                found.append(entries.part(rows, free & (pattern == bits)))
    return _by_sizes(found)


def _settled(entries: Sequence[_Entries], state: _State) -> tuple[_Entries, ...]:
    """Apply relations until nothing changes; return what is a product of several factors then."""
    while True:
        while state.change(_implied(entries, state)):
            pass
        products = _products(entries, state)
        if not state.change(_same_sizes(products, state)):
            return products


def _same_sizes(products: Sequence[_Entries], state: _State) -> _Change:
    """One product in several places: its factors there go together, in order."""
    ties = []
    for same in products:
        component = state.component[same.product]
        _, first, place = np.unique(component, return_index=True, return_inverse=True)
        ties += [_unlike(factor, factor[first[place]], state) for factor in same.factors]
    return _Change(tuple(pair for pair in ties if len(pair[0])))


def _clashing(products: Sequence[_Entries], state: _State) -> Mask:
    """For each component, whether it is a product with factors of different sizes."""
    number = np.zeros(len(state.cause), np.int64)
    for same in products:
        number[np.unique(state.component[same.product])] += 1
    return number > 1


# --- one product unflattened in several ways ---------------------------------------------------


def common_sizes(ways: Iterable[Sizes]) -> Sizes | None:
    """The coarsest sizes of which all those given are joined neighbors, if there are any.

    Example:
        >>> common_sizes([(8, 4), (4, 8)])
        (4, 2, 4)
        >>> common_sizes([(3, 4), (2, 6)]) is None
        True
    """
    steps = sorted({prod(sizes[k:]) for sizes in ways for k in range(len(sizes))})
    found = []
    for inner, outer in zip([1, *steps], steps, strict=False):
        if outer % inner:
            return None
        found.append(outer // inner)
    return tuple(reversed(found))


def _refined(
    relations: Sequence[Relation], clashing: Mask, state: _State, ledger: Ledger
) -> list[Relation] | None:
    """The relations with those of equal products and other sizes in common sizes, if possible."""
    alike: dict[bytes, list[int]] = {}
    for number, relation in enumerate(relations):
        products = state.component[relation.product]
        whole = prod(relation.sizes) == len(products)
        if whole and clashing[products].all() and _all_live(relation, state):
            alike.setdefault(products.tobytes(), []).append(number)
    new: dict[int, list[Relation]] = {}
    for numbers in alike.values():
        ways = {relations[n].sizes for n in numbers}
        sizes = common_sizes(ways) if len(ways) > 1 else None
        if sizes is not None:
            new |= {n: _finer(relations[n], sizes, ledger) for n in numbers}
    if not new:
        return None
    return [part for n, r in enumerate(relations) for part in new.get(n, [r])]


def _all_live(relation: Relation, state: _State) -> bool:
    return all(bool((state.cause[state.component[f]] == FREE).all()) for f in relation.factors)


def _finer(relation: Relation, sizes: Sizes, ledger: Ledger) -> list[Relation]:
    """The relation in finer sizes, and how its factors are made of the new ones."""
    parts: list[Atoms] = []
    added: list[Relation] = []
    axis = 0
    for k, size in enumerate(relation.sizes):
        grid = relation.factors[k].reshape(relation.sizes)
        line = np.moveaxis(grid, k, 0).reshape(size, -1)[:, 0]
        start = axis
        while prod(sizes[start:axis]) < size:
            axis += 1
        block = sizes[start:axis]
        new = [line] if len(block) == 1 else [ledger.fresh(n) for n in block]
        if len(block) > 1:
            added.append(Relation(line, block, _grids(new, block)))
        parts += new
    return [Relation(relation.product, sizes, _grids(parts, sizes)), *added]


def _grids(parts: Sequence[Atoms], sizes: Sizes) -> tuple[Atoms, ...]:
    return tuple(grid.ravel() for grid in np.meshgrid(*parts, indexing="ij", copy=False))


def _longest_only(
    products: Sequence[_Entries], clashing: Mask, state: _State, cause: int
) -> _Change:
    """Fix all factors but the longest where a product has factors of different sizes."""
    fixings = []
    for same in products:
        clash = clashing[state.component[same.product]]
        others = np.arange(len(same.sizes)) != np.argmax(same.sizes)
        atoms = same.factors[others][:, clash].ravel()
        fixings.append((atoms, np.full(len(atoms), cause)))
    return _Change((), tuple(fixings))


# --- what goes with a unit ---------------------------------------------------------------------


def _units(products: Sequence[_Entries], state: _State) -> Atoms:
    """Components that are free and no product: each is a unit."""
    alone = state.cause == FREE
    for same in products:
        alone[state.component[same.product]] = False
    return np.flatnonzero(alone)


def _coupling(units: Atoms, products: Sequence[_Entries], state: _State) -> Coupling:
    """Units take along the products of which they are factors, and the products of those."""
    count = len(state.cause)
    none = np.zeros(0, np.int64)
    rows = [np.tile(state.component[p.product], len(p.sizes)) for p in products]
    columns = [state.component[p.factors].ravel() for p in products]
    step = _ones(np.concatenate([none, *rows]), np.concatenate([none, *columns]), count, count)
    affects = _ones(units, np.arange(len(units)), count, len(units))
    while step.nnz:
        grown = csr_array(affects + step @ affects)
        grown.data[:] = 1
        if grown.nnz == affects.nnz:
            break
        affects = grown
    cause = np.where(state.cause >= UNNAMED, -1, state.cause)
    return Coupling(state.component, affects, state.cause != FREE, cause)


def _ones(rows: Atoms, columns: Atoms, height: int, width: int) -> csr_array:
    """A sparse matrix of ones at these places."""
    return csr_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(height, width))


def _of_whole_lines(coupling: Coupling, lines: Iterable[Atoms]) -> Atoms:
    """Units each of which takes all entries of some line."""
    found: set[int] = set()
    for line in (line for line in lines if len(line)):
        first, last = (set(coupling.pairs(line[[end]])[0].tolist()) for end in (0, -1))
        if first & last:  # few lines have any such unit
            units, counts = np.unique(coupling.pairs(line)[0], return_counts=True)
            found.update(units[counts == len(line)].tolist())
    return np.array(sorted(found), np.int64)
