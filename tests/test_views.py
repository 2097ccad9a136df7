"""Views, joins, cuts and windows: labels move with the entries."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carrying import Net, X, check_carried, check_proven, prunable
from rarefy.graph.trace import trace

torch.set_num_threads(1)

ALL = {("y.weight", 0), ("y.bias", 0), ("out.weight", 1)}


def image(y: torch.Tensor, size: int = 2) -> torch.Tensor:
    """(3, 8) -> (3, 8, size, size), no two positions alike."""
    ramp = torch.linspace(0.5, 1.5, size * size, dtype=y.dtype).view(size, size)
    return y[:, :, None, None] * ramp


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_half_by_slices(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def angles(n, dtype):
    steps = torch.arange(0, n, 2, dtype=dtype)
    return torch.outer(torch.arange(3, dtype=dtype), 1.0 / 10 ** (steps / n))


def rotary(rotate, repeat):
    def function(n, y, z):
        table = repeat(angles(8, y.dtype))
        return y * table.cos() + rotate(y) * table.sin()

    return function


def rotary_complex(n, y, z):
    pairs = torch.view_as_complex(y.reshape(3, 4, 2))
    turn = torch.polar(torch.ones(4), torch.arange(4.0))
    return torch.view_as_real(pairs * turn).flatten(1).to(y.dtype)


def windows(x, size):
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def unwindow(x, size, h, w):
    b = x.shape[0] // (h * w // size // size)
    x = x.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


def swin(n, y, z):
    x = image(y, 4).permute(0, 2, 3, 1)
    x = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
    inner = windows(x, 2)
    inner = inner * inner.mean(1, keepdim=True)
    x = torch.roll(unwindow(inner, 2, 4, 4), shifts=(1, 1), dims=(1, 2))
    return x.mean((1, 2))


def patch_merging(n, y, z):
    x = image(y, 4).permute(0, 2, 3, 1)
    parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
    return torch.cat(parts, -1).mean((1, 2))


CARRIED = {
    "view as": (lambda n, y, z: y.view(3, 2, 4).view_as(z.view(3, 2, 4)).flatten(1), 8),
    "expand as": (lambda n, y, z: y[:, None].expand_as(torch.stack([z, z], 1)).sum(1), 8),
    "one entry as many": (lambda n, y, z: y.sum(1, keepdim=True).expand(-1, 8) * z, 8),
    "one entry as many like another": (lambda n, y, z: y.sum(1, keepdim=True).expand_as(z) * z, 8),
    "one entry repeated": (lambda n, y, z: y.sum(1, keepdim=True).repeat(1, 8) * z, 8),
    "a number expanded": (lambda n, y, z: torch.ones(()).expand(8) * z, 8),
    "tile": (lambda n, y, z: y.tile(2), 16),
    "repeat a new dimension": (lambda n, y, z: (z[:, None] * y.sum().repeat(8)).flatten(1), 8),
    "repeat interleave": (lambda n, y, z: y.repeat_interleave(3, 1), 24),
    "ravel": (lambda n, y, z: y.sum(0).ravel() * z, 8),
    "at least": (lambda n, y, z: torch.atleast_3d(y).squeeze(-1), 8),
    "broadcast tensors": (lambda n, y, z: torch.mul(*torch.broadcast_tensors(y, z[:1])), 8),
    "meshgrid": (
        lambda n, y, z: (
            torch.meshgrid(torch.arange(8.0), torch.arange(3.0), indexing="ij")[0].T * y
        ),
        8,
    ),
    "meshgrid xy": (
        lambda n, y, z: torch.meshgrid(torch.arange(8.0), torch.arange(3.0), indexing="xy")[0] * y,
        8,
    ),
    "adjoint": (lambda n, y, z: y.view(3, 2, 4).adjoint().flatten(1), 8),
    "T": (lambda n, y, z: y.T.T, 8),
    "mH": (lambda n, y, z: y.view(3, 2, 4).mH.flatten(1), 8),
    "permute from behind": (lambda n, y, z: y.view(3, 2, 4).permute(0, -1, -2).flatten(1), 8),
    "hstack": (lambda n, y, z: torch.hstack([y, z]), 16),
    "vstack": (lambda n, y, z: torch.vstack([y.T, z.T]).T, 16),
    "dstack": (lambda n, y, z: torch.dstack([y[:, :, None], z[:, :, None]]).flatten(1), 16),
    "column stack": (lambda n, y, z: torch.column_stack([y, z]), 16),
    "stack at the end": (lambda n, y, z: torch.stack([y, z], -1).flatten(1), 16),
    "narrow": (lambda n, y, z: y.narrow(1, 2, 5), 5),
    "narrow from behind": (lambda n, y, z: y.narrow(-1, -3, 2), 2),
    "unequal split": (
        lambda n, y, z: sum(p.sum(1, keepdim=True) for p in y.split([1, 4, 3], -1)),
        1,
    ),
    "unequal chunk": (lambda n, y, z: y.chunk(3, -1)[2] * z.chunk(3, 1)[2], 2),
    "hsplit": (lambda n, y, z: y.hsplit(2)[1], 4),
    "hsplit at": (lambda n, y, z: y.hsplit([1, 5])[1], 4),
    "vsplit": (lambda n, y, z: y.T.vsplit(2)[1].T, 4),
    "tensor split": (lambda n, y, z: y.tensor_split(3, 1)[1], 3),
    "tensor split at": (lambda n, y, z: y.tensor_split((2, 3), 1)[2], 5),
    "unfold": (lambda n, y, z: y[:, :, None].expand(3, 8, 4).unfold(2, 2, 1).flatten(2).sum(2), 8),
    "windows of an image": (lambda n, y, z: F.unfold(image(y, 3), 2).sum(2), 32),
    "fold": (lambda n, y, z: F.fold(y.repeat_interleave(4, 1)[..., None], 2, 2).mean((2, 3)), 8),
    "fold channels": (lambda n, y, z: F.fold(y[:, :, None], 2, 2).flatten(1), 8),
    "diagonal of others": (lambda n, y, z: image(y).diagonal(dim1=2, dim2=3).sum(2), 8),
    "triangle of others": (lambda n, y, z: image(y).tril().sum((2, 3)), 8),
    "crop": (lambda n, y, z: F.pad(y, (-2, -1)), 5),
    "crop and pad": (lambda n, y, z: F.pad(y, (-2, 1)), 7),
    "crop an image": (lambda n, y, z: F.pad(image(y, 4), (-1, -1, -1, 2)).sum((2, 3)), 8),
    "circular": (lambda n, y, z: F.pad(image(y), (1, 1, 1, 1), mode="circular").mean((2, 3)), 8),
    "reflect": (lambda n, y, z: F.pad(image(y), (1, 1, 1, 1), mode="reflect").mean((2, 3)), 8),
    "replicate": (lambda n, y, z: F.pad(image(y), (1, 1, 1, 1), mode="replicate").mean((2, 3)), 8),
    "pixel shuffle back and forth": (
        lambda n, y, z: F.pixel_unshuffle(F.pixel_shuffle(image(y), 2), 2).mean((2, 3)),
        8,
    ),
    "pairs": (rotary_complex, 8),
    "rotary by halves": (rotary(rotate_half, lambda t: torch.cat([t, t], -1)), 8),
    "rotary by slices": (rotary(rotate_half_by_slices, lambda t: t.repeat(1, 2)), 8),
    "rotary by pairs": (rotary(rotate_pairs, lambda t: t.repeat_interleave(2, -1)), 8),
    "rotary by stacked pairs": (
        rotary(rotate_pairs, lambda t: torch.stack([t, t], -1).flatten(-2)),
        8,
    ),
    "shifted windows": (swin, 8),
    "patch merging": (patch_merging, 32),
    "grid sample": (
        lambda n, y, z: F.grid_sample(
            image(y, 3),
            F.affine_grid(torch.eye(2, 3, dtype=y.dtype).expand(3, 2, 3), [3, 8, 3, 3], False),
            align_corners=False,
        ).sum((2, 3)),
        8,
    ),
    "unpool": (
        lambda n, y, z: F.max_unpool2d(*F.max_pool2d(image(y, 4), 2, return_indices=True), 2).sum(
            (2, 3)
        ),
        8,
    ),
    "one hot": (
        lambda n, y, z: (F.one_hot((y > 0).long(), 3) * torch.arange(3)).sum(-1).to(y.dtype) * y,
        8,
    ),
    "bucketize": (lambda n, y, z: torch.bucketize(y, torch.linspace(-1, 1, 5)).to(y.dtype) * y, 8),
    "is among": (lambda n, y, z: torch.isin(y.round(), torch.arange(3.0)).to(y.dtype) * y, 8),
}


@pytest.mark.parametrize("name", CARRIED)
def test_removing_equals_masking(name) -> None:
    check_carried(Net(*CARRIED[name]), X)


FROZEN = {
    "windows over units": (lambda n, y, z: y.unfold(1, 2, 2)[..., 0], 4),
    "diagonal": (lambda n, y, z: (y[:, :, None] * z[:, None]).diagonal(dim1=1, dim2=2), 8),
    "triangle": (lambda n, y, z: (y[:, :, None] * z[:, None]).tril().sum(2), 8),
    "strides": (lambda n, y, z: y.as_strided((3, 4), (8, 2)), 4),
    "circular over units": (lambda n, y, z: F.pad(y[:, None], (1, 1), mode="circular")[:, 0], 10),
    "unbind": (lambda n, y, z: torch.stack(y.unbind(1)[:4], 1), 4),
    "positions that follow the batch": (lambda n, y, z: y[:, : z.shape[0]].sum(1, keepdim=True), 1),
    "narrow by the batch": (
        lambda n, y, z: y.narrow(1, 0, z.shape[0]).sum(1, keepdim=True),
        1,
    ),
    "repeat by counts": (
        lambda n, y, z: y.repeat_interleave(torch.arange(8), 1, output_size=28),
        28,
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_units_that_cannot_be_followed_stay(name) -> None:
    net = Net(*FROZEN[name])
    network = trace(net, X)
    assert ("y.weight", 0) not in prunable(network)
    assert any(f.path == "y.weight" and f.dim == 0 and f.reason for f in network.frozen)
    check_proven(net, X, network)


class Tokens(nn.Module):
    """A class token, positions, dropped tokens and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 8, 2, 2)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.positions = nn.Parameter(torch.randn(1, 10, 8))
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.positions
        tokens = tokens[:, torch.tensor([0, 2, 3, 5, 7])]
        tokens = tokens + self.down(torch.relu(self.up(tokens)))
        return self.head(tokens[:, 0] + tokens[:, 1:].mean(1))


def test_tokens_stay_and_their_channels_go() -> None:
    x = torch.randn(3, 3, 6, 6)
    network = check_carried(Tokens(), x)
    assert prunable(network) == {
        ("patches.weight", 0),
        ("patches.bias", 0),
        ("token", 2),
        ("positions", 2),
        ("up.weight", 1),
        ("up.weight", 0),
        ("up.bias", 0),
        ("down.weight", 1),
        ("down.weight", 0),
        ("down.bias", 0),
        ("head.weight", 1),
    }
    assert [len(g) for g in network.groups] == [8, 12]


def test_the_batch_is_free_when_sizes_are_restated() -> None:
    """Heads merged into the batch, split off again by a number that follows it."""

    def function(n, y, z):
        heads = y.view(-1, 2, 4).transpose(1, 2).reshape(y.shape[0] * 4, 2)
        return heads.view(y.shape[0], 4, -1).flatten(1)

    net = Net(function, 8)
    network = check_carried(net, X)
    assert prunable(network) >= ALL
