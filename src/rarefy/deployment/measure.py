"""Honest figures of exported files: bytes, and latency in the runtime that serves them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rarefy.batches import batch_size
from rarefy.deployment.runtimes import OnnxSession, load_onnxruntime
from rarefy.errors import InputError
from rarefy.types import Inputs, Latency, Measurement

QUIET = 1.6
"""90th over 10th percentile of an undisturbed measurement, at most."""

MAX_SECONDS = 60.0
"""Wall time after which a comparison ends early, with at least one round."""


class Runner(Protocol):
    """A loaded file that can be called again and again on the same inputs."""

    def __call__(self) -> Any:
        """Run once."""


def _onnxruntime(path: Path, inputs: Inputs, threads: int) -> tuple[str, Runner]:
    session = OnnxSession(path, threads)
    feed = session.feed(inputs)
    return f"onnxruntime {load_onnxruntime().__version__}", lambda: session.run(feed)


RUNTIMES: Mapping[str, Callable[[Path, Inputs, int], tuple[str, Runner]]] = {
    "onnxruntime": _onnxruntime,
}
"""Name of a runtime -> (path, inputs, threads) -> its name with version, and a runner."""


def measure(
    path: str | Path,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    calls: int = 200,
    warmup: int = 20,
) -> Measurement:
    """Measure the latency of one file.

    Args:
        path: the file.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: a key of :data:`RUNTIMES`.
        threads: intra-op threads.
        calls: calls that are timed, at least 1; fewer after a minute.
        warmup: calls before them.

    Returns:
        Bytes of the file, and milliseconds per call.

    Raises:
        InputError: unknown runtime, no such file, or inputs that it does not take.
        MissingExtraError: the runtime is not installed.

    Example:
        >>> measure("net.onnx", torch.randn(1, 3, 32, 32)).latency_ms.median  # doctest: +SKIP
        0.41
    """
    return compare(
        [path], example_inputs, runtime=runtime, threads=threads, rounds=calls, warmup=warmup
    )[0]


def compare(
    paths: Sequence[str | Path],
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 200,
    warmup: int = 20,
    max_seconds: float = MAX_SECONDS,
) -> list[Measurement]:
    """Measure several files side by side: A B C, A B C, ..., so that all meet the same noise.

    Args:
        paths: the files.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: a key of :data:`RUNTIMES`.
        threads: intra-op threads.
        rounds: timed calls of each file, at least 1.
        warmup: calls of each file before them.
        max_seconds: wall time after which the rounds end.

    Returns:
        One measurement per path, in their order.

    Raises:
        InputError: no path, unknown runtime, no such file, or inputs that it does not take.
        MissingExtraError: the runtime is not installed.
    """
    options = (runtime, threads, rounds, warmup, max_seconds)
    return _measured(paths, example_inputs, *options)[0]


def relative(
    before: str | Path,
    after: str | Path,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 200,
    warmup: int = 20,
    max_seconds: float = MAX_SECONDS,
) -> tuple[Measurement, Measurement, float]:
    """Measure two files side by side, and the second's latency as a share of the first's.

    The share is the median, over all rounds, of the ratio of two calls one right after the other,
    since other programs that slow the machine down for a while slow down both; or the ratio of the
    10th percentiles where that is larger, since they interrupt long calls more often than short
    ones: a gain that is there in one of the two alone is noise.

    Args:
        before: the first file.
        after: the second file.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: a key of :data:`RUNTIMES`.
        threads: intra-op threads.
        rounds: timed calls of each file, at least 1.
        warmup: calls of each file before them.
        max_seconds: wall time after which the rounds end.

    Raises:
        InputError: unknown runtime, no such file, or inputs that it does not take.
        MissingExtraError: the runtime is not installed.
    """
    options = (runtime, threads, rounds, warmup, max_seconds)
    (first, second), times = _measured([before, after], example_inputs, *options)
    return first, second, _share(*(np.asarray(series) for series in times))


def _share(before: NDArray[np.int64], after: NDArray[np.int64]) -> float:
    """The larger of the median ratio of neighbors and the ratio of the 10th percentiles."""
    paired = float(np.median(after / np.maximum(before, 1)))
    return max(paired, float(np.percentile(after, 10) / max(np.percentile(before, 10), 1)))


def _measured(
    paths: Sequence[str | Path],
    example_inputs: Inputs,
    runtime: str,
    threads: int,
    rounds: int,
    warmup: int,
    max_seconds: float,
) -> tuple[list[Measurement], list[list[int]]]:
    """Measurements of files side by side, and the nanoseconds of their calls."""
    check_runtime(runtime)
    if not paths or rounds < 1 or warmup < 0:
        raise InputError(
            f"compare({len(paths)} paths, rounds={rounds}, warmup={warmup})",
            "there is nothing to measure",
            "Give at least one path and one round",
        )
    loaded = [RUNTIMES[runtime](Path(path), example_inputs, threads) for path in paths]
    end = time.monotonic() + max_seconds
    times = timed([runner for _, runner in loaded], rounds, warmup, end)
    batch = batch_size(example_inputs)
    found = [
        Measurement(
            str(path), name, threads, Path(path).stat().st_size, latency(series), len(series), batch
        )
        for path, (name, _), series in zip(paths, loaded, times, strict=True)
    ]
    return found, times


def check_runtime(runtime: str) -> None:
    """Refuse a runtime that is none.

    Raises:
        InputError: it is no key of :data:`RUNTIMES`.
    """
    if runtime not in RUNTIMES:
        raise InputError(
            f"runtime={runtime!r}", "unknown runtime", f"Use one of {', '.join(RUNTIMES)}"
        )


def timed(runners: Sequence[Runner], rounds: int, warmup: int, end: float) -> list[list[int]]:
    """Nanoseconds of each call, per runner, in turn; ``end`` is a time of ``time.monotonic``."""
    for _ in range(warmup):
        for runner in runners:
            runner()
        if time.monotonic() > end:
            break
    times: list[list[int]] = [[] for _ in runners]
    for _ in range(rounds):
        for runner, series in zip(runners, times, strict=True):
            start = time.perf_counter_ns()
            runner()
            series.append(time.perf_counter_ns() - start)
        if time.monotonic() > end:
            break
    return times


def settled(
    paths: Sequence[str | Path], example_inputs: Inputs, *, threads: int = 1, attempts: int = 3
) -> list[Measurement]:
    """As :func:`compare`, again where the machine was disturbed; the quietest attempt counts.

    Args:
        paths: the files.
        example_inputs: what every call is made with.
        threads: intra-op threads.
        attempts: how often at most; the first whose spreads (90th over 10th percentile) are all
            below :data:`QUIET` ends it.
    """
    tried: list[list[Measurement]] = []
    for _ in range(attempts):
        tried.append(compare(paths, example_inputs, threads=threads))
        if _unrest(tried[-1]) < QUIET:
            break
    return min(tried, key=_unrest)


def _unrest(measured: Sequence[Measurement]) -> float:
    return max(m.latency_ms.p90 / m.latency_ms.p10 for m in measured)


def speedup(before: Latency, after: Latency) -> float:
    """How many times lower a latency is: by the medians or the 10th percentiles, the lesser.

    Noise lengthens calls, long ones more often; a gain that is there in the medians alone is noise.

    Example:
        >>> speedup(Latency(8.0, 2.0, 9.0), Latency(1.0, 1.0, 1.1))
        2.0
    """
    pairs = ((before.median, after.median), (before.p10, after.p10))
    return min((long / short for long, short in pairs if short > 0), default=math.nan)


def latency(nanoseconds: Sequence[int]) -> Latency:
    """Median, 10th and 90th percentile in milliseconds."""
    p10, median, p90 = np.percentile(np.asarray(nanoseconds), [10, 50, 90]) / 1e6
    return Latency(float(median), float(p10), float(p90))
