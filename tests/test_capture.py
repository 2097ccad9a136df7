"""What is captured computes the same, and the model stays as it was."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.batches import call
from rarefy.errors import CaptureError, InputError
from rarefy.graph.capture import capture, graph_model

torch.set_num_threads(1)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution and a batch norm, with a function as what is done with them."""

    def __init__(self, function) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.register_buffer("hidden", torch.rand(1, 8, 1, 1), persistent=False)
            self.register_buffer("count", torch.zeros(1))
        self.function = function
        self.eval()

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def chunked(net, x):
    y = net.conv(x)
    first, _ = y.chunk(2, 1)
    first.relu_()
    return y.mean((2, 3))


def chained(net, x):
    y = net.conv(x)
    part = y[:, :4]
    y.relu_().add_(1)
    return part.mean((2, 3)), y.mean((2, 3))


def dropped(net, x):
    y = net.conv(x)
    F.dropout(y, 0.5, False).relu_()
    return y


def written(net, x):
    out = torch.zeros(x.shape[0], 16, 6, 6)
    out[:, :8] = net.conv(x)
    out[:, 8:] += 1
    return out


def counted(net, x):
    net.count.add_(1)
    return net.conv(x) * net.count


FUNCTIONS = {
    "plain": lambda net, x: net.norm(net.conv(x)).relu(),
    "in place": lambda net, x: F.relu(net.norm(net.conv(x)), inplace=True).mul_(2).add_(1),
    "in place on a chunk": chunked,
    "in place in a chain with a view": chained,
    "in place on what may be the input": dropped,
    "written into zeros": written,
    "a buffer that changes": counted,
    "buffers": lambda net, x: net.conv(x) * net.hidden,
    "constants": lambda net, x: net.conv(x) * torch.tensor([1.0, 2.0]).repeat(4).view(8, 1, 1),
    "no_grad": lambda net, x: torch.no_grad()(net.conv)(x),
    "several outputs": lambda net, x: {"a": net.conv(x), "b": [x, (x.sum(),)]},
    "the shape": lambda net, x: net.conv(x).view(x.size(0), -1) / x.shape[-1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_what_the_model_computes(name) -> None:
    net = Net(FUNCTIONS[name])
    graph = graph_model(net, capture(net, X))
    with torch.no_grad():
        torch.testing.assert_close(graph(X), Net(FUNCTIONS[name])(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    "inputs", [X, (X, X), {"a": X, "b": X}, (X, None), (X, 2.0), X[:1], X.repeat(4, 1, 1, 1)]
)
def test_inputs_of_every_form(inputs) -> None:
    net = Net(lambda net, a, b=None: net.conv(a) if b is None else net.conv(a * b))
    captured = capture(net, inputs)
    torch.testing.assert_close(call(graph_model(net, captured), inputs), call(net, inputs))


def test_the_batch_is_free_where_the_network_allows_it() -> None:
    net = Net(FUNCTIONS["plain"])
    captured = capture(net, X[:1])
    torch.testing.assert_close(graph_model(net, captured)(X.repeat(3, 1, 1, 1))[:2], net(X))


def test_the_model_is_left_alone() -> None:
    net = Net(counted).train()
    net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [m.training for m in net.modules()]
    random, filters = torch.get_rng_state(), list(warnings.filters)
    capture(net, X)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert warnings.filters == filters
    assert torch.is_grad_enabled()


def test_dead_code_is_dropped_and_shared_tensors_are_read_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.unused = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            return self.b(self.a(x))

    net, x = Tied(), torch.randn(2, 4)
    captured = capture(net, x)
    paths = [n.path for n in captured.graph.nodes if n.op == "tensor"]
    assert sorted(paths) == ["a.bias", "a.weight", "b.bias"]
    torch.testing.assert_close(graph_model(net, captured)(x), net(x))


def test_nodes_say_where_they_come_from() -> None:
    net = Net(FUNCTIONS["plain"])
    conv = next(n for n in capture(net, X).graph.calls if "conv2d" in n.op)
    assert conv.scope == "conv"
    assert "test_capture.py" in conv.source


def test_a_graph_model_is_its_own_capture() -> None:
    net = Net(FUNCTIONS["plain"])
    graph = graph_model(net, capture(net, X))
    assert capture(graph, X).graph is graph.graph


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda net, x: net.conv(x[:, :2]), "expected input"),
        (lambda net, x: net.conv(x) / len(x.nothing), "nothing"),
    ],
)
def test_a_network_that_does_not_run_says_why_and_where(function, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        capture(Net(function), X)
    assert "float32 (2, 3, 6, 6)" in str(caught.value)
    assert "test_capture.py" in str(caught.value)


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py"):
        capture(Net(lambda net, x: net.conv(x) if x.sum() > 0 else x), X)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [(X[:0], "no example"), (None, "NoneType"), (3, "int"), ((X[:0],), "no")],
)
def test_inputs_of_no_use_are_refused(inputs, words) -> None:
    with pytest.raises(InputError, match=words):
        capture(Net(FUNCTIONS["plain"]), inputs)


def test_nested_graphs_are_named() -> None:
    def autocast(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.conv(x)

    with pytest.raises(CaptureError, match="nested graph"):
        capture(Net(autocast), X)
