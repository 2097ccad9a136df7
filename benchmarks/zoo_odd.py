"""Odd networks of the zoo: weights made in forward, loops, scatters, codebooks, tied transposes."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

ODD = {}


def net(make):
    ODD[make.__name__] = make
    return make


@net
def conv_lstm():

    class Cell(nn.Module):
        def __init__(self, i, h):
            super().__init__()
            self.h = h
            self.conv = nn.Conv2d(i + h, 4 * h, 3, padding=1)

        def forward(self, x, h, c):
            i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return (o.sigmoid() * c.tanh(), c)

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Cell(3, 16)
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x):
            b, t, _, high, wide = x.shape
            h = x.new_zeros(b, self.cell.h, high, wide)
            c = h
            for k in range(t):
                h, c = self.cell(x[:, k], h, c)
            return self.head(h)

    return (M(), (torch.randn(2, 4, 3, 8, 8),))


@net
def dynamic_conv():

    class Dyn(nn.Module):
        def __init__(self, i, o, k=4):
            super().__init__()
            self.k = k
            self.i = i
            self.o = o
            self.weight = nn.Parameter(torch.randn(k, o, i, 3, 3) * 0.1)
            self.att = nn.Linear(i, k)

        def forward(self, x):
            b, c, h, w = x.shape
            a = F.softmax(self.att(x.mean((2, 3))), -1)
            wt = (a @ self.weight.view(self.k, -1)).view(b * self.o, self.i, 3, 3)
            return F.conv2d(x.reshape(1, b * c, h, w), wt, padding=1, groups=b).view(
                b, self.o, h, w
            )

    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            Dyn(8, 16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        ),
        (torch.randn(2, 3, 8, 8),),
    )


@net
def involution():

    class Inv(nn.Module):
        def __init__(self, c, k=3, g=4):
            super().__init__()
            self.k = k
            self.g = g
            self.c = c
            self.r = nn.Conv2d(c, c // 2, 1)
            self.s = nn.Conv2d(c // 2, k * k * g, 1)

        def forward(self, x):
            b, c, h, w = x.shape
            wt = self.s(F.relu(self.r(x))).view(b, self.g, 1, self.k * self.k, h, w)
            u = F.unfold(x, self.k, padding=1).view(b, self.g, c // self.g, self.k * self.k, h, w)
            return (wt * u).sum(3).view(b, c, h, w)

    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Inv(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
        ),
        (torch.randn(2, 3, 8, 8),),
    )


@net
def hypernet():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Linear(6, 12)
            self.gen = nn.Linear(12, 12 * 5)
            self.out = nn.Linear(5, 3)
            self.x = nn.Linear(6, 12)

        def forward(self, x):
            w = self.gen(F.relu(self.enc(x))).view(-1, 5, 12)
            return self.out(torch.bmm(w, F.relu(self.x(x)).unsqueeze(-1)).squeeze(-1))

    return (M(), (torch.randn(4, 6),))


@net
def lora():

    class L(nn.Module):
        def __init__(self, i, o, r=4):
            super().__init__()
            self.base = nn.Linear(i, o)
            self.A = nn.Parameter(torch.randn(r, i) * 0.1)
            self.B = nn.Parameter(torch.randn(o, r) * 0.1)
            self.scale = 2.0 / r

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale

    return (
        nn.Sequential(L(8, 24), nn.GELU(), L(24, 24), nn.GELU(), L(24, 3)),
        (torch.randn(4, 8),),
    )


@net
def tied_autoencoder():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(16, 20) * 0.2)
            self.w2 = nn.Parameter(torch.randn(8, 16) * 0.2)
            self.b = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            h = torch.relu(x @ self.w1.t() + self.b)
            z = torch.relu(h @ self.w2.t())
            return torch.relu(z @ self.w2) @ self.w1

    return (M(), (torch.randn(4, 20),))


@net
def maxout():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 30)
            self.b = nn.Linear(10, 4)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 10, 3).max(2).values)

    return (M(), (torch.randn(5, 6),))


@net
def maxout_attr():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = 10
            self.k = 3
            self.a = nn.Linear(6, 30)
            self.b = nn.Linear(10, 4)

        def forward(self, x):
            return self.b(self.a(x).view(-1, self.n, self.k).amax(2))

    return (M(), (torch.randn(5, 6),))


@net
def capsules():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(1, 16, 5, 2)
            self.p = nn.Conv2d(16, 32, 3, 2)
            self.W = nn.Parameter(torch.randn(4, 16, 8, 6) * 0.1)

        def squash(self, v):
            n = (v**2).sum(-1, keepdim=True)
            return n / (1 + n) * v / torch.sqrt(n + 1e-08)

        def forward(self, x):
            u = self.p(F.relu(self.c(x)))
            b = u.size(0)
            u = self.squash(u.view(b, 8, 4, -1).permute(0, 2, 3, 1).reshape(b, -1, 8))
            h = torch.einsum("bid,oidk->boik", u, self.W)
            r = torch.zeros(b, 4, 16, 1, device=x.device)
            for _ in range(2):
                v = self.squash((F.softmax(r, 1) * h).sum(2, keepdim=True))
                r = r + (h * v).sum(-1, keepdim=True)
            return v.squeeze(2).norm(dim=-1)

    return (M(), (torch.randn(2, 1, 16, 16),))


@net
def gnn_scatter():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Linear(16, 24)
            self.e = nn.Linear(5, 8)
            self.u = nn.GRUCell(24, 8)
            self.o = nn.Linear(8, 3)

        def forward(self, x, edges):
            h = F.relu(self.e(x))
            for _ in range(2):
                msg = F.relu(self.m(torch.cat([h[edges[0]], h[edges[1]]], -1)))
                agg = torch.zeros(h.size(0), 24).index_add(0, edges[1], msg)
                h = self.u(agg, h)
            return self.o(h)

    return (M(), (torch.randn(7, 5), torch.randint(7, (2, 11))))


@net
def gnn_scatter_reduce():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Linear(5, 24)
            self.o = nn.Linear(24, 3)

        def forward(self, x, edges):
            m = F.relu(self.m(x))[edges[0]]
            out = torch.zeros(x.size(0), m.size(1)).scatter_reduce(
                0, edges[1][:, None].expand_as(m), m, "amax", include_self=True
            )
            return self.o(out)

    return (M(), (torch.randn(7, 5), torch.randint(7, (2, 11))))


@net
def pointnet():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1 = nn.Conv1d(3, 16, 1)
            self.t = nn.Sequential(
                nn.Conv1d(16, 32, 1),
                nn.ReLU(),
                nn.AdaptiveMaxPool1d(1),
                nn.Flatten(),
                nn.Linear(32, 256),
            )
            self.c2 = nn.Conv1d(16, 24, 1)
            self.f = nn.Linear(24, 5)

        def forward(self, x):
            h = F.relu(self.c1(x))
            turn = self.t(h).view(-1, 16, 16) + torch.eye(16)
            h = torch.bmm(turn, h)
            return self.f(F.relu(self.c2(h)).max(-1)[0])

    return (M(), (torch.randn(2, 3, 20),))


@net
def nerf():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.L = 4
            self.a = nn.Linear(3 * (2 * 4 + 1), 32)
            self.b = nn.Linear(32, 32)
            self.c = nn.Linear(32 + 27, 32)
            self.o = nn.Linear(32, 4)

        def forward(self, x):
            e = torch.cat(
                [x] + [f(2.0**i * x) for i in range(self.L) for f in (torch.sin, torch.cos)], -1
            )
            h = F.relu(self.b(F.relu(self.a(e))))
            return self.o(F.relu(self.c(torch.cat([h, e], -1))))

    return (M(), (torch.randn(6, 3),))


@net
def vae_eval():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Linear(8, 16)
            self.mu = nn.Linear(16, 4)
            self.lv = nn.Linear(16, 4)
            self.d = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x):
            h = F.relu(self.e(x))
            mu, lv = (self.mu(h), self.lv(h))
            z = mu + torch.randn_like(mu) * (lv / 2).exp()
            return (self.d(z), mu, lv)

    return (M(), (torch.randn(4, 8),))


@net
def lstm_cells():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LSTMCell(5, 12)
            self.b = nn.LSTMCell(12, 10)
            self.o = nn.Linear(10, 3)

        def forward(self, x):
            n = x.size(0)
            h1 = x.new_zeros(n, self.a.hidden_size)
            c1 = h1
            h2 = x.new_zeros(n, self.b.hidden_size)
            c2 = h2
            out = []
            for t in range(4):
                h1, c1 = self.a(x[:, t], (h1, c1))
                h2, c2 = self.b(h1, (h2, c2))
                out.append(self.o(h2))
            return torch.stack(out, 1)

    return (M(), (torch.randn(3, 4, 5),))


@net
def transformer_xl():

    class A(nn.Module):
        def __init__(self, d, h):
            super().__init__()
            self.h = h
            self.dh = d // h
            self.qkv = nn.Linear(d, 3 * d, bias=False)
            self.r = nn.Linear(d, d, bias=False)
            self.u = nn.Parameter(torch.randn(h, d // h))
            self.v = nn.Parameter(torch.randn(h, d // h))
            self.o = nn.Linear(d, d)

        def forward(self, x, pos):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (z.view(b, t, self.h, self.dh) for z in (q, k, v))
            r = self.r(pos).view(t, self.h, self.dh)
            ac = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
            bd = torch.einsum("bihd,jhd->bhij", q + self.v, r)
            bd = F.pad(bd, (1, 0)).view(b, self.h, t + 1, t)[:, :, 1:].reshape(b, self.h, t, t)
            a = ((ac + bd) / math.sqrt(self.dh)).softmax(-1)
            return self.o(torch.einsum("bhij,bjhd->bihd", a, v).reshape(b, t, self.h * self.dh))

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(30, 32)
            self.a = A(32, 4)
            self.n = nn.LayerNorm(32)
            self.f = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            self.o = nn.Linear(32, 30)
            self.register_buffer("pos", torch.randn(6, 32))

        def forward(self, ids):
            x = self.e(ids)
            x = x + self.a(self.n(x), self.pos)
            return self.o(x + self.f(x))

    return (M(), (torch.randint(30, (2, 6)),))


@net
def weight_std():

    class C(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-05)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    return (
        nn.Sequential(
            C(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            C(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        ),
        (torch.randn(2, 3, 8, 8),),
    )
