"""Calls of one weight come together where none waits for another, and nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel
from rarefy.pruning.repairing.pairs import layer_pairs
from rarefy.pruning.running.uses import gathered
from shared_weights import Heads, Siamese


def model_of(net: nn.Module, *inputs: torch.Tensor) -> GraphModel:
    return graph_model(net, capture(net.eval(), inputs))


def runs(model: GraphModel) -> list[list[int]]:
    """The positions of the calls of each weight that has several."""
    found: dict[str, list[int]] = {}
    for place, node in enumerate(model.graph.nodes):
        if node.kind in ("conv2d", "batch_norm", "linear"):
            found.setdefault(node.inputs[1], []).append(place)
    return [places for places in found.values() if len(places) > 1]


def equal(model: GraphModel, other: GraphModel, *inputs: torch.Tensor) -> bool:
    with torch.no_grad():
        first, second = (m(*(x.clone() for x in inputs)) for m in (model, other))
    first, second = ([x] if isinstance(x, torch.Tensor) else x for x in (first, second))
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize(("make", "number"), [(Siamese, 2), (Heads, 1)])
def test_independent_calls_come_together(make, number) -> None:
    net, inputs = make(), [torch.randn(4, 3, 8, 8) for _ in range(number)]
    model = model_of(net, *inputs)
    found = model.with_graph(gathered(model.graph, model.graph.tensor_paths))
    assert any(max(places) - min(places) >= len(places) for places in runs(model))
    assert all(max(places) - min(places) == len(places) - 1 for places in runs(found))
    assert equal(model, found, *inputs)
    groups, _ = layer_pairs(found.graph, found.graph)
    assert [len(group) for group in groups if len(group) > 1] == [len(p) for p in runs(found)]


class Drawing(nn.Module):
    """Attention and dropout, which draw nothing, and noise where it is told so."""

    def __init__(self, *, is_noisy: bool) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.out, self.is_noisy = nn.Linear(8, 4), is_noisy

    def tower(self, x):
        x = nn.functional.rrelu(self.inner(x))
        return self.out(x + torch.randn_like(x) if self.is_noisy else x)

    def forward(self, x, y):
        return [self.tower(x), self.tower(y)]


@pytest.mark.parametrize("is_noisy", [False, True])
def test_only_what_draws_numbers_keeps_its_order(is_noisy) -> None:
    inputs = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    model = model_of(Drawing(is_noisy=is_noisy), *inputs)
    found = model.with_graph(gathered(model.graph, model.graph.tensor_paths))
    assert all(max(places) - min(places) == 1 for places in runs(found))
    results = []
    for net in (model, found):
        torch.manual_seed(0)
        results.append(net(*inputs))
    assert all(map(torch.equal, *results))


class Chain(nn.Module):
    """A layer that reads what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.a(x))


def test_calls_that_wait_for_each_other_stay_apart() -> None:
    model = model_of(Chain(), torch.randn(4, 6))
    graph = gathered(model.graph, model.graph.tensor_paths)
    assert graph.nodes == model.graph.nodes
    groups, _ = layer_pairs(graph, graph)
    assert [len(group) for group in groups] == [1, 1]


class Steps(nn.Module):
    """Two layers and writes in place, in any order, on a few tensors and views of them."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.steps = steps
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x, y):
        held = [x, y, x + y, x - y]
        for kind, i, j in self.steps:
            if kind == "a":
                held[i] = self.a(held[j])
            elif kind == "b":
                held[i] = self.b(held[j])
            elif kind == "add_":
                held[i].add_(held[j])
            elif kind == "relu_":
                held[i][:, :3].relu_()
            else:
                held[i] = held[j].t().contiguous().t() * 2 if kind == "new" else held[j][:, :]
        return held


STEP = st.tuples(
    st.sampled_from(["a", "b", "a", "b", "add_", "relu_", "new", "view"]),
    st.integers(0, 3),
    st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, min_size=3, max_size=10))
def test_whatever_is_written_in_place_the_outputs_are_the_same(steps) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 6), torch.randn(3, 6)
    model = model_of(Steps(steps), *inputs)
    found = model.with_graph(gathered(model.graph, model.graph.tensor_paths))
    assert sorted(n.name for n in found.graph.nodes) == sorted(n.name for n in model.graph.nodes)
    assert equal(model, found, *inputs)
