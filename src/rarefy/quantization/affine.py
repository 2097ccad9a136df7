"""The one copy of the scale and zero-point arithmetic.

A real number x is stored as the integer ``q = clamp(round(x / scale) + zero_point, qmin, qmax)``
and read back as ``(q - zero_point) * scale``; ties round to even, as in ONNX's QuantizeLinear.
Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rarefy.errors import InputError

WEIGHT_QMAX = 127
"""Weights use -127..127: symmetric, so that the zero point is 0 and negation stays on the grid."""

SMALLEST_RANGE = 1e-20
"""A narrower range has no scale that single precision can invert."""


@dataclass(frozen=True)
class Affine:
    """The grid of one tensor: the integers qmin..qmax, spaced by ``scale`` around ``zero_point``.

    Attributes:
        scale: distance of two neighbors, a single-precision number above 0.
        zero_point: the integer that stands for 0.
        qmin: smallest integer.
        qmax: largest integer.
    """

    scale: float
    zero_point: int
    qmin: int = 0
    qmax: int = 255

    @property
    def low(self) -> float:
        """The smallest number on the grid."""
        return (self.qmin - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest number on the grid."""
        return (self.qmax - self.zero_point) * self.scale


def affine(low: float, high: float, qmin: int = 0, qmax: int = 255) -> Affine:
    """The grid that covers a range of values and holds 0 exactly.

    Args:
        low: smallest value; widened to 0 where it is above.
        high: largest value; widened to 0 where it is below.
        qmin: smallest integer.
        qmax: largest integer.

    Returns:
        Scale and zero point; for ``low >= 0`` the zero point is ``qmin``.

    Raises:
        InputError: the range is not finite, upside down, or nothing but 0.

    Example:
        >>> affine(0.0, 51.0)
        Affine(scale=0.19999998807907104, zero_point=0, qmin=0, qmax=255)
    """
    where = f"affine(low={low!r}, high={high!r})"
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(where, "this is no range", "Give finite numbers, the smaller one first")
    low, high = min(low, 0.0), max(high, 0.0)
    if not SMALLEST_RANGE < high - low < np.finfo(np.float32).max:
        raise InputError(
            where, "the range is empty or beyond single precision", "Keep the tensor in float"
        )
    scale = _towards_zero((high - low) / (qmax - qmin))
    zero_point = round(qmin - low / scale)
    return Affine(scale, min(max(zero_point, qmin), qmax), qmin, qmax)


def _towards_zero(value: float) -> float:
    """Single precision, never above ``value``: the grid of a clip stays inside of its bounds."""
    rounded = np.float32(value)
    if float(rounded) > value:
        rounded = np.nextafter(rounded, np.float32(0))
    return float(rounded)


def channel_scales(weight: Tensor, axis: int = 0) -> Tensor:
    """Symmetric scales of the slices along ``axis``; 1 for a slice of zeros.

    Args:
        weight: any shape.
        axis: the dimension that has a scale per index.

    Returns:
        Shape ``(weight.shape[axis],)``, single precision.
    """
    others = [d for d in range(weight.ndim) if d != axis % weight.ndim]
    reach = weight.detach().float().abs().amax(others) if others else weight.detach().float().abs()
    scales = reach / WEIGHT_QMAX
    return torch.where(reach > SMALLEST_RANGE, scales, torch.ones_like(scales))


def quantize(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, qmin: int, qmax: int
) -> Tensor:
    """Integers of ``x``; scale and zero point broadcast against it.

    Returns:
        Shape of ``x``, int32.
    """
    return (torch.round(x / scale) + zero_point).clamp(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor | float, zero_point: Tensor | int) -> Tensor:
    """Real numbers that the integers ``q`` stand for, single precision, shape of ``q``."""
    return (q - zero_point).to(torch.float32) * scale


def along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector shaped to broadcast along ``axis`` of a tensor with ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize_weight(weight: Tensor, scales: Tensor, axis: int = 0) -> Tensor:
    """Signed 8-bit integers of a weight with a symmetric scale per index of ``axis``.

    Returns:
        Shape of ``weight``, int8.
    """
    spread = along(scales, axis, weight.ndim)
    return quantize(weight, spread, 0, -WEIGHT_QMAX, WEIGHT_QMAX).to(torch.int8)


def fake_quantize(x: Tensor, grid: Affine) -> Tensor:
    """``x`` rounded to the grid and clamped to its ends, in its own dtype."""
    q = quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    return dequantize(q, grid.scale, grid.zero_point).to(x.dtype)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite for equal tensors, NaN where there is NaN.

    Args:
        reference: the exact values, any shape.
        approximation: the same shape.

    Example:
        >>> round(sqnr(torch.tensor([10.0]), torch.tensor([9.0])), 3)
        20.0
    """
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - approximation.double()).square().sum())
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf
