"""More odd networks of the zoo."""

import torch
import torch.nn.functional as F
from torch import nn
from zoo_odd import net


@net
def complex_rope():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = 4
            self.q = nn.Linear(32, 32)
            self.k = nn.Linear(32, 32)
            self.v = nn.Linear(32, 32)
            self.o = nn.Linear(32, 32)
            f = 1 / 100 ** (torch.arange(0, 8, 2) / 8)
            self.register_buffer(
                "f", torch.polar(torch.ones(6, 4), torch.outer(torch.arange(6.0), f))
            )

        def rot(self, x):
            c = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(c * self.f[None, :, None]).flatten(3).type_as(x)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (layer(x).view(b, t, self.h, -1) for layer in (self.q, self.k, self.v))
            q, k = (self.rot(q), self.rot(k))
            y = F.scaled_dot_product_attention(
                *(z.transpose(1, 2) for z in (q, k, v)), is_causal=True
            )
            return self.o(y.transpose(1, 2).reshape(b, t, -1))

    return (M(), (torch.randn(2, 6, 32),))


@net
def selective_scan():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Linear(8, 32)
            self.c = nn.Conv1d(16, 16, 3, padding=2, groups=16)
            self.x = nn.Linear(16, 2 + 8)
            self.dt = nn.Linear(2, 16)
            self.A = nn.Parameter(torch.randn(16, 4))
            self.D = nn.Parameter(torch.ones(16))
            self.o = nn.Linear(16, 8)

        def forward(self, u):
            x, z = self.i(u).chunk(2, -1)
            t = x.size(1)
            x = F.silu(self.c(x.transpose(1, 2))[..., :t]).transpose(1, 2)
            d, into, out = self.x(x).split([2, 4, 4], -1)
            d = F.softplus(self.dt(d))
            decay = -self.A.exp()
            h = x.new_zeros(x.size(0), x.size(2), 4)
            ys = []
            for k in range(t):
                h = (
                    torch.exp(d[:, k, :, None] * decay) * h
                    + d[:, k, :, None] * into[:, k, None] * x[:, k, :, None]
                )
                ys.append((h * out[:, k, None]).sum(-1))
            y = torch.stack(ys, 1) + self.D * x
            return self.o(y * F.silu(z))

    return (M(), (torch.randn(2, 5, 8),))


@net
def unet_att_gate():

    class G(nn.Module):
        def __init__(self, g, x, i):
            super().__init__()
            self.g = nn.Conv2d(g, i, 1)
            self.x = nn.Conv2d(x, i, 1)
            self.p = nn.Conv2d(i, 1, 1)

        def forward(self, g, x):
            return x * torch.sigmoid(self.p(F.relu(self.g(g) + self.x(x))))

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.d1 = nn.Conv2d(3, 8, 3, padding=1)
            self.d2 = nn.Conv2d(8, 16, 3, 2, 1)
            self.u = nn.ConvTranspose2d(16, 8, 2, 2)
            self.a = G(8, 8, 4)
            self.o = nn.Conv2d(16, 2, 3, padding=1)

        def forward(self, x):
            a = F.relu(self.d1(x))
            b = F.relu(self.d2(a))
            u = self.u(b)
            return self.o(torch.cat([u, self.a(u, a)], 1))

    return (M(), (torch.randn(2, 3, 8, 8),))


@net
def deform_grid_sample():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 16, 3, padding=1)
            self.off = nn.Conv2d(16, 2, 3, padding=1)
            self.o = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            h = F.relu(self.c(x))
            off = self.off(h).permute(0, 2, 3, 1).tanh()
            return self.o(F.grid_sample(h, off, align_corners=False))

    return (M(), (torch.randn(2, 3, 8, 8),))


@net
def kan():

    class K(nn.Module):
        def __init__(self, i, o, g=5):
            super().__init__()
            self.c = nn.Parameter(torch.randn(o, i, g) * 0.1)
            self.register_buffer("g", torch.linspace(-1, 1, g))
            self.b = nn.Linear(i, o)

        def forward(self, x):
            return self.b(F.silu(x)) + torch.einsum(
                "big,oig->bo", torch.exp(-((x[..., None] - self.g) ** 2) * 4), self.c
            )

    return (nn.Sequential(K(4, 12), K(12, 12), K(12, 3)), (torch.randn(5, 4),))


@net
def moe_soft():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Linear(8, 4)
            self.w1 = nn.Parameter(torch.randn(4, 8, 16) * 0.1)
            self.w2 = nn.Parameter(torch.randn(4, 16, 8) * 0.1)
            self.o = nn.Linear(8, 3)

        def forward(self, x):
            g = self.g(x).softmax(-1)
            h = torch.relu(torch.einsum("bd,edh->beh", x, self.w1))
            y = torch.einsum("beh,ehd->bed", h, self.w2)
            return self.o((g[..., None] * y).sum(1))

    return (M(), (torch.randn(5, 8),))


@net
def moe_topk():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Linear(6, 8)
            self.g = nn.Linear(8, 4)
            self.ex = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4)
            )
            self.o = nn.Linear(8, 3)

        def forward(self, x):
            x = F.relu(self.i(x))
            w, idx = self.g(x).softmax(-1).topk(2, -1)
            all_ = torch.stack([e(x) for e in self.ex], 1)
            sel = all_.gather(1, idx[..., None].expand(-1, -1, all_.size(-1)))
            return self.o((w[..., None] * sel).sum(1))

    return (M(), (torch.randn(5, 6),))


@net
def siamese_cosine():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12))

        def forward(self, a, b):
            return (F.cosine_similarity(self.e(a), self.e(b)), torch.cdist(self.e(a), self.e(b)))

    return (M(), (torch.randn(4, 10), torch.randn(4, 10)))


@net
def dict_io():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.ModuleDict({"img": nn.Conv2d(3, 12, 3, padding=1), "tab": nn.Linear(5, 12)})
            self.o = nn.Linear(24, 2)

        def forward(self, *, img, tab, flag=None):
            p = self.b["img"](img).mean((2, 3))
            q = self.b["tab"](tab)
            return {"y": self.o(torch.cat([p, q], -1).relu()), "aux": [p.sum(-1)]}

    return (M(), {"img": torch.randn(2, 3, 8, 8), "tab": torch.randn(2, 5)})


@net
def cumsum_channels():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 16)
            self.o = nn.Linear(16, 3)

        def forward(self, x):
            return self.o(self.a(x).cumsum(-1))

    return (M(), (torch.randn(4, 6),))


@net
def fft_mix():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Linear(6, 16)
            self.w = nn.Parameter(torch.randn(5, 16, 2))
            self.o = nn.Linear(16, 3)

        def forward(self, x):
            h = self.i(x)
            f = torch.fft.rfft(h, dim=1) * torch.view_as_complex(self.w)
            return self.o(torch.fft.irfft(f, n=8, dim=1))

    return (M(), (torch.randn(4, 8, 6),))


@net
def sort_pool():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Conv1d(4, 16, 3)
            self.h = nn.Conv1d(16, 16, 1)
            self.o = nn.Linear(48, 3)

        def forward(self, x):
            h = self.h(F.relu(self.i(x)))
            return self.o(h.topk(3, -1).values.flatten(1))

    return (M(), (torch.randn(4, 4, 12),))


@net
def pixel_stage():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 16, 3, padding=1)
            self.b = nn.Conv2d(16, 64, 3, padding=1)
            self.c = nn.Conv2d(16, 3, 3, padding=1)
            self.d = nn.Conv2d(12, 16, 1)

        def forward(self, x):
            h = F.relu(self.a(x))
            h = F.pixel_shuffle(self.b(h), 2)
            y = self.c(h)
            return self.d(F.pixel_unshuffle(y, 2))

    return (M(), (torch.randn(2, 3, 8, 8),))


@net
def film_adain():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 16, 3, padding=1)
            self.n = nn.InstanceNorm2d(16)
            self.f = nn.Linear(5, 32)
            self.m = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
            self.o = nn.Conv2d(16, 3, 1)

        def forward(self, x, z):
            g, b = self.f(self.m(z)).chunk(2, 1)
            h = self.n(self.c(x)) * (1 + g[:, :, None, None]) + b[:, :, None, None]
            return self.o(F.relu(h))

    return (M(), (torch.randn(2, 3, 8, 8), torch.randn(2, 5)))


@net
def stylegan_mod():

    class Mod(nn.Module):
        def __init__(self, i, o, z):
            super().__init__()
            self.i = i
            self.o = o
            self.w = nn.Parameter(torch.randn(1, o, i, 3, 3) * 0.1)
            self.m = nn.Linear(z, i)

        def forward(self, x, z):
            b, _, h, w = x.shape
            st = self.m(z).view(b, 1, self.i, 1, 1)
            wt = self.w * st
            wt = wt * torch.rsqrt(wt.pow(2).sum([2, 3, 4], keepdim=True) + 1e-08)
            return F.conv2d(
                x.reshape(1, b * self.i, h, w),
                wt.view(b * self.o, self.i, 3, 3),
                padding=1,
                groups=b,
            ).view(b, self.o, h, w)

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.randn(1, 16, 4, 4))
            self.a = Mod(16, 16, 8)
            self.b = Mod(16, 12, 8)
            self.o = nn.Conv2d(12, 3, 1)
            self.z = nn.Linear(8, 8)

        def forward(self, z):
            z = F.leaky_relu(self.z(z))
            x = self.c.repeat(z.size(0), 1, 1, 1)
            x = F.leaky_relu(self.a(x, z))
            x = F.interpolate(x, scale_factor=2)
            return self.o(F.leaky_relu(self.b(x, z)))

    return (M(), (torch.randn(3, 8),))


@net
def vq_codebook():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Conv2d(3, 16, 4, 4)
            self.cb = nn.Embedding(20, 16)
            self.d = nn.ConvTranspose2d(16, 3, 4, 4)

        def forward(self, x):
            z = self.e(x).permute(0, 2, 3, 1)
            f = z.reshape(-1, z.size(-1))
            d = (
                f.pow(2).sum(1, keepdim=True)
                - 2 * f @ self.cb.weight.t()
                + self.cb.weight.pow(2).sum(1)
            )
            q = self.cb(d.argmin(1)).view_as(z)
            return self.d(q.permute(0, 3, 1, 2))

    return (M(), (torch.randn(2, 3, 8, 8),))


@net
def linear_attention():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = 4
            self.qkv = nn.Linear(32, 96)
            self.o = nn.Linear(32, 8)

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 1, 4)
            q, k = (F.elu(q) + 1, F.elu(k) + 1)
            kv = k.transpose(-2, -1) @ v
            z = 1 / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1e-06)
            return self.o((q @ kv * z).transpose(1, 2).reshape(b, n, c))

    return (M(), (torch.randn(2, 5, 32),))


@net
def noprune():
    return (nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),))


@net
def nested_lists():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.ModuleList(
                nn.ModuleList(nn.Conv1d(4 if j == 0 else 8, 8, 3, padding=1) for j in range(2))
                for _ in range(3)
            )
            self.o = nn.Linear(24, 2)

        def forward(self, xs):
            out = []
            for x, ls in zip(xs, self.l, strict=True):
                for layer in ls:
                    x = F.relu(layer(x))
                out.append(x.mean(-1))
            return self.o(torch.cat(out, -1))

    return (M(), ([torch.randn(2, 4, 9) for _ in range(3)],))


@net
def crf_like():

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(20, 12)
            self.l = nn.LSTM(12, 10, bidirectional=True, batch_first=True, num_layers=2)
            self.o = nn.Linear(20, 5)
            self.t = nn.Parameter(torch.randn(5, 5))

        def forward(self, ids):
            h, _ = self.l(self.e(ids))
            em = self.o(h)
            a = em[:, 0]
            for k in range(1, ids.size(1)):
                a = torch.logsumexp(a[:, :, None] + self.t, 1) + em[:, k]
            return (em, a.logsumexp(-1))

    return (M(), (torch.randint(20, (3, 6)),))
