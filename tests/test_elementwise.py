"""Entry by entry: who meets whom, and where masked units give zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carrying import Net, X, check_carried, check_proven, prunable
from rarefy.graph.rules.elementwise import POLES, ROWS, ZEROS
from rarefy.graph.trace import trace

torch.set_num_threads(1)


def in_place(n, y, z):
    h = y + 1
    h.mul_(z).add_(0.5).clamp_(-2, 2).sub_(n.table[0]).neg_()
    h += y
    h[:, 2:5] *= 2
    return h.masked_fill_(z > 1, 0.0)


CARRIED = {
    "squeeze and excite": lambda n, y, z: y * torch.sigmoid(F.linear(y.relu(), n.table)),
    "softplus": lambda n, y, z: F.softplus(y) * z,
    "layer scale": lambda n, y, z: y * n.table[0],
    "gelu": lambda n, y, z: F.gelu(y) + F.gelu(z, approximate="tanh"),
    "hard": lambda n, y, z: F.hardswish(y) + F.hardsigmoid(z) * F.hardtanh(y),
    "softsign": lambda n, y, z: y / (1 + y.abs()),
    "square": lambda n, y, z: y**2 + z.square(),
    "cube": lambda n, y, z: y.pow(3),
    "exponentials": lambda n, y, z: y.clamp(max=2).exp() + z.abs().log1p() + y.tanh().expm1(),
    "reversed difference": lambda n, y, z: 1 - y,
    "reversed": lambda n, y, z: torch.rsub(y, z),
    "in place": in_place,
    "comparison": lambda n, y, z: torch.where(y > z, y, z) + (y <= 0).to(y.dtype),
    "logic": lambda n, y, z: ((y > 0) & ~(z > 0) | (y < -1) ^ (z < 0)).to(y.dtype) * z,
    "whole numbers": lambda n, y, z: (y * 4).long().remainder(3).to(y.dtype) * z,
    "clamp by tensors": lambda n, y, z: y.clamp(z.sigmoid() - 1, z.sigmoid()),
    "addcmul": lambda n, y, z: torch.addcmul(y, z, n.table[0], value=0.5),
    "addcdiv": lambda n, y, z: torch.addcdiv(y, z, z.exp(), value=0.5),
    "lerp": lambda n, y, z: y.lerp(z, n.table[0].sigmoid()) + y.lerp(z, 0.3),
    "number in a tensor": lambda n, y, z: y * torch.tensor(3.0) + n.table[0, 0],
    "where with a number": lambda n, y, z: torch.where(z > 0, y, -5.0),
    "where with numbers": lambda n, y, z: torch.where(z > 0, 2.0, -1.0) * y,
    "where of a constant mask": lambda n, y, z: torch.where(torch.arange(8) > 3, y, z),
    "masked scores": lambda n, y, z: (
        torch.where(torch.ones(2, 2).tril() > 0, y[:, :, None, None], float("-inf"))
        .softmax(-1)
        .sum((2, 3))
        * y
    ),
    "a row": lambda n, y, z: y + z[:1] * n.table[0],
    "a column": lambda n, y, z: y * z.sum(1, keepdim=True),
    "minimum": lambda n, y, z: torch.minimum(y, z) + torch.fmax(y, z),
    "angles": lambda n, y, z: torch.atan2(y, z.exp()) + torch.hypot(y, z),
    "aliases": lambda n, y, z: torch.subtract(torch.multiply(y, z), torch.negative(y)),
    "threshold": lambda n, y, z: F.threshold(y, 0.1, 0.0),
    "activations": lambda n, y, z: F.celu(y) + F.selu(z) + F.mish(y) + F.logsigmoid(z),
    "prelu of one": lambda n, y, z: F.prelu(y, n.table[0, :1]),
    "ratio": lambda n, y, z: y / z.exp(),
    "clone": lambda n, y, z: y.clone().contiguous().detach() + y,
    "copied": lambda n, y, z: torch.empty_like(y).copy_(z) + y,
    "bits": lambda n, y, z: torch.bitwise_and((y * 9).int(), (z * 9).int()).to(y.dtype) * y,
    "finite": lambda n, y, z: torch.nan_to_num(y) * torch.isfinite(z).to(y.dtype),
    "complex": lambda n, y, z: torch.complex(y, z).abs() + torch.complex(y, z).real,
}


@pytest.mark.parametrize("name", CARRIED)
def test_removing_equals_masking(name) -> None:
    network = check_carried(Net(CARRIED[name], 8), X)
    assert ("y.weight", 0) in prunable(network)


SUMMED = {
    "relu": lambda n, y, z: y.relu(),
    "chain": lambda n, y, z: F.silu(y).tanh().abs().sqrt().clamp(-1, 1).sinh(),
    "product with what is not zero": lambda n, y, z: y * z.exp(),
    "product with a row": lambda n, y, z: y.sigmoid() * n.table[0],
    "clamp from below": lambda n, y, z: y.clamp_min(-1).clamp_max(2),
    "power": lambda n, y, z: y.abs().pow(1.5) + z**2,
    "branches": lambda n, y, z: torch.where(y > 0, z, 0.0) + torch.where(z > 0, y, z),
    "filled with zero": lambda n, y, z: y.masked_fill(z > 0, 0),
    "ratio": lambda n, y, z: y / z.exp(),
    "added product": lambda n, y, z: torch.addcmul(y, z, z.exp()) + torch.addcdiv(y, z, y.exp()),
    "constant of zeros": lambda n, y, z: y + torch.zeros(8) + torch.tensor([0.0] * 8),
    "copied": lambda n, y, z: torch.zeros_like(y).copy_(z),
    "threshold": lambda n, y, z: F.threshold(y, -0.5, 3.0) + F.threshold(z, 0.5, 0.0),
    "compared": lambda n, y, z: (y > 0).to(y.dtype) * 2 + (y != z).to(y.dtype),
}


@pytest.mark.parametrize("name", SUMMED)
def test_zeros_are_followed_up_to_a_sum(name) -> None:
    inner = SUMMED[name]

    def function(n, y, z):
        return inner(n, y, z).sum(1, keepdim=True)

    network = check_carried(Net(function, 1), X)
    assert {("y.weight", 0), ("z.weight", 0)} & prunable(network)


NOT_ZERO = {
    "sigmoid": lambda n, y, z: y.sigmoid(),
    "shift by a number": lambda n, y, z: y + 1,
    "shift by a broadcast parameter": lambda n, y, z: y + n.table[0, 0],
    "scale by a broadcast parameter": lambda n, y, z: y.cos() * n.table[0, 0],
    "clamp above zero": lambda n, y, z: y.clamp(0.5, 1),
    "hardtanh above zero": lambda n, y, z: F.hardtanh(y, 0.5, 1),
    "power of zero": lambda n, y, z: y.pow(0),
    "filled with one": lambda n, y, z: y.masked_fill(z > 0, 1.0),
    "branch of one": lambda n, y, z: torch.where(y > 0, y, 1.0),
    "broadcast branch": lambda n, y, z: torch.where(y > 9, y, n.table[0, :1]),
    "added product of ones": lambda n, y, z: torch.addcmul(y, y.exp(), y.exp()),
    "threshold to one": lambda n, y, z: F.threshold(y, 0.5, 1.0),
    "copied ones": lambda n, y, z: torch.zeros_like(y).copy_(y.exp()),
    "written ones": lambda n, y, z: _written_ones(y),
    "equal": lambda n, y, z: (y == 0).to(y.dtype) + y,
}


def _written_ones(y):
    base = y * 1
    base[:, :4].fill_(1.0)
    return base


@pytest.mark.parametrize("name", NOT_ZERO)
def test_what_is_not_zero_is_not_summed_over(name) -> None:
    inner = NOT_ZERO[name]

    def function(n, y, z):
        return inner(n, y, z).sum(1, keepdim=True)

    net = Net(function, 1)
    network = trace(net, X)
    assert ("y.weight", 0) not in prunable(network)
    check_proven(net, X, network)


POLED = {
    "reciprocal": lambda n, y, z: y.reciprocal(),
    "logarithm": lambda n, y, z: y.abs().log(),
    "negative power": lambda n, y, z: y.abs().pow(-0.5),
    "power by a tensor": lambda n, y, z: y.abs() ** z.sigmoid(),
    "ratio": lambda n, y, z: 1 / y,
    "ratio of both": lambda n, y, z: y / y.abs(),
    "rounded ratio": lambda n, y, z: torch.div(z, y, rounding_mode="floor"),
    "third operand": lambda n, y, z: torch.addcdiv(z.exp(), z.exp(), y),
    "gamma": lambda n, y, z: y.abs().lgamma() + y.abs().digamma(),
    "product with a logarithm": lambda n, y, z: torch.xlogy(z.exp(), y.abs()),
}


@pytest.mark.parametrize("name", POLED)
def test_units_stay_whose_zeros_would_be_infinite(name) -> None:
    network = trace(Net(POLED[name], 8), X)
    assert ("y.weight", 0) not in prunable(network)
    assert any("infinite" in f.reason for f in network.frozen)


def test_an_unlabelled_side_of_full_size_fixes() -> None:
    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x, scale, gate):
            return self.out(self.a(x) * scale + self.b(x) * gate)

    x = (X, torch.randn(3, 8), torch.randn(3, 1))
    network = trace(Meets(), x)
    assert not prunable(network)  # the sum meets the scale, an input of full size
    reasons = {f.path: f.reason for f in network.frozen}
    assert "cannot change" in reasons["a.weight"]
    assert "cannot change" in reasons["b.weight"]


@pytest.mark.parametrize("table", [ROWS, ZEROS, POLES], ids=["rows", "zeros", "poles"])
def test_every_row_names_an_operator(table) -> None:
    names = {op.removeprefix("aten.").split(".")[0] for op in table}
    missing = {
        n for n in names if not hasattr(torch.ops.aten, n) and not hasattr(torch.ops.aten, f"{n}_")
    }
    assert not missing


@pytest.mark.parametrize("name", sorted(ZEROS))
def test_operators_that_keep_zeros_do(name) -> None:
    """Against the operators themselves, where they take one tensor."""
    overloads = getattr(torch.ops.aten, name, None)
    if overloads is None or "default" not in overloads.overloads():
        pytest.skip("only in place, or of several tensors")
    needed = [a for a in overloads.default._schema.arguments if not a.has_default_value()]
    if len(needed) != 1 or name in ("clamp", "clip", "where"):
        pytest.skip("of several arguments")
    zeros = torch.zeros(3, dtype=torch.double)
    given = zeros.to(torch.complex128) if name == "imag" else zeros
    assert not overloads.default(given).any()
