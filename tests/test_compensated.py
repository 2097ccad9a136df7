"""Losses against the error of a copy that is masked, adapted and run by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import rarefy as rf
from rarefy.errors import DataError, InputError
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.scoring import compensated as module
from rarefy.pruning.scoring.compensated import Compensated, respond
from rarefy.pruning.scoring.surgeon import RIDGE
from rarefy.pruning.structure.reference import masked

pytestmark = pytest.mark.filterwarnings("ignore:.* was asked for and .* remain:RuntimeWarning")
"""Units and blocks of tiny networks leap over budgets, which is not what is tested here."""

SMALL = Compensated(samples=64, shown=40, ratios=(0.25, 0.5, 0.75))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perceptron() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_losses_are_those_of_the_network_masked_and_adapted_by_hand() -> None:
    model, x = perceptron(), randn(64, 6)
    result = respond(model, trace(model, x[:2]), [x], SMALL)
    order = np.argsort(result.scores[0])
    h = model[1](model[0](x)).detach().double()
    shown = model(x[:40]).detach().double()
    w = model[2].weight.detach().double()
    assert result.losses is not None
    for gone in (2, 4, 6):
        kept = torch.from_numpy(np.sort(order[gone:]))
        lost = torch.from_numpy(np.sort(order[:gone]))
        own, target = h - h.mean(0), (h - h.mean(0)) @ w.T
        gram = own[:, kept].T @ own[:, kept] / len(own)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(kept))
        step = torch.linalg.solve(
            gram, own[:, kept].T @ (target - own[:, kept] @ w[:, kept].T) / 64
        )
        adapted = w[:, kept] + step.T
        bias = model[2].bias.double() + w @ h.mean(0) - adapted @ h.mean(0)[kept]
        found = h[:40, kept] @ adapted.T + bias
        expected = float(((found - shown).square().sum() / shown.square().sum()).detach())
        assert float(result.losses[0](np.array([gone / 8]))[0]) == pytest.approx(expected, rel=1e-3)
        assert len(lost) == gone


def test_losses_never_fall_and_are_nothing_without_removal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
                          nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3)).eval()  # fmt: skip
    x = randn(40, 3, 8, 8)
    result = respond(model, trace(model, x[:2]), [x], SMALL)
    assert result.losses is not None
    assert len(result.losses) == 2
    for losses in result.losses.values():
        values = losses(np.linspace(0, 1, 33))
        assert values[0] == 0
        assert (np.diff(values) >= 0).all()
        assert values[-1] > 0


def test_parts_and_shown_examples_do_not_change_what_is_measured(monkeypatch) -> None:
    model, x = perceptron(), randn(64, 6)
    network = trace(model, x[:2])
    one = respond(model, network, [x], SMALL)
    monkeypatch.setattr(module, "PART", 7)
    many = respond(model, network, [x[:20], x[20:]], SMALL)
    grid = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(one.scores[0], many.scores[0])
    np.testing.assert_allclose(one.losses[0](grid), many.losses[0](grid), rtol=1e-4)


def test_of_large_networks_fewer_examples_are_shown(monkeypatch) -> None:
    model, x = perceptron(), randn(64, 6)
    seen = []
    monkeypatch.setattr(module, "_errors", lambda n, r, parts, *_: seen.append(sum(map(len, parts)))
                        or {})  # fmt: skip
    for work in (10**13, 1):
        monkeypatch.setattr(module, "WORK", work)
        respond(model, trace(model, x[:2]), [x], SMALL)
    assert seen == [40, module.FEWEST]


def test_nothing_of_the_users_is_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    model[0].weight.requires_grad_(False)
    x = randn(32, 6)
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    before = torch.get_rng_state()
    rf.prune(model, x[:2], rf.Budget(macs=0.7), criterion=SMALL, data=[x])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(m.training for m in model)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert torch.equal(x, given)
    assert model[2].weight.grad is None
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_a_group_with_which_outputs_are_not_finite_is_left_whole(monkeypatch) -> None:
    model, x = perceptron(), randn(32, 6)
    monkeypatch.setattr(module, "distance", lambda *outputs: math.nan)
    result = respond(model, trace(model, x[:2]), [x], SMALL)
    assert result.losses == {}
    assert list(result.unmeasured) == [0]
    with pytest.raises((InputError, rf.errors.BudgetError)):
        rf.prune(model, x[:2], rf.Budget(macs=0.7), criterion=SMALL, data=[x], keep_class=True)


@pytest.mark.parametrize("x", [randn(1, 6), torch.ones(8, 6), torch.zeros(8, 6), randn(3, 6)],
                         ids=["one", "constant", "zero", "few"])  # fmt: skip
def test_poor_data_still_give_an_order_and_finite_losses(x) -> None:
    model = perceptron().requires_grad_(False)
    result = respond(model, trace(model, x[:1]), [x], Compensated())
    assert sorted(result.scores[0]) == list(range(8))
    assert np.isfinite(result.losses[0](np.linspace(0, 1, 9))).all()


class Fixed(nn.Module):
    """Takes six examples, no more and no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.a(x).relu().view(6, 8))


def test_a_network_of_one_batch_size_is_measured_on_its_first_batch() -> None:
    model, x = Fixed().eval(), randn(12, 6)
    network = trace(model, x[:6])
    found, first = (respond(model, network, d, SMALL) for d in ([x[:6], x[6:]], [x[:6]]))
    grid = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(found.losses[0](grid), first.losses[0](grid))


def test_sequences_of_another_length_are_measured() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    network = trace(model, torch.zeros(2, 5, dtype=torch.long))
    result = respond(model, network, [torch.randint(0, 9, (16, 7))], SMALL)
    assert result.losses is not None
    assert len(result.losses) == len(network.groups)


def test_data_and_networks_that_give_nothing_to_compare_are_refused() -> None:
    class Choice(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    model, x = perceptron(), randn(16, 6)
    chooser = Choice(*model)
    with pytest.raises(DataError, match="no floating-point"):
        respond(chooser, trace(chooser, x[:2]), [x], SMALL)
    with pytest.raises(DataError, match="does not run"):
        respond(model, trace(model, x[:2]), [randn(16, 5)], SMALL)
    with pytest.raises(DataError, match="NaN"):
        respond(model, trace(model, x[:2]), [x * math.nan], SMALL)
    for wrong in ({"samples": 0}, {"shown": 1.5}, {"ratios": ()}, {"ratios": (1.0,)}):
        with pytest.raises(InputError):
            Compensated(**wrong)


class Net(nn.Module):
    """Depthwise, a gate, a stream with layer norm and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.t, self.n, self.o = nn.ConvTranspose2d(8, 6, 2), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.d(self.a(x).relu())
        x = x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.o(self.n(self.t(x).mean((2, 3))))


class Words(nn.Module):
    """An embedding, tied to the output, and a recurrence or a stream between them."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.r = nn.LSTM(8, 8, batch_first=True) if recurrent else None
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.o.weight = self.e.weight

    def forward(self, x):
        h = self.e(x)
        h = h if self.r is None else self.r(h)[0]
        return self.o(h + self.down(self.up(h).relu()))


PLAIN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
                      nn.Linear(96, 2))  # fmt: skip
IMAGES = randn(24, 3, 8, 8)
TOKENS = torch.randint(0, 20, (24, 5), generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "gates": lambda: (Net(), IMAGES),
    "tied": lambda: (Words(recurrent=False), TOKENS),
    "lstm": lambda: (Words(recurrent=True), TOKENS),
    "bfloat16": lambda: (copy.deepcopy(PLAIN).bfloat16(), IMAGES.bfloat16()),
    "float16": lambda: (copy.deepcopy(PLAIN).half(), IMAGES.half()),
    "float64": lambda: (copy.deepcopy(PLAIN).double(), IMAGES.double()),
    "channels last": lambda: (
        copy.deepcopy(PLAIN).to(memory_format=torch.channels_last),
        IMAGES.to(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_budgets_are_met_with_proof(name) -> None:
    model, x = NETWORKS[name]()
    size = sum(p.numel() for p in model.parameters())
    small = rf.prune(model, x[:2], rf.Budget(params=0.7), criterion=SMALL, data=[x])
    assert sum(p.numel() for p in small.parameters()) <= 0.7 * size
    assert small.pruned.widths


def test_units_of_weight_normed_layers_are_measured() -> None:
    """The vector of a masked unit must not be divided by its own length of zero."""
    plain = perceptron()
    normed = copy.deepcopy(plain)
    weight_norm(normed[0])
    x = randn(64, 6)
    expected, found = (respond(m, trace(m, x[:2]), [x], SMALL) for m in (plain, normed))
    assert not found.unmeasured
    shares = np.array([0.25, 0.5, 0.75])
    assert found.losses[0](shares) == pytest.approx(expected.losses[0](shares), rel=1e-4)
    small = rf.prune(normed, x[:2], rf.Budget(macs=0.5), criterion="compensated", data=[x])
    assert small.pruned.left == 0.5


class Cast(nn.Module):
    """Layers in half precision between others, and one whose weight comes first."""

    def __init__(self, *, is_cast: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 12)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 12) / 3), nn.Parameter(torch.randn(8))
        self.c, self.is_cast = nn.Linear(8, 4), is_cast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.is_cast):
            x = self.b(self.a(x).relu()).relu().float()
        y = torch.addmm(self.bias[:, None], self.weight, x.t()).t().relu()
        return self.c(y)


@pytest.mark.parametrize("is_cast", [False, True])
def test_casts_and_weights_that_come_first_are_measured(is_cast) -> None:
    torch.manual_seed(0)
    net, x = Cast(is_cast=is_cast).eval(), randn(64, 6)
    small = rf.prune(net, x[:3], rf.Budget(macs=0.6), criterion="compensated", data=[x], heal=False)
    assert small.weight.shape[1] == small.b.out_features
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_lengths_of_weight_norms_shrink_with_their_vectors() -> None:
    """What is measured of a layer that no solve adapts is what masking gives."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = weight_norm(nn.Linear(6, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 4))
    model, x = nn.Sequential(*layers).eval(), randn(40, 6)
    network = trace(model, x[:2])
    result = respond(model, network, [x], Compensated(ratios=(0.25, 0.5, 0.75)))
    order = np.argsort(result.scores[0])
    for count in (2, 4, 6):
        gone = np.zeros(network.coupling.units, bool)
        gone[network.groups[0].units[order[:count]]] = True
        with torch.no_grad():
            expected, found = model(x), masked(model, network, Plan.of(network, gone))(x)
        error = float((found - expected).square().sum() / expected.square().sum())
        assert float(result.losses[0](np.array([count / 8]))[0]) == pytest.approx(error, rel=1e-4)
