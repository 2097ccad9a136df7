"""Calls in turn: their order, their number, and what of their time counts."""

import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

from rarefy.deployment.ratios import FINE
from rarefy.deployment.rounds import latency, replicated, timed


def test_what_other_programs_take_is_not_counted():
    """A pause is time on the wall, and none of the processor's."""
    (series,) = timed([lambda: time.sleep(0.02)], 3, 0, float("inf"))
    assert min(series.wall) >= 20e6
    if FINE:
        assert max(series.undisturbed(1)) < 10e6
    assert series.undisturbed(2) == series.wall


@contextmanager
def renewed(runners, orders, order):
    orders.append(tuple(order))
    yield [runners[n] for n in order]


def test_calls_end_when_they_suffice(monkeypatch):
    monkeypatch.setattr("rarefy.deployment.rounds.WARM", 0.0)
    asked = []

    def enough(times):
        asked.append(len(times[0].starts))
        return len(asked) == 2

    runners = [lambda: time.sleep(1e-3)] * 2
    times = replicated(runners, partial(renewed, runners, []), 10_000, 0, float("inf"), enough)
    assert asked == [8, 10]
    assert len(times[0].wall) == len(times[1].wall) == 70


def test_every_replicate_opens_sessions_in_another_order():
    for count in (1, 2, 3, 5):
        orders, called = [tuple(range(count))], []
        runners = [partial(called.append, n) for n in range(count)]
        times = replicated(runners, partial(renewed, runners, orders), 40, 0, float("inf"))
        assert Counter(called) == dict.fromkeys(range(count), 40)
        assert len(orders) == {1: 1, 2: 8, 3: 9, 5: 10}[count]
        places = Counter((place, n) for order in orders for place, n in enumerate(order))
        assert len(set(places.values())) == 1
        assert all(len(series.starts) == len(orders) for series in times)
        assert called[: 2 * count] == [*range(count)] * 2
        assert tuple(called[-count:]) == orders[-1]


def test_few_calls_are_few_replicates():
    orders, runners = [(0, 1)], [lambda: None] * 2
    for rounds in (1, 3):
        times = replicated(runners, partial(renewed, runners, orders), rounds, 0, float("inf"))
        assert [len(series.starts) for series in times] == [rounds] * 2
    times = replicated(runners, partial(renewed, runners, orders), 100, 5, 0.0)
    assert [len(series.wall) for series in times] == [1, 1]


def test_calls_are_interleaved_and_bounded():
    order = []
    runners = [lambda: order.append("a"), lambda: order.append("b")]
    times = timed(runners, 3, 1, float("inf"))
    assert "".join(order) == "ab" * 4
    assert [len(series.wall) for series in times] == [3, 3]
    assert [len(series.busy) for series in timed(runners, 100, 100, 0.0)] == [1, 1]


def test_latency_is_in_milliseconds():
    assert latency([1_000_000] * 9 + [50_000_000]).median == 1
