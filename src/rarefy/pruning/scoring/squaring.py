"""Layers that sum the squares of single samples' gradients by their parameters on the way back.

They know them of what they read and the gradient of what they give: nothing is computed twice, and
no more than a part of the gradients is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.program import Node, Ref
from rarefy.pruning.running.inputs import each
from rarefy.pruning.running.products import CONVOLUTIONS, DECONVOLUTIONS
from rarefy.pruning.running.taps import Watched

PART = 1 << 22
"""Bytes of single samples' gradients that are squared at once: as much as processors keep near."""


def wide(gradient: Tensor) -> Tensor:
    """In float32 at least: squares of half precision are zero below 2e-4."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def learned(running: Watched) -> dict[str, Tensor]:
    """The parameters that gradients are taken by."""
    return {path: p for path, p in running.named_parameters() if p.requires_grad}


class Layer(Protocol):
    """What a layer computes of ``x``, which holds samples along the first dimension.

    ``given`` is the gradient of what it gives.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's outputs."""

    def pulled(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient by ``x``."""

    def weights(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The squares of each sample's gradient by the weight, summed."""

    def biases(self, given: Tensor, weight: Tensor) -> Tensor:
        """Each sample's gradient by the bias."""


@dataclass(frozen=True)
class _Linear:
    """``y = x W^T + b``."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def pulled(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return given @ weight

    def weights(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Where a sample has one row, its gradient is an outer product, and so are the squares."""
        y, x = (wide(t.reshape(len(t), -1, t.shape[-1])) for t in (given, x))
        if y.shape[1] == 1:
            return y[:, 0].square().T @ x[:, 0].square()
        return _summed(lambda y, x: y.transpose(1, 2) @ x, y, x, weight)

    def biases(self, given: Tensor, weight: Tensor) -> Tensor:
        return given.reshape(len(given), -1, given.shape[-1]).sum(1)


@dataclass(frozen=True)
class _Convolution:
    """A convolution or a transposed one.

    Args:
        settings: stride, padding, dilation, whether transposed and output padding.
        groups: of channels.
    """

    settings: tuple[Any, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        places = weight.ndim - 1
        flat = x.reshape(-1, *x.shape[-places:])
        stride, padding, dilation, transposed, more = self.settings
        flat = torch.convolution(
            flat, weight, bias, stride, padding, dilation, transposed, more, self.groups
        )
        return flat.view(*x.shape[:-places], *flat.shape[1:])

    def pulled(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        places = weight.ndim - 1
        y, flat = (t.reshape(-1, *t.shape[-places:]) for t in (given, x))
        return self._backward(y, flat, weight, 0, self.groups).view_as(x)

    def weights(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        places = weight.ndim - 1
        y, x = (t.reshape(len(t), -1, *t.shape[-places:]) for t in (given, x))
        return _summed(partial(self._each, weight), y, x, weight)

    def biases(self, given: Tensor, weight: Tensor) -> Tensor:
        return _by_channel(given, weight.ndim - 2).sum((1, 3))

    def _each(self, weight: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Each sample's gradient by the weight: a grouped convolution's, of samples as groups."""
        samples = len(x)
        y, x = (t.transpose(0, 1).flatten(1, 2) for t in (y, x))
        shape = (samples * weight.shape[0], *weight.shape[1:])
        own = weight.new_empty(1).expand(shape)  # its values are not read
        found = self._backward(y, x, own, 1, samples * self.groups)
        return found.view(samples, *weight.shape)

    def _backward(self, y: Tensor, x: Tensor, weight: Tensor, which: int, groups: int) -> Tensor:
        wanted = [number == which for number in range(3)]
        backward = torch.ops.aten.convolution_backward.default
        found: Tensor = backward(y, x, weight, None, *self.settings, groups, wanted)[which]
        return found


@dataclass(frozen=True, eq=False)
class _BatchNorm:
    """``y = (x - mean) / sqrt(variance + eps) W + b``, with running statistics."""

    mean: Tensor
    variance: Tensor
    eps: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = F.batch_norm(x.flatten(0, 1), self.mean, self.variance, weight, bias, eps=self.eps)
        return found.view_as(x)

    def pulled(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return given * _along(weight * self._scale, x)

    def weights(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        places = x.ndim - 3
        y, x = (_by_channel(wide(t), places) for t in (given, x - _along(self.mean, x)))
        return (torch.einsum("nbcp,nbcp->nc", y, x) * self._scale).square_().sum(0)

    def biases(self, given: Tensor, weight: Tensor) -> Tensor:
        return _by_channel(given, given.ndim - 3).sum((1, 3))

    @property
    def _scale(self) -> Tensor:
        return (self.variance + self.eps).rsqrt()


@dataclass(frozen=True)
class _Embedding:
    """``y = W[x]``; a padding index has no gradient."""

    padding: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def pulled(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("indices have no gradient")

    def weights(self, given: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """A sample's gradient by a row is the sum over the places that read it."""
        rows, own = len(weight), x.reshape(len(x), -1)
        numbers = torch.arange(len(x), device=x.device)[:, None] * rows + own
        pairs, places = torch.unique(numbers, return_inverse=True)
        given = wide(given).reshape(-1, weight.shape[1])
        sums = given.new_zeros(len(pairs), weight.shape[1]).index_add_(0, places.flatten(), given)
        found = torch.zeros_like(weight, dtype=given.dtype)
        found.index_add_(0, pairs % rows, sums.square_())
        return found if self.padding < 0 else found.index_fill_(0, x.new_tensor(self.padding), 0)

    def biases(self, given: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("an embedding has no bias")


def _along(values: Tensor, x: Tensor) -> Tensor:
    """One value for each channel, where samples are batches of (rows, channels, *places)."""
    return values.view(-1, *[1] * (x.ndim - 3))


def _by_channel(tensor: Tensor, places: int) -> Tensor:
    """(samples, rows of each, channels, places), of which the last are so many dimensions."""
    channel = tensor.ndim - 1 - places
    return tensor.reshape(len(tensor), -1, tensor.shape[channel], prod(tensor.shape[channel + 1 :]))


def _summed(
    gradients: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor, weight: Tensor
) -> Tensor:
    """The squares of gradients that are found sample by sample, some at a time, summed."""
    most = max(1, PART // max(weight.numel() * weight.element_size(), 1))
    parts = zip(torch.split(y, most), torch.split(x, most), strict=True)
    total = torch.zeros(weight.shape, dtype=wide(weight[:0]).dtype, device=weight.device)
    for part in parts:
        total += wide(gradients(*part)).square_().sum(0)
    return total


_Report: TypeAlias = Callable[[int, Tensor], None]
"""Takes the number of a parameter, 0 for the weight, and the sum of squares by it."""


class _Squaring(torch.autograd.Function):
    """A layer that reports the squares of its samples' gradients by its parameters.

    These have no gradient besides.
    """

    @staticmethod
    def forward(
        x: Tensor, layer: Layer, report: _Report, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """What the layer gives, samples along the first dimension."""
        return layer(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the way back needs."""
        x, ctx.layer, ctx.report, weight, ctx.bias = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        """Report, and hand the gradient on."""
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        ctx.report(0, layer.weights(given[0], x, weight))
        if ctx.bias is not None:
            ctx.report(1, wide(layer.biases(given[0], weight)).square_().sum(0))
        pulled = layer.pulled(given[0], x, weight) if ctx.needs_input_grad[0] else None
        return pulled, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        layer: Layer,
        report: _Report,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, int]:
        """All samples at once; their parameters are equal."""
        dim = in_dims[0]
        every = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        given = (None if p is None else p[0] for p in parameters)
        return _Squaring.apply(every, layer, report, *given), 0


@dataclass(frozen=True)
class Reader:
    """A call that alone reads its parameters.

    Attributes:
        paths: of the weight, and of the bias where there is one.
        make: what the call reads after its input and parameters -> what it computes.
        first: whether it reads the weight before its input.
    """

    paths: tuple[str, ...]
    make: Callable[..., Layer]
    first: bool = False

    def instead(self, found: dict[str, Tensor]) -> Callable[..., Tensor]:
        """What takes the place of the call, and notes the squares by path."""

        def report(number: int, squares: Tensor) -> None:
            found[self.paths[number]] = squares

        def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
            given: Tensor = _Squaring.apply(x, self.make(*rest), report, weight, bias)
            return given

        return (lambda weight, x, *rest: call(x, weight, None, *rest)) if self.first else call


def readers(running: Watched) -> Iterator[tuple[str, Reader]]:
    """Calls that alone read their parameters, as far as they are known here."""
    paths = {id(weight): path for path, weight in learned(running).items()}
    held = {
        node.name: paths[id(running.tensor(node.path))]
        for node in running.graph.nodes
        if node.op == "tensor" and id(running.tensor(node.path)) in paths
    }
    uses = Counter(held[n] for node in running.graph.nodes for n in node.inputs if n in held)
    for node in running.graph.calls:
        make, first = _made(node), node.kind == "embedding"
        if make is None or node.options:
            continue
        weight, *rest = node.args[:1] if first else node.args[1:3]
        read = [ref.name for ref in (weight, *rest) if isinstance(ref, Ref)]
        own = tuple(held[name] for name in read if name in held and uses[held[name]] == 1)
        if isinstance(weight, Ref) and len(own) == len(read):
            yield node.name, Reader(own, make, first)


def _made(node: Node) -> Callable[..., Layer] | None:
    """What makes the layer that a call is, if it is one of those that are known here."""
    if node.kind == "linear":
        return lambda: _Linear()
    if node.kind == "embedding" and not node.argument("scale_grad_by_freq"):
        return lambda padding=-1, *_: _Embedding(padding)
    if node.kind == "batch_norm" and node.argument("training") is False:
        return lambda mean, variance, _, __, eps, *___: _BatchNorm(mean, variance, eps)
    transposed = node.kind in DECONVOLUTIONS
    if not transposed and node.kind not in CONVOLUTIONS:
        return None
    rank = int(node.kind[-2])
    names = ("stride", "padding", "dilation", "output_padding" if transposed else "")
    given = [node.argument(name) for name in names]
    if isinstance(given[1], str):
        return None
    stride, padding, dilation, more = (each(0 if g is None else g, rank) for g in given)
    settings, groups = (stride, padding, dilation, transposed, more), node.argument("groups")
    return lambda *_: _Convolution(settings, groups)
