"""A network and data small enough that a whole compression takes a few seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.recipe.options import DistillStage, PruneStage, RepairStage, Stages, TrainStage

ALL = Stages(
    train=TrainStage(epochs=30, lr=0.3),
    prune=PruneStage(macs=0.5),
    repair=RepairStage(samples=64),
    distill=DistillStage(epochs=5, lr=0.1),
)
"""Every stage."""

SHORT = Stages(prune=PruneStage(macs=0.5), repair=None, distill=None, quantize=None)
"""Teacher and pruned."""


def perceptron(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 24), nn.ReLU(),
            nn.Linear(24, 3),
        )  # fmt: skip


def examples(count: int = 96) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


def shuffled() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*examples()), 32, shuffle=True)


def held_out() -> list[tuple[Tensor, Tensor]]:
    x, y = examples(150)
    return [(x[96:], y[96:])]


SOURCE = '''
import os, signal
from pathlib import Path
import torch
from torch import nn

def make_model():
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )

class Train(list):
    """Sends the signal that STOP names while it is read after the stage that AFTER names."""
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            after = os.environ.get("AFTER")
            if after and Path(os.environ["OUT"], after + ".onnx").exists():
                os.kill(os.getpid(), getattr(signal, os.environ["STOP"]))

def make_data():
    x = torch.randn(150, 8, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    held_out = [(x[96:], y[96:])]
    return Train((x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)), held_out, held_out
'''

RECIPE = """source: net.py
model: make_model
data: make_data
out: compressed
stages:
  train: {epochs: 1, lr: 0.05}
  prune: {macs: 0.5}
  repair: {samples: 64}
  distill: {epochs: 2, lr: 0.05}
"""

SHORT_RECIPE = """source: net.py
model: make_model
data: make_data
stages: {prune: {macs: 0.5}, repair: false, distill: false, quantize: false}
"""


def write_recipe(folder: Path, recipe: str = RECIPE, source: str = SOURCE) -> Path:
    (folder / "net.py").write_text(source)
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return path
