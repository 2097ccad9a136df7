"""Costs of a plan are those of the network that is cut."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from random_networks import networks
from rarefy.graph.count import batch_of, count
from rarefy.graph.layer import layer
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection import accounts
from rarefy.pruning.selection.costs import Costs, Surface
from rarefy.pruning.selection.select import select
from rarefy.pruning.structure.surgery import cut, rewrite
from rarefy.types import Budget

torch.set_num_threads(1)
SLOW = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@SLOW
@given(networks(), st.floats(0.2, 0.8))
def test_macs_and_parameters_are_those_of_the_smaller_network(drawn, share) -> None:
    net, x = drawn
    network = trace(net, x)
    if not network.groups:
        return
    scores = [np.random.default_rng(0).random(len(g)) for g in network.groups]
    macs, params = accounts.macs(network), accounts.params(network, net)
    for wanted in (0.0, share, 0.0):  # what is remembered does not leak from plan to plan
        plan = select(network, net, scores, Budget(sparsity=wanted))
        found = count(rewrite(net, network, plan), x)
        assert macs(plan) == found.macs * batch_of(network.captured.graph)
        assert params(plan) == sum(p.numel() for p in cut(net, network, plan).parameters())
    assert macs.share(plan) == params.share(plan) == 1


def test_parameters_that_are_not_read_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net.unread = nn.Parameter(torch.zeros(100))
    network = trace(net, torch.zeros(2, 4))
    removed = np.ones(network.coupling.units, np.bool_)
    removed[0] = False
    left = accounts.params(network, net)(Plan.of(network, removed))
    assert left == 100 + (4 + 1) + (2 + 2)


def test_latency_is_the_sum_of_the_layers_and_of_the_rest() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    network = trace(net, torch.zeros(3, 4))
    graph = network.captured.graph
    first, second = (
        n.name for n in graph.calls if layer(graph, n, lambda x: graph.by_name[x].shape)
    )
    surfaces = {
        first: Surface((4,), (4, 8), ((1.0, 3.0),), 3),
        second: Surface((4, 8), (2,), ((0.5,), (0.7,)), 3),
    }
    cost = accounts.latency(network, Costs(surfaces, rest=0.24))
    removed = np.zeros(network.coupling.units, np.bool_)
    removed[network.groups[0].units[:2]] = True
    assert np.isclose(cost.before, 3.0 + 0.7 + 0.24)
    assert np.isclose(cost(Plan.of(network, removed)), 2.0 + 0.6 + 0.24 * 6 / 8)
