"""Entries picked by position: exactly followed where the positions are known, else frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carrying import Net, X, check_carried, check_proven, halved, prunable
from rarefy.graph.flow import Flow
from rarefy.graph.ops import walk
from rarefy.graph.program import Ref
from rarefy.graph.rules.picking import known, positions
from rarefy.graph.trace import trace

torch.set_num_threads(1)


def image(y, size=2):
    return y[:, :, None, None] * torch.linspace(0.5, 1.5, size * size).view(size, size)


def scattered(n, y, z):
    index = torch.tensor([2, 0, 1])[:, None].expand(3, 8)
    return torch.zeros(3, 8).scatter(0, index, y) + y


def put(n, y, z):
    buffer = torch.zeros(4, 8, dtype=y.dtype)
    buffer[torch.tensor([3, 1])] = (y * z)[:2]
    return y + buffer[1:]


def gathered(n, y, z):
    """The tokens with the largest sums, all their channels."""
    tokens = torch.stack([y, z, y * z], 1)
    index = tokens.sum(-1).argmax(1)[:, None, None]
    return tokens.gather(1, index.expand(-1, -1, 8))[:, 0]


CARRIED = {
    "permutation in a buffer": (lambda n, y, z: y[:, n.order], 8),
    "permutation in forward": (lambda n, y, z: y[:, [3, 1, 0, 2, 7, 6, 5, 4]] * z, 8),
    "permutation computed": (lambda n, y, z: y[:, torch.arange(8).view(2, 4).T.reshape(-1)], 8),
    "some entries": (lambda n, y, z: y[:, torch.tensor([6, 2, 3])], 3),
    "entries from behind": (lambda n, y, z: y[:, torch.tensor([-1, 0])], 2),
    "entries twice": (lambda n, y, z: y[:, torch.tensor([1, 1, 0])] + z[:, :3], 3),
    "index select": (lambda n, y, z: y.index_select(1, n.order[:5]), 5),
    "rows of a table": (lambda n, y, z: y * n.table[n.order[:3]].sum(0), 8),
    "one row of a table": (lambda n, y, z: y * n.table[torch.tensor(2)], 8),
    "index of a matrix": (lambda n, y, z: y * n.table[n.order.view(2, 4)].sum((0, 1)), 8),
    "two indices": (lambda n, y, z: y + n.table[n.order, n.order].sum(), 8),
    "indices apart": (
        lambda n, y, z: image(y)[torch.arange(3), :, torch.tensor([0, 1, 0]), 1],
        8,
    ),
    "mask of others": (lambda n, y, z: image(y)[..., torch.eye(2, dtype=torch.bool)].sum(-1), 8),
    "every second": (lambda n, y, z: y[:, ::2] * z[:, 1::2], 4),
    "every third from one": (lambda n, y, z: y[:, 1:7:3], 2),
    "every second window": (lambda n, y, z: image(y, 4)[:, ::2, ::2, 1::2].sum((2, 3)), 4),
    "flip": (lambda n, y, z: y.flip(1) * z.flip([-1]), 8),
    "flip sides": (lambda n, y, z: torch.fliplr(y) * torch.flipud(z), 8),
    "quarter turns beside units": (
        lambda n, y, z: (image(y).rot90(1, (2, 3)) * image(z).rot90(3, (-1, -2))).flatten(1),
        32,
    ),
    "a quarter turn of units": (lambda n, y, z: torch.rot90(y, 1, (0, 1)).T * z, 8),
    "a quarter turn of units back": (lambda n, y, z: torch.rot90(y, -1, (0, 1)).T + z, 8),
    "half a turn of units": (lambda n, y, z: (image(y).rot90(2, (1, 2)) * image(z)).flatten(1), 32),
    "roll": (lambda n, y, z: y.roll(3, 1) + z.roll(-2, -1), 8),
    "roll of several": (lambda n, y, z: image(y).roll((1, 2, 1), (3, 1, 2)).flatten(1), 32),
    "roll twice": (lambda n, y, z: y.roll((1, 2), (1, 1)), 8),
    "roll a line": (lambda n, y, z: y.sum(0).roll(3) * z, 8),
    "channel shuffle": (lambda n, y, z: F.channel_shuffle(image(y), 2).sum((2, 3)), 8),
    "native channel shuffle": (
        lambda n, y, z: F.native_channel_shuffle(image(y), 4).sum((2, 3)),
        8,
    ),
    "gather": (gathered, 8),
    "take along": (
        lambda n, y, z: torch.stack([y, z], 1).take_along_dim((y > z).long()[:, None], 1)[:, 0],
        8,
    ),
    "scatter": (scattered, 8),
    "scatter a number": (
        lambda n, y, z: y.scatter(0, torch.zeros(1, 8, dtype=torch.long), 0.5) + z,
        8,
    ),
    "index put": (put, 8),
    "index add": (lambda n, y, z: y.index_add(0, torch.tensor([2, 0]), z[:2]), 8),
    "index copy": (lambda n, y, z: y.index_copy(0, torch.tensor([2, 0]), z[:2]), 8),
    "index fill": (lambda n, y, z: y.index_fill(0, torch.tensor([1]), 0.5), 8),
    "slice scatter": (lambda n, y, z: y.slice_scatter(z[:, 2:5], 1, 1, 4), 8),
    "slice scatter with a stride": (lambda n, y, z: y.slice_scatter(z[:, :4], 1, 0, 8, 2), 8),
    "select scatter": (
        lambda n, y, z: torch.stack([y, z], 1).select_scatter(z * y, 1, 0).sum(1),
        8,
    ),
    "select scatter over units": (lambda n, y, z: y.select_scatter(z[:, 0], 1, 3), 8),
    "masked fill": (lambda n, y, z: y.masked_fill(z > 0, 0.0), 8),
}


@pytest.mark.parametrize("name", CARRIED)
def test_removing_equals_masking(name) -> None:
    check_carried(Net(*CARRIED[name]), X)


FROZEN = {
    "computed positions": (lambda n, y, z: y[:, y.sum(0).argsort()], 8),
    "rolled as one": (lambda n, y, z: y.roll(1), 8),
    "taken": (lambda n, y, z: y.take(torch.arange(3)[:, None].expand(3, 8)), 8),
    "gathered over units": (lambda n, y, z: y.gather(1, z.argsort(1)), 8),
    "matrix of positions": (lambda n, y, z: y[:, n.order.view(2, 4)].sum(1), 4),
    "scattered over units": (lambda n, y, z: y.scatter(1, n.order.expand(3, 8), y), 8),
    "index add over units": (lambda n, y, z: y.index_add(1, n.order, y), 8),
    "put over units": (lambda n, y, z: torch.ops.aten.index_put(y, [None, n.order], y), 8),
    "mask over units": (lambda n, y, z: y[:, torch.arange(8) > 3], 4),
    "written through a stride": (lambda n, y, z: _through_a_stride(y), 8),
    "mask over all": (lambda n, y, z: y.masked_scatter(y > 0, y), 8),
}


def _through_a_stride(y):
    base = y * 1
    base[:, ::2] *= 2
    return base


@pytest.mark.parametrize("name", FROZEN)
def test_units_that_are_indexed_by_the_unknown_stay(name) -> None:
    net = Net(*FROZEN[name])
    network = trace(net, X)
    assert ("y.weight", 0) not in prunable(network)
    assert any(f.path == "y.weight" and f.dim == 0 and f.reason for f in network.frozen)
    check_proven(net, X, network)


def test_what_is_written_is_zero_only_where_both_are() -> None:
    """Units are summed over, after rows were written that are not zero."""

    def net(value):
        def function(n, y, z):
            index = torch.zeros(1, 8, dtype=torch.long)
            return y.scatter(0, index, value).sum(1, keepdim=True)

        return Net(function, 1)

    assert ("y.weight", 0) in prunable(check_carried(net(0.0), X))
    assert ("y.weight", 0) not in prunable(trace(net(0.5), X))


def test_entries_that_a_fixed_order_reads_twice_go_together() -> None:
    network = check_carried(Net(lambda n, y, z: y[:, [0, 0, 1, 2]] * z[:, :4], 4), X)
    sizes = sorted(len(m.indices[0]) for g in network.groups for m in g.members)
    assert max(sizes) == 2  # units 0 and 1 of z read the same unit of y


class RelativePositions(nn.Module):
    """Attention over 4 positions in 4 heads, with a bias per pair of positions and head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 3)
            self.table = nn.Parameter(torch.randn(7, 4))
        line = torch.arange(4)
        self.register_buffer("index", line[:, None] - line[None] + 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1)).mean(1)


def test_heads_of_a_table_of_relative_positions_go_and_rows_stay() -> None:
    network = check_carried(RelativePositions(), torch.randn(2, 4, 6))
    assert ("table", 1) in prunable(network)
    assert ("table", 0) not in prunable(network)
    assert not any(m.path == "index" for g in network.groups for m in g.members)


def test_an_index_can_be_pruned_again() -> None:
    net = Net(lambda n, y, z: y[:, n.order] * z.roll(1, 1), 8)
    once = halved(net)
    twice = halved(once)
    assert twice.tensor("y.weight").shape[0] < once.tensor("y.weight").shape[0] < 8


def flow_of(net: nn.Module) -> Flow:
    return trace(net, X).flow


def test_only_what_follows_from_constants_is_known() -> None:
    def function(n, y, z):
        return y[:, n.order.flip(0) % 8] + z[:, y.sum(0).argsort()]

    flow = flow_of(Net(function, 8))
    by_kind = {node.kind: node.name for node in flow.graph.nodes}
    expected = torch.tensor([6, 4, 5, 2, 0, 7, 1, 3])
    assert torch.equal(known(flow, Ref(by_kind["flip"])), expected)
    assert positions(flow, Ref(by_kind["remainder"]), 8).tolist() == expected.tolist()
    assert known(flow, Ref(by_kind["argsort"])) is None
    assert known(flow, Ref(by_kind["linear"])) is None
    assert positions(flow, Ref(by_kind["remainder"]), 5) is None  # beyond the end
    assert positions(flow, Ref(by_kind["tensor"]), 8) is not None
    assert known(flow, 3) == 3


def test_a_buffer_that_forward_writes_is_not_known() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
            self.register_buffer("order", torch.arange(8))

        def forward(self, x):
            order = self.order.clone()
            order[0] = 3
            return self.out(self.layer(x)[:, order])

    net = Counting()
    network = trace(net, X)
    assert ("layer.weight", 0) not in prunable(network)


def test_values_are_optional_for_a_walk() -> None:
    network = trace(Net(lambda n, y, z: y[:, n.order], 8), X)
    flow = walk(network.captured.graph, {"y.weight": 1, "y.bias": 2})
    assert not flow.values
    assert flow.ledger.fixings
