"""What weights are multiplied by: every matrix product and convolution as rows times a matrix.

A weight is a matrix of shape (groups, outputs, unknowns): an output of a group is the sum over the
unknowns of weight times input. Where an operator reads a parameter through views (transposed, a
slice of a packed projection), the entries keep the positions that they have in the parameter, so
that what is found out about them can be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.declarations import is_view, resolve
from rarefy.graph.equations import EQUATIONS, Letters, equation
from rarefy.graph.program import Graph, Node, Ref, substitute

CHUNK = 1 << 25
"""Bytes of input rows that are held at once."""

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
DECONVOLUTIONS = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))


@dataclass(frozen=True)
class Product:
    """A call that multiplies activations with entries of one parameter.

    Attributes:
        node: the call.
        x: name of the activations that it reads.
        weight: name of the operand that holds the entries.
        path: the parameter.
        index: for each entry of the operand, its position in the flattened parameter.
        letters: of the activations, the operand and the result; none for convolutions.
    """

    node: Node
    x: str
    weight: str
    path: str
    index: Tensor
    letters: tuple[Letters, Letters, Letters] | None = None

    @property
    def has_rows(self) -> bool:
        """Whether the activations have all that the weight's outputs are told apart and summed by.

        They have not where the weight broadcasts along them.
        """
        if self.letters is None:
            return True
        shared, _, unknowns = roles(self.letters)
        return {*shared, *unknowns} <= set(self.letters[0])


def products(graph: Graph, parameters: Mapping[str, Tensor]) -> Iterator[Product]:
    """All calls that multiply activations with entries of one parameter, in order."""
    held: dict[str, tuple[str, Any]] = {}  # the parameter, and positions in it
    for node in graph.nodes:
        if node.op == "tensor" and node.path in parameters:
            shape = parameters[node.path].shape
            held[node.name] = node.path, torch.arange(prod(shape)).view(shape)
        elif is_view(node.op) and set(node.inputs) <= held.keys() and len(set(node.inputs)) == 1:
            path, index = held[node.inputs[0]]
            view = _viewed(node, index)
            if view is not None:
                held[node.name] = path, view
        else:
            yield from _product(graph, node, held)


def _viewed(node: Node, index: Any) -> Any:
    """A view of the positions, or several, as the call takes it of the entries; else None."""
    args = substitute(node.args, lambda ref: index)
    try:
        return resolve(node.op)(*args, **substitute(node.options, lambda ref: index))
    except RuntimeError:
        return None


def _product(graph: Graph, node: Node, held: Mapping[str, tuple[str, Tensor]]) -> Iterator[Product]:
    kind = node.kind.removesuffix("_")
    letters = None
    if kind in CONVOLUTIONS | DECONVOLUTIONS:
        operands: Sequence[Any] = node.args[:2]
    elif kind in EQUATIONS:
        found = equation(node, lambda ref: len(graph.by_name[ref.name].shape))
        if found is None or found.differs:
            return
        operands = [operand for operand, _ in found.operands]
        letters = [spelled for _, spelled in found.operands], found.result
    else:
        return
    if len(operands) != 2 or not all(isinstance(operand, Ref) for operand in operands):
        return
    kept = [operand.name in held for operand in operands]
    if sum(kept) != 1:
        return
    w = kept.index(True)
    if letters is None and w == 0:
        return  # the parameter is what is convolved
    spelled = None if letters is None else (letters[0][1 - w], letters[0][w], letters[1])
    path, index = held[operands[w].name]
    yield Product(node, operands[1 - w].name, operands[w].name, path, index, spelled)


def squares(product: Product, values: Mapping[str, Any]) -> Tensor:
    """For each entry of the operand, the sum of the squares of all inputs that it is multiplied by.

    The gradient of the sum of all outputs by a weight is the sum of its inputs: this is that
    gradient for squared inputs, whatever the operator.
    """
    with torch.enable_grad():
        shown = {name: _precise(values[name]) for name in product.node.inputs}
        weight = torch.ones_like(shown[product.weight]).requires_grad_()
        shown |= {product.x: shown[product.x].square(), product.weight: weight}
        args = substitute(product.node.args, lambda ref: shown[ref.name])
        options = substitute(product.node.options, lambda ref: shown[ref.name])
        outputs = resolve(product.node.op)(*args, **options)
        (found,) = torch.autograd.grad(outputs.sum(), weight)
    return found


def _precise(value: Any) -> Any:
    """Half precision as float32, whose squares it can hold."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))
    return value


def matrix(product: Product, weight: Tensor) -> Tensor:
    """Entries of the operand (or their positions) as (groups, outputs, unknowns)."""
    if product.letters is not None:
        shared, outputs, unknowns = roles(product.letters)
        return _arranged(weight, product.letters[1], shared, outputs, unknowns)
    groups = int(product.node.argument("groups"))
    if product.node.kind in DECONVOLUTIONS:
        inputs, outs = weight.shape[:2]
        split = weight.reshape(groups, inputs // groups, outs, *weight.shape[2:])
        dims = tuple(range(3, split.ndim))
        return split.transpose(1, 2).flip(dims).reshape(groups, outs, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def rows(
    product: Product,
    x: Tensor,
    weight: Tensor,
    most: Callable[[int], int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, int]]:
    """The inputs of all outputs, a part at a time.

    Args:
        product: the call.
        x: its activations.
        weight: its operand that holds the entries.
        most: of the number of rows in a part, how many are enough; these are drawn at random
            before they are put together, which is most of the work for a convolution.
        generator: of the draw.

    Yields:
        (groups, rows, unknowns), and how many rows there are in the part.
    """

    def drawn(every: int) -> Tensor | None:
        enough = every if most is None else most(every)
        return None if enough >= every else torch.randperm(every, generator=generator)[:enough]

    if product.letters is not None:
        shared, _, unknowns = roles(product.letters)
        own = product.letters[0]
        free = tuple(letter for letter in own if letter not in (*shared, *unknowns))
        found = _arranged(_precise(x), own, shared, free, unknowns)
        chosen = drawn(found.shape[1])
        yield found if chosen is None else found[:, chosen.to(x.device)], found.shape[1]
        return
    if x.ndim < weight.ndim:
        x = x[None]
    groups = int(product.node.argument("groups"))
    unknowns_size = prod(weight.shape[2:]) * x.shape[1] * x.element_size()
    places = prod(x.shape[2:]) * (4 if product.node.kind in DECONVOLUTIONS else 1)
    for part in torch.split(x, max(1, CHUNK // max(unknowns_size * places, 1))):
        found = patches(product.node, _precise(part), weight)
        lead = found.shape[: weight.ndim - 1]
        every, chosen = lead.numel(), drawn(lead.numel())
        if chosen is not None:
            found = found[torch.unravel_index(chosen.to(x.device), lead)]
        count = every if chosen is None else len(chosen)
        yield found.reshape(count, groups, -1).transpose(0, 1), every


def roles(letters: tuple[Letters, Letters, Letters]) -> tuple[Letters, Letters, Letters]:
    """Letters of the weight that are shared with both others, its own outputs, and summed over."""
    x, weight, result = letters
    shared = tuple(letter for letter in weight if letter in x and letter in result)
    outputs = tuple(letter for letter in weight if letter not in x)
    unknowns = tuple(letter for letter in weight if letter in x and letter not in result)
    return shared, outputs, unknowns


def _arranged(tensor: Tensor, own: Letters, *merged: Letters) -> Tensor:
    """A tensor whose dimensions are merged role by role."""
    order = [own.index(letter) for role in merged for letter in role]
    sizes = [prod(tensor.shape[own.index(letter)] for letter in role) for role in merged]
    return tensor.permute(order).reshape(sizes)


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
