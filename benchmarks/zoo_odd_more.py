"""More odd networks of the zoo: attention, experts, styles, gates, codebooks, nested inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_odd import net
from zoo_own import Network


@net
def complex_rope() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.query = nn.Linear(32, 32)
            self.key = nn.Linear(32, 32)
            self.value = nn.Linear(32, 32)
            self.out = nn.Linear(32, 32)
            f = 1 / 100 ** (torch.arange(0, 8, 2) / 8)
            self.register_buffer(
                "turns", torch.polar(torch.ones(6, 4), torch.outer(torch.arange(6.0), f))
            )

        def turned(self, x: Tensor) -> Tensor:
            c = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(c * self.turns[None, :, None]).flatten(3).type_as(x)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = (
                layer(x).view(b, t, self.heads, -1) for layer in (self.query, self.key, self.value)
            )
            q, k = (self.turned(q), self.turned(k))
            y = F.scaled_dot_product_attention(
                *(z.transpose(1, 2) for z in (q, k, v)), is_causal=True
            )
            return self.out(y.transpose(1, 2).reshape(b, t, -1))

    return (Net(), (torch.randn(2, 6, 32),))


@net
def selective_scan() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 32)
            self.conv = nn.Conv1d(16, 16, 3, padding=2, groups=16)
            self.select = nn.Linear(16, 2 + 8)
            self.step = nn.Linear(2, 16)
            self.decay = nn.Parameter(torch.randn(16, 4))
            self.skip = nn.Parameter(torch.ones(16))
            self.out = nn.Linear(16, 8)

        def forward(self, u: Tensor) -> Tensor:
            x, z = self.inner(u).chunk(2, -1)
            t = x.size(1)
            x = F.silu(self.conv(x.transpose(1, 2))[..., :t]).transpose(1, 2)
            d, into, out = self.select(x).split([2, 4, 4], -1)
            d = F.softplus(self.step(d))
            decay = -self.decay.exp()
            h = x.new_zeros(x.size(0), x.size(2), 4)
            ys = []
            for k in range(t):
                h = (
                    torch.exp(d[:, k, :, None] * decay) * h
                    + d[:, k, :, None] * into[:, k, None] * x[:, k, :, None]
                )
                ys.append((h * out[:, k, None]).sum(-1))
            y = torch.stack(ys, 1) + self.skip * x
            return self.out(y * F.silu(z))

    return (Net(), (torch.randn(2, 5, 8),))


@net
def unet_att_gate() -> Network:
    class Gate(nn.Module):
        def __init__(self, g: int, x: int, i: int) -> None:
            super().__init__()
            self.from_below = nn.Conv2d(g, i, 1)
            self.from_left = nn.Conv2d(x, i, 1)
            self.score = nn.Conv2d(i, 1, 1)

        def forward(self, g: Tensor, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.score(F.relu(self.from_below(g) + self.from_left(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.down = nn.Conv2d(8, 16, 3, 2, 1)
            self.up = nn.ConvTranspose2d(16, 8, 2, 2)
            self.gate = Gate(8, 8, 4)
            self.head = nn.Conv2d(16, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.first(x))
            b = F.relu(self.down(a))
            u = self.up(b)
            return self.head(torch.cat([u, self.gate(u, a)], 1))

    return (Net(), (torch.randn(2, 3, 8, 8),))


@net
def deform_grid_sample() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.offsets = nn.Conv2d(16, 2, 3, padding=1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            off = self.offsets(h).permute(0, 2, 3, 1).tanh()
            return self.head(F.grid_sample(h, off, align_corners=False))

    return (Net(), (torch.randn(2, 3, 8, 8),))


@net
def kan() -> Network:
    class Splines(nn.Module):
        def __init__(self, i: int, o: int, g: int = 5) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(o, i, g) * 0.1)
            self.register_buffer("centers", torch.linspace(-1, 1, g))
            self.base = nn.Linear(i, o)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(F.silu(x)) + torch.einsum(
                "big,oig->bo", torch.exp(-((x[..., None] - self.centers) ** 2) * 4), self.weights
            )

    return (nn.Sequential(Splines(4, 12), Splines(12, 12), Splines(12, 3)), (torch.randn(5, 4),))


@net
def moe_soft() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.first = nn.Parameter(torch.randn(4, 8, 16) * 0.1)
            self.second = nn.Parameter(torch.randn(4, 16, 8) * 0.1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            g = self.router(x).softmax(-1)
            h = torch.relu(torch.einsum("bd,edh->beh", x, self.first))
            y = torch.einsum("beh,ehd->bed", h, self.second)
            return self.head((g[..., None] * y).sum(1))

    return (Net(), (torch.randn(5, 8),))


@net
def moe_topk() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 8)
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4)
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            w, idx = self.router(x).softmax(-1).topk(2, -1)
            all_ = torch.stack([e(x) for e in self.experts], 1)
            sel = all_.gather(1, idx[..., None].expand(-1, -1, all_.size(-1)))
            return self.head((w[..., None] * sel).sum(1))

    return (Net(), (torch.randn(5, 6),))


@net
def siamese_cosine() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 12))

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return (
                F.cosine_similarity(self.encoder(a), self.encoder(b)),
                torch.cdist(self.encoder(a), self.encoder(b)),
            )

    return (Net(), (torch.randn(4, 10), torch.randn(4, 10)))


@net
def dict_io() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleDict(
                {"img": nn.Conv2d(3, 12, 3, padding=1), "tab": nn.Linear(5, 12)}
            )
            self.head = nn.Linear(24, 2)

        def forward(self, *, img: Tensor, tab: Tensor, flag: bool | None = None) -> dict[str, Any]:
            p = self.branches["img"](img).mean((2, 3))
            q = self.branches["tab"](tab)
            return {"y": self.head(torch.cat([p, q], -1).relu()), "aux": [p.sum(-1)]}

    return (Net(), {"img": torch.randn(2, 3, 8, 8), "tab": torch.randn(2, 5)})


@net
def cumsum_channels() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).cumsum(-1))

    return (Net(), (torch.randn(4, 6),))


@net
def fft_mix() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 16)
            self.filters = nn.Parameter(torch.randn(5, 16, 2))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            f = torch.fft.rfft(h, dim=1) * torch.view_as_complex(self.filters)
            return self.head(torch.fft.irfft(f, n=8, dim=1))

    return (Net(), (torch.randn(4, 8, 6),))


@net
def sort_pool() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv1d(4, 16, 3)
            self.hidden = nn.Conv1d(16, 16, 1)
            self.head = nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.hidden(F.relu(self.stem(x)))
            return self.head(h.topk(3, -1).values.flatten(1))

    return (Net(), (torch.randn(4, 4, 12),))


@net
def pixel_stage() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.widen = nn.Conv2d(16, 64, 3, padding=1)
            self.narrow = nn.Conv2d(16, 3, 3, padding=1)
            self.head = nn.Conv2d(12, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            h = F.pixel_shuffle(self.widen(h), 2)
            y = self.narrow(h)
            return self.head(F.pixel_unshuffle(y, 2))

    return (Net(), (torch.randn(2, 3, 8, 8),))


@net
def film_adain() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.norm = nn.InstanceNorm2d(16)
            self.film = nn.Linear(5, 32)
            self.mapping = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
            self.head = nn.Conv2d(16, 3, 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            g, b = self.film(self.mapping(z)).chunk(2, 1)
            h = self.norm(self.stem(x)) * (1 + g[:, :, None, None]) + b[:, :, None, None]
            return self.head(F.relu(h))

    return (Net(), (torch.randn(2, 3, 8, 8), torch.randn(2, 5)))


@net
def stylegan_mod() -> Network:
    class Modulated(nn.Module):
        def __init__(self, i: int, o: int, z: int) -> None:
            super().__init__()
            self.inputs = i
            self.outputs = o
            self.weight = nn.Parameter(torch.randn(1, o, i, 3, 3) * 0.1)
            self.style = nn.Linear(z, i)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            b, _, h, w = x.shape
            st = self.style(z).view(b, 1, self.inputs, 1, 1)
            wt = self.weight * st
            wt = wt * torch.rsqrt(wt.pow(2).sum([2, 3, 4], keepdim=True) + 1e-08)
            return F.conv2d(
                x.reshape(1, b * self.inputs, h, w),
                wt.view(b * self.outputs, self.inputs, 3, 3),
                padding=1,
                groups=b,
            ).view(b, self.outputs, h, w)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.randn(1, 16, 4, 4))
            self.first = Modulated(16, 16, 8)
            self.second = Modulated(16, 12, 8)
            self.head = nn.Conv2d(12, 3, 1)
            self.mapping = nn.Linear(8, 8)

        def forward(self, z: Tensor) -> Tensor:
            z = F.leaky_relu(self.mapping(z))
            x = self.constant.repeat(z.size(0), 1, 1, 1)
            x = F.leaky_relu(self.first(x, z))
            x = F.interpolate(x, scale_factor=2)
            return self.head(F.leaky_relu(self.second(x, z)))

    return (Net(), (torch.randn(3, 8),))


@net
def vq_codebook() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 16, 4, 4)
            self.codebook = nn.Embedding(20, 16)
            self.decoder = nn.ConvTranspose2d(16, 3, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x).permute(0, 2, 3, 1)
            f = z.reshape(-1, z.size(-1))
            d = (
                f.pow(2).sum(1, keepdim=True)
                - 2 * f @ self.codebook.weight.t()
                + self.codebook.weight.pow(2).sum(1)
            )
            q = self.codebook(d.argmin(1)).view_as(z)
            return self.decoder(q.permute(0, 3, 1, 2))

    return (Net(), (torch.randn(2, 3, 8, 8),))


@net
def linear_attention() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.qkv = nn.Linear(32, 96)
            self.head = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = (
                self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            )
            q, k = (F.elu(q) + 1, F.elu(k) + 1)
            kv = k.transpose(-2, -1) @ v
            z = 1 / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1e-06)
            return self.head((q @ kv * z).transpose(1, 2).reshape(b, n, c))

    return (Net(), (torch.randn(2, 5, 32),))


@net
def noprune() -> Network:
    return (nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),))


@net
def nested_lists() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(
                nn.ModuleList(nn.Conv1d(4 if j == 0 else 8, 8, 3, padding=1) for j in range(2))
                for _ in range(3)
            )
            self.head = nn.Linear(24, 2)

        def forward(self, xs: list[Tensor]) -> Tensor:
            out = []
            for x, ls in zip(xs, self.branches, strict=True):
                for layer in ls:
                    x = F.relu(layer(x))
                out.append(x.mean(-1))
            return self.head(torch.cat(out, -1))

    return (Net(), ([torch.randn(2, 4, 9) for _ in range(3)],))


@net
def crf_like() -> Network:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 12)
            self.lstm = nn.LSTM(12, 10, bidirectional=True, batch_first=True, num_layers=2)
            self.head = nn.Linear(20, 5)
            self.transitions = nn.Parameter(torch.randn(5, 5))

        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            h, _ = self.lstm(self.embedding(ids))
            em = self.head(h)
            a = em[:, 0]
            for k in range(1, ids.size(1)):
                a = torch.logsumexp(a[:, :, None] + self.transitions, 1) + em[:, k]
            return (em, a.logsumexp(-1))

    return (Net(), (torch.randint(20, (3, 6)),))
