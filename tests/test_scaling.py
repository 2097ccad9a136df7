"""Rescaled channels: the network computes the same, and is easier to quantize."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantized_networks import NETWORKS, build
from rarefy.batches import call, tensors
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import plain_graph
from rarefy.quantization.fold import fold_batch_norms
from rarefy.quantization.quantize import quantize
from rarefy.quantization.scaling import equalize, folds, rescaled, smooth
from rarefy.schemes import Int8


class Gain(nn.Module):
    """A norm that is written out: its product with a vector is all that can be rescaled."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Encoder(nn.Module):
    """Norms read by one, two and, in the residual stream, by other than linear layers."""

    def __init__(self, norm, width=12):
        super().__init__()
        self.first, self.second, self.last = (norm(width) for _ in range(3))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        y = self.first(x)
        x = x + torch.softmax(self.query(y) @ self.key(y).transpose(1, 2), -1) @ x
        x = x + self.down(F.relu(self.up(self.second(x))))
        x = self.last(x)
        return self.head(x.mean(1)) + x.mean()


class Depthwise(nn.Module):
    """Convolutions with groups, activations that commute with factors and one that does not."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 1, groups=4)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.leaky_relu(self.expand(x), 0.1)
        x = F.max_pool2d(F.relu(self.grouped(F.relu(self.depth(x)))), 2)
        x = F.silu(self.left(x) + self.right(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written out": Gain}


def captured(model, x):
    return fold_batch_norms(plain_graph(model.double().eval(), x))


def uneven(model, seed):
    """Weights whose channels have very different ranges."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p *= torch.exp(torch.randn(len(p), generator=generator)).reshape(
                -1, *[1] * (p.ndim - 1)
            )
    return model


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 2**16), strength=st.floats(0, 1))
@settings(deadline=None, max_examples=5)
def test_smoothed_network_computes_the_same(norm, seed, strength):
    torch.manual_seed(seed)
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    net = captured(uneven(Encoder(NORMS[norm]), seed), x)
    result = smooth(net, [x], strength)
    found = {fold.made[0]: len(fold.readers) for fold in folds(net.graph)}
    assert found == {"first.weight": 2, "second.weight": 1, "up.weight": 1}
    assert not torch.equal(result.tensor("up.weight"), net.tensor("up.weight"))
    torch.testing.assert_close(result(x), net(x), rtol=1e-9, atol=1e-9)


class Heads(nn.Module):
    """Attention of four heads, whose values are projected; several queries may share a head."""

    def __init__(self, kind="fused", shared=1):
        super().__init__()
        self.kind, self.shared = kind, shared
        self.q, self.k = nn.Linear(12, 16), nn.Linear(12, 16 // shared)
        self.v, self.out = nn.Linear(12, 16 // shared), nn.Linear(16, 12)

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) if self.shared > 1 else t for t in (k, v))
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(2, 3) / 2, -1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], 16))


@pytest.mark.parametrize("kind", ["fused", "written out"])
def test_values_of_attention_are_smoothed_through_their_projection(kind):
    torch.manual_seed(0)
    model, x = uneven(Heads(kind), 0), torch.randn(3, 5, 12, dtype=torch.float64)
    net = captured(model, x)
    assert [fold.made for fold in folds(net.graph)] == [("v.weight", "v.bias")]
    result = smooth(net, [x], 0.5)
    torch.testing.assert_close(result(x), net(x), rtol=1e-9, atol=1e-9)
    factors = rescaled(result)["v.weight"]
    assert bool((factors != 1).all())
    expected = net.tensor("v.weight") / factors[:, None]
    torch.testing.assert_close(result.tensor("v.weight"), expected)
    expected = net.tensor("out.weight") * factors
    torch.testing.assert_close(result.tensor("out.weight"), expected)


def test_values_that_several_heads_share_are_left_alone():
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    net = captured(Heads(shared=2), x)
    assert folds(net.graph) == ()
    assert smooth(net, [x], 0.5) is net


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=5)
def test_equalized_network_computes_the_same_and_has_equal_ranges(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = captured(uneven(Depthwise(), seed), x)
    result = equalize(net)
    torch.testing.assert_close(result(x), net(x), rtol=1e-9, atol=1e-9)
    rows = result.tensor("expand.weight").flatten(1).abs().amax(1)
    columns = result.tensor("depth.weight").flatten(1).abs().amax(1)
    torch.testing.assert_close(rows, columns, rtol=0.05, atol=0)
    assert {fold.made[0] for fold in folds(net.graph)} == {
        *("expand.weight", "depth.weight", "grouped.weight")
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_the_same_or_is_left_alone(name):
    model, data = build(name)
    net = fold_batch_norms(plain_graph(model, data[0]))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    changed = equalize(smooth(net, data, 0.5))
    pairs = zip(*(tensors(call(n, data[0])) for n in (net, changed)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert isinstance(changed, GraphModel)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_smoothing_takes_outliers_out_of_activations():
    torch.manual_seed(0)
    model = Encoder(nn.LayerNorm).eval()
    with torch.no_grad():
        model.second.weight[3] *= 60
        model.up.weight[:, 3] /= 60
    data = [torch.randn(16, 4, 12)]
    plain, smoothed = (
        quantize(model, data, Int8(observer="minmax", smooth=s)).quantization.layers["up"]
        for s in (None, 0.5)
    )
    assert smoothed > plain + 6


def test_equalization_helps_where_one_channel_is_far_above_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[0] *= 100
        model[0].bias[0] *= 100
        model[2].weight[:, 0] /= 100
    data = [torch.randn(8, 3, 8, 8)]
    plain, equal = (
        quantize(model, data, Int8(equalize=e)).quantization.layers["2"] for e in (False, True)
    )
    assert equal > plain + 6


def test_tensors_that_others_use_are_left_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.inner = nn.Linear(6, 6)
            self.out = nn.Linear(6, 6)

        def forward(self, x):
            x = self.inner(self.norm(self.inner(self.norm(x))))
            return self.out(F.relu(x)) @ self.out.weight

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    net = captured(Shared(), x)
    assert folds(net.graph) == ()
    assert smooth(net, [x], 0.5) is net


class Score(nn.Module):
    """Units that are read by one row of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.row = nn.Linear(6, 16), nn.Parameter(torch.randn(1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.first(x).relu(), self.row.squeeze(0))


def test_units_that_a_vector_reads_are_left_alone() -> None:
    torch.manual_seed(0)
    net, x = Score().eval(), torch.randn(64, 6)
    q = quantize(net, [x], Int8())
    with torch.no_grad():
        wanted = net(x)
        assert (q(x) - wanted).square().mean() < 0.01 * wanted.var()
