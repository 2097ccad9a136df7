"""Both ways to make the smaller network: the user's module, and the rewritten graph."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import masked, prove
from rarefy.pruning.structure.surgery import cut, kept_entries, rewrite, sliced, with_aliases

torch.set_num_threads(1)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def conv(i: int, o: int, **options) -> nn.Module:
    return nn.Conv2d(i, o, 3, padding=1, **options)


def planned(net: nn.Module, every: int = 3):
    network = trace(net, X)
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        removed[group.units[1::every]] = True
    return network, Plan.of(network, removed)


NETWORKS = {
    "depthwise": (
        lambda n, x: n.o(n.d(n.a(x)).mean((2, 3))),
        {"a": conv(3, 6), "d": conv(6, 12, groups=6), "o": nn.Linear(12, 2)},
    ),
    "grouped": (
        lambda n, x: n.o(n.g(n.a(x)).mean((2, 3))),
        {"a": conv(3, 12), "g": conv(12, 8, groups=4), "o": nn.Linear(8, 2)},
    ),
    "functional with a count": (
        lambda n, x: n.o(F.conv2d(n.a(x), n.d.weight, groups=n.a.weight.shape[0]).mean((2, 3))),
        {"a": conv(3, 6), "d": conv(6, 6, groups=6), "o": nn.Linear(6, 2)},
    ),
    "split": (
        lambda n, x: n.o(torch.cat(n.a(x).split([2, 6], 1)[::-1], 1).mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(8, 2)},
    ),
    "chunk": (
        lambda n, x: n.o((lambda p: p[0] * p[1].sigmoid())(n.a(x).chunk(2, 1)).mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(4, 2)},
    ),
    "glu": (
        lambda n, x: n.o(F.glu(n.a(x), 1).mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(4, 2)},
    ),
    "slice": (
        lambda n, x: n.o(n.a(x)[:, 2:7].mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(5, 2)},
    ),
    "one channel": (
        lambda n, x: n.o(n.a(x).mean((2, 3))) + n.a(x)[:, 1:2].mean((1, 2, 3)).view(-1, 1),
        {"a": conv(3, 8), "o": nn.Linear(8, 2)},
    ),
    "select": (
        lambda n, x: n.o((n.a(x) * n.a(x)[:, 3].unsqueeze(1)).mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(8, 2)},
    ),
    "shuffle": (
        lambda n, x: n.o(
            n.a(x).view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6).mean((2, 3))
        ),
        {"a": conv(3, 8), "o": nn.Linear(8, 2)},
    ),
    "expand": (
        lambda n, x: n.o((n.a(x) * n.s.weight.view(1, 8, 1, 1).expand(1, 8, 6, 6)).mean((2, 3))),
        {"a": conv(3, 8), "s": nn.Linear(8, 1), "o": nn.Linear(8, 2)},
    ),
    "broadcast_to": (
        lambda n, x: n.o((n.a(x) * n.s.weight.view(8, 1, 1).broadcast_to(8, 6, 6)).mean((2, 3))),
        {"a": conv(3, 8), "s": nn.Linear(8, 1), "o": nn.Linear(8, 2)},
    ),
    "zeros_like": (
        lambda n, x: n.o(torch.cat([n.a(x), torch.zeros_like(n.a(x))], 1).mean((2, 3))),
        {"a": conv(3, 4), "o": nn.Linear(8, 2)},
    ),
    "literal mean": (
        lambda n, x: n.o((n.a(x).sum(1) / n.a(x).shape[1]).flatten(1)),
        {"a": conv(3, 8), "o": nn.Linear(36, 2)},
    ),
    "padded channels": (
        lambda n, x: n.o(F.pad(n.a(x), (0, 0, 0, 0, 1, 2)).mean((2, 3))),
        {"a": conv(3, 5), "o": nn.Linear(8, 2)},
    ),
    "unflatten": (
        lambda n, x: n.o(n.a(x).unflatten(1, (2, 4)).sum(1).mean((2, 3))),
        {"a": conv(3, 8), "o": nn.Linear(4, 2)},
    ),
    "transposed": (
        lambda n, x: n.o(n.t(n.a(x)).mean((2, 3))),
        {"a": conv(3, 6), "t": nn.ConvTranspose2d(6, 8, 2, 2), "o": nn.Linear(8, 2)},
    ),
    "pixels": (
        lambda n, x: n.o(F.pixel_shuffle(n.a(x), 2).mean((2, 3))),
        {"a": conv(3, 16), "o": nn.Linear(4, 2)},
    ),
}
LITERAL = {"shuffle", "expand", "broadcast_to", "literal mean", "unflatten", "split"}
"""Their forward states sizes that no module can adapt: only the graph can be rewritten."""


def built(name: str) -> Net:
    function, layers = NETWORKS[name]
    return Net(function, **copy.deepcopy(layers))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rewritten_graph_equals_masking(name) -> None:
    net = built(name)
    network, plan = planned(net)
    assert plan.removed.any()
    assert prove(net, X, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-10


@pytest.mark.parametrize(
    "name", sorted(NETWORKS.keys() - LITERAL - {"slice", "select", "one channel"})
)
def test_the_cut_module_equals_masking(name) -> None:
    net = built(name)
    network, plan = planned(net)
    assert prove(net, X, network, plan, lambda m, p: cut(m, network, p)) < 1e-10


def test_attributes_and_counts_follow() -> None:
    net = built("depthwise")
    network, plan = planned(net)
    small = cut(net, network, plan)
    assert repr(small.a) == "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert (small.d.groups, small.d.in_channels, small.d.out_channels) == (4, 4, 8)
    assert small.o.in_features == 8


def test_the_original_is_untouched_and_shares_nothing() -> None:
    net = built("grouped")
    before = copy.deepcopy(net.state_dict())
    network, plan = planned(net)
    owned = {p.data_ptr() for p in net.parameters()}
    for small in (cut(net, network, plan), rewrite(net, network, plan)):
        assert not owned & {p.data_ptr() for p in small.parameters()}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_shared_weights_stay_shared_and_frozen_ones_frozen() -> None:
    net = Net(
        lambda n, x: n.o(n.c(n.b(n.a(x)).relu()).mean((2, 3))),
        a=conv(3, 6),
        b=conv(6, 6),
        c=conv(6, 6),
        o=nn.Linear(6, 2),
    )
    net.c.weight = net.b.weight
    net.a.requires_grad_(False)
    network, plan = planned(net)
    small = cut(net, network, plan)
    assert small.b.weight is small.c.weight
    assert small.b.weight.shape == (4, 4, 3, 3)
    assert not small.a.weight.requires_grad
    assert small.b.weight.requires_grad
    assert ("c.weight", 0) in with_aliases(net, kept_entries(network, plan))
    rewritten = rewrite(net, network, plan)
    assert len(list(rewritten.parameters())) == len(list(small.parameters()))


def test_slicing_keeps_what_a_tensor_is() -> None:
    tensor = nn.Parameter(torch.arange(12.0).view(3, 4), requires_grad=False)
    small = sliced(tensor, {0: np.array([0, 2]), 1: np.array([1])})
    assert isinstance(small, nn.Parameter)
    assert not small.requires_grad
    assert small.tolist() == [[1.0], [9.0]]
    assert type(sliced(torch.zeros(3), {})) is torch.Tensor


def test_masked_and_small_networks_have_equal_gradients_where_both_exist() -> None:
    net = built("grouped")
    network, plan = planned(net)
    net.double()
    small, reference = cut(net, network, plan), masked(net, network, plan)
    small(X.double()).square().sum().backward()
    reference(X.double()).square().sum().backward()
    kept = torch.from_numpy(kept_entries(network, plan)["a.weight", 0])
    torch.testing.assert_close(small.a.weight.grad, reference.a.weight.grad[kept])
