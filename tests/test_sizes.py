"""Attributes solved for a plan, and plans that a forward can carry out."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import ProofError
from rarefy.graph.trace import Network, trace
from rarefy.pruning.narrow import stated
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.sizes import Sizes
from rarefy.types import Budget


class Attention(nn.Module):
    """Width = heads x head size, computed in forward; an explicit scale."""

    def __init__(self, width: int = 12, heads: int = 3, scaled: bool = False) -> None:
        super().__init__()
        self.heads, self.scaled = heads, scaled
        self.embed = nn.Linear(5, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = q.shape[-1] ** -0.5 if self.scaled else 0.3
        mixed = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def sizes(model: nn.Module, x: Tensor) -> tuple[Network, Sizes]:
    network = trace(model, x)
    return network, Sizes(network, stated(model, network, x))


def widths(network: Network) -> dict[int, int]:
    """Number of units -> group."""
    return {len(group): number for number, group in enumerate(network.groups)}


def plan_of(network: Network, counts: dict[int, int]) -> Plan:
    removed = np.zeros(network.coupling.units, np.bool_)
    for group, count in counts.items():
        removed[network.groups[group].units[:count]] = True
    return Plan.of(network, removed)


def test_attributes_follow_a_plan_that_fits_and_others_are_named() -> None:
    network, found = sizes(Attention(), torch.randn(2, 4, 5))
    group = widths(network)
    width, heads, positions = group[12], group[3], group[4]
    for lost, lost_heads, lost_positions in product(range(0, 12, 2), range(3), range(4)):
        plan = plan_of(network, {width: lost, heads: lost_heads, positions: lost_positions})
        solution = found.solve(plan)
        fits = 12 - lost == (3 - lost_heads) * (4 - lost_positions)
        assert fits == (not solution.broken)
        if fits:
            (value,) = [v for a, v in solution.values.items() if a.name == "heads"]
            assert value == 3 - lost_heads


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_groups_that_must_fit_each_other_shrink_together(scaled, share) -> None:
    torch.manual_seed(0)
    model, x = Attention(24, 6, scaled), torch.randn(2, 4, 5)
    small = rf.prune(model, x, Budget(sparsity=share, scope="local"), criterion="random")
    assert small.pruned.kind == "module"
    assert isinstance(small, Attention)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if scaled:  # the scale follows the heads' size, so that stays
        assert small.embed.out_features // small.heads == 4
    assert small(torch.randn(3, 9, 5)).shape == (3, 9, 7)


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.hidden = nn.Linear(8 * 16, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(torch.relu(self.conv(x)).view(-1, 128))))


def test_a_number_in_the_code_gives_a_graph_that_says_where() -> None:
    small = rf.prune(Literal(), torch.randn(2, 1, 6, 6), Budget(sparsity=0.5), criterion="random")
    assert small.pruned.kind == "graph"
    assert "view(-1, 128)" in small.pruned.reason


def test_keep_class_leaves_whole_what_the_code_states_and_names_it() -> None:
    model = Literal()
    small = rf.prune(
        model,
        torch.randn(2, 1, 6, 6),
        Budget(sparsity=0.5, scope="local"),
        criterion="random",
        keep_class=True,
    )
    assert isinstance(small, Literal)
    assert small.conv.out_channels == 8
    assert small.hidden.out_features == 5
    assert any("conv" in f.path and f.operator == "forward" for f in small.pruned.frozen)


class Folds(nn.Module):
    """With half of the units, ``view(-1, 8)`` makes one row of two examples: it fits by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).view(-1, 8).tanh().reshape(x.shape[0], -1))


def test_a_number_that_fits_one_batch_size_by_chance_does_not_pass() -> None:
    model, x = Folds(), torch.randn(4, 5)
    small = rf.prune(model, x, Budget(sparsity=0.5), criterion="random")
    assert small.pruned.kind == "graph"
    assert small(x[:3]).shape == (3, 3)


class Fourier(nn.Module):
    """A ramp made from an attribute that also divides: neither may shrink in the class."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(self.width) / self.width
        return self.out(torch.relu(self.b(torch.sin(self.a(x) * ramp))))


def test_what_would_compute_something_else_stays_and_the_class_too() -> None:
    torch.manual_seed(0)
    model, x = Fourier(), torch.randn(4, 5)
    small = rf.prune(model, x, Budget(sparsity=0.5, scope="local"), criterion="random")
    assert small.pruned.kind == "module"
    assert (small.a.out_features, small.b.out_features) == (8, 3)
    assert any(f.path == "a.weight" and f.operator == "forward" for f in small.pruned.frozen)


class Correlated(nn.Module):
    """Divides by the root of a size that it puts into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.out(a @ b.T / torch.sqrt(torch.tensor(a.shape[1])))


def test_a_size_that_becomes_a_tensor_stays() -> None:
    torch.manual_seed(0)
    model, x = Correlated(), torch.randn(4, 5)
    budget = Budget(sparsity=0.5, scope="local")
    small = rf.prune(model, x, budget, criterion="random")
    assert small.pruned.kind == "graph"  # nothing is left to go in the class
    with pytest.raises(ProofError, match="holds all units in place"):
        rf.prune(model, x, budget, criterion="random", keep_class=True)


class Blurred(nn.Module):
    """A depthwise filter whose number of groups is an attribute of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("kernel", torch.rand(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.first(x), self.kernel, groups=self.channels)
        return self.last(x).mean((2, 3))


def test_the_groups_of_a_convolution_follow_under_any_name() -> None:
    model, x = Blurred(), torch.randn(2, 3, 6, 6)
    small = rf.prune(model, x, Budget(sparsity=0.5), criterion="random")
    assert small.pruned.kind == "module"
    assert small.channels == small.first.out_channels == len(small.kernel) == 4


class Config:
    def __init__(self) -> None:
        self.inner, self.halves = 16, [8, 8]


class Configured(nn.Module):
    """Sizes that are read from an object and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.first = nn.Linear(4, 16)
        self.second = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, self.config.inner)
        a, b = x.split(self.config.halves, 1)
        return self.second(torch.cat([torch.tanh(a), torch.relu(b)], 1))


def test_numbers_in_a_configuration_follow_and_are_stored(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Configured(), torch.randn(2, 4)
    small = rf.prune(model, x, Budget(sparsity=0.5, scope="local"), criterion="random")
    assert small.pruned.kind == "module"
    assert (model.config.inner, model.config.halves) == (16, [8, 8])
    assert small.config.inner == sum(small.config.halves) == small.first.out_features == 8
    rf.save(small, tmp_path / "m.safetensors")
    loaded = rf.load(tmp_path / "m.safetensors", Configured())
    assert loaded.config.halves == small.config.halves
    assert torch.equal(loaded(x), small(x))


class Halves(nn.Module):
    """Two layers joined, then taken apart again in equal parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.out = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.cat([self.a(x), self.b(x)], 1).relu().chunk(2, 1)
        return self.out[0](parts[0]) + self.out[1](parts[1])


def test_chunks_stay_equal_where_scores_would_make_them_unequal() -> None:
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(2, 4)
    with torch.no_grad():
        model.a.weight.mul_(10)
    small = rf.prune(model, x, Budget(sparsity=0.5))
    assert small.pruned.kind == "module"
    assert small.a.out_features == small.b.out_features == 4


def test_excluded_groups_are_not_touched_to_make_others_fit() -> None:
    model, x = Halves(), torch.randn(2, 4)
    small = rf.prune(model, x, Budget(sparsity=0.5), criterion="random", exclude=["a"])
    assert small.get_parameter("a.weight").shape[0] == 8


class Reversed(nn.Module):
    """Numbers its units in the code, in a way that no rule of sizes knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(4, 6), nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(torch.relu(self.first(x)))
        return self.out(torch.relu(x)[:, [7, 6, 5, 4, 3, 2, 1, 0]])


def test_keep_class_finds_the_groups_that_break_a_forward_by_trying() -> None:
    torch.manual_seed(0)
    budget = Budget(sparsity=0.5, scope="local")
    model, x = Reversed(), torch.randn(2, 4)
    assert rf.prune(model, x, budget, criterion="random").pruned.kind == "graph"
    small = rf.prune(model, x, budget, criterion="random", keep_class=True)
    assert isinstance(small, Reversed)
    assert small.first.out_features == 3
    assert small.hidden.out_features == 8
    assert any(f.path == "hidden.weight" and f.operator == "forward" for f in small.pruned.frozen)
