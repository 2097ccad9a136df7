"""Arithmetic that stays exact and finite: precision, divergences, unit vectors."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def exact(tensor: Tensor) -> AbstractContextManager[object]:
    """Matrix products within are computed as precisely as their inputs, also under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p * (log p - log q)`` element by element; 0 where p is 0, for 0 * log 0 is 0, not NaN."""
    p = log_p.exp()
    impossible = p == 0
    return p * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors divided by their length; 0, with finite gradients, where that is 0."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)


def centered(values: Tensor, dim: int = -1) -> Tensor:
    """Values less their mean, divided by the length of that: the cosine of two is Pearson's r.

    Values that are all equal up to rounding have no direction: they give 0 and no gradient.
    """
    largest = values.detach().abs().amax(dim, keepdim=True)
    scaled = values / largest.masked_fill(largest == 0, 1.0)  # squares must not underflow
    moved = scaled - scaled.mean(dim, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(moved, dim=dim, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * math.sqrt(values.shape[dim])
    constant = length.detach() <= rounding
    return (moved / length.masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
