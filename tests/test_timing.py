"""Layers as ONNX graphs of their own, and the costs of a network made of their latencies."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.deployment import timing
from rarefy.deployment.cache import Cache
from rarefy.deployment.runtimes import OnnxSession
from rarefy.deployment.timing import WRITERS, layer_costs
from rarefy.graph.layer import Layer
from rarefy.graph.trace import Network, trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection import accounts
from rarefy.pruning.selection.select import select
from rarefy.types import Budget

torch.set_num_threads(1)

OPENVINO = pytest.param(
    "openvino",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
    ),
)
LAYERS = {
    "conv": Layer("conv", 6, 10, 1, 3, ((11, 9), (3, 2), (2, 1), (1, 0), (1, 1), (1, 2))),
    "depthwise": Layer("conv", 1, 12, 6, 3, ((11,), (3,), (1,), (1,), (1,), (1,))),
    "matmul": Layer("matmul", 6, 10, times=7),
    "product": Layer("product", 6, 10, times=3, form=((5,),)),
    "attention": Layer("attention", 6, 4, times=3, form=((5, 7),)),
}
SHAPES = {
    "conv": (3, 10, 6, 8), "depthwise": (3, 12, 11), "matmul": (7, 10), "product": (3, 5, 10),
    "attention": (3, 5, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_runs_in_the_runtime(name: str, tmp_path: Path) -> None:
    assert {layer.kind for layer in LAYERS.values()} == set(WRITERS)
    inputs = timing._write(LAYERS[name], tmp_path / "layer.onnx")
    (made,) = OnnxSession(tmp_path / "layer.onnx")(inputs)
    assert tuple(made.shape) == SHAPES[name]


@pytest.mark.parametrize("name", LAYERS)
def test_the_module_of_a_layer_is_its_graph(name: str, tmp_path: Path) -> None:
    inputs = timing._write(LAYERS[name], tmp_path / "layer.onnx")
    (expected,) = OnnxSession(tmp_path / "layer.onnx")(inputs)
    found = timing._Module(LAYERS[name])(*timing._inputs(LAYERS[name]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_attention(tmp_path: Path) -> None:
    q, k, v = timing._write(LAYERS["attention"], tmp_path / "layer.onnx")
    (made,) = OnnxSession(tmp_path / "layer.onnx")((q, k, v))
    expected = F.scaled_dot_product_attention(q, k.transpose(1, 2), v, scale=1.0)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Conv2d(32, 64, 1)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(self.stem(x)))
        return self.out(torch.relu(self.wide(x)).mean((2, 3)))


NET = Net().eval()
X = torch.zeros(2, 3, 8, 8)
NETWORK = trace(NET, X)


def milliseconds(layer: Layer) -> float:
    """A made-up runtime whose time is the number of weights read for each repetition."""
    extent = layer.form[0] if layer.form else ()
    return 1e-3 * layer.times * layer.inner * layer.outer * (extent[0] if extent else 1)


def costs(network: Network, folder: Path, whole: float, batch: int = 2, seen=None):
    def timed(layers, runtime, threads):
        assert (runtime, threads) == ("onnxruntime", 1)
        if seen is not None:
            seen.extend(layers)
        return [milliseconds(layer) for layer in layers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_timed", timed)
        return layer_costs(
            network, whole, runtime="onnxruntime", threads=1, batch=batch, step=16,
            cache=Cache.of("made up", 1, folder),
        )  # fmt: skip


def full(batch: int = 2) -> float:
    convs = 8 * (3 * 32 + 32 + 32 * 64)
    return 1e-3 * batch * (convs + 64 * 10)


def test_what_the_layers_do_not_take_is_the_rest(tmp_path: Path) -> None:
    found = costs(NETWORK, tmp_path, 1000.0)
    assert found.rest == pytest.approx(1000 - full())
    assert accounts.latency(NETWORK, found).before == pytest.approx(1000)


def test_layers_that_take_longer_than_the_whole_are_scaled_to_it(tmp_path: Path) -> None:
    found = costs(NETWORK, tmp_path, full() / 2)
    assert found.rest == 0
    assert accounts.latency(NETWORK, found).before == pytest.approx(full() / 2)


def test_only_widths_that_can_change_are_timed_in_multiples_and_in_the_users_batch(
    tmp_path,
) -> None:
    seen: list[Layer] = []
    costs(NETWORK, tmp_path, 1000.0, batch=1, seen=seen)
    widths = {}
    for layer in seen:
        key = (layer.kind, layer.form[1] if layer.form else (), layer.groups > 1)
        widths.setdefault(key, (set(), set()))
        widths[key][0].add(layer.inner)
        widths[key][1].add(layer.outer)
        assert layer.times == 1
    assert widths == {
        ("conv", (3, 3), False): ({3}, {16, 32}),
        ("conv", (3, 3), True): ({1}, {16, 32}),
        ("conv", (1, 1), False): ({16, 32}, {16, 32, 48, 64}),
        ("matmul", (), False): ({16, 32, 48, 64}, {10}),
    }
    assert all(layer.groups == layer.outer for layer in seen if layer.groups > 1)


def test_the_estimate_of_a_smaller_network_is_that_of_its_layers(tmp_path: Path) -> None:
    cost = accounts.latency(NETWORK, costs(NETWORK, tmp_path, full()))
    stem, wide = NETWORK.groups
    gone = np.zeros(NETWORK.coupling.units, np.bool_)
    gone[stem.units[:16]] = True
    gone[wide.units[:32]] = True
    left = 8 * (3 * 16 + 16 + 16 * 32) + 32 * 10
    assert cost(Plan.of(NETWORK, gone)) == pytest.approx(2e-3 * left)


def test_a_budget_of_latency_is_kept_by_the_estimate_in_multiples(tmp_path: Path) -> None:
    found = costs(NETWORK, tmp_path, full())
    scores = [torch.arange(1.0, len(g) + 1).double().numpy() for g in NETWORK.groups]
    budget = Budget(latency=0.6, round_to=16)
    plan = select(NETWORK, NET, scores, budget, costs=found)
    assert accounts.latency(NETWORK, found).share(plan) <= 0.6
    assert all(plan.kept(NETWORK, g) % 16 == 0 for g in NETWORK.groups)


@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO, "eager"])
def test_layers_are_timed_in_the_runtime(runtime: str) -> None:
    small = Layer("matmul", 64, 64, times=64)
    large = replace(small, inner=1024, outer=1024)
    a, b = timing._timed([small, large], runtime=runtime, threads=1)
    assert 0 < a < b
