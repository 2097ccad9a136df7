"""Honest figures of exported files: latency in the runtime that serves them, and accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.batches import batches, logits
from rarefy.deployment.runtimes import OnnxSession, load_onnxruntime
from rarefy.errors import DataError, InputError
from rarefy.types import Data, Inputs, Latency, Measurement

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
    if runtime not in RUNTIMES:
        raise InputError(
            f"runtime={runtime!r}", "unknown runtime", f"Use one of {', '.join(RUNTIMES)}"
        )
    if not paths or rounds < 1 or warmup < 0:
        raise InputError(
            f"compare({len(paths)} paths, rounds={rounds}, warmup={warmup})",
            "there is nothing to measure",
            "Give at least one path and one round",
        )
    loaded = [RUNTIMES[runtime](Path(path), example_inputs, threads) for path in paths]
    end = time.monotonic() + max_seconds
    times = _time([runner for _, runner in loaded], rounds, warmup, end)
    return [
        Measurement(
            str(path), name, threads, Path(path).stat().st_size, latency(series), len(series)
        )
        for path, (name, _), series in zip(paths, loaded, times, strict=True)
    ]


def _time(runners: Sequence[Runner], rounds: int, warmup: int, end: float) -> list[list[int]]:
    """Nanoseconds of each call, per runner."""
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


def latency(nanoseconds: Sequence[int]) -> Latency:
    """Median, 10th and 90th percentile in milliseconds."""
    p10, median, p90 = np.percentile(np.asarray(nanoseconds), [10, 50, 90]) / 1e6
    return Latency(float(median), float(p10), float(p90))


def accuracy(predict: Callable[[Inputs], Any], data: Data) -> float:
    """Share of the examples whose largest logit is that of their class (top-1).

    Args:
        predict: inputs to logits of shape (batch, classes), or to an object that holds them, or
            to a list whose first entry they are, as an :class:`OnnxSession` returns.
        data: labelled batches; targets are class indices of shape (batch,).

    Returns:
        Between 0 and 1.

    Raises:
        DataError: a batch is not labelled, targets do not fit the logits, or a logit is NaN.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 0])
        >>> accuracy(lambda x: x, [(x, y)])
        0.5
    """
    right = total = 0
    with torch.no_grad():
        for inputs, targets in batches(data, "accuracy(data)"):
            scores = _scores(predict(inputs))
            classes = _classes(targets, scores)
            right += int((scores.argmax(1).cpu() == classes.cpu()).sum())
            total += len(classes)
    return right / total


def _scores(outputs: Any) -> Tensor:
    first = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
    scores = logits(first)
    if scores.ndim != 2:
        raise DataError(
            "accuracy(predict)",
            f"it returned shape {tuple(scores.shape)}",
            "Return logits of shape (batch, classes)",
        )
    if scores.isnan().any():
        raise DataError(
            "accuracy(predict)", "it returned NaN", "Check the inputs and the network's weights"
        )
    return scores


def _classes(targets: Tensor | None, scores: Tensor) -> Tensor:
    if targets is None:
        raise DataError(
            "accuracy(data)", "a batch has no targets", "Yield (inputs, targets) batches"
        )
    if not isinstance(targets, Tensor) or targets.shape != scores.shape[:1]:
        raise DataError(
            "accuracy(data)",
            f"targets {tuple(getattr(targets, 'shape', ()))} do not fit logits "
            f"{tuple(scores.shape)}",
            "Give class indices of shape (batch,)",
        )
    return targets
