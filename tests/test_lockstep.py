"""What a run returns with other tensors, against the whole network with these tensors."""

import copy

import pytest
import torch
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.pruning.running.lockstep import Run


class Branches(nn.Module):
    """In-place operators, views that are written to, two outputs, a weight read through a view."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, x, more):
        x = x.mul_(2)
        h = self.a(x)
        left = h[:, :3]
        left.relu_()
        h = h + self.b(h).mul_(self.scale) + more
        h = h.add_(1) @ self.b.weight.t()
        return {"left": left, "out": self.c(h)}


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
MORE = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
CHANGES = ["a.weight", "b.weight", "b.bias", "c.weight", "scale"]


def expected(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(X.clone(), MORE.clone()).values())


@pytest.mark.parametrize("path", CHANGES)
def test_the_rest_is_the_whole_network_with_other_tensors(path) -> None:
    model = Branches()
    running = graph_model(model, capture(model, (X, MORE)))
    graph, state = running.graph, copy.deepcopy(model.state_dict())
    names = [n.name for n in graph.nodes if n.op == "tensor" and n.path == path]
    other = torch.rand_like(running.tensor(path))
    changed = copy.deepcopy(model)
    changed.load_state_dict({**state, path: other})
    first = min(i for i, n in enumerate(graph.nodes) if set(names) & set(n.inputs))
    with torch.no_grad():
        given = X.clone()
        run = Run(running, (given, MORE))
        for node in graph.nodes[: first + 1]:
            run.before(node)
            held = {k: v.clone() for k, v in run.values.items()}
            plain = run.rest({}, {})
            for _ in range(2):
                found = run.rest(dict.fromkeys(names, other), {})
                for a, b in zip(found, expected(changed), strict=True):
                    torch.testing.assert_close(a, b)
            for a, b in zip(plain, expected(model), strict=True):
                torch.testing.assert_close(a, b)
            assert all(torch.equal(run.values[k], v) for k, v in held.items())
    assert torch.equal(given, X)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_shifts_are_added_to_results() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    running = graph_model(model, capture(model, X))
    first, second = (n for n in running.graph.calls if n.kind == "linear")
    shift = torch.tensor([[1.0, -1.0, 0.5]])
    with torch.no_grad():
        run = Run(running, X)
        (found,) = run.rest({}, {first.name: shift, second.name: torch.ones(1, 2)})
        torch.testing.assert_close(found, model[2](model[1](model[0](X) + shift)) + 1)
        run.before(second)
        (found,) = run.rest({}, {second.name: torch.ones(1, 2)})
        torch.testing.assert_close(found, model(X) + 1)


def test_views_stay_views_of_their_copies() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = x + 0
            view = x[:, 1:]
            view.mul_(self.w[1:])
            return x

    model = Written()
    running = graph_model(model, capture(model, X))
    (name,) = (n.name for n in running.graph.nodes if n.op == "tensor")
    (call,) = running.graph.users[name]
    with torch.no_grad():
        run = Run(running, X)
        run.before(call)
        (found,) = run.rest({name: torch.tensor([1.0, 2.0, 3.0, 4.0])}, {})
    torch.testing.assert_close(found, X * torch.tensor([1.0, 2.0, 3.0, 4.0]))
