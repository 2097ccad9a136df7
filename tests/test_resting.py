"""What training mode alone reads shrinks with what it meets there, or is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.graph.capture import capture
from rarefy.graph.resting import resting
from rarefy.graph.trace import trace
from rarefy.pruning.prune import prune
from rarefy.types import Budget

torch.set_num_threads(1)
X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
HALF = Budget(sparsity=0.5, scope="local")


class Base(nn.Module):
    """A layer, something in training mode alone, another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.own = nn.Parameter(torch.ones(16))
        self.eval()

    def forward(self, x: Tensor) -> object:
        hidden = torch.tanh(self.first(x))
        return self.last(self.trained(hidden) if self.training else hidden)

    def trained(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Masked(Base):
    def trained(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[torch.rand(hidden.shape[:2]) < 0.5] = self.own
        return hidden


class Noisy(Base):
    def trained(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden) * self.own


class Skipping(Base):
    """A decision by a random number, as LayerDrop makes it."""

    def trained(self, hidden: Tensor) -> Tensor:
        return hidden * self.own if torch.rand([]) < 2 else hidden


class Averaged(Base):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))
        self.register_buffer("average", torch.zeros(16))

    def trained(self, hidden: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(hidden.detach().mean((0, 1)), alpha=0.1)
        return hidden


class Auxiliary(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> object:
        hidden = torch.tanh(self.first(x))
        y = self.last(hidden)
        return (y, self.aux(hidden * self.own)) if self.training else y


@pytest.mark.parametrize("kind", [Masked, Noisy, Skipping, Averaged, Auxiliary])
def test_the_smaller_network_trains_and_shrinks_again(kind) -> None:
    torch.manual_seed(0)
    net = kind()
    before = copy.deepcopy(net.state_dict())
    small = prune(net, X, HALF)
    again = prune(small, X, HALF)
    for result, width in ((small, 8), (again, 4)):
        assert result.pruned.kind == "module"
        assert result.first.out_features == width
        outputs = result.train()(X)
        every = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(y.square().sum() for y in every).backward()
        assert not any("training" in f.reason and "kept" in f.reason for f in result.pruned.frozen)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not net.training


def test_what_stays_in_training_alone_keeps_its_own_width() -> None:
    small = prune(Auxiliary(), X, HALF)
    assert small.aux[0].weight.shape == (8, 8)
    assert small.aux[2].weight.shape == (3, 8)
    reasons = {(f.path, f.dim): f.reason for f in small.pruned.frozen}
    assert reasons["aux.0.weight", 0] == "is read in training mode alone"
    assert ("own", 0) not in reasons


def test_what_cannot_be_coupled_is_named() -> None:
    class Opaque(Base):
        def trained(self, hidden: Tensor) -> Tensor:
            own = torch.tensor(self.own.detach().numpy())  # out of sight
            return hidden * own

    small = prune(Opaque(), X, HALF)
    (named,) = [f for f in small.pruned.frozen if f.path == "own" and "training" in f.reason]
    assert "must match" in named.reason
    with pytest.raises(RuntimeError):
        small.train()(X)


def test_a_network_that_never_trained_is_not_blamed() -> None:
    class Broken(Base):
        def trained(self, hidden: Tensor) -> Tensor:
            raise RuntimeError("no training")

    small = prune(Broken(), X, HALF)
    assert {f.reason for f in small.pruned.frozen if f.path == "own"} == {"is not read"}


def test_training_holds_no_unit_in_place() -> None:
    class Sorted(Base):
        def trained(self, hidden: Tensor) -> Tensor:
            return hidden * self.own + hidden.sort(-1)[0]

    assert [len(group) for group in trace(Sorted(), X).groups] == [16]


def test_what_is_never_read_is_named_and_costs_no_second_capture(monkeypatch) -> None:
    class Unused(Base):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.spare = nn.Parameter(torch.ones(1)), nn.Linear(5, 9)
            self.register_buffer("steps", torch.zeros(16, dtype=torch.long))

    def once(*args, **options):
        raise AssertionError("captured again")

    monkeypatch.setattr("rarefy.graph.resting.capture", once)
    frozen = trace(Unused(), X).frozen
    assert {f.path for f in frozen if f.reason == "is not read"} == {"spare.weight", "spare.bias"}


def test_shared_tensors_rest_only_where_nothing_reads_them() -> None:
    net = Base()
    net.twin, net.alone = net.first, nn.Linear(2, 2)
    graph = capture(net, X).graph
    assert set(resting(net, graph)) == {"own", "alone.weight", "alone.bias"}


def test_batch_norms_of_an_auxiliary_head_follow() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 12, 3), nn.Linear(12, 2)
            self.aux = nn.Sequential(nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12 * 16, 2))

        def forward(self, x: Tensor) -> object:
            x = F.relu(self.first(x))
            y = self.last(x.mean((2, 3)))
            return (y, self.aux(x)) if self.training else y

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 6, 6)
    small = prune(net, x, HALF)
    assert small.aux[0].num_features == 6
    assert small.aux[2].weight.shape == (2, 6 * 16)
    kept = small.pruned.kept["first.weight", 0]
    expected = net.aux[2].weight.view(2, 12, 16)[:, kept].reshape(2, -1)
    assert torch.equal(small.aux[2].weight, expected)
    assert small.train()(x)[1].shape == (1, 2)
