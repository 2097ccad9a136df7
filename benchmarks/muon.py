"""An optimizer for short trainings of convolutional networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration brings singular values near 1."""


class Muon(torch.optim.Optimizer):
    """Muon on the kernels of convolutions, each as a matrix (outputs, inputs x taps), and SGD with
    momentum on all else (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
    networks"; ``torch.optim.Muon`` takes matrices alone). Kernels are not decayed.

    Args:
        params: parameters, or groups of them.
        lr: learning rate of what SGD changes.
        share: learning rate of the kernels as a share of it.
        momentum: of both.
    """

    def __init__(
        self, params: Any, lr: float = 0.02, *, share: float = 0.5, momentum: float = 0.9
    ) -> None:
        super().__init__(params, {"lr": lr, "share": share, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for weight in (p for p in group["params"] if p.grad is not None):
                kernel = weight.ndim == 4
                gradient = weight.grad
                if not kernel:
                    gradient = gradient.add(weight, alpha=group.get("weight_decay", 0))
                mean = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                mean.mul_(momentum).add_(gradient)
                if kernel:
                    step = orthogonal((gradient + momentum * mean).flatten(1)).view_as(weight)
                    weight.add_(step, alpha=-group["lr"] * group["share"])
                else:
                    weight.add_(mean, alpha=-group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns, longer for tall ones."""
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / (x.norm() + 1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return (x.T if rows > columns else x) * max(1.0, rows / columns) ** 0.5
