"""Ties, relations and fixings -> units and groups."""

import numpy as np

from rarefy.graph.groups import group, resolve
from rarefy.graph.labels import FIXED, Ledger


def units_of(ledger: Ledger, tensors: dict) -> list[list[int]]:
    """Sizes of the groups and the positions of their units in their first members."""
    return [g.members[0].indices.tolist() for g in group(resolve(ledger), tensors)]


def test_a_ledger_without_ties_has_a_unit_for_every_atom() -> None:
    ledger = Ledger()
    a = ledger.fresh(3)
    assert units_of(ledger, {("w", 0): a}) == [[[0], [1], [2]]]


def test_tied_entries_are_one_unit() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(3), ledger.fresh(3)
    ledger.tie(a, b[::-1])
    (found,) = group(resolve(ledger), {("a.weight", 0): a, ("b.weight", 1): b})
    assert found.name == "a"
    assert len(found) == 3
    assert [m.indices.ravel().tolist() for m in found.members] == [[0, 1, 2], [2, 1, 0]]
    assert [(s.path, s.indices.tolist()) for s in found.slices(0)] == [
        ("a.weight", [0]),
        ("b.weight", [2]),
    ]


def test_what_is_tied_to_a_fixed_entry_is_fixed_with_its_cause() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    ledger.tie(a, b)
    ledger.fix(b[:1], "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.units == 1
    assert coupling.fixed[coupling.component[a]].tolist() == [True, False]
    cause = coupling.cause[coupling.component[a[0]]]
    assert ledger.fixings[cause].reason == "a reason"


def test_entries_that_never_had_a_label_fix_without_a_cause() -> None:
    ledger = Ledger()
    a = ledger.fresh(2)
    ledger.tie(a, np.array([FIXED, FIXED]))
    coupling = resolve(ledger)
    assert coupling.units == 0
    assert (coupling.cause[coupling.component[a]] == -1).all()


def test_a_fixed_product_fixes_its_factors() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.fix(product[:1], "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.fixed[coupling.component[[a[0], b[0]]]].all()
    assert not coupling.fixed[coupling.component[[a[1], b[1]]]].any()
    assert coupling.fixed[coupling.component[product]].tolist() == [True, False, False, False]


def test_fixed_factors_fix_their_product() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.fix(np.concatenate([a, b]), "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.fixed[coupling.component[product]].all()


def test_tied_products_tie_their_factors() -> None:
    ledger = Ledger()
    a, b, c, d = (ledger.fresh(n) for n in (2, 3, 2, 3))
    ledger.tie(ledger.merge([a, b], [2, 3]), ledger.merge([c, d], [2, 3]))
    coupling = resolve(ledger)
    assert (coupling.component[a] == coupling.component[c]).all()
    assert (coupling.component[b] == coupling.component[d]).all()
    assert coupling.units == 5


def test_products_of_one_relation_that_are_one_entry_tie_their_factors() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.tie(product[:2], product[2:])
    coupling = resolve(ledger)
    assert coupling.component[a[0]] == coupling.component[a[1]]


def test_a_product_split_in_two_ways_that_do_not_fit_is_frozen_and_named() -> None:
    ledger = Ledger()
    a = ledger.fresh(12)
    ledger.split(a, (3, 4))
    ledger.split(a, (2, 6))
    coupling = resolve(ledger)
    assert coupling.units == 0
    causes = {ledger.fixings[c].reason for c in coupling.cause[coupling.component[a]]}
    assert causes == {"is split in two ways that do not fit each other"}


def test_units_with_unequal_footprints_are_in_different_groups() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(3), ledger.fresh(4)
    ledger.tie(np.repeat(a[:2], 2), b)
    found = group(resolve(ledger), {("a.weight", 0): a, ("b.weight", 0): b})
    assert [len(g) for g in found] == [1, 2] or [len(g) for g in found] == [2, 1]
    pair = next(g for g in found if len(g) == 2)
    assert pair.members[1].indices.tolist() == [[0, 1], [2, 3]]
