"""What is captured computes the same, and the model stays as it was."""

import logging
import random
import sys
import warnings
from collections import OrderedDict, namedtuple
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

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


def test_a_batch_that_is_counted_by_len_is_free() -> None:
    def tagged(net, x):
        tags = net.hidden.flatten(2).mT.expand(len(x), -1, -1)
        return torch.cat([tags, net.conv(x).flatten(2).mT.reshape(len(x), -1, 8)], 1) / len(x)

    net = Net(tagged)
    model = graph_model(net, capture(net, (X,)))
    for x in (X, X[:1], torch.cat([X, X, X])):
        torch.testing.assert_close(model(x), net(x), rtol=0, atol=0)
    assert "len" not in globals()


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


def test_dead_code_is_told_apart_and_shared_tensors_are_read_once() -> None:
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
    paths = [n.path for n in captured.graph.live.nodes if n.op == "tensor"]
    assert sorted(paths) == ["a.bias", "a.weight", "b.bias"]
    unused = captured.graph.tensor_paths - captured.graph.live.tensor_paths
    assert unused == {"unused.weight", "unused.bias"}
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


# --- inputs and outputs of every form ------------------------------------------------------------


@dataclass
class Pair:
    """A dataclass that pytree does not know."""

    x: object
    y: object = None


Named = namedtuple("Named", "x y")


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda net, p: net.conv(p.x) * p.y, (Named(X, 2.0),)),
        (lambda net, p: net.conv(p.x) * p.y.y, (Pair(X, Pair(X, 3)),)),
        (lambda net, xs: net.conv([*xs, xs[0]][-1]), ([X, X],)),
        (lambda net, a, b: net.conv(a * b), [X, X]),
        (lambda net, *, x, on=False, how="": net.conv(x) if on else x, {"on": True, "x": X}),
        (lambda net, d, k: net.conv(d["x"]) * k[0], {"k": (2, "z", None), "d": {"x": X}}),
        (lambda net, x, **more: net.conv(x) + more["z"], {"z": 1.0, "x": X}),
        (
            lambda net, ids: net.conv(F.one_hot(ids, 6).float()),
            (torch.arange(36).view(2, 3, 6) % 6,),
        ),
        (lambda net, x: net.conv(x), X.transpose(2, 3)),
        (lambda net, x: net.conv(x.to_dense()), X.to_sparse()),
        (lambda net, n: net.conv(torch.ones(n, 3, 4, 4)), (2,)),
        (lambda net, x, t: net.conv(x) * t, (X, torch.tensor(2.0))),
        (lambda net, x, t: net.conv(x) * t, (X, torch.ones(1, 1, 1, 1) * 2)),
        (lambda net, x, mask: mask @ net.conv(x), (X[:1], torch.rand(6, 6))),
        (lambda net, x: net.conv(x).view(1, -1), X[:1]),
    ],
)
def test_arguments_keep_their_structure(function, inputs) -> None:
    net = Net(function)
    graph = graph_model(net, capture(net, inputs))
    torch.testing.assert_close(call(graph, inputs), call(net, inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: Pair(net.conv(x), {"k": Pair(x)}),
        lambda net, x: Named(net.conv(x), [x]),
        lambda net, x: (net.conv(x), None, 3, "text"),
        lambda net, x: OrderedDict(a=net.conv(x)),
        lambda net, x: net.conv(x).sum(),
        lambda net, x: x,
        lambda net, x: None,
    ],
)
def test_outputs_keep_their_structure(function) -> None:
    net = Net(function)
    found, expected = graph_model(net, capture(net, X))(X), net(X)
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


def test_a_graph_refuses_other_values_than_those_it_was_captured_with() -> None:
    net = Net(lambda net, x, n, mask=None: net.conv(x) * n if mask is None else x)
    graph = graph_model(net, capture(net, {"x": X, "n": 2, "mask": None}))
    torch.testing.assert_close(graph(n=2, mask=None, x=X), net(X, 2))
    with pytest.raises(InputError, match="2 when"):
        graph(x=X, n=3, mask=None)
    with pytest.raises(InputError, match="None when"):
        graph(x=X, n=2, mask=X)


def test_a_branch_on_the_batch_size_is_that_of_the_inputs_where_it_fixes_them() -> None:
    net = Net(lambda net, x: net.conv(x).view(1, 2, -1))
    graph = graph_model(net, capture(net, X[:1]))
    torch.testing.assert_close(graph(X[:1]), net(X[:1]))


def test_two_inputs_of_one_size_are_told_apart() -> None:
    net = Net(lambda net, x, y: (net.conv(x).view(x.shape[0], -1), y.view(y.shape[0], -1)))
    graph = graph_model(net, capture(net, (X, torch.rand(2, 5))))
    given = X.repeat(2, 1, 1, 1), torch.rand(3, 5)
    torch.testing.assert_close(graph(*given), net(*given))


# --- networks of every form ----------------------------------------------------------------------


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def hooked() -> nn.Module:
    net = small()
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    net.register_forward_hook(lambda module, args, output: output + 1)
    return net


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        lambda: nn.DataParallel(small()),
        lambda: small().bfloat16(),
        lambda: torch.fx.symbolic_trace(small()),
        lambda: nn.Sequential(small(), nn.BatchNorm1d(4, track_running_stats=False)),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1),
    ],
)
def test_wrapped_hooked_and_other_networks(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    net.eval()
    x = torch.rand(3, 2, 4) if isinstance(net, nn.TransformerEncoder) else torch.rand(3, 4)
    x = x.to(next(net.parameters()).dtype)
    before = torch.backends.mha.get_fastpath_enabled()
    graph = graph_model(net, capture(net, x))
    assert torch.backends.mha.get_fastpath_enabled() == before
    with torch.no_grad():
        torch.testing.assert_close(graph(x), net(x))


def test_a_mask_of_a_transformer_is_an_input_like_any_other() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1).eval()
    inputs = torch.rand(1, 5, 4), nn.Transformer.generate_square_subsequent_mask(5)
    captured = capture(net, inputs)
    graph = graph_model(net, captured)
    assert not any("fwd" in node.kind for node in captured.graph.calls)
    assert not net._forward_pre_hooks
    for mask in (inputs[1], torch.zeros(5, 5)):
        with torch.no_grad():
            torch.testing.assert_close(graph(inputs[0], mask), net(inputs[0], mask))


def test_no_values_are_needed() -> None:
    with torch.device("meta"):
        net, x = small(), torch.rand(2, 4)
    assert [n.kind for n in capture(net, x).graph.calls] == ["linear", "relu", "linear"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.compile(small()), "torch.compile"),
        (lambda: nn.Sequential(torch.compile(small())), r"Sequential\.0"),
        (lambda: torch.jit.script(small()), "TorchScript"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "lazy"),
        (lambda: torch.export.export(small(), (torch.rand(2, 4),)).module(), "eval mode"),
    ],
)
def test_what_is_no_plain_network_is_refused(make, words) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    with pytest.raises(InputError, match=words):
        capture(net, torch.rand(2, 4))


@pytest.mark.parametrize("x", [X.double(), X.long(), X[0, 0, 0, 0], X[:, :2]])
def test_inputs_that_do_not_fit_are_told_with_their_line(x) -> None:
    with pytest.raises(InputError, match=r"does not run on them .*test_capture\.py"):
        capture(Net(lambda net, x: net.conv(x)), x)


def test_a_device_that_does_not_fit_is_told() -> None:
    with pytest.raises(CaptureError, match="to one device"):
        capture(Net(lambda net, x: net.conv(x)), X.to("meta"))


# --- the second route ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.conv(x) * float(x.max()),
        lambda net, x: torch.from_numpy(net.conv(x).numpy()),
    ],
)
def test_numbers_and_numpy_are_followed_and_hold_for_other_values(function) -> None:
    net = Net(function)
    graph = graph_model(net, capture(net, X))
    with torch.no_grad():
        torch.testing.assert_close(graph(X + 1), net(X + 1))


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (lambda net, x: net.conv(x) if x.sum() > 0 else x, "torch.where"),
        (lambda net, x: [net.conv(x) for _ in range(int(x.abs().sum()))], "torch.where"),
        (lambda net, x: SimpleNamespace(value=net.conv(x)), "dataclasses"),
    ],
)
def test_what_no_route_carries_says_what_to_do_and_torch_keeps_quiet(
    function, remedy, capfd, caplog
) -> None:
    with pytest.raises(CaptureError, match=remedy):
        capture(Net(function), X)
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_forward_writes_to_stderr_is_passed_on(capsys) -> None:
    def talks(net, x):
        print("hello", file=sys.stderr)
        return net.conv(x)

    capture(Net(talks), X)
    assert "hello" in capsys.readouterr().err


# --- nothing changes -----------------------------------------------------------------------------


@lru_cache
def _table(width: int) -> torch.Tensor:
    return torch.arange(float(width))


def remembers(net, x):
    net.calls = getattr(net, "calls", 0) + 1
    net.last = net.conv(x)
    net.hidden = net.hidden + 1
    net.memory["x"] = net.last
    net.memory.setdefault("all", []).append(x)
    return net.last * _table(6)


@pytest.mark.parametrize(
    "function",
    [remembers, lambda net, x: remembers(net, x) if x.sum() > 9 else remembers(net, x) + 1],
)
def test_what_forward_leaves_in_the_model_is_undone(function) -> None:
    net = Net(function)
    net.memory = {}
    held = dict(vars(net)), dict(net._buffers), net.hidden.clone()
    _table.cache_clear()
    with suppress(CaptureError):  # the second one, which is run in earnest before it is refused
        capture(net, X)
    assert vars(net) == held[0]
    assert all(net._buffers[name] is tensor for name, tensor in held[1].items())
    assert torch.equal(net.hidden, held[2])
    assert net.memory == {}
    assert type(_table(6)) is torch.Tensor


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_global_state_is_left_alone(value) -> None:
    def state() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            list(warnings.filters),
            logging.root.manager.disable,
            logging.getLogger("torch").level,
            sys.stderr,
        )

    def draws(net, x):
        random.random()
        return net.conv(x) + torch.rand(6) if value else net.conv(x) if x.sum() > 0 else x

    before = state()
    with suppress(CaptureError):
        capture(Net(draws), X)
    assert state() == before
