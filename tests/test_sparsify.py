"""Weights set to zero in whole networks, with and without calibration data."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rarefy as rf
from rarefy.errors import BudgetError, DataError, InputError
from rarefy.pruning.running import examples
from rarefy.pruning.sparsity import calibrated, gram
from rarefy.pruning.sparsity.elements import SparseGPT
from rarefy.pruning.sparsity.masks import sparsity
from rarefy.pruning.sparsity.patterns import NM, Block
from rarefy.pruning.sparsity.sparsify import sparsify
from rarefy.types import Budget
from shared_weights import Siamese

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def zeros(model: nn.Module) -> list[int]:
    return [int((w == 0).sum()) for w in (model[0].weight, model[3].weight)]


@pytest.mark.filterwarnings("ignore:.*no weight is left:RuntimeWarning")
@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.999))
def test_the_share_is_exact(share) -> None:
    local = sparsify(NET, Budget(sparsity=share, scope="local"))
    assert zeros(local) == [int(share * 36 + 1e-9), int(share * 80 + 1e-9)]
    assert sum(zeros(sparsify(NET, Budget(sparsity=share)))) == int(share * 116 + 1e-9)


def test_the_smallest_go_and_the_rest_is_untouched() -> None:
    before = copy.deepcopy(NET.state_dict())
    sparse = sparsify(NET, Budget(sparsity=0.5))
    gone = torch.cat(
        [NET[i].weight.abs().flatten()[sparse[i].weight.flatten() == 0] for i in (0, 3)]
    )
    left = torch.cat([sparse[i].weight[sparse[i].weight != 0].abs() for i in (0, 3)])
    assert gone.max() <= left.min()
    assert torch.equal(sparse[0].bias, NET[0].bias)
    assert torch.equal(sparse[1].weight, NET[1].weight)
    assert all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())
    assert NET.training
    assert not sparse.training


def test_equal_weights_are_still_cut_exactly() -> None:
    layer = nn.Linear(4, 4)
    nn.init.ones_(layer.weight)
    assert sparsity(sparsify(nn.Sequential(layer), Budget(sparsity=0.5))) == 0.5


def test_excluded_layers_stay_dense() -> None:
    assert zeros(sparsify(NET, Budget(sparsity=0.5, scope="local"), exclude=["0"])) == [0, 40]
    assert zeros(sparsify(NET, Budget(sparsity=0.5), exclude=["3.weight"])) == [18, 0]
    with pytest.raises(InputError, match=r"Did you mean .*3\.weight"):
        sparsify(NET, Budget(sparsity=0.5), exclude=["3.wieght"])
    with pytest.raises(InputError, match="no weight"):
        sparsify(NET, Budget(sparsity=0.5), exclude=["0", "3"])


def test_only_sparsity_makes_sense() -> None:
    with pytest.raises(BudgetError, match="sparsity"):
        sparsify(NET, Budget(macs=0.5))
    with pytest.raises(BudgetError, match="min_keep"):
        sparsify(NET, Budget(sparsity=0.5, min_keep=2))


def test_shared_and_frozen_weights() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    sparse = sparsify(nn.Sequential(layer, layer), Budget(sparsity=0.5))
    assert sparse[0].weight is sparse[1].weight
    assert int((sparse[0].weight == 0).sum()) == 8
    assert not sparse[0].weight.requires_grad


def test_a_criterion_of_ones_own_decides() -> None:
    layer = nn.Linear(3, 2)
    sparse = sparsify(nn.Sequential(layer), Budget(sparsity=0.5), criterion=lambda w: -w.abs())
    assert sparse[0].weight.abs().max() < layer.weight.abs().median() + 1e-6
    with pytest.raises(InputError, match=r"'0\.weight'.*shape \(1,\)"):
        sparsify(nn.Sequential(layer), Budget(sparsity=0.5), criterion=lambda w: torch.zeros(1))


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="no weight is left"):
        sparsify(nn.Sequential(nn.ReLU()), Budget(sparsity=0.5))


# --- structures that need the graph -------------------------------------------------------------


def normed_layers() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 8, 3)),
        parametrizations.spectral_norm(nn.Conv1d(8, 2, 1)),
        parametrizations.weight_norm(nn.Conv1d(2, 4, 3), dim=None),
    )


def older_normed_layers() -> nn.Module:
    norm, spectral = nn.utils.weight_norm, nn.utils.spectral_norm
    layers = norm(nn.Conv1d(3, 8, 3)), spectral(nn.Conv1d(8, 2, 1)), norm(nn.Conv1d(2, 4, 3), dim=1)
    return nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [normed_layers, older_normed_layers])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_is_divided_by_its_length_keeps_one(make, scope) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = make().eval(), torch.randn(2, 3, 9)
    with torch.no_grad():
        for path, parameter in net.named_parameters():  # all of its vectors are the smallest
            parameter.mul_(
                1e-3 if path.endswith(("0.weight_v", "0.parametrizations.weight.original1")) else 1
            )
    share = 0.85 if scope == "local" else 0.8
    sparse = sparsify(net, Budget(sparsity=share, scope=scope))
    zeros = sparse.sparsified.zeros
    assert sorted(size for _, size in zeros.values()) == [16, 24, 72]  # the lengths stay
    if scope == "global":
        assert sum(gone for gone, _ in zeros.values()) == int(share * 112)
    assert sparse(x).isfinite().all()
    with pytest.raises(BudgetError, match=r"weight '0\..*a length of zero"):
        sparsify(net, Budget(sparsity=0.99, scope=scope))


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize("structure", ["weight", "2:4", "1x4"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_empty_weights_are_left_alone(structure, criterion) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.some, self.out = nn.Linear(0, 8), nn.Linear(8, 8), nn.Linear(8, 0)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.some(x) + self.none(x[:, :0]))
            return y + self.out(y).sum(1, keepdim=True)

    net, x = Net(), smooth(8, 1).flatten(1)[:, :8]
    sparse = sparsify(
        net,
        None if structure == "2:4" else Budget(sparsity=0.5),
        structure,
        example_inputs=x,
        criterion=criterion,
        data=None if criterion == "magnitude" else [x],
    )
    assert int((sparse.some.weight == 0).sum()) == 32
    assert sparse.none.weight.shape == (8, 0)
    healed = rf.repair(net, sparse, [x]).repaired
    assert healed.skipped["out"] == "its weight has no entries"
    assert "some" in healed.errors


class Mixed(nn.Module):
    """Layers of every kind that matters for the direction of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.inputs_first = nn.Parameter(torch.randn(6, 8))
        self.outputs_first = nn.Parameter(torch.randn(8, 8))
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.up = nn.ConvTranspose1d(4, 5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.conv(self.table(tokens).transpose(1, 2)))))
        x = F.relu(x.transpose(1, 2) @ self.inputs_first) @ self.outputs_first.T
        return self.up(self.lstm(x)[0].transpose(1, 2))


@pytest.fixture(scope="module")
def mixed() -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed()


TOKENS = torch.randint(10, (4, 7), generator=torch.Generator().manual_seed(0))


def test_n_of_m_runs_along_the_inputs_of_each_layer(mixed) -> None:
    sparse = rf.prune(mixed, TOKENS, structure="2:4")
    along = {"conv.weight": 1, "inputs_first": 0, "outputs_first": 1, "up.weight": 0,
             "lstm.weight_ih_l0": 1, "lstm.weight_hh_l0": 1}  # fmt: skip
    assert sparse.sparsified.structure == "2:4"
    assert set(sparse.sparsified.zeros) == set(along)
    for path, dim in along.items():
        kept = (sparse.get_parameter(path) != 0).movedim(dim, -1)
        full = kept.shape[-1] // 4 * 4
        groups = kept[..., :full].unflatten(-1, (-1, 4)).sum(-1)
        assert (groups == 2).all(), path
        assert kept[..., full:].all(), path
    assert set(sparse.sparsified.dense) == {"table.weight", "depthwise.weight"}
    assert "fewer than 4" in sparse.sparsified.dense["depthwise.weight"]
    assert torch.equal(sparse.table.weight, mixed.table.weight)


def test_n_of_m_stays_within_the_groups_of_a_transposed_convolution() -> None:
    net = nn.Sequential(
        nn.ConvTranspose1d(10, 4, 3, groups=2),  # five inputs each: the last of them stays
        nn.ConvTranspose1d(4, 4, 3, groups=4),
    )
    x = torch.randn(2, 10, 7)
    sparse = sparsify(net, None, "2:4", example_inputs=x)
    kept = sparse[0].weight.view(2, 5, 2, 3) != 0
    assert (kept[:, :4].sum(1) == 2).all()
    assert kept[:, 4].all()
    assert sparse.sparsified.dense == {"1.weight": "it has 1 inputs, fewer than 4"}


def test_n_of_m_takes_no_other_share(mixed) -> None:
    assert rf.prune(mixed, TOKENS, Budget(sparsity=0.5), structure=NM(2, 4))
    with pytest.raises(BudgetError, match=r"2:4 sets 0\.5"):
        rf.prune(mixed, TOKENS, Budget(sparsity=0.9), structure="2:4")
    with pytest.raises(BudgetError, match="no sparsity"):
        rf.prune(mixed, TOKENS, structure="1x4")
    with pytest.raises(InputError, match=r"Budget"):
        rf.prune(mixed, TOKENS)
    with pytest.raises(InputError, match="no weight has that structure"):
        rf.prune(nn.Linear(3, 3), torch.zeros(2, 3), structure="2:4")


@pytest.mark.filterwarnings("ignore:.*no weight is left:RuntimeWarning")
@pytest.mark.parametrize("scope", ["local", "global"])
def test_blocks_are_counted(mixed, scope) -> None:
    sparse = rf.prune(mixed, TOKENS, Budget(sparsity=0.5, scope=scope), structure=Block(2, 5))
    found = total = 0
    for path in sparse.sparsified.zeros:
        weight = sparse.get_parameter(path)
        along = 0 if path in ("inputs_first", "up.weight") else 1
        matrix = weight.movedim(along, 1).flatten(1)
        cells = [
            matrix[i : i + 2, j : j + 5] == 0
            for i, j in product(range(0, len(matrix), 2), range(0, matrix.shape[1], 5))
        ]
        assert all(cell.all() or not cell.any() for cell in cells)
        gone = sum(bool(cell.all()) for cell in cells)
        assert scope == "global" or gone == len(cells) // 2
        found, total = found + gone, total + len(cells)
    assert scope == "local" or found == total // 2
    assert sparse.sparsified.dense["depthwise.weight"] == "it is 6x3, smaller than a block of 2x5"


def test_a_rewritten_graph_can_be_made_sparse(mixed) -> None:
    from rarefy.graph.capture import capture, graph_model

    model = graph_model(copy.deepcopy(mixed), capture(mixed, TOKENS))
    sparse = rf.prune(model, TOKENS, structure="2:4")
    assert len(sparse.sparsified.zeros) == 6


class Flat(nn.Module):
    """Its forward states a width, so that a graph takes its place where units go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, 16))


@pytest.mark.parametrize("structure", ["weight", "2:4"])
@pytest.mark.parametrize("graph", [False, True])
def test_zeros_of_what_units_are_left_are_counted_and_stay_through_repair(graph, structure) -> None:
    net = Flat() if graph else nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    budget = None if structure == "2:4" else Budget(sparsity=0.5)
    sparse = rf.prune(net.eval(), x, budget, structure=structure, data=[x])
    small = rf.prune(sparse, x, Budget(macs=0.5), data=[x])
    assert small.pruned.kind == ("graph" if graph else "module")
    assert any(after < before for before, after in small.repaired.errors.values())
    counted = {n: (int((p == 0).sum()), p.numel()) for n, p in small.named_parameters()}
    assert small.sparsified.zeros == {name: counted[name] for name in sparse.sparsified.zeros}
    last = "b.weight" if graph else "2.weight"
    units = small.pruned.kept[last, 1]
    assert torch.equal(small.get_parameter(last) == 0, sparse.get_parameter(last)[:, units] == 0)
    assert (small.sparsified.structure, small.sparsified.errors) == ("weight", {})


def test_zeros_of_a_network_in_a_wrapper_stay_through_pruning_and_repair() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    sparse = rf.prune(net, x, Budget(sparsity=0.5), structure="weight")
    plain, wrapped = (
        rf.prune(model, x, Budget(sparsity=0.5), data=[x])
        for model in (sparse, nn.DataParallel(sparse))
    )
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert list(wrapped.sparsified.zeros.values()) == list(plain.sparsified.zeros.values())
    assert wrapped.module.sparsified.zeros == plain.sparsified.zeros


@pytest.mark.parametrize("scheme", [rf.Int8(), rf.WeightOnly(bits=8, fold=True)])
@pytest.mark.parametrize("graph", [False, True])
def test_quantized_networks_tell_what_went(graph, scheme) -> None:
    """So that they are repaired against the network before it was pruned."""
    net = Flat() if graph else nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8)
    sparse = rf.prune(net.eval(), x, Budget(sparsity=0.3), structure="weight")
    small = rf.prune(sparse, x, Budget(sparsity=0.5))
    quantized = rf.quantize(small, [x], scheme)
    assert quantized.pruned.widths == small.pruned.widths
    assert quantized.sparsified == small.sparsified
    healed = rf.repair(net, quantized, [x])
    last = "b" if graph else "2"
    before, after = healed.repaired.errors[last]
    assert after < before


def test_a_record_stays_where_no_weight_of_it_went() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(8, 8)
    sparse = rf.prune(net.eval(), x, structure="2:4", exclude=["2", "4"])
    small = rf.prune(sparse, x, Budget(sparsity=0.5), exclude=["0"])
    assert small.pruned.widths
    assert small.sparsified == sparse.sparsified


def test_what_was_measured_on_a_network_is_not_told_of_what_becomes_of_it() -> None:
    x = torch.randn(32, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    small = rf.prune(net, x, Budget(macs=0.7), data=[x])
    small.served = "0.3 ms"
    for after in (
        rf.prune(small, x, Budget(sparsity=0.5)),
        rf.prune(small, x, Budget(sparsity=0.5), structure="weight"),
        rf.quantize(small, [x], rf.Half()),
    ):
        assert not hasattr(after, "repaired")
        assert not hasattr(after, "served")
    assert small.repaired.errors
    assert small.served == "0.3 ms"


# --- calibration data ----------------------------------------------------------------------------


class Convolutions(nn.Module):
    """A residual network with grouped and depthwise convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = x + self.point(F.relu(self.depthwise(F.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))


def smooth(count: int, seed: int) -> Tensor:
    """Images whose neighboring pixels are alike, which is what makes inputs correlated."""
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(count, 3, 3, 3, generator=generator), 8, mode="bilinear") + 0.5


@pytest.fixture(scope="module")
def convolutions() -> Convolutions:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Convolutions()
        model.norm(model.first(smooth(64, 9)))
        return model


DATA = [smooth(32, seed) for seed in range(4)]


@pytest.mark.parametrize("structure", ["weight", "2:4", "1x4", Block(3, 2)])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_reconstruction_is_ahead_of_magnitude(convolutions, structure, scope) -> None:
    budget = None if structure == "2:4" else Budget(sparsity=0.6, scope=scope)
    before = copy.deepcopy(convolutions.state_dict())
    plain, found = (
        rf.prune(convolutions, DATA[0], budget, structure=structure, **options)
        for options in ({}, {"criterion": "sparsegpt", "data": DATA})
    )
    assert all(torch.equal(v, before[k]) for k, v in convolutions.state_dict().items())
    assert found.state_dict().keys() == before.keys()
    if structure in ("weight", "2:4"):  # blocks at the edge hold fewer weights
        assert found.sparsified.zeros == plain.sparsified.zeros
    assert found.sparsified.samples == 128
    x = smooth(64, 77)
    with torch.no_grad():
        target = copy.deepcopy(convolutions).eval()(x)
        errors = [float((m(x) - target).square().sum()) for m in (plain, found)]
    assert errors[1] < 0.5 * errors[0]
    for path, (magnitude, taken) in found.sparsified.errors.items():
        assert taken <= magnitude or path in found.sparsified.fallback
    for path, (gone, _) in found.sparsified.zeros.items():
        assert int((found.get_parameter(path) == 0).sum()) >= gone


def test_dimensions_first_weights_are_reconstructed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.bias, x.reshape(-1, 8), self.weight).view(x.shape)
            return self.head(F.relu(y))

    torch.manual_seed(0)
    x = torch.randn(400, 3, 8) @ torch.randn(8, 8)
    model = Half()
    found = rf.prune(model, x, structure="2:4", criterion="sparsegpt", data=[x])
    assert found.sparsified.fallback == {}
    assert set(found.sparsified.errors) == {"weight", "head.weight"}
    groups = (found.weight != 0).T.reshape(8, 2, 4).sum(-1)
    assert (groups == 2).all()


def test_biases_and_running_means_take_up_the_mean(convolutions, monkeypatch) -> None:
    monkeypatch.setattr(gram, "ROWS", 10**6)  # all rows, not a draw of them
    found = rf.prune(convolutions, DATA[0], structure="1:4", exclude=["grouped", "depthwise"],
                     criterion="sparsegpt", data=DATA)  # fmt: skip
    assert set(found.sparsified.errors) == {"point.weight", "head.weight"}
    x = torch.cat(DATA)[torch.arange(128) % 5 != 1]  # those that are not held out
    first = rf.prune(convolutions, DATA[0], Budget(sparsity=0.8), structure="weight",
                     exclude=["grouped", "depthwise", "point", "head"],
                     criterion="sparsegpt", data=DATA)  # fmt: skip
    dense = copy.deepcopy(convolutions).eval()
    with torch.no_grad():
        means = [m.first(x).mean((0, 2, 3)) - m.norm.running_mean for m in (dense, first)]
        torch.testing.assert_close(means[0], means[1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(dense(x).mean(0), found(x).mean(0), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(first.norm.running_mean, dense.norm.running_mean, atol=1e-4)


class Up(nn.Module):
    """Transposed convolutions, in groups and not, on inputs of few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, groups=4)
        self.plain = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.plain(F.relu(self.grouped(F.relu(self.stem(x))))))


class Packed(nn.Module):
    """A parameter that packs the projections of two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(1).cumsum(1)
        return self.attention(x, y, y)[0]


SOLVED = {
    "up": (Up, (96, 3, 6, 6), {"stem.weight", "grouped.weight", "plain.weight"}),
    "packed": (Packed, (96, 5, 16), {"attention.in_proj_weight[0:16]",
               "attention.in_proj_weight[16:48]", "attention.out_proj.weight"}),
    "towers": (Siamese, (96, 3, 8, 8), {"tower.0.weight", "tower.3.weight", "out.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("structure", ["weight", "2:4", "4x1"])
@pytest.mark.parametrize("name", SOLVED)
def test_layers_of_all_kinds_are_reconstructed(name, structure) -> None:
    torch.manual_seed(0)
    make, shape, paths = SOLVED[name]
    net, count = make().eval(), 2 if name == "towers" else 1
    mix = torch.randn(shape[-1], shape[-1])
    seen, new = (tuple(torch.randn(shape) @ mix for _ in range(count)) for _ in range(2))
    budget = None if structure == "2:4" else Budget(sparsity=0.5, scope="local")
    given = {"example_inputs": tuple(t[:2] for t in seen), "budget": budget}
    # layers of three inputs have no group of four
    out = [path for path in ("stem", "tower.0") if f"{path}.weight" in paths]
    options = {"structure": structure, "exclude": out if structure == "2:4" else []}
    found = rf.prune(net, **given, **options, data=[(seen, torch.zeros(96))])
    plain = rf.prune(net, **given, **options)
    expected = {path for path in paths if path.rpartition(".")[0] not in options["exclude"]}
    assert found.sparsified.errors.keys() == expected
    assert not [why for why in found.sparsified.fallback.values() if "farther" not in why]
    zeros = [m.sparsified.zeros for m in (found, plain)]
    assert zeros[0] == zeros[1]
    for path, (gone, _) in zeros[0].items():
        assert int((found.get_parameter(path) == 0).sum()) == gone
    with torch.no_grad():
        wanted, solved, magnitude = (m(*new) for m in (net, found, plain))
    assert (solved - wanted).square().mean() < 0.9 * (magnitude - wanted).square().mean()


class Parts(nn.Module):
    """One parameter for several layers, each of which multiplies with a part of it."""

    def __init__(self, shape, call) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(shape) / 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


PARTS = {
    "stacked": (Parts((3, 8, 8), lambda x, w: F.linear(F.linear(x, w[0]).relu(), w[1]) @ w[2]), 2),
    "columns": (Parts((6, 8), lambda x, w: x[:, :4] @ w[:, :4].T * (x[:, 4:] @ w[:, 4:].T)), 2),
    "an unfolded kernel": (
        Parts((4, 8), lambda x, w: F.conv1d(x.view(-1, 4, 2), w.view(4, 4, 2)).flatten(1)), 2),
    "kernels turned": (
        Parts((8, 3, 1), lambda x, w: F.conv1d(x[:, :, None], w.transpose(0, 1)).flatten(1)), 0),
    "cast": (Parts((3, 8), lambda x, w: F.linear(x, w.double().to(x.dtype))), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_n_of_m_is_for_parameters_that_are_one_matrix(name) -> None:
    net, dim = PARTS[name]
    x = torch.randn(64, 8)
    if dim == 2:
        with pytest.raises(InputError, match="no product or convolution reads it"):
            rf.prune(net, x, structure="2:4")
    else:
        kept = rf.prune(net, x, structure="2:4").weight.movedim(dim, -1) != 0
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_parameter_are_solved_each(name) -> None:
    torch.manual_seed(0)
    net, _ = PARTS[name]
    x = torch.randn(256, 3) @ torch.randn(3, 8)
    budget = Budget(sparsity=0.5, scope="local")
    found = rf.prune(net, x[:8], budget, structure="weight", data=[x])
    plain = rf.prune(net, x[:8], budget, structure="weight")
    count = {"stacked": 3, "columns": 2}.get(name, 1)
    assert len(found.sparsified.errors) == count
    assert int((found.weight == 0).sum()) == found.weight.numel() // 2
    with torch.no_grad():
        wanted, solved, magnitude = (m(x) for m in (net, found, plain))
    assert (solved - wanted).square().mean() < 0.9 * (magnitude - wanted).square().mean()


def test_blocks_stay_whole_where_rows_are_read_in_another_order() -> None:
    torch.manual_seed(1)
    net = Parts(
        (16, 12), lambda x, w: F.linear(x, w.view(4, 4, 12).transpose(0, 1).reshape(16, 12))
    )
    x = torch.randn(256, 12) @ torch.randn(12, 12)
    found = rf.prune(net, x[:2], Budget(sparsity=0.5), structure="4x1", data=[x])
    assert set((found.weight == 0).view(4, 4, 12).sum(1).flatten().tolist()) == {0, 4}
    assert found.sparsified.fallback == {"weight": "its weight is used in parts of its blocks"}


class Autocast(nn.Module):
    """Layers whose weights and biases are cast before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                x = F.relu(layer(x))
        return x.float()


def test_layers_behind_a_cast_bias_see_the_new_one() -> None:
    torch.manual_seed(0)
    net, x = Autocast().eval(), torch.randn(512, 32) + 0.5
    found = rf.prune(net, x[:2], Budget(sparsity=0.6), structure="weight", data=[x])
    plain = rf.prune(net, x[:2], Budget(sparsity=0.6), structure="weight")
    new = torch.randn(512, 32) + 0.5
    with torch.no_grad():
        wanted, solved, magnitude = (m(new) for m in (net, found, plain))
    assert (solved - wanted).square().mean() < 0.8 * (magnitude - wanted).square().mean()


def test_zeros_of_a_bias_of_two_dimensions_stay() -> None:
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(16, 8)),
                nn.Parameter(torch.ones(4, 4)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias.view(-1))

    x = torch.randn(64, 8)
    found = rf.prune(Odd(), x, Budget(sparsity=0.5), structure="weight", data=[x])
    assert "its bias" in found.sparsified.fallback["weight"]
    assert "linear does not multiply" in found.sparsified.fallback["bias"]
    for path, (gone, _) in found.sparsified.zeros.items():
        assert int((found.get_parameter(path) == 0).sum()) == gone


def test_weights_that_cannot_be_solved_go_by_magnitude() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.twice = nn.Embedding(10, 6), nn.Linear(6, 6)
            self.unread = nn.Linear(3, 3)
            self.head = nn.Linear(6, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.twice(F.relu(self.twice(self.table(tokens)))))

    torch.manual_seed(0)
    model = Odd()
    budget = Budget(sparsity=0.5, scope="local")
    found = rf.prune(model, TOKENS, budget, structure="weight", criterion="sparsegpt",
                     data=[TOKENS, TOKENS])  # fmt: skip
    plain = rf.prune(model, TOKENS, budget, structure="weight")
    reasons = found.sparsified.fallback
    assert "embedding" in reasons["table.weight"]
    assert "several times" in reasons["twice.weight"]
    assert "not read" in reasons["unread.weight"]
    assert "head.weight" in found.sparsified.errors
    for path in ("table.weight", "twice.weight", "unread.weight"):
        assert torch.equal(found.get_parameter(path), plain.get_parameter(path))


def test_plain_magnitude_is_taken_where_it_is_better(monkeypatch, convolutions) -> None:
    def spoiled(weight, *_):
        return weight + 100.0

    monkeypatch.setattr(calibrated, "moved", spoiled)
    budget = Budget(sparsity=0.5, scope="local")
    found = rf.prune(convolutions, DATA[0], budget, structure="weight", criterion="sparsegpt",
                     data=DATA)  # fmt: skip
    plain = rf.prune(convolutions, DATA[0], budget, structure="weight")
    assert set(found.sparsified.fallback) == set(found.sparsified.zeros)
    assert all("farther" in reason for reason in found.sparsified.fallback.values())
    for path, tensor in plain.state_dict().items():
        assert torch.equal(found.state_dict()[path], tensor), path


def test_layers_of_which_nothing_is_left_are_named(convolutions) -> None:
    with torch.no_grad():
        convolutions.point.weight.mul_(1e-3)
    with pytest.warns(RuntimeWarning, match=r"point\.weight.*scope='local'") as warned:
        found = rf.prune(convolutions, DATA[0], Budget(sparsity=0.5), structure="weight")
    assert warned[0].filename == __file__
    assert found.sparsified.emptied == ("point.weight",)
    again = rf.prune(found, DATA[0], Budget(sparsity=0.6), structure="weight")  # says it no more
    assert again.sparsified.emptied == ("point.weight",)
    budget = Budget(sparsity=0.5, scope="local")
    even = rf.prune(convolutions, DATA[0], budget, structure="weight")
    assert even.sparsified.emptied == ()


def test_weights_without_entries_are_not_taken_for_emptied() -> None:
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.none = nn.Parameter(torch.zeros(0, 4))

    found = rf.prune(Odd(), torch.ones(2, 3), Budget(sparsity=0.5), structure="weight")
    assert found.sparsified.emptied == ()


def test_what_cannot_be_factored_falls_back(monkeypatch, convolutions) -> None:
    def refused(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the input is not positive-definite")

    plain = rf.prune(convolutions, DATA[0], structure="2:4")
    monkeypatch.setattr(torch.linalg, "cholesky", refused)
    found = rf.prune(convolutions, DATA[0], structure="2:4", criterion="sparsegpt", data=DATA)
    assert set(found.sparsified.fallback) == set(found.sparsified.zeros)
    for reason in found.sparsified.fallback.values():
        assert "cannot be solved" in reason
        assert "damp=" in reason
        assert "Error" not in reason
    for path, tensor in plain.state_dict().items():
        assert torch.equal(found.state_dict()[path], tensor), path


@pytest.mark.parametrize("structure", ["2:4", "weight"])
@pytest.mark.parametrize("kind", ["bias", "no bias", "bfloat16"])
def test_inputs_far_from_zero_are_reconstructed_in_single_precision(structure, kind) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12, bias=kind != "no bias"), nn.ReLU(), nn.Linear(12, 4))
    mix, level = torch.randn(16, 16), 300 if kind == "bfloat16" else 3000
    x, unseen = (torch.randn(300, 16) @ mix + level for _ in range(2))
    if kind == "bfloat16":
        net, x, unseen = net.bfloat16(), x.bfloat16(), unseen.bfloat16()
    with torch.no_grad():
        net[0].weight -= net[0].weight.mean(1, keepdim=True)  # so that no output is far from zero
        if net[0].bias is not None:
            net[0].bias -= net[0](x).mean(0)
    budget = None if structure == "2:4" else Budget(sparsity=0.5)
    errors = []
    for model in (net, copy.deepcopy(net).double()):
        given, shown = (t.to(model[0].weight.dtype) for t in (x, unseen))
        found = rf.prune(model, given[:2], budget, structure=structure, data=[given])
        assert found.sparsified.fallback == {}
        with torch.no_grad():
            target, output = (m.double()(shown.double()) for m in (copy.deepcopy(net), found))
        errors.append(float((output - target).square().sum()))
    assert errors[0] < (1.1 if kind == "bfloat16" else 1.01) * errors[1]


def test_inputs_whose_squares_are_infinite_go_by_magnitude_with_a_remedy() -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    data = torch.randn(40, 8) * 1e25
    found = rf.prune(net, data[:2], structure="2:4", data=[data])
    assert "infinite in single precision" in found.sparsified.fallback["weight"]
    again = rf.prune(net.double(), data[:2].double(), structure="2:4", data=[data.double()])
    assert again.sparsified.fallback == {}


def test_a_hessian_without_rank_makes_nothing_worse(convolutions) -> None:
    """Whether rounding lets it be factored differs from processor to processor."""
    constant = [torch.ones(16, 3, 8, 8)]
    rule = SparseGPT(damp=1e-30)
    found = rf.prune(convolutions, DATA[0], structure="2:4", criterion=rule, data=constant)
    record = found.sparsified
    assert set(record.fallback) | set(record.errors) == set(record.zeros)
    taken = record.errors.keys() - record.fallback
    assert all(record.errors[path][1] <= record.errors[path][0] for path in taken)
    assert all(torch.isfinite(tensor).all() for tensor in found.state_dict().values())


def test_memory_bounds_the_samples(monkeypatch, convolutions) -> None:
    monkeypatch.setattr(examples, "MEMORY", 40 * 2 * 2 * 8 * 8 * 8 * 4)
    rule = SparseGPT(samples=1000)
    found = rf.prune(convolutions, DATA[0], structure="2:4", criterion=rule, data=DATA)
    assert 2 <= found.sparsified.samples < 128


@pytest.mark.filterwarnings("ignore:.*no weight is left:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_activations_and_too_few_examples(convolutions, value) -> None:
    budget = Budget(sparsity=0.7)
    constant = [torch.full((6, 3, 8, 8), value)]
    for data in (constant, [DATA[0][:2]], [DATA[0][:1]]):
        found = rf.prune(convolutions, DATA[0], budget, structure="weight",
                         criterion="sparsegpt", data=data)  # fmt: skip
        assert all(p.isfinite().all() for p in found.state_dict().values())
        assert sum(z for z, _ in found.sparsified.zeros.values()) == int(0.7 * 672 + 1e-9)
    assert "too few" in found.sparsified.fallback["head.weight"]


def test_data_reconstruct_where_no_criterion_is_given(convolutions) -> None:
    found, expected = (
        rf.prune(convolutions, DATA[0], structure="2:4", data=DATA, **given)
        for given in ({}, {"criterion": "sparsegpt"})
    )
    assert found.sparsified.errors
    for got, wanted in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_bad_data_are_refused(convolutions) -> None:
    options = {"structure": "2:4", "criterion": "sparsegpt"}
    x = DATA[0]
    with pytest.raises(InputError, match="needs calibration data"):
        rf.prune(convolutions, x, **options)
    with pytest.raises(InputError, match="no use of data"):
        rf.prune(convolutions, x, structure="2:4", criterion="magnitude", data=DATA)
    with pytest.raises(InputError, match="no criterion of single weights"):
        rf.prune(convolutions, x, structure="2:4", criterion="wandas")
    with pytest.raises(InputError, match="no criterion"):
        rf.prune(convolutions, x, structure="2:4", criterion=3)
    with pytest.raises(DataError, match="no example"):
        rf.prune(convolutions, x, data=[], **options)
    with pytest.raises(DataError, match="NaN"):
        rf.prune(convolutions, x, data=[x.where(x < 1, torch.nan)], **options)
    with pytest.raises(DataError, match="does not run"):
        rf.prune(convolutions, x, data=[torch.zeros(4, 2, 8, 8)], **options)
    with pytest.raises(DataError, match="infinite"):
        rf.prune(convolutions, x, data=[x * 1e38], **options)


def test_nothing_of_the_callers_changes(convolutions) -> None:
    state, flag = torch.get_rng_state(), convolutions.training
    rf.prune(convolutions, DATA[0], structure="2:4", criterion="sparsegpt", data=DATA)
    assert torch.equal(state, torch.get_rng_state())
    assert convolutions.training == flag


class Places(nn.Module):
    """A network that tells the places of its inputs apart, so that a graph of it has one length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Parameter(torch.ones(12, 8))
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        return self.out(torch.relu(self.inner(x)) * attention_mask[..., None])


@pytest.mark.parametrize("lengths", [(6, 9, 4), (9, 9)])
def test_texts_are_of_other_lengths_than_the_example(lengths) -> None:
    data = [
        {"ids": torch.randint(20, (16, n)), "attention_mask": torch.ones(16, n)} for n in lengths
    ]
    example = {key: value[:2, :4] for key, value in data[0].items()}
    found = rf.prune(Places(), example, structure="2:4", data=data, exclude=["places"])
    assert found.sparsified.samples == 16 * len(lengths)
    assert found.sparsified.errors.keys() == {"inner.weight", "out.weight"}


@pytest.mark.slow
def test_transformers_are_reconstructed() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).eval()
    data = [{"input_ids": torch.randint(50, (16, 12))} for _ in range(2)]
    found = rf.prune(model, data[0], structure="2:4", criterion="sparsegpt", data=data)
    record = found.sparsified
    assert set(record.fallback) == {"transformer.wte.weight"}  # it is the head's weight, too
    assert set(record.dense) == {"transformer.wpe.weight"}
    assert len(record.errors) == 4
    assert all(after < before for before, after in record.errors.values())
    weight = found.transformer.h[0].attn.c_attn.weight  # (inputs, outputs)
    assert ((weight != 0).view(4, 4, -1).sum(1) == 2).all()
