"""Quantized weights as codes of one byte each, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rarefy.grid import Grid
from rarefy.storage.pack import Bytes, damaged, to_bytes


def quantize(tensor: Tensor, grid: Grid) -> Bytes:
    """Codes of a tensor that lies on ``grid``, as ``(count, 1)`` bytes.

    The code is stored as its distance from the zero point, modulo 256 or 16: zeros of pruning are
    zero bytes in every channel.
    """
    return to_bytes((grid.steps(tensor.cpu()) & _modulus(grid)).to(torch.uint8))


def dequantize(codes: Bytes, shape: tuple[int, ...], grid: Grid) -> Tensor:
    """Values of :func:`quantize`'s codes, float32 of ``shape``.

    Raises:
        FormatError: a code is out of the grid's range.
    """
    steps = torch.from_numpy(codes.reshape(-1).astype(np.int32)).reshape(shape)
    zero = grid.spread(grid.zero_point.to(torch.int32), shape)
    code = ((steps + zero - grid.low) & _modulus(grid)) + grid.low
    if code.numel() and int(code.max()) > grid.high:
        raise damaged("quantized tensor", f"a code is above {grid.high}")
    return grid.values(code - zero)


def _modulus(grid: Grid) -> int:
    return 255 if grid.bits is None else 15
