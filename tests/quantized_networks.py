"""Small networks, each with a pattern that quantizers meet, and their inputs."""

import torch
import torch.nn.functional as F
from torch import nn


class PaddedBlock(nn.Module):
    """A residual block whose shortcut is strided slicing and zero channels (option A)."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.pad = (out - width) // 2
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        y += x
        return F.relu(y)


class TinyResNet(nn.Module):
    """Two residual blocks, the second with a padded shortcut, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(PaddedBlock(8, 8, 1), PaddedBlock(8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class LeNet(nn.Module):
    """A relu behind the pooling, a view, a dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(32, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).view(-1, 32)
        return self.fc2(F.dropout(F.relu(self.fc1(x)), training=self.training))


class Reused(nn.Module):
    """One relu module for all, one convolution and norm called twice, a mapping as output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        for _ in range(2):
            x = self.relu(self.bn(self.shared(x)))
        return {"logits": self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), "features": x}


class TwoInputs(nn.Module):
    """An image and a vector, added."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3)
        self.vector = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image, vector):
        pooled = F.adaptive_avg_pool2d(self.image(image).relu(), 1).flatten(1)
        return self.head(pooled + self.vector(vector).relu())


class Fire(nn.Module):
    """Two branches that are concatenated and pooled."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.left = nn.Conv2d(4, 8, 1)
        self.right = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        x = F.max_pool2d(torch.cat([self.left(x).relu(), self.right(x).relu()], 1), 2)
        return F.adaptive_avg_pool2d(self.last(x).relu(), 1).flatten(1)


class Inverted(nn.Module):
    """An inverted residual with relu6, a depthwise convolution and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(12, 3, 1)
        self.head = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        y = self.depth(self.expand(x))
        return self.head(x + self.project(y * self.gate(y))).mean((2, 3))


class Signal(nn.Module):
    """1-d convolutions and a transposed one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 4, 2, 2)
        self.out = nn.Conv1d(4, 5, 1)

    def forward(self, x):
        return self.out(self.up(self.conv(x).relu()).relu())


class Attention(nn.Module):
    """Tokens, a residual stream, products between activations."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.project = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean(1))


def mlp():
    """Linear layers with and without bias, a norm that folds."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def image(size):
    return lambda n: torch.randn(n, 3, size, size)


NETWORKS = {
    "resnet": (TinyResNet, image(8)),
    "lenet": (LeNet, image(14)),
    "reused": (Reused, image(6)),
    "two inputs": (
        TwoInputs,
        lambda n: {"image": torch.randn(n, 3, 6, 6), "vector": torch.randn(n, 4)},
    ),
    "fire": (Fire, image(6)),
    "inverted": (Inverted, image(6)),
    "signal": (Signal, lambda n: torch.randn(n, 3, 10)),
    "attention": (Attention, image(8)),
    "mlp": (mlp, image(2)),
}


def build(name):
    """A network in eval mode, with BatchNorm statistics of its own data, and three batches."""
    torch.manual_seed(0)
    make, batch = NETWORKS[name]
    model, data = make(), [batch(16) for _ in range(3)]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        for x in data:
            model(**x) if isinstance(x, dict) else model(x)
    return model.eval(), data
