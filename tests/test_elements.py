"""Scores of single weights, against definitions written out."""

from __future__ import annotations

import pytest

from rarefy.errors import InputError
from rarefy.pruning import elements
from rarefy.pruning.elements import SparseGPT, Wanda


def test_names_are_looked_up_and_refused() -> None:
    assert elements.named("wanda") == Wanda()
    assert elements.named(SparseGPT(damp=0.1)) == SparseGPT(damp=0.1)
    with pytest.raises(InputError, match="sparsegpt"):
        elements.named("sparsegtp")


BAD = [
    lambda: Wanda(0),
    lambda: SparseGPT(samples=0),
    lambda: SparseGPT(damp=0.0),
    lambda: SparseGPT(block=0),
]


@pytest.mark.parametrize("make", BAD)
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()
