"""What can go, and what cannot and why."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.errors import InputError
from rarefy.graph.count import count
from rarefy.graph.trace import trace
from rarefy.pruning.narrow import operate
from rarefy.pruning.plan import Plan
from rarefy.pruning.prune import prune
from rarefy.pruning.structure.surgery import rewrite
from rarefy.types import Budget

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return self.out((x + self.back(self.inner(x).relu())).mean((2, 3)))


def test_a_residual_network_has_a_stream_and_a_block() -> None:
    network = trace(Block(), X)
    found = {g.name: {(m.path, m.dim) for m in g.members} for g in network.groups}
    assert found == {
        "stem": {
            ("stem.weight", 0),
            ("stem.bias", 0),
            ("norm.weight", 0),
            ("norm.bias", 0),
            ("norm.running_mean", 0),
            ("norm.running_var", 0),
            ("inner.weight", 1),
            ("back.weight", 0),
            ("back.bias", 0),
            ("out.weight", 1),
        },
        "inner": {("inner.weight", 0), ("inner.bias", 0), ("back.weight", 1)},
    }
    assert [len(g) for g in network.groups] == [8, 6]
    assert not network.unknown


def test_what_is_frozen_says_why_and_kernels_are_not_worth_telling() -> None:
    network = trace(Block(), X)
    told = {(f.path, f.dim, f.reason) for f in network.frozen}
    assert ("out.weight", 0, "is an output of the network") in told
    assert ("stem.weight", 1, "meets a dimension whose size cannot change") in told
    assert not any(f.dim > 1 for f in network.frozen)


def test_the_table_names_groups_and_frozen_parts() -> None:
    text = str(trace(Block(), X))
    for words in (
        "2 groups, 14 removable units",
        "stem",
        "frozen:",
        "out.weight dim 0",
        "at test_",
    ):
        assert words in text


def test_flattened_channels_take_all_their_positions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 2))
    (group,) = trace(net, X).groups
    assert {m.path: m.indices.shape for m in group.members}["2.weight"] == (5, 36)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, 8), nn.Linear(8, 2), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.fft.fft(x).abs(), "fft"),
        (lambda x: x.sort(-1)[0], "sort"),
        (lambda x: torch.linalg.pinv(x).transpose(1, 2), "linalg_pinv"),
        (lambda x: torch.linalg.svd(x)[2][:, :1] + x, "linalg_svd"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_carried_is_frozen_and_named(function, operator) -> None:
    network = trace(Between(function), torch.randn(2, 4, 5))
    assert not any(m.path == "first.weight" for g in network.groups for m in g.members)
    held = [f for f in network.frozen if f.path == "first.weight" and f.dim == 0]
    assert len(held) == 1
    assert operator in held[0].operator


def test_operators_without_a_rule_are_counted() -> None:
    net = Between(lambda x: torch.linalg.pinv(x).transpose(1, 2))
    network = trace(net, torch.randn(2, 4, 5))
    assert network.unknown == {"aten.linalg_pinv.atol_rtol_tensor": 1}
    assert "operators without a rule: aten.linalg_pinv.atol_rtol_tensor (1x)" in str(network)


def test_channels_that_are_read_by_position_stay_and_others_go() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) + y[:, 2:3]

    network = trace(Picks(), torch.randn(2, 4))
    assert sum(map(len, network.groups)) == 5


@pytest.mark.parametrize("wrong", [nn.ReLU(), lambda x: x, "model"])
def test_what_is_no_network_with_parameters_is_refused(wrong) -> None:
    with pytest.raises(InputError, match="trace"):
        trace(wrong, X)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"float32 \(2, 2, 8, 8\)"):
        trace(Block(), X[:, :2])


def test_a_network_without_values_is_traced_but_not_pruned() -> None:
    with torch.device("meta"):
        net, x = Block(), torch.rand(2, 3, 8, 8)
    assert [len(g) for g in trace(net, x).groups] == [8, 6]
    with pytest.raises(InputError, match="no values"):
        prune(net, x, Budget(sparsity=0.5))


def test_nothing_is_computed_and_pruning_captures_once(monkeypatch) -> None:
    calls = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: calls.append(0) or export(*a, **k))
    prune(Block(), X, Budget(sparsity=0.5))
    assert len(calls) == 1


def test_values_of_the_inputs_are_checked_where_they_are_needed() -> None:
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 6), nn.Linear(6, 2))
    ids = torch.tensor([[1, 7], [0, 2]])
    assert [len(g) for g in trace(net, ids).groups] == [8, 6]
    with pytest.raises(InputError, match=r"does not run on them .*index out of range"):
        prune(net, ids, Budget(sparsity=0.5))


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    net = Block()
    net.lock = threading.Lock()
    assert len(trace(net, X).groups) == 2
    with pytest.raises(InputError, match=r"cannot be copied.*lock"):
        prune(net, X, Budget(sparsity=0.5))


def test_a_network_that_draws_numbers_is_refused_and_stays_as_it_was() -> None:
    net = Between(lambda x: x * torch.rand(1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match="two equal calls"):
        prune(net, torch.rand(2, 5), Budget(sparsity=0.5))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Positions(nn.Module):
    """Reads as many rows of a table as the sequence is long."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 40, 8))
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x) + self.table[:, : x.shape[1]]))


def test_rows_of_a_table_that_these_inputs_do_not_reach_stay() -> None:
    model, x = Positions(), torch.randn(2, 13, 5)
    network = trace(model, x)
    assert [len(group) for group in network.groups] == [8]
    (beyond,) = [f for f in network.frozen if "not read" in f.reason]
    assert (beyond.path, beyond.dim, beyond.entries, beyond.size) == ("table", 1, 27, 40)
    small = prune(model, x, Budget(sparsity=0.5), criterion="random")
    assert small(torch.randn(2, 40, 5)).shape == (2, 40, 3)


# --- what forward computes for nothing ---------------------------------------------------------


class Unused(nn.Module):
    """Dilated convolutions with skips: the last residual is computed, and nobody reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(8, 12, 3, padding=d, dilation=d) for d in (1, 2))
        self.residual = nn.ModuleList(nn.Conv1d(12, 8, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(12, 10, 1) for _ in range(2))
        self.last = nn.Conv1d(10, 4, 1)

    def forward(self, x):
        x, total = self.first(x), 0
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            y = torch.tanh(dilated(x))
            total, x = total + skip(y), x + residual(y)
        return self.last(torch.relu(total))


def test_layers_whose_results_nobody_reads_shrink_too() -> None:
    torch.manual_seed(0)
    net, x = Unused(), torch.randn(3, 3, 13)
    small = prune(net, x, Budget(sparsity=0.5, scope="local"))
    assert small.pruned.kind == "module"
    assert small.residual[1].weight.shape == (4, 6, 1)
    assert "residual.1.weight" not in {f.path for f in small.pruned.frozen}
    small.train()(x).sum().backward()


def test_units_of_nothing_but_an_unused_layer_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
            self.probe = nn.Linear(8, 6)

        def forward(self, x):
            y = self.first(x)
            self.probe(y).softmax(-1)
            (y + y.sort(-1)[0]).argmax(-1)  # holds nothing in place
            return self.last(y)

    network = trace(Net(), torch.randn(3, 5))
    (group,) = network.groups
    assert ("probe.weight", 1) in {(m.path, m.dim) for m in group.members}
    reasons = {(f.path, f.dim): f.reason for f in network.frozen}
    assert "nothing reads" in reasons["probe.weight", 0]
    small = prune(Net(), torch.randn(3, 5), Budget(sparsity=0.5))
    assert small.pruned.kind == "module"
    assert small.probe.weight.shape == (6, 4)


def test_what_nobody_reads_costs_nothing_and_is_in_no_graph() -> None:
    net, x = Unused(), torch.randn(3, 3, 13)
    network = trace(net, x)
    read = network.captured.graph.live.tensor_paths
    assert "residual.1.weight" in network.captured.graph.tensor_paths - read
    plan = Plan.of(network, np.arange(network.coupling.units) % 3 == 0)
    small = rewrite(net, network, plan)
    assert "residual.1.weight" not in dict(small.named_parameters())
    assert "residual.1" not in count(net, x).by_layer
    expected = operate(net, x, network, plan)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected(x), rtol=1e-5, atol=1e-5)


def test_positions_that_are_unpacked_and_not_read_freeze_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.first(x)
            largest, _ = y.max(-1, keepdim=True)
            return self.last(y * largest.sigmoid())

    assert [len(group) for group in trace(Net(), torch.randn(3, 5)).groups] == [8]
