"""Where units are read, and the networks that show it."""

import pytest
import torch
from torch import nn

from rarefy.errors import DataError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.trace import Network, trace
from rarefy.pruning.running.taps import Runner, Watched, ends, tapped
from rarefy.pruning.scoring.gather import gather

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0])


class Mobile(nn.Module):
    """A depthwise block with squeeze and excitation, behind slices that leave units out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
            self.b, self.o = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        x = self.depth(self.a(x).relu())
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        first, second = self.b(x * gate[:, :, None, None]).relu().chunk(2, 1)
        return self.o(torch.cat([first, second], 1).mean((2, 3)))


def places(network: Network, name: str) -> set[str]:
    """Modules and kinds of the calls at which the units of a group end."""
    (group,) = [g for g in network.groups if g.name == name]
    units = set(group.units.tolist())
    graph = network.captured.graph
    found = [e for e in ends(network) if units & set(e.units.tolist())]
    return {f"{graph.by_name[e.node].scope}:{graph.by_name[e.node].kind}" for e in found}


def test_units_end_where_they_are_summed_over_and_nowhere_else() -> None:
    network = trace(Mobile(), X)
    assert places(network, "a") == {"down:linear", "b:conv2d"}
    assert places(network, "down") == {"up:linear"}
    both = [g.name for g in network.groups if any(m.path == "b.weight" and m.dim == 0
                                                  for m in g.members)]  # fmt: skip
    for name in both:
        assert places(network, name) == {"o:linear"}


def test_a_layer_in_a_stream_to_which_it_adds_reads_it() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.o(x + self.b(x)).mean(2)

    network = trace(Stream(), torch.randn(2, 3, 5))
    assert places(network, "a") == {"b:conv1d", "o:conv1d"}


def test_the_watched_network_computes_the_same_and_shares_memory() -> None:
    net = Mobile().eval()
    watched = Watched(net, trace(net, X), trainable=True)
    torch.testing.assert_close(watched(X), net(X))
    assert watched.tensor("a.weight").data_ptr() == net.a.weight.data_ptr()
    assert watched.tensor("a.weight") is not net.a.weight
    seen = []
    node = next(n for n in watched.graph.calls if n.scope == "b")
    watched.watch(
        node.name, lambda values: {node.inputs[0]: seen.append(1) or values[node.inputs[0]] * 0}
    )
    silent = watched(X)
    assert seen == [1]
    torch.testing.assert_close(silent, silent[:1].expand_as(silent))


def test_a_tap_reports_the_gradient_of_its_own_place_alone() -> None:
    x, seen = torch.tensor([1.0, 2.0]), []
    a = tapped(x, lambda value, gradient: seen.append((value, gradient)))
    (a.square().sum() + 5 * x.sum()).backward()
    ((value, gradient),) = seen
    assert value.tolist() == [1, 2]
    assert gradient.tolist() == [2, 4]
    assert not x.requires_grad


def test_a_network_that_is_a_graph_already_is_run() -> None:
    net = Mobile().eval()
    graph = graph_model(net, capture(net, X))
    own, same = (
        gather(m, trace(m, X), frozenset({"gates"}), [(X, Y)]).gates.square for m in (net, graph)
    )
    torch.testing.assert_close(own, same)
    with pytest.raises(DataError, match="graph does not run on batches of this form"):
        gather(graph, trace(graph, X), frozenset({"gates"}), [(X[:, :2], Y)])


def test_inputs_for_which_other_units_can_go_are_refused() -> None:
    class Positions(nn.Module):
        """Adds a table of positions; for one position, there is nothing to add."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.a(x).relu()
            return self.o(hidden if x.shape[1] == 1 else hidden + self.b(x)).mean(1)

    net = Positions()
    network = trace(net, torch.randn(2, 5, 3))
    runner = Runner(net, network, lambda watched, found: None)
    assert runner.of(torch.randn(2, 5, 3)) is runner.of(torch.randn(7, 5, 3))
    runner.of(torch.randn(2, 8, 3))
    with pytest.raises(DataError, match="other units"):
        runner.of(torch.randn(2, 1, 3))


def test_half_precision_is_summed_in_single() -> None:
    net = Mobile().eval()
    network = trace(net, X)
    half = Mobile().eval().bfloat16()
    kinds = frozenset({"gates", "norms", "activations"})
    rough = gather(half, trace(half, X.bfloat16()), kinds, [(X.bfloat16(), Y)])
    exact = gather(net, network, kinds, [(X, Y)])
    assert rough.norms["o.weight"].dtype == torch.float32
    torch.testing.assert_close(rough.activations, exact.activations, rtol=0.05, atol=0.01)
    torch.testing.assert_close(
        rough.norms["b.weight"], exact.norms["b.weight"], rtol=0.05, atol=0.01
    )
