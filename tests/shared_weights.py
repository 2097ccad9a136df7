"""Networks that use a layer several times, each time on something else."""

import torch
from torch import nn


class Siamese(nn.Module):
    """One tower for two images, with BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
        )
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one, two = (self.out(self.tower(v).mean((2, 3))) for v in (x, y))
        return one - two


class Heads(nn.Module):
    """One head for three scales of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        scales = [self.stem(x)]
        for _ in range(2):
            scales.append(nn.functional.avg_pool2d(scales[-1], 2))
        return [self.head(scale) for scale in scales]
