"""What layers owe to the sums that their results enter, worked out from the sums themselves."""

import pytest
import torch
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.pruning.repairing.sums import owed, summed
from rarefy.pruning.running.lockstep import Run


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """``x + s * layer(x)`` in several spellings; what is added to is a first layer's result."""

    def __init__(self, way: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.way = way
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
            self.n, self.down = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1)
            self.n.running_var.uniform_(0.5, 2)
            self.n.weight.data.uniform_(0.5, 2)
            self.gamma = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        way = self.way
        h, y = self.a(x), self.b(x)
        y = {"batch norm": self.n, "layer scale": lambda t: t * self.gamma}.get(way, lambda t: t)(y)
        if way == "in place":
            return y.add_(h)
        if way == "alpha":
            return torch.add(h, y, alpha=0.5)
        if way == "broadcast":
            return y + h.mean(0, keepdim=True)
        if way == "nonlinear":
            return h + y.relu()
        return h + y


X = randn(4, 3, 5, 5)


def of(way: str, shift: float = 0.3):
    """The original's sum, the other's, and what the layer owes; the others' ``a`` is off."""
    one, two = Block(way).eval(), Block(way).eval()
    two.a.weight.data += shift
    runs = [Run(graph_model(m, capture(m, X)), X) for m in (one, two)]
    graphs = tuple(run._model.graph for run in runs)
    layers = tuple(next(n for n in g.calls if n.scope == "b") for g in graphs)
    with torch.no_grad():
        for run, layer in zip(runs, layers, strict=True):
            run.through(layer)
            run._dead = ()
        lacking = owed(graphs, layers, (runs[0].values, runs[1].values), torch.arange(6), 1)
        return one, two, lacking


@pytest.mark.parametrize("way", ["plain", "batch norm", "layer scale", "in place"])
def test_with_what_is_owed_the_sum_is_that_of_the_original(way) -> None:
    one, two, lacking = of(way)
    assert lacking is not None
    with torch.no_grad():
        expected = one(X)
        two.b.register_forward_hook(lambda module, given, result: result + lacking)
        torch.testing.assert_close(two(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["alpha", "broadcast", "nonlinear"])
def test_nothing_is_owed_where_the_sum_is_another(way) -> None:
    assert of(way)[2] is None


def test_nothing_is_owed_where_nothing_is_lacking() -> None:
    assert of("plain", shift=0.0)[2] is None


def test_channels_that_hardly_count_owe_nothing() -> None:
    one, two = Block("layer scale").eval(), Block("layer scale").eval()
    for model in (one, two):
        model.gamma.data[2] = 1e-6
    two.a.weight.data += 0.3
    runs = [Run(graph_model(m, capture(m, X)), X) for m in (one, two)]
    graphs = tuple(run._model.graph for run in runs)
    layers = tuple(next(n for n in g.calls if n.scope == "b") for g in graphs)
    with torch.no_grad():
        for run, layer in zip(runs, layers, strict=True):
            run.through(layer)
        lacking = owed(graphs, layers, (runs[0].values, runs[1].values), torch.arange(6), 1)
    assert not lacking[:, 2].any()
    assert lacking[:, 3].any()


def test_a_result_that_is_read_twice_is_in_no_sum() -> None:
    class Twice(Block):
        def forward(self, x):
            y = self.b(x)
            return self.a(x) + y, y

    graph = capture(Twice("plain"), X).graph
    assert summed(graph, next(n for n in graph.calls if n.scope == "b")) is None
