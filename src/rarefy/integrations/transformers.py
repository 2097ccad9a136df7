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

    A training that goes on from a checkpoint calls ``function.resume(model, step)`` first, where
    the function has that.

    Args:
        function: for example :func:`~rarefy.pruning.sparsity.masks.hold` of the network, or a
            :class:`~rarefy.pruning.gradual.GradualPruning`.

    Example:
        >>> from rarefy.pruning.sparsity.masks import hold
        >>> callback = AfterStep(hold(nn.Linear(2, 1)))
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Checkpoints have no place for tensors; all but the step is in the network's zeros."""
        function: Any = self.function
        if state.global_step and hasattr(function, "resume"):
            function.resume(model, state.global_step)

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
