"""Shares of latencies: what they are, and how sure they are."""

import numpy as np
import pytest

from rarefy.deployment.ratios import paired
from rarefy.types import Ratio


def noisy(generator: np.random.Generator, base: float, load: np.ndarray) -> list[int]:
    return (1e6 * base * load * generator.lognormal(0, 0.05, len(load))).astype(int).tolist()


def loads(generator: np.random.Generator, count: int) -> np.ndarray:
    """What other programs do: for a while the machine is half as fast."""
    return np.repeat(generator.choice([1.0, 2.0], count // 20), 20)


def test_a_share_without_noise_is_exact() -> None:
    assert paired([20] * 7, [5] * 7) == Ratio.exact(0.25)
    assert paired([20], [30]) == Ratio.exact(1.5)


@pytest.mark.parametrize("share", [0.5, 0.95, 1.3])
def test_the_interval_holds_the_share_and_narrows(share: float) -> None:
    held, widths = 0, {200: [], 800: []}
    for seed in range(40):
        generator = np.random.default_rng(seed)
        for count, noise in widths.items():
            load = loads(generator, count)
            found = paired(noisy(generator, 1, load), noisy(generator, share, load))
            held += found.low <= share * 1.005 and found.high >= share
            noise.append(found.noise)
            assert found.low <= found.value <= found.high
    assert held >= 0.85 * 80
    assert np.mean(widths[800]) < 0.7 * np.mean(widths[200])


def test_the_same_calls_give_the_same_interval() -> None:
    load = loads(np.random.default_rng(0), 100)
    a, b = (noisy(np.random.default_rng(n), 1, load) for n in (1, 2))
    assert paired(a, b) == paired(a, b)


def test_a_share_is_printed_with_its_interval() -> None:
    assert str(Ratio(0.5, 0.48, 0.51)) == "0.500 (0.480 to 0.510)"
    assert str(Ratio.exact(0.5)) == "0.500"
