"""Calls of several in turn, so that all meet the same noise, and how long each of them takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

from rarefy.deployment.ratios import Series
from rarefy.types import Latency

REPLICATES = 8
"""Replicates of a comparison, at least, each in sessions that are opened anew."""

LEAST_ROUNDS = 50
"""Rounds of the first :data:`REPLICATES`, where the interval tells when they suffice."""

WARM = 0.01
"""Seconds of calls before which a new session is not warm, however short its calls are."""

Runner: TypeAlias = Callable[[], Any]
"""Calls what is loaded, again and again on the same inputs."""

Anew: TypeAlias = Callable[[Sequence[int]], AbstractContextManager[Sequence[Runner]]]
"""The numbers of what is compared, in an order -> what runs new sessions of them."""


def replicated(
    first: Sequence[Runner],
    anew: Anew,
    rounds: int,
    warmup: int,
    end: float,
    enough: Callable[[Sequence[Series]], bool] | None = None,
) -> list[Series]:
    """Nanoseconds of each call in several replicates, each in sessions of its own.

    Each opens and calls in another order, turn and turn about, so that none is always first. A
    single runner has no replicates: there is nothing that it is compared with.

    Args:
        first: what is called in the first replicate.
        anew: what is called in the others.
        rounds: calls of each, in all replicates.
        warmup: calls of each before those of the first replicate, and about as many before those of
            the others together, more where calls are short (:data:`WARM`).
        end: the time of ``time.monotonic`` after which the rounds end, one at least.
        enough: whether the calls so far suffice, asked whenever all orders had their turn. Rounds
            then take as long as opening the sessions and warming them, or are a replicate's part
            of :data:`LEAST_ROUNDS`.
    """
    count = len(first)
    planned = count * max(2, -(-REPLICATES // count)) if count > 1 else 1
    limit = (end - time.monotonic()) / planned
    times = [Series() for _ in first]
    for number in itertools.count():
        order = [(number + n) % count for n in range(count)]
        start = time.monotonic()
        with anew(order) if number else nullcontext([first[n] for n in order]) as runners:
            opened, left = time.monotonic(), rounds - len(times[0].wall)
            most = -(-left // max(planned - number, 1))
            found = timed(
                runners,
                min(most, -(-LEAST_ROUNDS // planned)) if enough else most,
                -(-warmup // planned) if number else warmup,
                min(end, start + limit),
                warm=WARM if warmup and count > 1 else 0.0,
                most=min(most, -(-rounds // planned)),
                lasting=opened - start + WARM,
            )
        for n, series in zip(order, found, strict=True):
            times[n].add(series)
        turned = number + 1 >= planned and (number + 1) % count == 0
        if len(times[0].wall) >= rounds or time.monotonic() > end:
            break
        if enough and turned and enough(times):
            break
    return times


def timed(
    runners: Sequence[Runner],
    rounds: int,
    warmup: int,
    end: float,
    *,
    warm: float = 0.0,
    most: int = 0,
    lasting: float = 0.0,
) -> list[Series]:
    """Nanoseconds of each call, per runner, in turn.

    Args:
        runners: what is called.
        rounds: calls of each.
        warmup: calls of each before them.
        end: the time of ``time.monotonic`` after which the rounds end, one at least.
        warm: seconds that the calls before them take at least.
        most: calls of each, at most, where the rounds end before they took ``lasting`` seconds.
        lasting: those seconds.
    """
    start = time.monotonic()
    for number in itertools.count():
        if number >= warmup and time.monotonic() - start >= warm:
            break
        for runner in runners:
            runner()
        if time.monotonic() > end:
            break
    times = [Series() for _ in runners]
    start = time.monotonic()
    for done in range(1, max(rounds, most) + 1):
        for runner, series in zip(runners, times, strict=True):
            busy, begun = time.process_time_ns(), time.perf_counter_ns()
            runner()
            series.wall.append(time.perf_counter_ns() - begun)
            series.busy.append(time.process_time_ns() - busy)
        now = time.monotonic()
        if now > end or (done >= rounds and now - start >= lasting):
            break
    return times


def latency(nanoseconds: Sequence[int]) -> Latency:
    """Median, 10th and 90th percentile in milliseconds."""
    p10, median, p90 = np.percentile(np.asarray(nanoseconds), [10, 50, 90]) / 1e6
    return Latency(float(median), float(p10), float(p90))
