"""Groups of units with equal footprints."""

import time

import numpy as np

from rarefy.graph.groups import group
from rarefy.graph.labels import Ledger
from rarefy.graph.resolution import resolve


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


def test_units_with_unequal_footprints_are_in_different_groups() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(3), ledger.fresh(4)
    ledger.tie(np.repeat(a[:2], 2), b)
    found = group(resolve(ledger), {("a.weight", 0): a, ("b.weight", 0): b})
    assert [len(g) for g in found] == [1, 2] or [len(g) for g in found] == [2, 1]
    pair = next(g for g in found if len(g) == 2)
    assert pair.members[1].indices.tolist() == [[0, 1], [2, 3]]


def test_units_of_no_tensor_are_in_no_group() -> None:
    ledger = Ledger()
    ledger.fresh(5)
    a = ledger.fresh(2)
    (found,) = group(resolve(ledger), {("a", 0): a})
    assert found.units.tolist() == [5, 6]


def test_groups_come_in_the_order_of_their_first_tensors() -> None:
    ledger = Ledger()
    a, b, c = (ledger.fresh(2) for _ in range(3))
    found = group(resolve(ledger), {("c.weight", 0): c, ("a.weight", 0): a, ("b.weight", 0): b})
    assert [g.name for g in found] == ["c", "a", "b"]


def test_entries_of_one_unit_are_told_apart_by_their_number() -> None:
    ledger = Ledger()
    a = ledger.fresh(4)
    tensors = {("a", 0): a, ("b", 0): a[[0, 0, 1, 2, 2, 3]], ("c", 0): a[[3, 1, 3, 1]]}
    found = group(resolve(ledger), tensors)
    assert [[m.path for m in g.members] for g in found] == [["a", "b", "c"], ["a", "b"]]
    assert [m.indices.tolist() for m in found[0].members] == [
        [[1], [3]],
        [[2], [5]],
        [[1, 3], [0, 2]],
    ]
    assert [m.indices.tolist() for m in found[1].members] == [[[0], [2]], [[0, 1], [3, 4]]]


def test_a_hundred_thousand_units_take_seconds_at_most() -> None:
    ledger = Ledger()
    layers = [ledger.fresh(1000) for _ in range(100)]
    tensors = {(f"{n}.weight", d): a for n, a in enumerate(layers) for d in (0, 1)}
    begin = time.process_time()
    found = group(resolve(ledger), tensors)
    assert [len(g) for g in found] == [1000] * 100
    assert time.process_time() - begin < 2
