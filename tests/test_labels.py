"""Views are exact arithmetic on labels."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.graph.labels import Ledger, blocks
from rarefy.graph.resolution import resolve

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 3, 4), (2, 12), [([0], [0]), ([1, 2], [1])]),
        ((2, 12), (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (6, 1, 2, 2), [([0, 1], [0]), ([2], [2, 3])]),
        ((4, 6), (6, 4), [([0, 1], [0, 1])]),
        ((1, 5), (5, 1, 1), [([1], [0])]),
    ],
)
def test_shapes_are_paired_in_minimal_blocks(before, after, expected) -> None:
    assert blocks(before, after) == expected


@given(SIZES)
def test_splitting_undoes_merging_of_one_label(sizes) -> None:
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        ledger = Ledger()
        labels = [ledger.fresh(n) if d == axis else None for d, n in enumerate(sizes)]
        merged = ledger.merge(labels, sizes)
        assert len(merged) == math.prod(sizes)
        again = ledger.split(merged, sizes)
        assert (again[axis] == labels[axis]).all()
        assert all(label is None for d, label in enumerate(again) if d != axis)
        assert not ledger.relations


@given(SIZES, st.data())
def test_a_product_goes_when_any_factor_goes(sizes, data) -> None:
    ledger = Ledger()
    labels = [ledger.fresh(n) for n in sizes]
    merged = ledger.merge(labels, sizes)
    coupling = resolve(ledger)
    chosen = data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)))
    atoms = np.concatenate(labels)
    removed = np.zeros(coupling.units, bool)
    for atom, gone in zip(atoms, chosen, strict=True):
        units, _ = coupling.pairs(np.array([atom]))
        removed[units] |= gone
    gone = coupling.gone(removed)
    assert (gone[atoms] == chosen).all()
    expected = np.zeros(sizes, bool)
    for axis, label in enumerate(labels):
        line = gone[label].reshape([-1 if d == axis else 1 for d in range(len(sizes))])
        expected = expected | line
    assert (gone[merged] == expected.ravel()).all()


def test_splitting_a_merged_dimension_otherwise_ties_what_must_go_together() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(6)
    merged = ledger.merge([a, b], [2, 6])
    c, d = ledger.split(merged, (4, 3))
    coupling = resolve(ledger)
    for unit in range(coupling.units):
        removed = np.arange(coupling.units) == unit
        gone = coupling.gone(removed)
        from_first = (gone[a][:, None] | gone[b]).ravel()
        from_second = (gone[c][:, None] | gone[d]).ravel()
        assert (from_first == gone[merged]).all()
        assert (from_second == gone[merged]).all()


def test_reshape_carries_untouched_dimensions() -> None:
    ledger = Ledger()
    channels = ledger.fresh(6)
    labels = ledger.reshape((None, channels, None, None), (2, 6, 4, 4), (2, 6, 16))
    assert labels[1] is channels
    flat = ledger.reshape(labels, (2, 6, 16), (2, 96))[1]
    assert (flat == np.repeat(channels, 16)).all()
