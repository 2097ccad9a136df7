"""Weight norms whose vectors lose entries: what stays of the weight keeps its values."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rarefy as rf
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.surgery import rewrite

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

KINDS = {
    "rows": parametrizations.weight_norm,
    "columns": lambda m: parametrizations.weight_norm(m, dim=1),
    "whole": lambda m: parametrizations.weight_norm(m, dim=None),
    "hooks": nn.utils.weight_norm,
}


def network(kind) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [kind(nn.Linear(8, 12)), nn.ReLU(), kind(nn.Linear(12, 10)), nn.ReLU()]
    return nn.Sequential(*layers, kind(nn.Linear(10, 5))).eval()


def gated(net: nn.Sequential, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """The outputs where hidden units are multiplied with 0 or 1."""
    return net[4](net[3](net[2](net[1](net[0](x)) * first)) * second)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
def test_a_pruned_network_is_the_original_with_its_hidden_units_switched_off(name) -> None:
    net = network(KINDS[name])
    before = {path: t.clone() for path, t in net.state_dict().items()}
    small = rf.prune(net, X, rf.Budget(sparsity=0.5))
    assert small.pruned.kind == "module"
    left = {
        dim: {p.split(".")[0]: i for (p, d), i in small.pruned.kept.items() if d == dim}
        for dim in (0, 1)
    }
    gates = []
    for layer, size in (("2", 12), ("4", 10)):
        gate = torch.zeros(size)
        gate[torch.from_numpy(np.asarray(left[1][layer]))] = 1
        gates.append(gate)
    assert 0 < sum(gate.sum() for gate in gates) < 22
    expected = gated(net, *gates, X)
    assert not torch.allclose(expected, net(X), atol=1e-3)
    torch.testing.assert_close(small(X), expected)
    for path, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[path])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
def test_the_rewritten_graph_does_the_same(name) -> None:
    net = network(KINDS[name])
    found = trace(net, X)
    removed = np.zeros(found.coupling.units, bool)
    gates = [torch.ones(12), torch.ones(10)]
    for group in found.groups:
        removed[group.units[::3]] = True
        gates[len(group) == 10][::3] = 0
    small = rewrite(net, found, Plan.of(found, removed))
    torch.testing.assert_close(small(X), gated(net, *gates, X))


def test_vectors_of_zeros_keep_their_length() -> None:
    net = network(parametrizations.weight_norm)
    vectors = net[2].parametrizations.weight
    with torch.no_grad():
        vectors.original1[:, 6:] = 0
    small = rf.prune(net, X, rf.Budget(sparsity=0.5), exclude=["2"])
    assert small[0].out_features < 12
    assert torch.isfinite(small(X)).all()
