"""Evidence on data against autograd, sample by sample, on the user's own module."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, vmap

from rarefy.errors import DataError, InputError
from rarefy.graph.trace import trace
from rarefy.pruning.running.taps import Watched
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.gather import GATHERERS, gather

KINDS = frozenset(GATHERERS)


class Net(nn.Module):
    """Convolutions of several kinds, a residual sum, a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.hidden, self.again = nn.Linear(16, 6), nn.Linear(6, 6)
            self.out = nn.Linear(6, 3)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.data.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        x = x + self.depth(x)
        x = F.avg_pool2d(torch.relu(self.up(x)), 4).flatten(1)
        x = torch.tanh(self.hidden(x))
        x = x + torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.out(x)


X = torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 2, 1, 1, 0, 2])


DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def gathered(net, *needs, data=DATA, **options) -> Evidence:
    return gather(net, trace(net, X[:2]), frozenset(needs), data, **options)


def per_sample(net, loss=F.cross_entropy):
    """Gradients of every sample's loss by every parameter: (samples, *shape), through vmap."""
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def one(values, x, y):
        return loss(functional_call(net, values, (x[None],)), y[None])

    return vmap(grad(one), in_dims=(None, 0, 0))(parameters, X, Y)


def test_gradients_are_means_over_all_samples() -> None:
    net = Net()
    found, expected = gathered(net, "gradients"), per_sample(net)
    assert found.samples == len(X)
    assert found.gradients.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(found.gradients[path], gradient.mean(0))


def test_squares_are_means_of_squares_and_not_squares_of_means() -> None:
    net = Net()
    found, expected = gathered(net, "squares").squares, per_sample(net)
    for path, gradient in expected.items():
        torch.testing.assert_close(found[path], gradient.square().mean(0))


def test_another_loss_is_taken() -> None:
    net = Net()

    def loss(logits, targets):
        return (logits - targets[:, None].double()).square().mean()

    found, expected = gathered(net, "gradients", loss=loss).gradients, per_sample(net, loss)
    torch.testing.assert_close(found["a.weight"], expected["a.weight"].mean(0))


def test_shared_parameters_are_known_under_all_their_names() -> None:
    net = Net()
    net.extra = nn.Linear(6, 6).double()
    net.extra.weight = net.again.weight
    found = gathered(net, "gradients", "squares")
    for kind in (found.gradients, found.squares):
        assert torch.equal(kind["extra.weight"], kind["again.weight"])
        assert not kind["extra.bias"].any()


def test_gates_are_sums_of_weight_times_gradient_over_the_weights_that_read_the_unit() -> None:
    net = Net()
    network = trace(net, X[:2])
    gates = gather(net, network, frozenset({"gates"}), DATA).gates
    gradients = per_sample(net)
    readers = {
        "a": [("up.weight", 0)],  # the depthwise convolution hands the units on
        "up": [("hidden.weight", 1)],
        "hidden": [("again.weight", 1), ("out.weight", 1)],
    }
    named = {name: g for g in network.groups for name in readers if g.name == name}
    assert named.keys() == readers.keys()
    for name, group in named.items():
        sums = torch.zeros(len(X), len(group), dtype=torch.float64)
        for path, dim in readers[name]:
            (member,) = [m for m in group.members if (m.path, m.dim) == (path, dim)]
            product = net.get_parameter(path).detach() * gradients[path]
            per_entry = product.movedim(1 + dim, 1).flatten(2).sum(2)
            sums += per_entry[:, torch.from_numpy(member.indices)].sum(2)
        units = torch.from_numpy(group.units)
        torch.testing.assert_close(gates.mean[units], sums.mean(0))
        torch.testing.assert_close(gates.absolute[units], sums.abs().mean(0))
        torch.testing.assert_close(gates.square[units], sums.square().mean(0))
        assert gates.seen[units].all()


class Attention(nn.Module):
    """Queries meet keys along a dimension that no weight reads; the examples come second."""

    def __init__(self, gate=None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(4, 6, dtype=torch.float64) for _ in range(3))
            self.o = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x, gate=1.0):
        x = x.transpose(0, 1)
        q, k, v = (layer(x).transpose(0, 1) for layer in (self.q, self.k, self.v))
        scores = (q * gate) @ k.mT / 2
        return self.o(scores.softmax(-1) @ v).mean(1)


def test_units_that_no_weight_reads_have_gates_where_they_are_summed_over() -> None:
    net = Attention()
    x = torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 1, 2, 0, 1])
    network = trace(net, x[:2])
    (group,) = [g for g in network.groups if g.name == "q"]
    gates = gather(net, network, frozenset({"gates"}), [(x[:3], y[:3]), (x[3:], y[3:])]).gates

    def loss(gate, one, label):
        return F.cross_entropy(net(one[None], gate), label[None])

    ones = torch.ones(6, dtype=torch.float64)
    expected = torch.stack([grad(loss)(ones, x[n], y[n]) for n in range(5)])
    order = torch.from_numpy(group.members[0].indices[:, 0])
    found = gates.square[torch.from_numpy(group.units)]
    torch.testing.assert_close(found, expected[:, order].square().mean(0))


def test_activations_are_means_of_what_is_read() -> None:
    net = Net()
    network = trace(net, X[:2])
    found = gather(net, network, frozenset({"activations"}), [X[:4], X[4:]]).activations
    (group,) = [g for g in network.groups if any(m.path == "up.weight" and m.dim == 1
                                                 for m in g.members)]  # fmt: skip
    with torch.no_grad():
        x = torch.relu(net.norm(net.a(X)))
        read = F.avg_pool2d(torch.relu(net.up(x + net.depth(x))), 4)
    expected = read.abs().mean((0, 2, 3))
    torch.testing.assert_close(found[torch.from_numpy(group.units)], expected)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_how_the_data_are_split_into_batches_changes_nothing(sizes) -> None:
    splits = [min(sum(sizes[:i]), 6) for i in range(len(sizes) + 1)]
    data = [(X[a:b], Y[a:b]) for a, b in zip([*splits], [*splits[1:], 6], strict=True) if a < b]
    for kind in KINDS:
        found, whole = (gather(NET, NETWORK, frozenset({kind}), d) for d in (data, [(X, Y)]))
        _assert_equal(getattr(found, kind), getattr(whole, kind))
        assert found.samples == whole.samples == 6


NET = Net()
NETWORK = trace(NET, X[:2])


def _assert_equal(found, expected) -> None:
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-10)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            _assert_equal(found[key], expected[key])
    elif isinstance(found, tuple):
        for a, b in zip(found, expected, strict=True):
            _assert_equal(a, b)
    else:
        for name in found.__dataclass_fields__:
            _assert_equal(getattr(found, name), getattr(expected, name))


def test_nothing_of_the_user_s_is_changed() -> None:
    net = Net().train()
    net.norm.eval()
    net.a.weight.requires_grad_(False)
    net.out(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    calls = []
    net.a.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(net.state_dict())
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    random, inputs = torch.get_rng_state(), X.clone()
    network = trace(net, X[:2])
    for data in ([(X, Y)], [(X, Y), (X, torch.full((6,), 9))]):
        for kind in KINDS:
            try:
                gather(net, network, frozenset({kind}), data)
            except DataError:
                assert data[-1][1][0] == 9
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    for name, parameter in net.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])
    assert flags == (
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
    )
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(X, inputs)
    assert len(net.a._forward_hooks) == 1


def test_frozen_parameters_have_gradients() -> None:
    net, frozen = Net(), Net()
    frozen.requires_grad_(False)
    for kind in ("gradients", "squares", "gates"):
        _assert_equal(getattr(gathered(frozen, kind), kind), getattr(gathered(net, kind), kind))


def test_gradients_under_no_grad() -> None:
    with torch.no_grad():
        found = gathered(Net(), "gradients", "gates", "norms")
    assert found.gradients["a.weight"].any()
    assert found.gates.square.any()
    assert not found.gradients["a.weight"].requires_grad


@pytest.mark.parametrize("kind", ["squares", "gates"])
def test_labels_that_are_not_given_are_drawn_from_the_network_s_own_probabilities(kind) -> None:
    """For logits that are linear in what is differentiated, the Hessian is the true Fisher."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        x = torch.randn(4, 3, dtype=torch.float64)
    network = trace(net, x)
    weight, hidden = net[2].weight.detach(), net[:2](x).detach()

    def loss(gate, w):
        return F.cross_entropy(F.linear(hidden * gate, w, net[2].bias.detach()), Y[:4])

    gate = torch.ones(4, dtype=torch.float64)
    data = [x.repeat(250, 1) for _ in range(8 if kind == "gates" else 1)]
    found = gather(net, network, frozenset({kind}), data)
    if kind == "gates":
        expected = hessian(lambda g: loss(g, weight), gate).diagonal()
        got = found.gates.square[torch.from_numpy(network.groups[0].units)]
    else:
        expected = hessian(lambda w: loss(gate, w), weight).reshape(12, 12).diagonal()
        got = found.squares["2.weight"].flatten()
    torch.testing.assert_close(got, expected, rtol=0.2, atol=0.01)


def test_outputs_that_are_no_logits_have_the_information_of_a_normal_distribution() -> None:
    """``sum over outputs of (dy/dgate)^2 / |y|^2``, averaged over the examples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)
        net = nn.Sequential(first, nn.Tanh(), second).double()
        x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    network = trace(net, x)
    hidden = net[:2](x).detach()
    gate = torch.ones(4, dtype=torch.float64)
    slopes = jacobian(lambda g: second(hidden * g[:, None, None]), gate)
    power = net(x).detach().square().sum() / len(x)
    expected = slopes.square().sum((1, 2, 3)).mean(0) / power
    data = [x.repeat(250, 1, 1, 1) for _ in range(4)]
    found = gather(net, network, frozenset({"gates"}), data).gates.square
    got = found[torch.from_numpy(network.groups[0].units)]
    torch.testing.assert_close(got, expected, rtol=0.15, atol=0.001)


@pytest.mark.parametrize("kind", ["gates", "squares"])
def test_a_single_output_is_no_class(kind) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
        x = torch.randn(6, 3)
    found = getattr(gather(net, trace(net, x), frozenset({kind}), [x]), kind)
    assert (found.square if kind == "gates" else found["2.weight"]).any()


def test_labels_are_drawn_alike_every_time() -> None:
    found, again = (gathered(Net(), "gates", data=[X]).gates for _ in range(2))
    _assert_equal(found, again)


class Tagger(nn.Module):
    """Takes sequences of any length, and one shape of the image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.inner, self.out = nn.Embedding(9, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, ids):
        x = self.inner(self.table(ids)).relu()
        return self.out(x.reshape(ids.shape[0], ids.shape[1], 6)).mean(1)


def test_inputs_of_other_lengths_are_followed_anew() -> None:
    net = Tagger()
    ids = torch.randint(9, (4, 8), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 1])
    same = gather(net, trace(net, ids), frozenset({"gates"}), [(ids, y)])
    other = gather(net, trace(net, ids[:2, :3]), frozenset({"gates"}), [(ids, y)])
    _assert_equal(other.gates, same.gates)
    mixed = gather(net, trace(net, ids), frozenset({"gates"}), [(ids, y), (ids[:, :5], y)])
    assert mixed.samples == 8


def test_a_network_of_one_batch_size_is_run_as_it_is() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x.view(2, 5, 3)).relu()).mean(1)

    net = Fixed().double()
    x = torch.randn(2, 15, dtype=torch.float64)
    found = gather(net, trace(net, x), frozenset({"gates"}), [(x, torch.tensor([0, 1]))])
    hidden = net.a(x.view(2, 5, 3)).relu().detach().requires_grad_()
    total = F.cross_entropy(net.b(hidden).mean(1), torch.tensor([0, 1]), reduction="sum")
    (gradient,) = torch.autograd.grad(total, hidden)
    expected = (hidden * gradient).sum(1).square().mean(0).detach()
    torch.testing.assert_close(found.gates.square, expected)


@pytest.mark.parametrize("need", GATHERERS)
def test_a_network_that_is_captured_for_one_batch_size_takes_others(need) -> None:
    class Tagged(nn.Module):
        """A token before all others, of as many examples as there are."""

        def __init__(self, number) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.number, self.tag = number, nn.Parameter(torch.randn(1, 1, 6))
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            tags = self.tag.expand(self.number(x.shape[0]), -1, -1)
            return self.b(torch.cat([tags, self.a(x)], 1).relu().mean(1))

    x, y = torch.randn(7, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 1, 0])
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    found, expected = (
        gather(net, trace(net, x[:2]), frozenset({need, "labels"}), data)
        for net in (Tagged(number).double() for number in (int, lambda size: size))
    )
    assert found.samples == 7
    one, other = getattr(found, need), getattr(expected, need)
    if need == "gates":
        one, other = one.square, other.square
    if need == "grams":
        one, other = ({k: v[0].matrix for k, v in e.items()} for e in (one, other))
    torch.testing.assert_close(one, other)


def test_mappings_and_outputs_with_logits_are_taken() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tagger()

        def forward(self, ids, mask=None):
            return {"logits": self.net(ids), "loss": None}

    net, ids = Model(), torch.randint(9, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "labels": torch.tensor([0, 1, 0, 1])}
    found = gather(net, trace(net, {"ids": ids}), frozenset({"gradients"}), [batch])
    assert found.gradients["net.inner.weight"].any()


def test_one_sample_is_enough() -> None:
    found = gathered(Net(), *KINDS, data=[(X[:1], Y[:1])])
    assert found.samples == 1
    assert all(torch.isfinite(g.matrix).all() for gs in found.grams.values() for g in gs)


def test_data_that_are_needed_are_asked_for() -> None:
    net = Net()
    network = trace(net, X[:2])
    with pytest.raises(InputError, match=r"data=.*labelled.*loss="):
        gather(net, network, frozenset({"gates", "labels"}))
    with pytest.raises(InputError, match=r"it needs data \(norms\).*Give data="):
        gather(net, network, frozenset({"norms"}))
    with pytest.raises(InputError, match=r"unlabelled.*criterion='fisher'"):
        gather(net, network, frozenset({"gates", "labels"}), [X])
    with pytest.raises(InputError, match="unlabelled"):
        gather(net, network, frozenset({"gates"}), [X], F.cross_entropy)
    with pytest.raises(InputError, match=r"needs \['magic'\].*gates"):
        gather(net, network, frozenset({"magic"}), [X])
    for kind in KINDS:
        with pytest.raises(DataError, match="no example"):
            gather(net, network, frozenset({kind}), [])
        with pytest.raises(DataError, match="does not run on a batch"):
            gather(net, network, frozenset({kind}), [(X[:, :1], Y)])


def test_what_is_not_finite_is_named() -> None:
    net = Net()
    network = trace(net, X[:2])
    bad = X.clone()
    bad[3] = torch.nan
    for kind in KINDS:
        with pytest.raises(DataError, match="NaN or infinite"):
            gather(net, network, frozenset({kind}), [(bad, Y)])
    for kind, what in (("gradients", r"by a\.weight"), ("gates", r"what linear\w* reads")):
        with pytest.raises(DataError, match=what):
            gather(net, network, frozenset({kind}), [(X, Y)], _steep)


def _steep(logits, targets):
    """A finite loss whose gradient is not."""
    return (logits - logits.detach()).abs().sqrt().sum()


def test_losses_of_another_form_are_refused() -> None:
    net = Net()
    network = trace(net, X[:2])
    for loss, what in (
        (lambda logits, targets: logits, "scalar"),
        (lambda logits, targets: 1.0, "scalar"),
        (lambda logits, targets: logits.detach().sum(), "does not depend"),
    ):
        for kind in ("gradients", "gates"):
            with pytest.raises(InputError, match=what):
                gather(net, network, frozenset({kind}), [(X, Y)], loss)


def test_samples_own_gradients_are_found_together(monkeypatch) -> None:
    """One by one would take as many runs as there are samples."""
    runs = []
    forward = Watched.forward
    monkeypatch.setattr(Watched, "forward", lambda *a, **k: runs.append(0) or forward(*a, **k))
    gathered(Net(), "squares")
    together = len(runs)
    runs.clear()
    gathered(Net(), "gradients")
    assert together == len(runs)


class Recurrent(nn.Module):
    """An LSTM, whose samples go one by one, on inputs beside a tensor that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.cell = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True)
            self.out = nn.Linear(5, 3)
        self.double().eval()

    def forward(self, x, scale):
        return self.out(self.cell((self.inner(x) * scale).tanh())[0].mean(1))


class Shared(Recurrent):
    """The same without the LSTM."""

    def forward(self, x, scale):
        return self.out(torch.cat([(self.inner(x) * scale).tanh()] * 2, -1)[..., :5].mean(1))


@pytest.mark.parametrize("kind", [Recurrent, Shared])
@pytest.mark.parametrize("loss", [None, lambda z, y: (z.square().mean(1) * (y + 1)).mean()])
def test_squares_are_those_of_samples_one_by_one(kind, loss, monkeypatch) -> None:
    """Also in parts as large as what the samples share."""
    net = kind()
    held = sum(p.numel() * p.element_size() for p in net.parameters())
    monkeypatch.setattr("rarefy.pruning.scoring.samples.OWN", 4 * held)
    scale = torch.linspace(1, 2, 4, dtype=torch.float64)
    x = torch.randn(6, 7, 3, dtype=torch.float64)
    data = [({"x": x, "scale": scale}, Y)]
    network = trace(net, data[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gather(net, network, frozenset({"squares"}), data, loss).squares
    expected = {path: torch.zeros_like(p) for path, p in net.named_parameters()}
    for n in range(len(x)):
        net.zero_grad()
        (loss or F.cross_entropy)(net(x[n : n + 1], scale), Y[n : n + 1]).backward()
        for path, parameter in net.named_parameters():
            if parameter.grad is not None:
                expected[path] += parameter.grad.square() / len(x)
    _assert_equal(found, expected)


def test_a_gradient_that_is_not_finite_is_found_among_many() -> None:
    net = Net()
    broken = X.clone()
    broken[3] = math.inf
    with pytest.raises(DataError, match="NaN or infinite"):
        gathered(net, "squares", data=[(broken, Y)])


NEED = frozenset({"squares"})


class Overwriting(Recurrent):
    """Writes into what it is given before the LSTM."""

    def forward(self, x, scale):
        return super().forward(x.sub_(0.5), scale.add_(1))


def test_networks_that_overwrite_their_inputs_meet_each_sample_as_it_is() -> None:
    net = Overwriting()
    x, scale = torch.randn(6, 7, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    network = trace(net, (x.clone(), scale.clone()))
    apart = [((x[n : n + 1], scale), Y[n : n + 1]) for n in range(6)]
    found, expected = (gather(net, network, NEED, d).squares for d in ([((x, scale), Y)], apart))
    _assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_small_gradients_are_above_zero_in_half_precision(dtype) -> None:
    net = Net().to(dtype)
    network = trace(net, X.to(dtype))
    for size in (6, 1):
        data = [(X[:size].to(dtype), Y[:size])]
        found = gather(net, network, NEED, data, lambda z, y: z.square().mean() / 2**13).squares
        assert all(bool((t > 0).any()) for t in found.values())


def test_samples_go_one_by_one_in_silence_where_an_operator_wants_that(capfd) -> None:
    """PyTorch would write a line to stderr for every call that it takes apart."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.cell = nn.Linear(4, 5), nn.GRUCell(5, 3)

        def forward(self, x):
            return self.cell(self.inner(x))

    net = Cell()
    gather(net, trace(net, torch.ones(2, 4)), NEED, [(torch.randn(6, 4), Y)])
    assert capfd.readouterr().err == ""


def test_the_same_labels_are_drawn_where_samples_go_one_by_one_after_all(monkeypatch) -> None:
    net = Net()
    network = trace(net, X)
    expected = gather(net, network, NEED, [X]).squares
    tried = []
    monkeypatch.setattr(torch, "stack", lambda losses: tried.append(losses) or 1 / 0)
    found = gather(net, network, NEED, [X]).squares
    assert len(tried) == 1
    _assert_equal(found, expected)


@pytest.mark.parametrize("kind", ["gradients", "squares", "gates"])
def test_labels_are_left_as_they_are_by_losses_that_overwrite_them(kind) -> None:
    labels = Y.clone()
    gathered(Net(), kind, data=[(X, labels)], loss=lambda z, y: F.cross_entropy(z, y.fill_(0)))
    assert torch.equal(labels, Y)


def test_labels_that_the_loss_ignores_tell_no_unit_from_another() -> None:
    ignored = [(X, torch.full_like(Y, -100))]

    def loss(logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum") / len(logits)

    with pytest.raises(DataError, match=r"gradient .* by every unit is zero"):
        gathered(Net(), "gates", "labels", data=ignored, loss=loss)
