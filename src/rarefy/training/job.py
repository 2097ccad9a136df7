"""The arguments that every kind of training shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from rarefy.metrics import Metric
from rarefy.training.options import TrainOptions
from rarefy.types import Data

AfterStep: TypeAlias = Callable[[nn.Module], None]
"""Called with the network after every optimizer step."""

Penalty: TypeAlias = Callable[[nn.Module, int], Tensor]
"""``penalty(model, step)`` to a scalar that is added to the loss, such as those of
:mod:`rarefy.pruning.sparsity.regularize`."""

Trackers: TypeAlias = "str | Any | Sequence[str | Any] | None"
"""Names of trackers that Accelerate knows, or objects of its ``GeneralTracker``."""


@dataclass(frozen=True)
class Job:
    """The arguments that every kind of training shares, see :func:`rarefy.train`."""

    where: str
    options: TrainOptions
    val: Data | None
    metric: Metric
    seed: int
    progress: bool
    after_step: AfterStep | None
    regularizer: Penalty | None
    checkpoint: Path | None
    every: int | None
    resume: bool
    trackers: Trackers
