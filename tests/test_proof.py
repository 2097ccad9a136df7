"""A wrong surgery is caught, also on networks that hide it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.batches import evaluating
from rarefy.errors import InputError, ProofError
from rarefy.graph.trace import trace
from rarefy.pruning.proof import masked, prove
from rarefy.pruning.select import Plan
from rarefy.pruning.surgery import cut

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
