"""Small networks and data that the tests of training share."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rarefy.copies import fingerprint

QUICK = {"epochs": 2, "lr": 0.05, "progress": False}


def seeded_net(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(hidden=32, inputs=64, classes=10, seed=0):
    return seeded_net(
        lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
        seed,
    )


def conv(width=8, seed=0):
    return seeded_net(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(width * 16, 10),
        ),
        seed,
    )


def random_batches(n=4, size=8, inputs=64, classes=10, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, inputs, generator=made),
            torch.randint(0, classes, (size,), generator=made),
        )
        for _ in range(n)
    ]


def same(a, b):
    return fingerprint(a) == fingerprint(b)


def loader(shuffled=True, generator=None):
    x, y = (torch.cat(t) for t in zip(*random_batches(), strict=True))
    return DataLoader(TensorDataset(x, y), 8, shuffle=shuffled, generator=generator)


class Unsized:
    """Batches without a length that can be read any number of times."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return (batch for batch in self.batches)


class Augmented(Dataset):
    """Examples with noise from each of the three global generators."""

    def __init__(self, n=44):
        self.batch = random_batches(1, size=n)[0]

    def __len__(self):
        return len(self.batch[1])

    def __getitem__(self, index):
        noise = torch.rand(64) + np.random.rand() + random.random()  # noqa: NPY002
        return self.batch[0][index] + 0.1 * noise, self.batch[1][index]
