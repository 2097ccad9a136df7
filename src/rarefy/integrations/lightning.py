"""rarefy inside a Lightning trainer: ``Trainer(callbacks=[AfterStep(hold(model))])``."""

from __future__ import annotations

from typing import Any

from rarefy.errors import InputError, MissingExtraError
from rarefy.paths import remedy
from rarefy.pruning.sparsity.masks import Masks
from rarefy.training.job import AfterStep as Function

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error


class AfterStep(Callback):
    """Calls a function with the network after every optimizer step.

    What a function with ``state_dict`` and ``load_state_dict`` holds is kept in Lightning's
    checkpoints, so that a training goes on where it was. Callbacks are called in their order: put
    this one before those that average weights.

    An average holds remnants of weights from before they were set to zero. Where the function has
    ``masks`` (:class:`~rarefy.pruning.sparsity.masks.Masks`), they are applied to what is validated
    during a fit, which is the average itself for Lightning's ``WeightAveraging``, and to what the
    fit leaves. A checkpoint that is written without a validation before it has the average as it
    is: call ``function.masks.apply(network)`` once it is loaded.

    Args:
        function: for example :func:`~rarefy.pruning.sparsity.masks.hold` of the network, or a
            :class:`~rarefy.pruning.gradual.GradualPruning`.
        network: path of the network below the ``LightningModule``; empty for the module itself.

    Raises:
        InputError: the path is no string, or, when a fit starts, no module has it.

    Example:
        >>> from torch import nn
        >>> from rarefy.pruning.sparsity.masks import hold
        >>> callback = AfterStep(hold(nn.Linear(2, 1)), network="net")
    """

    def __init__(self, function: Function, network: str = "") -> None:
        if not isinstance(network, str):
            raise InputError(
                "AfterStep(network=...)",
                f"a {type(network).__name__} was given",
                "Give the path of the network below the LightningModule, such as 'net'",
            )
        self.function, self.network, self._done = function, network, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A wrong path is told before the first batch."""
        try:
            pl_module.get_submodule(self.network)
        except AttributeError as error:
            known = [path for path, _ in pl_module.named_modules(remove_duplicate=False) if path]
            raise InputError(
                f"AfterStep(network={self.network!r})",
                f"{type(pl_module).__name__} has no module of that path",
                remedy(self.network, known),
            ) from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps are counted from where the trainer begins."""
        self._done = trainer.global_step

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Averages are swapped in when the validation begins, after this callback was asked."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._mask(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages are copied into the network at the end of the training, before this."""
        self._mask(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is called where gradients were only accumulated."""
        if trainer.global_step > self._done:
            self._done = trainer.global_step
            self.function(pl_module.get_submodule(self.network))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Several may be in one trainer, which are told apart by their order."""
        function: Any = self.function
        if hasattr(function, "state_dict"):
            checkpoint[self._key(trainer)] = function.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint that was made without the function leaves it as it is."""
        function: Any = self.function
        if hasattr(function, "load_state_dict") and self._key(trainer) in checkpoint:
            function.load_state_dict(checkpoint[self._key(trainer)])

    def _mask(self, pl_module: LightningModule) -> None:
        masks = getattr(self.function, "masks", None)
        if isinstance(masks, Masks):
            masks.apply(pl_module.get_submodule(self.network))

    def _key(self, trainer: Any) -> str:
        held = [callback for callback in trainer.callbacks if isinstance(callback, AfterStep)]
        return f"rarefy.AfterStep.{held.index(self)}"
