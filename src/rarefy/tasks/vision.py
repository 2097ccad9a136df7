"""A small real data set of images and a small residual network, for demos and tests."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rarefy.errors import InputError, MissingExtraError

_VAL, _TEST = 180, 360
_ROTATION, _SHIFT, _ZOOM = math.radians(10), 0.08, 0.08

Images = DataLoader[tuple[Tensor, Tensor]]


class Splits(NamedTuple):
    """Three loaders of ``(images, labels)``; each can be iterated any number of times."""

    train: Images
    val: Images
    test: Images


def digits(batch_size: int = 64, size: int = 32, seed: int = 0) -> Splits:
    """Handwritten digits: 1,797 real images of 8x8 pixels, shipped inside scikit-learn.

    They are enlarged to ``size`` x ``size``, normalized by the training images' mean and
    deviation, and split by class into 1,257 / 180 / 360. The split depends on ``seed`` alone.
    Every pass over ``train`` is shuffled and slightly rotated, shifted and zoomed anew, with
    torch's global generator; ``val`` and ``test`` never change.

    Args:
        batch_size: images per batch; the last batch is smaller.
        size: height and width in pixels.
        seed: of the split.

    Returns:
        Loaders of images of shape (batch, 1, size, size), float32, and labels of shape (batch,),
        int64, 0 to 9.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        InputError: ``batch_size`` or ``size`` is below 1.

    Example:
        >>> images, labels = next(iter(digits(batch_size=8).test))
        >>> images.shape, labels.shape
        (torch.Size([8, 1, 32, 32]), torch.Size([8]))
    """
    for name, value in (("batch_size", batch_size), ("size", size)):
        if value < 1:
            raise InputError(f"digits({name}={value!r})", "must be at least 1", f"Raise {name}")
    images, labels = _load(size)
    train, val, test = _split(labels, seed)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std

    def loader(rows: Tensor, training: bool) -> Images:
        data = _Rows(images[rows], labels[rows], augmented=training)
        return DataLoader(data, batch_size, shuffle=training, collate_fn=_as_is)

    return Splits(loader(train, True), loader(val, False), loader(test, False))


def _load(size: int) -> tuple[Tensor, Tensor]:
    """Images (1797, 1, size, size) in [0, 1] and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("sklearn", "demo") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(data.target).long()


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of train, val and test, each with the classes' shares of the whole.

    Rows are shuffled, sorted by class, and dealt out evenly along that order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(labels[order], stable=True)]
    held = _VAL + _TEST
    picked = torch.arange(held) * len(labels) // held
    is_test = torch.arange(held) % (held // _VAL) != 0
    train = torch.ones(len(labels), dtype=torch.bool)
    train[picked] = False
    return order[train], order[picked[~is_test]], order[picked[is_test]]


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory, fetched and augmented a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, augmented: bool) -> None:
        self.images = images
        self.labels = labels
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.images[rows], self.labels[rows]
        return (_jitter(images) if self.augmented else images), labels


def _as_is(batch: Any) -> Any:
    return batch


def _jitter(images: Tensor) -> Tensor:
    """Rotate, zoom and shift each image (batch, channels, height, width) a little, at random."""
    angle, zoom, dx, dy = (2 * torch.rand(4, len(images)) - 1).unbind()
    angle, zoom = angle * _ROTATION, 1 + zoom * _ZOOM
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [cos, -sin, 2 * _SHIFT * dx, sin, cos, 2 * _SHIFT * dy]
    theta = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(f(x) + shortcut(x))``.

    The shortcut is the identity where shapes agree, else a 1x1 convolution with BatchNorm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for small images of He et al. 2015, section 4.2.

    Departs from the paper in its shortcuts: a projection, not zero padding, where widths change.
    """

    def __init__(self, blocks: int, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = _stage(blocks, width, width, stride=1)
        self.stage2 = _stage(blocks, width, 2 * width, stride=2)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, h, w) -> logits (batch, classes)."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet20(in_channels: int = 1, classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-20: three stages of three blocks, ``width``, 2x and 4x ``width`` channels.

    Weights are initialized for ReLU (He et al. 2015) from torch's global generator.

    Args:
        in_channels: channels of the images.
        classes: number of logits.
        width: channels of the first stage.

    Raises:
        InputError: an argument is below 1.

    Example:
        >>> sum(p.numel() for p in resnet20(in_channels=3).parameters())
        272474
    """
    for name, value in (("in_channels", in_channels), ("classes", classes), ("width", width)):
        if value < 1:
            raise InputError(f"resnet20({name}={value!r})", "must be at least 1", f"Raise {name}")
    model = ResNet(3, in_channels, classes, width)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
