"""Moments of parts against those of the whole."""

import pytest
import torch

from rarefy.pruning.repairing.moments import Moments


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_moments_of_parts_are_those_of_the_whole(dim, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(10, 3, 4, 3, generator=generator) * 2 + 5).to(dtype)
    moments = Moments(dim)
    for part in (x[:1], x[1:5], x[5:]):
        moments.add(part)
    flat = x.double().movedim(dim, 0).flatten(1)
    torch.testing.assert_close(moments.mean, flat.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance, flat.var(1, correction=0), rtol=1e-6, atol=0)
