"""Layers whose weights can be solved by least squares, as a network's graph tells of them.

A layer is a call, or several of the same weight, whose outputs are sums of its inputs times entries
of one parameter, and perhaps of a bias: convolutions of any rank, transposed ones too, linear
layers, products with a matrix, each of the projections that one parameter packs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from rarefy.graph.program import Graph, Node
from rarefy.pruning.running.products import (
    Entries,
    Product,
    handed,
    multiplying,
    outputs_dim,
    positions,
    roles,
)
from rarefy.pruning.running.uses import adjoins


class Layers:
    """The products of a graph, and all that reads what they multiply with.

    Attributes:
        graph: any.
        products: name of a call -> what it multiplies.
        others: path of a tensor -> kind of a call that reads it and does not multiply activations
            with it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        held = handed(graph, graph.tensor_paths)
        self.products: Mapping[str, Product] = {
            product.node.name: product for product in multiplying(graph, held)
        }
        self.others: dict[str, str] = {}
        self._reads: dict[str, list[tuple[str, str, Entries]]] = {}
        for node in graph.nodes:
            for name in node.inputs if node.name not in held else ():
                if name in held:
                    read = (node.name, name, held[name])
                    self._reads.setdefault(held[name].path, []).append(read)
                    product = self.products.get(node.name)
                    if (product is None or product.weight != name) and node is not graph.output:
                        self.others[held[name].path] = node.kind
        self._names = self._named()

    def groups(self) -> list[list[Product]]:
        """The products, those together that stand next to each other as calls of one layer."""
        rank = {node.name: number for number, node in enumerate(self.graph.nodes)}
        keys = {name: product.entries.key for name, product in self.products.items()}
        found: list[list[Product]] = []
        for product in self.products.values():
            last = [own.node for own in found[-1]] if found else []
            if last and adjoins(rank, keys, last, product.node):
                found[-1].append(product)
            else:
                found.append([product])
        return found

    def name(self, product: Product) -> str:
        """Path of the module that makes the call; where it makes several, that of the weight."""
        return self._names[product.node.name]

    def _named(self) -> dict[str, str]:
        weights: dict[str, set[str]] = {}
        for product in self.products.values():
            weights.setdefault(product.node.scope, set()).add(_label(product))
        return {
            name: scope if scope and len(weights[scope]) == 1 else _label(product)
            for name, product in self.products.items()
            for scope in [product.node.scope]
        }

    def unsolvable(self, uses: Sequence[Product]) -> str:
        """Why the weight of one call, or of several at once, cannot be solved for; or empty."""
        first = uses[0]
        if 0 in self.graph.by_name[first.weight].shape:
            return "its weight has no entries"
        if self._is_read(first.entries, {(use.node.name, use.weight) for use in uses}):
            return "its weight is used several times"
        if len({(u.node.kind, u.groups, u.entries.key, u.added) for u in uses}) > 1:
            return "its weight is used in several ways"
        if not all(map(self._is_plain, uses)):
            return "it is not a plain product with a matrix"
        if first.letters is None and any(len(use.node.shape) != self._rank(use) for use in uses):
            return "its inputs have no batch dimension"
        if first.added is None:
            return ""
        if first.bias is None or first.bias.quantizer is not None:
            return "its bias is computed in the graph"
        if self._is_read(first.bias, {(use.node.name, first.added) for use in uses}):
            return "its bias is used several times"
        return ""

    def _is_read(self, entries: Entries, known: Collection[tuple[str, str]]) -> bool:
        """Whether anything but these operands of calls reads some of the entries."""
        index = entries.index if entries.views else torch.empty(0)
        if len(torch.unique(index)) < index.numel():  # of one entry, several places are made
            return True
        reads = self._reads[entries.path]
        return any((n, o) not in known and entries.overlap(other) for n, o, other in reads)

    def _rank(self, product: Product) -> int:
        return len(self.graph.by_name[product.weight].shape)

    def _is_plain(self, product: Product) -> bool:
        """Whether each output is the sum over all unknowns of a row, and of its bias."""
        node, shapes = product.node, self.graph.by_name
        if {node.argument("alpha"), node.argument("beta")} - {None, 1}:
            return False
        if product.letters is None:
            return True
        x, weight, result = product.letters
        shared, outputs, unknowns = roles(product.letters)
        free = set(x) - set(weight)
        if shared or len(outputs) != 1 or set(result) != {*free, *outputs}:
            return False
        if any(len(set(letters)) < len(letters) for letters in product.letters):
            return False
        sizes = [dict(zip(x, shapes[product.x].shape, strict=True))]
        sizes.append(dict(zip(weight, shapes[product.weight].shape, strict=True)))
        if any(sizes[0][letter] != sizes[1][letter] for letter in unknowns):
            return False
        if product.added is None:
            return True
        added, size = shapes[product.added].shape, sizes[1][outputs[0]]
        return result[-1:] == outputs and added[-1:] == (size,) and prod(added) == size


def next_norm(graph: Graph, layer: Node) -> Node | None:
    """The BatchNorm of a layer's result, if that is all that becomes of it."""
    users = graph.users[layer.name]
    if len(users) != 1 or users[0].kind != "batch_norm":
        return None
    return users[0] if users[0].args[0].name == layer.name else None


def picked(tensor: Tensor, at: Tensor) -> Tensor:
    """Entries of a parameter, or of what has its shape, by their positions."""
    return tensor.reshape(-1)[at.to(tensor.device)]


def put(tensor: Tensor, at: Tensor, values: Tensor) -> None:
    """Write entries of a parameter in place, as many as there are positions, in their order."""
    flat = tensor.detach().reshape(-1).clone()
    flat[at.flatten().to(flat.device)] = values.flatten().to(flat)
    tensor.copy_(flat.view(tensor.shape))


def survivors(left: Product, right: Product, kept: Mapping[int, Tensor]) -> Tensor | None:
    """Which outputs of a layer are left in a smaller one; None where that is not known.

    Each is known by one of its entries, which is looked up in the layer. Where nothing is known of
    a dimension, as many outputs are the same outputs.

    Args:
        left: the layer.
        right: the smaller one.
        kept: dimension of the parameter -> which of its entries the smaller one has; those that
            have all are left out.
    """
    old, new = left.entries.shape, right.entries.shape
    if not kept and old == new:
        return torch.arange(right.node.shape[outputs_dim(right)])
    rows = [positions(product).flatten(0, 1) for product in (left, right)]
    at = list(torch.unravel_index(rows[1][:, 0], new))
    for dim, index in kept.items():
        at[dim] = index[at[dim]]
    if any(old[dim] != new[dim] and dim not in kept for dim in range(len(old))):
        return torch.arange(len(rows[1])) if len(rows[0]) == len(rows[1]) else None
    row = torch.full((prod(old),), -1, dtype=torch.int32)
    row[rows[0]] = torch.arange(len(rows[0]), dtype=torch.int32)[:, None].expand(rows[0].shape)
    steps = [prod(old[dim + 1 :]) for dim in range(len(old))]
    found = row[sum(where * step for where, step in zip(at, steps, strict=True))]
    return None if bool((found < 0).any()) else found.long()


def part_of(product: Product) -> str:
    """Which part of a parameter it multiplies with, as one would index it; empty for all of it."""
    shape = product.entries.shape
    at = torch.unique(product.index) if product.entries.views else torch.empty(0)
    if len(at) in (0, prod(shape)):
        return ""
    places = [torch.unique(where).tolist() for where in torch.unravel_index(at, shape)]
    parts = [_spelled(own, size) for own, size in zip(places, shape, strict=True)]
    while parts[-1] == ":":
        parts.pop()
    return f"[{', '.join(parts)}]"


def _label(product: Product) -> str:
    """Path of the module that holds a weight, or of the weight, with the part of it that it is."""
    return product.path.removesuffix(".weight") + part_of(product)


def _spelled(places: Sequence[int], size: int) -> str:
    """Places along a dimension as one would index them."""
    first, last, step = places[0], places[-1] + 1, 1
    if len(places) == size:
        return ":"
    if len(places) > 1:
        step = places[1] - first
    if list(places) != list(range(first, last, step)):
        return "..."
    return f"{first}:{last}" + (f":{step}" if step > 1 else "")
