"""Honest figures of files and networks, in the runtime that serves them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

from torch import nn

from rarefy.batches import batch_size
from rarefy.deployment.memory import peak_mb
from rarefy.deployment.opening import Served, prepared
from rarefy.deployment.ratios import Series, paired
from rarefy.deployment.rounds import Runner, latency, replicated
from rarefy.deployment.runtimes import Session, runtime_named
from rarefy.errors import CaptureError, InputError
from rarefy.graph.count import count
from rarefy.metrics import top1
from rarefy.storage.format import save
from rarefy.types import Data, Inputs, Latency, Measurement, Ratio

QUIET = 1.6
"""90th over 10th percentile of an undisturbed measurement, at most."""

MAX_SECONDS = 60.0
"""Wall time after which a comparison ends early, with at least one round."""

NARROW = 0.01
"""Half the width of a ratio's interval below which more calls are not worth their time."""


@overload
def measure(
    what: Served,
    example_inputs: Inputs,
    *,
    runtime: str = ...,
    threads: int = ...,
    calls: int = ...,
    warmup: int = ...,
    data: Data | None = ...,
    memory: bool = ...,
    max_seconds: float = ...,
) -> Measurement: ...


@overload
def measure(
    what: list[Any] | tuple[Served, ...],
    example_inputs: Inputs,
    *,
    runtime: str = ...,
    threads: int = ...,
    calls: int = ...,
    warmup: int = ...,
    data: Data | None = ...,
    memory: bool = ...,
    max_seconds: float = ...,
) -> list[Measurement]: ...


def measure(
    what: Served | list[Any] | tuple[Served, ...],
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    calls: int = 200,
    warmup: int = 20,
    data: Data | None = None,
    memory: bool = False,
    max_seconds: float = MAX_SECONDS,
) -> Measurement | list[Measurement]:
    """Measure a file or a network in a runtime, or several side by side.

    Several are called in turn (A B C, A B C, ...), so that all meet the same noise; the first is
    the baseline, and the others carry their latency as a share of its, with the interval of that
    (:func:`~rarefy.deployment.ratios.paired`). With one thread it is a share of the processor's
    time, which other programs do not lengthen; latencies are by the clock on the wall. Sessions
    are opened anew several times, in turning order (:func:`replicated`).

    Args:
        what: the path of an ONNX, ``.pt2`` or ``.pte`` file, a network, or a list of these.
            Networks are exported to a temporary file for the runtimes that serve files; they are
            taken in eval mode, and left as they are.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: ``"onnxruntime"`` or ``"openvino"``, which serve ONNX files and networks;
            ``"eager"`` (PyTorch, operator by operator) or ``"compile"`` (``torch.compile``), which
            serve ``.pt2`` files and networks; ``"executorch"``, which serves ``.pte`` files and
            networks.
        threads: intra-op threads; the runtime has no others. Those of ExecuTorch are the process's:
            programs that it has loaded beside these must be deleted to set another number.
        calls: calls of each that are timed, at least 1.
        warmup: calls of each before them.
        data: labelled batches on which the accuracy of what the runtime computes is measured.
        memory: whether peak memory is measured, in a process of its own that takes seconds
            (:mod:`rarefy.deployment.memory`).
        max_seconds: wall time after which no more calls are timed.

    Returns:
        A measurement for each: milliseconds per call, examples per second, bytes, and for networks
        MACs and parameters by layer, with what could not be counted.

    Raises:
        InputError: unknown runtime, no such file, or inputs that it does not take.
        FormatError: the runtime cannot load the file.
        ExportError: a network cannot be exported for the runtime.
        DataError: the data hold no labels, or they do not fit the outputs.
        MissingExtraError: the runtime is not installed; the message has the install line.

    Example:
        >>> measure("net.onnx", torch.randn(1, 3, 32, 32)).latency_ms.median  # doctest: +SKIP
        0.41
        >>> dense, pruned = measure([net, small], x, runtime="openvino")  # doctest: +SKIP
        >>> pruned.share  # doctest: +SKIP
        Ratio(value=0.52, low=0.51, high=0.53)
    """
    several: list[Served] = list(what) if isinstance(what, list | tuple) else [what]
    found = side_by_side(
        several,
        [example_inputs] * len(several),
        runtime=runtime,
        threads=threads,
        rounds=calls,
        warmup=warmup,
        max_seconds=max_seconds,
        data=data,
        memory=memory,
    )
    found = [_counted(m, one, example_inputs) for m, one in zip(found, several, strict=True)]
    return found if isinstance(what, list | tuple) else found[0]


def _counted(measured: Measurement, what: object, inputs: Inputs) -> Measurement:
    """With the MACs and parameters of a network; a file has none."""
    if not isinstance(what, nn.Module):
        return measured
    try:
        return replace(measured, cost=count(what, inputs))
    except CaptureError as error:
        return replace(measured, notes=(*measured.notes, f"MACs are not counted: {error.what}"))


def compare(
    paths: Sequence[Served],
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 200,
    warmup: int = 20,
    max_seconds: float = MAX_SECONDS,
) -> list[Measurement]:
    """Measure the latency of several side by side: A B C, A B C, ..., so that all meet the same
    noise.

    Args:
        paths: files or networks.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: a key of :data:`~rarefy.deployment.runtimes.RUNTIMES`.
        threads: intra-op threads.
        rounds: timed calls of each, at least 1.
        warmup: calls of each before them.
        max_seconds: wall time after which the rounds end.

    Returns:
        One measurement for each, in their order.

    Raises:
        InputError: no path, unknown runtime, no such file, or inputs that it does not take.
        MissingExtraError: the runtime is not installed.
    """
    return side_by_side(
        paths,
        [example_inputs] * len(paths),
        runtime=runtime,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        max_seconds=max_seconds,
    )


def relative(
    before: Served,
    after: Served,
    example_inputs: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 2000,
    warmup: int = 20,
    max_seconds: float = MAX_SECONDS,
) -> tuple[Measurement, Measurement, Ratio]:
    """Measure two side by side, and the second's latency as a share of the first's.

    Replicates end when the share is known well enough (:data:`NARROW`); see
    :func:`~rarefy.deployment.ratios.paired` for what it is. With one thread it is a share of the
    processor's time, which on a quiet machine is the same, and on a busy one stays what it was.

    Args:
        before: the first file or network.
        after: the second.
        example_inputs: what every call is made with; the batch size is theirs.
        runtime: a key of :data:`~rarefy.deployment.runtimes.RUNTIMES`.
        threads: intra-op threads.
        rounds: timed calls of each, at most.
        warmup: calls of each before them.
        max_seconds: wall time after which the rounds end.

    Raises:
        InputError: unknown runtime, no such file, or inputs that it does not take.
        MissingExtraError: the runtime is not installed.
    """
    first, second = side_by_side(
        [before, after],
        [example_inputs] * 2,
        runtime=runtime,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        max_seconds=max_seconds,
        enough=partial(_narrow, threads=threads),
    )
    assert second.share is not None
    return first, second, second.share


def _narrow(times: Sequence[Series], threads: int) -> bool:
    """Whether the shares of all are known well enough."""
    return all(_share(times, n, threads).noise <= NARROW for n in range(1, len(times)))


def _share(times: Sequence[Series], number: int, threads: int) -> Ratio:
    """The latency of one of several as a share of the first's."""
    before, after = (times[n].undisturbed(threads) for n in (0, number))
    return paired(before, after, times[0].starts, len(times))


def side_by_side(
    whats: Sequence[Served],
    inputs: Sequence[Inputs],
    *,
    runtime: str,
    threads: int,
    rounds: int,
    warmup: int,
    max_seconds: float,
    enough: Callable[[Sequence[Series]], bool] | None = None,
    data: Data | None = None,
    memory: bool = False,
) -> list[Measurement]:
    """Measure several in turn, each on inputs of its own; see :func:`measure`.

    Args:
        enough: whether the nanoseconds of the calls so far suffice.

    Raises:
        InputError: nothing to measure, and as :func:`measure`.
    """
    runtime_named(runtime)
    if not whats or rounds < 1 or warmup < 0:
        raise InputError(
            f"measure({len(whats)} files or networks, calls={rounds}, warmup={warmup})",
            "there is nothing to measure",
            "Give at least one file or network, and one call",
        )
    with ExitStack() as stack:
        ready = [
            stack.enter_context(prepared(what, given, runtime, threads))
            for what, given in zip(whats, inputs, strict=True)
        ]
        loaded = [(stack.enter_context(closing(anew())), path) for anew, path in ready]
        first = [
            _runner(session, given) for (session, _), given in zip(loaded, inputs, strict=True)
        ]
        anew = partial(_anew, [one for one, _ in ready], inputs)
        end = time.monotonic() + max_seconds
        times = replicated(first, anew, rounds, warmup, end, enough)
        found: list[Measurement] = []
        for what, given, (session, path), series in zip(whats, inputs, loaded, times, strict=True):
            made = Measurement(
                str(what) if isinstance(what, str | Path) else type(what).__name__,
                session.version,
                threads,
                _size(what, path),
                latency(series.wall),
                len(series.wall),
                batch_size(given),
                busy_ms=latency(series.busy),
                share=_share(times, len(found), threads) if found else None,
            )
            found.append(_beside(made, session, path, given, runtime, data, memory))
    return found


def _beside(
    made: Measurement,
    session: Session,
    path: Path | None,
    inputs: Inputs,
    runtime: str,
    data: Data | None,
    memory: bool,
) -> Measurement:
    """With what is measured beside the latency, where asked for."""
    if data is not None:
        made = replace(made, accuracy=top1(session.logits, data, where="measure"))
    if not memory:
        return made
    if path is None:
        note = f"peak memory is not measured in {runtime}: the network is in this process already"
        return replace(made, notes=(*made.notes, note))
    peak = peak_mb(path, inputs, runtime, made.threads)
    unknown = ["peak memory is not measured: the system does not tell it"] if peak is None else []
    return replace(made, peak_mb=peak, notes=(*made.notes, *unknown))


def _size(what: Served, path: Path | None) -> int:
    """Bytes of the file, or of the one that a network is saved as."""
    if path is not None:
        return path.stat().st_size
    assert isinstance(what, nn.Module)
    with TemporaryDirectory(prefix="rarefy-") as folder:
        return save(what, Path(folder) / "network.safetensors").stat().st_size


def _runner(session: Session, inputs: Inputs) -> Runner:
    return partial(session.run, session.feed(inputs))


@contextmanager
def _anew(
    openers: Sequence[Callable[[], Session]], inputs: Sequence[Inputs], order: Sequence[int]
) -> Iterator[list[Runner]]:
    """What runs new sessions, opened in an order; closed afterwards."""
    with ExitStack() as stack:
        sessions = [(stack.enter_context(closing(openers[n]())), inputs[n]) for n in order]
        yield [_runner(session, given) for session, given in sessions]


def settled(
    paths: Sequence[Served], example_inputs: Inputs, *, threads: int = 1, attempts: int = 3
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
    return max(m.spread for m in measured)


def speedup(before: Latency, after: Latency) -> float:
    """How many times lower a latency is: by the medians or the 10th percentiles, the lesser.

    Noise lengthens calls, long ones more often; a gain that is there in the medians alone is noise.

    Example:
        >>> speedup(Latency(8.0, 2.0, 9.0), Latency(1.0, 1.0, 1.1))
        2.0
    """
    pairs = ((before.median, after.median), (before.p10, after.p10))
    return min((long / short for long, short in pairs if short > 0), default=math.nan)
