"""Criteria against references computed in another way: loops, autograd, least squares."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy as rf
from rarefy.errors import InputError
from rarefy.graph.trace import trace
from rarefy.pruning.scoring import criteria
from rarefy.pruning.scoring.criteria import (
    CRITERIA,
    ELEMENT,
    FPGM,
    RIDGE,
    Activation,
    Coupled,
    Gate,
    NormScale,
    Reconstruction,
    named,
    needs,
    random,
    scored,
)
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.gather import gather

torch.set_num_threads(1)
FREE = [name for name, criterion in CRITERIA.items() if not needs(criterion)]
X = torch.randn(12, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 4


@functools.cache
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)
        )
        net[1].weight.data.uniform_(0.2, 2)
    net = net.double().eval()
    return net, trace(net, X[:2])


def judged(name, *kinds, data=((X[:7], Y[:7]), (X[7:], Y[7:]))):
    """A net, its group, the evidence that a criterion needs, and the scores."""
    net, traced = network()
    (group,) = traced.groups
    criterion = named(name)
    evidence = gather(net, traced, needs(criterion) | frozenset(kinds), list(data))
    return net, group, evidence, torch.from_numpy(scored(group, evidence, criterion))


def slices_of(net, of):
    """Sums over what of the first layer's weight and of the last layer's goes with each unit."""
    conv, linear = of("0.weight", net[0].weight), of("4.weight", net[4].weight)
    own = [conv[u].sum() / conv.abs().sum() for u in range(5)]
    read = [linear[:, 4 * u : 4 * u + 4].sum() / linear.abs().sum() for u in range(5)]
    return torch.stack([a + b for a, b in zip(own, read, strict=True)]).detach()


@pytest.mark.parametrize(("criterion", "power"), [("magnitude", 2), ("l1", 1)])
def test_magnitude_is_the_share_of_each_coupled_layer(criterion, power) -> None:
    net, _, _, scores = judged(criterion)
    conv = np.abs(net[0].weight.detach().numpy()) ** power
    linear = np.abs(net[4].weight.detach().numpy()) ** power
    expected = [
        conv[u].sum() / conv.sum() + linear[:, 4 * u : 4 * u + 4].sum() / linear.sum()
        for u in range(5)
    ]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in FREE if n not in ("norm_scale", "lamp")])
def test_scores_do_not_depend_on_the_scale_of_a_layer(name) -> None:
    net, group, evidence, before = judged(name)
    scaled = dict(evidence.tensors)
    scaled["0.weight"] = 100 * scaled["0.weight"]
    found = CRITERIA[name](group, Evidence(scaled, evidence.scales))
    torch.testing.assert_close(found, before)
    assert net[0].weight is evidence.tensors["0.weight"]


@pytest.mark.parametrize("name", CRITERIA)
def test_dead_layers_have_finite_scores(name) -> None:
    _, group, evidence, _ = judged(name)
    zeros = {path: torch.zeros_like(t) for path, t in evidence.tensors.items()}
    known = {f: getattr(evidence, f) for f in evidence.__dataclass_fields__ if f != "tensors"}
    found = scored(group, Evidence(zeros, **known), CRITERIA[name])
    assert np.isfinite(found).all()
    if name in ("magnitude", "l1", "lamp", "fpgm", "obd", "obs", "reconstruction", "wanda"):
        assert not found.any()


def test_groups_without_kernels_are_scored_by_their_vectors() -> None:
    _, group, evidence, _ = judged("magnitude")
    vectors = Evidence({path: t for path, t in evidence.tensors.items() if t.ndim == 1})
    assert (CRITERIA["magnitude"](group, vectors) > 0).all()


def test_random_scores_are_the_same_for_the_same_group() -> None:
    _, group, evidence, _ = judged("random")
    state = torch.get_rng_state()
    assert torch.equal(random(group, evidence), random(group, Evidence({})))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(
        ELEMENT["random"]("0.weight", evidence), ELEMENT["random"]("0.weight", evidence)
    )


def test_the_scale_of_a_normalization_is_taken_as_it_is() -> None:
    net, group, evidence, scores = judged("norm_scale")
    assert evidence.scales == {"1.weight"}
    torch.testing.assert_close(scores, net[1].weight.detach().abs())
    assert NormScale()(group, Evidence(evidence.tensors)).tolist() == [1.0] * 5


def test_lamp_by_its_definition() -> None:
    net, _, evidence, scores = judged("lamp")
    conv, linear = net[0].weight.detach(), net[4].weight.detach().view(4, 5, 4)
    sums = [conv[u].square().sum() + linear[:, u].square().sum() for u in range(5)]
    expected = [float(s / sum(t for t in sums if t >= s)) for s in sums]
    np.testing.assert_allclose(scores, expected)
    weight = net[4].weight.detach().flatten()
    by_weight = [float(w**2 / sum(v**2 for v in weight if abs(v) >= abs(w))) for w in weight]
    np.testing.assert_allclose(ELEMENT["lamp"]("4.weight", evidence).flatten(), by_weight)


def test_fpgm_by_two_loops() -> None:
    net, group, evidence, _ = judged("fpgm")
    filters = net[0].weight.detach().numpy()
    columns = net[4].weight.detach().numpy().reshape(4, 5, 4).transpose(1, 0, 2)
    expected = [
        sum(np.linalg.norm(filters[u] - filters[v]) for v in range(5))
        + sum(np.linalg.norm(columns[u] - columns[v]) for v in range(5))
        for u in range(5)
    ]
    np.testing.assert_allclose(FPGM(scale="none")(group, evidence), expected)


def sample_gradients(net):
    """The gradient of each sample's loss by both weights, one backward pass each."""
    found = {"0.weight": [], "4.weight": []}
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(net(x[None]), y[None])
        pair = torch.autograd.grad(loss, [net[0].weight, net[4].weight])
        for path, gradient in zip(found, pair, strict=True):
            found[path].append(gradient)
    return {path: torch.stack(gradients) for path, gradients in found.items()}


def test_criteria_by_gradients_of_weights() -> None:
    net, _, evidence, scores = judged("gradient", "squares")
    held = sample_gradients(net)
    torch.testing.assert_close(scores, slices_of(net, lambda p, w: held[p].mean(0).abs()))
    for path, each in held.items():
        w, g, f = net.get_parameter(path).detach(), each.mean(0), each.square().mean(0)
        found = {n: ELEMENT[n](path, evidence) for n in ("gradient", "taylor", "taylor2", "obd")}
        torch.testing.assert_close(found["gradient"], g.abs())
        torch.testing.assert_close(found["taylor"], (g * w).abs())
        torch.testing.assert_close(found["taylor2"], (f * w * w / 2 - g * w).abs())
        torch.testing.assert_close(found["obd"], f * w * w / 2)
    _, _, _, scores = judged("obd")
    expected = [
        sum(
            (held[p].square().mean(0) * w.square() / 2).sum()
            for p, w in ((p, net.get_parameter(p)) for p in held)
        )
    ]
    torch.testing.assert_close(scores.sum(), expected[0].detach())


def test_criteria_by_gates_on_units() -> None:
    """The gates are put into the forward, and differentiated for each sample."""
    net, _ = network()
    gradients = []
    for x, y in zip(X, Y, strict=True):
        gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
        hidden = net[:3](x[None]) * gate[:, None, None]
        loss = F.cross_entropy(net[4](hidden.flatten(1)), y[None])
        gradients += torch.autograd.grad(loss, gate)
    s = torch.stack(gradients)
    _, group, _, _ = judged("magnitude")
    order = torch.from_numpy(group.members[0].indices[:, 0])
    for name, expected in (
        ("taylor", s.abs().mean(0)),
        ("fisher", s.square().mean(0) / 2),
        ("taylor2", (s.square().mean(0) / 2 - s.mean(0)).abs()),
    ):
        torch.testing.assert_close(judged(name)[3], expected[order])


def test_second_order_predicts_the_loss_without_a_unit() -> None:
    """Where the output is linear in the gate and the loss quadratic, Taylor's formula is exact."""
    net, traced = network()
    (group,) = traced.groups
    with torch.no_grad():
        hidden = net[:3](X).flatten(1)
        targets = net(X)  # the loss is at its minimum
        changes = []
        for u in range(5):
            gone = hidden.clone()
            gone[:, 4 * u : 4 * u + 4] = 0
            changes.append((net[4](gone) - targets).square().sum(1).mean() / 2)

    def loss(answers, _):
        """Noise of variance 1 on the targets: the squared gradients have the Hessian as mean."""
        noise = torch.randn(answers.shape, generator=generator, dtype=torch.float64)
        return (answers - answers.detach() - noise).square().sum(1).mean() / 2

    generator = torch.Generator().manual_seed(0)
    data = [(X, Y)] * 300
    evidence = gather(net, traced, frozenset({"gates"}), data, loss)
    found = Gate("fisher")(group, evidence)
    torch.testing.assert_close(found, torch.stack(changes), rtol=0.1, atol=0)


def rows_of(net):
    """Inputs of the last layer, with those that the ridge stands for: (rows, unknowns)."""
    with torch.no_grad():
        x = net[:3](X).flatten(1) / len(X) ** 0.5
    ridge = RIDGE * (x.T @ x).diagonal().mean()
    return x, torch.cat([x, ridge.sqrt() * torch.eye(20, dtype=torch.float64)])


def error_without(rows, weight, gone) -> float:
    """The error of a layer's outputs without some of its columns, the others solved anew."""
    stay = [j for j in range(rows.shape[1]) if j not in gone]
    wanted = rows @ weight.T
    solved = torch.linalg.lstsq(rows[:, stay], wanted, driver="gelsd").solution
    return float((wanted - rows[:, stay] @ solved).square().sum())


def test_obs_is_the_error_that_least_squares_leave() -> None:
    net, group, evidence, scores = judged("obs")
    weight, (plain, rows) = net[4].weight.detach(), rows_of(net)
    energy = (plain @ weight.T).square().sum()
    expected = [error_without(rows, weight, range(4 * u, 4 * u + 4)) / energy for u in range(5)]
    torch.testing.assert_close(scores, torch.stack(expected))
    raw = Reconstruction(scale="none")(group, evidence)
    torch.testing.assert_close(raw, torch.stack(expected) * energy)
    single = ELEMENT["obs"]("4.weight", evidence)
    for o, j in ((0, 0), (1, 7), (3, 19)):
        assert float(single[o, j]) == pytest.approx(error_without(rows, weight[o : o + 1], [j]))


def test_reconstruction_is_the_error_of_masking() -> None:
    net, group, evidence, _ = judged("reconstruction")
    weight, (x, _) = net[4].weight.detach(), rows_of(net)
    expected = []
    for u in range(5):
        masked = x.clone()
        masked[:, 4 * u : 4 * u + 4] = 0
        expected.append(((x - masked) @ weight.T).square().sum())
    found = Reconstruction(adapted=False, scale="none")(group, evidence)
    torch.testing.assert_close(found, torch.stack(expected))


def test_obs_of_columns_that_repeat_others_is_nearly_nothing() -> None:
    """Rank-deficient inputs: what two units say alike, one of them can say."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
        net[0].weight.abs_(), net[0].bias.abs_()
    x = torch.rand(30, 3, dtype=torch.float64)
    traced = trace(net, x)
    evidence = gather(net, traced, frozenset({"grams"}), [x])
    found = Reconstruction()(traced.groups[0], evidence)
    alone = Reconstruction(adapted=False)(traced.groups[0], evidence)
    assert (found[:2] < 0.2 * alone[:2]).all()


@pytest.mark.parametrize("name", ["obs", "reconstruction", "wanda", "activation", "fisher"])
def test_constant_activations_and_a_single_sample_give_finite_scores(name) -> None:
    flat = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    for data in ([(flat, Y[:1])], [(flat.expand(6, -1, -1, -1), Y[:6])], [(X[:1], Y[:1])]):
        assert torch.isfinite(judged(name, data=data)[3]).all()


class GroupedReader(nn.Module):
    """Units that are columns of a grouped convolution, and units that are whole groups of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv1d(2, 8, 1),
            nn.Conv1d(8, 6, 3, groups=2),
            nn.Conv1d(6, 2, 1),
        )

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu()).mean(2)


def test_reconstruction_where_a_grouped_convolution_reads() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = GroupedReader().double(), torch.randn(5, 2, 7, dtype=torch.float64)
    traced = trace(net, x)
    evidence = gather(net, traced, frozenset({"grams"}), [x])
    checked = 0
    for group in traced.groups:
        read = [m for m in group.members if (m.path, m.dim) == ("b.weight", 1)]
        if not read:
            continue
        found = Reconstruction(adapted=False, scale="none")(group, evidence)
        own = next(m for m in group.members if m.path == "a.weight")
        for u in range(len(group)):
            with torch.no_grad():
                hidden = net.a(x).relu()
                masked = hidden.clone()
                masked[:, own.indices[u]] = 0
                moved = (net.b(hidden) - net.b(masked)).square().sum() / len(x)
            assert float(found[u]) == pytest.approx(float(moved))
            checked += 1
    assert checked


def test_units_that_no_weight_reads_are_scored_by_what_computes_them() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 2)

        def forward(self, x):
            return self.o((self.q(x) @ self.k(x).mT / 2).softmax(-1) @ x).mean(1)

    net, x = Keys().double(), torch.randn(5, 7, 4, dtype=torch.float64)
    traced = trace(net, x)
    (group,) = [g for g in traced.groups if g.name == "q"]
    evidence = gather(net, traced, frozenset({"grams"}), [x])
    with torch.no_grad():
        biasless = (F.linear(x, m.weight).square().sum((0, 1)) for m in (net.q, net.k))
        expected = sum(energy / energy.sum() for energy in biasless)
    order = torch.from_numpy(group.members[0].indices[:, 0])
    torch.testing.assert_close(Reconstruction()(group, evidence), expected[order])


def test_wanda_is_weight_times_norm_of_its_inputs() -> None:
    net, _, evidence, scores = judged("wanda")
    with torch.no_grad():
        patches = F.unfold(X, 3).transpose(1, 2).reshape(-1, 27)
        conv = net[0].weight.abs() * (patches.square().sum(0) / len(X)).sqrt().view(3, 3, 3)
        linear = net[4].weight.abs() * net[:3](X).flatten(1).square().mean(0).sqrt()
    by_path = {"0.weight": conv, "4.weight": linear}
    for path, expected in by_path.items():
        found = ELEMENT["wanda"](path, evidence)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    expected = slices_of(net, lambda path, _: by_path[path])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)


def test_activation_is_the_mean_of_what_is_read() -> None:
    net, group, evidence, _ = judged("activation")
    with torch.no_grad():
        expected = net[:3](X).abs().mean((0, 2, 3))
    order = torch.from_numpy(group.members[0].indices[:, 0])
    torch.testing.assert_close(Activation(scale="none")(group, evidence), expected[order])


def test_what_there_is_no_evidence_on_is_told() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.out = nn.Embedding(9, 4), nn.GRU(4, 5), nn.Linear(5, 2)

        def forward(self, ids):
            return self.out(self.rnn(self.table(ids).transpose(0, 1))[0][-1])

    net, ids = Words(), torch.randint(9, (3, 6))
    traced = trace(net, ids)
    evidence = gather(net, traced, frozenset({"norms", "grams"}), [ids])
    with pytest.raises(InputError, match=r"table.weight.*no evidence.*norms"):
        ELEMENT["wanda"]("table.weight", evidence)
    for group in traced.groups:
        for name in ("wanda", "obs"):
            assert (scored(group, evidence, named(name)) > 0).all()
    (table,) = [g for g in traced.groups if g.name == "table"]
    torch.testing.assert_close(
        CRITERIA["wanda"](table, evidence), CRITERIA["magnitude"](table, evidence)
    )
    with pytest.raises(InputError, match="Give data"):
        Gate()(table, Evidence({}))
    with pytest.raises(InputError, match="Give data"):
        Activation()(table, Evidence({}))


@pytest.mark.parametrize("over", ["sum", "mean", "max", "prod", "first"])
def test_scores_of_coupled_layers_are_combined(over) -> None:
    net, group, evidence, _ = judged("magnitude")
    conv = net[0].weight.detach().square().sum((1, 2, 3))
    linear = net[4].weight.detach().square().view(4, 5, 4).sum((0, 2))
    both = np.stack([conv, linear])
    expected = {"sum": both.sum(0), "mean": both.mean(0), "max": both.max(0),
                "prod": both[0] * both[1], "first": both[0]}[over]  # fmt: skip
    np.testing.assert_allclose(Coupled(over=over, scale="none")(group, evidence), expected)


def test_names_are_looked_up() -> None:
    assert named("l1") is CRITERIA["l1"]
    assert named(random) is random
    with pytest.raises(InputError, match="magnitude"):
        named("magnitud")
    with pytest.raises(InputError, match=r"no element criterion.*wanda"):
        Coupled("magic")
    with pytest.raises(InputError, match=r"unknown moment.*fisher"):
        Gate("third")


def _raises(group, evidence):
    raise KeyError("no such layer")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda group, evidence: torch.zeros(len(group) + 1),
        lambda group, evidence: torch.full((len(group),), torch.nan),
        lambda group, evidence: torch.zeros(len(group), 1),
        lambda group, evidence: None,
        lambda group, evidence: ["a"] * len(group),
        _raises,
    ],
)
def test_scores_of_another_form_are_refused(wrong) -> None:
    _, group, evidence, _ = judged("magnitude")
    with pytest.raises(InputError, match=r"criterion .*group 0.*one finite score"):
        scored(group, evidence, wrong)


def test_a_criterion_may_return_any_sequence() -> None:
    _, group, evidence, _ = judged("magnitude")
    assert scored(group, evidence, lambda g, e: [1, 2, 3, 4, 5]).dtype == np.float64


def test_a_function_of_the_user_s_may_ask_for_evidence() -> None:
    net, _ = network()

    def quiet(group, evidence):
        return evidence.activations[torch.from_numpy(group.units)]

    quiet.needs = frozenset({"activations"})
    small = rf.prune(net, X[:2], rf.Budget(sparsity=0.4), criterion=quiet, data=[X], heal=False)
    with torch.no_grad():
        loudest = net[:3](X).abs().mean((0, 2, 3)).argsort()[2:].sort().values
    assert small.pruned.kept["0.weight", 0].tolist() == loudest.tolist()
    assert not hasattr(small, "repaired")


@pytest.mark.parametrize("name", CRITERIA)
def test_prune_takes_every_criterion(name) -> None:
    net, _ = network()
    data = [(X, Y)] if needs(CRITERIA[name]) else None
    small = rf.prune(net, X[:2], rf.Budget(sparsity=0.4), criterion=name, data=data)
    assert small[0].out_channels == 3
    if needs(CRITERIA[name]):
        with pytest.raises(InputError, match="data="):
            rf.prune(net, X[:2], rf.Budget(sparsity=0.4), criterion=name)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
@example([2.5e-159])  # whose square is subnormal
def test_lamp_keeps_the_order_and_ends_at_one(values) -> None:
    weight = torch.tensor(values, dtype=torch.float64)
    found = criteria.lamp(weight)
    assert (found[weight.argsort(stable=True)].diff() >= -1e-12).all()
    assert float(found.max()) == pytest.approx(1.0 if weight.square().max() > 0 else 0.0)
