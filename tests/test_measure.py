"""Timing."""

import importlib.util

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.deployment.export import export
from rarefy.deployment.measure import (
    compare,
    measure,
    relative,
    settled,
    speedup,
)
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


def test_the_share_is_of_the_first_file(paths):
    small, large = paths
    first, second, share = relative(large, small, torch.ones(1, 8), rounds=300, warmup=2)
    assert (first.path, second.path) == (str(large), str(small))
    assert share.high < 1 < relative(small, large, torch.ones(1, 8), rounds=300, warmup=2)[2].low
