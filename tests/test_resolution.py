"""Ties, relations and fixings -> units, and what goes with them."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy as rf
from rarefy.graph.flow import every
from rarefy.graph.labels import FIXED, Ledger, Relation
from rarefy.graph.resolution import CONFLICT, TOGETHER, common_sizes, resolve
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.surgery import rewrite

torch.set_num_threads(1)


def test_what_is_tied_to_a_fixed_entry_is_fixed_with_its_cause() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    ledger.tie(a, b)
    ledger.fix(b[:1], "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.units == 1
    assert coupling.fixed[coupling.component[a]].tolist() == [True, False]
    cause = coupling.cause[coupling.component[a[0]]]
    assert ledger.fixings[cause].reason == "a reason"


def test_entries_that_never_had_a_label_fix_without_a_cause() -> None:
    ledger = Ledger()
    a = ledger.fresh(2)
    ledger.tie(a, np.array([FIXED, FIXED]))
    coupling = resolve(ledger)
    assert coupling.units == 0
    assert (coupling.cause[coupling.component[a]] == -1).all()


def test_a_fixed_product_fixes_its_factors() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.fix(product[:1], "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.fixed[coupling.component[[a[0], b[0]]]].all()
    assert not coupling.fixed[coupling.component[[a[1], b[1]]]].any()
    assert coupling.fixed[coupling.component[product]].tolist() == [True, False, False, False]


def test_fixed_factors_fix_their_product() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.fix(np.concatenate([a, b]), "node", "a reason")
    coupling = resolve(ledger)
    assert coupling.fixed[coupling.component[product]].all()


def test_tied_products_tie_their_factors() -> None:
    ledger = Ledger()
    a, b, c, d = (ledger.fresh(n) for n in (2, 3, 2, 3))
    ledger.tie(ledger.merge([a, b], [2, 3]), ledger.merge([c, d], [2, 3]))
    coupling = resolve(ledger)
    assert (coupling.component[a] == coupling.component[c]).all()
    assert (coupling.component[b] == coupling.component[d]).all()
    assert coupling.units == 5


def test_products_of_one_relation_that_are_one_entry_tie_their_factors() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    product = ledger.merge([a, b], [2, 2])
    ledger.tie(product[:2], product[2:])
    coupling = resolve(ledger)
    assert coupling.component[a[0]] == coupling.component[a[1]]


def units_along(ledger: Ledger, atoms: np.ndarray) -> list[list[int]]:
    """For each unit, the positions in ``atoms`` that go with it."""
    coupling = resolve(ledger)
    units, positions = coupling.pairs(atoms)
    return sorted(positions[units == u].tolist() for u in np.unique(units))


def test_a_product_with_one_factor_that_can_go_is_that_factor() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(3)
    product = ledger.merge([a, b], [2, 3])
    ledger.fix(a, "node", "a reason")
    coupling = resolve(ledger)
    assert (coupling.component[product] == np.tile(coupling.component[b], 2)).all()
    assert coupling.units == 3


def test_a_product_split_in_two_ways_is_related_to_the_factors_of_both() -> None:
    ledger = Ledger()
    x = ledger.fresh(32)
    a, b = ledger.split(x, (8, 4))
    c, d = ledger.split(x, (4, 8))
    grid = np.arange(32).reshape(4, 2, 4)
    expected = [grid[i].ravel().tolist() for i in range(4)]
    expected += [grid[:, j].ravel().tolist() for j in range(2)]
    expected += [grid[:, :, k].ravel().tolist() for k in range(4)]
    assert units_along(ledger, x) == sorted(expected)
    assert units_along(ledger, a) == sorted(
        [[2 * i, 2 * i + 1] for i in range(4)] + [[j, j + 2, j + 4, j + 6] for j in range(2)]
    )
    assert len(units_along(ledger, c)) == 4
    assert len(units_along(ledger, b)) == 4
    assert len(units_along(ledger, d)) == 6


def test_heads_unflattened_in_one_and_two_dimensions_are_the_same() -> None:
    ledger = Ledger()
    x = ledger.fresh(24)
    ledger.split(x, (6, 4))
    ledger.split(x, (2, 3, 4))
    assert len(units_along(ledger, x)) == 2 + 3 + 4


def test_parts_of_a_product_split_in_another_way_keep_the_longest_factor() -> None:
    ledger = Ledger()
    branch, x = ledger.fresh(6), ledger.fresh(12)
    half, position = ledger.split(x, (2, 6))
    shuffled = ledger.merge([position, half], [6, 2])  # a channel shuffle
    ledger.split(np.concatenate([shuffled[:6], branch]), (2, 6))
    # the next block ties the first half of the shuffled channels with its branch, the other half
    assert units_along(ledger, branch) == [[0, 1], [0, 1, 2, 3, 4, 5], [2, 3], [4, 5]]
    assert units_along(ledger, x) == [[n, n + 6] for n in range(6)]


def test_a_product_split_in_two_ways_that_do_not_fit_keeps_what_both_allow() -> None:
    ledger = Ledger()
    a = ledger.fresh(12)
    first, _ = ledger.split(a, (3, 4))
    ledger.split(a, (2, 6))
    assert units_along(ledger, a) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    coupling = resolve(ledger)
    causes = {ledger.fixings[c].reason for c in coupling.cause[coupling.component[first]]}
    assert causes == {CONFLICT}


def test_a_unit_that_takes_a_whole_dimension_stays() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(3)
    product = ledger.merge([a, b], [2, 3])
    assert resolve(ledger).units == 5
    coupling = resolve(ledger, [a, b, product, product[:3]])  # all of a[0]
    assert coupling.units == 4
    cause = coupling.cause[coupling.component[a[0]]]
    assert ledger.fixings[cause].reason == TOGETHER
    assert (coupling.component[product[:3]] == coupling.component[b]).all()
    ledger.tie(b[:2], b[1:])
    assert resolve(ledger, [a, b, product]).units == 2


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ([(8, 4), (4, 8)], (4, 2, 4)),
        ([(6, 4), (2, 3, 4)], (2, 3, 4)),
        ([(2, 8), (4, 4), (8, 2)], (2, 2, 2, 2)),
        ([(5, 7)], (5, 7)),
        ([(3, 4), (2, 6)], None),
        ([(58, 2), (2, 58)], (2, 29, 2)),
    ],
)
def test_common_sizes(ways, expected) -> None:
    assert common_sizes(ways) == expected


# --- the law: whatever is removed, ties, relations and fixings hold ------------------------------


@st.composite
def ledgers(draw) -> tuple[Ledger, list[np.ndarray]]:
    """A ledger after a random sequence of merges, splits, ties and fixings."""
    ledger = Ledger()
    lines = [ledger.fresh(draw(st.sampled_from([2, 3, 4, 6, 8, 12]))) for _ in range(3)]
    for _ in range(draw(st.integers(1, 7))):
        line = lines[draw(st.integers(0, len(lines) - 1))]
        action = draw(st.sampled_from(["split", "split", "merge", "tie", "fix", "cut", "tile"]))
        if action == "split":
            inner = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if len(line) % n == 0]))
            parts = ledger.split(line, (len(line) // inner, inner))
            lines += [part for part in parts if part is not None]
        elif action == "merge":
            other = lines[draw(st.integers(0, len(lines) - 1))]
            if len(line) * len(other) <= 64:
                lines.append(ledger.merge([line, other], [len(line), len(other)]))
        elif action == "tie":
            equal = [other for other in lines if len(other) == len(line)]
            ledger.tie(
                line,
                draw(st.permutations(equal[draw(st.integers(0, len(equal) - 1))]))
                if draw(st.booleans())
                else equal[-1],
            )
        elif action == "fix":
            ledger.fix(line[: draw(st.integers(1, len(line)))], "node", "a reason")
        elif action == "cut":
            lines.append(line[draw(st.integers(0, len(line) - 1)) :])
        elif len(line) <= 12:
            lines.append(np.repeat(line, 2))
    return ledger, lines


def check(ledger: Ledger, gone: np.ndarray) -> None:
    for a, b in ledger.ties:
        assert (gone[a] == gone[b]).all()
    for fixing in ledger.fixings:
        assert not gone[fixing.atoms].any()
    for relation in ledger.relations:
        assert (gone[relation.product] == np.any([gone[f] for f in relation.factors], 0)).all()
    assert not gone[FIXED]


@settings(max_examples=300, deadline=None)
@given(ledgers(), st.integers(0, 2**32 - 1))
def test_whatever_is_removed_the_ledger_and_a_part_of_each_line_hold(drawn, seed) -> None:
    ledger, lines = drawn
    coupling = resolve(ledger, lines)
    generator = np.random.default_rng(seed)
    removals = [np.arange(coupling.units) == u for u in range(min(coupling.units, 12))]
    for removed in removals:
        assert not any(coupling.gone(removed)[line].all() for line in lines)
    removals += [generator.random(coupling.units) < 0.4 for _ in range(4)]
    for removed in removals:
        check(ledger, coupling.gone(removed))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([(24,), (2, 12), (12, 2), (4, 6), (6, 4), (2, 3, 4), (2, 2, 6)])))
def test_a_refinement_leaves_a_unit_for_every_factor(ways) -> None:
    ledger = Ledger()
    x = ledger.fresh(24)
    for sizes in ways:
        ledger.split(x, sizes)
    sizes = common_sizes([w for w in ways if len(w) > 1] or [(24,)])
    if sizes is not None:
        assert prod(sizes) == 24
        assert resolve(ledger).units == sum(sizes)


def test_a_relation_of_three_with_a_fixed_one_is_a_relation_of_two() -> None:
    ledger = Ledger()
    q, h, d = ledger.fresh(3), ledger.fresh(2), ledger.fresh(4)
    first = ledger.merge([q, h, d], [3, 2, 4])
    second = ledger.merge([ledger.fresh(2), ledger.fresh(4)], [2, 4])
    ledger.fix(q, "node", "is taken apart")
    ledger.tie(first[8:16], second)
    assert len(units_along(ledger, second)) == 6
    assert isinstance(ledger.relations[0], Relation)


# --- networks ------------------------------------------------------------------------------------


class TwoGroupings(nn.Module):
    """Channels scaled in 8 groups of 4, then in 4 groups of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 32), nn.Linear(32, 3)
        self.few, self.many = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(8, 1))
        self.within = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.inner(x).relu().reshape(-1, 8, 4) * self.many).flatten(1)
        return self.out((y.reshape(-1, 4, 8) * self.few * self.within).flatten(1))


class Norms(nn.Module):
    """Group norms of one width, in 8 groups and in 4."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second = nn.GroupNorm(8, 32), nn.GroupNorm(4, 32)
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(self.inner(x)).relu()))


class Shuffle(nn.Module):
    """Two blocks of a ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 10, 1), nn.ReLU(), nn.Conv2d(10, 12, 3, padding=1))
            for _ in range(2)
        )
        self.out = nn.Conv2d(24, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for branch in self.branches:
            first, second = x.chunk(2, 1)
            b, c, h, w = x.shape
            x = torch.cat([first, branch(second)], 1)
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.out(x)


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "inputs", "layer", "least"),
    [
        (TwoGroupings, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "inner", 10),
        (Norms, IMAGES, "inner", 4),
        (Shuffle, IMAGES, "branches.0.0", 10),
    ],
)
def test_networks_with_unequal_relations_are_pruned_with_proof(build, inputs, layer, least) -> None:
    torch.manual_seed(0)
    net = build().eval()
    network = trace(net, inputs)
    held = [
        m for g in network.groups for m in g.members if (m.path, m.dim) == (f"{layer}.weight", 0)
    ]
    assert sum(len(m.indices) for m in held) >= least
    for group in network.groups:
        for unit in (0, len(group) // 2):
            removed = np.arange(network.coupling.units) == group.units[unit]
            plan = Plan.of(network, removed)
            if not any(plan.gone[a].all() for v in network.flow.labels.values() for a in every(v)):
                assert prove(net, inputs, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-5
    small = rf.prune(net, inputs, rf.Budget(sparsity=0.5, scope="local"), criterion="random")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
