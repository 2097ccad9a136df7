"""What stands in for modules that are gone, and graphs without it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from rarefy.graph.capture import capture
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import (
    Stub,
    plain_graph,
    put,
    stubs,
    without_nodes,
    without_unused,
    without_zeros,
)

torch.set_num_threads(1)
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_what_stubs_give() -> None:
    layer = nn.Linear(4, 4)
    assert torch.equal(Stub(layer, "zeros")(X), torch.zeros(2, 4))
    assert Stub(layer, "input")(X) is X
    value, *others = Stub(layer, "input", 3)(None, mask=X)
    assert value is X
    assert others == [None, None]
    assert not list(Stub(layer, "zeros").parameters())


def test_a_stub_keeps_plain_attributes_and_the_mode() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1).eval()
    layer.kind = "convolution"
    stub = Stub(layer, "zeros")
    assert (stub.in_channels, stub.kind, stub.training) == (3, "convolution", False)
    assert Stub(stub, "input").in_channels == 3
    assert Stub(stub, "input").stub_gives == "input"
    assert "zeros" in repr(stub)
    assert pickle.loads(pickle.dumps(copy.deepcopy(stub))).kind == "convolution"


class Net(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


BODIES = {
    "sum": (lambda m, x: m.b(x + m.a(x)), 1),
    "in place": (lambda m, x: m.b(m.a(x).add_(x)), 1),
    "scaled": (lambda m, x: m.b(torch.add(x, m.a(x), alpha=3)), 1),
    "difference": (lambda m, x: m.b(x - m.a(x)), 1),
    "product": (lambda m, x: m.b(x + m.c(x) * m.a(x)), 1),
    "moved": (lambda m, x: m.b(x + torch.relu(m.a(x).view(2, 2, 2).transpose(1, 2)).flatten(1)), 1),
    "constant": (lambda m, x: m.b(x + torch.cos(m.a(x))), 1),
    "negative": (lambda m, x: m.b(m.a(x) - x), 1),
    "written": (lambda m, x: _written(m, x), 1),
    "broadcast": (lambda m, x: m.b(x[:1] + m.a(x)), 1),
}


def _written(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 1
    return m.b(x + y)


@pytest.mark.parametrize("name", BODIES)
def test_sums_with_the_zeros_of_stubs_are_left_out(name) -> None:
    body, linears = BODIES[name]
    model = Net(body).eval()
    put(model, "a", Stub(model.a, "zeros"))
    graph = plain_graph(model, X)
    with torch.no_grad():
        torch.testing.assert_close(graph(X), model(X))
    kinds = [node.kind for node in graph.graph.calls]
    if name in ("sum", "in place", "scaled", "difference", "product", "moved"):
        assert kinds == ["linear"] * linears
    else:
        assert "zeros_like" in kinds


def test_zeros_of_the_user_s_own_stay() -> None:
    model = Net(lambda m, x: m.b(x + torch.zeros_like(x))).eval()
    graph = capture(model, X).graph
    assert without_zeros(graph, stubs(model)) is graph
    captured = plain_graph(model, X)
    assert plain_graph(captured, X) is captured
    assert isinstance(captured, GraphModel)


def test_a_second_relu_is_left_out_only_where_something_is() -> None:
    model = Net(lambda m, x: torch.relu(torch.relu(m.a(x)) + m.b(x)))
    graph = capture(model, X).graph
    add, relu = (next(n for n in graph.calls if n.kind == kind) for kind in ("add", "relu"))
    found, renamed = without_nodes(graph, {add.name: relu.name})
    assert [n.kind for n in found.calls] == ["linear", "relu"]
    assert set(renamed.values()) == {relu.name}
    twice = capture(Net(lambda m, x: torch.relu(torch.relu(m.a(x)))), X).graph
    assert [n.kind for n in without_nodes(twice, {})[0].calls] == ["linear", "relu", "relu"]


def test_calls_that_nothing_needs() -> None:
    def scratch(m, x):
        y = torch.zeros_like(x)
        y[:, 0] = 1
        return m.a(x)

    graph = capture(Net(scratch), X).graph
    assert [n.kind for n in without_unused(graph).calls] == ["linear"]

    def needed(m, x):
        y = torch.zeros_like(x)
        y[:, 0] = 1
        return m.a(x) + y

    graph = capture(Net(needed), X).graph
    assert without_unused(graph).nodes == graph.nodes
