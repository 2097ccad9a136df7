"""Reductions over units: exact where zeros add nothing, else over what remains, else frozen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy as rf
from rarefy.copies import copied
from rarefy.graph.model import GraphModel
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.reference import SurvivorModel, mixing, over_survivors
from rarefy.pruning.structure.surgery import rewrite

torch.set_num_threads(1)
X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """``out(function(a(x), b(x)))``: the function works with any number of units."""

    def __init__(self, function) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.a(x), self.b(x)))


def _response(x: Tensor, size: int) -> Tensor:
    """Local response normalization along the last dimension."""
    return F.local_response_norm(x.transpose(1, 2), size, 0.5).transpose(1, 2)


LAST = {"dim": -1, "keepdim": True}
OVER_WHAT_REMAINS = {
    "average of neighbors": lambda a, b: a * F.avg_pool1d(b, 3, 1, 1),
    "average of neighbors without padding": lambda a, b: (
        a * F.avg_pool1d(b, 5, 1, 2, count_include_pad=False)
    ),
    "largest of neighbors": lambda a, b: a * F.max_pool1d(b, 3, 1, 1),
    "average of padded neighbors": lambda a, b: a * F.avg_pool1d(F.pad(b, (2, 1)), 4, 1),
    "local response": lambda a, b: a * _response(b, 3),
    "local response of an even size": lambda a, b: a * _response(b, 4),
    "mean": lambda a, b: a * b.mean(**LAST),
    "mean of what masking does not zero": lambda a, b: a * b.sigmoid().mean(**LAST),
    "mean of all": lambda a, b: a * b.mean(),
    "mean over two dimensions": lambda a, b: a * b.mean((1, 2), keepdim=True),
    "nanmean": lambda a, b: a * b.nanmean(**LAST),
    "variance": lambda a, b: a * b.var(unbiased=False, **LAST),
    "standard deviation": lambda a, b: a * b.std(correction=0, **LAST),
    "variance and mean": lambda a, b: a * sum(torch.var_mean(b, correction=0, **LAST)),
    "deviation and mean": lambda a, b: a * sum(torch.std_mean(b, correction=0, **LAST)),
    "softmax": lambda a, b: a * b.softmax(-1),
    "softmax in float32": lambda a, b: a * F.softmax(b, -1, dtype=torch.float32),
    "log_softmax": lambda a, b: a * b.log_softmax(-1),
    "logsumexp": lambda a, b: a * b.logsumexp(**LAST),
    "maximum": lambda a, b: a * b.amax(**LAST),
    "minimum": lambda a, b: a * b.amin(**LAST),
    "maximum without place": lambda a, b: a * b.max(**LAST)[0],
    "maximum of all": lambda a, b: a * b.max(),
    "both extremes": lambda a, b: a * sum(torch.aminmax(b, **LAST)),
    "product": lambda a, b: a * b.prod(**LAST),
    "any": lambda a, b: a * (b > 0.5).any(**LAST),
    "all": lambda a, b: a * (b > -0.5).all(**LAST),
    "cumulative sum": lambda a, b: a * b.cumsum(-1),
    "cumulative product": lambda a, b: a * b.cumprod(-1),
    "standardized": lambda a, b: (
        a * (b - b.mean(**LAST)) / (b.var(correction=0, **LAST) + 1).sqrt()
    ),
}
EXACT = {
    "sum": lambda a, b: a * b.relu().sum(**LAST) / 8,
    "sum of all": lambda a, b: a * b.sum(),
    "sum over two dimensions": lambda a, b: a * b.sum((1, 2), keepdim=True),
    "count of nonzero": lambda a, b: a * torch.count_nonzero(b.relu(), -1)[..., None],
    "norm": lambda a, b: a / (b.norm(**LAST) + 1),
    "norm of all": lambda a, b: a / (b.norm() + 1),
    "norm of order 1": lambda a, b: a / (b.norm(p=1, **LAST) + 1),
    "norm of order 0": lambda a, b: a / (torch.linalg.vector_norm(b.relu(), ord=0, **LAST) + 1),
    "largest magnitude": lambda a, b: a / (torch.linalg.vector_norm(b, torch.inf, -1, True) + 1),
    "norm of matrices": lambda a, b: a / (torch.linalg.norm(b, dim=(1, 2), keepdim=True) + 1),
    "unit length": lambda a, b: a * F.normalize(b, dim=-1),
    "mean over positions": lambda a, b: a * b.mean(1, keepdim=True),
    "maximum over positions": lambda a, b: a * b.max(1, keepdim=True)[0],
    "place over positions": lambda a, b: a * b.argmax(1, keepdim=True),
    "sorted positions": lambda a, b: a * b.sort(1)[0],
    "largest positions": lambda a, b: a[:, :2] * b.topk(2, 1)[0],
    "median over positions": lambda a, b: a * b.median(1, keepdim=True)[0],
    "cumulative sum over positions": lambda a, b: a * b.cumsum(1),
    "softmax over positions": lambda a, b: a * b.softmax(1),
    "maximum of two": lambda a, b: torch.max(a, b) + torch.min(a, b) * a,
    "pooled": lambda a, b: a[:, :2] * F.adaptive_max_pool1d(b.transpose(1, 2), 2).transpose(1, 2),
    "power pooled": lambda a, b: a[:, :3] * F.lp_pool1d(b.transpose(1, 2), 2, 2).transpose(1, 2),
    "resampled": lambda a, b: (
        a[:, :4] * F.interpolate(b.transpose(1, 2), size=4, mode="linear").transpose(1, 2)
    ),
    "resampled exactly": lambda a, b: (
        a[:, :4] * F.interpolate(b.transpose(1, 2), size=4, mode="nearest-exact").transpose(1, 2)
    ),
}
FROZEN = {
    "sum of what masking does not zero": lambda a, b: a * b.sigmoid().sum(**LAST),
    "norm of what masking does not zero": lambda a, b: a * b.exp().norm(**LAST),
    "norm of negative order": lambda a, b: a / (torch.linalg.vector_norm(b, -1, -1, True) + 1),
    "spectral norm": lambda a, b: a / (torch.linalg.norm(b, 2, (1, 2), True) + 1),
    "place of the maximum": lambda a, b: a * b.argmax(**LAST),
    "maximum and its place": lambda a, b: a * sum(b.max(**LAST)),
    "place of the maximum of all": lambda a, b: a * b.argmax(),
    "sorted": lambda a, b: a * b.sort(-1)[0],
    "largest": lambda a, b: a * b.topk(2, -1)[0].sum(**LAST),
    "median": lambda a, b: a * b.median(**LAST)[0],
    "pooled over units in steps": lambda a, b: a * F.avg_pool1d(b, 3, 2, 1).repeat(1, 1, 2),
    "pooled over units that are apart": lambda a, b: a * F.pad(F.max_pool1d(b, 3, 1, 1, 2), (1, 1)),
    "pooled over units without padding": lambda a, b: a * F.pad(F.avg_pool1d(b, 3, 1), (1, 1)),
    "pooled over units to one size": lambda a, b: a * F.adaptive_avg_pool1d(b, 8),
}


def units_of(network, path: str) -> np.ndarray:
    """For each row of a layer, the unit that it is."""
    node = next(n for n in network.captured.graph.nodes if n.op == "tensor" and n.path == path)
    units, rows = network.coupling.pairs(network.flow.labels[node.name][0])
    return units[np.argsort(rows)]


def plan_of(network, rows: dict[str, np.ndarray]) -> Plan:
    """The plan that takes these rows from these layers."""
    removed = np.zeros(network.coupling.units, bool)
    for path, indices in rows.items():
        removed[units_of(network, f"{path}.weight")[indices]] = True
    return Plan.of(network, removed)


def by_hand(net: Net, a: np.ndarray, b: np.ndarray) -> Net:
    """The network with these rows of ``a`` and ``b`` left, cut without any of rarefy."""
    small = copied(net)
    for layer, kept in ((small.a, a), (small.b, b)):
        layer.weight = nn.Parameter(layer.weight[kept].detach())
        layer.bias = nn.Parameter(layer.bias[kept].detach())
    small.out.weight = nn.Parameter(small.out.weight[:, a].detach())
    return small


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-9, atol=1e-11)


SUBSETS = st.sets(st.integers(0, 7), min_size=1, max_size=6).map(lambda s: np.array(sorted(s)))
PATIENT = {"max_examples": 4, "deadline": None, "derandomize": True, "database": None}


@pytest.mark.parametrize("name", [*OVER_WHAT_REMAINS, *EXACT])
def test_removal_is_the_same_function_of_fewer_units(name) -> None:
    function = (OVER_WHAT_REMAINS | EXACT)[name]
    net, x = Net(function).double(), X.double()
    network = trace(net, x)
    assert not network.unknown
    assert bool(network.flow.over_survivors) == (name in OVER_WHAT_REMAINS)
    tied = bool((units_of(network, "a.weight") == units_of(network, "b.weight")).all())

    @settings(**PATIENT)
    @given(SUBSETS, SUBSETS)
    def check(a: np.ndarray, b: np.ndarray) -> None:
        b = a if tied else b
        plan = plan_of(network, {"a": a, "b": b})
        kept = (np.setdiff1d(np.arange(8), gone) for gone in (a, b))
        with torch.no_grad():
            expected = by_hand(net, *kept)(x)
            assert close(rewrite(net, network, plan)(x), expected)
            assert close(over_survivors(net, network, plan)(x), expected)

    check()


@pytest.mark.parametrize("name", [*OVER_WHAT_REMAINS, *EXACT])
def test_the_proof_holds_and_the_class_is_kept(name) -> None:
    net = Net((OVER_WHAT_REMAINS | EXACT)[name])
    small = rf.prune(net, X, rf.Budget(sparsity=0.4), criterion="random")
    assert small.pruned.kind == "module"
    assert small.a.out_features < 8


@pytest.mark.parametrize("name", FROZEN)
def test_what_would_count_otherwise_is_frozen(name) -> None:
    network = trace(Net(FROZEN[name]), X)
    assert not network.unknown
    held = {(f.path, f.dim): f for f in network.frozen}
    assert held["b.weight", 0].entries == 8
    assert not any(m.path == "b.weight" and m.dim == 0 for g in network.groups for m in g.members)


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_left_beside_frozen_units_is_proven(name) -> None:
    net = Net(FROZEN[name])
    network = trace(net, X)
    whole = [group for group in network.groups if len(group) == 8]
    removed = np.zeros(network.coupling.units, bool)
    for group in whole:
        removed[group.units[::3]] = True
    plan = Plan.of(network, removed)
    assert prove(net, X, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-7


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(SUBSETS, st.sampled_from(["softmax", "mean", "variance and mean", "cumulative sum"]))
def test_an_operator_over_survivors_gives_zero_elsewhere(gone, name) -> None:
    """Its own value, not only the outputs: those of the survivors, and zeros."""
    net, x = Net(OVER_WHAT_REMAINS[name]).double(), X.double()
    network = trace(net, x)
    plan = plan_of(network, {"b": gone})
    (mixed,) = mixing(network, plan)
    seen = {}

    class Recording(SurvivorModel):
        def step(self, node, function, values):
            seen[node.name] = super().step(node, function, values)
            return seen[node.name]

    reference = over_survivors(net, network, plan)
    reference.__class__ = Recording
    with torch.no_grad():
        reference(x)
        kept = np.setdiff1d(np.arange(8), gone)
        rows = F.linear(x, net.b.weight[kept], net.b.bias[kept])
    expected = {
        "softmax": lambda: rows.softmax(-1),
        "mean": lambda: rows.mean(-1, keepdim=True),
        "variance and mean": lambda: torch.var_mean(rows, -1, correction=0, keepdim=True),
        "cumulative sum": lambda: rows.cumsum(-1),
    }[name]()
    found = seen[mixed]
    if isinstance(expected, tuple):
        assert all(map(close, found, expected))
    elif expected.shape[-1] == 1:
        assert close(found, expected)
    else:
        assume(len(kept) < 8)
        assert close(found[..., kept], expected)
        assert (found[..., gone] == 0).all()
        assert found.shape[-1] == 8


def test_without_removal_nothing_is_taken_over_survivors() -> None:
    network = trace(Net(OVER_WHAT_REMAINS["mean"]), X)
    nothing = Plan.of(network, np.zeros(network.coupling.units, bool))
    assert mixing(network, nothing) == frozenset()
    first = plan_of(network, {"a": np.array([0])})
    assert mixing(network, first) == frozenset(), "only b is averaged"
    assert len(mixing(network, plan_of(network, {"b": np.array([0])}))) == 1


def test_the_reference_takes_any_batch() -> None:
    net = Net(OVER_WHAT_REMAINS["softmax"])
    network = trace(net, X)
    reference = over_survivors(net, network, plan_of(network, {"b": np.array([1, 4])}))
    assert isinstance(reference, GraphModel)
    with torch.no_grad():
        assert torch.allclose(reference(X)[:1], reference(X[:1]), atol=1e-6)
        assert reference(torch.cat([X, X])).shape == (6, 7, 3)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_images_resampled_with_antialiasing_keep_their_channels_apart(mode) -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.interpolate(self.up(x), size=(4, 4), mode=mode, antialias=True)
            return self.out(x)

    net, x = Resized().eval(), torch.randn(2, 3, 9, 9)
    network = trace(net, x)
    assert [len(group) for group in network.groups] == [8]
    small = rf.prune(net, x, rf.Budget(sparsity=0.5))
    assert small.pruned.kind == "module"


def test_volumes_are_pooled_and_resampled() -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.AdaptiveMaxPool3d(2),
        nn.Upsample(scale_factor=2, mode="trilinear"),
        nn.AvgPool3d(2),
        nn.Conv3d(8, 2, 1),
    ).eval()
    x = torch.randn(2, 1, 4, 4, 4)
    assert [len(group) for group in trace(net, x).groups] == [8]
    assert rf.prune(net, x, rf.Budget(sparsity=0.5)).pruned.error < 1e-7


def test_channel_attention_by_mean_and_maximum_over_channels() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 3, padding=1)
            self.out = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.up(x))
            pooled = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
            return self.out(y * self.gate(pooled).sigmoid())

    net, x = Attention().eval(), torch.randn(2, 3, 8, 8)
    assert [len(group) for group in trace(net, x).groups] == [8]
    assert rf.prune(net, x, rf.Budget(sparsity=0.5)).pruned.kind == "module"
