"""A small teacher, data and stores of them, which the tests of soft labels share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.distillation.soft_labels.manifest import Manifest
from rarefy.distillation.soft_labels.write import write_soft_labels

SAMPLES, CLASSES = 100, 11


def images(count: int = SAMPLES) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def dataset(count: int = SAMPLES) -> TensorDataset:
    return TensorDataset(images(count), torch.arange(count) % CLASSES)


def loader(data: Any = None, **options: Any) -> DataLoader[Any]:
    data = dataset() if data is None else data
    return DataLoader(data, **{"batch_size": 16, "shuffle": True, **options})


def teacher(classes: int = CLASSES) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, classes))


def expected(model: nn.Module, inputs: Tensor) -> Tensor:
    """Log-probabilities in eval mode."""
    was = model.training
    with torch.no_grad():
        answers = model.eval()(inputs).log_softmax(-1)
    model.train(was)
    return answers


def write(path: Path, data: Any = None, model: nn.Module | None = None, **options: Any) -> Manifest:
    found = loader() if data is None else data
    return write_soft_labels(model or teacher(), found, path, progress=False, **options)
