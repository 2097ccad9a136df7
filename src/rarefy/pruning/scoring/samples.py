"""Gradients of the losses of single samples by parameters, squared and summed, found together.

Linear layers, convolutions and BatchNorms that alone read their parameters sum the squares on the
way back, from what they read and the gradient of what they give: nothing is computed twice, and no
more than a part of the gradients is held. Of every other parameter each sample meets one of its
own, through ``vmap``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.batches import arguments, batch_size, between, is_of, map_tensors, tensors
from rarefy.errors import DataError
from rarefy.graph.program import Node, Ref
from rarefy.pruning.running.inputs import CONVOLUTIONS, TRANSPOSED, each
from rarefy.pruning.running.taps import Watched
from rarefy.pruning.scoring.passes import WHERE, Job
from rarefy.types import Inputs

OWN = 1 << 27
"""Bytes of single samples' gradients that are held at once."""

PART = 1 << 22
"""Of these, what is squared at once: as much as processors keep near."""


class Together:
    """A network of which the gradients of many samples are found in one pass.

    Args:
        job: the pass over the data.
        running: the network.

    Attributes:
        most: samples that it takes at once.
    """

    def __init__(self, job: Job, running: Watched) -> None:
        self._job, self._running = job, running
        self._layers = dict(_layers(running))
        self._means = [node.name for node in running.graph.calls if _is_mean(node)]
        alone = {path for paths, _ in self._layers.values() for path in paths}
        others = [w for path, w in learned(running).items() if path not in alone]
        held = sum(w.numel() * w.element_size() for w in others)
        self.most = max(1, OWN // max(held, 1))

    def squares(self, inputs: Inputs, targets: Tensor | None, some: range) -> dict[str, Tensor]:
        """The sum of the squares of the gradients of some samples of a batch, by path.

        Raises:
            Exception: the network's operators do not take samples together.
        """
        running, size, found = self._running, batch_size(inputs), dict[str, Tensor]()
        own = {
            path: weight.detach().expand(len(some), *weight.shape).requires_grad_()
            for path, weight in learned(running).items()
        }

        def answer(weights: dict[str, Tensor], given: list[Tensor]) -> Any:
            left = iter(given)
            single = map_tensors(lambda t: next(left)[None] if is_of(size, t) else t, inputs)
            return functional_call(running, weights, *arguments(single))

        given = [t[some.start : some.stop] for t in tensors(inputs) if is_of(size, t)]
        for node, (paths, make) in self._layers.items():
            running.instead[node] = _instead(paths, make, found)
        running.instead |= dict.fromkeys(self._means, _mean)
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _at_once():
                each = between(targets, some.start, some.stop, size)
                total = self._job.summed(vmap(answer)(own, given), each, len(some))
            gradients = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        finally:
            running.instead.clear()
        each_own = zip(own, gradients, strict=True)
        # Not in place: gradients of parameters that are added share memory.
        found |= {path: wide(g).square().sum(0) for path, g in each_own if g is not None}
        return finite(found, found.values())


def _is_mean(node: Node) -> bool:
    """Whether a call pools all places into one."""
    return node.kind == "adaptive_avg_pool2d" and list(node.argument("output_size")) == [1, 1]


def _mean(x: Tensor, size: Any) -> Tensor:
    """The same, which ``vmap`` knows in every memory format."""
    return x.mean((-2, -1), keepdim=True)


@contextmanager
def _at_once() -> Iterator[None]:
    """``vmap`` refuses operators that it would call sample by sample, and complain of."""
    switch: Any = torch._C._functorch
    held = switch._is_vmap_fallback_enabled()
    switch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_enabled(held)


# --- layers that alone read their parameters -----------------------------------------------------


class _Layer(Protocol):
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
        x: Tensor, layer: _Layer, report: _Report, weight: Tensor, bias: Tensor | None
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
        layer: _Layer,
        report: _Report,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, int]:
        """All samples at once; their parameters are equal."""
        dim = in_dims[0]
        every = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        given = (None if p is None else p[0] for p in parameters)
        return _Squaring.apply(every, layer, report, *given), 0


_Makes: TypeAlias = Callable[..., _Layer]
"""What a call reads after its input, weight and bias -> the layer."""


def _instead(
    paths: tuple[str, ...], make: _Makes, found: dict[str, Tensor]
) -> Callable[..., Tensor]:
    """What takes the place of a call, and notes what it reports."""

    def report(number: int, squares: Tensor) -> None:
        found[paths[number]] = squares

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
        given: Tensor = _Squaring.apply(x, make(*rest), report, weight, bias)
        return given

    return call


def _layers(running: Watched) -> Iterator[tuple[str, tuple[tuple[str, ...], _Makes]]]:
    """Calls that alone read their parameters, with the paths of these and what they compute."""
    paths = {id(weight): path for path, weight in learned(running).items()}
    held = {
        node.name: paths[id(running.tensor(node.path))]
        for node in running.graph.nodes
        if node.op == "tensor" and id(running.tensor(node.path)) in paths
    }
    uses = Counter(held[n] for node in running.graph.nodes for n in node.inputs if n in held)
    for node in running.graph.calls:
        make = _made(node)
        if make is None or node.options:
            continue
        read = [ref.name for ref in node.args[1:3] if isinstance(ref, Ref)]
        own = tuple(held[name] for name in read if name in held and uses[held[name]] == 1)
        if own and len(own) == len(read):
            yield node.name, (own, make)


def _made(node: Node) -> _Makes | None:
    """What makes the layer that a call is, if it is one of those that are known here."""
    if node.kind == "linear":
        return lambda: _Linear()
    if node.kind == "batch_norm" and node.argument("training") is False:
        return lambda mean, variance, _, __, eps, *___: _BatchNorm(mean, variance, eps)
    transposed = node.kind in TRANSPOSED
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


# --- what is done with gradients -----------------------------------------------------------------


def wide(gradient: Tensor) -> Tensor:
    """In float32 at least: squares of half precision are zero below 2e-4."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def learned(running: Watched) -> dict[str, Tensor]:
    """The parameters that gradients are taken by."""
    return {path: p for path, p in running.named_parameters() if p.requires_grad}


def finite(paths: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by path, those that there are.

    Raises:
        DataError: one is not finite.
    """
    gradients = {p: g for p, g in zip(paths, found, strict=True) if g is not None}
    for path, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                WHERE,
                f"the gradient of the loss by {path} is NaN or infinite",
                "Check the data, the loss and that weight",
            )
    return gradients
