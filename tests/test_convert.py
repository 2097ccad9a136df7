"""Nested blocks are read in place, with the casts of autocast written down."""

import pytest
import torch
from torch import nn

from rarefy.errors import CaptureError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.program import Spec

torch.set_num_threads(1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers and a norm, with a function as what is done with them."""

    def __init__(self, function) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(8)
        self.function = function
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def gradients(net, x):
    with torch.enable_grad():
        y = net.first(x)
        with torch.no_grad():
            z = y.relu()
    return net.last(z) + net.last(y)


def lowered(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.norm(net.first(x))
        with torch.autocast("cpu", enabled=False):
            z = net.last(y.float())
        return net.last(y).softmax(-1), z, torch.cat([net.last(y), z]), y @ y.T + x[:, :1]


def checkpointed(net, x):
    return net.last(torch.utils.checkpoint.checkpoint(net.first, x, use_reentrant=False))


BLOCKS = {
    "gradients": gradients,
    "autocast": lowered,
    "autocast switched off": lambda net, x: torch.autocast("cpu", enabled=False)(net.first)(x),
    "autocast with its own dtype": lambda net, x: torch.autocast("cpu")(net.first)(x),
    "inference": lambda net, x: torch.inference_mode()(net.first)(x) * 2,
    "checkpoint": checkpointed,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compute_what_they_compute(name) -> None:
    net = Net(BLOCKS[name])
    graph = graph_model(net, capture(net, X))
    with torch.no_grad():
        torch.testing.assert_close(graph(X), net(X), rtol=0, atol=0)
    names = [node.name for node in graph.graph.nodes]
    assert len(set(names)) == len(names)


def test_a_graph_of_blocks_trains() -> None:
    net = Net(gradients)
    graph = graph_model(net, capture(net, X))
    graph(X).sum().backward()
    assert all(p.grad is not None for p in (net.first.weight, net.last.weight))


def test_casts_carry_their_shape_and_dtype() -> None:
    graph = capture(Net(lowered), X).graph
    casts = [n for n in graph.calls if n.op == "aten.to.dtype" and "cast" in n.name]
    assert {n.value for n in casts} >= {Spec((8, 4), torch.bfloat16), Spec((4, 8), torch.bfloat16)}


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (net.first(x),)),
        lambda net, x: torch.autocast("cuda", dtype=torch.bfloat16)(net.first)(x),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_chosen_by_value_is_refused_with_its_line(function) -> None:
    try:
        graph = capture(Net(function), X).graph
    except CaptureError as error:
        assert "cond" in str(error) or "CPU only" in str(error)  # noqa: PT017
    else:  # torch switches CUDA's autocast off where there is no CUDA
        assert [n.kind for n in graph.calls] == ["linear"]


def test_sizes_that_depend_on_values_are_given_numbers() -> None:
    net = Net(lambda net, x: net.last(net.first(x[x[:, 0] > 0])))
    graph = graph_model(net, capture(net, X))
    first, last = (n.shape for n in graph.graph.calls if n.kind == "linear")
    assert first[0] == last[0] > 100
    assert (first[1], last[1]) == (8, 4)
    for x in (X, -X, X.repeat(2, 1)):
        with torch.no_grad():
            torch.testing.assert_close(graph(x), net(x))


def test_structures_without_a_name_in_files_are_refused() -> None:
    with pytest.raises(CaptureError, match="max"):
        capture(Net(lambda net, x: net.first(x).max(1)), X)
