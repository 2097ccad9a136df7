"""Odd networks of the zoo: weights made in forward, loops, scatters, codebooks, tied transposes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_own import Builder, Network

ODD: dict[str, Builder] = {}
"""Name -> a function that gives a network and its inputs."""


def net(make: Builder) -> Builder:
    """Add a network to :data:`ODD` under its function's name."""
    ODD[make.__name__] = make
    return make


@net
def conv_lstm() -> Network:
    class Cell(nn.Module):
        def __init__(self, i: int, h: int) -> None:
            super().__init__()
            self.hidden = h
            self.conv = nn.Conv2d(i + h, 4 * h, 3, padding=1)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return (o.sigmoid() * c.tanh(), c)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell(3, 16)
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _, high, wide = x.shape
            h = x.new_zeros(b, self.cell.hidden, high, wide)
            c = h
            for k in range(t):
                h, c = self.cell(x[:, k], h, c)
            return self.head(h)

    return (Net(), (torch.randn(2, 4, 3, 8, 8),))


@net
def dynamic_conv() -> Network:
    class DynamicConv(nn.Module):
        def __init__(self, i: int, o: int, k: int = 4) -> None:
            super().__init__()
            self.kernels = k
            self.inputs = i
            self.outputs = o
            self.weight = nn.Parameter(torch.randn(k, o, i, 3, 3) * 0.1)
            self.attention = nn.Linear(i, k)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            a = F.softmax(self.attention(x.mean((2, 3))), -1)
            wt = (a @ self.weight.view(self.kernels, -1)).view(b * self.outputs, self.inputs, 3, 3)
            return F.conv2d(x.reshape(1, b * c, h, w), wt, padding=1, groups=b).view(
                b, self.outputs, h, w
            )

    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            DynamicConv(8, 16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        ),
        (torch.randn(2, 3, 8, 8),),
    )


@net
def involution() -> Network:
    class Involution(nn.Module):
        def __init__(self, c: int, k: int = 3, g: int = 4) -> None:
            super().__init__()
            self.size = k
            self.groups = g
            self.channels = c
            self.reduce = nn.Conv2d(c, c // 2, 1)
            self.span = nn.Conv2d(c // 2, k * k * g, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            wt = self.span(F.relu(self.reduce(x))).view(
                b, self.groups, 1, self.size * self.size, h, w
            )
            u = F.unfold(x, self.size, padding=1).view(
                b, self.groups, c // self.groups, self.size * self.size, h, w
            )
            return (wt * u).sum(3).view(b, c, h, w)

    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            Involution(16),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        ),
        (torch.randn(2, 3, 8, 8),),
    )


@net
def hypernet() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 12)
            self.generator = nn.Linear(12, 12 * 5)
            self.head = nn.Linear(5, 3)
            self.inner = nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            w = self.generator(F.relu(self.encoder(x))).view(-1, 5, 12)
            return self.head(torch.bmm(w, F.relu(self.inner(x)).unsqueeze(-1)).squeeze(-1))

    return (Net(), (torch.randn(4, 6),))


@net
def lora() -> Network:
    class Adapted(nn.Module):
        def __init__(self, i: int, o: int, r: int = 4) -> None:
            super().__init__()
            self.base = nn.Linear(i, o)
            self.down = nn.Parameter(torch.randn(r, i) * 0.1)
            self.up = nn.Parameter(torch.randn(o, r) * 0.1)
            self.scale = 2.0 / r

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale

    return (
        nn.Sequential(Adapted(8, 24), nn.GELU(), Adapted(24, 24), nn.GELU(), Adapted(24, 3)),
        (torch.randn(4, 8),),
    )


@net
def tied_autoencoder() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(16, 20) * 0.2)
            self.second = nn.Parameter(torch.randn(8, 16) * 0.2)
            self.bias = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(x @ self.first.t() + self.bias)
            z = torch.relu(h @ self.second.t())
            return torch.relu(z @ self.second) @ self.first

    return (Net(), (torch.randn(4, 20),))


@net
def maxout() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces = nn.Linear(6, 30)
            self.head = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pieces(x).view(-1, 10, 3).max(2).values)

    return (Net(), (torch.randn(5, 6),))


@net
def maxout_attr() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = 10
            self.count = 3
            self.pieces = nn.Linear(6, 30)
            self.head = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pieces(x).view(-1, self.units, self.count).amax(2))

    return (Net(), (torch.randn(5, 6),))


@net
def capsules() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 5, 2)
            self.primary = nn.Conv2d(16, 32, 3, 2)
            self.votes = nn.Parameter(torch.randn(4, 16, 8, 6) * 0.1)

        def squash(self, v: Tensor) -> Tensor:
            n = (v**2).sum(-1, keepdim=True)
            return n / (1 + n) * v / torch.sqrt(n + 1e-08)

        def forward(self, x: Tensor) -> Tensor:
            u = self.primary(F.relu(self.stem(x)))
            b = u.size(0)
            u = self.squash(u.view(b, 8, 4, -1).permute(0, 2, 3, 1).reshape(b, -1, 8))
            h = torch.einsum("bid,oidk->boik", u, self.votes)
            r = torch.zeros(b, 4, 16, 1, device=x.device)
            for _ in range(2):
                v = self.squash((F.softmax(r, 1) * h).sum(2, keepdim=True))
                r = r + (h * v).sum(-1, keepdim=True)
            return v.squeeze(2).norm(dim=-1)

    return (Net(), (torch.randn(2, 1, 16, 16),))


@net
def gnn_scatter() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message = nn.Linear(16, 24)
            self.encoder = nn.Linear(5, 8)
            self.update = nn.GRUCell(24, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            h = F.relu(self.encoder(x))
            for _ in range(2):
                msg = F.relu(self.message(torch.cat([h[edges[0]], h[edges[1]]], -1)))
                agg = torch.zeros(h.size(0), 24).index_add(0, edges[1], msg)
                h = self.update(agg, h)
            return self.head(h)

    return (Net(), (torch.randn(7, 5), torch.randint(7, (2, 11))))


@net
def gnn_scatter_reduce() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message = nn.Linear(5, 24)
            self.head = nn.Linear(24, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            m = F.relu(self.message(x))[edges[0]]
            out = torch.zeros(x.size(0), m.size(1)).scatter_reduce(
                0, edges[1][:, None].expand_as(m), m, "amax", include_self=True
            )
            return self.head(out)

    return (Net(), (torch.randn(7, 5), torch.randint(7, (2, 11))))


@net
def pointnet() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 16, 1)
            self.transform = nn.Sequential(
                nn.Conv1d(16, 32, 1),
                nn.ReLU(),
                nn.AdaptiveMaxPool1d(1),
                nn.Flatten(),
                nn.Linear(32, 256),
            )
            self.second = nn.Conv1d(16, 24, 1)
            self.head = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.first(x))
            turn = self.transform(h).view(-1, 16, 16) + torch.eye(16)
            h = torch.bmm(turn, h)
            return self.head(F.relu(self.second(h)).max(-1)[0])

    return (Net(), (torch.randn(2, 3, 20),))


@net
def nerf() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = 4
            self.first = nn.Linear(3 * (2 * 4 + 1), 32)
            self.second = nn.Linear(32, 32)
            self.third = nn.Linear(32 + 27, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            e = torch.cat(
                [x]
                + [f(2.0**i * x) for i in range(self.frequencies) for f in (torch.sin, torch.cos)],
                -1,
            )
            h = F.relu(self.second(F.relu(self.first(e))))
            return self.head(F.relu(self.third(torch.cat([h, e], -1))))

    return (Net(), (torch.randn(6, 3),))


@net
def vae_eval() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 16)
            self.mean = nn.Linear(16, 4)
            self.log_variance = nn.Linear(16, 4)
            self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = F.relu(self.encoder(x))
            mu, lv = (self.mean(h), self.log_variance(h))
            z = mu + torch.randn_like(mu) * (lv / 2).exp()
            return (self.decoder(z), mu, lv)

    return (Net(), (torch.randn(4, 8),))


@net
def lstm_cells() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LSTMCell(5, 12)
            self.second = nn.LSTMCell(12, 10)
            self.head = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0)
            h1 = x.new_zeros(n, self.first.hidden_size)
            c1 = h1
            h2 = x.new_zeros(n, self.second.hidden_size)
            c2 = h2
            out = []
            for t in range(4):
                h1, c1 = self.first(x[:, t], (h1, c1))
                h2, c2 = self.second(h1, (h2, c2))
                out.append(self.head(h2))
            return torch.stack(out, 1)

    return (Net(), (torch.randn(3, 4, 5),))


@net
def transformer_xl() -> Network:
    class RelativeAttention(nn.Module):
        def __init__(self, d: int, h: int) -> None:
            super().__init__()
            self.heads = h
            self.width = d // h
            self.qkv = nn.Linear(d, 3 * d, bias=False)
            self.places = nn.Linear(d, d, bias=False)
            self.content_bias = nn.Parameter(torch.randn(h, d // h))
            self.place_bias = nn.Parameter(torch.randn(h, d // h))
            self.out = nn.Linear(d, d)

        def forward(self, x: Tensor, pos: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (z.view(b, t, self.heads, self.width) for z in (q, k, v))
            r = self.places(pos).view(t, self.heads, self.width)
            ac = torch.einsum("bihd,bjhd->bhij", q + self.content_bias, k)
            bd = torch.einsum("bihd,jhd->bhij", q + self.place_bias, r)
            bd = (
                F.pad(bd, (1, 0))
                .view(b, self.heads, t + 1, t)[:, :, 1:]
                .reshape(b, self.heads, t, t)
            )
            a = ((ac + bd) / math.sqrt(self.width)).softmax(-1)
            return self.out(
                torch.einsum("bhij,bjhd->bihd", a, v).reshape(b, t, self.heads * self.width)
            )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 32)
            self.attention = RelativeAttention(32, 4)
            self.norm = nn.LayerNorm(32)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            self.head = nn.Linear(32, 30)
            self.register_buffer("pos", torch.randn(6, 32))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            x = x + self.attention(self.norm(x), self.pos)
            return self.head(x + self.mlp(x))

    return (Net(), (torch.randint(30, (2, 6)),))


@net
def weight_std() -> Network:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-05)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    return (
        nn.Sequential(
            Standardized(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            Standardized(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        ),
        (torch.randn(2, 3, 8, 8),),
    )
