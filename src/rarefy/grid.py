"""The values that a quantized weight may take, and which weights of a network lie on them.

A network whose weights alone are quantized stays an instance of its own class and computes in
float. Its grids are kept beside the weights, so that a file can hold codes instead of floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from rarefy.errors import InputError

KEY = "_rarefy_grids"
"""Attribute of a network: path of a weight -> the grid that it was rounded to."""


@dataclass(frozen=True)
class Grid:
    """Where the values of a quantized tensor lie: ``(q - zero_point) * scale`` in float32.

    Attributes:
        scale: one scale, shape ``()``; one per index of ``axis``, ``(channels,)``; or one per
            block of ``group`` neighbors, ``(channels, blocks)``. Blocks lie along the other
            dimensions, in their order and flattened; the last may be shorter.
        zero_point: shape ``()``, or that of ``scale``; whole numbers.
        axis: the dimension that has scales of its own; 0 where there is one scale.
        low: the smallest code.
        high: the largest code.
        group: neighbors that share a scale; None for all of a channel.

    Example:
        >>> grid = Grid(torch.tensor([0.5, 1.0]), torch.tensor(0), 0, -7, 7)
        >>> grid.nearest(torch.tensor([[0.3, -9.0], [0.3, -9.0]])).tolist()
        [[0.5, -3.5], [0.0, -7.0]]
    """

    scale: Tensor
    zero_point: Tensor
    axis: int
    low: int
    high: int
    group: int | None = None

    @property
    def bits(self) -> int | None:
        """4 where two codes share a byte, else None."""
        return 4 if self.high - self.low < 16 else None

    def shape_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor, where there is more than one."""
        channels = shape[self.axis : self.axis + 1]
        if self.group is None:
            return channels
        return (*channels, -(-columns(shape, self.axis) // self.group))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether scales and zero points are those of a tensor of this shape."""
        if self.axis >= len(shape) and self.scale.ndim:
            return False
        allowed = ((), self.shape_for(shape))
        return all(tuple(t.shape) in allowed for t in (self.scale, self.zero_point))

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales or zero points, shaped to broadcast against a tensor of ``shape``."""
        if values.ndim == 0:
            return values
        if values.ndim == 1:
            return values.reshape([-1 if d == self.axis else 1 for d in range(len(shape))])
        count = columns(shape, self.axis)
        size = min(self.group or count, count)  # whatever a file says, no more than is needed
        each = values.repeat_interleave(size, 1)[:, :count]
        return as_weight(each, shape, self.axis)

    def steps(self, tensor: Tensor) -> Tensor:
        """Distances from the zero point of the nearest values, int32 of the tensor's shape."""
        scale, zero = (
            self.spread(t.to(tensor.device), tuple(tensor.shape))
            for t in (self.scale, self.zero_point)
        )
        steps = torch.round(tensor.detach().float() / scale).to(torch.int32)
        return (steps + zero.to(torch.int32)).clamp(self.low, self.high) - zero.to(torch.int32)

    def values(self, steps: Tensor) -> Tensor:
        """What steps stand for, float32 of their shape."""
        return steps.to(torch.float32) * self.spread(
            self.scale.to(steps.device), tuple(steps.shape)
        )

    def nearest(self, tensor: Tensor) -> Tensor:
        """The nearest values, in the tensor's dtype."""
        return self.values(self.steps(tensor)).to(tensor.dtype)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is of this grid's shape and lies on it, bit for bit."""
        if not self.fits(tuple(tensor.shape)) or not bool(torch.isfinite(tensor).all()):
            return False
        found = self.nearest(tensor)
        return torch.equal(found, tensor) and not bool((tensor.signbit() & (tensor == 0)).any())


def columns(shape: tuple[int, ...], axis: int) -> int:
    """Entries of a channel: the product of all sizes but that of ``axis``."""
    return prod(size for dim, size in enumerate(shape) if dim != axis)


def as_matrix(tensor: Tensor, axis: int) -> Tensor:
    """``axis`` first, all other dimensions in their order as the second."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def as_weight(matrix: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The inverse of :func:`as_matrix`."""
    others = [size for dim, size in enumerate(shape) if dim != axis]
    return matrix.reshape(shape[axis], *others).movedim(0, axis)


def grids(model: nn.Module) -> Mapping[str, Grid]:
    """The grids that weights of a network were rounded to, by path; empty for other networks.

    Training or setting a weight leaves its grid behind: ask :meth:`Grid.holds`.
    """
    found: Mapping[str, Grid] = vars(model).get(KEY, {})
    return found


def put_grids(model: nn.Module, found: Mapping[str, Grid]) -> None:
    """Note the grids of a network's weights, in place of those that it had."""
    vars(model).pop(KEY, None)
    if found:
        vars(model)[KEY] = dict(found)


def check_float(model: nn.Module, where: str) -> None:
    """Pass where no weight of a network has a grid yet.

    Raises:
        InputError: some have.
    """
    if grids(model):
        raise InputError(where, "its weights are quantized already", "Give the float model")
