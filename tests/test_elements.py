"""Scores of single weights, against definitions written out."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import InputError
from rarefy.pruning import elements
from rarefy.pruning.elements import SparseGPT, Wanda


def test_lamp_is_its_formula() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    flat = weight.double().flatten()
    expected = [float(w**2 / sum(v**2 for v in flat if abs(v) >= abs(w))) for w in flat]
    found = elements.lamp(weight).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(found.argsort(), elements.magnitude(weight).flatten().argsort())
    assert not elements.lamp(torch.zeros(2, 2)).any()


def test_random_draws_nothing_from_the_global_state() -> None:
    before = torch.get_rng_state()
    one = elements.random(torch.zeros(3, 4))
    assert torch.equal(one, elements.random(torch.ones(3, 4)))
    assert torch.equal(before, torch.get_rng_state())


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
