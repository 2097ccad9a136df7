"""Own small networks of the zoo: speech, language, images, generators, several inputs, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.types import Inputs

Network: TypeAlias = tuple[nn.Module, Inputs]
Builder: TypeAlias = Callable[[], Network]


# --- speech and sequences -----------------------------------------------------------------


class SpeechRecurrent(nn.Module):
    """Convolutional front end, a stack of recurrent layers, a classifier per frame."""

    def __init__(self, kind: Callable[..., nn.RNNBase], bidirectional: bool, layers: int) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(40, 32, 5, 2, 2), nn.BatchNorm1d(32), nn.ReLU())
        self.rnn = kind(32, 24, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(24 * (1 + bidirectional), 29)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 40, T) -> log probabilities (B, T / 2, 29)."""
        y, _ = self.rnn(self.front(x).transpose(1, 2))
        return F.log_softmax(self.head(y), -1)


class LastState(nn.Module):
    """Embedding, GRU, classifier on the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.gru = nn.GRU(24, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, 5)."""
        _, state = self.gru(self.embed(tokens))
        return self.head(state[-1])  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Half a feed-forward module of a Conformer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim)
        self.down, self.drop = nn.Linear(4 * dim, dim), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.drop(self.down(F.silu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Attention written with one fused projection and views by its attributes."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.out(y)  # type: ignore[no-any-return]


class ConformerBlock(nn.Module):
    """Feed-forward, attention, gated depthwise convolution, feed-forward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ff1, self.ff2 = FeedForward(dim), FeedForward(dim)
        self.norm_attention, self.attention = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.norm_conv, self.expand = nn.LayerNorm(dim), nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.batch_norm, self.project = nn.BatchNorm1d(dim), nn.Conv1d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + 0.5 * self.ff1(x)
        x = x + self.attention(self.norm_attention(x))
        y = F.glu(self.expand(self.norm_conv(x).transpose(1, 2)), 1)
        x = x + self.project(F.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.norm(x + 0.5 * self.ff2(x))  # type: ignore[no-any-return]


class Conformer(nn.Module):
    """Subsampling convolutions, two blocks, a classifier per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.sub = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
        )
        self.inner = nn.Linear(16 * 10, 48)
        self.blocks = nn.ModuleList(ConformerBlock(48, 4) for _ in range(2))
        self.head = nn.Linear(48, 29)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 40) -> (B, T / 4, 29)."""
        x = self.inner(self.sub(x[:, None]).transpose(1, 2).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class CausalBlock(nn.Module):
    """Two dilated causal convolutions with a shortcut (a TCN)."""

    def __init__(self, inputs: int, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(inputs, width, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 3, dilation=dilation)
        self.skip = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, width, T)."""
        y = F.relu(self.conv1(F.pad(x, (self.pad, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.pad, 0))))
        return F.relu(y + self.skip(x))


class KeywordSpotter(nn.Module):
    """Depthwise separable convolutions over a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 24, (10, 4), (2, 2), (4, 1)), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU()]
            layers += [nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T, F) -> (B, 12)."""
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


class PostNormTransformer(nn.Module):
    """PyTorch's own encoder layers over embedded tokens."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, 7)."""
        return self.head(self.body(self.embed(tokens))[:, 0])  # type: ignore[no-any-return]


class TiedLanguageModel(nn.Module):
    """Embeddings that are also the weights of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(61, 32), nn.Parameter(torch.randn(40, 32) * 0.1)
        self.norm, self.attention = nn.LayerNorm(32), SelfAttention(32, 4)
        self.ff = FeedForward(32)
        self.head = nn.Linear(32, 61, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, 61)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        x = x + self.attention(self.norm(x))
        return self.head(x + self.ff(x))  # type: ignore[no-any-return]


class GatedUnits(nn.Module):
    """SwiGLU and GEGLU gates: chunks of one projection, and two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.both, self.middle = nn.Linear(20, 32), nn.Linear(32, 96), nn.Linear(48, 32)
        self.gate, self.up, self.down = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 20) -> (B, 5)."""
        x = self.inner(x)
        value, gate = self.both(x).chunk(2, -1)
        x = x + self.middle(value * F.gelu(gate))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)  # type: ignore[no-any-return]


# --- images -------------------------------------------------------------------------------


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class UNet(nn.Module):
    """Two levels, skips by concatenation, upsampling by transposed convolution or by repetition."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_block(3, 16), conv_block(16, 24), conv_block(24, 32)])
        self.up = nn.ModuleList([self._up(32, 24, transposed), self._up(24, 16, transposed)])
        self.merge = nn.ModuleList([conv_block(48, 24), conv_block(32, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _up(inputs: int, outputs: int, transposed: bool) -> nn.Module:
        if transposed:
            return nn.ConvTranspose2d(inputs, outputs, 2, 2)
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4, H, W)."""
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        y = self.down[2](F.max_pool2d(second, 2))
        for up, merge, skip in zip(self.up, self.merge, (second, first), strict=True):
            y = merge(torch.cat([up(y), skip], 1))
        return self.head(y)  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """DnCNN: the network estimates the noise."""

    def __init__(self) -> None:
        super().__init__()
        inner = [conv_block(24, 24) for _ in range(4)]
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(24, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> the same."""
        return x - self.body(x)  # type: ignore[no-any-return]


class Detector(nn.Module):
    """A backbone with a pyramid and two shared heads; several outputs in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.high = (
            conv_block(3, 16, 2),
            conv_block(16, 24, 2),
            conv_block(24, 32, 2),
        )
        self.lateral = nn.ModuleList([nn.Conv2d(24, 20, 1), nn.Conv2d(32, 20, 1)])
        self.tower = conv_block(20, 20)
        self.classes, self.boxes = nn.Conv2d(20, 3 * 5, 1), nn.Conv2d(20, 3 * 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """(B, 3, H, W) -> per level: logits (B, anchors, 5), boxes (B, anchors, 4)."""
        low = self.low(self.stem(x))
        high = self.lateral[1](self.high(low))
        low = self.lateral[0](low) + F.interpolate(high, scale_factor=2.0, mode="nearest")
        levels = [self.tower(low), self.tower(high)]
        return {
            "logits": [self._flat(self.classes(y), 5) for y in levels],
            "boxes": [self._flat(self.boxes(y), 4).sigmoid() for y in levels],
        }

    @staticmethod
    def _flat(y: Tensor, size: int) -> Tensor:
        batch, _, height, width = y.shape
        return (
            y.view(batch, -1, size, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, size)
        )


class Generator(nn.Module):
    """DCGAN: a vector becomes an image by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32 * 4 * 4)
        self.body = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.ConvTranspose2d(24, 16, 4, 2, 1, bias=False), nn.InstanceNorm2d(16), nn.LeakyReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        """(B, 32) -> (B, 3, 32, 32)."""
        return self.body(self.project(z).view(z.shape[0], -1, 4, 4))  # type: ignore[no-any-return]


class SuperResolution(nn.Sequential):
    """ESPCN: convolutions at low resolution, then a pixel shuffle in the middle and at the end."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2), nn.Tanh(), nn.Conv2d(32, 64, 3, padding=1), nn.Tanh(),
            nn.PixelShuffle(2), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip


class SqueezeExcite(nn.Module):
    """Scales channels by what their means say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        scale = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * scale.sigmoid()  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """MobileNet's block; its attributes state widths that forward reads."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs, self.stride = inputs, 4 * inputs, outputs, stride
        self.expand, self.bn1 = (
            nn.Conv2d(inputs, 4 * inputs, 1, bias=False),
            nn.BatchNorm2d(4 * inputs),
        )
        self.depthwise = nn.Conv2d(
            4 * inputs, 4 * inputs, 3, stride, 1, groups=4 * inputs, bias=False
        )
        self.bn2, self.squeeze = nn.BatchNorm2d(4 * inputs), SqueezeExcite(4 * inputs)
        self.project, self.bn3 = (
            nn.Conv2d(4 * inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(self.squeeze(y.view(y.shape[0], self.hidden, *y.shape[2:]))))
        return x + y if self.stride == 1 and self.inputs == self.outputs else y  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """Three inverted residuals; the classifier's input width is an attribute that forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_block(3, 12, 2), InvertedResidual(12, 12, 1), InvertedResidual(12, 16, 2),
            InvertedResidual(16, 16, 1), conv_block(16, 40),
        )  # fmt: skip
        self.width, self.head = 40, nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        y = F.adaptive_avg_pool2d(self.features(x), 1).view(-1, self.width)
        return self.head(y)  # type: ignore[no-any-return]


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 4
        self.stem = conv_block(3, 32)
        self.conv1, self.conv2 = (
            nn.Conv2d(32, 32, 1, groups=4),
            nn.Conv2d(32, 32, 3, padding=1, groups=4),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        x = self.stem(x)
        y = F.relu(self.conv1(x))
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width)
        y = y.transpose(1, 2).reshape(batch, channels, height, width)
        return self.head((x + self.conv2(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Convolutional encoder, flat bottleneck, transposed decoder; several outputs."""

    def __init__(self, variational: bool) -> None:
        super().__init__()
        self.variational = variational
        self.encoder = nn.Sequential(conv_block(1, 16, 2), conv_block(16, 24, 2), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(24 * 49, 12), nn.Linear(24 * 49, 12)
        self.expand = nn.Linear(12, 24 * 49)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (24, 7, 7)), nn.ReLU(), nn.ConvTranspose2d(24, 16, 2, 2), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 2, 2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, 28, 28) -> image, mean, logarithm of the variance."""
        code = self.encoder(x)
        mean, log_variance = self.mean(code), self.log_variance(code)
        z = mean
        if self.variational and self.training:
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(self.expand(z)), mean, log_variance


def weight_norm() -> nn.Module:
    """A vocoder's residual stack under weight_norm."""
    wrap = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        wrap(nn.Conv1d(8, 32, 7, padding=3)), nn.LeakyReLU(0.1),
        wrap(nn.ConvTranspose1d(32, 16, 4, 2, 1)), nn.LeakyReLU(0.1),
        wrap(nn.Conv1d(16, 16, 3, padding=1)), nn.LeakyReLU(0.1),
        wrap(nn.Conv1d(16, 1, 7, padding=3)),
    )  # fmt: skip


def spectral_norm() -> nn.Module:
    """A discriminator under spectral_norm."""
    wrap = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        wrap(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), wrap(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(32, 1)),
    )  # fmt: skip


class TwoTowers(nn.Module):
    """An image and a vector of features; the inputs are named."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(conv_block(3, 16, 2), conv_block(16, 24, 2))
        self.table = nn.Sequential(nn.Linear(11, 32), nn.ReLU(), nn.Linear(32, 24))
        self.fuse, self.head = nn.Bilinear(24, 24, 16), nn.Linear(16 + 48, 5)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        """(B, 3, H, W), (B, 11) -> (B, 5)."""
        a, b = self.image(image).mean((2, 3)), self.table(table)
        return self.head(torch.cat([self.fuse(a, b), a, b], 1))  # type: ignore[no-any-return]


class Attending(nn.Module):
    """nn.MultiheadAttention over the positions of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv_block(3, 32, 2), nn.GroupNorm(4, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        x = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + y).mean(1))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Every layer reads all before it; widths of 3-D convolutions and PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(2 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.acts = nn.ModuleList(nn.PReLU(8) for _ in range(3))
        self.head = nn.Conv3d(26, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, D, H, W) -> (B, 2, D, H, W)."""
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = torch.cat([x, act(layer(x))], 1)
        return self.head(x)  # type: ignore[no-any-return]


class WaveNet(nn.Module):
    """Gated dilated convolutions with skips; what the last one hands on, nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        rates = (1, 2, 4)
        self.first = nn.Conv1d(1, 16, 1)
        self.gated = nn.ModuleList(nn.Conv1d(16, 48, 3, padding=d, dilation=d) for d in rates)
        self.skip = nn.ModuleList(nn.Conv1d(24, 32, 1) for _ in rates)
        self.residual = nn.ModuleList(nn.Conv1d(24, 16, 1) for _ in rates)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(32, 24, 1), nn.ReLU(), nn.Conv1d(24, 12, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, 12, T)."""
        x, skips = self.first(x), []
        for gated, skip, residual in zip(self.gated, self.skip, self.residual, strict=True):
            signal, gate = gated(x).chunk(2, 1)
            y = torch.tanh(signal) * torch.sigmoid(gate)
            skips.append(skip(y))
            x = x + residual(y)
        return self.head(torch.stack(skips).sum(0))  # type: ignore[no-any-return]


def alexnet() -> nn.Module:
    """The network of 2012 in small, with groups and local response normalization."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 7, 2, 2), nn.ReLU(), nn.LocalResponseNorm(5, k=2), nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 32, 5, padding=2, groups=2), nn.ReLU(), nn.LocalResponseNorm(5, k=2),
        nn.MaxPool2d(3, 2), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 7),
    )  # fmt: skip


def _own(model: Callable[[], nn.Module], *shape: int) -> Network:
    return model(), torch.randn(2, *shape)


def _tokens(model: Callable[[], nn.Module]) -> Network:
    return model(), torch.randint(50, (2, 13))


OWN: dict[str, Builder] = {
    "lstm_speech": lambda: _own(lambda: SpeechRecurrent(nn.LSTM, True, 2), 40, 26),
    "gru_speech": lambda: _own(lambda: SpeechRecurrent(nn.GRU, False, 2), 40, 26),
    "rnn_speech": lambda: _own(lambda: SpeechRecurrent(nn.RNN, True, 1), 40, 26),
    "gru_last_state": lambda: _tokens(LastState),
    "conformer": lambda: _own(Conformer, 52, 40),
    "tcn": lambda: _own(
        lambda: nn.Sequential(
            *(CausalBlock(12 if i == 0 else 24, 24, 2**i) for i in range(3)), nn.Conv1d(24, 5, 1)
        ),
        12,
        23,
    ),
    "keyword_spotter": lambda: _own(KeywordSpotter, 1, 49, 10),
    "transformer_post_norm": lambda: _tokens(lambda: PostNormTransformer(False)),
    "transformer_pre_norm": lambda: _tokens(lambda: PostNormTransformer(True)),
    "tied_language_model": lambda: _tokens(TiedLanguageModel),
    "gated_units": lambda: _own(GatedUnits, 20),
    "unet_transposed": lambda: _own(lambda: UNet(True), 3, 20, 20),
    "unet_upsampled": lambda: _own(lambda: UNet(False), 3, 20, 20),
    "dncnn": lambda: _own(Denoiser, 1, 18, 18),
    "detector": lambda: _own(Detector, 3, 40, 40),
    "dcgan": lambda: _own(Generator, 32),
    "espcn": lambda: _own(SuperResolution, 1, 11, 11),
    "mobilenet": lambda: _own(MobileNet, 3, 30, 30),
    "squeeze_excite": lambda: _own(
        lambda: nn.Sequential(conv_block(3, 16), SqueezeExcite(16), conv_block(16, 8)), 3, 9, 9
    ),
    "channel_shuffle": lambda: _own(Shuffle, 3, 9, 9),
    "autoencoder": lambda: _own(lambda: Autoencoder(False), 1, 28, 28),
    "variational_autoencoder": lambda: _own(lambda: Autoencoder(True), 1, 28, 28),
    "weight_norm": lambda: _own(weight_norm, 8, 21),
    "spectral_norm": lambda: _own(spectral_norm, 3, 20, 20),
    "two_towers": lambda: (
        TwoTowers(),
        {"image": torch.randn(2, 3, 14, 14), "table": torch.randn(2, 11)},
    ),
    "attention_pool": lambda: _own(Attending, 3, 10, 10),
    "dense_3d": lambda: _own(Dense, 2, 5, 6, 7),
    "wavenet": lambda: _own(WaveNet, 1, 29),
    "alexnet_2012": lambda: _own(alexnet, 3, 34, 34),
}
