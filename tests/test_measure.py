"""Timing."""

import importlib.util
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.deployment.export import export
from rarefy.deployment.measure import (
    compare,
    latency,
    measure,
    relative,
    replicated,
    settled,
    speedup,
    timed,
)
from rarefy.deployment.ratios import FINE, paired
from rarefy.errors import InputError
from rarefy.types import Latency, Measurement


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    small, large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 8))
    return [export(m, folder / f"{i}.onnx", torch.ones(2, 8)) for i, m in enumerate((small, large))]


def test_compare_measures_every_file(paths):
    small, large = compare(paths, torch.ones(1, 8), rounds=30, warmup=2)
    assert small.latency_ms.median < large.latency_ms.median
    assert small.latency_ms.p10 <= small.latency_ms.median <= small.latency_ms.p90
    assert (small.calls, small.threads, small.batch) == (30, 1, 1)
    assert small.path == str(paths[0])
    assert small.runtime.startswith("onnxruntime 1.")
    assert large.bytes == paths[1].stat().st_size


def test_measure_measures_one(paths):
    assert measure(paths[0], torch.ones(1, 8), calls=5, warmup=0).calls == 5


OPENVINO = pytest.param(
    "openvino",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
    ),
)


@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO, "eager"])
def test_networks_are_measured_beside_each_other(runtime):
    small, wide = (nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, 4)) for n in (256, 1024))
    x = torch.randn(16, 64)
    labels = wide.eval()(x).argmax(1)
    found = rf.measure([small, wide], x, runtime=runtime, calls=60, data=[(x, labels)])
    first, second = found
    assert first.share is None
    assert second.share.low > 1
    assert second.accuracy == 1.0
    assert first.accuracy < 1
    assert second.cost.by_layer == {"0": 64 * 1024, "2": 4 * 1024}
    assert second.cost.params_by_layer == {"0": 65 * 1024, "2": 4 * 1025}
    assert second.bytes > 3 * sum(p.numel() for p in wide.parameters())
    assert second.throughput == pytest.approx(16_000 / second.latency_ms.median)
    assert second.spread >= 1
    assert runtime in first.runtime
    assert small.training


def test_what_cannot_be_counted_is_named(paths):
    class Strange(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    found = measure(Strange(), torch.ones(1, 2), runtime="eager", calls=2, warmup=0)
    assert found.cost is None
    assert "MACs are not counted" in found.notes[0]
    fourier = measure(Fourier(), torch.ones(1, 8), runtime="eager", calls=2, warmup=0)
    assert list(fourier.cost.uncounted) == ["fft_rfft"]
    assert measure(paths[0], torch.ones(1, 8), calls=2).cost is None


class Fourier(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


def test_memory_of_networks_in_this_process_is_not_guessed():
    found = measure(nn.Linear(8, 8), torch.ones(1, 8), runtime="eager", calls=2, memory=True)
    assert found.peak_mb is None
    assert "memory is not measured" in found.notes[0]


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
    monkeypatch.setattr("rarefy.deployment.measure.WARM", 0.0)
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


def test_unusable_requests_are_refused(paths):
    with pytest.raises(InputError, match="onnxruntime"):
        measure(paths[0], torch.ones(1, 8), runtime="tensorrt")
    for bad in ({"rounds": 0}, {"warmup": -1}, {"threads": 0}):
        with pytest.raises(InputError):
            compare(paths, torch.ones(1, 8), **bad)
    with pytest.raises(InputError):
        compare([], torch.ones(1, 8))


def test_a_gain_in_the_medians_alone_is_no_speedup():
    quiet, noisy = Latency(1.0, 0.9, 1.1), Latency(10.0, 1.8, 14.0)
    assert speedup(noisy, quiet) == 2.0
    assert speedup(quiet, quiet) == 1.0


def test_a_disturbed_measurement_is_made_again(monkeypatch):
    spreads = iter([9.0, 2.0, 5.0])

    def disturbed(paths, inputs, threads):
        spread = Latency(1.5, 1.0, next(spreads))
        return [Measurement(str(p), "fake", threads, 0, spread, 3, 1) for p in paths]

    monkeypatch.setattr("rarefy.deployment.measure.compare", disturbed)
    assert settled(["a", "b"], torch.zeros(1))[0].latency_ms.p90 == 2.0


# --- shares


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


def test_the_share_is_of_the_first_file(paths):
    small, large = paths
    first, second, share = relative(large, small, torch.ones(1, 8), rounds=30, warmup=2)
    assert (first.path, second.path) == (str(large), str(small))
    assert share.high < 1 < relative(small, large, torch.ones(1, 8), rounds=30, warmup=2)[2].low
