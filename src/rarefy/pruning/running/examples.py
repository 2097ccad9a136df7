"""Examples that layers are solved and outputs compared on, as one batch or in parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.batches import (
    batch_size,
    batches,
    between,
    has_tokens,
    length_of,
    lengthened,
    map_tensors,
    take,
    tensors,
)
from rarefy.errors import DataError
from rarefy.graph.model import GraphModel, last_use
from rarefy.graph.program import Graph, Spec
from rarefy.pruning.running.origins import all_padding, counted
from rarefy.types import Data, Inputs

MEMORY = 1 << 30
"""Bytes of activations that may be held at once; fewer samples are used beyond it."""


def collect(data: Data, samples: int, where: str = "repair(data)") -> tuple[Inputs, Inputs]:
    """The first examples of the data as one batch, and the first batch.

    Raises:
        DataError: there are none, they are not finite or nothing but padding, or batches do not fit
            together.
    """
    held = alike(leading(data, samples, where), where)
    joined = [
        torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]
        for parts in zip(*map(pytree.tree_leaves, held), strict=True)
    ]
    result: Inputs = pytree.tree_unflatten(joined, pytree.tree_structure(held[0]))
    return take(result, samples), held[0]


def leading(data: Data, samples: int, where: str) -> list[Inputs]:
    """The first batches of the data as they come, of at least so many examples if there are.

    Batches that are nothing but padding are passed over.

    Raises:
        DataError: there are none, they are not finite, or nothing but padding.
    """
    held: list[Inputs] = []
    found = 0
    for inputs, _ in batches(data, where):
        if not has_tokens(inputs):
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(inputs)):
            raise DataError(where, "inputs are NaN or infinite", "Clean the data")
        held.append(inputs)
        found += batch_size(inputs)
        if found >= samples:
            break
    if not held:
        raise all_padding(where)
    return held


def alike(held: Sequence[Inputs], where: str) -> list[Inputs]:
    """Batches of one shape but for their number of examples, with their arguments in one order.

    Sequences with an ``attention_mask`` are padded to the longest of them.

    Raises:
        DataError: batches hold other arguments than the first, or examples of other sizes.
    """
    length = max(map(length_of, held))
    leaves, specs = zip(*(_plain(lengthened(batch, length)) for batch in held), strict=True)
    first = {place: _size(value) for place, value in leaves[0].items()}
    for own in leaves[1:]:
        if own.keys() != first.keys():
            raise DataError(
                where,
                "batches hold different arguments",
                "Yield the same tensors in every batch",
            )
        for place, value in own.items():
            if _size(value) != first[place]:
                raise DataError(
                    where,
                    f"examples are of several sizes, such as {first[place]} and {_size(value)}",
                    "Crop or pad them to one; sequences with an attention_mask are padded to the "
                    "longest",
                )
    return [pytree.tree_unflatten([own[place] for place in first], specs[0]) for own in leaves]


def _plain(inputs: Inputs) -> tuple[dict[pytree.KeyPath, Any], pytree.TreeSpec]:
    """What inputs hold by its place, mappings of all kinds as dictionaries; and their structure."""
    found, spec = pytree.tree_flatten_with_path(map_tensors(lambda tensor: tensor, inputs))
    return dict(found), spec


def _size(value: Any) -> tuple[int, ...] | None:
    """The size of one example; None for what holds no examples."""
    return tuple(value.shape[1:]) if isinstance(value, Tensor) and value.ndim else None


PART = 1 << 23
"""Bytes of one network's live values while a part of the examples runs through it."""


def affordable(model: GraphModel, wanted: int, at: Collection[str] | None = None) -> int:
    """How many examples fit into :data:`MEMORY`, both networks' live values counted.

    Args:
        model: the network.
        wanted: most examples.
        at: names of the calls at which values are held; all where it is not given.
    """
    peak, batch = live(model.graph, at)
    return max(1, min(wanted, MEMORY // max(2 * peak // batch, 1)))


def parts(model: GraphModel, inputs: Inputs) -> list[Inputs]:
    """The examples divided into parts of about one size that run in :data:`PART` bytes.

    No part is of one example where there are more: some networks are made for several.
    """
    size = batch_size(inputs)
    peak, batch = live(model.graph)
    step = max(2, PART // max(peak // batch, 1))
    number = min(-(-size // step), max(size // 2, 1))
    ends = [size * i // number for i in range(number + 1)]
    return [between(inputs, start, stop, size) for start, stop in pairwise(ends)]


def live(graph: Graph, at: Collection[str] | None = None) -> tuple[int, int]:
    """Bytes of the values that are held at once, at most, and how many examples they are of.

    Args:
        graph: with the sizes of its capture.
        at: names of the calls at which it counts; all where it is not given.
    """
    done = last_use(graph)
    held = peak = 0
    sizes: dict[str, int] = {}
    batch = 1
    for node in graph.nodes:
        if node.op == "input" and isinstance(node.value, Spec) and node.value.shape:
            batch = max(batch, node.value.shape[0])
        if node.op != "tensor":
            specs = [v for v in pytree.tree_leaves(node.value) if isinstance(v, Spec)]
            sizes[node.name] = sum(prod(s.shape) * s.dtype.itemsize for s in specs)
            held += sizes[node.name]
        if at is None or node.name in at:
            peak = max(peak, held)
        held -= sum(sizes.get(name, 0) for name in done[node.name])
    return peak, batch


def distance(
    found: Iterable[Sequence[Tensor]],
    expected: Iterable[Sequence[Tensor]],
    tokens: Iterable[Tensor | None],
) -> float:
    """Squared error of all outputs, each relative to its own squares, summed over all parts.

    Args:
        found: the outputs for each part of the examples.
        expected: what they should be; entries that are not finite do not count.
        tokens: for each part (B, L), which positions of outputs (B, L, ...) count; None for all.
    """
    misses = Misses()
    for given, wanted, own in zip(found, expected, tokens, strict=True):
        misses.add(given, wanted, own)
    return misses.relative


class Misses:
    """Squared errors of outputs, each summed over parts of the examples."""

    def __init__(self) -> None:
        self._errors = self._squares = torch.zeros((), dtype=torch.float64)

    def add(
        self, found: Sequence[Tensor], expected: Sequence[Tensor], tokens: Tensor | None = None
    ) -> None:
        """One part; entries of the expected outputs that are not finite do not count."""
        kept = [torch.isfinite(b) & counted(b, tokens) for b in expected]
        ends = [
            (a[k].double(), b[k].double()) for a, b, k in zip(found, expected, kept, strict=True)
        ]
        self._errors = self._errors + _numbers((a - b).square().sum() for a, b in ends)
        self._squares = self._squares + _numbers(b.square().sum() for _, b in ends)

    @property
    def relative(self) -> float:
        """The errors, each relative to its own squares, in all."""
        return float((self._errors / self._squares.clamp_min(1e-30)).sum())


def _numbers(scalars: Iterable[Tensor]) -> Tensor:
    return torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
