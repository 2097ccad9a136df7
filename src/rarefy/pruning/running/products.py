"""Where a network multiplies activations with a parameter: every matrix product and convolution.

A weight is a matrix of shape (groups, outputs, unknowns): an output of a group is the sum over the
unknowns of weight times input. Where an operator reads a parameter through views (transposed, a
slice of a packed projection), the entries keep the positions that they have in the parameter, so
that what is found out about them can be put back.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from rarefy.graph.declarations import is_view, resolve
from rarefy.graph.equations import EQUATIONS, Letters, equation
from rarefy.graph.program import Graph, Node, Ref, Spec, Value, substitute

CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
DECONVOLUTIONS = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))


@dataclass(frozen=True)
class Entries:
    """Entries of one parameter, as calls hand them on.

    Attributes:
        path: of the parameter.
        shape: of the parameter.
        way: the calls, in order: views, casts, and a fake quantizer.
    """

    path: str
    shape: tuple[int, ...]
    way: tuple[Node, ...] = ()

    @property
    def index(self) -> Tensor:
        """For each entry that is handed on, its position in the flattened parameter."""
        if self.views:
            with suppress(RuntimeError):  # of a large parameter, no more than is handed on
                steps = [viewed(self.views, where) for where in _steps(self.shape)]
                return torch.stack(steps).sum(0)
        found: Tensor = viewed(self.views, torch.arange(prod(self.shape)).view(self.shape))
        return found

    @cached_property
    def span(self) -> tuple[int, int]:
        """The first and the last of these positions."""
        index = self.index
        return (int(index.min()), int(index.max())) if index.numel() else (0, -1)

    @property
    def quantizer(self) -> Node | None:
        """What rounds them on their way."""
        return next(filter(is_rounding, self.way), None)

    @property
    def views(self) -> tuple[Node, ...]:
        """The calls that hand on some of them, or all in another order."""
        return tuple(node for node in self.way if not keeps_places(node))

    @property
    def key(self) -> Hashable:
        """Equal for the same entries in the same shape, rounded by the same call."""
        views = (
            (node.op, repr(substitute((node.args, dict(node.options)), _nothing)))
            for node in self.views
        )
        return (self.path, self.quantizer and self.quantizer.name, *views)

    def overlap(self, other: Entries) -> bool:
        """Whether some entries are among both."""
        if self.path != other.path:
            return False
        if not self.views or not other.views:
            return True
        if self.span[1] < other.span[0] or other.span[1] < self.span[0]:
            return False
        return bool(torch.isin(self.index, other.index).any())


def _steps(shape: Sequence[int]) -> Iterator[Tensor]:
    """Of the position of each entry, what each dimension adds to it, in the memory of one line."""
    for dim, size in enumerate(shape):
        line = torch.arange(size) * prod(shape[dim + 1 :])
        yield line.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(tuple(shape))


def _nothing(ref: Ref) -> None:
    """In place of a value."""


def is_rounding(node: Node) -> bool:
    """Whether a call hands on what it is given, but rounded."""
    return node.kind.startswith("fake_quantize")


def keeps_places(node: Node) -> bool:
    """Whether a call hands on all that it is given, each entry in its place: rounded, or cast."""
    return is_rounding(node) or node.kind == "to"


def viewed(way: Sequence[Node], tensor: Tensor) -> Any:
    """What becomes of a tensor, or of several, where calls hand it on: all but its values.

    Raises:
        RuntimeError: a call does not take a tensor like this.
    """
    found: Any = tensor
    for node in way:
        if not keeps_places(node):
            found = _handed_on(node, found)
    return found


def _handed_on(node: Node, value: Any) -> Any:
    """What a view gives of a value."""
    args, options = (substitute(given, lambda ref: value) for given in (node.args, node.options))
    return resolve(node.op)(*args, **options)


@dataclass(frozen=True)
class Product:
    """A call that multiplies activations with entries of one parameter.

    Attributes:
        node: the call.
        x: name of the activations that it reads.
        weight: name of the operand that holds the entries.
        entries: these.
        letters: of the activations, the operand and the result; none for convolutions.
        added: name of what is added to the products; None for nothing.
        bias: the entries of one parameter that this is, if it is.
    """

    node: Node
    x: str
    weight: str
    entries: Entries
    letters: tuple[Letters, Letters, Letters] | None = None
    added: str | None = None
    bias: Entries | None = None

    @property
    def path(self) -> str:
        """The parameter."""
        return self.entries.path

    @property
    def index(self) -> Tensor:
        """For each entry of the operand, its position in the flattened parameter."""
        return self.entries.index

    @property
    def ways(self) -> tuple[tuple[Node, ...], ...]:
        """The calls that hand on what it reads of the network alone: its weight, and its bias."""
        return tuple(own.way for own in (self.entries, self.bias) if own is not None)

    @property
    def has_rows(self) -> bool:
        """Whether the activations have all that the weight's outputs are told apart and summed by.

        They have not where the weight broadcasts along them.
        """
        if self.letters is None:
            return True
        shared, _, unknowns = roles(self.letters)
        return {*shared, *unknowns} <= set(self.letters[0])

    @property
    def rank(self) -> int:
        """Dimensions of a convolution's kernel; 0 for others."""
        return 0 if self.letters is not None else int(self.node.kind[-2])

    @property
    def groups(self) -> int:
        """Groups of channels of a convolution; 1 for others."""
        return 1 if self.letters is not None else int(self.node.argument("groups"))


def products(graph: Graph, paths: Collection[str]) -> Iterator[Product]:
    """All calls that multiply activations with entries of one of these parameters, in order."""
    return multiplying(graph, handed(graph, paths))


def multiplying(graph: Graph, held: Mapping[str, Entries]) -> Iterator[Product]:
    """All calls that multiply activations with what a node hands on, in order.

    Args:
        graph: any.
        held: as :func:`handed` returns it.
    """
    for node in graph.calls:
        if node.name not in held:
            yield from _product(graph, node, held)


def handed(graph: Graph, paths: Collection[str]) -> Mapping[str, Entries]:
    """For each node that hands on entries of one of these parameters, which they are."""
    held: dict[str, tuple[Entries, Any]] = {}
    for node in graph.nodes:
        if node.op == "tensor" and node.path in paths and _is_real(node.value):
            entries = Entries(node.path, node.shape)
            held[node.name] = entries, torch.empty(node.shape, device="meta")
        elif node.inputs and node.inputs[0] in held and _hands_on(graph, node):
            entries, value = held[node.inputs[0]]
            with suppress(RuntimeError):
                value = viewed([node], value)
                held[node.name] = replace(entries, way=(*entries.way, node)), value
    return {name: entries for name, (entries, _) in held.items()}


def _hands_on(graph: Graph, node: Node) -> bool:
    """Whether a call gives entries of what it reads first, by what the network alone tells."""
    if is_rounding(node):
        return all(graph.by_name[name].op == "tensor" for name in node.inputs[1:])
    is_alone = is_view(node.op) and len({*node.inputs}) == 1
    return is_alone and _is_real(node.value)


def _is_real(value: Value) -> bool:
    """Whether it is a tensor of real numbers, or several of them."""
    if isinstance(value, tuple):
        return all(map(_is_real, value))
    return isinstance(value, Spec) and value.dtype.is_floating_point


def _product(graph: Graph, node: Node, held: Mapping[str, Entries]) -> Iterator[Product]:
    kind = node.kind.removesuffix("_")
    letters, added = None, node.argument("bias")
    if kind in CONVOLUTIONS | DECONVOLUTIONS:
        operands: Sequence[Any] = node.args[:2]
    elif kind in EQUATIONS:
        found = equation(node, lambda ref: len(graph.by_name[ref.name].shape))
        if found is None or found.differs:
            return
        operands = [operand for operand, _ in found.operands]
        letters, added = ([spelled for _, spelled in found.operands], found.result), found.added
    else:
        return
    if len(operands) != 2 or not all(isinstance(operand, Ref) for operand in operands):
        return
    if operands[0] == operands[1]:
        return  # a square
    kept = [operand.name in held for operand in operands]
    if not any(kept):
        return
    w = int(kept[1])  # of two parameters, the second is multiplied with
    if letters is None and w == 0:
        return  # the parameter is what is convolved
    spelled = None if letters is None else (letters[0][1 - w], letters[0][w], letters[1])
    name = added.name if isinstance(added, Ref) else None
    entries, bias = held[operands[w].name], held.get(name) if name else None
    yield Product(node, operands[1 - w].name, operands[w].name, entries, spelled, name, bias)


# --- weights as matrices -------------------------------------------------------------------------


def roles(letters: tuple[Letters, Letters, Letters]) -> tuple[Letters, Letters, Letters]:
    """Letters of the weight that are shared with both others, its own outputs, and summed over."""
    x, weight, result = letters
    shared = tuple(letter for letter in weight if letter in x and letter in result)
    outputs = tuple(letter for letter in weight if letter not in x)
    unknowns = tuple(letter for letter in weight if letter in x and letter not in result)
    return shared, outputs, unknowns


def arranged(tensor: Tensor, own: Letters, *merged: Letters) -> Tensor:
    """A tensor whose dimensions are merged role by role."""
    order = [own.index(letter) for role in merged for letter in role]
    sizes = [prod(tensor.shape[own.index(letter)] for letter in role) for role in merged]
    return tensor.permute(order).reshape(sizes)


def matrix(product: Product, weight: Tensor) -> Tensor:
    """Entries of the operand (or their positions) as (groups, outputs, unknowns)."""
    if product.letters is not None:
        shared, outputs, unknowns = roles(product.letters)
        return arranged(weight, product.letters[1], shared, outputs, unknowns)
    groups = product.groups
    if product.node.kind in DECONVOLUTIONS:
        inputs, outs = weight.shape[:2]
        split = weight.reshape(groups, inputs // groups, outs, *weight.shape[2:])
        dims = tuple(range(3, split.ndim))
        return split.transpose(1, 2).flip(dims).reshape(groups, outs, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def outputs_dim(product: Product) -> int:
    """Dimension of the result that the outputs of a layer lie along: the last of several."""
    if product.letters is None:
        return 1
    x, weight, result = product.letters
    own = [dim for dim, letter in enumerate(result) if letter in weight and letter not in x]
    return own[-1] - len(result) if own else -1


def inputs_dim(product: Product) -> int | None:
    """Which of the first two dimensions of a parameter a product sums over, the other one being
    that of its outputs; None where the parameter is not their matrix.

    It is where each output has all entries that lie at one place of the other dimension, in the
    group of a transposed convolution.
    """
    shape, groups = product.entries.shape, 1
    if product.letters is None:
        if len(viewed(product.entries.way, torch.empty(shape, device="meta")).shape) != len(shape):
            return None
        groups = product.groups if product.node.kind in DECONVOLUTIONS else 1
    else:
        shared, outputs, unknowns = roles(product.letters)
        if shared or len(outputs) != 1 or len({*outputs, *unknowns}) < len(product.letters[1]):
            return None
    if len(shape) < 2:
        return None
    at = positions(product)
    if not at.numel():
        return 1
    row, outputs_of = at[0, 0], at[:, :, 0].flatten()
    for dim in (1, 0) if groups == 1 else (0,):
        told = shape[1 - dim]
        where, others = (torch.unravel_index(line, shape)[1 - dim] for line in (row, outputs_of))
        is_whole = len(row) * told * groups == prod(shape) and bool((where == where[0]).all())
        if is_whole and len(torch.unique(others)) * groups == len(others):
            return dim
    return None


def positions(product: Product) -> Tensor:
    """Of the entries of a layer's weight, where they are in the flattened parameter.

    Shape (groups, outputs of one group, unknowns).
    """
    return matrix(product, product.index)
