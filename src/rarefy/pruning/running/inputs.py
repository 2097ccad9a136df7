"""What weights are multiplied by, as rows times a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.declarations import resolve
from rarefy.graph.equations import Letters
from rarefy.graph.program import Node, substitute
from rarefy.pruning.running.origins import Origins
from rarefy.pruning.running.products import DECONVOLUTIONS, Product, arranged, roles

CHUNK = 1 << 25
"""Bytes of input rows that are held at once."""


def squares(product: Product, values: Mapping[str, Any], origins: Origins | None = None) -> Tensor:
    """For each entry of the operand, the sum of the squares of all inputs that it is multiplied by.

    The gradient of the sum of all outputs by a weight is the sum of its inputs: this is that
    gradient for squared inputs, whatever the operator.

    Args:
        product: the call.
        values: what it reads, by name.
        origins: of the rows; padding does not count.
    """
    with torch.enable_grad():
        shown = {name: _precise(values[name]) for name in product.node.inputs}
        weight = torch.ones_like(shown[product.weight]).requires_grad_()
        x, dims = shown[product.x].square(), free_dims(product)
        if product.letters is not None:
            x = _of_tokens(x, product.x, dims, origins)
        shown |= {product.x: x, product.weight: weight}
        args = substitute(product.node.args, lambda ref: shown[ref.name])
        options = substitute(product.node.options, lambda ref: shown[ref.name])
        outputs = resolve(product.node.op)(*args, **options)
        if product.letters is None:
            outputs = _of_tokens(outputs, product.node.name, dims, origins)
        (found,) = torch.autograd.grad(outputs.sum(), weight)
    return found


def _of_tokens(value: Tensor, name: str, dims: Sequence[int], origins: Origins | None) -> Tensor:
    """A value with zeros at padding, which some of its dimensions tell."""
    tokens = None if origins is None else origins.tokens_at(name, value.shape, dims)
    if tokens is None:
        return value
    sizes = [size if d in dims else 1 for d, size in enumerate(value.shape)]
    return value * tokens.to(value.device).view(sizes)


def _precise(value: Any) -> Any:
    """Half precision as float32, whose squares it can hold."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))
    return value


@dataclass(frozen=True)
class Rows:
    """Some of the rows of inputs that a weight is multiplied with.

    Attributes:
        inputs: shape (groups, rows, unknowns).
        index: their numbers among all rows.
        every: of how many rows that count, of a part of the examples, they are drawn.
    """

    inputs: Tensor
    index: Tensor
    every: int


def rows(
    product: Product,
    x: Tensor,
    weight: Tensor,
    most: Callable[[int], int] | None = None,
    generator: torch.Generator | None = None,
    origins: Origins | None = None,
) -> Iterator[Rows]:
    """The inputs of all outputs, a part at a time.

    Args:
        product: the call.
        x: its activations.
        weight: its operand that holds the entries.
        most: of the number of rows in a part, how many are enough; these are drawn at random
            before they are put together, which is most of the work for a convolution.
        generator: of the draw.
        origins: of the rows; padding does not count.
    """
    start = 0

    def drawn(counted: Tensor) -> Tensor:
        every = len(counted)
        enough = every if most is None else most(every)
        if enough >= every:
            return counted
        return counted[torch.randperm(every, generator=generator)[:enough]]

    if product.letters is not None:
        shared, _, unknowns = roles(product.letters)
        own = product.letters[0]
        found = arranged(_precise(x), own, shared, _free(product.letters), unknowns)
        counted = _counted(origins, product, x.shape)
        index = drawn(counted)
        if not len(index):
            return
        some = found if len(index) == found.shape[1] else found[:, index.to(x.device)]
        yield Rows(some, index, len(counted))
        return
    x = batched(product, x)
    unknowns_size = prod(weight.shape[2:]) * x.shape[1] * x.element_size()
    places = prod(x.shape[2:]) * (4 if product.node.kind in DECONVOLUTIONS else 1)
    for part in torch.split(x, max(1, CHUNK // max(unknowns_size * places, 1))):
        found = patches(product.node, _precise(part), weight)
        lead = found.shape[: weight.ndim - 1]
        every = lead.numel()
        counted = torch.arange(every)
        if origins is not None and origins.tokens is not None:
            counted = _counted(origins, product, (len(x), 0, *lead[1:]))
            counted = counted[(counted >= start) & (counted < start + every)] - start
        index = drawn(counted)
        first, start = start, start + every
        if not len(index):
            continue
        if len(index) < every:
            found = found[torch.unravel_index(index.to(x.device), lead)]
        inputs = found.reshape(len(index), product.groups, -1).transpose(0, 1)
        yield Rows(inputs, index + first, len(counted))


def _counted(origins: Origins | None, product: Product, shape: Sequence[int]) -> Tensor:
    """Numbers of the rows that are no padding.

    Args:
        origins: of the rows; None where all count.
        product: the call.
        shape: of what tells its rows apart.
    """
    name, dims = row_source(product), free_dims(product)
    tokens = None if origins is None else origins.tokens_at(name, shape, dims)
    if tokens is None:
        return torch.arange(prod(shape[d] for d in dims))
    return tokens.nonzero().flatten()


def row_source(product: Product) -> str:
    """The value whose dimensions tell the rows of a call apart: of a convolution, its result."""
    return product.node.name if product.letters is None else product.x


def free_dims(product: Product) -> list[int]:
    """The dimensions of :func:`row_source` that rows are told apart by."""
    if product.letters is None:
        return [0, *range(2, 2 + product.rank)]
    free = _free(product.letters)
    return [d for d, letter in enumerate(product.letters[0]) if letter in free]


def results(product: Product, y: Tensor) -> Tensor:
    """What the call gives, or should give, as rows of outputs: (groups, rows, outputs of one)."""
    if product.letters is not None:
        shared, outputs, _ = roles(product.letters)
        return arranged(_precise(y), product.letters[2], shared, _free(product.letters), outputs)
    flat = batched(product, _precise(y)).movedim(1, -1)
    return flat.reshape(-1, product.groups, flat.shape[-1] // product.groups).transpose(0, 1)


def places(product: Product, x: Tensor) -> tuple[int, ...]:
    """Sizes of the activations along all dimensions that rows are told apart by."""
    shape = batched(product, x).shape
    return tuple(shape[d] for d in free_dims(product))


def batched(product: Product, value: Tensor) -> Tensor:
    """What a convolution reads or gives, with a dimension of examples where it has none."""
    alone = product.letters is None and value.ndim == product.rank + 1
    return value[None] if alone else value


def _free(letters: tuple[Letters, Letters, Letters]) -> Letters:
    """Letters of the activations that rows are told apart by."""
    return tuple(letter for letter in letters[0] if letter not in letters[1])


def patches(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    """Inputs of a convolution of any rank at all its outputs.

    A view (examples, *places, channels, *kernel), where the kernel is of a plain convolution that
    does the same as a transposed one.
    """
    rank = weight.ndim - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = (each(node.argument(name), rank) for name in ("stride", "dilation"))
    sides = padding(node, kernel, dilation)
    if node.kind in DECONVOLUTIONS:
        x, sides = _spread(node, x, kernel, stride, dilation), []
        stride = [1] * rank
    if sides:
        x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for d in range(rank):
        x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])
        x = x[..., :: dilation[d]]
    return x.movedim(1, 1 + rank)


def _spread(
    node: Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a transposed convolution convolves: its inputs with zeros between and around them."""
    rank = len(kernel)
    cut = each(node.argument("padding"), rank)
    more = each(node.argument("output_padding"), rank)
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    for d in range(rank):  # the places of the inputs, one dimension at a time
        kept = torch.arange(0, size[d], stride[d], device=x.device)
        x = x.new_zeros(*x.shape[: 2 + d], size[d], *x.shape[3 + d :]).index_copy(2 + d, kept, x)
    sides = [
        side
        for d in reversed(range(rank))
        for side in (
            dilation[d] * (kernel[d] - 1) - cut[d],
            dilation[d] * (kernel[d] - 1) - cut[d] + more[d],
        )
    ]
    return F.pad(x, sides)


def each(given: Any, rank: int) -> list[int]:
    """One number per dimension, of one for all or a list of them."""
    values = list(given) if isinstance(given, list | tuple) else [given]
    return values * rank if len(values) == 1 else values


def padding(node: Node, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """How much a convolution pads before and after, along each dimension of its kernel."""
    given = node.argument("padding")
    if given == "valid":
        return [(0, 0)] * len(kernel)
    if given == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in each(given, len(kernel))]
