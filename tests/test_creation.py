"""Tensors made in ``forward`` shrink with what they meet, and never make positions go."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from carrying import Net, X, check_carried, halved, prunable
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.surgery import kept_entries, rewrite

torch.set_num_threads(1)


def written(n, y, z):
    buffer = torch.zeros(y.shape[0], 16, dtype=y.dtype)
    buffer[:, :8] = y
    buffer[:, 8:].copy_(z)
    return buffer


def written_twice(n, y, z):
    buffer = y.new_empty(y.shape[0], 8).fill_(0.0)
    buffer += y
    buffer[:, 1:4] *= z[:, 1:4]
    return buffer


def written_empty(n, y, z):
    buffer = torch.empty(y.shape[0], 8, dtype=y.dtype)
    other, third = y.new_empty((3, 8)), torch.empty_like(z, memory_format=torch.preserve_format)
    return buffer.copy_(y) + other.copy_(z) + third.fill_(1.0)


def written_rows(n, y, z):
    buffer = torch.zeros(3, 8, dtype=y.dtype)
    buffer[0] = z.sum(0)
    return y + buffer.sum(0)


CARRIED = {
    "zeros": (lambda n, y, z: y + torch.zeros(y.shape[0], 8), 8),
    "ones": (lambda n, y, z: y + torch.ones(8), 8),
    "full": (lambda n, y, z: y * torch.full((1, 8), 0.3), 8),
    "new": (lambda n, y, z: y + z.new_zeros(8) - z.new_ones(1, 8) * z.new_full((8,), 2.0), 8),
    "like": (lambda n, y, z: y + torch.ones_like(z) - torch.full_like(z, 0.5), 8),
    "like a part": (lambda n, y, z: torch.cat([y, torch.zeros_like(z[:, :3])], 1), 11),
    "arange": (
        lambda n, y, z: y * torch.arange(8) + torch.arange(1, 9) - torch.arange(0, 16, 2),
        8,
    ),
    "linspace": (lambda n, y, z: y * torch.linspace(0, 1, 8) + torch.logspace(0, 1, 8), 8),
    "eye": (lambda n, y, z: y @ (n.table + torch.eye(8)), 8),
    "row of eye": (lambda n, y, z: y + torch.eye(8)[2] + torch.eye(8, 3).sum(1), 8),
    "window": (lambda n, y, z: y * torch.hann_window(8) + torch.hamming_window(8), 8),
    "constant": (lambda n, y, z: y * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), 8),
    "constant of zeros": (lambda n, y, z: y + torch.tensor([[0.0] * 8]), 8),
    "new tensor": (lambda n, y, z: y + y.new_tensor([1.0, -2, 3, -4, 5, -6, 7, -8]), 8),
    "scalar": (lambda n, y, z: y * torch.tensor(2.0) + torch.scalar_tensor(3.0), 8),
    "frequencies": (
        lambda n, y, z: (
            (y[:, :, None] * (1.0 / 10 ** (torch.arange(4) / 4))).sin().permute(0, 2, 1).flatten(1)
        ),
        32,
    ),
    "centers of radial functions": (
        lambda n, y, z: torch.exp(-((y.sum(1, keepdim=True) - torch.linspace(0, 5, 8)) ** 2)) * z,
        8,
    ),
    "written": (written, 16),
    "written twice": (written_twice, 8),
    "written rows": (written_rows, 8),
    "written whole": (written_empty, 8),
    "random like": (lambda n, y, z: y + 0 * torch.randn_like(z) + 0 * z.bernoulli(0.5), 8),
    "summed with ones": (lambda n, y, z: (y.relu() * torch.ones(8)).sum(1, keepdim=True), 1),
}


@pytest.mark.parametrize("name", CARRIED)
def test_removing_equals_masking(name) -> None:
    network = check_carried(Net(*CARRIED[name]), X)
    assert ("y.weight", 0) in prunable(network) or ("z.weight", 0) in prunable(network)


FROZEN = {
    "random": (lambda n, y, z: y + 0 * torch.rand(8), 8),
    "ones are no zeros": (lambda n, y, z: (y + torch.ones(8)).sum(1, keepdim=True), 1),
    "a shift broadcast": (lambda n, y, z: (y + n.table[0, :1]).sum(1, keepdim=True), 1),
    "a scale broadcast": (lambda n, y, z: (y.exp() * n.table[0, :1]).sum(1, keepdim=True), 1),
    "positions are no zeros": (lambda n, y, z: (y + torch.arange(8)).sum(1, keepdim=True), 1),
    "fill": (lambda n, y, z: (y * 1).fill_(2.0).sum(1, keepdim=True) + z.sum() * 0, 1),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_zero_where_masked_is_not_summed_over(name) -> None:
    network = trace(Net(*FROZEN[name]), X)
    assert ("y.weight", 0) not in prunable(network)


def test_constants_are_no_units_and_no_members() -> None:
    net = Net(lambda n, y, z: y * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) + torch.arange(8), 8)
    network = trace(net, X)
    owned = {name for name, _ in net.named_parameters()} | {"order"}
    assert {m.path for g in network.groups for m in g.members} <= owned
    assert {f.path for f in network.frozen} <= owned
    plan = Plan.of(network, np.ones(network.coupling.units, bool))
    assert {path for path, _ in kept_entries(network, plan)} <= owned
    assert ("lifted_tensor_0", 0) in kept_entries(network, plan, made=True)


def test_a_made_tensor_meets_nothing_and_makes_no_group() -> None:
    """Groups own at least one parameter; a table that only itself reads is none."""
    net = Net(lambda n, y, z: y * (torch.arange(6.0) * torch.ones(4, 6)).sum(), 8)
    network = check_carried(net, X)
    assert all(g.members for g in network.groups)
    assert sum(map(len, network.groups)) == 8  # those of y alone


@pytest.mark.parametrize("sizes", ["restated", "of a table"])
def test_sequences_keep_their_length(sizes) -> None:
    class Reader(nn.Module):
        """Positions are made in forward and added to a sequence, or looked up for it."""

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.embed, self.positions = nn.Linear(3, 8), nn.Embedding(20, 8)
                self.mix, self.out = nn.Linear(7, 7), nn.Linear(8, 2)

        def forward(self, x):
            length = x.shape[1] if sizes == "restated" else 7
            h = self.embed(x) + self.positions(torch.arange(length))
            mask = torch.full((length, length), float("-inf")).triu(1)
            h = (h @ h.mT + mask).softmax(-1) @ h
            h = h + torch.arange(length, dtype=h.dtype)[:, None] * torch.ones(length, 8)
            return self.out((h + self.mix(h.mT).mT).mean(1))

    x = torch.randn(2, 7, 3)
    network = check_carried(Reader(), x)
    for node in network.captured.graph.calls:
        shape = getattr(node.value, "shape", ())
        labels = network.flow.labels[node.name]
        for size, atoms in zip(shape, labels or (), strict=True):
            if size == 7 and atoms is not None:
                assert network.coupling.fixed[network.coupling.component[atoms]].all()
    assert not {("mix.weight", 0), ("mix.weight", 1), ("positions.weight", 0)} & prunable(network)
    assert ("positions.weight", 1) in prunable(network)


def test_no_uninitialized_memory_is_saved(tmp_path) -> None:
    small = halved(Net(written_empty, 8))
    again = rf.load(rf.save(small, tmp_path / "small.safetensors"))
    assert torch.equal(again(X), small(X))


def test_the_batch_stays_free() -> None:
    net = Net(lambda n, y, z: torch.ones(y.shape[0], 8) * y + torch.zeros(y.shape[0], 1), 8)
    small = halved(net)
    whole = small(torch.cat([X, X + 1]))
    assert torch.allclose(whole, torch.cat([small(X), small(X + 1)]), atol=1e-6)


def test_images_keep_their_size() -> None:
    class Painter(nn.Module):
        """A grid of positions is joined with an image (CoordConv)."""

        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.first, self.second = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            rows, columns = torch.meshgrid(
                torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij"
            )
            grid = torch.stack([rows, columns]).expand(x.shape[0], 2, 4, 4)
            h = F.relu(self.first(torch.cat([x, grid], 1)))
            return self.second(h * rows).mean((2, 3))

    network = check_carried(Painter(), torch.randn(2, 3, 4, 4))
    assert prunable(network) == {("first.weight", 0), ("first.bias", 0), ("second.weight", 1)}


def test_a_pruned_graph_is_pruned_and_saved_again(tmp_path) -> None:
    """What stays of a table is selected from the whole; so is what stays of that."""
    net = Net(lambda n, y, z: y * torch.arange(8) + z * torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 8)
    once = halved(net)
    twice = halved(once)
    assert once.tensor("y.weight").shape[0] == 5
    assert twice.tensor("y.weight").shape[0] == 3
    again = rf.load(rf.save(twice, tmp_path / "small.safetensors"))
    assert torch.equal(again(X), twice(X))
    exported = torch.export.export(twice, (X,)).module()
    assert torch.allclose(exported(X), twice(X))


def test_new_names_do_not_clash() -> None:
    net = Net(lambda n, y, z: y * torch.arange(8) + z * torch.arange(8), 8)
    net.register_buffer("arange_entries", torch.ones(8))
    net.function = lambda n, y, z: y * torch.arange(8) * n.arange_entries + z * torch.arange(8)
    network = trace(net, X)
    removed = np.arange(network.coupling.units) == network.groups[0].units[1]
    small = rewrite(net, network, Plan.of(network, removed))
    names = [node.name for node in small.graph.nodes]
    assert len(names) == len(set(names))
    assert small(X).shape == (3, 2)
