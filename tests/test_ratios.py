"""Shares of latencies: what they are, and how sure they are."""

import numpy as np
import pytest
import scipy.stats

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


def replicates(seed: int, share: float, count: int) -> Ratio:
    """Sessions differ by 1 %, and the one that is opened first is 3 % slower."""
    generator = np.random.default_rng(seed)
    before, after, starts = [], [], []
    for number in range(count):
        starts.append(len(before))
        load, first = loads(generator, 40), 1.03 if number % 2 == 0 else 1 / 1.03
        session = generator.lognormal(0, 0.01)
        before += noisy(generator, first, load)
        after += noisy(generator, share * session, load)
    return paired(before, after, starts, 2)


@pytest.mark.parametrize("share", [0.95, 1.0])
def test_the_interval_knows_that_sessions_differ(share: float) -> None:
    found = [replicates(seed, share, 8) for seed in range(100)]
    held = [one.low <= share <= one.high for one in found]
    assert 90 <= sum(held) <= 99
    assert np.mean([one.noise for one in found]) < 0.025
    assert (share == 1) or sum(one.high < 1 for one in found) >= 90
    wide = np.mean([one.noise for one in found])
    assert np.mean([replicates(seed, share, 32).noise for seed in range(20)]) < 0.6 * wide


def test_an_order_is_no_noise() -> None:
    starts = [0, 10, 20, 30]
    before, after = [100] * 40, ([110] * 10 + [90] * 10) * 2
    found = paired(before, after, starts, 2)
    assert found.low == pytest.approx(found.high) == pytest.approx(np.sqrt(1.1 * 0.9))
    assert paired(before, after, starts).low < 0.9
    assert paired(before[:20], after[:20], starts[:2], 2).low < 0.5  # one of each order


def test_the_interval_is_students() -> None:
    shares = np.array([1.0, 1.02, 0.99, 1.05])
    found = paired([1000] * 20, np.repeat(1000 * shares, 5).astype(int).tolist(), [0, 5, 10, 15])
    logs = np.log(shares)
    expected = scipy.stats.t.interval(0.95, 3, logs.mean(), scipy.stats.sem(logs))
    assert np.log([found.low, found.high]) == pytest.approx(expected)


def test_the_same_calls_give_the_same_interval() -> None:
    load = loads(np.random.default_rng(0), 100)
    a, b = (noisy(np.random.default_rng(n), 1, load) for n in (1, 2))
    assert paired(a, b) == paired(a, b)


def test_a_share_is_printed_with_its_interval() -> None:
    assert str(Ratio(0.5, 0.48, 0.51)) == "0.500 (0.480 to 0.510)"
    assert str(Ratio.exact(0.5)) == "0.500"


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ([10] * 20, [5] * 20, 0.5),
        ([10] * 10 + [30] * 10, [5] * 10 + [15] * 10, 0.5),  # both slowed down together
        ([10] * 3 + [100] * 17, [5] * 20, 0.5),  # long calls are interrupted, short ones are not
        ([10] * 20, [1] * 3 + [5] * 17, 0.5),  # a few short calls are luck
    ],
)
def test_noise_does_not_make_a_network_faster(before: list, after: list, share: float) -> None:
    found = paired(before, after)
    assert found.value == share
    assert found.low <= share <= found.high
