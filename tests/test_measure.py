"""Timing and accuracy."""

import pytest
import torch
from torch import nn

from rarefy.deployment.export import export
from rarefy.deployment.measure import _time, accuracy, compare, latency, measure
from rarefy.deployment.runtimes import OnnxSession
from rarefy.errors import DataError, InputError


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    small, large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 8))
    return [export(m, folder / f"{i}.onnx", torch.ones(2, 8)) for i, m in enumerate((small, large))]


def test_compare_measures_every_file(paths):
    small, large = compare(paths, torch.ones(1, 8), rounds=30, warmup=2)
    assert small.latency_ms.median < large.latency_ms.median
    assert small.latency_ms.p10 <= small.latency_ms.median <= small.latency_ms.p90
    assert (small.calls, small.threads, small.path) == (30, 1, str(paths[0]))
    assert small.runtime.startswith("onnxruntime 1.")
    assert large.bytes == paths[1].stat().st_size


def test_measure_measures_one(paths):
    assert measure(paths[0], torch.ones(1, 8), calls=5, warmup=0).calls == 5


def test_calls_are_interleaved_and_bounded():
    order = []
    runners = [lambda: order.append("a"), lambda: order.append("b")]
    times = _time(runners, 3, 1, float("inf"))
    assert "".join(order) == "ab" * 4
    assert [len(series) for series in times] == [3, 3]
    assert [len(series) for series in _time(runners, 100, 100, 0.0)] == [1, 1]


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


def test_accuracy_weighs_examples_not_batches(paths):
    def data(n, right):
        x = torch.eye(8)[:n]
        return x, torch.where(torch.arange(n) < right, torch.arange(n), 7 - torch.arange(n))

    assert accuracy(lambda x: x, [data(8, 8), data(2, 1)]) == 0.9
    assert accuracy(lambda x: {"logits": x}, [data(8, 8)]) == 1
    session = OnnxSession(paths[0])
    assert 0 <= accuracy(session, [data(8, 8)]) <= 1


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.zeros(2, 3)),
        (torch.full((2, 3), float("nan")), torch.zeros(2)),
        (torch.ones(2), torch.zeros(2)),
    ],
)
def test_data_without_an_accuracy_are_refused(batch):
    with pytest.raises(DataError):
        accuracy(lambda x: x, [batch])
