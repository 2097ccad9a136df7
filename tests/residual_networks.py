"""Random residual networks whose branches can be switched off, for tests of depth."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 8


class Branch(nn.Module):
    """A residual block: ``off`` makes its branch zero, whatever the code around it does."""

    def __init__(self) -> None:
        super().__init__()
        self.off = False

    def zeroed(self, branch: Tensor) -> Tensor:
        return torch.zeros_like(branch) if self.off else branch


class Basic(Branch):
    """conv, norm, relu, conv, norm, added in place, relu: as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, 5, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(5, WIDTH, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = self.zeroed(out)
        out += x
        return self.relu(out)


class Inverted(Branch):
    """Expansion, depthwise, projection, nothing after the sum: as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, WIDTH, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.zeroed(self.conv(x))


class PreNorm(Branch):
    """Norm and perceptron over channels, times a layer scale: as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return x + self.zeroed((inner * self.gamma).permute(0, 3, 1, 2))


class PostNorm(Branch):
    """A norm after the sum: as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.zeroed(self.conv(x)) + x)


class Half(Branch):
    """A scaled branch: as in Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 6, 1), nn.Conv2d(6, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.zeroed(self.fc2(F.silu(self.fc1(x)))), alpha=0.5)


class Gated(Branch):
    """``x + g(x) * f(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.zeroed(torch.sigmoid(self.gate(x)) * self.value(x))


class Less(Branch):
    """``x - f(x)``, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.zeroed(self.drop(torch.tanh(self.conv(x))))


KINDS = {kind.__name__: kind for kind in (Basic, Inverted, PreNorm, PostNorm, Half, Gated, Less)}


class Residual(nn.Module):
    """A stem, blocks of these kinds, and a head."""

    def __init__(self, kinds: tuple[str, ...], seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
            self.blocks = nn.Sequential(*(KINDS[kind]() for kind in kinds))
            self.head = nn.Linear(WIDTH, 4)
            for parameter in self.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    kinds: tuple[str, ...]
    gone: tuple[int, ...]
    seed: int


@st.composite
def cases(draw) -> Case:
    """A network of up to five blocks, and which of them go."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))
    gone = draw(st.sets(st.integers(0, len(kinds) - 1), min_size=1))
    return Case(tuple(kinds), tuple(sorted(gone)), draw(st.integers(0, 99)))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
