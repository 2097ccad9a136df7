"""Taps: outputs by path, hooks that are always gone, and errors that name the nearest path."""

import pytest
import torch
from torch import nn

from rarefy.distillation.taps import taps
from rarefy.errors import InputError
from rarefy.graph.capture import capture, graph_model

torch.set_num_threads(1)


class Net(nn.Module):
    """Two blocks, one module called twice, one that returns several tensors, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        self.pair, self.named, self.unused = Two(), Named(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.first(x))
        a, b = self.pair(x)
        return self.last(self.shared(a - b) + self.named(x)["sum"])


class Two(nn.Module):
    def forward(self, x):
        return x + 1, 3 * x


class Named(nn.Module):
    def forward(self, x):
        return {"none": None, "sum": x + 1, "other": x * 2}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_are_those_of_the_modules() -> None:
    net, x = Net(), torch.randn(3, 4)
    with taps(net, ["first", "shared", "pair", "pair[1]", "named", "named[other]"]) as found:
        out = net(x)
    hidden = net.first(x).relu()
    assert torch.equal(found["first"], net.first(x))
    assert torch.equal(found["shared"], ((hidden + 1) - 3 * hidden).relu())  # of the last call
    assert torch.equal(found["pair"], hidden + 1)
    assert torch.equal(found["pair[1]"], 3 * hidden)
    assert torch.equal(found["named"], hidden + 1)
    assert torch.equal(found["named[other]"], hidden * 2)
    (gradient,) = torch.autograd.grad(out.sum(), found["first"])
    assert gradient.shape == (3, 4)


def test_hooks_are_gone_also_after_an_error() -> None:
    net = Net()
    kept = {name: dict(vars(m)) for name, m in net.named_modules()}
    with taps(net, ["first", "pair[1]"]):
        assert hooks(net) == 2
        net(torch.randn(1, 4))
    assert hooks(net) == 0
    with pytest.raises(RuntimeError, match="shapes"), taps(net, ["first"]):
        net(torch.randn(1, 5))
    assert hooks(net) == 0
    with pytest.raises(InputError), taps(net, ["first", "secnd"]):
        pass
    assert hooks(net) == 0
    assert {n: vars(m).keys() for n, m in net.named_modules()} == {
        n: v.keys() for n, v in kept.items()
    }


def test_a_wrong_path_lists_the_nearest() -> None:
    wanted = r"distill: no module has the path 'frist'.*first"
    with pytest.raises(InputError, match=wanted), taps(Net(), ["frist"], where="distill"):
        pass
    with pytest.raises(InputError, match=r"'pears'.*mean pair"), taps(Net(), ["pears[1]"]):
        pass


@pytest.mark.parametrize("path", ["pair[2]", "named[missing]", "named[none]"])
def test_an_output_that_is_not_there(path) -> None:
    net = Net()
    with pytest.raises(InputError, match="2 tensors, and none there"), taps(net, [path]):
        net(torch.randn(1, 4))


def test_a_module_that_does_not_run() -> None:
    net = Net()
    with taps(net, ["unused"]) as found:
        net(torch.randn(1, 4))
    with pytest.raises(InputError, match="'unused': the module did not run"):
        found["unused"]


def test_an_output_that_is_overwritten() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with torch.no_grad(), taps(net, ["0", "1"]) as found:
        net(torch.randn(2, 4))
    with pytest.raises(InputError, match="'0': its output is overwritten in place"):
        found["0"]
    assert (found["1"] >= 0).all()
    with torch.inference_mode(), taps(net, ["1"]) as found:
        net(torch.randn(2, 4))
    assert found["1"].shape == (2, 4)


def test_wrappers_need_no_prefix() -> None:
    net, x = Net(), torch.randn(2, 4)
    with taps(nn.DataParallel(net), ["first"]) as found:
        net(x)
    assert torch.equal(found["first"], net.first(x))


def test_features_within_a_checkpointed_part_have_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    grads = []
    for run in (net, lambda v: checkpoint(net, v, use_reentrant=False)):
        net.zero_grad()
        with taps(net, ["1"]) as found:
            out = run(x)
        (found["1"].square().sum() + out.sum()).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.allclose(plain, again)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.block(x)
        return self.head(x.mean((2, 3)))


def test_a_graph_has_the_paths_of_its_original() -> None:
    net, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    graph = graph_model(net, capture(net, x))
    paths = ["stem", "block", "block.0", "block.1", "head"]
    with taps(net, paths) as wanted, taps(graph, paths) as found:
        net(x)
        graph(x)
    for path in paths:
        assert torch.allclose(found[path], wanted[path], atol=1e-6), path
    assert "step" not in vars(graph)
    assert set(graph.graph.exits) == {*paths, "block.2"}
    with pytest.raises(InputError, match=r"'blok'.*block"), taps(graph, ["blok"]):
        pass
    with pytest.raises(RuntimeError), taps(graph, ["stem"]):
        graph(torch.randn(2, 3))
    assert "step" not in vars(graph)
