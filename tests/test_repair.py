"""Least squares against NumPy, patches against the convolution itself."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.batches import evaluating
from rarefy.errors import DataError, InputError
from rarefy.graph.capture import capture
from rarefy.pruning import repair as module
from rarefy.pruning.repair import _draw, _patches, _System, repair
from rarefy.pruning.running.lockstep import unseen

torch.set_num_threads(1)
HALF = rf.Budget(sparsity=0.5, scope="local")

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=(1, 2)),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=2),
    "1d": nn.Conv1d(4, 6, 5, stride=2, padding=1),
    "3d": nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 0)),
}


def inputs(layer: nn.Module, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, *[8, 7, 6][: layer.weight.ndim - 2], generator=generator)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_weights_are_the_convolution(name) -> None:
    layer = CONVOLUTIONS[name]
    x = inputs(layer)
    target = layer(x).detach()
    node = next(n for n in capture(layer, x).graph.calls if "conv" in n.op)
    every = torch.arange(target.numel() // target.shape[1])
    patches, y = _patches(node, x, target, layer.weight, every)
    groups = layer.groups
    w = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    rows = patches.reshape(len(patches), groups, -1)
    found = torch.einsum("rgk,gok->rgo", rows, w).reshape(len(rows), -1) + layer.bias.detach()
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_of_numpy(bias, monkeypatch) -> None:
    monkeypatch.setattr(module, "RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 5, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(1, 200, 3, generator=generator, dtype=torch.float64)
    weight, shift = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    solved = _System(x, y, 40).solve(weight, shift if bias else None)
    used_x, used_y = x[0, 40:].numpy(), y[0, 40:].numpy()
    ones = np.ones((160, 1))
    expected = np.linalg.lstsq(np.hstack([used_x, ones]), used_y, rcond=None)[0]
    np.testing.assert_allclose(solved.weight.numpy(), expected[:-1].T, rtol=1e-8)
    if bias:
        np.testing.assert_allclose(solved.bias.numpy(), expected[-1], rtol=1e-8)
    assert solved.errors[0] > 0


def test_groups_are_solved_one_by_one(monkeypatch) -> None:
    monkeypatch.setattr(module, "RIDGE", 0.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 100, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 100, 4, generator=generator, dtype=torch.float64)
    whole = _System(x, y, 20).solve(torch.zeros(8, 3, dtype=torch.float64), None)
    for g in range(2):
        part = _System(x[g : g + 1], y[g : g + 1], 20).solve(torch.zeros(4, 3).double(), None)
        torch.testing.assert_close(whole.weight[4 * g : 4 * g + 4], part.weight)


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


def test_data_are_checked() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    with pytest.raises(DataError):
        repair(net, small, [])
    with pytest.raises(DataError, match="NaN"):
        repair(net, small, [x * torch.nan])
    with pytest.raises(InputError, match="record"):
        repair(net, net, [x])
    with pytest.raises(InputError, match="samples"):
        repair(net, small, [x], samples=0)
    with pytest.raises(InputError, match="operators"):
        repair(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), small, [x])


def test_activations_that_are_not_finite_are_named_by_their_layer() -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    for broken in (net, small):
        model = copy.deepcopy(broken)
        with torch.no_grad():
            model.a.weight.mul_(torch.inf)
        pair = (model, small) if broken is net else (net, model)
        with pytest.raises(DataError, match=r"layer '(a|na)': activations are NaN or infinite"):
            repair(*pair, [x])


@pytest.mark.parametrize(
    ("lead", "rows"),
    [
        ((4,), [1]),
        ((4, 3), [3, 4, 5]),  # positions within an example
        ((8, 2), [4, 5, 6, 7]),  # two windows of an example, one after the other
        ((3, 4), [1, 5, 9]),  # positions first
        ((2,), []),  # fewer entries than examples
    ],
)
def test_rows_are_held_out_by_example(lead, rows) -> None:
    aside = unseen(lead, torch.tensor([False, True, False, False]))
    assert aside.nonzero().flatten().tolist() == rows
    drawn, held = _draw(aside, 1)
    assert drawn[:held].tolist() == rows
    assert sorted(drawn.tolist()) == list(range(len(aside)))


def test_no_solve_sees_the_held_out_examples(monkeypatch) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)
    monkeypatch.setattr(module, "_held_out", lambda n: torch.arange(n) < 16)
    drawn = module._draw
    seen = []

    def recorded(unseen: torch.Tensor, unknowns: int) -> tuple[torch.Tensor, int]:
        rows, held = drawn(unseen, unknowns)
        seen.append(int((rows[held:] * 64 // len(unseen)).min()))
        return rows, held

    monkeypatch.setattr(module, "_draw", recorded)
    repair(net, small, [x[:64]])
    assert seen == [16, 16, 16]


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
    assert healed.repaired.errors.keys() == {"matmul", "addmm"}
    assert healed.repaired.skipped == {
        "memory": "weights of gru are not solved",
        "up": "weights of conv_transpose1d are not solved",
        "mix": "units that went are among the rows of its inputs",
    }
    first, second = outputs(net, x[64:])[0], outputs(small, x[64:])[0]
    assert (outputs(healed, x[64:])[0] - first).square().sum() < (second - first).square().sum()


def test_a_repair_that_does_not_help_as_a_whole_is_taken_back(monkeypatch) -> None:
    net, x = layered()
    small = rf.prune(net, x[:2], HALF)
    distances = iter([1.0, 2.0])
    monkeypatch.setattr(module, "distance", lambda found, expected: next(distances))
    healed = repair(net, small, [x])
    state = small.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in healed.state_dict().items())
    assert "farther from the original" in healed.repaired.skipped["addmm"]
    assert all(before == after for before, after in healed.repaired.errors.values())


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
    with pytest.raises(DataError, match="does not run on its first batch"):
        repair(net, small, [x[:, :2]])


def test_what_cannot_be_run_side_by_side_is_returned_as_it_was(monkeypatch) -> None:
    net, x = settled()
    small = rf.prune(net, x, HALF)

    def failing(*args: object) -> None:
        raise RuntimeError("no way")

    monkeypatch.setattr(module._Lockstep, "run", failing)
    healed = repair(net, small, [x])
    assert "no way" in healed.repaired.skipped[""]
    assert distance(small, healed, x) == 0
