"""Depth under a budget: which blocks go, alone and in competition with units."""

import copy

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.errors import BudgetError, InputError
from rarefy.graph.count import count
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import stubs
from rarefy.graph.trace import trace
from rarefy.pruning.scoring.compensated import Compensated
from rarefy.pruning.structure.depth import BlockError
from residual_networks import Residual, inputs

pytestmark = pytest.mark.filterwarnings("ignore:.* was asked for and .* remain:RuntimeWarning")
"""Units and blocks of tiny networks leap over budgets, which is not what is tested here."""

torch.set_num_threads(1)
KINDS = ("Basic", "Inverted", "PreNorm", "Half", "Gated")
X = inputs()
BOTH = ("channel", "depth")


@pytest.fixture(scope="module")
def model() -> Residual:
    return Residual(KINDS)


def weak(model: Residual, *numbers: int) -> Residual:
    """A copy with tiny weights in these blocks."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for number in numbers:
            for parameter in found.blocks[number].parameters():
                parameter *= 1e-3
    return found


def gone(small: nn.Module) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in small.pruned.blocks})


def test_as_many_blocks_as_asked_for_the_least_important(model) -> None:
    net = weak(model, 1, 3)
    before = copy.deepcopy(net.state_dict())
    small = rf.prune(net, X, rf.Budget(blocks=2), structure="depth")
    assert gone(small) == [1, 3]
    record = small.pruned
    assert (record.kind, record.reason, record.held) == ("module", "", {})
    assert record.error < 1e-7
    widths = {w.layer: w.after for w in record.widths}
    assert widths["blocks.3.fc1"] == 0
    assert widths["stem"] == 8
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not stubs(net)
    share = rf.prune(net, X, rf.Budget(sparsity=0.4), structure="depth")
    assert gone(share) == [1, 3]


def test_none_and_all(model) -> None:
    same = rf.prune(model, X, rf.Budget(blocks=0), structure="depth")
    assert same is not model
    assert same.pruned.blocks == ()
    with torch.no_grad():
        assert torch.equal(same(X), model(X))
        trunk = rf.prune(model, X, rf.Budget(blocks=5), structure="depth")
        expected = model.head(torch.relu(model.stem(X)).mean((2, 3)))
        torch.testing.assert_close(trunk(X), expected)
    with pytest.raises(BudgetError, match="only 5 blocks can be bypassed"):
        rf.prune(model, X, rf.Budget(blocks=6), structure="depth")


@pytest.mark.parametrize("name", ["macs", "params"])
def test_blocks_alone_fit_a_budget_and_none_is_removed_in_vain(model, name) -> None:
    small = rf.prune(model, X, rf.Budget(**{name: 0.6}), structure="depth")
    whole, left = (getattr(count(net, X), name) for net in (model, small))
    assert left <= 0.6 * whole
    for block in trace(model, X).blocks:
        if block.name in small.pruned.blocks:
            assert left + getattr(block, name) > 0.6 * whole


def test_a_budget_out_of_reach_says_what_is_in_reach(model) -> None:
    with pytest.raises(BudgetError, match=r"without all 5 blocks .* 0\.\d+ remain"):
        rf.prune(model, X, rf.Budget(macs=0.01), structure="depth")
    with pytest.raises(BudgetError, match=r"(without \d blocks|smallest share)"):
        rf.prune(model, X, rf.Budget(macs=0.001), structure=BOTH)


@pytest.mark.parametrize(("name", "share"), [("macs", 0.4), ("params", 0.7)])
def test_blocks_and_units_share_a_budget(model, name, share) -> None:
    net = weak(model, 2)
    small = rf.prune(net, X, rf.Budget(**{name: share}), structure=BOTH)
    whole, left = (getattr(count(n, X), name) for n in (net, small))
    assert 0.85 * share * whole < left <= share * whole
    assert 2 in gone(small)
    assert small.pruned.error < 1e-6
    layers = {w.layer: w.after for w in small.pruned.widths}
    assert layers["blocks.2.up"] == 0
    state = small.state_dict()
    for (path, dim), entries in small.pruned.kept.items():
        assert state[path].shape[dim] == len(entries)


@pytest.mark.filterwarnings("error")
def test_blocks_come_back_where_units_leap_over_a_budget_without_them() -> None:
    torch.manual_seed(0)
    options = {"batch_first": True, "norm_first": True}
    layers = [nn.TransformerEncoderLayer(16, 4, 32, **options) for _ in range(2)]
    for layer in layers:
        layer.linear2.weight.data *= 0.01  # go first, and only heads are left then
        layer.linear2.bias.data *= 0.01
    net = nn.Sequential(nn.Linear(12, 16), *layers, nn.Linear(16, 4)).eval()
    small = rf.prune(net, torch.randn(2, 6, 12), rf.Budget(macs=0.5), structure=BOTH)
    assert small.pruned.left == pytest.approx(0.5, abs=0.01)
    assert small.pruned.left <= 0.5
    assert small.pruned.blocks == ("2.linear1",)
    assert not small.pruned.missed


def test_a_network_of_equally_good_blocks_loses_units_first(model) -> None:
    small = rf.prune(model, X, rf.Budget(macs=0.97), structure=BOTH)
    assert not gone(small)
    assert small.pruned.kept


def test_pruning_twice_and_in_turn(model) -> None:
    first = rf.prune(model, X, rf.Budget(blocks=2), structure="depth")
    second = rf.prune(first, X, rf.Budget(macs=0.7))
    third = rf.prune(second, X, rf.Budget(blocks=2), structure="depth")
    assert len(stubs(third)) > len(stubs(first))
    assert len(third.pruned.blocks) == 2
    macs = [count(net, X).macs for net in (model, first, second, third)]
    assert macs == sorted(macs, reverse=True)
    with torch.no_grad():
        assert third(X).shape == (3, 4)


def test_data_choose_by_influence_and_repair(model) -> None:
    net = copy.deepcopy(model)
    with torch.no_grad():
        net.blocks[3].fc2.weight *= 0
        net.blocks[3].fc2.bias *= 0
    data = [inputs(seed) for seed in range(4)]
    small = rf.prune(net, X, rf.Budget(blocks=1), structure="depth", data=data)
    assert gone(small) == [3]
    assert small.repaired.samples > 0
    with torch.no_grad():
        torch.testing.assert_close(small(X), net(X))


def test_excluded_blocks_stay(model) -> None:
    net = weak(model, 0, 1, 2, 3, 4)
    options = {"structure": "depth", "exclude": ["blocks.1", "blocks.3.fc1.weight", "blocks.4"]}
    small = rf.prune(net, X, rf.Budget(blocks=2), **options)
    assert gone(small) == [0, 2]
    with pytest.raises(BudgetError, match="only 2 blocks"):
        rf.prune(net, X, rf.Budget(blocks=3), **options)
    with pytest.raises(InputError, match="every block is excluded"):
        rf.prune(net, X, rf.Budget(blocks=1), structure="depth", exclude=["blocks"])
    with pytest.raises(InputError, match="Did you mean"):
        rf.prune(net, X, rf.Budget(blocks=1), structure="depth", exclude=["block.1"])


def test_excluded_names_may_go_with_a_block(model) -> None:
    net = weak(model, 2)
    small = rf.prune(net, X, rf.Budget(macs=0.4), structure=BOTH, exclude=["stem"])
    assert small.stem.out_channels == 8


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.a(x)) + self.a(x)))


def test_networks_without_blocks() -> None:
    net, x = Plain(), torch.randn(2, 6)
    with pytest.raises(InputError, match=r"no residual block .*\(its shortcut|no residual block"):
        rf.prune(nn.Sequential(net.a, net.c), x, rf.Budget(blocks=1), structure="depth")
    small = rf.prune(nn.Sequential(net.a, net.c), x, rf.Budget(macs=0.5), structure=BOTH)
    assert small.pruned.blocks == ()
    assert small[0].out_features == 4


@pytest.mark.parametrize(
    ("structure", "budget", "message"),
    [
        ("layer", {"macs": 0.5}, "unknown structure"),
        (("weight", "depth"), {"macs": 0.5}, "unknown structure"),
        ((), {"macs": 0.5}, "unknown structure"),
        (None, {"macs": 0.5}, "unknown structure"),
        ("channel", {"blocks": 1}, "only where nothing else is"),
        (BOTH, {"blocks": 1}, "only where nothing else is"),
        (BOTH, {"sparsity": 0.5}, "blocks go by what they save"),
        (BOTH, {"macs": 0.5, "scope": "local"}, "blocks go by what they save"),
    ],
)
def test_options_that_do_not_fit(model, structure, budget, message) -> None:
    with pytest.raises(InputError, match=message):
        rf.prune(model, X, rf.Budget(**budget), structure=structure)


def test_numbers_of_blocks() -> None:
    with pytest.raises(BudgetError, match="at least 0"):
        rf.Budget(blocks=-1)
    with pytest.raises(BudgetError, match="whole number"):
        rf.Budget(blocks=0.5)


class Stuck(nn.Module):
    """The class needs the weight of its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        x = x + self.a(x) * (self.a.weight.sum() * 0 + 1)
        return self.c(x + self.b(x))


def test_a_class_that_needs_a_block_becomes_a_graph_or_keeps_it() -> None:
    net, x = Stuck().eval(), torch.randn(2, 6)
    budget = rf.Budget(blocks=2)
    small = rf.prune(net, x, budget, structure="depth")
    assert isinstance(small, GraphModel)
    assert small.pruned.kind == "graph"
    assert "needs modules" in small.pruned.reason
    with torch.no_grad():
        torch.testing.assert_close(small(x), net.c(x))
    half = rf.Budget(blocks=1)
    kept = rf.prune(net, x, half, structure="depth", keep_class=True)
    assert type(kept) is Stuck
    assert kept.pruned.blocks == ("b",)
    with pytest.raises((BlockError, BudgetError)):
        rf.prune(net, x, budget, structure="depth", keep_class=True)


@pytest.mark.parametrize("structure", ["depth", BOTH])
def test_a_budget_of_bytes_is_measured(model, structure, tmp_path) -> None:
    small = rf.prune(model, X, rf.Budget(bytes=0.7), structure=structure)
    sizes = [rf.save(n, tmp_path / f"{i}").stat().st_size for i, n in enumerate((model, small))]
    assert sizes[1] <= 0.7 * sizes[0]
    assert small.pruned.blocks or structure == BOTH


def test_losses_that_were_measured_weigh_blocks_and_units(model) -> None:
    net, data = weak(model, 2), [inputs(seed) for seed in range(2)]
    how = Compensated(samples=6, shown=6, ratios=(0.5,))
    options = {"criterion": how, "data": data, "heal": False}
    small = rf.prune(net, X, rf.Budget(macs=0.6), structure=BOTH, **options)
    assert count(small, X).macs <= 0.6 * count(net, X).macs
    alone = rf.prune(net, X, rf.Budget(blocks=1), structure="depth", **options)
    assert gone(alone) == [2]


def test_patterns_and_limits_of_layers_outlive_blocks(model) -> None:
    net = weak(model, 2)
    budget = rf.Budget(
        macs=0.4, layers={"blocks.2.up": 0.5, "blocks.0.conv1": rf.Limit(max_drop=0)}
    )
    small = rf.prune(net, X, budget, structure=BOTH, exclude=["st?m"])
    widths = {w.layer: w.after for w in small.pruned.widths}
    assert widths["stem"] == 8
    assert widths["blocks.0.conv1"] in (0, 5)


def test_what_concerns_units_alone_is_refused(model) -> None:
    given = {"layers": {"stem": 0.5}, "max_drop": 0.5, "min_keep": 4, "round_to": 8}
    for name, value in (*given.items(), ("scope", "local")):
        with pytest.raises(BudgetError, match=f"{name}.*concerns units.*Leave {name} out"):
            rf.prune(model, X, rf.Budget(macs=0.6, **{name: value}), structure="depth")
    measured = rf.sensitivity  # any value: it is refused before it is looked at
    with pytest.raises(InputError, match="Leave sensitivity out"):
        rf.prune(model, X, rf.Budget(blocks=1), structure="depth", sensitivity=measured)


class Idle(nn.Module):
    """Computes something of a branch that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.aside = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        branch = self.b(x)
        self.aside(branch)
        return self.c(x + branch)


def test_calls_for_nothing_hold_no_block() -> None:
    net, x = Idle().eval(), torch.randn(2, 6)
    small = rf.prune(net, x, rf.Budget(macs=0.5), structure="depth")
    assert small.pruned.blocks == ("b",)
    assert {*stubs(small)} == {"b"}
    with torch.no_grad():
        torch.testing.assert_close(small(x), net.c(x))
