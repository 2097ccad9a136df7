"""Movement: a criterion that is gathered while a network is trained.

Two lines in a training loop::

    track = Movement(model)
    ...
    loss.backward()
    track()
    optimizer.step()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.paths import unwrapped
from rarefy.pruning.scoring.criteria import Coupled, Element, movement
from rarefy.pruning.scoring.evidence import Evidence


class Movement:
    """Sums ``-g w`` over the steps of a training: weights that move away from zero score high.

    Call it once before every step of the optimizer, after ``backward()``: gradients that are
    accumulated over several batches count once, when they are complete. Then its
    :attr:`criterion` scores units, its :attr:`element` single weights; both may be given to
    ``GradualUnits`` and ``GradualPruning`` before the training.

    Sanh et al. 2020, https://arxiv.org/abs/2005.07683.

    Args:
        model: the network that is trained.

    Attributes:
        steps: number of calls.
        scores: parameter path -> sums, of the parameter's shape.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = net.weight.data.fill_(2.0)
        >>> track = Movement(net)
        >>> net(torch.ones(1, 1)).sum().backward()
        >>> track()
        >>> track.scores["weight"].item()
        -2.0
    """

    steps: int
    scores: dict[str, Tensor]

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self.steps = 0
        self.scores = {
            path: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for path, p in self._model.named_parameters(remove_duplicate=False)
            if p.is_floating_point()
        }

    @torch.no_grad()
    def __call__(self) -> None:
        """Add what the present gradients say; parameters without a gradient stay.

        Raises:
            InputError: a gradient is NaN or infinite; nothing is added then.
        """
        named = self._model.named_parameters(remove_duplicate=False)
        given = {path: (p, p.grad) for path, p in named if path in self.scores}
        for path, (_, gradient) in given.items():
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise InputError(
                    f"Movement(): gradient of {path}",
                    "it is NaN or infinite",
                    "Lower the learning rate, or leave this step out",
                )
        for path, (parameter, gradient) in given.items():
            if gradient is not None:
                self.scores[path].add_(movement(parameter, gradient))
        self.steps += 1

    @property
    def element(self) -> Element:
        """The criterion for single weights; it has the sums of the time when it is called."""
        return Element(self._so_far)

    @property
    def criterion(self) -> Coupled:
        """The criterion for units: movement summed over what goes with each."""
        return Coupled(self.element, scale="none")

    def _so_far(self, path: str, _: Evidence) -> Tensor:
        """The sums of a parameter.

        Raises:
            InputError: no step was seen.
        """
        if not self.steps:
            raise InputError(
                "Movement", "it has seen no step", "Call it after every backward() of a training"
            )
        return self.scores[path]
