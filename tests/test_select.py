"""Budgets are kept exactly, and what cannot be reached is refused with what can."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.graph.count import count
from rarefy.graph.trace import trace
from rarefy.paths import paths
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.select import select
from rarefy.pruning.structure.surgery import cut
from rarefy.types import Budget, Limit

torch.set_num_threads(1)
X = torch.zeros(2, 3, 6, 6)


class Net(nn.Module):
    """Groups of 12 (a residual stream), 10 and 7 units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.inner = nn.Conv2d(12, 10, 1)
        self.back = nn.Conv2d(10, 12, 1)
        self.hidden = nn.Linear(12, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.back(torch.relu(self.inner(x)))
        return self.out(torch.relu(self.hidden(x.mean((2, 3)))))


with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = Net().eval()
NETWORK = trace(NET, X)
SIZES = {g.name: len(g) for g in NETWORK.groups}
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 50)


def scores(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.random(len(g)) for g in NETWORK.groups]


def kept(plan: Plan) -> dict[str, int]:
    return {g.name: plan.kept(NETWORK, g) for g in NETWORK.groups}


def cost(stem: int, inner: int, hidden: int) -> tuple[int, int]:
    """MACs and parameters of :class:`Net` at these widths, on 6x6 images."""
    macs = 16 * (27 * stem + 2 * stem * inner) + stem * hidden + 2 * hidden
    params = 28 * stem + 2 * stem * inner + inner + stem + (stem + 1) * hidden + 2 * hidden + 2
    return macs, params


def shares(plan: Plan) -> tuple[float, float]:
    """MACs and parameters that remain."""
    after, before = cost(**kept(plan)), cost(**SIZES)
    return after[0] / before[0], after[1] / before[1]


def test_the_costs_are_those_of_the_network_that_is_cut() -> None:
    plan = select(NETWORK, NET, scores(0), Budget(macs=0.5))
    for model, widths in ((NET, SIZES), (cut(NET, NETWORK, plan), kept(plan))):
        found = count(model, X)
        assert (found.macs, found.params) == cost(**widths)


def test_the_groups_are_as_expected() -> None:
    assert SIZES == {"stem": 12, "inner": 10, "hidden": 7}


@QUICK
@given(st.floats(0, 0.9), SEEDS)
def test_local_sparsity_removes_exactly_the_share_of_every_group(share, seed) -> None:
    plan = select(NETWORK, NET, scores(seed), Budget(sparsity=share, scope="local"))
    assert kept(plan) == {name: n - math.floor(share * n + 1e-9) for name, n in SIZES.items()}


@QUICK
@given(st.floats(0, 0.9), SEEDS)
def test_the_units_with_the_smallest_scores_go(share, seed) -> None:
    values = scores(seed)
    plan = select(NETWORK, NET, values, Budget(sparsity=share, scope="local"))
    for group, value in zip(NETWORK.groups, values, strict=True):
        gone = plan.removed[group.units]
        assert value[gone].max(initial=-1) <= value[~gone].min()


@QUICK
@given(st.floats(0, 0.7), SEEDS)
def test_global_sparsity_removes_exactly_the_share_of_all_units(share, seed) -> None:
    budget = Budget(sparsity=share, max_drop=1)
    values = scores(seed)
    plan = select(NETWORK, NET, values, budget)
    wanted = math.floor(share * 29 + 1e-9)
    alive = min(kept(plan).values())
    assert plan.removed.sum() == wanted or (alive == 1 and plan.removed.sum() < wanted)
    if alive > 1:
        joined = np.concatenate(values)
        gone = np.concatenate([plan.removed[g.units] for g in NETWORK.groups])
        assert joined[gone].max(initial=-1) <= joined[~gone].min()


@QUICK
@given(st.floats(0.15, 1), SEEDS, st.sampled_from(["macs", "params"]))
def test_a_local_budget_is_met_and_one_step_less_would_not_meet_it(share, seed, kind) -> None:
    values = scores(seed)
    plan = select(NETWORK, NET, values, Budget(**{kind: share}, scope="local"))
    index = ("macs", "params").index(kind)
    assert shares(plan)[index] <= share
    steps = sum(SIZES.values())
    finer = [
        select(NETWORK, NET, values, Budget(sparsity=k / steps, scope="local", max_drop=1))
        for k in range(steps)
    ]
    fewer = [p for p in finer if (p.removed <= plan.removed).all()]
    nearest = max(
        (p for p in fewer if p.removed.sum() < plan.removed.sum()),
        default=None,
        key=lambda p: p.removed.sum(),
    )
    assert nearest is None or shares(nearest)[index] > share


@QUICK
@given(st.floats(0.15, 1), SEEDS, st.sampled_from(["macs", "params"]))
def test_a_global_budget_is_met_without_waste(share, seed, kind) -> None:
    values = scores(seed)
    index = ("macs", "params").index(kind)
    plan = select(NETWORK, NET, values, Budget(**{kind: share}))
    assert shares(plan)[index] <= share
    lost = plan.removed.sum()
    if lost:
        looser = [
            select(NETWORK, NET, values, Budget(**{kind: s})) for s in np.linspace(share, 1, 40)
        ]
        fewer = [p for p in looser if p.removed.sum() < lost]
        most = max(fewer, key=lambda p: p.removed.sum())
        assert shares(most)[index] > share


@QUICK
@given(st.floats(0, 0.95), st.integers(1, 9), st.floats(0.05, 1), st.integers(1, 5), SEEDS)
def test_floors_and_multiples_are_respected(share, least, drop, multiple, seed) -> None:
    budget = Budget(sparsity=share, min_keep=least, max_drop=drop, round_to=multiple)
    for name, left in kept(select(NETWORK, NET, scores(seed), budget)).items():
        size = SIZES[name]
        assert left >= min(least, size)
        assert size - left <= math.floor(size * drop + 1e-9)
        assert left % multiple == 0 or left == size


@pytest.mark.parametrize(
    ("name", "closed"),
    [("stem", {"stem"}), ("back", {"stem"}), ("inner.weight", {"inner"}), ("hidden", {"hidden"})],
)
def test_excluded_layers_keep_their_width(name, closed) -> None:
    plan = select(NETWORK, NET, scores(0), Budget(sparsity=0.5, scope="local"), [name])
    whole = {n for n, left in kept(plan).items() if left == SIZES[n]}
    assert whole == closed


def test_an_excluded_name_that_matches_nothing_is_an_error_with_a_guess() -> None:
    with pytest.raises(InputError, match=r"inner"):
        select(NETWORK, NET, scores(0), Budget(sparsity=0.5), ["iner"])


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(InputError, match="no unit"):
        select(NETWORK, NET, scores(0), Budget(sparsity=0.5), ["stem", "inner", "hidden"])


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("limits", [{}, {"min_keep": 5}, {"max_drop": 0.3}, {"round_to": 4}])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_an_impossible_budget_says_what_can_be_reached(kind, limits, scope) -> None:
    with pytest.raises(BudgetError) as caught:
        select(NETWORK, NET, scores(1), Budget(**{kind: 0.001}, scope=scope, **limits))
    offered = float(re.search(rf"{kind}=([0-9.]+)", caught.value.remedy)[1])
    plan = select(NETWORK, NET, scores(1), Budget(**{kind: offered}, scope=scope, **limits))
    assert shares(plan)[("macs", "params").index(kind)] <= offered


@QUICK
@given(st.floats(0.05, 0.6), st.integers(1, 5), st.floats(0.3, 1), SEEDS)
def test_where_limits_keep_units_of_a_sparsity_others_go(share, least, drop, seed) -> None:
    most = {n: min(math.floor(n * drop + 1e-9), n - min(least, n), n - 1) for n in SIZES.values()}
    wanted = math.floor(share * 29 + 1e-9)
    order = [100.0 if group.name.startswith("stem") else 1.0 for group in NETWORK.groups]
    values = [score + plus for score, plus in zip(scores(seed), order, strict=True)]
    budget = Budget(sparsity=share, min_keep=least, max_drop=drop)
    plan = select(NETWORK, NET, values, budget)
    assert plan.removed.sum() == min(wanted, sum(most.values()))
    assert bool(plan.missed) == (plan.removed.sum() < 0.98 * wanted)


def test_a_layers_own_share_that_does_not_go_is_said() -> None:
    budget = Budget(macs=0.8, layers={"inner": 0.5})
    (inner,) = (g for g, group in enumerate(NETWORK.groups) if len(group) == 10)
    plan = select(NETWORK, NET, scores(0), budget, closed={inner: "for a test"})
    assert "takes 5 of 10 units" in plan.missed
    assert "lets 0 of them go" in plan.missed


def test_shared_weights_are_counted_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).eval()
    net[1].weight = net[0].weight
    wide = nn.Sequential(nn.Linear(3, 4), net)
    network = trace(wide, torch.zeros(2, 3))
    values = [np.arange(len(g), dtype=float) for g in network.groups]
    plan = select(network, wide, values, Budget(params=0.7))
    before, after = (
        count(wide, torch.zeros(2, 3)),
        count(cut(wide, network, plan), torch.zeros(2, 3)),
    )
    assert after.params / before.params <= 0.7


def test_every_tensor_keeps_an_entry() -> None:
    """Both halves of a split live on, whatever the scores."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(3, 8)
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.both(x).split([4, 4], 1)
            return self.left(a) + self.right(b)

    net = Halves().eval()
    network = trace(net, torch.zeros(2, 3))
    values = [np.arange(len(g), dtype=float) for g in network.groups]
    plan = select(network, net, values, Budget(sparsity=0.9, max_drop=1))
    small = cut(net, network, plan)
    assert min(*small.left.weight.shape, *small.right.weight.shape) >= 1


@pytest.mark.parametrize(
    ("options", "missed"),
    [
        ({}, ""),
        ({"scope": "local"}, ""),
        ({"scope": "local", "round_to": 8}, "round_to"),
        ({"min_keep": 100}, r"sparsity=0.5 takes \d+ units.* let 0 of them go"),
        ({"max_drop": 0.1}, "let 2 of them go"),
        ({"layers": {"*": Limit(max_drop=0)}}, "let 0 of them go"),
    ],
)
def test_what_keeps_a_sparsity_from_being_reached_is_said(options, missed) -> None:
    plan = select(NETWORK, NET, scores(0), Budget(sparsity=0.5, **options))
    assert re.search(missed, plan.missed) if missed else not plan.missed


@QUICK
@given(st.floats(0.3, 0.9), SEEDS, st.floats(-1e3, 0))
def test_scores_below_zero_rank_like_those_above(share, seed, shift) -> None:
    values = [score - min(map(np.min, scores(seed))) for score in scores(seed)]
    moved = [score + shift for score in values]
    plans = [select(NETWORK, NET, given, Budget(params=share)) for given in (values, moved)]
    first, second = (kept(plan) for plan in plans)
    assert max(abs(first[name] - second[name]) for name in SIZES) <= 1  # but for rounding


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"macs": 0.5}])
def test_measured_losses_keep_a_local_scope(budget) -> None:
    losses = {g: np.square if g else np.sqrt for g in range(len(NETWORK.groups))}
    local = Budget(**budget, scope="local")
    plan = select(NETWORK, NET, scores(0), local, losses=losses)
    assert kept(plan) == kept(select(NETWORK, NET, scores(0), local))


@pytest.mark.parametrize("name", ["1.weight", "3.weight", "1", "3"])
def test_any_name_of_a_shared_layer_excludes_it(name) -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[3].weight = net[1].weight
    net.append(nn.Linear(6, 2)).eval()
    network = trace(net, torch.zeros(2, 3))
    values = [np.arange(len(g), dtype=float) for g in network.groups]
    assert select(network, net, values, Budget(sparsity=0.5)).removed.any()
    with pytest.raises(InputError, match="no unit"):
        select(network, net, values, Budget(sparsity=0.5), [name])


def test_both_paths_of_a_module_exclude_it() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net.add_module("again", nn.Sequential())
    net.again.inner = net[0]
    network = trace(nn.Sequential(net[0], net[2]).eval(), torch.zeros(2, 3))
    assert network.groups
    assert "again.inner" in paths(net)
