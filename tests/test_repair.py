"""Healing of whole networks: nearer to the original, never farther, and what is left alone."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.batches import evaluating
from rarefy.errors import DataError, InputError
from rarefy.pruning import repair as module
from rarefy.pruning.repair import repair
from rarefy.pruning.repairing import walk
from rarefy.pruning.running import examples
from rarefy.pruning.sparsity import gram
from shared_weights import Heads, Siamese

torch.set_num_threads(1)
HALF = rf.Budget(sparsity=0.5, scope="local")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.d = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.b, self.nb = nn.Conv2d(12, 10, 3, stride=2), nn.BatchNorm2d(10)
        self.o = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.na(self.a(x)))
        x = torch.relu(self.nb(self.b(self.d(x))))
        return self.o(x.mean((2, 3)))


def settled(seed: int = 0) -> tuple[Net, torch.Tensor]:
    """A network whose statistics fit its inputs, and inputs whose channels are correlated."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net().train()
        x = torch.randn(96, 3, 8, 8).cumsum(2) / 2
        for _ in range(40):
            net(x)
    return net.eval(), x


def distance(first: nn.Module, second: nn.Module, x: torch.Tensor) -> float:
    with evaluating(first, second):
        return float((first(x) - second(x)).square().mean())


def test_a_repaired_network_is_nearer_to_the_original_on_new_inputs() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    healed = repair(net, small, [x[:64]])
    assert distance(net, healed, x[64:]) < 0.5 * distance(net, small, x[64:])
    assert set(healed.repaired.errors) == {"d", "b", "o"}
    assert any(after < before for before, after in healed.repaired.errors.values())
    assert type(healed) is Net


def test_a_layer_that_would_become_worse_is_left() -> None:
    """Fewer rows than unknowns: what fits the rows does not fit others."""
    net, x = settled()
    small = rf.prune(net, x, HALF)
    healed = repair(net, small, [x[:2]])
    for path, (before, after) in healed.repaired.errors.items():
        layer, old = healed.get_submodule(path), small.get_submodule(path)
        same = torch.equal(layer.weight, old.weight) and torch.equal(layer.bias, old.bias)
        assert same == (after >= before)


def test_neither_network_is_changed() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    states = [copy.deepcopy(m.state_dict()) for m in (net, small)]
    random = torch.get_rng_state()
    repair(net, small, [x])
    for model, state in zip((net, small), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_equal_seeds_give_equal_networks() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    first, second = repair(net, small, [x]), repair(net, small, [x])
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_nothing_removed_nothing_changed() -> None:
    net, x = settled()
    same = rf.prune(net, x, rf.Budget(sparsity=0))
    healed = repair(net, same, [x])
    assert healed.repaired.errors == {}
    assert distance(net, healed, x) < 1e-10


def test_statistics_move_with_the_inputs_of_a_batch_norm() -> None:
    """Without removed channels before it, a BatchNorm keeps the survivors' statistics."""
    net, x = settled()
    small = rf.prune(net, x, HALF)
    healed = repair(net, small, [x])
    torch.testing.assert_close(healed.na.running_mean, small.na.running_mean)
    assert not torch.equal(healed.nb.running_mean, small.nb.running_mean)


class Literal(nn.Module):
    """Becomes a graph, whose chunk is rewritten as a split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.a(x).view(-1, 16).chunk(2, 1)
        return self.o(value * gate.sigmoid())


def test_rewritten_graphs_are_repaired_too() -> None:
    net, x = Literal().eval(), torch.randn(300, 6)
    small = rf.prune(net, x, HALF)
    assert small.pruned.kind == "graph"
    healed = repair(net, small, [x[:200]])
    assert distance(net, healed, x[200:]) < distance(net, small, x[200:])


def test_layers_that_are_used_twice_are_left_and_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.o = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.n(self.b(self.a(x))))
            return self.o(torch.relu(self.n(self.b(x))))

    net, x = Twice().eval(), torch.randn(100, 6)
    small = rf.prune(net, x, HALF)
    healed = repair(net, small, [x])
    assert healed.repaired.skipped == {"b": "its weight is used several times"}
    torch.testing.assert_close(healed.n.running_mean, small.n.running_mean)


def apart(net: nn.Module, other: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    with evaluating(net, other):
        first, second = (torch.cat([y.flatten() for y in [*m(**inputs)]]) for m in (net, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize(("make", "names"), [(Siamese, "xy"), (Heads, "x")])
def test_a_layer_of_several_calls_is_solved_for_all_of_them(make, names) -> None:
    net = make().train()
    batches = [{name: torch.randn(24, 3, 8, 8).cumsum(2) / 2 for name in names} for _ in range(8)]
    for batch in batches * 4:
        net(**batch)
    small = rf.prune(net.eval(), batches[0], rf.Budget(sparsity=0.3, scope="local"))
    healed = repair(net, small, batches[:6], samples=144)
    assert not healed.repaired.skipped
    assert apart(net, healed, batches[7]) < 0.7 * apart(net, small, batches[7])


def test_what_spans_the_lost_units_makes_up_for_them_in_every_call() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
            with torch.no_grad():
                for held in (self.a.weight, self.a.bias):
                    held[4:] = 0.5 * held[:4]  # the weaker half, whose outputs are half the others

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            one, two = (self.b(torch.relu(self.a(v))) for v in (x, y))
            return one * two

    net = Towers().eval()
    batches = [{"x": torch.randn(64, 6), "y": 3 * torch.rand(64, 6)} for _ in range(4)]
    small = rf.prune(net, batches[0], HALF)
    assert apart(net, small, batches[3]) > 0.05
    assert apart(net, repair(net, small, batches[:3]), batches[3]) < 1e-3


def test_statistics_of_a_norm_of_several_calls_are_those_of_all() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
            self.n, self.o = nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            one, two = (self.n(torch.relu(self.b(torch.relu(self.a(v))))) for v in (x, y))
            return self.o(torch.relu(one)) - self.o(torch.relu(two))

    net = Towers().eval()
    inputs = {"x": torch.randn(200, 6), "y": 1 + torch.randn(200, 6)}
    rows = torch.cat([*inputs.values()])
    with torch.no_grad():  # the statistics of its inputs
        before = torch.relu(net.b(torch.relu(net.a(rows))))
        net.n.running_mean.copy_(before.mean(0))
        net.n.running_var.copy_(before.var(0, correction=0))
    small = rf.prune(net, inputs, rf.Budget(params=0.61), exclude=["b", "o"])
    healed = repair(net, small, [inputs])
    with torch.no_grad():
        after = torch.relu(healed.b(torch.relu(healed.a(rows))))
    torch.testing.assert_close(healed.n.running_mean, after.mean(0))
    torch.testing.assert_close(healed.n.running_var, after.var(0, correction=0))


class Shared(nn.Module):
    """Two layers of one BatchNorm, the first of which is used twice where it is told so."""

    def __init__(self, *, is_twice: bool) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(6, 10), nn.Linear(6, 10)
        self.a, self.b = (nn.Linear(10, 8, bias=False) for _ in range(2))
        self.n, self.is_twice = nn.BatchNorm1d(8), is_twice

    def inner(self, x, y):
        pairs = [(self.p, self.a, x), (self.q, self.b, 3 * y + 1)]
        pairs += [(self.p, self.a, y)] * self.is_twice
        return (layer(torch.relu(before(v))) for before, layer, v in pairs)

    def forward(self, x, y):
        return torch.cat([torch.relu(self.n(v)) for v in self.inner(x, y)], 1)


@pytest.mark.parametrize("is_twice", [False, True])
def test_statistics_of_a_norm_of_several_layers_are_those_of_all(is_twice) -> None:
    net = Shared(is_twice=is_twice).eval()
    inputs = {name: torch.randn(200, 6) for name in "xy"}

    def moments(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            rows = torch.cat([*model.inner(**inputs)])
        return [rows.mean(0), rows.var(0, correction=0)]

    with torch.no_grad():
        for held, own in zip((net.n.running_mean, net.n.running_var), moments(net), strict=True):
            held.copy_(own)
    small = rf.prune(net, inputs, HALF, exclude=["a", "b"])
    healed = repair(net, small, [inputs])
    found = [healed.n.running_mean, healed.n.running_var]
    torch.testing.assert_close(found, moments(healed), rtol=1e-3, atol=1e-4)
    assert apart(net, healed, inputs) < 0.8 * apart(net, small, inputs)


def test_calls_in_a_row_of_which_the_last_reads_the_first_are_left_and_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x, y):
            x, y = torch.relu(self.p(x)), torch.relu(self.p(y))
            one, two = self.a(x), self.a(y)
            return self.o(self.a(one)) - self.o(two)

    net = Net().eval()
    batches = [{name: torch.randn(64, 6) for name in "xy"} for _ in range(3)]
    sparse = rf.prune(net, batches[0], rf.Budget(sparsity=0.6), structure="weight")
    healed = repair(net, sparse, batches[:2])
    assert healed.repaired.skipped == {"a": "its weight is used several times"}
    assert healed.repaired.errors.keys() == {"p", "o"}
    assert apart(net, healed, batches[2]) < apart(net, sparse, batches[2])


def test_layers_of_one_learned_query_are_not_one_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(40, 8))
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            one, two = self.a(self.query), self.b(self.query)
            return self.c(x) @ one.T @ two

    net, x = Net().eval(), torch.randn(64, 8)
    healed = repair(net, rf.prune(net, x, structure="2:4"), [x])
    assert healed.repaired.errors.keys() == {"a", "b", "c"}
    assert not healed.repaired.skipped


def test_data_are_checked() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    with pytest.raises(DataError):
        repair(net, small, [])
    with pytest.raises(DataError, match="NaN"):
        repair(net, small, [x * torch.nan])
    with pytest.raises(InputError, match="record"):
        repair(net, net, [x])
    for wrong in (0, None, True, 2.5, "all"):
        with pytest.raises(InputError, match=r"samples.*number of examples"):
            repair(net, small, [x], samples=wrong)
    with pytest.raises(InputError, match="operators"):
        repair(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), small, [x])


def test_activations_that_are_not_finite_are_named_by_their_layer() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    for broken in (net, small):
        model = copy.deepcopy(broken)
        with torch.no_grad():
            model.a.weight.fill_(3e38)
        pair = (model, small) if broken is net else (net, model)
        with pytest.raises(DataError, match=r"layer '(a|na)': activations are NaN or infinite"):
            repair(*pair, [x])


def test_one_example_solves_nothing() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    healed = repair(net, small, [x[:1]])
    assert healed.repaired.errors == {}
    assert set(healed.repaired.skipped) == {"d", "b", "o"}
    assert all("too few examples" in reason for reason in healed.repaired.skipped.values())
    assert torch.equal(healed.o.weight, small.o.weight)


@pytest.mark.parametrize("limit", [1, 5, 64, 1000])
def test_as_many_samples_as_asked_for_and_there_are(limit) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    batches = [(x[:40], torch.zeros(40)), (x[40:], torch.zeros(56))]
    assert repair(net, small, batches, samples=limit).repaired.samples == min(limit, 96)


# --- any network ---------------------------------------------------------------------------------


class Layered(nn.Module):
    """Layers of many kinds, each fed by units that go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.matrix = nn.Parameter(torch.randn(16, 12) / 4)
        self.memory, self.up = nn.GRU(12, 12, batch_first=True), nn.ConvTranspose1d(12, 8, 2)
        self.table, self.shift = nn.Parameter(torch.randn(8, 3) / 3), nn.Parameter(torch.ones(3))
        self.mix = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        x = torch.relu(self.norm(self.embed(x)) @ self.matrix)
        x = torch.relu(self.up(self.memory(x)[0].transpose(1, 2)))
        mixed = self.mix(x)  # positions are its features, and units are its rows
        found = torch.addmm(self.shift, x.mean(2), self.table)
        return {"found": found, "parts": (mixed.mean(1), x.mean())}


def layered():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Layered().eval(), torch.randn(96, 7, 6).cumsum(1) / 2


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with evaluating(model):
        found = model(x)
    return [found["found"], *found["parts"]]


def test_layers_of_all_kinds_are_repaired_or_named() -> None:
    net, x = layered()
    small = rf.prune(net, x[:2], HALF)
    healed = repair(net, small, [x[:64]])
    assert healed.repaired.errors.keys() == {"matrix", "up", "table"}
    assert healed.repaired.skipped == {
        "memory": "weights of gru are not solved",
        "mix": "units that went are among the rows of its inputs",
    }
    first, second = outputs(net, x[64:])[0], outputs(small, x[64:])[0]
    assert (outputs(healed, x[64:])[0] - first).square().sum() < (second - first).square().sum()


class Decoder(nn.Module):
    """A transposed convolution that reads every channel twice, the second time twice as large."""

    def __init__(self, rank: int, **options: object) -> None:
        super().__init__()
        down = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.conv = down(3, 8, 3, padding=1)
        self.up = up(8, 5, 3, **options)
        with torch.no_grad():
            for value in (self.conv.weight, self.conv.bias):
                value[4:] = 2 * value[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.conv(x)))


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, {"stride": 2, "output_padding": 1}),
        (2, {"stride": (2, 3), "padding": 1}),
        (2, {"dilation": 2, "bias": False}),
        (3, {"stride": 2, "padding": 1, "output_padding": 1}),
    ],
)
def test_transposed_convolutions_are_solved(rank, options) -> None:
    net, x = Decoder(rank, **options).eval(), torch.randn(64, 3, *[5] * rank)
    small = rf.prune(net, x[:2], rf.Budget(sparsity=0.5))
    assert small.conv.out_channels == 4
    healed = repair(net, small, [x])
    with torch.no_grad():
        wanted, before, after = (m(x) for m in (net, small, healed))
    assert (after - wanted).abs().max() < 0.02 * (before - wanted).abs().max()
    assert healed.repaired.errors["up"][1] < 1e-4


class Across(nn.Module):
    """Attention from one sequence to another: one parameter packs the projections of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(5, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = self.first(x).relu(), self.second(y).relu()
        return self.head(self.attention(x, y, y)[0])


@pytest.mark.parametrize("kind", ["pruned", "sparse", "quantized"])
def test_projections_that_one_parameter_packs_are_solved_each(kind) -> None:
    torch.manual_seed(0)
    net = Across().eval()
    data = {"x": torch.randn(256, 4, 6), "y": torch.randn(256, 7, 5)}
    shown = {name: tensor[:2] for name, tensor in data.items()}
    if kind == "pruned":
        small = rf.prune(net, shown, HALF, exclude=["attention"])
    elif kind == "sparse":
        small = rf.prune(net, shown, rf.Budget(sparsity=0.6), structure="weight")
    else:
        small = coarse(rf.quantize(net, [data]))
    healed = repair(net, small, [data])
    assert healed.repaired.skipped == {}
    names = {name for name in healed.repaired.errors if "in_proj" in name}
    if kind != "quantized":  # there each part is a constant of its own
        assert names == {"attention.in_proj_weight[0:16]", "attention.in_proj_weight[16:48]"}
    assert all(after <= before for before, after in healed.repaired.errors.values())
    assert sum(after < before for before, after in healed.repaired.errors.values()) >= 2
    with torch.no_grad():
        wanted, old, new = (m(**data) for m in (net, small, healed))
    assert (new - wanted).square().mean() < 0.9 * (old - wanted).square().mean()
    if kind == "sparse":
        assert (
            (small.attention.in_proj_weight == 0) == (healed.attention.in_proj_weight == 0)
        ).all()


def test_an_int8_network_that_was_pruned_is_held_against_the_original() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(128, 12)
    q = rf.quantize(rf.prune(net, x[:2], HALF), [x])
    healed = repair(net, q, [x])
    before, after = healed.repaired.errors["2"]
    assert after < 0.9 * before
    assert not healed.repaired.skipped  # its record tells which outputs it has
    assert distance(net, healed, x) < distance(net, q, x)


class Gated(nn.Module):
    """Two projections in one parameter, one of which gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(32, 12) / 4)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both.chunk(2)
        return self.head((x @ a.T).relu() * (x @ b.T).sigmoid())


def test_zeros_of_parts_that_are_weights_of_their_own_in_int8_stay() -> None:
    torch.manual_seed(0)
    net, x = Gated().eval(), torch.randn(128, 12)
    q = rf.quantize(rf.prune(net, x[:2], structure="2:4"), [x])
    healed = repair(net, q, [x])
    zeros = [[(p == 0).sum() for p in m.parameters() if p.ndim > 1] for m in (q, healed)]
    assert zeros[0] == zeros[1]
    assert distance(net, healed, x) < distance(net, q, x)


class Complex(nn.Module):
    """A layer of complex numbers between others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 8, dtype=torch.complex64)
        self.c = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu().to(torch.complex64)).real.relu())


def test_a_layer_of_complex_numbers_is_named_and_the_others_solved() -> None:
    torch.manual_seed(0)
    net, x = Complex().eval(), torch.randn(128, 12)
    healed = repair(net, rf.prune(net, x[:2], rf.Budget(macs=0.6)), [x])
    assert healed.repaired.skipped == {"b": "its weight is complex"}
    assert healed.repaired.errors["c"][1] < healed.repaired.errors["c"][0]


@pytest.mark.parametrize(("channels", "groups"), [((16, 16), 4), ((16, 8), 4)])
def test_transposed_convolutions_in_groups_are_solved(channels, groups) -> None:
    torch.manual_seed(0)
    a, b = channels
    net = nn.Sequential(
        nn.Conv2d(3, a, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(a, b, 2, groups=groups),
        nn.Conv2d(b, 2, 1),
    ).eval()
    x = torch.randn(64, 3, 6, 6)
    small = rf.prune(net, x[:2], HALF)
    healed = repair(net, small, [x])
    assert healed.repaired.skipped == {}
    before, after = healed.repaired.errors["2"]
    assert after < 0.9 * before <= 0.9
    assert distance(net, healed, x) < 0.9 * distance(net, small, x)


def test_a_repair_that_does_not_help_as_a_whole_is_taken_back(monkeypatch) -> None:
    net, x = layered()
    small = rf.prune(net, x[:2], HALF)
    distances = iter([2.0, 1.0])  # with the repair, without it; whatever is kept, 2
    monkeypatch.setattr(module, "distance", lambda *outputs: next(distances, 2.0))
    healed = repair(net, small, [x])
    state = small.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in healed.state_dict().items())
    assert "farther from the original" in healed.repaired.skipped["table"]
    assert all(before == after for before, after in healed.repaired.errors.values())


def test_what_does_not_help_is_taken_back_from_the_last_layer_on(monkeypatch) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    wanted = repair(net, small, [x])
    solve = walk.solve

    def spoilt(fit, check, weights):
        found = solve(fit, check, weights)
        is_last = weights.values.shape[1] == 4  # the outputs of the network
        return replace(found, values=100 * found.values) if is_last else found

    monkeypatch.setattr(walk, "solve", spoilt)
    healed = repair(net, small, [x])
    assert list(healed.repaired.skipped) == ["o"]
    assert healed.repaired.errors["o"][0] == healed.repaired.errors["o"][1]
    assert healed.repaired.errors["b"] == wanted.repaired.errors["b"]
    for name, tensor in healed.state_dict().items():
        source = small if name.startswith("o.") else wanted
        assert torch.equal(tensor, source.state_dict()[name])


def test_layers_of_one_name_are_all_taken_back(monkeypatch) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = ((8, 6), (8, 8), (3, 8))
            self.w = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for w in self.w[:2]:
                x = torch.relu(nn.functional.linear(x, w))
            return nn.functional.linear(x, self.w[2])

    net, x = nn.Sequential(Bare()).eval(), torch.randn(100, 6)
    small = rf.prune(net, x[:2], HALF)
    solve = walk.solve

    def spoilt(fit, check, weights):
        found = solve(fit, check, weights)
        return replace(found, values=100 * found.values, errors=(1.0, 0.5))

    monkeypatch.setattr(walk, "solve", spoilt)
    healed = repair(net, small, [x])
    state = small.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in healed.state_dict().items())


class Branching(nn.Module):
    """Takes another way where it is narrow, so that the graphs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = -torch.relu(x) if x.shape[1] == 16 else torch.relu(x).neg() + 0
        return self.o(torch.tanh(self.b(x)))


def test_other_operators_between_the_layers_do_not_matter() -> None:
    torch.manual_seed(0)
    net, x = Branching().eval(), torch.randn(200, 6).cumsum(1)
    small = rf.prune(net, x[:2], HALF)
    assert small.pruned.kind == "module"
    healed = repair(net, small, [x[:160]])
    assert healed.repaired.errors.keys() == {"b", "o"}
    assert distance(net, healed, x[160:]) < distance(net, small, x[160:])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.o(torch.relu(self.a(left) + self.b(right)).view(-1, 16))


def test_keyword_arguments_in_any_order() -> None:
    torch.manual_seed(0)
    net = Pair().eval()
    left, right = torch.randn(200, 6), torch.randn(200, 4)
    small = rf.prune(net, {"left": left[:2], "right": right[:2]}, HALF)
    assert small.pruned.kind == "graph"
    healed = repair(net, small, [{"right": right, "left": left}])
    assert healed.repaired.errors["o"][1] < healed.repaired.errors["o"][0]


class OneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.relu(self.a(x))) + torch.ones(40, 1)


def test_a_network_of_one_batch_size_is_repaired_on_one_batch() -> None:
    torch.manual_seed(0)
    net, x = OneSize().eval(), torch.randn(80, 6).cumsum(1)
    small = rf.prune(net, x[:40], HALF)
    healed = repair(net, small, [x[:40], x[40:]])
    assert healed.repaired.samples == 40
    assert healed.repaired.errors["o"][1] < healed.repaired.errors["o"][0]


def test_data_that_the_network_does_not_take_are_refused() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    with pytest.raises(DataError, match="does not run on a batch"):
        repair(net, small, [x[:, :2]])


def test_what_cannot_be_run_side_by_side_is_returned_as_it_was(monkeypatch) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)

    def failing(*args: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr(module.Walk, "run", failing)
    with pytest.warns(RuntimeWarning, match="nothing was solved.*no way"):
        healed = repair(net, small, [x])
    assert "no way" in healed.repaired.skipped[""]
    assert distance(small, healed, x) == 0


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")])
def test_want_of_memory_is_not_taken_for_another_network(monkeypatch, error) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)

    def failing(*args: object) -> None:
        raise error

    monkeypatch.setattr(module.Walk, "run", failing)
    with pytest.raises(type(error), match="full"):
        repair(net, small, [x])


@pytest.mark.parametrize("seed", ["a", None, 0.5])
def test_seeds_that_are_no_whole_numbers_are_refused(seed) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    with pytest.raises(InputError, match="no whole number"):
        repair(net, small, [x], seed=seed)


def test_a_compiled_original_is_refused_in_its_own_words() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    with pytest.raises(InputError, match="compile"):
        repair(torch.compile(net), small, [x])


@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_no_numbers_are_named(which) -> None:
    net, x = settled()
    pair = [net, rf.prune(net, x, HALF)]
    with torch.no_grad():
        pair[which].o.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"o\.weight.*NaN"):
        repair(*pair, [x])


def test_few_passes_find_what_is_taken_back(monkeypatch) -> None:
    torch.manual_seed(0)
    layers = [part for _ in range(20) for part in (nn.Linear(8, 8), nn.Tanh())]
    net, x = nn.Sequential(*layers).eval(), torch.randn(64, 8)
    small = rf.prune(net, x[:2], HALF)
    real, count = module.distance, 0

    def farther(*outputs: object) -> float:
        nonlocal count
        count += 1
        return real(*outputs) + (count != 2)  # the second is without the repair

    monkeypatch.setattr(module, "distance", farther)
    healed = repair(net, small, [x])
    assert len(healed.repaired.skipped) > 10
    assert count < 12
    assert distance(small, healed, x) == 0


# --- sparse networks -----------------------------------------------------------------------------


STRUCTURES = {
    "weight": {"budget": rf.Budget(sparsity=0.7)},
    "2:4": {},
    "1x4": {"budget": rf.Budget(sparsity=0.5)},
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sparse_networks_come_nearer_and_keep_their_zeros(structure) -> None:
    net, x = settled()
    sparse = rf.prune(net, x[:2], structure=structure, **STRUCTURES[structure])
    healed = repair(net, sparse, [x[:64]])
    assert distance(net, healed, x[64:]) < 0.7 * distance(net, sparse, x[64:])
    gone = {path: sparse.get_parameter(path) == 0 for path in sparse.sparsified.zeros}
    assert sum(int(zero.sum()) for zero in gone.values()) > 500
    assert not any(healed.get_parameter(path)[zero].any() for path, zero in gone.items())
    assert any(after < before for before, after in healed.repaired.errors.values())
    assert type(healed) is Net


def test_the_first_layer_of_a_sparse_network_is_solved_too() -> None:
    """Its inputs are the original's, and its weights are not."""
    net, x = settled()
    sparse = rf.prune(net, x[:2], rf.Budget(sparsity=0.7), structure="weight")
    assert "a" in repair(net, sparse, [x]).repaired.errors


def test_what_sparsegpt_solved_does_not_become_worse() -> None:
    net, x = settled()
    given = {"structure": "weight", "criterion": "sparsegpt", "data": [x[:64]]}
    sparse = rf.prune(net, x[:2], rf.Budget(sparsity=0.7), **given)
    healed = repair(net, sparse, [x[:64]])
    assert all(after <= before for before, after in healed.repaired.errors.values())
    assert distance(net, healed, x[:64]) <= distance(net, sparse, x[:64])


class Convolution1D(nn.Module):
    """A linear layer whose weight has its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.o = nn.Linear(6, 16), nn.Linear(12, 3, bias=False)
            self.matrix, self.shift = (
                nn.Parameter(torch.randn(16, 12)),
                nn.Parameter(torch.ones(12)),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.o(torch.tanh(torch.addmm(self.shift, x, self.matrix)))


def test_sparse_weights_with_their_inputs_first() -> None:
    net, x = Convolution1D().eval(), torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    sparse = rf.prune(net, x[:2], structure="2:4")
    healed = repair(net, sparse, [x[:160]])
    groups = healed.matrix.detach().T.reshape(12, 4, 4)
    assert int((groups != 0).sum(2).max()) == 2
    assert distance(net, healed, x[160:]) < distance(net, sparse, x[160:])


# --- quantized networks --------------------------------------------------------------------------


def quantized(net: nn.Module, x: torch.Tensor, bits: int = 4) -> nn.Module:
    """A network of which the weights have few values, so that rounding them costs something."""
    return coarse(rf.quantize(net, [x]), bits)


def coarse(q: nn.Module, bits: int = 4) -> nn.Module:
    """The same network with fewer values."""
    for node in q.graph.calls:
        if node.kind == "fake_quantize_per_channel_affine":
            weight, scale, _ = (q.tensor(q.graph.by_name[name].path) for name in node.inputs)
            scale.mul_(2 ** (8 - bits))
            wide = scale.view(-1, *[1] * (weight.ndim - 1))
            weight.data = (weight / wide).round() * wide
    return q


def test_quantized_networks_come_nearer_and_stay_on_their_grids() -> None:
    net, x = settled()
    q = quantized(net, x[:64])
    healed = repair(net, q, [x[:64]])
    unseen = torch.randn(500, 3, 8, 8).cumsum(2) / 2
    assert distance(net, healed, unseen) < 0.5 * distance(net, q, unseen)
    assert healed.repaired.errors.keys() == {"a", "d", "b", "o"}  # BatchNorms are folded
    assert changed_on_grids(healed, q)


def changed_on_grids(healed: nn.Module, q: nn.Module) -> int:
    """How many weights changed; all have to be on the grids that they were on."""
    changed = 0
    for node in healed.graph.calls:
        if node.kind == "fake_quantize_per_channel_affine":
            path = healed.graph.by_name[node.inputs[0]].path
            weight, scale = healed.tensor(path), healed.tensor(f"{path}_scale")
            assert torch.equal(scale, q.tensor(f"{path}_scale"))
            steps = weight / scale.view(-1, *[1] * (weight.ndim - 1))
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            assert float(steps.detach().abs().max()) < 127.5
            changed += not torch.equal(weight, q.tensor(path))
    return changed


def test_a_quantized_layer_of_several_calls_stays_on_its_grid() -> None:
    torch.manual_seed(0)
    net = Siamese().eval()
    batches = [{name: torch.randn(24, 3, 8, 8).cumsum(2) / 2 for name in "xy"} for _ in range(4)]
    q = coarse(rf.quantize(net, batches))
    healed = repair(net, q, batches[:3])
    assert apart(net, healed, batches[3]) < 0.9 * apart(net, q, batches[3])
    assert changed_on_grids(healed, q)
    assert healed.repaired.errors.keys() == {"tower.0", "tower.3", "out"}


def test_layers_into_which_one_norm_was_folded_are_held_against_it() -> None:
    net = Shared(is_twice=False).eval()
    inputs = {name: torch.randn(64, 6) for name in "xy"}
    healed = repair(net, coarse(rf.quantize(net, [inputs])), [inputs])
    assert healed.repaired.errors.keys() == {"p", "a", "q", "b"}
    assert not healed.repaired.skipped


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_an_equalized_network_is_held_against_its_own_channels(rounding) -> None:
    """Its layers give other numbers than the original's, which are no error to heal."""
    net, x = settled()
    with torch.no_grad():
        net = copy.deepcopy(net)
        net.b.weight[:3] *= 30
    q = rf.quantize(net, [x[:64]], rf.Int8(equalize=True))
    assert any(bool((factors != 1).any()) for factors in q.rescaled.values())
    healed = repair(net, q, [x[:64]], rounding=rounding)
    noise = [10 ** (-ratio / 10) for ratio in q.quantization.layers.values()]
    assert healed.repaired.errors
    for before, after in healed.repaired.errors.values():
        assert after <= before < 10 * max(noise)
    assert any(after < before for before, after in healed.repaired.errors.values())
    assert distance(net, healed, x[:64]) < distance(net, q, x[:64])


def test_eight_bits_are_never_worse() -> None:
    net, x = settled()
    q = rf.quantize(net, [x[:64]])
    healed = repair(net, q, [x[:64]])
    assert all(after <= before for before, after in healed.repaired.errors.values())
    assert distance(net, healed, x[:64]) <= distance(net, q, x[:64])


def test_zeros_of_what_was_quantized_stay_zero() -> None:
    net, x = settled()
    sparse = rf.prune(net, x[:2], structure="2:4")
    q = quantized(sparse, x[:64])
    gone = sparse.b.weight == 0
    assert gone.any()
    for original in (sparse, net):
        healed = repair(original, q, [x[:64]])
        assert not healed.tensor("b.weight")[gone].any()
        assert not torch.equal(healed.tensor("b.weight"), q.tensor("b.weight"))


@functools.cache
def compressed(kind: str) -> nn.Module:
    """The settled network, made smaller in one way."""
    net, x = settled()
    if kind == "quantized":
        return quantized(net, x)
    if kind == "units":
        return rf.prune(net, x[:2], HALF)
    budget = rf.Budget(sparsity=0.7) if kind == "weight" else None
    return rf.prune(net, x[:2], budget, structure=kind)


@pytest.mark.parametrize("kind", ["weight", "2:4", "quantized", "units"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("content", ["random", "constant"])
def test_tiny_and_constant_data_make_nothing_worse(kind, size, content) -> None:
    net, x = settled()
    given = x[:size] if content == "random" else torch.full_like(x[:size], 0.3)
    small = compressed(kind)
    healed = repair(net, small, [given])
    assert distance(net, healed, given) <= distance(net, small, given) * (1 + 1e-6)
    assert all(torch.isfinite(t).all() for t in healed.state_dict().values())


def test_activations_of_sparse_and_quantized_networks_are_checked() -> None:
    net, x = settled()
    sparse = rf.prune(net, x[:2], rf.Budget(sparsity=0.7), structure="weight")
    broken = copy.deepcopy(sparse), copy.deepcopy(net)
    with torch.no_grad():
        for model in broken:
            model.a.weight[model.a.weight != 0] = 3e38
    named = r"layer '.*': activations are NaN or infinite"
    for original, other in ((net, broken[0]), (broken[1], quantized(net, x))):
        with pytest.raises(DataError, match=named):
            repair(original, other, [100 * x])


def test_another_original_is_refused_or_named() -> None:
    net, x = settled()
    q = quantized(rf.prune(net, x[:2], HALF), x)
    del q.pruned  # its record of what went
    healed = repair(net, q, [x])
    assert healed.repaired.skipped["b"] == "the original's layer has other outputs"


# --- in parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "units"])
def test_examples_in_parts_are_examples_at_once(kind, monkeypatch) -> None:
    """With all rows used, only rounding can tell the ways apart."""
    net, x = settled()
    small = copy.deepcopy(compressed(kind))
    net, small, x = net.double(), small.double(), x.double()
    monkeypatch.setattr(gram, "ROWS", 1 << 20)
    found = []
    for part in (1, 20_000, 1 << 25):
        monkeypatch.setattr(examples, "PART", part)
        found.append(repair(net, small, [x]))
    for other in found[1:]:
        for path, (before, after) in other.repaired.errors.items():
            assert found[0].repaired.errors[path] == pytest.approx((before, after), rel=1e-6)
        with evaluating(other, found[0]):
            torch.testing.assert_close(other(x), found[0](x), rtol=1e-6, atol=1e-8)


def test_little_memory_takes_fewer_examples(monkeypatch) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    monkeypatch.setattr(examples, "MEMORY", 200_000)
    assert 1 < repair(net, small, [x]).repaired.samples < 96


class Bare(nn.Module):
    """No bias, and no BatchNorm that could take up a mean."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.o = nn.Linear(6, 24), nn.Linear(24, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.relu(self.a(x)) + 1)


def test_without_anything_to_take_up_a_mean_the_weights_do() -> None:
    net, x = Bare().eval(), torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    small = rf.prune(net, x[:2], HALF)
    healed = repair(net, small, [x[:200]])
    with evaluating(net, small, healed):
        level, before, after = (m(x[200:]).mean(0) for m in (net, small, healed))
    assert float((after - level).norm()) < 0.2 * float((before - level).norm())


def test_inputs_far_from_zero_are_solved_as_those_about_zero() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
        mix = torch.randn(16, 16)
        x, unseen = (torch.randn(300, 16) @ mix for _ in range(2))
    errors = []
    for level in (0, 3000):
        far = copy.deepcopy(net)
        with torch.no_grad():
            far[0].bias -= level * far[0].weight.double().sum(1).float()
        sparse = rf.prune(far, x[:2], structure="2:4")
        healed = repair(far, sparse, [x + level])
        with torch.no_grad():
            target = net.double()(unseen.double())
            given = (unseen + level).double()
            errors.append(float((healed.double()(given) - target).square().sum()))
        net.float()
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.out = nn.Embedding(9, 6), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.inner(self.words(ids))) * attention_mask[..., None]
        return self.out(x.sum(1) / attention_mask.sum(1, keepdim=True))


def texts(*lengths: int) -> list[dict]:
    drawn = torch.Generator().manual_seed(3)
    return [
        {"ids": torch.randint(9, (16, n), generator=drawn), "attention_mask": torch.ones(16, n)}
        for n in lengths
    ]


@pytest.mark.parametrize("structure", ["channel", "weight"])
def test_batches_of_text_may_be_of_different_lengths(structure) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Text().eval()
    data = texts(5, 7, 4)
    small = rf.prune(net, texts(3)[0], HALF, structure=structure, criterion="magnitude")
    healed = repair(net, small, data)
    assert healed.repaired.samples == 48
    with torch.no_grad():
        far, near = (
            sum(float((m(**b) - net(**b)).square().sum()) for b in data) for m in (small, healed)
        )
    assert near < far


@pytest.mark.parametrize("budget", [rf.Budget(sparsity=0.3, scope="local"), rf.Budget(macs=0.7)])
def test_a_network_pruned_in_rounds_is_held_against_any_of_those_before(budget) -> None:
    net, x = settled()
    once = rf.prune(net, x[:2], budget)
    twice = rf.prune(once, x[:2], budget)
    thrice = rf.prune(twice, x[:2], budget)
    for original, record in ((net, thrice.pruned), (once, thrice.pruned), (twice, thrice.pruned)):
        kept = record.kept_of(original)
        before, after = (dict(m.named_parameters()) for m in (original, thrice))
        for path, whole in before.items():
            for dim in range(whole.ndim):
                if (path, dim) in kept:
                    whole = whole.index_select(dim, torch.from_numpy(kept[path, dim]))
            assert torch.equal(whole, after[path])
        healed = repair(original, thrice, [x])
        assert not healed.repaired.skipped
        assert distance(original, healed, x) < distance(original, thrice, x)


@pytest.mark.parametrize("hidden", [20, 40])
def test_an_original_of_other_widths_is_refused(hidden) -> None:
    def made(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()

    x = torch.randn(64, 10)
    small = rf.prune(made(32), x, rf.Budget(sparsity=0.5))
    with pytest.raises(InputError, match=r"repair\(original\): its layers are not as wide"):
        repair(made(hidden), small, [x])


def test_units_that_no_layer_gives_are_known_of_the_original() -> None:
    """Those of an embedding lie along its last dimension, which is no layer's width."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 4)

        def forward(self, ids):
            return self.head(self.embed(ids).relu().mean(1))

    net, ids = Words().eval(), torch.randint(40, (256, 6))
    small = rf.prune(net, ids, rf.Budget(sparsity=0.5))
    assert len(small.embed.weight[0]) == 8
    ((before, after),) = repair(net, small, [ids]).repaired.errors.values()
    assert after < before
