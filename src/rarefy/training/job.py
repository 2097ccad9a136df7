"""The arguments that every kind of training shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from rarefy.metrics import Metric, Top1
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
    seed: int
    progress: bool
    after_step: AfterStep | None
    regularizer: Penalty | None
    metric: Metric = field(default_factory=Top1)
    checkpoint: Path | None = None
    every: int | None = None
    resume: bool = False
    trackers: Trackers = None
