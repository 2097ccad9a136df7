"""rarefy inside a transformers trainer: ``Trainer(callbacks=[AfterStep(hold(model))])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.errors import MissingExtraError
from rarefy.training.job import AfterStep as Function

try:
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error


class AfterStep(TrainerCallback):
    """Calls a function with the network after every optimizer step.

    Args:
        function: for example :func:`~rarefy.pruning.sparsity.masks.hold` of the network, or a
            :class:`~rarefy.pruning.gradual.GradualPruning`.

    Example:
        >>> from rarefy.pruning.sparsity.masks import hold
        >>> callback = AfterStep(hold(nn.Linear(2, 1)))
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """A step of the trainer is one of the optimizer, however many batches it takes."""
        assert model is not None
        self.function(model)
