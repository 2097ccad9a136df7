"""CIFAR-10 images and pretrained ResNets for the benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from folder import loaders
from safetensors.torch import save
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PadShortcut(nn.Module):
    """Every second pixel, zero channels on either side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pad = width // 4

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2C, H/2, W/2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Block(nn.Module):
    """Basic block with an option-A shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, or half the pixels and twice the channels."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images; ``blocks`` is 3 for ResNet-20, 9 for ResNet-56."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64)):
            layers = []
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage and not block else 1))
                inputs = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> logits (B, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def network(depth: int) -> CifarResNet:
    """A pretrained ResNet-20 or ResNet-56."""
    model = CifarResNet((depth - 2) // 6)
    state: dict[str, Any] = loaders().weights(f"cifar10_resnet{depth}_jpegft")
    model.load_state_dict(state)
    return model.eval()


def images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images (N, 3, 32, 32) and labels (N,)."""
    pixels, labels = loaders().cifar10(split, count)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.contiguous(), torch.from_numpy(labels).long()


def plain_bytes(model: nn.Module) -> int:
    """Size of the file that ``safetensors`` writes of a network."""
    return len(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def kept_whole(model: nn.Module, *, inner: bool) -> list[str]:
    """Layers that Torch-Pruning leaves alone: the classifier; where only the inner channels of
    blocks are to go, as its authors choose by hand, also the stem and what ends a block."""
    ends = [name for name, _ in model.named_modules() if name.endswith(".conv2")]
    return ["linear", "conv1", *ends] if inner else ["linear"]
