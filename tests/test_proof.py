"""A wrong surgery is caught, also on networks that hide it."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.batches import evaluating
from rarefy.errors import InputError, ProofError
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.disturbance import noise
from rarefy.pruning.structure.proof import Masking, masked, prove
from rarefy.pruning.structure.reference import over_survivors
from rarefy.pruning.structure.surgery import cut, rewrite

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block whose last BatchNorm may start at zero."""

    def __init__(self, zero_gamma: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.norm1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.back, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 4)
        if zero_gamma:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.back(torch.relu(self.norm1(self.inner(x))))))
        return self.out(x.mean((2, 3)))


def prepared(zero_gamma: bool):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(zero_gamma).eval()
    network = trace(net, X)
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        removed[group.units[1::3]] = True
    return net, network, Plan.of(network, removed)


def swapped(name: str, dim: int):
    """Two channels of one tensor change places."""

    def spoil(small: nn.Module) -> None:
        tensor = small.get_parameter(name) if "running" not in name else small.get_buffer(name)
        with torch.no_grad():
            first = tensor.select(dim, 0).clone()
            tensor.select(dim, 0).copy_(tensor.select(dim, 1))
            tensor.select(dim, 1).copy_(first)

    return spoil


def other_entries(small: nn.Module) -> None:
    """The first entries stay instead of the chosen ones."""
    kept = small.back.weight.shape[1]
    small.back.weight = nn.Parameter(
        small.whole.back.weight[: len(small.back.weight), :kept].clone()
    )


def forgotten(small: nn.Module) -> None:
    small.norm1 = copy.deepcopy(small.whole.norm1)


def statistics_of_others(small: nn.Module) -> None:
    n = len(small.norm1.running_var)
    small.norm1.running_mean = small.whole.norm1.running_mean[:n].clone()
    small.norm1.running_var = small.whole.norm1.running_var[:n].clone()


def scale_of_others(small: nn.Module) -> None:
    n = len(small.norm1.weight)
    small.norm1.weight = nn.Parameter(small.whole.norm1.weight[:n].clone())


FAULTS = {
    "other entries": other_entries,
    "a BatchNorm is forgotten": forgotten,
    "statistics of other channels": statistics_of_others,
    "scale of other channels": scale_of_others,
    "outputs swapped": swapped("inner.weight", 0),
    "inputs swapped": swapped("back.weight", 1),
    "scale of a zero BatchNorm swapped": swapped("norm2.weight", 0),
    "shift swapped": swapped("norm1.bias", 0),
    "running mean swapped": swapped("norm.running_mean", 0),
    "running variance swapped": swapped("norm1.running_var", 0),
    "classifier inputs swapped": swapped("out.weight", 1),
    "bias swapped": swapped("stem.bias", 0),
}


@pytest.mark.parametrize("zero_gamma", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_surgery_is_caught(fault, zero_gamma) -> None:
    net, network, plan = prepared(zero_gamma)

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = cut(model, network, plan)
        object.__setattr__(small, "whole", model)
        FAULTS[fault](small)
        return small

    with pytest.raises(ProofError, match="nothing was returned"):
        prove(net, X, network, plan, build)


@pytest.mark.parametrize("zero_gamma", [False, True])
def test_a_right_surgery_passes(zero_gamma) -> None:
    net, network, plan = prepared(zero_gamma)
    assert prove(net, X, network, plan, lambda m, p: cut(m, network, p)) < 1e-10


def test_the_group_at_fault_is_named() -> None:
    net, network, plan = prepared(False)

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = cut(model, network, plan)
        if len(small.norm1.weight) < 6:
            swapped("norm1.bias", 0)(small)
        return small

    with pytest.raises(ProofError, match=r"group inner"):
        prove(net, X, network, plan, build)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError, ZeroDivisionError])
def test_a_network_that_raises_is_a_failed_proof(error) -> None:
    net, network, plan = prepared(False)

    class Failing(nn.Module):
        def forward(self, x):
            raise error("some reason")

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        return Failing()

    with pytest.raises(ProofError, match=f"{error.__name__}: some reason"):
        prove(net, X, network, plan, build)


def test_not_a_number_is_not_equal() -> None:
    net, network, plan = prepared(False)

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = cut(model, network, plan)
        small.out.bias = nn.Parameter(torch.full_like(small.out.bias, torch.nan))
        return small

    with pytest.raises(ProofError, match="inf"):
        prove(net, X, network, plan, build)


def test_other_shapes_are_not_equal() -> None:
    net, network, plan = prepared(False)
    with pytest.raises(ProofError):
        prove(net, X, network, plan, lambda m, p: nn.Flatten())


def test_a_network_that_is_not_deterministic_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + torch.rand(1)

    net, x = Noisy().eval(), torch.randn(2, 4)
    network = trace(net, x)
    removed = np.arange(network.coupling.units) == 0
    with pytest.raises(InputError, match="deterministic"):
        prove(net, x, network, Plan.of(network, removed), lambda m, p: cut(m, network, p))


def test_permuted_indices_do_not_hide_a_fault() -> None:
    """A bag of words does not change when its words change places."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(x).mean(1))

    net, x = Bag().eval(), torch.arange(8).reshape(2, 4)
    network = trace(net, x)
    plan = Plan.of(network, np.arange(network.coupling.units) == 1)
    assert prove(net, x, network, plan, lambda m, p: cut(m, network, p)) < 1e-10

    def wrong(model: nn.Module, plan: Plan) -> nn.Module:
        small = cut(model, network, plan)
        swapped("out.weight", 1)(small)
        return small

    with pytest.raises(ProofError):
        prove(net, x, network, plan, wrong)


def test_masking_zeroes_every_coupled_slice_of_a_copy() -> None:
    net, network, plan = prepared(False)
    before = copy.deepcopy(net.state_dict())
    reference = masked(net, network, plan)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert (reference.inner.weight[1] == 0).all()
    assert (reference.back.weight[:, 1] == 0).all()
    assert reference.norm1.running_var[1] == 0
    assert (reference.inner.weight[0, 0] != 0).all()
    with evaluating(reference):
        assert torch.isfinite(reference(X)).all()


def test_a_network_that_takes_one_batch_size_only_is_proven_with_that() -> None:
    class Fixed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.ones(5, 1)

    net, x = Fixed(False).eval(), torch.randn(5, 3, 8, 8)
    network = trace(net, x)
    plan = Plan.of(network, np.arange(network.coupling.units) == 1)
    assert prove(net, x, network, plan, lambda m, p: cut(m, network, p)) < 1e-10


def test_outputs_that_are_no_numbers_are_refused() -> None:
    class Root(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (super().forward(x) - 1e9).sqrt()

    net = Root(False).eval()
    network = trace(net, X)
    plan = Plan.of(network, np.arange(network.coupling.units) == 1)
    with pytest.raises(InputError, match="no numbers"):
        prove(net, X, network, plan, lambda m, p: cut(m, network, p))


# --- normalization: the reference over survivors ------------------------------------------------

SEQUENCE = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


class Normalized(nn.Module):
    """A residual stream of width 9 with layer norms, one of them without weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.norm = nn.Linear(5, 9), nn.LayerNorm(9)
            self.up, self.down = nn.Linear(9, 12), nn.Linear(12, 9)
            self.last, self.head = nn.LayerNorm(9, elementwise_affine=False), nn.Linear(9, 2)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


def third(network) -> Plan:
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        removed[group.units[1::3]] = True
    return Plan.of(network, removed)


def normalized():
    net = Normalized()
    network = trace(net, SEQUENCE)
    return net, network, third(network)


def test_a_right_surgery_passes_over_survivors() -> None:
    net, network, plan = normalized()
    assert prove(net, SEQUENCE, network, plan, lambda m, p: cut(m, network, p)) < 1e-10
    assert prove(net, SEQUENCE, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-10


def one_index(path: str, dim: int):
    """One surviving entry is exchanged for one that should have gone."""

    def spoil(small: nn.Module, whole: nn.Module) -> None:
        tensor, other = small.get_parameter(path), whole.get_parameter(path)
        first = tensor.select(dim, 0)
        with torch.no_grad():
            first.copy_(other.select(dim, 1)[tuple(map(slice, first.shape))])

    return spoil


WRONG = [
    ("embed.weight", 0),
    ("embed.bias", 0),
    ("norm.weight", 0),
    ("norm.bias", 0),
    ("up.weight", 0),
    ("up.weight", 1),
    ("up.bias", 0),
    ("down.weight", 0),
    ("down.weight", 1),
    ("down.bias", 0),
    ("head.weight", 1),
]


@pytest.mark.parametrize(("path", "dim"), WRONG)
def test_one_wrong_index_is_caught_over_survivors(path, dim) -> None:
    net, network, plan = normalized()

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = cut(model, network, plan)
        one_index(path, dim)(small, model)
        return small

    with pytest.raises(ProofError, match="differs from masking"):
        prove(net, SEQUENCE, network, plan, build)


def test_plain_zeroing_is_not_the_reference_of_a_layer_norm() -> None:
    """Statistics over zeros are others than those over what remains."""
    net, network, plan = normalized()
    with torch.no_grad():
        over = over_survivors(net, network, plan)(SEQUENCE)
        assert not torch.allclose(masked(net, network, plan)(SEQUENCE), over, atol=1e-2)
        assert torch.allclose(cut(net, network, plan)(SEQUENCE), over, atol=1e-5)


def test_the_reference_over_survivors_is_that_of_numpy() -> None:
    """Full width, entries that go set to zero, statistics of the others: by hand."""
    net, network, plan = normalized()
    net, x = net.double(), SEQUENCE.double()
    gone = {m.path: m.indices[1::3].ravel() for m in network.groups[0].members if m.dim == 0}
    stays = np.setdiff1d(np.arange(9), gone["embed.weight"])
    assert len(stays) == 6
    state = {key: value.numpy().copy() for key, value in net.state_dict().items()}
    hidden = np.arange(12) % 3 == 1

    def norm(x: np.ndarray) -> np.ndarray:
        found = np.zeros_like(x)
        kept = x[..., stays]
        spread = ((kept - kept.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
        found[..., stays] = (kept - kept.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)
        return found

    def linear(path: str, x: np.ndarray) -> np.ndarray:
        return x @ state[f"{path}.weight"].T + state[f"{path}.bias"]

    stream = linear("embed", x.numpy())
    shift = state["norm.bias"] * np.isin(np.arange(9), stays)
    inner = linear("up", norm(stream) * state["norm.weight"] + shift)
    stream = stream + linear("down", np.maximum(inner, 0) * ~hidden)
    expected = linear("head", norm(stream))
    with torch.no_grad():
        found = over_survivors(net, network, plan)(x).numpy()
    assert np.abs(found - expected).max() < 1e-12


@pytest.mark.parametrize("way", [cut, rewrite])
def test_a_capture_that_is_not_the_network_proves_nothing(way) -> None:
    class Exporting(Normalized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x if torch.compiler.is_exporting() else x)

    net = Exporting()
    network = trace(net, SEQUENCE)
    with pytest.raises(ProofError, match="the captured graph differs from the network"):
        prove(net, SEQUENCE, network, third(network), lambda m, p: way(m, network, p))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_capture_for_one_batch_size_is_proven_on_that(batch) -> None:
    class Fixed(Normalized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([super(Fixed, self).forward(row) for row in x])

    net, x = Fixed(), SEQUENCE[:batch]
    network = trace(net, x)
    plan = third(network)
    assert prove(net, x, network, plan, lambda m, p: cut(m, network, p)) < 1e-10
    assert prove(net, x, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-10


def test_a_cast_to_float32_is_proven_in_float32() -> None:
    class Cast(Normalized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.embed.weight.dtype).to(torch.float32))

    net = Cast()
    network = trace(net, SEQUENCE)
    error = prove(net, SEQUENCE, network, third(network), lambda m, p: cut(m, network, p))
    assert error < 1e-3


def test_several_outputs_are_compared_over_survivors() -> None:
    class Several(Normalized):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            y = super().forward(x)
            return {"logits": y, "parts": (y.mean(1), [x.sum()])}

    net = Several()
    network = trace(net, SEQUENCE)
    plan = third(network)
    assert prove(net, SEQUENCE, network, plan, lambda m, p: cut(m, network, p)) < 1e-10
    assert prove(net, SEQUENCE, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-10


def test_a_normalized_network_that_is_not_deterministic_is_refused() -> None:
    class Noisy(Normalized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(1)

    net = Noisy()
    network = trace(net, SEQUENCE)
    with pytest.raises(InputError, match="deterministic"):
        prove(net, SEQUENCE, network, third(network), lambda m, p: cut(m, network, p))


def test_buffers_are_masked_whether_a_state_dict_holds_them_or_not() -> None:
    class Scaled(Normalized):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(9) + 0.5, persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.last(self.embed(x) * self.scale))

    net = Scaled()
    network = trace(net, SEQUENCE)
    plan = third(network)
    reference = over_survivors(net, network, plan)
    assert (reference.tensor("scale") == 0).sum() == 3
    assert prove(net, SEQUENCE, network, plan, lambda m, p: cut(m, network, p)) < 1e-10
    assert prove(net, SEQUENCE, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-10


def test_a_variance_over_one_entry_that_remains_is_named() -> None:
    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)
            return self.head(x / (x.std(-1, keepdim=True) + 1))

    net = Standardized().eval()
    network = trace(net, SEQUENCE)
    plan = Plan.of(network, np.arange(network.coupling.units) > 0)
    with pytest.raises(ProofError, match="min_keep=2"):
        prove(net, SEQUENCE, network, plan, lambda m, p: cut(m, network, p))
    plan = Plan.of(network, np.arange(network.coupling.units) > 1)
    assert prove(net, SEQUENCE, network, plan, lambda m, p: cut(m, network, p)) < 1e-10


# --- one masking for several networks ------------------------------------------------------------


class Counted(Normalized):
    """Notes how many examples each call of the whole network has."""

    seen: list[int] = []  # noqa: RUF012 - copies are to share it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up.out_features == 12:
            self.seen.append(len(x))
        return super().forward(x)


def test_what_masking_gives_is_computed_once_for_the_class_and_the_graph() -> None:
    net = Counted()
    network = trace(net, SEQUENCE)
    plan = third(network)
    masking = Masking(net, SEQUENCE, network, plan)
    net.seen.clear()
    assert not masking.compare(lambda m, p: cut(m, network, p)).fault
    assert net.seen == [], "the graph over survivors is the reference, and it was not in doubt"
    assert prove(net, SEQUENCE, network, plan, lambda m, p: rewrite(m, network, p), masking) < 1e-10
    assert net.seen == [2], "a graph is proven by the graph only where that is the network's"
    assert not masking.compare(lambda m, p: rewrite(m, network, p)).fault
    assert net.seen == [2]


@pytest.mark.parametrize(("path", "dim"), WRONG)
def test_one_wrong_index_of_a_graph_is_caught_after_a_class_that_failed(path, dim) -> None:
    net, network, plan = normalized()
    masking = Masking(net, SEQUENCE, network, plan)
    assert masking.compare(lambda m, p: nn.Flatten()).fault

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = rewrite(model, network, plan)
        one_index(path, dim)(small, model)
        return small

    assert "differs from masking" in masking.compare(build).fault
    assert not masking.compare(lambda m, p: rewrite(m, network, p)).fault


@pytest.mark.parametrize("name", ["inner.weight", "norm1.bias", "back.weight"])
def test_one_wrong_index_of_a_graph_is_caught_over_plain_masking(name) -> None:
    net, network, plan = prepared(False)
    masking = Masking(net, X, network, plan)

    def build(model: nn.Module, plan: Plan) -> nn.Module:
        small = rewrite(model, network, plan)
        one_index(name, 0)(small, model)
        return small

    assert masking.compare(build).fault
    assert not masking.compare(lambda m, p: rewrite(m, network, p)).fault


def test_a_network_that_counts_its_calls_is_refused() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    net = Counting(False).eval()
    network = trace(net, X)
    plan = third(network)
    with pytest.raises(InputError, match="deterministic"):
        prove(net, X, network, plan, lambda m, p: cut(m, network, p))


def test_a_network_that_is_right_for_one_batch_size_only_is_not() -> None:
    net, network, plan = prepared(False)

    class Partly(nn.Module):
        def __init__(self, small: nn.Module) -> None:
            super().__init__()
            self.small = small

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.small(x) * (1 if len(x) == len(X) else 2)

    found = Masking(net, X, network, plan).compare(lambda m, p: Partly(cut(m, network, p)))
    assert "differs from masking" in found.fault


def test_long_parameters_are_disturbed_without_two_equal_rows() -> None:
    found = noise(torch.zeros(700, 256, dtype=torch.float64))
    assert len(found.unique(dim=0)) == 700
    assert len(found.unique(dim=1)[0]) == 256
    assert abs(float(found.std()) - 1) < 0.02


def test_what_loses_nothing_is_not_copied_for_the_masked_network() -> None:
    net, network, _ = prepared(False)
    removed = np.zeros(network.coupling.units, bool)
    group = next(
        g for g in network.groups if ("inner.weight", 0) in {(m.path, m.dim) for m in g.members}
    )
    removed[group.units[0]] = True
    reference = masked(net, network, Plan.of(network, removed))
    assert reference.stem.weight is net.stem.weight
    assert reference.inner.weight is not net.inner.weight
    assert reference.norm1.running_var is not net.norm1.running_var


class Chaotic(nn.Module):
    """A logistic map, many times over: the last digit of the input decides everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 1000), nn.Linear(1000, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 + 0.4 * torch.sin(100 * self.last(torch.tanh(self.first(x.float()))))
        for _ in range(80):
            y = 3.99 * y * (1 - y)
        return y


def test_a_network_that_amplifies_rounding_is_told_from_a_defect() -> None:
    torch.manual_seed(0)
    with pytest.raises(ProofError, match="rounding its inputs anew moves its outputs"):
        rf.prune(Chaotic(), torch.randn(5, 4), rf.Budget(sparsity=0.5), criterion="random")


def test_casts_between_precisions_are_no_defect_of_ours() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu().half()).float()

    with pytest.raises(InputError, match=r"neither in float64 nor in float32.*convert it after"):
        rf.prune(Mixed(), torch.randn(4, 8), rf.Budget(sparsity=0.5))
