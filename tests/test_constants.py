"""Constant weights and products with constant matrices: the same function, in layers of int8."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.constants import fold_constants
from rarefy.graph.memory import Memory
from rarefy.graph.stubs import plain_graph
from rarefy.quantization.affine import sqnr

MADE = torch.Generator().manual_seed(0)
image = torch.randn(4, 3, 8, 8, generator=MADE)
rows = torch.randn(16, 6, generator=MADE)


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """Standardized by a BatchNorm over the weight, as NFNets do."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias)


class Products(nn.Module):
    """A product with a matrix, one with a transposed matrix that another layer reads, addmm."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 8)
        self.last, self.bias = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = F.relu(x @ self.first)
        y = self.tied(y) @ self.tied.weight.t()
        return torch.addmm(self.bias, y, self.last)


class Factors(nn.Module):
    """A weight of low rank: as one matrix it would take more place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.a @ self.b))


class Slices(nn.Module):
    """Two layers with the halves of one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        a, b = self.weight.chunk(2)
        return F.linear(x, a) * F.linear(x, b).sigmoid()


class Cast(nn.Module):
    """Parameters in bfloat16 that are read in single precision."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        inner = self.inner
        return self.head(F.linear(x, inner.weight.float(), inner.bias.float()).relu())


def normed(norm):
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8), nn.ReLU(), norm(nn.Conv2d(8, 4, 1))
    )


NETWORKS = {
    "weight norm": (lambda: normed(nn.utils.parametrizations.weight_norm), image, 2, ["0", "3"]),
    "spectral norm": (lambda: normed(nn.utils.parametrizations.spectral_norm), image, 2, None),
    "standardized": (
        lambda: nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        image,
        2,
        ["0", "2"],
    ),
    "scaled": (
        lambda: nn.Sequential(Scaled(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        image,
        2,
        ["0", "2"],
    ),
    "products": (Products, rows, 4, None),
    "slices": (Slices, rows, 2, None),
    "cast": (Cast, rows, 2, ["inner", "head"]),
}
"""Name -> (network, inputs, calls of layers in int8, names of the layers)."""


def folded(model, x):
    net = graph_model(model, capture(model.eval(), x))
    result = fold_constants(net)
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)
    return net, result


@pytest.mark.parametrize("name", NETWORKS)
def test_constant_weights_are_quantized(name):
    torch.manual_seed(0)
    make, x, count, layers = NETWORKS[name]
    model = make().eval()
    _, result = folded(model, x)
    read = [result.graph.by_name[n.args[1].name] for n in result.graph.calls if _is_layer(n)]
    assert [node.op for node in read] == ["tensor"] * count
    q = rf.quantize(model, [x])
    assert not q.quantization.left
    assert layers is None or list(q.quantization.layers) == layers
    with torch.no_grad():
        assert sqnr(model(x), q(x)) > 20


def test_what_would_take_more_place_stays_computed():
    q = rf.quantize(Factors(), [rows])
    assert list(q.quantization.layers) == ["head"]
    assert "computed in forward" in str(q.quantization.left)


def test_a_network_without_such_weights_is_returned_as_it_is():
    net, result = folded(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), rows)
    assert result is net


def test_weights_of_a_tensor_that_is_written_in_place_stay_computed():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.register_buffer("count", torch.zeros(6, 6))

        def forward(self, x):
            self.count += 1
            return self.linear(F.linear(x, self.count * 2))

    net = graph_model(Written(), capture(Written(), rows))
    assert fold_constants(net) is net


def test_a_transposed_weight_keeps_its_path_zeros_and_file(tmp_path):
    torch.manual_seed(0)
    model = Products()
    with torch.no_grad():
        model.first[torch.rand(6, 8) < 0.5] = 0
    q = rf.quantize(model, [rows])
    assert torch.equal(q.tensor("first") == 0, model.first.t() == 0)
    again = rf.load(rf.save(q, tmp_path / "q.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(rows), q(rows))


def test_repair_rounds_layers_anew_that_were_products():
    torch.manual_seed(0)
    model, data = Products(), [torch.randn(256, 6)]
    q = rf.quantize(model, data)
    better = rf.repair(model, q, data)
    with torch.no_grad():
        exact = model(data[0])
        assert sqnr(exact, better(data[0])) >= sqnr(exact, q(data[0])) - 1e-6
    assert "tied" in {**better.repaired.errors, **better.repaired.skipped}


class Similar(nn.Module):
    """Tensors under the names that nodes and tensors of a quantized network are made of."""

    def __init__(self):
        super().__init__()
        self.w, self.w_transposed = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.w_scale, self.w_quantized = (nn.Parameter(torch.rand(6) + 1) for _ in range(2))

    def forward(self, x):
        return (F.relu(x @ self.w) @ self.w_transposed) * self.w_scale + self.w_quantized


class Nested(nn.Module):
    """A weight made by a module of that name, whose own tensor is read besides."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Module()
        self.weight.raw = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return F.linear(x, self.weight.raw.tanh()), self.weight.raw.sum() + x.sum()


class Chain(nn.Module):
    """A weight behind more operators than Python calls may be nested."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 6) + 0.1)

    def forward(self, x):
        w = self.weight
        for _ in range(300):
            w = w / w.sum(0, keepdim=True)
            w = w / w.sum(1, keepdim=True)
        return F.linear(x, w)


@pytest.mark.parametrize("make", [Similar, Nested, Chain])
def test_unusual_weights_are_folded(make):
    torch.manual_seed(0)
    net = make().eval()
    _, result = folded(net, rows)
    assert any(node.op == "aten.linear.default" for node in result.graph.calls)
    small = rf.quantize(net, [rows])
    with torch.no_grad():
        pairs = zip(tuples(net(rows)), tuples(small(rows)), strict=True)
    assert all(sqnr(exact, found) > 30 for exact, found in pairs)


def tuples(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("name", ["weight norm", "matrices"])
def test_repair_takes_networks_none_of_whose_layers_held_its_weight(name):
    torch.manual_seed(0)
    make, x, *_ = {**NETWORKS, "matrices": (Matrices, rows)}[name]
    model = make().eval()
    q = rf.quantize(model, [x])
    repaired = rf.repair(model, q, [x]).repaired
    assert len({**repaired.errors, **repaired.skipped}) == len(q.quantization.layers)
    assert repaired.errors


class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(6, n)) for n in (6, 3))

    def forward(self, x):
        return (x @ self.first).relu() @ self.second


def _is_layer(node):
    return node.kind in ("linear", "conv2d")


def test_a_dropout_in_place_that_does_nothing_writes_nothing() -> None:
    x = torch.randn(16, 4)
    layers = [nn.Linear(4, 8), nn.Hardswish(), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2)]
    model = nn.Sequential(*layers).eval()
    net = plain_graph(model, x)
    (dropped,) = (node for node in net.graph.calls if node.kind == "dropout_")
    assert dropped.name not in Memory(net.graph).written
    assert set(rf.quantize(model, [x]).quantization.layers) == {"0", "3"}
